"""Decoders trained on crops of latents, and with checkpointed blocks: the same loss and gradients in less memory."""

import math
from dataclasses import replace
from itertools import product

import pytest
import torch
from torch import nn

import tiny
from robustok.commands.dry_run import estimate
from robustok.commands.encode import encode
from robustok.config import plain, validate
from robustok.data.dataset import open_images
from robustok.data.latent_cache import LatentCache
from robustok.data.sources import Digits
from robustok.errors import UserError
from robustok.snapshots import write_snapshot
from robustok.tokenizers import TOKENIZERS, encoder_digest, load_tokenizer
from robustok.tokenizers.diffusers import DiffusersConfig
from robustok.training.decoder import LatentDecoder, train_decoder
from robustok.training.latent_crops import Cropping, LatentCrop, cropping
from robustok.training.objectives import LatentNoise, Material, Steps, mixture
from robustok.training.prepared import adapt_blocks
from tiny_models import TINY_TOKENIZERS


def model_of(name, size=64):
    """A tokenizer with random weights; its images are of ``size`` pixels."""
    if name.startswith("diffusers"):
        pytest.importorskip("diffusers")
    torch.manual_seed(0)
    family, config = TOKENIZERS[name]
    return family(validate(config, {"name": name, "image_size": size} | TINY_TOKENIZERS[name])).eval()


def without_norms(module):
    """Group norms see all of a window, as attention does; without them a decoder is local."""
    for name, child in module.named_children():
        if isinstance(child, nn.GroupNorm):
            setattr(module, name, nn.Identity())
        else:
            without_norms(child)


def latents_of(model, count):
    rng = torch.Generator().manual_seed(0)
    if model.kind == "discrete":
        return torch.randint(len(model.codebook), (count, model.latent_shape[0]), generator=rng)
    return torch.randn(count, *model.latent_shape, generator=rng)


@torch.no_grad()
def test_crops_are_decoded_as_in_the_whole_image():
    model = model_of("maskgit")  # no attention
    without_norms(model)
    latents = latents_of(model, 40)
    whole = model.decode(latents)
    corners = tuple(product((0, 1, 5, 11, 13, 24), repeat=2)) + ((3, 3),) * 4  # edges, and near them
    for margin, same in ((None, True), (2, False)):
        crops = cropping(LatentCrop(size=16, margin=margin), model)
        cut = replace(crops.draw(40, slice(0, 40), 0, 3, "paired"), corners=corners)
        windows = cut.latents(latents)
        assert windows.shape == (40, math.prod(crops.window))
        found, expected = cut.decoded(model.decode(windows)), cut.images(whole)
        assert found.shape == expected.shape == (40, 3, 16, 16)
        assert torch.allclose(found, expected, atol=1e-5) is same


@torch.no_grad()
def test_crops_of_images_that_are_not_square_are_decoded_as_in_the_whole():
    pytest.importorskip("diffusers")
    settings = TINY_TOKENIZERS["diffusers_kl"]["settings"] | {"mid_block_add_attention": False}
    model = TOKENIZERS["diffusers_kl"][0](validate(DiffusersConfig, {"name": "diffusers_kl", "settings": settings}))
    without_norms(model.eval())
    latents = torch.randn(4, 24, 60, model.width, generator=torch.Generator().manual_seed(0))
    whole = model.decode(latents)
    crops = cropping(LatentCrop(size=16), model, (48, 120))
    assert crops.grid == (24, 60)
    assert crops.window[0] == 24 < crops.window[1] < 60  # the margin is wider than the image is high
    drawn = crops.draw(300, slice(0, 300), 0, 0, "paired").corners
    assert {y for y, _ in drawn} == set(range(24 - 7))
    assert {x for _, x in drawn} == set(range(60 - 7))
    assert crops.draw(300, slice(7, 9), 0, 0, "paired").corners == drawn[7:9]
    cut = replace(crops.draw(4, slice(0, 4), 0, 0, "paired"), corners=((0, 0), (16, 52), (5, 30), (12, 3)))
    windows = cut.latents(latents)
    assert windows.shape == (4, *crops.window, model.width)
    found, expected = cut.decoded(model.decode(windows)), cut.images(whole)
    assert found.shape == expected.shape == (4, 3, 16, 16)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    assert torch.equal(expected[3], whole[3, :, 24:40, 6:22])
    with pytest.raises(UserError, match="larger than the images of 48x120 pixels"):
        cropping(LatentCrop(size=64), model, (48, 120))


@pytest.mark.parametrize(
    ("name", "window"),
    [("llamagen", 32), ("kl", 32), ("diffusers_kl", 32), ("diffusers_qwen", 32), ("diffusers_dc", 20)],
)
def test_the_margin_is_how_far_the_convolutions_reach(name, window):
    model = model_of(name)
    assert cropping(LatentCrop(size=16), model) == Cropping((32, 32), 8, (window, window), 2)
    assert cropping(LatentCrop(size=16, margin=4), model).window == (12, 12)
    assert cropping(LatentCrop(), model) is None


