"""Captions of images: text files beside them, or a column of a table or of parquet files.

An image whose caption is missing is an error, so that no pair is made with a prompt that was not chosen. Captions are
numbered, and called by a digest wherever they could be read by others: in manifests, logs and model cards.
"""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from robustok.data.labels import METADATA, LabelList
from robustok.errors import UserError, printable
from robustok.files import bytes_digest, one_line, regular_file

TEXT_FILES = "txt"  # as the setting: photo.txt beside photo.jpg


def captions_in_folder(root: Path, paths: Sequence[str], setting: str) -> list[str]:
    """The caption of each image of a folder.

    Args:
        root: the folder.
        paths: of the images.
        setting: TEXT_FILES, or the column of ``metadata.jsonl`` or ``.csv``.

    Raises:
        UserError: there is no such column, or captions are missing; says how many and names three.
    """
    names = [os.path.relpath(path, root) for path in paths]
    if setting == TEXT_FILES:
        return checked([_beside(path) for path in paths], names, "a text file beside it, such as photo.txt")
    folders = {parent for name in names for parent in (root / name).parents if parent.is_relative_to(root)}
    listed = LabelList.find(sorted(folders, key=lambda folder: (len(folder.parts), folder)), None, setting)
    if listed is None:
        raise UserError(
            f"data.captions={setting}: no {' or '.join(METADATA)} in {root} has that column beside file_name; name its "
            f"column of captions, or set data.captions={TEXT_FILES} for photo.txt beside photo.jpg"
        )
    return checked(listed.of(names), names, f"{setting} in {listed.file}")


def captions_in_parquet(files: Sequence[Path], column: str) -> list[str]:
    """The caption of each row of parquet files.

    Raises:
        UserError: as :func:`captions_in_folder`.
    """
    import pyarrow.parquet

    found, names = [], []
    for file in files:
        parquet = pyarrow.parquet.ParquetFile(regular_file(file))
        if column not in parquet.schema_arrow.names:
            columns = ", ".join(parquet.schema_arrow.names[:10])
            raise UserError(f"{file} has the columns {columns}, not data.captions={column}; name one of them")
        values = parquet.read(columns=[column])[column].to_pylist()
        found += values
        names += [f"{file} row {row}" for row in range(len(values))]
    return checked(found, names, f"column {column}")


def checked(captions: Sequence[Any], names: Sequence[str], where: str) -> list[str]:
    """The captions as text; an empty one is the empty prompt.

    Raises:
        UserError: some are missing, or no text.
    """
    missing = [name for name, caption in zip(names, captions, strict=True) if not isinstance(caption, str)]
    if missing:
        shown = printable(", ".join(missing[:3]) + (", ..." if len(missing) > 3 else ""))
        raise UserError(
            f"{len(missing):,} of {len(names):,} images have no caption ({shown}); give each {where} (an empty one is "
            "the empty prompt), or move them away"
        )
    return [caption.strip() for caption in captions]


def number_captions(captions: Sequence[str]) -> tuple[np.ndarray, list[str], list[str]]:
    """Captions by number, in the order of their digests, so that the first few are a random choice.

    Returns:
        The number of each caption (N,) int64, the distinct captions, and their digests.
    """
    digests = {caption: caption_digest(caption) for caption in captions}
    distinct = sorted(digests, key=digests.get)
    number = {caption: i for i, caption in enumerate(distinct)}
    return np.array([number[caption] for caption in captions], np.int64), distinct, [digests[c] for c in distinct]


def caption_digest(caption: str) -> str:
    """What a caption is called where it must not be read: in names of files, logs, manifests and model cards."""
    return bytes_digest(caption.encode("utf-8", "surrogateescape"))


def _beside(path: str) -> str | None:
    file = Path(path).with_suffix(".txt")
    if not file.exists():
        return None
    try:
        return regular_file(file).read_text("utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"cannot read the caption {file}: {one_line(error, 200)}; expected text in UTF-8") from None
