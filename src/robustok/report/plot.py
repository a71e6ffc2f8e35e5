"""All that is drawn, as HTML with data URIs: training curves as SVG, pictures packed into one PNG a sheet."""

import base64
import html
import io
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from PIL import Image

from robustok.report.collect import Comparison, Grid, Run, number

COLOURS = ("#2f6690", "#c8553d", "#5a8a54", "#8a5a83", "#b08900", "#4d4d4d")
ORDER = (
    "held_out",
    "total",
    "pixel",
    "perceptual",
    "adversarial",
    "codebook",
    "commitment",
    "semantic",
    "codebook_usage",
    "lr",
)
TITLES = {"held_out": "held-out Fréchet distance"}
NO_CURVE = {"step", "seconds", "time", "seed"}
POINTS = 250  # of a curve
MARKED = 25  # points up to which each is marked: what is measured now and then, such as a held-out distance
RANKED = 8  # pictures shown as most improved, and as most worsened

e = html.escape


@dataclass(frozen=True)
class Sprite:
    """Pictures of one size in one PNG, ``columns`` a row, without gaps; ``count`` is how many there are."""

    uri: str
    columns: int
    count: int
    width: int
    height: int


Sprites = Sequence[tuple[str, str, Sprite]]  # class in the page, name in words (HTML), pictures


def decimal(value: float, digits: int = 4, sign: str = "-") -> str:
    """Significant digits with a true minus sign, as HTML; an en dash where there is no number."""
    if not math.isfinite(value):
        return "&ndash;"
    size = abs(value)
    if size != 0 and (size < 1e-3 or size >= 1e6):
        text = f"{value:{sign}.2e}"
    else:
        decimals = digits - 1 - math.floor(math.log10(size or 1))
        text = f"{value:{sign},.{min(max(decimals, 0), 6)}f}"
    return text.replace("-", "&minus;")


# --- Sections of the page ---


def curve_section(runs: Sequence[Run]) -> str:
    """A row of small figures for each stage; seeds of one stage share them."""
    blocks = ""
    for group in dict.fromkeys(run.group for run in runs if run.log):
        same = [run for run in runs if run.group == group and run.log]
        logs = [run.log for run in same]
        figures = ""
        for key in curve_keys(logs):
            last = ", ".join(decimal(_last(log, key)) for log in logs)
            name = e(TITLES.get(key, key.replace("_", " ")))
            figures += (
                f'<figure><figcaption>{name}</figcaption><img src="{curve(logs, key)}" '
                f'alt="{name} against training step, ending at {last}"></figure>'
            )
        if figures:
            keys = [
                f'<i style="background:{COLOURS[i % 6]}"></i>seed {e(r.seed or r.name)}' for i, r in enumerate(same)
            ]
            legend = f'<span class="legend">{" ".join(keys)}</span>' if len(same) > 1 else ""
            blocks += f'<h3>{e(group) or "run"}{legend}</h3><div class="curves">{figures}</div>'
    return blocks


def _last(log: Sequence[dict[str, Any]], key: str) -> float:
    return next((value for line in reversed(log) if math.isfinite(value := number(line.get(key)))), math.nan)


