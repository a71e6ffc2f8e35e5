"""Read run folders: what was measured, logged and drawn, checked and put into dataclasses."""

import json
import math
import os
import re
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from robustok.errors import UserError
from robustok.files import json_lines, one_line, reason, unreadable

STAGES = ("classifier", "tokenizer", "generator", "pairs", "post")  # in the order of training
LARGEST = 2**30  # bytes of the images of one file


@dataclass(frozen=True)
class Result:
    """One line of metrics.jsonl; ``record`` is the line as it was written, numbers that it lacks are NaN.

    Attributes:
        group: folder of the file, relative to the reported one ("" if the same), without the folder of its seed.
        fewer: the number of images as "@2000" where it is smaller than for published values; else "".
    """

    group: str
    metric: str
    fewer: str
    value: float
    standard_error: float
    seed: int | str | None
    extractor: str
    reference: str
    tokenizer: str
    decoder: str
    record: dict[str, Any]


@dataclass(frozen=True)
class Run:
    """One run folder: its configuration (YAML), its log by step and the files of its progress pictures."""

    name: str
    group: str
    seed: str
    config: str
    log: tuple[dict[str, Any], ...]
    progress: tuple[Path, ...]


@dataclass(frozen=True)
class ImageRows:
    """Images in rows with a title each: ``images`` (R, C, H, W, 3) uint8."""

    title: str
    row_titles: tuple[str, ...]
    images: np.ndarray


@dataclass(frozen=True)
class BeforeAfter:
    """The same latents by two or three decoders.

    Attributes:
        decoded: images (N, H, W, 3) uint8 by "before", "after" and perhaps "clean", the control.
        score_before, score_after: (N,) float, lower is better; NaN where unknown.
    """

    title: str
    score_name: str
    decoded: dict[str, np.ndarray]
    labels: tuple[str, ...]
    score_before: np.ndarray
    score_after: np.ndarray


@dataclass(frozen=True)
class Report:
    """All that the page shows. ``notes`` lists what could not be read."""

    title: str
    runs: tuple[Run, ...]
    results: tuple[Result, ...]
    rows: tuple[ImageRows, ...]
    pairs: tuple[BeforeAfter, ...]
    notes: tuple[str, ...]


def collect(folder: str | Path, title: str | None = None) -> Report:
    """Read every run folder under ``folder``.

    Where a folder has a metrics.jsonl of its own, those beneath it are not read, since a study repeats the lines of its
    stages; the same holds for the folder ``pictures``. Files that a link moves outside ``folder`` are not read.

    Raises:
        UserError: the folder is missing, may not be read or holds no run.
    """
    try:
        folder = Path(folder)
        os.scandir(folder).close()
    except (FileNotFoundError, NotADirectoryError):
        raise UserError(f"found no folder {folder}; give the path of a run folder such as runs/demo") from None
    except (OSError, ValueError) as error:
        raise UserError(
            f"cannot read the folder {folder}: {reason(error)}; give a run folder such as runs/demo"
        ) from None
    files = _Files(folder)
    runs, results, pictures = [], [], []
    owners: dict[str, list[Path]] = {"metrics.jsonl": [], "pictures": []}
    for path, folders, names in os.walk(folder, onerror=files.closed):  # parents before children
        found = {*folders, *names}
        folders[:] = sorted((f for f in folders if f not in ("state", "snapshot") and f[0] != "."), key=natural)
        if not {"log.jsonl", "metrics.jsonl"}.intersection(names):
            continue
        here = Path(path)
        own = [name for name, above in owners.items() if name in found and not {*above} & {*here.parents}]
        for name in own:
            owners[name].append(here)
        run = _run(files, here)
        runs.append(run)
        if "metrics.jsonl" in own:
            found = [_result(line, run.group) for line in files.lines(here / "metrics.jsonl")]
            results += filter(None, found)
            if None in found:
                files.note(here / "metrics.jsonl", f"{found.count(None)} lines without the name of a metric; skipped.")
        if "pictures" in own:
            pictures += filter(None, map(files.picture, sorted((here / "pictures").glob("*.npz"))))
    if not runs:
        raise UserError(f"found no log.jsonl or metrics.jsonl under {folder}; give a run folder, or run robustok demo")
    runs.sort(key=_stage)  # stable: seeds stay in order
    latest = _latest(results)
    if len(latest) < len(results):
        files.notes.append(f"{len(results) - len(latest)} measurements were repeated; the last one of each counts.")
    rows, pairs = (tuple(p for p in pictures if isinstance(p, kind)) for kind in (ImageRows, BeforeAfter))
    title = folder.resolve().name if title is None else title
    return Report(title, tuple(runs), latest, rows, pairs, tuple(files.notes))


