"""Every family of tokenizers, generators and releases at tiny size with random weights, built without any file."""

from itertools import pairwise

import pytest
import torch
from safetensors.torch import save_file

from robustok.config import validate
from robustok.generators import GENERATORS, build_generator
from robustok.metrics.features.cifar_resnet import CifarResNet
from robustok.pretrained.export import export_weights
from robustok.pretrained.families import FAMILIES
from robustok.randomness import image_rngs
from robustok.tokenizers import TOKENIZERS

VIT = {"width": 16, "depth": 1, "heads": 2}
SIDES = {side: {"width": 8, "multipliers": [1, 2], "blocks": 1, "groups": 4} for side in ("encoder", "decoder")}
PLAIN = {side: sizes | {"attention": [], "middle_attention": False} for side, sizes in SIDES.items()}
CODES = {"size": 16, "dim": 4}
TWO_LEVELS = {  # of diffusers' convolutional autoencoders
    "down_block_types": ["DownEncoderBlock2D"] * 2,
    "up_block_types": ["UpDecoderBlock2D"] * 2,
    "norm_num_groups": 4,
}
TINY_TOKENIZERS = {  # all take images of 8 x 8 and make 16 latents of width 4
    "robustok": {"patch_size": 2, "encoder": VIT, "decoder": VIT, "quantizer": CODES},
    "maetok": {"patch_size": 4, "latents": 16, "latent_dim": 4, "encoder": VIT, "decoder": VIT}
    | {"latent_mean": 0.1, "latent_std": 0.5},
    "llamagen": SIDES | {"z_channels": 12, "quantizer": CODES},
    "maskgit": PLAIN | {"quantizer": CODES | {"normalize": False}},
    "gigatok": PLAIN | {"z_channels": 12, "latents": 16, "quantizer": CODES, "grid_to_row": VIT, "row_to_grid": VIT},
    "kl": SIDES | {"z_channels": 12, "dim": 4},
    "diffusers_kl": {
        "settings": {
            "block_out_channels": [8, 8],
            "latent_channels": 4,
        }
        | TWO_LEVELS
    },
    "diffusers_qwen": {
        "settings": {
            "base_dim": 4,
            "z_dim": 4,
            "dim_mult": [1, 2],
            "num_res_blocks": 1,
            "temperal_downsample": [False],
            "attn_scales": [],
            "latents_mean": [0.0, 0.1, 0.2, 0.3],
            "latents_std": [1.0, 0.9, 0.8, 0.7],
        }
    },
    "diffusers_dc": {
        "settings": {
            f"{side}_{name}": value
            for side in ("encoder", "decoder")
            for name, value in {
                "block_out_channels": [8, 8],
                "layers_per_block": [1, 1],
                "qkv_multiscales": [[], []],
            }.items()
        }
        | {"latent_channels": 4}
    },
    "diffusers_vq": {
        "settings": {
            "block_out_channels": [8, 8],
            "latent_channels": 12,
            "vq_embed_dim": 4,
            "num_vq_embeddings": 16,
        }
        | TWO_LEVELS
    },
}
TINY_GENERATORS = {  # all model 16 latents; tokens of 16 codes, or vectors of width 4
    "rar": VIT,
    "gpt": VIT,
    "sit": VIT | {"latent_mean": 0.1, "latent_std": 0.5},
    "lightningdit": VIT | {"latent_mean": 0.1, "latent_std": 0.5},
    "dit": {"settings": {"num_layers": 1, "num_attention_heads": 2, "attention_head_dim": 8}}
    | {"latent_mean": 0.1, "latent_std": 0.5},
}
LATENT_SHAPE, CLASSES = (16, 4), 5


def shaken(model, seed=0):
    """Every weight random and of a size that matters, those that start at zero or one too; in eval mode, frozen."""
    rng = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        parameter.data += 0.3 * torch.randn(parameter.shape, generator=rng)
    return model.eval().requires_grad_(False)


def tiny_tokenizer(name, **settings):
    if name.startswith("diffusers"):
        pytest.importorskip("diffusers")
    family, config = TOKENIZERS[name]
    torch.manual_seed(0)
    return shaken(family(validate(config, {"name": name, "image_size": 8} | TINY_TOKENIZERS[name] | settings)))


