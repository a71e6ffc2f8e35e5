import io
import math
import warnings

import numpy as np
import pytest
import torch
from PIL import Image

from robustok.data.crops import center_crop, random_crop, to_rgb
from robustok.data.dataset import Augmentation, open_images
from robustok.data.loader import batches_in_order, training_batches
from robustok.data.order import batch_indices, batch_seeds
from robustok.data.pixels import from_pixels, to_pixels
from robustok.data.sources import Digits, Folder
from robustok.errors import UserError
from tiny_images import encoded, picture, save_tree, truncate


@pytest.fixture(scope="module")
def digits():
    return open_images(Digits(limit=50), 16, augment=Augmentation(flip=True))


# Value ranges


def test_all_levels_survive_the_round_trip():
    pixels = torch.arange(256, dtype=torch.uint8).reshape(1, 1, 16, 16).expand(2, 3, 16, 16)
    images = from_pixels(pixels)
    assert images.dtype == torch.float32
    assert images.min() == -1
    assert images.max() == 1
    assert torch.equal(to_pixels(images), pixels)


def test_rounding_is_truncation_of_the_shifted_value():
    images = torch.empty(4, 3, 8, 8).uniform_(-1.3, 1.3, generator=torch.Generator().manual_seed(0))
    plain = [min(max(math.trunc(min(max(127.5 * x + 128, 0), 255)), 0), 255) for x in images.flatten().tolist()]
    assert to_pixels(images).flatten().tolist() == plain


def test_nan_has_no_pixel_value():
    images = torch.zeros(3, 3, 4, 4)
    images[1, 0, 0, 0] = torch.nan
    with pytest.raises(UserError, match="1 of 3 images hold NaN"):
        to_pixels(images)


# Crops


def plain_center_crop(image, size):
    """The crop read literally."""
    width, height = image.size
    while min(width, height) >= 2 * size:
        width, height = width // 2, height // 2
        image = image.resize((width, height), resample=Image.Resampling.BOX)
    factor = size / min(width, height)
    image = image.resize((round(width * factor), round(height * factor)), resample=Image.Resampling.BICUBIC)
    pixels = np.asarray(image)
    top, left = (pixels.shape[0] - size) // 2, (pixels.shape[1] - size) // 2
    return pixels[top : top + size, left : left + size]


@pytest.mark.parametrize(
    ("width", "height"), [(32, 32), (33, 47), (101, 64), (129, 257), (8, 8), (5, 31), (64, 63), (500, 33)]
)
def test_center_crop_is_adms(width, height):
    image = picture(1, width, height)
    assert np.array_equal(center_crop(image, 32), plain_center_crop(image, 32))


def test_random_crop_draws_every_scale_and_stays_a_crop():
    # A horizontal ramp: the range of values in the crop gives the scale that was drawn.
    ramp = Image.fromarray(np.tile(np.arange(0, 200, 2, dtype=np.uint8), (100, 1)))
    crops = [random_crop(ramp, 20, torch.Generator().manual_seed(seed)) for seed in range(300)]
    assert {crop.shape for crop in crops} == {(20, 20, 3)}
    spans = [int(crop[10, -1, 0]) - int(crop[10, 0, 0]) for crop in crops]
    assert max(spans) >= 185  # shorter side 20: all of the ramp
    assert 140 <= min(spans) <= 160  # shorter side 25: four fifths of it
    again = random_crop(ramp, 20, torch.Generator().manual_seed(7))
    assert np.array_equal(crops[7], again)


# Modes


def test_grey_16_bit_is_scaled_rather_than_clipped():
    levels = (np.arange(256) * 257).astype(np.uint16).reshape(16, 16)
    image = Image.open(io.BytesIO(encoded(Image.fromarray(levels))))
    assert np.array_equal(np.asarray(to_rgb(image, "viewer"))[..., 0], np.arange(256).reshape(16, 16))


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGB", "RGBA", "CMYK", "YCbCr"])
def test_every_mode_becomes_rgb(mode):
    red = Image.new("RGB", (6, 6), (255, 0, 0)).convert(mode)
    colour = np.asarray(to_rgb(red, "viewer"))[3, 3]
    grey = {"L": 76, "LA": 76, "1": colour[0]}
    expected = [grey[mode]] * 3 if mode in grey else [255, 0, 0]
    assert np.abs(colour.astype(int) - expected).max() <= 2


