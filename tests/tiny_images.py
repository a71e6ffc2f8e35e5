"""Small image files for tests."""

import io

import numpy as np
from PIL import Image


def picture(seed=0, width=8, height=8, mode="RGB"):
    """A smooth random picture: noise enlarged, so that resizing is well behaved."""
    noise = np.random.default_rng(seed).integers(0, 256, (4, 4, 3), dtype=np.uint8)
    return Image.fromarray(noise).resize((width, height), Image.Resampling.BILINEAR).convert(mode)


def encoded(image, form="PNG"):
    stream = io.BytesIO()
    image.save(stream, form)
    return stream.getvalue()


def save_tree(root, classes=("cat", "dog"), count=10):
    for c, name in enumerate(classes):
        (root / name).mkdir(parents=True)
        for i in range(count):
            picture(100 * c + i, 9, 7).save(root / name / f"{i:03d}.png")
    return root


def truncate(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
