"""Buckets: which size an image goes to, its pixels there, and the order in which steps take buckets in turn."""

import re
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import ExifTags, Image

from robustok.config import validate
from robustok.data.buckets import bucket_sizes, check_sizes, describe_buckets, open_buckets, shares
from robustok.data.crops import center_crop, oriented_size, to_rgb
from robustok.data.dataset import described_shape, open_images
from robustok.data.order import bucket_steps
from robustok.data.sources import Folder
from robustok.errors import UserError

# What buckets ask of a tokenizer.
TOKENIZER = SimpleNamespace(image_size=32, factor=2, encode_grid=None, config=SimpleNamespace(name="diffusers_kl"))
BUCKETS = [(24, 40), (32, 32), (40, 24)]


def picture(width, height, seed=0):
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


@pytest.fixture
def photos(tmp_path):
    """Photographs named by their shapes: a.png 90x60 in width and height, and so on."""
    sizes = {"a": (90, 60), "b": (60, 90), "c": (70, 70), "d": (80, 50), "e": (50, 49), "f": (300, 60)}
    for i, (name, size) in enumerate(sizes.items()):
        picture(*size, seed=i).save(tmp_path / f"{name}.png")
        (tmp_path / f"{name}.txt").write_text(f"caption {name}")
    return tmp_path


def folder(path, **settings):
    return validate(Folder, {"path": str(path), "holdout": 0, "buckets": [list(size) for size in BUCKETS]} | settings)


