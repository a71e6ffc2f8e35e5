"""What every kind of data set gives: images that are opened by row, with labels or captions."""

from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any

import numpy as np
from PIL import Image
from pydantic import Field, PositiveInt, ValidationError, field_validator

from robustok.config import Config
from robustok.data.captions import number_captions
from robustok.data.crops import RGB
from robustok.files import bytes_digest

Holdout = Annotated[
    float, Field(ge=0, lt=1, description="test share of a source with one split; 0: both are all of it")
]


class DataConfig(Config):
    """Settings of every kind of data set."""

    limit: int | None = Field(None, ge=1, description="keep this many images of the split, chosen by a fixed shuffle")
    max_broken: float = Field(
        0.01, ge=0, le=1, description="share of unreadable images to skip (five at least); 0 skips none"
    )
    buckets: bool | list[tuple[PositiveInt, PositiveInt]] = Field(
        False,
        description="post-training of pipelines of diffusers: sizes [[height, width], ...], of which each image is cut "
        "to the one that is nearest in shape; true: sizes with about as many pixels as the pipeline's own, from 1:2 to "
        "2:1; false: squares",
    )
    rgb: RGB = Field(
        "adm",
        description="adm: as published statistics, which ignore transparency and EXIF and clip 16 bits; "
        "viewer: as an image viewer shows them",
    )

    @field_validator("buckets", mode="wrap")
    @classmethod
    def _some_buckets(cls, buckets: Any, validate: Callable[[Any], Any]) -> bool | list[tuple[int, int]]:
        with suppress(ValidationError):
            if (found := validate(buckets)) != []:
                return found
        raise ValueError("expected true, false, or sizes in pixels [[height, width], ...], as [[512,768],[768,512]]")


@dataclass(frozen=True)
class Source:
    """Images and labels before any decoding.

    Attributes:
        name: its name in results.
        open: row 0..N-1 -> image. May raise anything if the image is broken. Picklable: data workers get a copy.
        where: row -> name of the image in messages.
        labels: (N,) int64 in 0..len(classes)-1.
        classes: names of the classes.
        identity: digest of the file names and sizes, or of the bytes.
        whole: the source has one split only, from which the test images must be held out.
        shape: (H, W) of every image; None where files may differ.
        files: files whose content ``identity`` does not cover.
        names: of images, one for each row: path in the folder, or beside the bytes, without suffix; empty if they have
            none.
        about: what gave the labels, for the line that says what was found; empty prints none.
        left_out: what was left out; empty if nothing was.
        unlabelled: why the labels are unknown and all -1, and what to do; empty if they are known.
        captions: of each label, where labels are numbers of captions and ``classes`` their digests; else empty.
        blocks: (N,) int32, the block that each image is downloaded in when it is opened; None for images that are
            here.
        stamp: of what is downloaded, changes when it is replaced; empty where ``files`` say it.
    """

    name: str
    open: Callable[[int], Image.Image]
    where: Callable[[int], str]
    labels: np.ndarray
    classes: list[str]
    identity: str
    whole: bool
    shape: tuple[int, int] | None = None
    files: Sequence[str | Path] = ()
    names: Sequence[str] = ()
    about: str = ""
    left_out: str = ""
    unlabelled: str = ""
    captions: Sequence[str] = ()
    blocks: np.ndarray | None = None
    stamp: str = ""


def captioned(source: Source, captions: list[str]) -> Source:
    """The source with the numbers of its captions as labels."""
    labels, distinct, digests = number_captions(captions)
    identity = bytes_digest(f"{source.identity} {' '.join(digests)} {bytes_digest(labels.tobytes())}".encode())
    about = f"{len(distinct):,} different captions"
    return replace(
        source, labels=labels, classes=digests, captions=distinct, identity=identity, about=about, unlabelled=""
    )


def without_labels(labels: np.ndarray, where: str) -> str:
    """Why labels (N,) that are all -1 are none; empty if they are labels."""
    if not labels.size or labels.min() < -1 or labels.max() >= 0:
        return ""
    return f"{where} has the label -1 everywhere, which means none; give images with labels"