def test_transparency_is_laid_on_white():
    clear = Image.new("RGBA", (4, 4), (255, 0, 0, 0))
    half = Image.new("RGBA", (4, 4), (0, 0, 0, 128))
    palette = Image.new("P", (4, 4), 0)
    palette.putpalette([255, 0, 0])
    palette = Image.open(io.BytesIO(_with_transparent_zero(palette)))
    assert np.asarray(to_rgb(clear, "viewer")).min() == 255
    assert np.asarray(to_rgb(palette, "viewer")).min() == 255
    assert abs(int(np.asarray(to_rgb(half, "viewer"))[0, 0, 0]) - 127) <= 1


def _with_transparent_zero(palette):
    stream = io.BytesIO()
    palette.save(stream, "PNG", transparency=0)
    return stream.getvalue()


def test_exif_orientation_is_applied():
    image = picture(3, 12, 12)
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was turned: show it rotated clockwise by 90 degrees
    stream = io.BytesIO()
    image.save(stream, "PNG", exif=exif)
    shown = center_crop(Image.open(stream), 12, "viewer")
    assert np.array_equal(shown, np.rot90(np.asarray(image), k=-1))


# Data sets


def test_limit_is_a_fixed_part_of_the_split():
    small, large = open_images(Digits(limit=20), 8), open_images(Digits(limit=60), 8)
    assert (len(small), len(large)) == (20, 60)
    inside = {b.images.numpy().tobytes() for b in batches_in_order(large, 1)}
    assert all(b.images.numpy().tobytes() in inside for b in batches_in_order(small, 1))
    assert small.fingerprint == open_images(Digits(limit=20), 8).fingerprint != large.fingerprint


def test_fingerprint_depends_on_content_split_and_crop(tmp_path):
    save_tree(tmp_path, count=4)
    data = Folder(path=tmp_path)
    prints = [open_images(data, size, split).fingerprint for size in (8, 9) for split in ("train", "test")]
    prints.append(open_images(data, 8, augment=Augmentation(crop="random")).fingerprint)
    assert open_images(data, 8).fingerprint == prints[0]
    picture(9, 20, 20).save(tmp_path / "cat" / "000.png")
    prints.append(open_images(data, 8).fingerprint)
    assert len(set(prints)) == len(prints)
    assert prints[-1] in open_images(data, 8).describe()


# Broken images


@pytest.mark.parametrize("form", ["PNG", "JPEG", "WEBP", "BMP", "GIF"])
def test_truncation_is_noticed_in_every_format(tmp_path, form):
    file = tmp_path / f"0.{form.lower()}"
    picture(0, 64, 64).save(tmp_path / "1.png")
    file.write_bytes(encoded(picture(1, 64, 64), form))
    truncate(file)
    with pytest.warns(UserWarning, match=f"0.{form.lower()}"):
        assert list(open_images(Folder(path=tmp_path, holdout=0), 8).broken) == [0]


@pytest.mark.parametrize("crop", ["center", "random"])
@pytest.mark.parametrize("workers", [0, 1])
def test_a_truncated_image_is_named_once_and_skipped(tmp_path, crop, workers):
    save_tree(tmp_path)
    broken = tmp_path / "cat" / "004.png"
    truncate(broken)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        dataset = open_images(Folder(path=tmp_path, holdout=0), 8, augment=Augmentation(crop=crop))
        shown = [i for b in batches_in_order(dataset, 3, workers=workers) for i in b.indices.tolist()]
        trained = torch.cat([b.indices for b in training_batches(dataset, 20, 0, 0, 2, workers=workers)])
    assert shown == [i for i in range(20) if i != 4]
    assert sorted(trained[:20].tolist()) == sorted([*range(4), 5, *range(5, 20)])  # replaced by the next one
    assert list(dataset.broken) == [4]
    assert sum(str(broken) in str(w.message) for w in caught) == 1
    assert "19 images" in dataset.describe()


@pytest.mark.parametrize("crop", ["center", "random"])
@pytest.mark.filterwarnings("ignore:skipping")
def test_too_many_broken_images_stop_the_run(tmp_path, crop):
    save_tree(tmp_path)
    for i in range(6):
        truncate(tmp_path / "dog" / f"{i:03d}.png")
    data, augment = Folder(path=tmp_path, holdout=0), Augmentation(crop=crop)
    with pytest.raises(UserError, match=r"6 of 20 .* at most 5 .*000\.png"):
        list(batches_in_order(open_images(data, 8, augment=augment), 4))
    tolerant = open_images(data.model_copy(update={"max_broken": 0.3}), 8, augment=augment)
    assert sum(len(b.indices) for b in batches_in_order(tolerant, 4)) == 14


# Order