class _Files:
    """The files of the reported folder, and notes on those that could not be read."""

    def __init__(self, root: Path) -> None:
        self.root, self.real_root, self.notes = root, os.path.realpath(root), []

    def note(self, path: Path, text: str) -> None:
        self.notes.append(f"{path.relative_to(self.root).as_posix()}: {text}")

    def closed(self, error: OSError) -> None:
        self.note(Path(error.filename), f"{reason(error)}; skipped.")

    def inside(self, path: Path) -> bool:
        """Whether this is a file that can be read, and no link to another place, which a shared page must not show."""
        if not os.path.lexists(path):
            return False
        if not Path(os.path.realpath(path)).is_relative_to(self.real_root):
            self.note(path, "is a link to a file outside the folder; skipped.")
        elif problem := unreadable(path):
            self.note(path, f"{problem}; skipped.")
        else:
            return True
        return False

    def text(self, path: Path) -> str:
        """Its text; "" where there is no such file."""
        try:
            return path.read_text(encoding="utf-8", errors="replace") if self.inside(path) else ""
        except OSError as error:
            self.note(path, f"{reason(error)}; skipped.")
            return ""

    def lines(self, path: Path) -> list[dict[str, Any]]:
        """JSON objects, one a line. Other lines (a run may be writing the last one) are skipped and noted."""
        lines, broken = json_lines(self.text(path))
        if broken:
            self.note(path, f"not a JSON object in {len(broken)} lines (the first is line {broken[0]}); skipped.")
        return lines

    def picture(self, path: Path) -> ImageRows | BeforeAfter | None:
        """The images of an .npz file; None, with a note, where they are not as they should be."""
        try:
            if not self.inside(path):
                return None
            with zipfile.ZipFile(path) as archive:
                if (size := sum(member.file_size for member in archive.infolist())) > LARGEST:
                    raise ValueError(f"its arrays would take {size:,} bytes, more than {LARGEST:,}")
            with np.load(path, allow_pickle=False) as file:
                return _picture({key: file[key] for key in file.files}, path.stem)
        except Exception as error:  # a damaged archive can raise anything
            self.note(path, f"{one_line(error)}; skipped.")
            return None


