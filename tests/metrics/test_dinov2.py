import re

import numpy as np
import pytest
import timm
import torch
from safetensors.torch import save_file
from torch import nn
from torchvision.transforms.functional import pil_to_tensor, to_pil_image

from robustok.config import load
from robustok.data.pixels import from_pixels
from robustok.errors import UserError
from robustok.metrics.features import ExtractorConfig, load_extractor
from robustok.metrics.features.dinov2 import DINOv2Extractor, resample_positions
from robustok.types import FeatureExtractor

SMALL = "vit_small_patch14_dinov2.lvd142m"


def pixels(count=2, height=40, width=32):
    rng = torch.Generator().manual_seed(0)
    return torch.randint(0, 256, (count, 3, height, width), dtype=torch.uint8, generator=rng)


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    """Random weights of the small model in two layouts: the original's, which has a mask token, and timm's."""
    rng, folder = torch.Generator().manual_seed(0), tmp_path_factory.mktemp("dinov2")
    state = timm.create_model(SMALL, num_classes=0).state_dict()
    for name, value in state.items():
        value.normal_(1.0 if "norm" in name or "gamma" in name else 0.0, 0.05, generator=rng)
    save_file(state, folder / "model.safetensors")
    torch.save(state | {"mask_token": torch.zeros(1, 384)}, folder / "dinov2_vits14_pretrain.pth")
    return folder


@pytest.fixture(scope="module")
def extractor(weights):
    config = ExtractorConfig(name="dinov2", path=weights / "dinov2_vits14_pretrain.pth", model=SMALL)
    return load_extractor(config)


@pytest.fixture(scope="module")
def found(extractor):
    return extractor(pixels())


def test_it_names_itself_by_model_and_weights(extractor, weights):
    assert isinstance(extractor, FeatureExtractor)
    assert extractor.dim == 384
    assert re.fullmatch(r"custom-dinov2-vits14-384-[0-9a-f]{8}", extractor.name)
    assert DINOv2Extractor(weights / "model.safetensors", model=SMALL).name == extractor.name  # of either layout


def test_weights_of_timm_are_not_custom(weights, monkeypatch):
    """From timm's cache, were its address a file of this machine."""
    made = timm.create_model

    def cached(name, pretrained_cfg_overlay=None, **settings):
        return made(name, pretrained_cfg_overlay={"file": str(weights / "model.safetensors")}, **settings)

    monkeypatch.setattr(timm, "create_model", cached)
    assert re.fullmatch(r"dinov2-vits14-384-[0-9a-f]{8}", DINOv2Extractor(model=SMALL).name)


# The network, by the definition of Oquab et al. 2023 and nothing of timm's


def bicubic_weights(old, grid, a=-0.75):
    """(grid, old) float64: Keys' kernel at (i + 1/2) * old / (grid + 0.1) - 1/2, the border repeated."""
    found = np.zeros((grid, old))
    for i in range(grid):
        position = (i + 0.5) * old / (grid + 0.1) - 0.5
        for k in range(int(np.floor(position)) - 1, int(np.floor(position)) + 3):
            d = abs(position - k)
            near, far = (a + 2) * d**3 - (a + 3) * d**2 + 1, a * d**3 - 5 * a * d**2 + 8 * a * d - 4 * a
            found[i, min(max(k, 0), old - 1)] += near if d <= 1 else far if d < 2 else 0.0
    return found


@pytest.mark.parametrize(("old", "grid"), [(37, 16), (5, 8), (16, 16)])
def test_positions_are_resampled_as_by_the_original(old, grid):
    table = torch.randn(1, 1 + old * old, 6, generator=torch.Generator().manual_seed(0))
    found = resample_positions(table, grid)
    assert found.shape == (1, 1 + grid * grid, 6)
    assert torch.equal(found[:, 0], table[:, 0])
    square, w = table[0, 1:].double().view(old, old, 6).numpy(), bicubic_weights(old, grid)
    by_hand = np.einsum("ih,jw,hwf->ijf", w, w, square).reshape(-1, 6)
    assert np.abs(found[0, 1:].numpy() - by_hand).max() < 2e-5  # float32: 1.03e-5 with torch 2.9


