"""Small image files for tests."""

import io

import numpy as np
import pytest
from PIL import Image, UnidentifiedImageError


def picture(seed=0, width=8, height=8, mode="RGB"):
    """A smooth random picture: noise enlarged, so that resizing is well behaved."""
    noise = np.random.default_rng(seed).integers(0, 256, (4, 4, 3), dtype=np.uint8)
    return Image.fromarray(noise).resize((width, height), Image.Resampling.BILINEAR).convert(mode)


def encoded(image, form="PNG"):
    stream = io.BytesIO()
    image.save(stream, form)
    return stream.getvalue()


def postscript():
    """A picture for whose reading Pillow would start Ghostscript, which executes the program in it."""
    return b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 7\n%%EndComments\nshowpage\n%%EOF\n"


def watch_postscript(monkeypatch):
    """A list of what Pillow opened as PostScript from now on."""
    opened = []

    def refuse(file, name):
        opened.append(name)
        raise SyntaxError

    Image.init()
    monkeypatch.setitem(Image.OPEN, "EPS", (refuse, Image.OPEN["EPS"][1]))
    with pytest.raises(UnidentifiedImageError):
        Image.open(io.BytesIO(postscript()))  # it is opened where it is let
    assert opened
    opened.clear()
    return opened


def save_tree(root, classes=("cat", "dog"), count=10):
    for c, name in enumerate(classes):
        (root / name).mkdir(parents=True)
        for i in range(count):
            picture(100 * c + i, 9, 7).save(root / name / f"{i:03d}.png")
    return root


def truncate(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
