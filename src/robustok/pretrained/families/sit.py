"""SiT, the generator of MAETok's latents (arXiv 2401.08740 and 2502.03444)."""

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from robustok.generators.flow import DiffusionSampling
from robustok.generators.sit import SiT, SiTConfig
from robustok.pretrained.families import diffusion_transformer
from robustok.pretrained.family import Family
from robustok.pretrained.shapes import merge_settings, ratio_of, shape_of

CONFIG_NAMES = diffusion_transformer.CONFIG_NAMES | {  # the authors', ours
    "vae_1d": "sequence",
    "vq_mean": "latent_mean",
    "vq_std": "latent_std",
}
PUBLISHED = DiffusionSampling(sampler="euler_maruyama", steps=250, guidance_scale=1.9, guidance_interval=(0.0, 0.75))


def build(weights: Mapping[str, Tensor], config: dict[str, Any]) -> SiT:
    """See :class:`robustok.pretrained.family.Family`.

    ``num_heads`` is in no shape, but known for the published widths. The latent statistics are in the configuration
    of the tokenizer (``vq_mean``, ``vq_std``); without them the model predicts velocities but does not sample.

    Raises:
        UserError: the configuration contradicts the tensors or lacks what they do not determine; a fixed table
            differs.
    """
    width, channels = shape_of(weights, "x_embedder.weight", 2)
    length = shape_of(weights, "pos_embed", 3)[1]
    measured = diffusion_transformer.sizes(weights, channels) | {
        "mlp_width": shape_of(weights, "blocks.0.mlp.fc1.weight", 2)[0],
        "mlp_ratio": ratio_of(weights, "blocks.0.mlp.fc1.bias", width, config.get("mlp_ratio")),
        "input_size": length,
        "sequence": True,
    }
    settings = merge_settings(measured, config, CONFIG_NAMES)
    return diffusion_transformer.build_transformer(SiT, SiTConfig, weights, settings, (length, channels), PUBLISHED)


FAMILY = Family("generator", SiT, build, has=("x_embedder.weight", "t_embedder.mlp.0.weight"))