def save_resnet20(path):
    """A file of a ResNet-20 with random weights, without the counters of batches, as the public files have it."""
    torch.manual_seed(0)
    network = CifarResNet(20)
    for name, tensor in network.state_dict().items():
        if "running_var" in name:
            tensor.uniform_(0.5, 2)
        elif "running_mean" in name:
            tensor.normal_()
    save_file({name: tensor for name, tensor in network.state_dict().items() if "num_batches" not in name}, path)
    return path


def tiny_generator(name, **settings):
    if name == "dit":
        pytest.importorskip("diffusers")
    family, config = GENERATORS[name]
    torch.manual_seed(0)
    codes = None if family.kind == "continuous" else 16
    config = validate(config, {"name": name} | TINY_GENERATORS[name] | settings)
    return shaken(build_generator(config, LATENT_SHAPE, CLASSES, codes))


# Releases: the model of each family, and what its shapes do not tell, in the forms that releases have.
GROUPS = {"overrides": {"norm_groups": 4}}
RELEASES = {
    "robustok": (lambda: tiny_tokenizer("robustok"), {"backbone_overrides": {"num_heads": 2, "drop_path_rate": 0.1}}),
    "rar": (lambda: tiny_generator("rar", position_rows=1040, timestep_rows=116), {}),
    "llamagen_tokenizer": (lambda: tiny_tokenizer("llamagen"), GROUPS | {"args": {"image_size": 8}}),
    "llamagen_gpt": (lambda: tiny_generator("gpt"), {"args": {"n_head": 2, "block_size": 16}}),
    "gigatok_tokenizer": (
        lambda: tiny_tokenizer("gigatok"),
        GROUPS | {"args": {"rot": True}, "derived": {"encoder_heads": 2, "decoder_heads": 2}},
    ),
    "gigatok_gpt": (lambda: tiny_generator("gpt", positions="learned", adaptive_norm=True), {"args": {"n_head": 2}}),
    "maskgit_vqgan": (lambda: tiny_tokenizer("maskgit"), GROUPS | {"args": {"resolution": 8}}),
    "maetok_tokenizer": (lambda: tiny_tokenizer("maetok"), {"num_heads": 2, "vq_mean": 0.1, "vq_std": 0.5}),
    "sit": (lambda: tiny_generator("sit"), {"num_heads": 2, "vq_mean": 0.1, "vq_std": 0.5}),
    "vavae": (lambda: tiny_tokenizer("kl"), GROUPS | {"args": {"resolution": 8}}),
    "lightningdit": (lambda: tiny_generator("lightningdit"), {"latents": {"mean": [0.1] * 4, "std": [0.5] * 4}}),
}


def released(family):
    """Weights in the released layout, and the model that they are of."""
    model = RELEASES[family][0]()
    if type(model) is not FAMILIES[family].model:
        raise TypeError(f"RELEASES has a {type(model).__name__} as {family}")
    return {name: tensor.clone() for name, tensor in export_weights(model).items()}, model


def hold_sigma(model, sampling, reference):
    """1 is the reference bit for bit, 0 and None are free samples, and in between more sigma is nearer."""
    count = len(reference)
    labels = torch.arange(count) % model.classes
    make = lambda sigma: model.generate(labels, sampling, image_rngs(0, range(count)), reference, sigma)  # noqa: E731
    assert torch.equal(make(1.0), reference)
    assert torch.equal(make(1), reference)
    free = model.generate(labels, sampling, image_rngs(0, range(count)))
    assert torch.equal(make(0.0), free)
    assert torch.equal(make(None), free)
    distances = [(make(sigma) - reference).square().mean().item() for sigma in (0.1, 0.3, 0.5, 0.7, 0.9)]
    assert all(a > b for a, b in pairwise(distances)), distances
    if sampling.strategy == "token_mix":
        kept = (make(0.7) == reference).all(-1).float().mean().item()
        assert abs(kept - 0.7) < 0.15