def test_a_global_batch_is_a_function_of_seed_and_step(digits):
    whole = list(training_batches(digits, 12, 3, 0, 11))
    resumed = list(training_batches(digits, 12, 3, 6, 5))
    for a, b in zip(whole[6:], resumed, strict=True):
        assert torch.equal(a.images, b.images)
        assert torch.equal(a.indices, b.indices)
        assert torch.equal(a.labels, b.labels)
    other = next(training_batches(digits, 12, 4, 0, 1))
    assert not torch.equal(other.indices, whole[0].indices)


def test_ranks_share_the_global_batch(digits):
    single = training_batches(digits, 12, 0, 2, 4)
    ranks = [training_batches(digits, 12, 0, 2, 4, rank=r, world=3) for r in range(3)]
    for whole, *parts in zip(single, *ranks, strict=True):
        assert torch.equal(whole.images, torch.cat([part.images for part in parts]))
        assert torch.equal(whole.indices, torch.cat([part.indices for part in parts]))


def test_an_epoch_reads_every_image_at_most_once():
    count, batch = 50, 12
    epochs = [np.concatenate([batch_indices(count, batch, 5, 4 * e + s) for s in range(4)]) for e in range(3)]
    assert all(len(np.unique(epoch)) == 48 for epoch in epochs)
    assert not np.array_equal(epochs[0], epochs[1])
    # Which two images an epoch leaves out changes: over many epochs all are read equally often.
    reads = np.bincount(np.concatenate([batch_indices(count, batch, 5, s) for s in range(800)]), minlength=count)
    assert reads.min() >= 180


def test_order_and_seeds_stay_what_they_are():
    """A run resumed with a later version must go on with the same images."""
    assert batch_indices(10, 5, 0, 3).tolist() == [5, 0, 2, 8, 6]
    assert batch_seeds(2, 0, 3).tolist() == [1864928220998770902, 7547441921753775803]


def test_passes_in_order_read_each_image_once_over_all_ranks(digits):
    ranks = [[i for b in batches_in_order(digits, 7, r, 3) for i in b.indices.tolist()] for r in range(3)]
    assert [len(r) for r in ranks] == [17, 17, 16]
    assert sorted(ranks[0] + ranks[1] + ranks[2]) == list(range(50))
    plain = torch.cat([b.images for b in batches_in_order(digits, 7)])
    assert torch.equal(plain, digits.read(range(50)).images)


def test_flips_come_from_the_seeds_and_only_when_wanted(digits):
    plain = digits.read(range(50)).images
    seeds = batch_seeds(50, 0, 0)
    images = digits.read(range(50), seeds).images
    mirrored = torch.tensor(
        [torch.equal(a, b.flip(-1)) and not torch.equal(a, b) for a, b in zip(images, plain, strict=True)]
    )
    same = torch.tensor([torch.equal(a, b) for a, b in zip(images, plain, strict=True)])
    assert (mirrored | same).all()
    assert 10 < mirrored.sum() < 40
    assert torch.equal(digits.read(range(50)).images, plain)  # the images in memory are not mirrored
    never = open_images(Digits(limit=50), 16)
    assert torch.equal(never.read(range(50), seeds).images, plain)


def test_data_workers_change_nothing(tmp_path):
    save_tree(tmp_path)
    data, augment = Folder(path=tmp_path, holdout=0), Augmentation(crop="random", flip=True)
    state = torch.get_rng_state()
    runs = [list(training_batches(open_images(data, 8, augment=augment), 6, 1, 2, 5, workers=w)) for w in (0, 2)]
    assert all(torch.equal(a.images, b.images) for a, b in zip(*runs, strict=True))
    assert len({b.images.numpy().tobytes() for b in runs[0]}) == 5
    assert torch.equal(torch.get_rng_state(), state)  # reading data leaves the global random numbers alone


def test_lazy_and_held_images_are_the_same(tmp_path, monkeypatch):
    save_tree(tmp_path)
    held = open_images(Folder(path=tmp_path, holdout=0), 8)
    monkeypatch.setattr("robustok.data.dataset.MEMORY_LIMIT", 0)
    lazy = open_images(Folder(path=tmp_path, holdout=0), 8)
    assert not lazy.in_memory
    assert held.in_memory
    assert torch.equal(held.read(range(20)).images, lazy.read(range(20)).images)


def test_impossible_batches_are_refused(digits):
    with pytest.raises(UserError, match=r"global batch is 51 .* 50 images"):
        training_batches(digits, 51, 0, 0, 1)
    with pytest.raises(UserError, match="10 cannot be shared by 3"):
        training_batches(digits, 10, 0, 0, 1, rank=0, world=3)
