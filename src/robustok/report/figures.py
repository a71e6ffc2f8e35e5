"""Images and plots as data URIs: pixels become PNG, curves become SVG."""

import base64
import io
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import matplotlib
import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from PIL import Image

from robustok.files import IMAGE_FORMATS
from robustok.report.collect import BeforeAfter, ImageRows, Run, number
from robustok.report.names import decimal, joined

COLOURS = ("#2f6690", "#c8553d", "#5a8a54", "#8a5a83", "#b08900", "#4d4d4d")
ORDER = ("held_out", "total", "pixel", "perceptual", "adversarial", "codebook", "commitment", "semantic")
NO_CURVE = {"step", "seconds", "time", "seed"}
POINTS = 250  # of a curve
MARKED = 25  # points up to which each is marked
SMALL = 96  # CSS pixels that small images are wide: ten in a row, so that of ten classes each has a column
RANKED = 8  # images shown as most improved, and as most worsened


@dataclass(frozen=True)
class Picture:
    """An image of the page: data URI, alternative text, width in CSS pixels (0: as the page decides)."""

    uri: str
    alt: str
    width: int = 0
    caption: str = ""


@dataclass(frozen=True)
class Gallery:
    """Pictures under a title; ``legend`` names the colours of a plot, ``rows`` with ``heads`` are a table."""

    title: str
    pictures: tuple[Picture, ...]
    note: str = ""
    legend: tuple[str, ...] = ()
    heads: tuple[str, ...] = ()
    rows: tuple[tuple[str, ...], ...] = ()
    best: int = -1


@dataclass(frozen=True)
class Slider:
    """``tiles`` are the same images before and after; ``galleries`` show some of them side by side."""

    title: str
    note: str
    tiles: tuple[tuple[Picture, Picture], ...]
    galleries: tuple[Gallery, ...]


