import hashlib
import io
import json
import math
import pickle
import warnings

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

from robustok.config import Config, validate
from robustok.images import (
    Augmentation,
    Cifar10,
    Data,
    Digits,
    Folder,
    Parquet,
    batch_indices,
    batch_seeds,
    batches_in_order,
    center_crop,
    from_pixels,
    open_images,
    random_crop,
    to_pixels,
    to_rgb,
    training_batches,
)
from robustok.types import UserError


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


def save_parquet(path, count=12, labels=None, names=("cat", "dog"), column="img", row_group_size=5):
    images = [{"bytes": encoded(picture(i)), "path": None} for i in range(count)]
    labels = [i % 2 for i in range(count)] if labels is None else labels
    table = pa.table({column: images, "label": pa.array(labels, pa.int64())})
    if names:
        info = json.dumps({"info": {"features": {"label": {"names": names}}}})
        table = table.replace_schema_metadata({"huggingface": info})
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(table, path, row_group_size=row_group_size)
    return path


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
    """METHOD 4.5 read literally."""
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
    # A horizontal ramp: the range of values inside the crop tells the scale that was drawn.
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
    assert np.array_equal(np.asarray(to_rgb(image))[..., 0], np.arange(256).reshape(16, 16))


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGB", "RGBA", "CMYK", "YCbCr"])
def test_every_mode_becomes_rgb(mode):
    red = Image.new("RGB", (6, 6), (255, 0, 0)).convert(mode)
    colour = np.asarray(to_rgb(red))[3, 3]
    grey = {"L": 76, "LA": 76, "1": colour[0]}
    expected = [grey[mode]] * 3 if mode in grey else [255, 0, 0]
    assert np.abs(colour.astype(int) - expected).max() <= 2


def test_transparency_is_laid_on_white():
    clear = Image.new("RGBA", (4, 4), (255, 0, 0, 0))
    half = Image.new("RGBA", (4, 4), (0, 0, 0, 128))
    palette = Image.new("P", (4, 4), 0)
    palette.putpalette([255, 0, 0])
    palette = Image.open(io.BytesIO(_with_transparent_zero(palette)))
    assert np.asarray(to_rgb(clear)).min() == 255
    assert np.asarray(to_rgb(palette)).min() == 255
    assert abs(int(np.asarray(to_rgb(half))[0, 0, 0]) - 127) <= 1


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
    shown = center_crop(Image.open(stream), 12)
    assert np.array_equal(shown, np.rot90(np.asarray(image), k=-1))


# Sources


def test_digits_are_the_whole_set_in_two_disjoint_splits():
    train, test = open_images(Digits(), 8, "train"), open_images(Digits(), 8, "test")
    assert (len(train), len(test)) == (1348, 449)
    from sklearn.datasets import load_digits

    def key(image):
        return image.astype(np.uint8).tobytes()

    shown = sorted(
        key((b.images[0, 0].numpy() + 1) / 2 * 16 + 0.5) for s in (train, test) for b in batches_in_order(s, 1)
    )
    assert shown == sorted(key(image) for image in load_digits().images)
    assert train.fingerprint != test.fingerprint
    assert train.classes == [str(i) for i in range(10)]
    assert set(train.labels) == set(range(10))


def test_limit_is_a_fixed_part_of_the_split():
    small, large = open_images(Digits(limit=20), 8), open_images(Digits(limit=60), 8)
    assert (len(small), len(large)) == (20, 60)
    inside = {b.images.numpy().tobytes() for b in batches_in_order(large, 1)}
    assert all(b.images.numpy().tobytes() in inside for b in batches_in_order(small, 1))
    assert small.fingerprint == open_images(Digits(limit=20), 8).fingerprint != large.fingerprint


def test_folder_with_splits(tmp_path):
    save_tree(tmp_path / "train", count=6)
    save_tree(tmp_path / "val", classes=("dog",), count=3)
    train, test = (open_images(Folder(path=tmp_path), 8, split) for split in ("train", "test"))
    assert (len(train), len(test)) == (12, 3)
    assert test.labels.tolist() == [1, 1, 1]  # dog is 1 in training, whatever the test split holds
    assert train.classes == test.classes == ["cat", "dog"]


def test_folder_with_one_split_holds_out(tmp_path):
    save_tree(tmp_path)
    train, test = (open_images(Folder(path=tmp_path, holdout=0.25), 8, split) for split in ("train", "test"))
    images = [b.images.numpy().tobytes() for s in (train, test) for b in batches_in_order(s, 1)]
    assert (len(train), len(test)) == (15, 5)
    assert len(set(images)) == 20
    assert len(open_images(Folder(path=tmp_path, holdout=0), 8, "test")) == 20


