"""The image path against a direct reading of ADM's, on everything that image files can be.

``adm`` is what ADM's data loader does with an opened file: decode, ``convert("RGB")``, halve with a box filter,
bicubic, centre crop. Ordinary inputs must agree in every pixel. The exceptions (transparency, 16 bits, EXIF) must agree
with it once the image is as a viewer shows it.
"""

import io
import warnings

import numpy as np
import pytest
from PIL import Image, ImageOps

from robustok.data.crops import center_crop, to_rgb
from robustok.data.dataset import open_images
from robustok.data.loader import batches_in_order
from robustok.data.pixels import to_pixels
from robustok.data.sources import Folder
from robustok.errors import UserError
from tiny_images import encoded, picture, truncate


def adm(image, size):
    image.load()
    image = image.convert("RGB")
    while min(*image.size) >= 2 * size:
        image = image.resize(tuple(x // 2 for x in image.size), resample=Image.Resampling.BOX)
    scale = size / min(*image.size)
    image = image.resize(tuple(round(x * scale) for x in image.size), resample=Image.Resampling.BICUBIC)
    pixels = np.array(image)
    crop_y = (pixels.shape[0] - size) // 2
    crop_x = (pixels.shape[1] - size) // 2
    return pixels[crop_y : crop_y + size, crop_x : crop_x + size]


def reopened(image, form="PNG", **options):
    stream = io.BytesIO()
    image.save(stream, form, **options)
    return Image.open(io.BytesIO(stream.getvalue()))


def noisy(mode="RGB", width=90, height=70, seed=0):
    """Detail up to the single pixel, so that another filter, offset or rounding shows."""
    noise = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.blend(picture(seed, width, height), Image.fromarray(noise), 0.5).convert(mode)


# Ordinary inputs: ADM's pixels


@pytest.mark.parametrize("size", [32, 33, 256])
@pytest.mark.parametrize(
    ("width", "height"),
    [(1, 1), (2, 1), (3, 200), (200, 3), (31, 33), (63, 65), (64, 64), (127, 65), (128, 500), (301, 131), (5000, 300)],
)
def test_every_size_is_adms(width, height, size):
    image = noisy(width=width, height=height)
    assert np.array_equal(center_crop(image, size), adm(image, size))


def palette_image():
    return noisy().quantize(16)


ORDINARY = {
    "grey PNG": lambda: reopened(noisy("L")),
    "palette PNG": lambda: reopened(palette_image()),
    "GIF": lambda: reopened(palette_image(), "GIF"),
    "1-bit PNG": lambda: reopened(noisy("1")),
    "grey JPEG": lambda: reopened(noisy("L"), "JPEG"),
    "JPEG": lambda: reopened(noisy(), "JPEG"),
    "CMYK JPEG": lambda: reopened(noisy("CMYK"), "JPEG"),
    "YCbCr TIFF": lambda: reopened(noisy("YCbCr"), "TIFF"),
    "LAB TIFF": lambda: reopened(noisy("LAB"), "TIFF"),
    "BMP": lambda: reopened(noisy(), "BMP"),
    "WEBP": lambda: reopened(noisy(), "WEBP", lossless=True),
    "opaque RGBA": lambda: reopened(noisy("RGBA")),
    "opaque LA": lambda: reopened(noisy("LA")),
    "upright EXIF": lambda: reopened(noisy(), "JPEG", exif=orientation(1)),
}


def orientation(value):
    exif = Image.Exif()
    exif[0x0112] = value
    return exif


@pytest.mark.parametrize("kind", ORDINARY)
def test_every_ordinary_kind_is_adms(kind):
    expected = adm(ORDINARY[kind](), 32)
    assert np.array_equal(center_crop(ORDINARY[kind](), 32), expected)
    assert np.array_equal(center_crop(ORDINARY[kind](), 32, "viewer"), expected)
    assert expected.std() > 5  # there is something to see


def see_through(mode):
    image = noisy(mode)
    image.putalpha(Image.fromarray(np.tile(np.arange(90, dtype=np.uint8) * 2, (70, 1))))
    return image


EXCEPTIONS = {
    "RGBA": lambda: reopened(see_through("RGBA")),
    "LA": lambda: reopened(see_through("LA")),
    "transparent palette": lambda: reopened(palette_image(), transparency=3),
    "16-bit PNG": lambda: reopened(Image.fromarray(np.asarray(noisy("L")).astype(np.uint16) * 257)),
    "16-bit TIFF": lambda: reopened(Image.fromarray(np.asarray(noisy("L")).astype(np.uint16) * 257), "TIFF"),
    "EXIF-turned JPEG": lambda: reopened(noisy(), "JPEG", exif=orientation(6)),
}


@pytest.mark.parametrize("kind", EXCEPTIONS)
def test_every_odd_kind_is_adms_unless_asked_otherwise(kind):
    expected = adm(EXCEPTIONS[kind](), 32)
    assert np.array_equal(center_crop(EXCEPTIONS[kind](), 32), expected)
    assert not np.array_equal(center_crop(EXCEPTIONS[kind](), 32, "viewer"), expected)


# As a viewer shows it: ADM's crop of that


@pytest.mark.parametrize("mode", ["RGBA", "LA"])
def test_transparency_is_white_where_adm_uncovers_what_is_beneath(mode):
    opaque, image = noisy(mode), see_through(mode)
    levels = np.asarray(opaque.convert("RGB"), dtype=float)
    alpha = np.asarray(image)[..., -1:] / 255
    blended = levels * alpha + 255 * (1 - alpha)
    assert np.abs(np.asarray(to_rgb(reopened(image), "viewer"), dtype=float) - blended).max() <= 1
    assert np.array_equal(center_crop(reopened(image), 32, "viewer"), adm(to_rgb(image, "viewer"), 32))
    assert np.array_equal(adm(image, 32), adm(opaque, 32))  # ADM shows what is hidden


def test_a_transparent_palette_entry_is_white():
    image = palette_image()
    hidden = np.asarray(image) == 3
    shown = np.asarray(to_rgb(reopened(image, transparency=3), "viewer"))
    assert hidden.any()
    assert (shown[hidden] == 255).all()
    assert np.array_equal(shown[~hidden], np.asarray(image.convert("RGB"))[~hidden])


@pytest.mark.parametrize("form", ["PNG", "TIFF"])
def test_16_bits_are_scaled_where_adm_clips(form):
    grey = np.asarray(noisy("L"))
    deep = Image.fromarray(grey.astype(np.uint16) * 257)
    assert np.array_equal(center_crop(reopened(deep, form), 32, "viewer"), adm(Image.fromarray(grey), 32))
    assert adm(reopened(deep, form), 32).min() > 250


@pytest.mark.parametrize(("levels", "notes"), [(np.uint16(257), 1), (np.uint16(1), 0)])
def test_16_bits_that_are_clipped_are_noted(levels, notes):
    deep = reopened(Image.fromarray(np.asarray(noisy("L")).astype(np.uint16) * levels))
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        to_rgb(deep)
        to_rgb(deep, "viewer")
    assert ["data.rgb=viewer" in str(note.message) for note in found] == [True] * notes


@pytest.mark.parametrize("turned", range(2, 9))
@pytest.mark.parametrize("form", ["JPEG", "PNG"])
def test_exif_orientation_is_applied_where_adm_leaves_it(form, turned):
    image = reopened(noisy(width=100, height=60), form, exif=orientation(turned))
    expected = adm(ImageOps.exif_transpose(image), 32)
    assert np.array_equal(center_crop(image, 32, "viewer"), expected)
    assert not np.array_equal(adm(image, 32), expected)


# Refused


def save_folder(root, odd=None):
    for i in range(4):
        picture(i, 40, 30).save(root / f"{i}.png")
    if odd is not None:
        odd(root)
    return root


def float_tiff(root):
    Image.fromarray(np.zeros((40, 40), dtype=np.float32)).save(root / "1.tiff")
    (root / "1.png").unlink()


def cut_off(root):
    truncate(root / "1.png")


def not_an_image(root):
    (root / "1.png").write_text("no image")


def too_elongated(root):
    (root / "1.png").write_bytes(encoded(Image.new("RGB", (60_000, 1))))


@pytest.mark.parametrize(
    ("odd", "reason"),
    [
        (float_tiff, r"1\.tiff: float images have no known range"),
        (cut_off, r"1\.png: .*truncated"),
        (not_an_image, r"1\.png: cannot identify"),
        (too_elongated, r"1\.png: .* of 60000x1 is too elongated"),
    ],
)
def test_unreadable_images_are_named_and_skipped_or_refused_as_asked(tmp_path, odd, reason):
    data = Folder(path=save_folder(tmp_path, odd), holdout=0)
    with pytest.warns(UserWarning, match=reason):
        dataset = open_images(data, 64)
    assert torch_indices(dataset) == [0, 2, 3]
    with pytest.raises(UserError, match=f"1 of 4 .* at most 0 .*{reason}"):
        open_images(data.model_copy(update={"max_broken": 0}), 64)


def torch_indices(dataset):
    return [i for batch in batches_in_order(dataset, 3) for i in batch.indices.tolist()]


def test_sound_images_pass_where_none_may_be_broken(tmp_path):
    data = Folder(path=save_folder(tmp_path), holdout=0, max_broken=0)
    assert torch_indices(open_images(data, 16)) == [0, 1, 2, 3]


# Images as they are


@pytest.mark.parametrize("held", [True, False])
def test_images_of_one_size_are_used_as_they_are(tmp_path, monkeypatch, held):
    if not held:
        monkeypatch.setattr("robustok.data.dataset.MEMORY_LIMIT", 0)
    dataset = open_images(Folder(path=save_folder(tmp_path), holdout=0), None)
    assert (dataset.image_size, dataset.shape) == (None, (30, 40))
    pixels = to_pixels(dataset.read(range(4)).images).permute(0, 2, 3, 1).numpy()
    assert np.array_equal(pixels, np.stack([np.asarray(picture(i, 40, 30)) for i in range(4)]))
    assert "as they are, 30x40, 4 images" in dataset.describe()
    assert dataset.fingerprint != open_images(Folder(path=tmp_path, holdout=0), 30).fingerprint


def test_mixed_sizes_are_refused_by_name(tmp_path):
    save_folder(tmp_path, lambda root: picture(0, 41, 30).save(root / "2.png"))
    with pytest.raises(UserError, match=r"0\.png is 40x30 and .*2\.png is 41x30 .* image_size"):
        open_images(Folder(path=tmp_path, holdout=0), None)
    assert open_images(Folder(path=tmp_path, holdout=0), 30).shape == (30, 30)


@pytest.mark.filterwarnings("ignore:skipping")
def test_sizes_of_broken_and_turned_images(tmp_path):
    data = Folder(path=save_folder(tmp_path, not_an_image), holdout=0)
    assert list(open_images(data, None).broken) == [1]
    (tmp_path / "1.png").write_bytes(encoded(picture(1, 40, 30)))
    picture(2, 40, 30).save(tmp_path / "2.png", exif=orientation(6))
    with pytest.raises(UserError, match=r"2\.png: it is 30x40 pixels, the others are 40x30"):
        open_images(data.model_copy(update={"max_broken": 0, "rgb": "viewer"}), None)
    lying = data.model_copy(update={"max_broken": 0})
    assert open_images(lying, None).broken == {}  # ADM leaves it on its side
    shown = data.model_copy(update={"rgb": "viewer"})
    assert open_images(lying, 30).fingerprint != open_images(shown, 30).fingerprint
    for file in tmp_path.iterdir():
        file.write_text("no image")
    with pytest.raises(UserError, match="none of the 4 images"):
        open_images(data, None)
