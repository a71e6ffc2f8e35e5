"""AutoencoderKL through its folder: built from diffusers' own class with random weights, nothing is downloaded."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from robustok.config import plain
from robustok.errors import UserError
from robustok.pretrained.export import export_folder
from robustok.pretrained.families import FOLDERS
from robustok.snapshots import write_snapshot
from robustok.tokenizers import encoder_digest, frozen_weights, load_tokenizer
from robustok.training.adversary import last_layer
from robustok.types import Tokenizer

diffusers = pytest.importorskip("diffusers")
from_folder = FOLDERS["diffusers_kl"].load

SETTINGS = {
    "block_out_channels": (8, 16),
    "down_block_types": ("DownEncoderBlock2D",) * 2,
    "up_block_types": ("UpDecoderBlock2D",) * 2,
    "latent_channels": 3,
    "norm_num_groups": 4,
    "sample_size": 8,
    "scaling_factor": 0.5,
}


def make(path, **settings):
    torch.manual_seed(0)
    vae = diffusers.AutoencoderKL(**SETTINGS | settings).eval()
    vae.save_pretrained(path)
    return vae


def some_images(count=2, seed=1):
    return torch.rand(count, 3, 8, 8, generator=torch.Generator().manual_seed(seed)) * 2 - 1


def test_same_numbers_as_the_library(tmp_path):
    vae, images = make(tmp_path / "vae"), some_images()
    tokenizer = from_folder(tmp_path)  # of a pipeline
    assert isinstance(tokenizer, Tokenizer)
    assert (tokenizer.image_size, tokenizer.latent_shape, tokenizer.kind) == (8, (16, 3), "continuous")
    with torch.no_grad():
        posterior = vae.encode(images).latent_dist
        latents = tokenizer.encode(images)
        assert torch.equal(latents[1, 4 * 2 + 3], posterior.mean[1, :, 2, 3])  # row by row
        assert torch.equal(tokenizer.decode(latents), vae.decode(posterior.mean.contiguous()).sample)
        sample = tokenizer.encode(images, torch.Generator().manual_seed(0))
        noise = torch.randn(2, 16, 3, generator=torch.Generator().manual_seed(0))
        torch.testing.assert_close(sample, latents + posterior.std.flatten(2).transpose(1, 2) * noise)
    assert torch.equal(tokenizer.normalise(latents), latents * 0.5)


def test_normalisation_by_all_four_settings(tmp_path):
    make(tmp_path / "shift", shift_factor=0.25)
    make(tmp_path / "channels", latents_mean=[1.0, 2.0, 3.0], latents_std=[2.0, 4.0, 8.0])
    latents = torch.randn(2, 16, 3)
    shifted, channels = from_folder(tmp_path / "shift"), from_folder(tmp_path / "channels")
    torch.testing.assert_close(shifted.normalise(latents), (latents - 0.25) * 0.5)
    torch.testing.assert_close(channels.normalise(latents)[..., 2], (latents[..., 2] - 3) / 8 * 0.5)
    for tokenizer in (shifted, channels):
        torch.testing.assert_close(tokenizer.denormalise(tokenizer.normalise(latents)), latents)


def test_post_trained_folder_differs_in_its_decoder_alone(tmp_path):
    vae, images = make(tmp_path / "vae"), some_images()
    tokenizer = from_folder(tmp_path / "vae")
    latents, before = tokenizer.encode(images), encoder_digest(tokenizer)
    trained = [p for module in tokenizer.decoder_modules() for p in module.requires_grad_(True).parameters()]
    optimizer = torch.optim.SGD(trained, lr=1e-3)
    tokenizer.decode(latents).square().sum().backward()
    assert all(p.grad is not None for p in trained)
    assert last_layer(tokenizer) is tokenizer.vae.decoder.conv_out.weight
    assert {name.split(".")[1] for name in frozen_weights(tokenizer)} == {"encoder", "quant_conv"}
    optimizer.step()
    export_folder(tokenizer, tmp_path / "post")
    again = diffusers.AutoencoderKL.from_pretrained(tmp_path / "post").eval()
    assert encoder_digest(tokenizer) == encoder_digest(from_folder(tmp_path / "post")) == before
    changed = {name for name, w in again.state_dict().items() if not torch.equal(w, vae.state_dict()[name])}
    assert {name.split(".")[0] for name in changed} == {"decoder", "post_quant_conv"}
    ignored = ("_name_or_path", "_diffusers_version")
    old, new = (json.loads((tmp_path / name / "config.json").read_text()) for name in ("vae", "post"))
    assert {k: v for k, v in old.items() if k not in ignored} == {k: v for k, v in new.items() if k not in ignored}
    with torch.no_grad():
        grid = latents.transpose(1, 2).reshape(2, 3, 4, 4).contiguous()
        assert torch.equal(again.decode(grid).sample, tokenizer.decode(latents))
    with pytest.raises(UserError, match="exists and holds something else"):
        export_folder(tokenizer, tmp_path / "vae")


def test_without_quantisation_convolutions_and_through_a_snapshot(tmp_path):
    make(tmp_path / "vae", use_quant_conv=False, use_post_quant_conv=False)
    tokenizer = from_folder(tmp_path / "vae", image_size=16)
    assert tokenizer.decoder_modules() == [tokenizer.vae.decoder]
    assert (tokenizer.image_size, tokenizer.latent_shape) == (16, (64, 3))
    header = {"kind": "tokenizer", "config": plain(tokenizer.config)}
    write_snapshot(tmp_path / "snapshot", header, tokenizer.state_dict(), {})
    latents = tokenizer.encode(some_images())
    assert torch.equal(load_tokenizer(tmp_path / "snapshot").decode(latents), tokenizer.decode(latents))


def test_check_finds_a_wrong_scale_with_images(tmp_path):
    make(tmp_path / "vae", scaling_factor=40.0)
    found = from_folder(tmp_path / "vae").check(some_images())
    assert any("scaling_factor 40" in sentence for sentence in found)
    make(tmp_path / "half", latents_mean=[0.0] * 3)
    assert "latents_std" in from_folder(tmp_path / "half").check()[0]


def test_bad_folders_are_one_sentence(tmp_path):
    make(tmp_path / "vae")
    tokenizer = from_folder(tmp_path / "vae")
    for name, change in (("class", {"_class_name": "VQModel"}), ("sizes", {"latent_channels": 4})):
        make(tmp_path / name)
        file = tmp_path / name / "config.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | change))
    make(tmp_path / "lacks")
    file = tmp_path / "lacks" / "diffusion_pytorch_model.safetensors"
    weights = load_file(file)
    weights.pop("decoder.conv_in.bias")
    save_file(weights, file, metadata={"format": "pt"})
    for call, words in (
        (lambda: from_folder(tmp_path / "nothing"), r"no config\.json"),
        (lambda: from_folder(tmp_path / "class"), "holds VQModel, expected AutoencoderKL"),
        (lambda: from_folder(tmp_path / "sizes"), "cannot be loaded"),
        (lambda: from_folder(tmp_path / "lacks"), r"missing decoder\.conv_in\.bias"),
        (lambda: from_folder(tmp_path / "vae", image_size=9), "divisible by 2"),
        (lambda: tokenizer.decode(torch.zeros(1, 16, 4)), r"\(N, L, 3\)"),
    ):
        with pytest.raises(UserError, match=words) as found:
            call()
        assert "\n" not in str(found.value)