def reference(images, state, heads=6):
    """Images (N, 3, 224, 224), normalised, to the class token after the last norm, layer by layer."""
    state = {name: value.double() for name, value in state.items()}

    def linear(x, name):
        return x @ state[f"{name}.weight"].T + state[f"{name}.bias"]

    def norm(x, name):
        x = (x - x.mean(-1, keepdim=True)) / (x.var(-1, unbiased=False, keepdim=True) + 1e-6).sqrt()
        return x * state[f"{name}.weight"] + state[f"{name}.bias"]

    kernel = state["patch_embed.proj.weight"].flatten(1)  # (F, 3 * 14 * 14)
    x = nn.functional.unfold(images, 14, stride=14).mT @ kernel.T + state["patch_embed.proj.bias"]  # (N, 256, F)
    square, w = state["pos_embed"][0, 1:].view(37, 37, -1), torch.from_numpy(bicubic_weights(37, 16))
    table = torch.einsum("ih,jw,hwf->ijf", w, w, square).flatten(0, 1)
    own = (state["cls_token"] + state["pos_embed"][:, :1]).expand(len(x), -1, -1)
    x = torch.cat([own, x + table], dim=1)  # (N, 257, F)
    for i in range(12):
        n, length, width = x.shape
        qkv = linear(norm(x, f"blocks.{i}.norm1"), f"blocks.{i}.attn.qkv")
        q, k, v = qkv.view(n, length, 3, heads, -1).permute(2, 0, 3, 1, 4)  # each (N, heads, 257, F / heads)
        mixed = ((q @ k.mT) * (width // heads) ** -0.5).softmax(-1) @ v
        mixed = linear(mixed.transpose(1, 2).flatten(2), f"blocks.{i}.attn.proj")
        x = x + state[f"blocks.{i}.ls1.gamma"] * mixed
        hidden = nn.functional.gelu(linear(norm(x, f"blocks.{i}.norm2"), f"blocks.{i}.mlp.fc1"))
        x = x + state[f"blocks.{i}.ls2.gamma"] * linear(hidden, f"blocks.{i}.mlp.fc2")
    return norm(x, "norm")[:, 0]


def test_features_are_the_class_token_of_the_original_model(weights, extractor):
    images = pixels(1, 224, 224)  # nothing to resize
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    normal = (images.double() / 255 - mean.view(3, 1, 1)) / std.view(3, 1, 1)
    state = torch.load(weights / "dinov2_vits14_pretrain.pth", weights_only=True)
    expected = reference(normal, state)
    found = extractor(images)
    assert (found.dtype, found.shape, found.requires_grad) == (torch.float32, (1, 384), False)
    assert (found - expected).norm() / expected.norm() < 1e-5


def test_images_are_resized_like_pil_does(extractor):
    seen = []
    patches = extractor.network.patch_embed.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    smooth = torch.linspace(40, 200, 300).view(1, 1, 1, 300).expand(1, 3, 260, 300).round().to(torch.uint8)
    extractor(smooth)
    patches.remove()
    mean, std = torch.tensor([0.485, 0.456, 0.406]).view(3, 1, 1), torch.tensor([0.229, 0.224, 0.225]).view(3, 1, 1)
    ours = (seen[0][0] * std + mean) * 255
    pil = pil_to_tensor(to_pil_image(smooth[0]).resize((224, 224), resample=3)).float()
    assert (ours - pil).abs().max() < 1  # which rounds


def test_neither_autocast_nor_batch_nor_train_mode_matters(extractor, found):
    extractor.network.train()
    with torch.autocast("cpu", torch.bfloat16):
        alone = extractor(pixels()[1:])
    assert (alone - found[1:]).abs().max() < 1e-5


# What the user can get wrong


def test_images_have_the_same_features_and_a_gradient(extractor):
    pixels = torch.randint(0, 256, (2, 3, 20, 20), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    images = from_pixels(pixels).requires_grad_()
    features = extractor.from_images(images)
    torch.testing.assert_close(features.detach(), extractor(pixels))
    features[0].sum().backward()
    assert images.grad[0].abs().max() > 0
    assert not images.grad[1].any()


def test_only_uint8_pixels_enter(extractor):
    with pytest.raises(UserError, match="uint8"):
        extractor(pixels().float())


def test_missing_weights_name_the_file_and_the_setting(monkeypatch):
    def offline(*_, **__):
        raise OSError("no route\nto host")

    monkeypatch.setattr(timm, "create_model", offline)
    with pytest.raises(UserError, match=r"no route to host.*extractor\.path.*dinov2_vitl14_pretrain\.pth") as error:
        DINOv2Extractor()
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("content", ["words", "other", "another size"])
def test_files_that_are_no_weights(tmp_path, content):
    path = tmp_path / "weights.pth"
    if content == "words":
        path.write_text("not weights")
    else:
        shape = {"other": (2,), "another size": (1, 1, 768)}[content]
        torch.save({"cls_token": torch.zeros(shape)}, path)
    with pytest.raises(UserError, match=r"extractor\.path.*dinov2_vits14_pretrain\.pth") as error:
        DINOv2Extractor(path, model=SMALL)
    assert "\n" not in str(error.value)


def test_configuration():
    assert load(ExtractorConfig, None, ("name=dinov2",)).model == "vit_large_patch14_dinov2.lvd142m"
    with pytest.raises(UserError, match=r"model=vit_tiny needs extractor\.name=dinov2"):
        load(ExtractorConfig, None, ("name=inception", "model=vit_tiny"))
    with pytest.raises(UserError, match="is not of FD-DINOv2"):
        DINOv2Extractor(model="vit_base_patch14_reg4_dinov2.lvd142m")