def test_flat_folder_is_one_class(tmp_path):
    for i in range(3):
        picture(i).save(tmp_path / f"{i}.JPEG")
    dataset = open_images(Folder(path=tmp_path, holdout=0), 8)
    assert dataset.classes == ["all"]
    assert dataset.labels.tolist() == [0, 0, 0]


def test_fingerprint_tells_content_split_and_crop_apart(tmp_path):
    save_tree(tmp_path, count=4)
    data = Folder(path=tmp_path)
    prints = [open_images(data, size, split).fingerprint for size in (8, 9) for split in ("train", "test")]
    prints.append(open_images(data, 8, augment=Augmentation(crop="random")).fingerprint)
    assert open_images(data, 8).fingerprint == prints[0]
    picture(9, 20, 20).save(tmp_path / "cat" / "000.png")
    prints.append(open_images(data, 8).fingerprint)
    assert len(set(prints)) == len(prints)
    assert prints[-1] in open_images(data, 8).describe()


@pytest.mark.parametrize("layout", ["{}.parquet", "data/{}-00000-of-00001.parquet", "{}/0000.parquet"])
def test_parquet_splits_are_chosen_by_file_name(tmp_path, layout):
    save_parquet(tmp_path / layout.format("train"), 12)
    save_parquet(tmp_path / layout.format("validation"), 4, column="img")
    train, test = (open_images(Parquet(path=tmp_path), 8, split) for split in ("train", "test"))
    assert (len(train), len(test)) == (12, 4)
    assert train.classes == ["cat", "dog"]
    for i, batch in enumerate(batches_in_order(train, 1)):
        assert np.array_equal(to_pixels(batch.images)[0].permute(1, 2, 0), np.asarray(picture(i)))
        assert batch.labels.item() == i % 2


def test_parquet_file_glob_and_other_column(tmp_path):
    save_parquet(tmp_path / "latest-1.parquet", 7, names=None, column="image")
    save_parquet(tmp_path / "latest-2.parquet", 6, names=None, column="image")
    assert len(open_images(Parquet(path=tmp_path / "*.parquet", holdout=0), 8)) == 13
    one = open_images(Parquet(path=tmp_path / "latest-2.parquet", holdout=0), 8)
    assert len(one) == 6
    assert one.classes == ["0", "1"]


def test_cifar10_in_either_folder(tmp_path, monkeypatch):
    from torchvision.datasets import CIFAR10

    folder = tmp_path / CIFAR10.base_folder
    folder.mkdir()
    rng = np.random.default_rng(0)
    contents = {
        name: {"data": rng.integers(0, 256, (n, 3072), dtype=np.uint8), "labels": [i % 10 for i in range(n)]}
        for name, n in (("data_batch_1", 20), ("test_batch", 10))
    }
    contents["batches.meta"] = {"label_names": [f"class{i}" for i in range(10)]}
    sums = {}
    for name, content in contents.items():
        (folder / name).write_bytes(pickle.dumps(content))
        sums[name] = hashlib.md5((folder / name).read_bytes()).hexdigest()
    monkeypatch.setattr(CIFAR10, "train_list", [["data_batch_1", sums["data_batch_1"]]])
    monkeypatch.setattr(CIFAR10, "test_list", [["test_batch", sums["test_batch"]]])
    monkeypatch.setattr(
        CIFAR10, "meta", {"filename": "batches.meta", "key": "label_names", "md5": sums["batches.meta"]}
    )
    for path in (tmp_path, folder):
        train, test = (open_images(Cifar10(path=path), 32, split) for split in ("train", "test"))
        assert (len(train), len(test)) == (20, 10)
        assert train.classes[3] == "class3"
        pixels = to_pixels(train.read([5]).images)[0]
        assert np.array_equal(pixels.numpy().reshape(-1), contents["data_batch_1"]["data"][5])


# What can be wrong with data


def _missing(path):
    return Folder(path=path / "nowhere")


def _empty(path):
    return Folder(path=path)


def _other_files(path):
    (path / "cat").mkdir()
    (path / "cat" / "notes.txt").write_text("no image")
    return Folder(path=path)


def _new_class_in_test(path):
    save_tree(path / "train", count=1)
    save_tree(path / "test", classes=("emu",), count=1)
    return Folder(path=path)


def _negative_labels(path):
    return Parquet(path=save_parquet(path / "a.parquet", 3, labels=[0, -1, 1]))


def _large_labels(path):
    return Parquet(path=save_parquet(path / "a.parquet", 3, labels=[0, 2, 1]))


def _no_column(path):
    return Parquet(path=save_parquet(path / "a.parquet", 3, column="picture"))


def _no_parquet(path):
    (path / "a.parquet").write_text("this is text")
    return Parquet(path=path)


def _no_parquet_files(path):
    return Parquet(path=path)


def _no_cifar(path):
    return Cifar10(path=path)


