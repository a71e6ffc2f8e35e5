"""Labels of images: numbers or names to class numbers, and files that list them."""

import csv
import json
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from robustok.errors import UserError
from robustok.files import bytes_digest, one_line, regular_file

LABEL_COLUMNS = ("label", "labels", "fine_label", "cls", "class")  # the first one found is read
MOST_CLASSES = 100_000
DEVKIT = "meta.mat"  # of ILSVRC2012_devkit_t12, beside the list: what its numbers mean
METADATA = ("metadata.jsonl", "metadata.csv")  # of the image folders of Hugging Face
_FILE_COLUMNS = ("file_name", "filename", "file", "name", "image", "path", "ImageId")


def sort_classes(names: Iterable[str]) -> list[str]:
    """Names of classes in the order of their numbers: 0, 1, 2, 10 where all are numbers, else as text."""
    names = set(names)
    numeric = all(re.fullmatch("[0-9]+", name) for name in names)
    return sorted(names, key=lambda name: (int(name), name) if numeric else name)


def check_same_classes(found: Sequence[str] | None, expected: Sequence[str] | None, where: str, other: str) -> None:
    """Refuse a name of a class that has two numbers. Names that only one side has say nothing; None is unknown.

    Raises:
        UserError: names the class and its numbers.
    """
    if not found or not expected:
        return
    numbers = {name: number for number, name in enumerate(expected)}
    for number, name in enumerate(found):
        if name in numbers and list(expected[number : number + 1]) != [name]:
            raise UserError(
                f"class {name} has number {number} in {where} and {numbers[name]} in {other}; give both the same "
                "classes, or encode and train again"
            )


def number_labels(
    labels: Sequence[Any] | np.ndarray, where: str, classes: Sequence[str] | None = None
) -> tuple[np.ndarray, list[str]]:
    """Class numbers (N,) int64 and the names of the classes.

    Numbers are not changed: ``open_images`` compares them with the classes. Data sets without labels have -1.

    Args:
        labels: integers or names.
        where: where they are, for messages.
        classes: names of the classes, if they are known; None numbers the names, or counts up to the largest number.

    Raises:
        UserError: a label is neither a number nor a name, is not among the names, or too large to be a class.
    """
    labels = labels.tolist() if isinstance(labels, np.ndarray) else list(labels)
    if odd := [(row, label) for row, label in enumerate(labels) if not isinstance(label, int | str)]:
        raise UserError(
            f"{where} has {str(odd[0][1])[:40]!r} in row {odd[0][0]}; expected class numbers or names only; choose "
            "another column with data.label=COLUMN"
        )
    if any(isinstance(label, str) for label in labels):
        labels = list(map(str, labels))
        known = set(classes or ()).issuperset(labels)
        if known or not all(re.fullmatch("-1|[0-9]{1,6}", label) for label in labels):
            return _number_names(labels, where, sort_classes(labels) if classes is None else list(classes))
        labels = list(map(int, labels))
    low, high = min(labels, default=0), max(labels, default=0)
    if max(high, -low) >= MOST_CLASSES:
        raise UserError(
            f"{where} has labels from {low} to {high}, expected class numbers from 0 to {MOST_CLASSES - 1:,}; choose "
            "another column with data.label=COLUMN, or number the classes from 0"
        )
    counted = [str(i) for i in range(high + 1)] or ["all"]
    return np.array(labels, dtype=np.int64), counted if classes is None else list(classes)


def _number_names(labels: list[str], where: str, classes: list[str]) -> tuple[np.ndarray, list[str]]:
    number = {name: i for i, name in enumerate(classes)}
    if wrong := next((label for label in labels if label not in number), None):
        shown = ", ".join(classes[:5]) + (", ..." if len(classes) > 5 else "")
        raise UserError(f"{where} has the label {wrong[:40]!r}; expected one of {shown}, or a number from 0")
    if len(classes) > MOST_CLASSES:
        raise UserError(
            f"{where} has {len(classes):,} different labels, expected at most {MOST_CLASSES:,}; choose another column "
            "with data.label=COLUMN"
        )
    return np.array([number[label] for label in labels], dtype=np.int64), classes


def _devkit_names(numbers: list[str], file: Path, meta: Path) -> list[str]:
    """The classes n01440764, ... of ILSVRC's numbers from 1, whose order is not that of the names."""
    from scipy.io import loadmat

    try:
        rows = loadmat(regular_file(meta), variable_names=["synsets"])["synsets"].ravel()
        names = {str(int(row["ILSVRC2012_ID"].item())): str(row["WNID"].item()) for row in rows}
    except Exception as error:  # a damaged file raises nearly anything
        raise UserError(f"cannot read {meta} ({one_line(error, 100)}); copy it again, or move it away") from None
    if unknown := next((number for number in numbers if number not in names), None):
        raise UserError(f"{file} has the label {unknown[:40]!r}, which {meta} lacks; give both of one devkit")
    return [names[number] for number in numbers]


