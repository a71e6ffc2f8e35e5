"""Captions of images: text files, tables, parquet; what is missing is counted and named."""

import io
import json

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
from PIL import Image

from robustok.data.captions import caption_digest
from robustok.data.dataset import open_images
from robustok.data.sources import Folder, Parquet
from robustok.errors import UserError

CAPTIONS = ["a dog", "a cat", "", "a dog"]


def images(folder, names):
    for i, name in enumerate(names):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (8, 8), (40 * i, 0, 0)).save(folder / name)


def captions_of(data, split="train"):
    """The caption of each image by its colour, since the order of files is not that of the names here."""
    opened = open_images(data, 8, split)
    assert opened.classes == [caption_digest(caption) for caption in opened.captions]
    assert opened.classes == sorted(opened.classes)
    batch = opened.read(range(len(opened)))
    order = batch.images[:, 0, 0, 0].argsort()
    return [opened.captions[label] for label in batch.labels[order].tolist()]


def test_text_files_beside_images(tmp_path):
    names = ["a/0.png", "b/1.png", "b/2.png", "a/3.png"]
    images(tmp_path, names)
    for name, caption in zip(names, CAPTIONS, strict=True):
        (tmp_path / name).with_suffix(".txt").write_text(caption + "\n")
    data = Folder(path=tmp_path, holdout=0, captions="txt")
    assert captions_of(data) == CAPTIONS
    before = open_images(data, 8).fingerprint
    (tmp_path / "a/0.txt").write_text("a bird")
    assert open_images(data, 8).fingerprint != before  # latents with the old captions are not taken for these
    for name in ("a/0.txt", "b/2.txt"):
        (tmp_path / name).unlink()
    with pytest.raises(UserError, match=r"2 of 4 images have no caption \(a/0\.png, b/2\.png\); give each a text file"):
        open_images(data, 8)
    (tmp_path / "a/0.txt").write_bytes(b"\xff\xfe\xff")
    with pytest.raises(UserError, match="expected text in UTF-8"):
        open_images(data, 8)


@pytest.mark.parametrize("kind", ["jsonl", "csv"])
def test_a_column_of_a_table(tmp_path, kind):
    names = [f"train/{i}.png" for i in range(4)] + ["test/4.png"]
    images(tmp_path, names)

    def write(rows):
        table = tmp_path / "train" / f"metadata.{kind}"
        if kind == "jsonl":
            table.write_text("\n".join(json.dumps({"file_name": n, "text": c}) for n, c in rows))
        else:
            table.write_text("file_name,text\n" + "\n".join(f'{n},"{c}"' for n, c in rows))

    write([(f"{i}.png", caption) for i, caption in enumerate(CAPTIONS)])
    data = Folder(path=tmp_path, captions="text")
    assert captions_of(data) == CAPTIONS
    with pytest.raises(UserError, match=r"data\.captions=prompt: no metadata"):
        open_images(Folder(path=tmp_path, captions="prompt"), 8)
    write([("0.png", "a dog")])
    with pytest.raises(UserError, match=r"3 of 4 images have no caption \(train/1\.png, train/2\.png, train/3\.png\)"):
        open_images(data, 8)


def test_a_column_of_parquet_files(tmp_path):
    def encoded(i):
        stream = io.BytesIO()
        Image.fromarray(np.full((8, 8, 3), 40 * i, np.uint8)).save(stream, "PNG")
        return {"bytes": stream.getvalue(), "path": f"{i}.png"}

    def write(captions):
        rows = {"image": [encoded(i) for i in range(4)], "text": captions}
        pyarrow.parquet.write_table(pyarrow.table(rows), tmp_path / "all.parquet")

    data = Parquet(path=tmp_path / "all.parquet", holdout=0, captions="text")
    write(CAPTIONS)
    assert captions_of(data) == CAPTIONS
    write(["a dog", None, "", "a dog"])
    with pytest.raises(UserError, match=r"1 of 4 images have no caption \(.*all\.parquet row 1\)"):
        open_images(data, 8)
    with pytest.raises(UserError, match=r"has the columns image, text, not data\.captions=prompt"):
        open_images(Parquet(path=tmp_path / "all.parquet", captions="prompt"), 8)