def _one_image(path):
    return Folder(path=save_tree(path, classes=("cat",), count=1))


def _all_broken(path):
    for file in save_tree(path, count=2).rglob("*.png"):
        truncate(file)
    return Folder(path=path, holdout=0)


@pytest.mark.parametrize(
    ("make", "split", "message"),
    [
        (_missing, "train", "no folder"),
        (_empty, "train", "no images in .*files found: none"),
        (_other_files, "train", r"no images in .*\.txt"),
        (_new_class_in_test, "test", "emu"),
        (_negative_labels, "train", "labels from -1 to 1, expected 0 to 1"),
        (_large_labels, "train", "labels from 0 to 2, expected 0 to 1"),
        (_no_column, "train", "picture, label"),
        (_no_parquet, "train", "cannot read .*a.parquet"),
        (_no_parquet_files, "train", "no parquet files"),
        (_no_cifar, "train", "cifar-10-batches-py"),
        (_one_image, "train", "none for the train split"),
        (_all_broken, "train", "cannot be read"),
    ],
)
@pytest.mark.filterwarnings("ignore:skipping")
def test_bad_data_is_one_line_for_the_user(tmp_path, make, split, message):
    with pytest.raises(UserError, match=message) as caught:
        open_images(make(tmp_path), 8, split)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("form", ["PNG", "JPEG", "WEBP", "BMP", "GIF"])
def test_truncation_is_noticed_in_every_format(tmp_path, form):
    file = tmp_path / f"0.{form.lower()}"
    picture(0, 64, 64).save(tmp_path / "1.png")
    file.write_bytes(encoded(picture(1, 64, 64), form))
    truncate(file)
    with pytest.warns(UserWarning, match=f"0.{form.lower()}"):
        assert list(open_images(Folder(path=tmp_path, holdout=0), 8).broken) == [0]


def test_a_broken_parquet_row_is_named(tmp_path):
    images = [{"bytes": encoded(picture(i)), "path": None} for i in range(7)]
    images[5] = {"bytes": images[5]["bytes"][:60], "path": None}
    pq.write_table(pa.table({"image": images}), tmp_path / "b.parquet", row_group_size=2)
    pq.write_table(pa.table({"image": images[:2]}), tmp_path / "a.parquet")
    with pytest.warns(UserWarning, match=r"b\.parquet row 5"):
        dataset = open_images(Parquet(path=tmp_path, holdout=0), 8)
    assert (len(dataset), list(dataset.broken), dataset.classes) == (9, [7], ["all"])


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
    assert sorted(trained[:20].tolist()) == sorted([*range(4), 5, *range(5, 20)])  # the next one takes its place
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


def test_an_epoch_shows_every_image_at_most_once():
    count, batch = 50, 12
    epochs = [np.concatenate([batch_indices(count, batch, 5, 4 * e + s) for s in range(4)]) for e in range(3)]
    assert all(len(np.unique(epoch)) == 48 for epoch in epochs)
    assert not np.array_equal(epochs[0], epochs[1])
    # Which two images an epoch leaves out changes: over many epochs all are seen alike.
    seen = np.bincount(np.concatenate([batch_indices(count, batch, 5, s) for s in range(800)]), minlength=count)
    assert seen.min() >= 180


def test_order_and_seeds_stay_what_they_are():
    """A run resumed with a later version must go on with the same images."""
    assert batch_indices(10, 5, 0, 3).tolist() == [5, 0, 2, 8, 6]
    assert batch_seeds(2, 0, 3).tolist() == [1864928220998770902, 7547441921753775803]


def test_in_order_passes_see_each_image_once_over_all_ranks(digits):
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
    assert torch.equal(digits.read(range(50)).images, plain)  # mirroring has not touched what is held in memory
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
    monkeypatch.setattr("robustok.images.MEMORY_LIMIT", 0)
    lazy = open_images(Folder(path=tmp_path, holdout=0), 8)
    assert lazy._memory is None
    assert held._memory is not None
    assert torch.equal(held.read(range(20)).images, lazy.read(range(20)).images)


def test_batches_that_cannot_be_are_refused(digits):
    with pytest.raises(UserError, match=r"global batch is 51 .* 50 images"):
        training_batches(digits, 51, 0, 0, 1)
    with pytest.raises(UserError, match="10 cannot be shared by 3"):
        training_batches(digits, 10, 0, 0, 1, rank=0, world=3)


def test_data_is_chosen_by_name(tmp_path):
    class Run(Config):
        data: Data

    assert isinstance(validate(Run, {"data": {"name": "folder", "path": str(tmp_path)}}).data, Folder)
    with pytest.raises(UserError, match=r"unknown key 'data\.holdout'"):
        validate(Run, {"data": {"name": "cifar10", "holdout": 0.5}})