class LabelList:
    """A file that lists labels: ``metadata.jsonl`` or ``.csv`` of an image folder, or lines LABEL or NAME LABEL.

    A table has a header, or JSON objects as lines; in ImageNet's ``LOC_val_solution.csv`` the label is the first word.

    Attributes:
        file: the file.
        column: what the labels are called; None where there is no header.
        digest: of the file.
        labels: file name -> label, or a list in the order of the file names; None if the table has no labels.

    Raises:
        UserError: the file cannot be read, or has no such column.
    """

    def __init__(self, file: Path, column: str | None = None):
        self.file, self.column = file, column
        try:
            content = regular_file(file).read_bytes()
            text = content.decode("utf-8-sig")
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"cannot read {file}: {one_line(error)}; expected a list of labels as text") from None
        self.digest = bytes_digest(content)
        lines = [line for line in text.splitlines() if line.strip()]
        if file.suffix in (".jsonl", ".json", ".ndjson"):
            self.labels = self._table([self._object(line) for line in lines])
            return
        # As spreadsheets write tables: with commas, in other languages with semicolons, or with tabs.
        delimiter = max(",;\t", key=lines[0].count) if lines else ","
        table = file.suffix in (".csv", ".tsv") or all(delimiter in line for line in lines)
        rows = list(csv.reader(lines, delimiter=delimiter)) if table else []
        if rows and set(rows[0]) & set(_FILE_COLUMNS):
            self.labels = self._table([dict(zip(rows[0], row, strict=False)) for row in rows[1:]])
            return
        rows = rows or [line.rsplit(None, 1) for line in lines]
        widths = {len(row) for row in rows}
        if widths not in ({1}, {2}):
            raise UserError(f"{file} has {sorted(widths)} words a line; expected LABEL or NAME LABEL in every line")
        self.labels = [row[0] for row in rows] if widths == {1} else self._unique(rows)
        if widths == {1} and (meta := file.with_name(DEVKIT)).is_file():
            self.labels = _devkit_names(self.labels, file, meta)

    @classmethod
    def find(cls, folders: Iterable[Path], given: Path | None, column: str | None) -> "LabelList | None":
        """The list that is given, else the first ``metadata.jsonl`` or ``.csv`` with labels in the folders."""
        if given is not None:
            found = cls(given, column)
            if found.labels is None:
                raise UserError(f"{given} has no column of file names or none of labels; set data.label=COLUMN")
            return found
        files = [folder / name for folder in folders for name in METADATA if (folder / name).is_file()]
        return next((found for file in files if (found := cls(file, column)).labels is not None), None)

    def describe(self) -> str:
        """Its file and column."""
        return self.file.name if self.column is None else f"{self.column} in {self.file.name}"

    def _object(self, line: str) -> Mapping[str, Any]:
        try:
            found = json.loads(line)
        except (ValueError, RecursionError):
            found = None
        if not isinstance(found, dict):
            raise UserError(f"{self.file} has the line {line[:60]!r}; expected a JSON object in every line")
        return found

    def _table(self, rows: list[Mapping[str, Any]]) -> dict[str, Any] | None:
        columns = dict.fromkeys(key for row in rows for key in row)
        key = next((name for name in _FILE_COLUMNS if name in columns), None)
        wanted = (self.column,) if self.column else (*LABEL_COLUMNS, "PredictionString")
        self.column = next((name for name in wanted if name in columns), None)
        if key is None or self.column is None:
            return None
        values = [(str(row.get(key)), row.get(self.column)) for row in rows]
        return self._unique([(n, str(v).split()[0] if self.column == "PredictionString" else v) for n, v in values])

    def _unique(self, rows: Iterable[tuple[str, Any]]) -> dict[str, Any]:
        found: dict[str, Any] = {}
        for name, label in rows:
            if found.setdefault(os.path.normpath(name), label) != label:
                raise UserError(f"{self.file} gives {name} the labels {found[name]} and {label}; remove one of them")
        return found

    def of(self, names: Sequence[str]) -> list[Any]:
        """The label of each file; None for those that are not listed.

        Args:
            names: paths of the files, sorted.

        Raises:
            UserError: there are not as many labels without names as files, or the order of the files is not certain.
        """
        if isinstance(self.labels, dict):
            return [self._find(name) for name in names]
        if len(self.labels) != len(names):
            raise UserError(f"{self.file} has {len(self.labels)} labels for {len(names)} images; expected as many")
        if names != sort_names(names):
            raise UserError(
                f"{self.file} lists labels without names, and images such as {names[0]} are numbered without zeros in "
                "front, so that their order is not certain; give lines NAME LABEL"
            )
        return self.labels

    def _find(self, name: str) -> Any:
        parts = name.split(os.sep)
        keys = [os.path.join(*parts[start:]) for start in range(len(parts))]
        keys += [os.path.splitext(key)[0] for key in keys]  # ImageNet's lists have names without suffix
        return next((self.labels[key] for key in keys if key in self.labels), None)


def sort_names(names: Iterable[str]) -> list[str]:
    """Names in the order of the numbers in them: 2.png before 10.png."""

    def key(name: str) -> list[tuple[int, str]]:
        return [(int(part) if part.isdecimal() else -1, part) for part in re.split("([0-9]+)", name)]

    return sorted(names, key=key)