def covering(image, height, width):
    """By hand: halved by boxes while it still covers, then bicubic to the least size that covers, then the middle."""
    while image.width // 2 >= width and image.height // 2 >= height:
        image = image.resize((image.width // 2, image.height // 2), Image.Resampling.BOX)
    scale = max(height / image.height, width / image.width)
    image = image.resize((round(image.width * scale), round(image.height * scale)), Image.Resampling.BICUBIC)
    pixels = np.array(image)
    top, left = (pixels.shape[0] - height) // 2, (pixels.shape[1] - width) // 2
    return pixels[top : top + height, left : left + width]


def test_sizes_are_those_of_the_training_of_stable_diffusion_xl():
    found = bucket_sizes(1024, 16)
    for size in ((768, 1344), (832, 1216), (896, 1152), (1024, 1024), (1152, 896), (1216, 832), (1344, 768)):
        assert size in found
    assert found == [size[::-1] for size in reversed(found)]
    assert bucket_sizes(512, 16) == [(384, 640), (448, 576), (512, 512), (576, 448), (640, 384)]
    assert bucket_sizes(32, 8) == BUCKETS
    for size, unit in ((1024, 16), (768, 16), (560, 16), (1024, 128), (64, 8)):
        for height, width in bucket_sizes(size, unit):
            assert height % unit == width % unit == 0
            assert 0.6 * size**2 < height * width <= size**2
            assert 1 / 2 <= height / width <= 2


def test_an_image_goes_to_the_bucket_that_is_nearest_in_shape(photos):
    buckets = open_buckets(folder(photos), TOKENIZER)
    assert [bucket.shape for bucket in buckets] == BUCKETS
    assert [bucket.names for bucket in buckets] == [["a", "d", "f"], ["c", "e"], ["b"]]
    assert [bucket.shape for bucket in open_buckets(folder(photos, buckets=True), TOKENIZER)] == BUCKETS
    few = folder(photos, buckets=[[24, 40], [16, 64], [64, 16]])
    assert {bucket.shape: bucket.names for bucket in open_buckets(few, TOKENIZER)} == {
        (24, 40): ["a", "b", "c", "d", "e"],  # b is nearer to it than to 4:1
        (16, 64): ["f"],
    }
    said = describe_buckets(few, open_buckets(few, TOKENIZER), batch_size=2)
    assert said.endswith(
        " train (height x width: images): 24x40: 5, 16x64: 1; none in 64x16, left out; fewer than batch_size in 16x64, "
        "which are repeated in a batch"
    )


def test_an_image_is_scaled_to_cover_its_bucket_and_cut_in_the_middle(photos):
    for bucket in open_buckets(folder(photos), TOKENIZER):
        for index, name in enumerate(bucket.names):
            expected = covering(Image.open(photos / f"{name}.png"), *bucket.shape)
            assert np.array_equal(bucket.read([index]).pixels[0].permute(1, 2, 0), expected)
    assert np.array_equal(center_crop(picture(41, 100), (30, 40)), covering(picture(41, 100), 30, 40))


def test_a_single_square_bucket_is_the_data_set_of_before(photos):
    plain, (bucket,) = (
        open_images(folder(photos, buckets=False), 32),
        open_buckets(folder(photos, buckets=[[32, 32]]), TOKENIZER),
    )
    assert bucket.fingerprint == plain.fingerprint
    assert bucket.describe() == plain.describe()
    assert torch.equal(bucket.read(range(6)).pixels, plain.read(range(6)).pixels)
    (same,) = open_buckets(folder(photos, buckets=False), TOKENIZER)
    assert same.fingerprint == plain.fingerprint


def test_captions_follow_their_images(photos):
    for bucket in open_buckets(folder(photos, captions="txt"), TOKENIZER):
        labels = bucket.read(range(len(bucket))).labels.tolist()
        assert [bucket.captions[label] for label in labels] == [f"caption {name}" for name in bucket.names]
        assert len(bucket.classes) == 6


def test_the_split_and_the_limit_come_before_the_buckets(photos):
    for settings in ({"holdout": 0.4}, {"holdout": 0.4, "limit": 2}):
        for split in ("train", "test"):
            plain = open_images(folder(photos, buckets=False, **settings), 32, split)
            names = [
                name for bucket in open_buckets(folder(photos, **settings), TOKENIZER, split) for name in bucket.names
            ]
            assert sorted(names) == plain.names


def test_a_turned_photograph_goes_where_it_is_shown(tmp_path):
    for orientation in range(1, 9):
        exif = Image.Exif()
        exif[ExifTags.Base.Orientation] = orientation
        picture(90, 60).save(tmp_path / f"{orientation}.jpg", exif=exif)
        with Image.open(tmp_path / f"{orientation}.jpg") as image:
            for rgb in ("adm", "viewer"):
                assert oriented_size(image, rgb) == to_rgb(image, rgb).size[::-1]
    (all_wide,) = open_buckets(folder(tmp_path), TOKENIZER)
    assert all_wide.shape == (24, 40)
    wide, tall = open_buckets(folder(tmp_path, rgb="viewer"), TOKENIZER)
    assert (wide.names, tall.names) == (["1", "2", "3", "4"], ["5", "6", "7", "8"])
    assert tall.read(range(4)).pixels.shape == (4, 3, 40, 24)


def test_images_smaller_than_their_bucket_are_counted_and_named(photos, tmp_path):
    check_sizes(open_buckets(folder(photos), TOKENIZER))
    picture(60, 20).save(photos / "low.png")
    picture(20, 60).save(photos / "thin.png")
    with pytest.raises(UserError) as error:
        check_sizes(open_buckets(folder(photos), TOKENIZER))
    assert "2 of 8 images are smaller than their bucket, of height x width 24x40, 40x24" in str(error.value)
    assert re.search(r"low.png with 60x20, \S*thin.png with 20x60", str(error.value))


def test_a_broken_image_is_skipped_as_without_buckets(photos):
    (photos / "broken.png").write_bytes(b"nothing")
    with pytest.warns(UserWarning, match=r"skipping an image that cannot be read.*broken\.png"):
        buckets = open_buckets(folder(photos), TOKENIZER)
    assert sum(len(bucket.broken) for bucket in buckets) == 1
    assert sum(map(len, buckets)) == 7


def test_large_buckets_are_not_held(photos, monkeypatch):
    held = open_buckets(folder(photos), TOKENIZER)
    monkeypatch.setattr("robustok.data.buckets.MEMORY_LIMIT", 3 * 5 * 32 * 32)  # enough for each, not for all
    lazy = open_buckets(folder(photos), TOKENIZER)
    assert [bucket.in_memory for bucket in held + lazy] == [True] * 3 + [False] * 3
    for one, other in zip(held, lazy, strict=True):
        assert one.fingerprint == other.fingerprint
        assert torch.equal(one.read(range(len(one))).pixels, other.read(range(len(one))).pixels)


def test_sizes_that_make_no_buckets_are_refused(photos):
    with pytest.raises(UserError, match=r"data\.buckets has 24x42, expected multiples of 8 pixels; round them"):
        open_buckets(folder(photos, buckets=[[24, 40], [24, 42]]), TOKENIZER)
    with pytest.raises(UserError, match=r"buckets.*expected true, false, or sizes in pixels"):
        folder(photos, buckets=[])
    for wrong in ([24, 40], [[24, 40, 3]], [[0, 24]], "all"):
        with pytest.raises(UserError, match="buckets"):
            folder(photos, buckets=wrong)
    other = SimpleNamespace(image_size=32, config=SimpleNamespace(name="robustok"))
    with pytest.raises(UserError, match=r"a tokenizer of family robustok takes one; set data\.buckets=false"):
        open_buckets(folder(photos), other)
    with pytest.raises(UserError, match=r"data\.buckets is for post-training of pipelines"):
        open_images(folder(photos), 32)


def test_a_description_says_the_size(photos):
    wide, square, _ = open_buckets(folder(photos), TOKENIZER)
    assert described_shape(wide.describe()) == (24, 40)
    assert described_shape(square.describe()) == (32, 32)


def test_shares_are_in_proportion():
    assert shares(60, [10, 20, 30]) == [10, 20, 30]
    assert shares(6, [10, 20, 30]) == [1, 2, 3]
    assert shares(7, [100]) == [7]
    assert shares(10, [1000, 1]) == [10, 1]  # at least one
    rng = np.random.default_rng(0)
    for _ in range(50):
        sizes = rng.integers(1, 50, 6).tolist()
        count = int(rng.integers(1, sum(sizes) + 1))
        found = shares(count, sizes)
        assert all(1 <= part <= size for part, size in zip(found, sizes, strict=True))
        assert count <= sum(found) <= count + 5


def test_steps_take_buckets_in_proportion_and_each_in_its_own_order():
    buckets, own = bucket_steps([1, 6, 3], 0, 10_000)
    assert np.bincount(buckets) / 10_000 == pytest.approx([0.1, 0.6, 0.3], abs=0.02)
    for bucket in range(3):
        assert np.array_equal(own[buckets == bucket], np.arange((buckets == bucket).sum()))
    first, first_own = bucket_steps([1, 6, 3], 0, 17)
    assert np.array_equal(first, buckets[:17])
    assert np.array_equal(first_own, own[:17])
    assert not np.array_equal(bucket_steps([1, 6, 3], 1, 17)[0], first)
    one, steps = bucket_steps([5], 3, 9)
    assert (one.tolist(), steps.tolist()) == ([0] * 9, list(range(9)))
