"""Run folders to a :class:`Report`: what was logged, measured and pictured, read once, checked and arranged."""

import json
import math
import os
import re
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from robustok.errors import UserError

SETTINGS = (
    *("sigma", "strategy", "mode", "steps", "guidance_scale", "guidance_power", "guidance_from", "guidance_until"),
    *("temperature", "top_k", "top_p", "sampler"),
)
CELLS = {"pfid_mean": "pfid"}  # a mean stands in the table under the name of its cells


@dataclass(frozen=True)
class Result:
    """One line of metrics.jsonl.

    Attributes:
        group: folder of the file, relative to the reported one ("" if the same), without the folder of its seed.
        metric: its name without the number of images.
        fewer: that number as "@2000", where fewer images were judged than published values stand on; else "".
        value: the number; NaN where the line has none.
        standard_error: NaN where the line has none.
        record: the whole line as it was written.
    """

    group: str
    metric: str
    fewer: str
    value: float
    standard_error: float
    samples: int | None
    seed: Any
    extractor: str
    reference: str
    tokenizer: str
    decoder: str
    rate: float
    strength: float
    record: dict[str, Any]

    @property
    def is_cell(self) -> bool:
        """Whether it is one cell of a grid over rate and strength."""
        return self.metric == "pfid" and math.isfinite(self.rate) and math.isfinite(self.strength)


@dataclass(frozen=True)
class Run:
    """One run folder: its configuration as text, its log and its progress pictures in order of steps."""

    name: str
    group: str
    seed: str
    config: str
    log: tuple[dict[str, Any], ...]
    progress: tuple[Path, ...]


@dataclass(frozen=True)
class Grid:
    """Pictures in rows with a title each: ``images`` (R, C, H, W, 3) uint8."""

    title: str
    row_titles: tuple[str, ...]
    images: np.ndarray


@dataclass(frozen=True)
class Comparison:
    """The same generated latents through two or three decoders.

    Attributes:
        before, after, control: pictures (N, H, W, 3) uint8; ``control`` may be None.
        labels: N words.
        score_before, score_after: (N,) float, lower is better; NaN where unknown.
    """

    title: str
    score_name: str
    before: np.ndarray
    after: np.ndarray
    control: np.ndarray | None
    labels: tuple[str, ...]
    score_before: np.ndarray
    score_after: np.ndarray


@dataclass(frozen=True)
class Report:
    """All that the page shows. ``notes`` says what could not be read."""

    title: str
    runs: tuple[Run, ...]
    results: tuple[Result, ...]
    grids: tuple[Grid, ...]
    comparisons: tuple[Comparison, ...]
    notes: tuple[str, ...]