def slider(images: BeforeAfter, budget: int) -> Slider:
    """Both decoders over each other, then side by side what improved and what worsened most.

    Args:
        images: the decoded images.
        budget: how many pixels of each decoder may be shown.
    """
    count, height, width, _ = images.decoded["before"].shape
    shown = max(1, min(count, 256, budget // (height * width)))
    change = images.score_after - images.score_before
    order = [int(i) for i in np.argsort(change, kind="stable") if math.isfinite(change[i])]
    # Of many images, those that changed most for better and for worse are among the ones shown.
    half = min(RANKED, shown // 3)
    chosen = sorted([*dict.fromkeys([*order[:half], *order[::-1][:half], *range(count)])][:shown])
    layers = {name: decoded[chosen] for name, decoded in images.decoded.items()}
    amplified, factor = amplified_difference(layers["before"], layers["after"])
    layers[f"difference × {factor}"] = amplified
    names = {i: joined([f"image {i}", images.labels[i]]) for i in chosen}
    tile_scale, strip_scale = (max(1, round(wide / width)) for wide in (SMALL, 64))

    def strip(i: int) -> Picture:
        pixels = np.concatenate([layer[chosen.index(i)] for layer in layers.values()], axis=1)
        scores = f"{decimal(images.score_before[i], 3)} → {decimal(images.score_after[i], 3)}"
        caption = joined([images.labels[i], scores if math.isfinite(change[i]) else ""], ": ")
        return Picture(png(pixels), f"{names[i]}: {', '.join(layers)}", pixels.shape[1] * strip_scale, caption)

    strips = {
        "Most improved": [i for i in order[:RANKED] if change[i] < 0 and i in names],
        "Most worsened": [i for i in order[::-1][:RANKED] if change[i] > 0 and i in names],
    }
    note = f"From left to right: {', '.join(layers)}."
    if order:
        fell, rose = (change < 0).sum(), (change > 0).sum()
        note += f" Beneath: label and {images.score_name} (lower is better), which fell for {fell} and rose for {rose}"
        note += f" of {len(order)} images."

    def tile(k: int, layer: str) -> Picture:
        return Picture(png(layers[layer][k]), f"{names[chosen[k]]}, {layer}", width * tile_scale)

    tiles = tuple((tile(k, "before"), tile(k, "after")) for k in range(shown))
    strips = strips if any(strips.values()) else {"Side by side": chosen[:12]}
    galleries = tuple(Gallery(title, tuple(map(strip, shown)), note) for title, shown in strips.items() if shown)
    return Slider(images.title, f"{shown} of {count} images." if shown < count else "", tiles, galleries)


def strips(rows: ImageRows, budget: int) -> Gallery:
    """Rows of images with their titles as captions; as many columns as ``budget`` pixels allow, 32 at most."""
    count, columns, height, width, _ = rows.images.shape
    shown = max(1, min(columns, 32, budget // (count * height * width)))
    gap = max(1, width // 16)
    padded = np.pad(rows.images[:, :shown], ((0, 0), (0, 0), (0, 0), (0, gap), (0, 0)), constant_values=255)
    sheets = padded.transpose(0, 2, 1, 3, 4).reshape(count, height, shown * (width + gap), 3)
    scale = max(1, round(48 / width))
    pictures = [
        Picture(png(sheet), f"{shown} images: {title or rows.title}", sheet.shape[1] * scale, title)
        for sheet, title in zip(sheets, rows.row_titles, strict=True)
    ]
    return Gallery(rows.title, tuple(pictures), f"The first {shown} of {columns} columns." if shown < columns else "")


def progress(run: Run, budget: int) -> Gallery:
    """At most four pictures of a training, from the first to the last, of at most ``budget`` pixels each."""
    pictures = []
    for index in sorted({round(i) for i in np.linspace(0, len(run.progress) - 1, 4)}) if run.progress else ():
        try:
            with Image.open(run.progress[index], formats=IMAGE_FORMATS) as file:
                image = file.convert("RGB")
        except (OSError, ValueError, SyntaxError, Image.DecompressionBombError):  # such as one that is being written
            continue
        image = image.reduce(max(1, math.ceil(math.sqrt(image.width * image.height / budget))))
        step = f"step {run.progress[index].stem.lstrip('0') or '0'}"
        pictures.append(Picture(png(np.asarray(image)), f"samples at {step}", caption=step))
    return Gallery(run.name or "run", tuple(pictures))


def amplified_difference(before: np.ndarray, after: np.ndarray) -> tuple[np.ndarray, int]:
    """|after - before| times the largest power of two, at most 32, that leaves all but 1 % of the values unclipped.

    Returns:
        The images (uint8, the shape of ``before``) and the factor.
    """
    change = np.abs(after.astype(np.int16) - before.astype(np.int16))
    brightest = max(1.0, float(np.percentile(change, 99)))
    factor = int(2 ** np.clip(math.floor(math.log2(255 / brightest)), 0, 5))
    return np.minimum(change * factor, 255).astype(np.uint8), factor


def png(pixels: np.ndarray) -> str:
    """Pixels (H, W, 3) uint8 to the data URI of a PNG, grey where all channels agree."""
    grey = (pixels == pixels[..., :1]).all()
    file = io.BytesIO()
    Image.fromarray(np.ascontiguousarray(pixels[..., 0] if grey else pixels)).save(file, "PNG", optimize=True)
    return _uri(file.getvalue(), "image/png")


def curves(runs: Sequence[Run]) -> list[Gallery]:
    """Training curves, a gallery for each stage; seeds of one stage share its plots."""
    found = []
    for group in dict.fromkeys(run.group for run in runs if run.log):
        same = [run for run in runs if run.group == group and run.log]
        plots = []
        for key in curve_keys([run.log for run in same]):
            lines = [np.array([(line["step"], number(line.get(key))) for line in run.log], float) for run in same]
            lines = [points[np.isfinite(points).all(1)] for points in lines]
            last = joined(decimal(points[-1, 1]) for points in lines if len(points))
            name = "validation Fréchet distance" if key == "held_out" else key.replace("_", " ")
            uri = plot([_thin(points) for points in lines], log=key != "lr")
            plots.append(Picture(uri, f"{name} against training step, ending at {last}", caption=name))
        if plots:
            legend = tuple(f"seed {run.seed or run.name}" for run in same) if len(same) > 1 else ()
            found.append(Gallery(group or "run", tuple(plots), legend=legend))
    return found


def curve_keys(logs: Sequence[Sequence[dict[str, Any]]]) -> list[str]:
    """What can be drawn: keys with a number in two lines or more, loss terms first."""
    counts: dict[str, int] = {}
    for line in (line for log in logs for line in log):
        for key, value in line.items():
            counts[key] = counts.get(key, 0) + math.isfinite(number(value))
    keys = [key for key, count in counts.items() if count > 1 and key not in NO_CURVE]
    return sorted(keys, key=lambda key: ORDER.index(key) if key in ORDER else len(ORDER))


def plot(lines: Sequence[np.ndarray], baseline: float = math.nan, log: bool = False) -> str:
    """Draw lines as a small SVG on white.

    Args:
        lines: points (P, 2), or (P, 3) with standard errors, in the colours of the page; joined where no x repeats.
        baseline: height of a dashed line; NaN draws none.
        log: whether an axis that spans more than a factor of 30 may be logarithmic.

    Returns:
        The data URI.
    """
    style = {"svg.fonttype": "none", "font.family": "sans-serif", "font.size": 7, "svg.hashsalt": "robustok"}
    with matplotlib.rc_context(style):
        figure, file = Figure(figsize=(2.7, 1.55), layout="constrained"), io.BytesIO()
        axes = figure.add_subplot()
        for points, colour in zip(lines, COLOURS * len(lines), strict=False):
            points = points[np.argsort(points[:, 0], kind="stable")].clip(-1e30, 1e30)  # an axis beyond that overflows
            joins = "-" if len({*points[:, 0]}) == len(points) else ""
            marker = "o" if len(points) <= MARKED else None
            axes.plot(*points.T[:2], joins, color=colour, linewidth=1.1, marker=marker, markersize=2.4)
            if points.shape[1] == 3:
                axes.errorbar(
                    *points.T[:2], np.nan_to_num(np.abs(points[:, 2])), fmt="none", ecolor=colour, elinewidth=0.8
                )
        if math.isfinite(baseline):
            axes.axhline(baseline, color="#5c6370", linewidth=0.8, linestyle=(0, (4, 3)))
        axes.xaxis.set_major_locator(MaxNLocator(4))
        axes.yaxis.set_major_locator(MaxNLocator(4))
        heights = [*(height for points in lines for height in points[:, 1])] or [1.0]
        if log and 0 < min(heights) < max(heights) / 30:
            axes.set_yscale("log")
        else:
            axes.ticklabel_format(axis="y", scilimits=(-3, 4), useOffset=False)
        axes.spines[["top", "right"]].set_visible(False)
        axes.spines[["left", "bottom"]].set_color("#b8bcc2")
        axes.tick_params(which="both", color="#b8bcc2", labelcolor="#5c6370", length=2)
        axes.grid(axis="y", color="#eceef1", linewidth=0.6)
        figure.savefig(file, format="svg", metadata={"Date": None, "Creator": None, "Format": None, "Type": None})
    return _uri(file.getvalue(), "image/svg+xml")


def _thin(points: np.ndarray) -> np.ndarray:
    """Average neighbouring points (P, 2) so that at most ``POINTS`` remain."""
    if len(points) <= POINTS:
        return points
    return np.array([chunk.mean(0) for chunk in np.array_split(points, POINTS)])


def _uri(content: bytes, kind: str) -> str:
    return f"data:{kind};base64,{base64.b64encode(content).decode()}"
