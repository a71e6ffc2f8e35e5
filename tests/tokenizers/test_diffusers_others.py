"""AutoencoderDC and VQModel through their folders: built from diffusers' own classes, nothing is downloaded."""

import pytest
import torch

from robustok.cli import main
from robustok.errors import UserError
from robustok.pretrained.families import FOLDERS
from robustok.pretrained.load import load_pretrained
from robustok.snapshots import resolve
from robustok.tokenizers import encoder_digest, load_tokenizer
from robustok.tokenizers.diffusers import DiffusersDC
from robustok.types import DiscreteTokenizer, Tokenizer

diffusers = pytest.importorskip("diffusers")

DC = {
    "latent_channels": 4,
    "attention_head_dim": 4,
    "encoder_block_types": ("ResBlock", "ResBlock", "EfficientViTBlock"),
    "decoder_block_types": ("ResBlock", "ResBlock", "EfficientViTBlock"),
    "encoder_block_out_channels": (8, 8, 16),
    "decoder_block_out_channels": (8, 8, 16),
    "encoder_layers_per_block": (0, 1, 1),  # as published: the first level halves the image without any block
    "decoder_layers_per_block": (0, 1, 1),
    "encoder_qkv_multiscales": ((), (), (3,)),
    "decoder_qkv_multiscales": ((), (), (3,)),
    "scaling_factor": 0.4,
}
VQ = {
    "block_out_channels": (8, 16),
    "down_block_types": ("DownEncoderBlock2D",) * 2,
    "up_block_types": ("UpDecoderBlock2D",) * 2,
    "latent_channels": 6,
    "vq_embed_dim": 4,
    "num_vq_embeddings": 32,
    "norm_num_groups": 4,
    "sample_size": 8,
}
VARIANTS = [
    {},
    {"norm_type": "spatial", "block_out_channels": (32, 32), "vq_embed_dim": 6},
    {"lookup_from_codebook": True},
    {"vq_embed_dim": None},
]


def images(side=8):
    return torch.rand(2, 3, side, side, generator=torch.Generator().manual_seed(1)) * 2 - 1


def make(path, class_name, settings):
    torch.manual_seed(0)
    network = getattr(diffusers, class_name)(**settings).eval()
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    network.save_pretrained(path)
    return network


def test_the_deep_compression_autoencoder(tmp_path):
    network = make(tmp_path / "dc", "AutoencoderDC", DC)
    tokenizer = FOLDERS["diffusers_dc"].load(tmp_path / "dc", image_size=16)
    assert isinstance(tokenizer, Tokenizer)
    assert tokenizer.factor == network.spatial_compression_ratio == 4
    assert (tokenizer.latent_shape, tokenizer.kind, tokenizer.latent_multiplier) == ((16, 4), "continuous", 0.4)
    latents = tokenizer.encode(images(16))
    with torch.no_grad():
        grid = network.encode(images(16)).latent
        assert torch.equal(latents[1, 4 * 2 + 3], grid[1, :, 2, 3])  # row by row
        assert torch.equal(tokenizer.decode(latents), network.decode(grid).sample)
    assert torch.equal(tokenizer.normalise(latents), latents * 0.4)
    assert FOLDERS["diffusers_dc"].load(tmp_path / "dc").image_size == 256
    assert DiffusersDC.factor_of({}) == 32  # the library's default
    with pytest.raises(UserError, match="not divisible by 4"):
        FOLDERS["diffusers_dc"].load(tmp_path / "dc", image_size=6)


@pytest.mark.parametrize("variant", VARIANTS, ids=lambda v: "-".join(v) or "plain")
def test_the_vector_quantised_autoencoder(tmp_path, variant):
    network = make(tmp_path / "vq", "VQModel", VQ | variant)
    tokenizer = FOLDERS["diffusers_vq"].load(tmp_path / "vq")
    width = 6 if "vq_embed_dim" in variant else 4
    assert isinstance(tokenizer, DiscreteTokenizer)
    assert (tokenizer.latent_shape, tokenizer.image_size, len(tokenizer.codebook)) == ((16, width), 8, 32)
    tokens = tokenizer.encode(images())
    assert (tokens.shape, tokens.dtype) == ((2, 16), torch.int64)
    assert len(tokens.unique()) > 3
    with torch.no_grad():
        features = network.encode(images()).latents  # (2, width, 4, 4)
        nearest = torch.cdist(features.permute(0, 2, 3, 1).reshape(32, width), tokenizer.codebook).argmin(1)
        assert torch.equal(tokens.flatten(), nearest)
        expected = network.decode(features).sample
        torch.testing.assert_close(tokenizer.decode(tokens), expected, atol=1e-5, rtol=1e-5)
        if variant.get("lookup_from_codebook"):
            looked_up = network.decode(tokens, force_not_quantize=True, shape=(2, 4, 4, width)).sample
            torch.testing.assert_close(tokenizer.decode(tokens), looked_up, atol=1e-5, rtol=1e-5)
    assert tokenizer.check() == []
    with pytest.raises(UserError, match="decodes tokens"):
        tokenizer.decode(tokenizer.embed(tokens))
    with torch.no_grad():
        tokenizer.codebook.copy_(tokenizer.codebook[:1].clone())
    assert "collapsed" in tokenizer.check()[0]
    with torch.no_grad():
        tokenizer.codebook.zero_()
    assert "codes are zero" in tokenizer.check()[0]


@pytest.mark.parametrize(
    ("family", "class_name", "settings"), [("diffusers_dc", "AutoencoderDC", DC), ("diffusers_vq", "VQModel", VQ)]
)
def test_there_and_back(capsys, tmp_path, family, class_name, settings):
    network, ours, back = make(tmp_path / "theirs", class_name, settings), tmp_path / "ours", tmp_path / "back"
    words = ["family=diffusers", f"weights={tmp_path / 'theirs'}", f"out={ours}", "config.image_size=16"]
    assert main(["convert", *words]) == 0
    tokenizer = load_tokenizer(resolve(ours))
    assert tokenizer.config.name == family
    assert encoder_digest(tokenizer) == encoder_digest(load_pretrained(family, tmp_path / "theirs"))
    assert main(["convert", f"family={family}", "to=export", f"weights={ours}", f"out={back}"]) == 0
    again = getattr(diffusers, class_name).from_pretrained(back)
    assert all(torch.equal(value, network.state_dict()[name]) for name, value in again.state_dict().items())
    capsys.readouterr()
    assert main(["convert", "family=diffusers_kl", f"weights={back}", f"out={tmp_path / 'no'}"]) == 2
    assert f"holds {class_name}, expected AutoencoderKL" in capsys.readouterr().err