def collect(folder: Path, title: str | None = None) -> Report:
    """Read every run folder under ``folder``.

    A folder's own metrics.jsonl stands for the whole tree beneath it, and so does its own ``pictures`` folder:
    numbers that a stage wrote and the study repeats count once.

    Raises:
        UserError: the folder is missing or holds no run.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise UserError(f"found no folder {folder}; give the path of a run folder such as runs/demo")
    notes: list[str] = []
    runs, results, grids, comparisons = [], [], [], []
    measured: list[Path] = []  # folders whose own metrics.jsonl speaks for those beneath
    pictured: list[Path] = []
    for path in _run_folders(folder):
        name = path.relative_to(folder).as_posix().removeprefix(".")
        runs.append(_read_run(path, name, notes))
        if (path / "metrics.jsonl").is_file() and not _beneath(path, measured):
            measured.append(path)
            lines = read_lines(path / "metrics.jsonl", _inside(name, "metrics.jsonl"), notes)
            results += [r for r in (_result(line, _group(name), name, notes) for line in lines) if r]
        if (path / "pictures").is_dir() and not _beneath(path, pictured):
            pictured.append(path)
            for file in sorted((path / "pictures").glob("*.npz")):
                picture = _read_picture(file, _inside(name, f"pictures/{file.name}"), notes)
                (grids if isinstance(picture, Grid) else comparisons).extend([picture] if picture else [])
    runs.sort(key=lambda run: _stage(run.group))  # stable: seeds stay in order
    if not runs:
        raise UserError(
            f"found no log.jsonl or metrics.jsonl under {folder}; give a run folder, or make one: robustok demo"
        )
    if title is None:
        title = folder.resolve().name
    return Report(title, tuple(runs), _latest(results, notes), tuple(grids), tuple(comparisons), tuple(notes))


def read_lines(path: Path, name: str, notes: list[str]) -> list[dict[str, Any]]:
    """JSON objects of a file, one a line. A line that is none (a run may be writing it) is skipped and noted."""
    lines, broken = [], []
    for index, text in enumerate(path.read_text(encoding="utf-8", errors="replace").split("\n"), start=1):
        if not text.strip():
            continue
        try:
            line = json.loads(text)
        except (ValueError, RecursionError):
            line = None
        if isinstance(line, dict):
            lines.append(line)
        else:
            broken.append(index)
    if broken:
        which = (
            f"line {broken[0]} is" if len(broken) == 1 else f"{len(broken)} lines (the first is line {broken[0]}) are"
        )
        notes.append(f"{name}: {which} not a JSON object; skipped.")
    return lines


def number(value: Any) -> float:
    """A finite float, or NaN for everything else (null, text, true, infinity)."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return math.nan
    try:
        value = float(value)
    except OverflowError:  # JSON knows integers of any length
        return math.nan
    return value if math.isfinite(value) else math.nan


def _run_folders(folder: Path) -> list[Path]:
    """Folders that hold a log or metrics, parents before children; ``state`` and ``snapshot`` are not searched."""
    found = []
    for path, folders, files in os.walk(folder):
        folders[:] = sorted((f for f in folders if f not in ("state", "snapshot") and f[0] != "."), key=natural)
        if "log.jsonl" in files or "metrics.jsonl" in files:
            found.append(Path(path))
    return found


def _read_run(path: Path, name: str, notes: list[str]) -> Run:
    log = read_lines(path / "log.jsonl", _inside(name, "log.jsonl"), notes) if (path / "log.jsonl").is_file() else []
    # A step may have several lines, such as losses and a held-out value. A resumed run logs some steps twice: then the
    # later line counts, which is the one that its weights went through.
    steps: dict[float, dict[str, Any]] = {}
    for line in log:
        if math.isfinite(number(line.get("step"))):
            steps.setdefault(line["step"], {}).update(line)
    config = path / "config.yaml"
    text = config.read_text(encoding="utf-8", errors="replace") if config.is_file() else ""
    seed = re.search(r"(?:^|/)seed-(\d+)(?:/|$)", name)
    progress = sorted((path / "samples").glob("*.png"), key=lambda file: natural(file.stem))
    ordered = tuple(steps[step] for step in sorted(steps))
    return Run(name, _group(name), seed[1] if seed else "", text, ordered, tuple(progress))


def _result(line: dict[str, Any], group: str, name: str, notes: list[str]) -> Result | None:
    if not isinstance(line.get("metric"), str):
        notes.append(f"{_inside(name, 'metrics.jsonl')}: a line without the name of its metric was skipped.")
        return None
    text = {key: "" if line.get(key) is None else str(line[key]) for key in ("extractor", "reference", "tokenizer")}
    samples = number(line.get("samples"))
    metric, at, count = line["metric"].partition("@")
    return Result(
        group=group,
        metric=CELLS.get(metric, metric),
        fewer=at + count,
        value=number(line.get("value")),
        standard_error=number(line.get("standard_error")),
        samples=int(samples) if math.isfinite(samples) else None,
        seed=line.get("seed") if isinstance(line.get("seed"), int | str) else None,
        decoder=str(line.get("decoder") or line.get("images") or "original"),
        rate=number(line.get("rate")),
        strength=number(line.get("strength")),
        record=line,
        **text,
    )


