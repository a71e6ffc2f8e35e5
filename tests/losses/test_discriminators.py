import pytest
import torch

from robustok.losses.discriminators import PatchConfig, PatchDiscriminator, augment, augmentation_draw
from robustok.losses.discriminators.resnet import ResNetConfig, ResNetFeatures, ResNetHeads
from tiny_models import save_resnet20


def some_images(count=4, size=16, seed=0):
    return torch.rand(count, 3, size, size, generator=torch.Generator().manual_seed(seed)) * 2 - 1


def some_draw(count=4, seed=1):
    return augmentation_draw(count, torch.Generator().manual_seed(seed))


# The discriminator


@pytest.mark.parametrize(("size", "depth", "places"), [(16, 2, 16), (16, 0, 256), (32, 2, 64), (20, 1, 100)])
def test_a_map_of_logits_at_any_size(size, depth, places):
    discriminator = PatchDiscriminator(PatchConfig(width=8, depth=depth))
    assert discriminator(some_images(2, size)).shape == (2, places)


def test_an_image_s_logits_do_not_depend_on_its_neighbours():
    torch.manual_seed(0)
    discriminator = PatchDiscriminator(PatchConfig(width=8)).eval()
    images = some_images()
    torch.testing.assert_close(torch.cat([discriminator(image[None]) for image in images]), discriminator(images))


@torch.no_grad()
def test_spectral_norm_bounds_every_layer():
    torch.manual_seed(0)
    discriminator = PatchDiscriminator(PatchConfig(width=4, depth=1))
    for _ in range(30):  # power iteration converges while training
        discriminator(some_images(1))
    for layer in discriminator.layers[:-1]:
        if hasattr(layer, "weight"):
            assert torch.linalg.matrix_norm(layer.weight.flatten(1), ord=2).item() == pytest.approx(1, abs=0.02)


# On a public classifier


def test_the_heads_see_every_stage_of_the_classifier(tmp_path):
    weights = save_resnet20(tmp_path / "resnet20.safetensors")
    features = ResNetFeatures(ResNetConfig(weights=weights))
    images = some_images(2, 32)
    first, second, third = features.network.feature_maps(images)
    maps = features(images)
    assert maps.shape == (2, 448, 8, 8)
    assert torch.equal(maps[0, 3 * 16 + 4 * 1 + 2], first[0, 3, 1::4, 2::4])  # channel 3, row 1 and column 2 of a block
    assert torch.equal(maps[1, 256 + 5 * 4 + 2 * 1 + 0], second[1, 5, 1::2, 0::2])
    assert torch.equal(maps[:, 384:], third)


@pytest.mark.parametrize("stage", [0, 1, 2])
def test_each_head_has_logits_of_its_own_stage(tmp_path, stage):
    torch.manual_seed(0)
    heads = ResNetHeads(ResNetConfig(weights="unused", width=8)).eval()
    maps = torch.rand(2, 448, 4, 4)
    other = maps.clone()
    other[:, [0, 256, 384][stage] : [256, 384, 448][stage]] += 1
    a, b = (heads(x).unflatten(1, (3, 16)) for x in (maps, other))
    changed = (a != b).any(-1).all(0).tolist()
    assert changed == [i == stage for i in range(3)]
    assert torch.equal(heads(maps, other), torch.cat([heads(maps), heads(other)]))


# Augmentation


def plain_reading(image, numbers):
    """Pixel by pixel: translation, brightness, saturation, contrast, cutout."""
    vertical, horizontal, brightness, saturation, contrast, top, left = numbers.tolist()
    _, height, width = image.shape
    shifted = torch.zeros_like(image)
    for row in range(height):
        for column in range(width):
            from_row = row + int(vertical * (2 * round(height / 8) + 1)) - round(height / 8)
            from_column = column + int(horizontal * (2 * round(width / 8) + 1)) - round(width / 8)
            if 0 <= from_row < height and 0 <= from_column < width:
                shifted[:, row, column] = image[:, from_row, from_column]
    bright = shifted + (brightness - 0.5)
    grey = bright.mean(0, keepdim=True)
    saturated = grey + 2 * saturation * (bright - grey)
    result = saturated.mean() + (0.5 + contrast) * (saturated - saturated.mean())
    size = round(0.2 * height)
    first_row = int(top * (height + 1 - size % 2)) - size // 2
    first_column = int(left * (width + 1 - size % 2)) - size // 2
    for row in range(max(0, first_row), min(height, first_row + size)):
        for column in range(max(0, first_column), min(width, first_column + size)):
            result[:, row, column] = 0
    return result


@pytest.mark.parametrize("size", [16, 32])
def test_augmentation_against_a_plain_reading(size):
    images, draw = some_images(6, size), some_draw(6)
    found = augment(images, draw)
    for image, numbers, result in zip(images, draw[:, :, 0, 0].T, found, strict=True):
        torch.testing.assert_close(result, plain_reading(image, numbers), atol=1e-5, rtol=1e-5)


def test_the_middle_of_every_draw_only_cuts():
    images = some_images()
    found = augment(images, torch.full((7, 4, 1, 1), 0.5))
    changed = (found - images).abs().amax(1) > 1e-6  # (N, H, W)
    assert changed.sum((1, 2)).tolist() == [9] * 4  # a fifth of 16, squared
    assert changed[:, 7:10, 7:10].all()


def test_ranges_of_the_draws():
    ones = torch.ones(1, 3, 16, 16)
    shifts = set()
    for value in torch.linspace(0, 0.9999, 200):
        draw = torch.full((7, 1, 1, 1), 0.5)
        draw[0] = value
        draw[5] = 0.0  # the cutout at the upper edge
        left = augment(ones, draw)[0, 0, :, 0]  # a column that the cutout in the middle does not touch
        shifts.add((int(left[0] == 0), round(float((left == left[8]).sum()))))
    assert {16 - kept for _, kept in shifts} == {0, 1, 2}  # an eighth of 16, each way
    assert {edge for edge, kept in shifts if kept < 16} == {0, 1}


def test_each_image_has_its_own_draw():
    images, draw = some_images(), some_draw()
    whole = augment(images, draw)
    torch.testing.assert_close(torch.cat([augment(images[i : i + 2], draw[:, i : i + 2]) for i in (0, 2)]), whole)
    assert not torch.equal(augment(images[:1].repeat(2, 1, 1, 1), draw[:, :2])[0], whole[1])


def test_gradients_reach_the_images():
    images = some_images().requires_grad_()
    augment(images, some_draw()).square().sum().backward()
    assert ((images.grad != 0).flatten(1).float().mean(1) > 0.5).all()
    assert augment(images.bfloat16(), some_draw()).dtype == torch.float32