def test_what_crops_do_not_fit_is_refused(tmp_path):
    model = model_of("maskgit")
    for words, said in (
        ({"size": 15}, "crop.size=15 is not a multiple of the 2 pixels"),
        ({"size": 16, "margin": 3}, "crop.margin=3 is not a multiple"),
        ({"size": 128}, "larger than the images of 64 pixels"),
        ({"margin": 2}, "crop.margin is without crop.size"),
    ):
        with pytest.raises(UserError, match=said):
            cropping(LatentCrop(**words), model)
    for name in ("robustok", "maetok", "gigatok"):
        with pytest.raises(UserError, match=r"crop\.size needs a convolutional decoder"):
            cropping(LatentCrop(size=4), model_of(name, 8))
    frechet = ("objective={paired: 1, free: 1}", "samples=s", "frechet.weight=1", "frechet.extractors=[{path: x}]")
    for words, said in ((("trainable=authors",), "encodes whole images"), (frechet, "compares whole images")):
        with pytest.raises(UserError, match=said):
            tiny.post_run(tmp_path, "t", "p", "crop.size=8", *words)


@pytest.fixture(scope="module")
def given(tmp_path_factory):
    """A convolutional tokenizer with latents of the digits at 16 pixels."""
    model, folder = model_of("kl", 16), tmp_path_factory.mktemp("kl")
    header = {"kind": "tokenizer", "config": plain(model.config), "latent_space": encoder_digest(model)}
    write_snapshot(folder / "tokenizer", header, model.state_dict(), {})
    return folder / "tokenizer", encode(tiny.tokens_run(folder / "latents", folder / "tokenizer"))


def test_examples_are_crops_of_the_same_images(given):
    model, cache = load_tokenizer(given[0]), LatentCache(given[1])
    data, caches = open_images(Digits(limit=128), 16), {"latents": cache}
    steps, names = Steps(8, 0, 0, 2, 0, 1), {"clean": 1.0, "noise": 1.0}

    def batches(crops, own=steps):
        return list(mixture([Material(model, data, caches, LatentNoise(), "float32", crops)], names, 1.0, own))

    crops = cropping(LatentCrop(size=8, margin=2), model)
    whole, cropped = batches(None), batches(crops)
    for one, other in zip(whole, cropped, strict=True):
        assert other.latents.shape == (8, 36, 4)
        for name in ("targets", "real"):
            assert torch.equal(getattr(other, name), other.cut.images(getattr(one, name)))
        assert torch.equal(other.latents, other.cut.latents(one.latents))
    assert cropped[0].cut.corners != cropped[1].cut.corners
    halves = [batches(crops, steps._replace(rank=rank, world=2))[0] for rank in (0, 1)]
    rows = [half.targets.split(2) for half in halves]  # of clean and of noise
    assert torch.equal(torch.cat([rows[0][0], rows[1][0], rows[0][1], rows[1][1]]), cropped[0].targets)


def test_a_decoder_learns_from_crops(tmp_path, given):
    tokenizer, latents = given
    words = ("objective={clean: 1, noise: 1}", "pairs=null", f"latents={latents}", "crop.size=8", "steps=30")
    words += ("learning_rate=3e-3", "log_every=10", "ema_decay=0", "gradient_accumulation=2", "state_every=30")
    path = train_decoder(tiny.post_run(tmp_path / "run", tokenizer, "unused", *words))
    lines = tiny.log(tmp_path / "run")
    assert lines[-1]["total"] < 0.9 * lines[0]["total"]
    model = load_tokenizer(path)
    assert encoder_digest(model) == encoder_digest(load_tokenizer(tokenizer))
    images = open_images(Digits(limit=128), 16).read(range(32)).images
    error = lambda one: (one.decode(one.encode(images)) - images).square().mean().item()  # noqa: E731
    with torch.no_grad():
        assert error(model) < error(load_tokenizer(tokenizer))


@pytest.mark.parametrize("name", ["kl", "diffusers_kl", "diffusers_qwen", "diffusers_dc", "diffusers_vq"])
def test_checkpointed_decoders_have_the_same_gradients(name):
    kept = []

    def gradients(checkpointing):
        model = LatentDecoder(model_of(name, 16)).train()
        adapt_blocks(model, checkpointing, compiling=False)
        sizes = []
        with torch.autograd.graph.saved_tensors_hooks(lambda x: sizes.append(x.nbytes) or x, lambda x: x):
            loss = model(latents_of(model.tokenizer, 2)).square().mean()
        kept.append(sum(sizes))
        loss.backward()
        return {n: p.grad for n, p in model.named_parameters() if p.grad is not None}

    plainly, again = gradients(False), gradients(True)
    assert plainly.keys() == again.keys()
    for key, value in plainly.items():
        torch.testing.assert_close(again[key], value, rtol=1e-4, atol=1e-6)
    assert kept[1] < 0.8 * kept[0]


def test_a_dry_run_counts_the_crops(given):
    tokenizer, latents = given
    words = ("objective=clean", "pairs=null", f"latents={latents}")
    whole, crops = (
        estimate(tiny.post_run("x", tokenizer, "unused", *words, *more))
        for more in ((), ("crop.size=4", "crop.margin=2"))
    )
    assert (crops["crop_pixels"], crops["decoded_pixels"]) == (4, 8)
    assert crops["activations_bytes"] < 0.35 * whole["activations_bytes"]  # a quarter of the pixels
    for facts in (whole, crops):
        assert facts["checkpointed_activations_bytes"] < 0.8 * facts["activations_bytes"]