def _latest(results: list[Result], notes: list[str]) -> tuple[Result, ...]:
    """Keep the last of the lines that differ in nothing but their numbers: a measurement that was repeated."""
    latest = {}
    for result in results:
        numbers = ("value", "standard_error", "baseline", "versions", "seconds")
        same = {key: value for key, value in result.record.items() if key not in numbers}
        latest[result.group, json.dumps(same, sort_keys=True)] = result
    if len(latest) < len(results):
        notes.append(f"{len(results) - len(latest)} measurements were made again later; the last one of each counts.")
    return tuple(latest.values())


def _read_picture(path: Path, name: str, notes: list[str]) -> Grid | Comparison | None:
    try:
        with np.load(path, allow_pickle=False) as file:
            arrays = {key: file[key] for key in file.files}
        return _picture(arrays, path.stem)
    except (OSError, ValueError, EOFError, zipfile.BadZipFile, NotImplementedError) as error:
        notes.append(f"{name}: {' '.join(str(error).split()) or 'not readable'}; skipped.")
        return None


def _picture(arrays: dict[str, np.ndarray], stem: str) -> Grid | Comparison:
    """Check the arrays of one file; a ValueError says what is wrong."""
    title = str(arrays["title"]) if "title" in arrays else stem.replace("_", " ").replace("-", " ")
    if "images" in arrays:
        images = _pixels(arrays, "images", 5)
        titles = arrays.get("row_titles", np.full(len(images), ""))
        if titles.shape != (len(images),):
            raise ValueError(f"row_titles has shape {titles.shape}, expected ({len(images)},)")
        return Grid(title, tuple(map(str, titles)), images)
    if not {"before", "after"} <= arrays.keys():
        raise ValueError(f"found the arrays {sorted(arrays)}, expected images, or before and after")
    before, after = _pixels(arrays, "before", 4), _pixels(arrays, "after", 4)
    control = _pixels(arrays, "control", 4) if "control" in arrays else None
    if before.shape != after.shape or (control is not None and control.shape != before.shape):
        raise ValueError("before, after and control differ in shape")
    count = len(before)
    labels = arrays.get("labels", np.full(count, ""))
    scores = [np.asarray(arrays.get(key, np.full(count, np.nan)), float) for key in ("score_before", "score_after")]
    if any(array.shape != (count,) for array in (labels, *scores)):
        raise ValueError(f"labels and scores must have the shape ({count},), one for each picture")
    return Comparison(
        title,
        str(arrays.get("score_name", "score")),
        before,
        after,
        control,
        tuple(map(str, labels)),
        scores[0],
        scores[1],
    )


def _pixels(arrays: dict[str, np.ndarray], key: str, dims: int) -> np.ndarray:
    array = arrays[key]
    if array.dtype != np.uint8 or array.ndim != dims or array.shape[-1] != 3 or array.size == 0:
        raise ValueError(
            f"{key} is {array.dtype} of shape {array.shape}, expected uint8 ({'R, C, ' * (dims == 5)}H, W, 3)"
        )
    return array


def _beneath(path: Path, folders: Sequence[Path]) -> bool:
    return any(folder in path.parents for folder in folders)


def _inside(name: str, file: str) -> str:
    return f"{name}/{file}" if name else file


def _group(name: str) -> str:
    """A run's name without the folder of its seed, so that seeds of one experiment come together."""
    return "/".join(part for part in name.split("/") if not re.fullmatch(r"seed-\d+", part))


def _stage(group: str) -> tuple[str, int]:
    """A sort key that puts the stages of one experiment in the order of the story."""
    parent, _, stage = group.rpartition("/")
    story = ("classifier", "tokenizer-plain", "tokenizer", "generator-plain", "generator", "pairs", "post", "control")
    if not stage:
        return parent, -1
    return parent, next((index for index, word in enumerate(story) if stage.startswith(word)), len(story))


def natural(text: str) -> list[tuple[int, str]]:
    """A sort key that puts seed-2 before seed-10."""
    return [(int(part), "") if part.isdigit() else (-1, part) for part in re.split(r"(\d+)", text)]