def number(value: Any) -> float:
    """A finite float, or NaN for everything else (null, text, true, infinity)."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return math.nan
    try:
        value = float(value)
    except OverflowError:  # JSON knows integers of any length
        return math.nan
    return value if math.isfinite(value) else math.nan


def natural(text: str) -> list[tuple[int, str]]:
    """A sort key that puts seed-2 before seed-10."""
    return [(int(part), "") if part.isdecimal() else (-1, part) for part in re.split(r"(\d+)", text)]


def _run(files: _Files, path: Path) -> Run:
    # A step may have several lines, such as losses and a validation score. A resumed run logs some steps twice; the
    # later line holds the values of the weights that were kept.
    steps: dict[float, dict[str, Any]] = {}
    for line in files.lines(path / "log.jsonl"):
        if math.isfinite(number(line.get("step"))):
            steps.setdefault(line["step"], {}).update(line)
    name = path.relative_to(files.root).as_posix().removeprefix(".")
    # Without the folder of its seed, so that the seeds of one experiment come together.
    group = "/".join(part for part in name.split("/") if not re.fullmatch(r"seed-\d+", part))
    seed = re.search(r"(?:^|/)seed-(\d+)(?:/|$)", name)
    progress = sorted((path / "samples").glob("*.png"), key=lambda file: natural(file.stem))
    log, config = tuple(steps[step] for step in sorted(steps)), files.text(path / "config.yaml")
    return Run(name, group, seed[1] if seed else "", config, log, tuple(filter(files.inside, progress)))


def _stage(run: Run) -> tuple[str, int]:
    """A sort key: the stages of one experiment in the order of training, after the experiment itself."""
    parent, _, name = run.group.rpartition("/")
    return parent, next((i for i, stage in enumerate(STAGES) if name.startswith(stage)), len(STAGES) if name else -1)


def _result(line: dict[str, Any], group: str) -> Result | None:
    """None where the line does not name its metric."""
    if not isinstance(line.get("metric"), str):
        return None
    seed = line.get("seed")
    metric, at, count = line["metric"].partition("@")
    text = {key: "" if line.get(key) is None else str(line[key]) for key in ("extractor", "reference", "tokenizer")}
    return Result(
        group=group,
        metric="pfid" if metric == "pfid_mean" else metric,  # the mean has the name of the cells of its grid
        fewer=at + count,
        value=number(line.get("value")),
        standard_error=number(line.get("standard_error")),
        seed=seed if isinstance(seed, int | str) else None,
        decoder=str(line.get("decoder") or line.get("images") or "original"),
        record=line,
        **text,
    )


def _latest(results: list[Result]) -> tuple[Result, ...]:
    """Of lines that differ in their numbers only, the last one: a measurement that was repeated."""
    latest = {}
    for result in results:
        numbers = ("value", "standard_error", "baseline", "versions", "seconds")
        same = {key: value for key, value in result.record.items() if key not in numbers}
        latest[result.group, json.dumps(same, sort_keys=True)] = result
    return tuple(latest.values())


def _picture(arrays: dict[str, np.ndarray], stem: str) -> ImageRows | BeforeAfter:
    """Check the arrays of one file; a ValueError describes what is wrong."""
    seed = re.match(r"seed-(\d+)-", stem)
    title = str(arrays.get("title", stem.replace("_", " ").replace("-", " "))) + (f", seed {seed[1]}" if seed else "")
    if "images" in arrays:
        images = _pixels(arrays["images"], 5)
        titles = arrays.get("row_titles", np.full(len(images), ""))
        if titles.shape != (len(images),):
            raise ValueError(f"row_titles has shape {titles.shape}, expected ({len(images)},)")
        return ImageRows(title, tuple(map(str, titles)), images)
    if not {"before", "after"} <= arrays.keys():
        raise ValueError(f"found the arrays {sorted(arrays)}, expected images, or before and after")
    decoded = {key: _pixels(arrays[key], 4) for key in ("before", "after", "clean") if key in arrays}
    shape = decoded["before"].shape
    if any(images.shape != shape for images in decoded.values()):
        raise ValueError("before, after and clean differ in shape")
    labels = arrays.get("labels", np.full(shape[0], ""))
    scores = [np.asarray(arrays.get(f"score_{key}", np.full(shape[0], np.nan)), float) for key in ("before", "after")]
    if any(array.shape != shape[:1] for array in (labels, *scores)):
        raise ValueError(f"labels and scores must have the shape ({shape[0]},), one for each image")
    return BeforeAfter(title, str(arrays.get("score_name", "score")), decoded, tuple(map(str, labels)), *scores)


def _pixels(array: np.ndarray, dims: int) -> np.ndarray:
    if array.dtype != np.uint8 or array.ndim != dims or array.shape[-1] != 3 or array.size == 0:
        shape = "(R, C, H, W, 3)" if dims == 5 else "(N, H, W, 3)"
        raise ValueError(f"found {array.dtype} of shape {array.shape}, expected uint8 {shape}")
    return array