def grid_section(grid: Grid, budget: int) -> str:
    """Rows of pictures with their titles; as many columns as ``budget`` pixels allow."""
    rows, columns, height, width, _ = grid.images.shape
    shown = max(1, min(columns, 32, budget // (rows * height * width)))
    # Small pictures shrink to the width of the page, down to 48 on the screen; beyond that the row scrolls.
    scale = max(math.ceil(48 / width), min(magnification(width), 840 // (shown * width)))
    gap = max(1, 4 // scale)
    sheet = tile(grid.images[:, :shown], gap)
    titles = "".join(f"<span>{e(title)}</span>" for title in grid.row_titles)
    alt = f"{grid.title}: {shown} pictures in each of {rows} rows: {', '.join(grid.row_titles)}"
    left = f' <span class="small">first {shown} of {columns}</span>' if shown < columns else ""
    return (
        f'<h3>{e(grid.title)}{left}</h3><div class="grid">'
        f'<div class="titles" style="--h:{(height + gap) * scale}px">{titles}</div><div class="scroll">'
        f'<img class="pixels" src="{png(sheet)}" alt="{e(alt)}" '
        f'width="{sheet.shape[1] * scale}" height="{sheet.shape[0] * scale}"></div></div>'
    )


def comparison_section(comparison: Comparison, index: int, budget: int) -> str:
    """The wipe, then side by side with the difference, then what improved and what worsened most."""
    count, height, width, _ = comparison.before.shape
    shown = max(1, min(count, 256, budget // (height * width)))
    # Of many pictures those that changed most, for better and for worse, must be among the shown ones.
    change = comparison.score_after - comparison.score_before
    order = [int(i) for i in np.argsort(change, kind="stable") if math.isfinite(change[i])]
    half = min(RANKED, shown // 3)
    ranked = dict.fromkeys([*order[:half], *order[::-1][:half], *range(count)])
    chosen = sorted(list(ranked)[:shown])
    spot = {picture: place for place, picture in enumerate(chosen)}
    amplified, factor = amplified_difference(comparison.before[chosen], comparison.after[chosen])
    layers = {"before": comparison.before[chosen], "after": comparison.after[chosen]}
    if comparison.control is not None:
        layers["control"] = comparison.control[chosen]
    layers[f"difference &times; {factor}"] = amplified
    sprites = [(f"s{index}-{layer}", name, sprite(images)) for layer, (name, images) in enumerate(layers.items())]
    rules = "".join(_sprite_rule(name, sprite) for name, _, sprite in sprites)

    def cards(pictures: Sequence[int]) -> str:
        return "".join(_card(comparison, picture, spot[picture], sprites) for picture in pictures)

    better = [i for i in order[:RANKED] if change[i] < 0 and i in spot]
    worse = [i for i in order[::-1][:RANKED] if change[i] > 0 and i in spot]
    tiles = "".join(_wipe(comparison, picture, spot[picture], sprites) for picture in chosen)
    legend = ", ".join(name for _, name, _ in sprites)
    parts = [
        f"<h3>{e(comparison.title)}</h3><style>{rules}</style>",
        '<div class="viewer"><label hidden>before <input type="range" min="0" max="100" value="100"> after</label>'
        f'<p class="small">{_shown(shown, count)} Point at a picture to swap before and after.</p>'
        f'<div class="tiles">{tiles}</div></div>',
        f'<h4>Side by side</h4><p class="small">From left to right: {legend}.{_score_words(comparison)}</p>',
        f'<div class="cards">{cards(chosen[:12])}</div>',
        f'<h4>Most improved</h4><div class="cards">{cards(better)}</div>' if better else "",
        f'<h4>Most worsened</h4><div class="cards">{cards(worse)}</div>' if worse else "",
    ]
    return "".join(parts)


def _shown(shown: int, count: int) -> str:
    return f"All {count} pictures." if shown == count else f"{shown} of {count} pictures."


def _score_words(comparison: Comparison) -> str:
    change = comparison.score_after - comparison.score_before
    change = change[np.isfinite(change)]
    if not change.size:
        return ""
    return (
        f" Beneath: class and {e(comparison.score_name)} (lower is better), which fell for {(change < 0).sum()} of "
        f"{change.size} pictures and rose for {(change > 0).sum()}."
    )


def _sprite_rule(name: str, sprite: Sprite) -> str:
    scale = magnification(sprite.width)
    return (
        f".{name}{{--w:{sprite.width * scale}px;--h:{sprite.height * scale}px;"
        f"background-size:{sprite.columns * sprite.width * scale}px auto;background-image:url({sprite.uri})}}"
    )


def _place(spot: int, sprite: Sprite) -> str:
    return f"--x:{spot % sprite.columns};--y:{spot // sprite.columns}"


def _wipe(comparison: Comparison, picture: int, spot: int, sprites: Sprites) -> str:
    (before, _, sprite), (after, _, _) = sprites[:2]
    alt = e(f"picture {picture}, {comparison.labels[picture]}, before and after")
    return (
        f'<span class="tile {before}" style="{_place(spot, sprite)}" role="img" aria-label="{alt}">'
        f'<span class="tile top {after}"></span></span>'
    )


def _card(comparison: Comparison, picture: int, spot: int, sprites: Sprites) -> str:
    tiles = "".join(
        f'<span class="tile {css}" style="{_place(spot, sprite)}" role="img" '
        f'aria-label="picture {picture}, {name}"></span>'
        for css, name, sprite in sprites
    )
    before, after = comparison.score_before[picture], comparison.score_after[picture]
    score = f"{decimal(before, 3)} → {decimal(after, 3)}" if math.isfinite(before) and math.isfinite(after) else ""
    label = comparison.labels[picture]
    return f'<figure class="card">{tiles}<figcaption><b>{e(label)}</b> {score}</figcaption></figure>'


def progress_pictures(files: Sequence[Path], budget: int) -> Iterable[str]:
    """At most four progress pictures, from the first to the last."""
    chosen = sorted({round(i) for i in np.linspace(0, len(files) - 1, 4)}) if files else []
    for file in (files[i] for i in chosen):
        try:
            uri = progress_picture(file, budget)
        except (OSError, ValueError, SyntaxError):  # what Pillow raises for a picture that is still being written
            continue
        step = e(file.stem.lstrip("0") or "0")
        image = f'<img class="pixels" src="{uri}" alt="samples at step {step}">'
        yield f"<figure>{image}<figcaption>step {step}</figcaption></figure>"


# --- Figures and pixels ---


def curve_keys(logs: Sequence[Sequence[dict[str, Any]]]) -> list[str]:
    """What can be drawn: keys with a number in two lines or more, loss terms first."""
    counts: dict[str, int] = {}
    for line in (line for log in logs for line in log):
        for key, value in line.items():
            counts[key] = counts.get(key, 0) + math.isfinite(number(value))
    keys = [key for key, count in counts.items() if count > 1 and key not in NO_CURVE]
    return sorted(keys, key=lambda key: ORDER.index(key) if key in ORDER else len(ORDER))


def curve(logs: Sequence[Sequence[dict[str, Any]]], key: str) -> str:
    """Draw one key against the step, a line for each log, as a small SVG on white.

    Long logs are averaged to at most ``POINTS`` points. An axis that spans more than a factor of 30 is logarithmic.
    """
    with small_figure() as (axes, uri):
        lowest, highest = math.inf, -math.inf
        for index, log in enumerate(logs):
            points = np.array([(line["step"], number(line.get(key))) for line in log], float).reshape(-1, 2)
            points = _thin(points[np.isfinite(points).all(1)].clip(-1e30, 1e30))  # an axis beyond that overflows
            if len(points):
                marker, colour = "o" if len(points) <= MARKED else None, COLOURS[index % len(COLOURS)]
                axes.plot(*points.T, color=colour, linewidth=1.1, marker=marker, markersize=2.2)
                lowest, highest = min(lowest, points[:, 1].min()), max(highest, points[:, 1].max())
        axes.xaxis.set_major_locator(MaxNLocator(4, integer=True))
        if 0 < lowest < highest / 30 and key != "lr":
            axes.set_yscale("log")
    return uri()


@contextmanager
def small_figure() -> Iterator[tuple[Axes, Callable[[], str]]]:
    """A small plot on white in the style of the page: its axes, and what makes an SVG's data URI of it afterwards."""
    style = {"svg.fonttype": "none", "font.family": "sans-serif", "font.size": 7, "svg.hashsalt": "robustok"}
    with matplotlib.rc_context(style):
        figure = Figure(figsize=(2.7, 1.55), layout="constrained")
        axes, file = figure.add_subplot(), io.BytesIO()
        axes.xaxis.set_major_locator(MaxNLocator(4))
        axes.yaxis.set_major_locator(MaxNLocator(4))
        yield axes, lambda: _uri(file.getvalue(), "image/svg+xml")
        if axes.get_yscale() == "linear":
            axes.ticklabel_format(axis="y", scilimits=(-3, 4), useOffset=False)
        axes.spines[["top", "right"]].set_visible(False)
        axes.spines[["left", "bottom"]].set_color("#b8bcc2")
        axes.tick_params(which="both", color="#b8bcc2", labelcolor="#5c6370", length=2)
        axes.grid(axis="y", color="#eceef1", linewidth=0.6)
        figure.savefig(file, format="svg", metadata={"Date": None, "Creator": None, "Format": None, "Type": None})


def sprite(images: np.ndarray) -> Sprite:
    """Pack pictures (N, H, W, 3) uint8 into one nearly square PNG."""
    count, height, width, _ = images.shape
    columns = math.ceil(math.sqrt(count))
    rows = math.ceil(count / columns)
    blank = np.full((rows * columns - count, height, width, 3), 255, np.uint8)
    sheet = np.concatenate([images, blank]).reshape(rows, columns, height, width, 3)
    return Sprite(png(tile(sheet)), columns, count, width, height)


def tile(images: np.ndarray, gap: int = 0) -> np.ndarray:
    """Pictures (R, C, H, W, 3) to one sheet (R (H + gap), C (W + gap), 3), white between them."""
    rows, columns, height, width, _ = images.shape
    images = np.pad(images, ((0, 0), (0, 0), (0, gap), (0, gap), (0, 0)), constant_values=255)
    sheet = images.transpose(0, 2, 1, 3, 4)  # (R, H + gap, C, W + gap, 3)
    return sheet.reshape(rows * (height + gap), columns * (width + gap), 3)


def amplified_difference(before: np.ndarray, after: np.ndarray) -> tuple[np.ndarray, int]:
    """|after - before| times the largest power of two, at most 32, that leaves all but 1 % of the values unclipped.

    Returns:
        The pictures (uint8, the shape of ``before``) and the factor.
    """
    change = np.abs(after.astype(np.int16) - before.astype(np.int16))
    brightest = max(1.0, float(np.percentile(change, 99)))
    factor = int(2 ** np.clip(math.floor(math.log2(255 / brightest)), 0, 5))
    return np.minimum(change * factor, 255).astype(np.uint8), factor


def progress_picture(path: Path, pixels: int) -> str:
    """A progress picture as PNG, scaled down to at most ``pixels`` pixels.

    Raises:
        OSError: it is no picture, or one that is still being written.
    """
    with Image.open(path) as image:
        image = image.convert("RGB")
    shrink = math.sqrt(pixels / (image.width * image.height))
    if shrink < 1:
        image = image.resize((max(1, int(image.width * shrink)), max(1, int(image.height * shrink))))
    return png(np.asarray(image))


def png(pixels: np.ndarray) -> str:
    """Pixels (H, W, 3) uint8 to the data URI of a PNG, grey where all channels agree."""
    grey = (pixels == pixels[..., :1]).all()
    file = io.BytesIO()
    Image.fromarray(np.ascontiguousarray(pixels[..., 0] if grey else pixels)).save(file, "PNG", optimize=True)
    return _uri(file.getvalue(), "image/png")


def magnification(size: int) -> int:
    """How many screen pixels show one picture pixel, so that small pictures appear about 64 wide."""
    return max(1, round(64 / size))


def _thin(points: np.ndarray) -> np.ndarray:
    """Average runs of neighbouring points (P, 2) so that at most ``POINTS`` remain."""
    if len(points) <= POINTS:
        return points
    return np.array([chunk.mean(0) for chunk in np.array_split(points, POINTS)])


def _uri(content: bytes, kind: str) -> str:
    return f"data:{kind};base64,{base64.b64encode(content).decode()}"
