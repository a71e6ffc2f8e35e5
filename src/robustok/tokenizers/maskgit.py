"""The VQGAN of MaskGIT as RAR and TiTok use it: no attention, a plain Euclidean codebook, images in [0, 1].

Source: Chang et al., "MaskGIT: Masked Generative Image Transformer" (arXiv 2202.04200), in the PyTorch port that
Yu et al., "Randomized Autoregressive Visual Generation" (arXiv 2411.00776), model the tokens of.
"""

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch.nn.functional as F
from torch import Tensor, nn

from robustok.checkpoints import depth_of, settle, shape_of
from robustok.config import validate
from robustok.tokenizers.conv import (
    NORM_EPSILON,
    ConvConfig,
    Decoder,
    Encoder,
    check_images,
    conv,
    conv_sizes,
    group_norm,
    rename,
    to_row,
)
from robustok.tokenizers.quantizer import QuantizerConfig
from robustok.tokenizers.vq import VQConfig, VQTokenizer

NAMES = (  # ours, the release's
    (r"encoder\.levels", "encoder.down"),
    (r"decoder\.levels", "decoder.up"),
    (r"\.blocks\.", ".block."),
    (r"\.middle\.", ".mid."),
    (r"\.shortcut\.", ".nin_shortcut."),
    (r"\.upsample\.conv\.", ".upsample_conv."),
    ("quantizer", "quantize"),
)
CONFIG_NAMES = {  # the release's, ours
    "hidden_channels": "width",
    "channel_mult": "multipliers",
    "num_resolutions": "levels",
    "num_res_blocks": "blocks",
    "num_channels": "channels",
    "z_channels": "z_channels",
    "num_embeddings": "codebook_size",
    "embedding_dim": "codebook_dim",
    "commitment_cost": "commitment_weight",
    "resolution": "image_size",
    "dropout": "dropout",
    "norm_groups": "groups",
    "norm_eps": "norm_eps",
    "downsample": "factor",
}
PLAIN = ConvConfig(attention=(), middle_attention=False)


class MaskGITConfig(VQConfig):
    """MaskGIT's VQGAN; the defaults are its ImageNet 256x256 model."""

    name: Literal["maskgit"] = "maskgit"
    encoder: ConvConfig = PLAIN
    decoder: ConvConfig = PLAIN
    quantizer: QuantizerConfig = QuantizerConfig(size=1024, dim=256, normalize=False)


class MaskGIT(VQTokenizer):
    """MaskGIT's VQGAN; the encoder's features are compared with the codebook as they are, without a projection.

    The release takes and makes images in [0, 1]; they are converted here, where they are in [-1, 1] as everywhere.

    Args:
        config: sizes.
        pretrained: for the signature's sake; only tokenizers with a backbone start from pretrained weights.
    """

    licence = "Apache-2.0"
    image_range = (0.0, 1.0)

    def __init__(self, config: MaskGITConfig, pretrained: bool = False) -> None:
        super().__init__(config)
        dim = config.quantizer.dim
        self.encoder = Encoder(config.encoder, dim, MaskGITBlock, down=lambda width: nn.AvgPool2d(2))
        # The port has no bias here, and a 1x1 convolution at the end.
        self.encoder.conv_in = conv(3, config.encoder.width, bias=False)
        self.encoder.conv_out = conv(config.encoder.widths[-1], dim, 1)
        self.decoder = Decoder(config.decoder, dim, config.decoder.blocks, MaskGITBlock)

    def features(self, images: Tensor) -> Tensor:
        """Images (N, 3, H, W) in [-1, 1] to features (N, L, D) before the quantiser."""
        check_images(images, self.config.patch_size)
        return to_row(self.encoder((images + 1) / 2))  # (N, L, D)

    def decode_vectors(self, vectors: Tensor, grid: tuple[int, int] | None = None) -> Tensor:
        """Code vectors (N, L, D) to images (N, 3, H, W), nominally in [-1, 1]."""
        return 2 * super().decode_vectors(vectors, grid) - 1

    def decoder_modules(self) -> Sequence[nn.Module]:
        """What post-training may train."""
        return [self.decoder]


class MaskGITBlock(nn.Module):
    """The port's residual block, without biases.

    Where the number of channels changes, its shortcut is applied to the result of the main branch, and the block's
    input is dropped: not what one would write, but what the weights were trained with.
    """

    def __init__(self, channels: int, out: int, config: ConvConfig) -> None:
        super().__init__()
        self.norm1, self.conv1 = group_norm(channels, config), conv(channels, out, bias=False)
        self.norm2, self.conv2 = group_norm(out, config), conv(out, out, bias=False)
        self.dropout = nn.Dropout(config.dropout)
        self.shortcut = None if channels == out else conv(out, out, 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """(N, channels, H, W) to (N, out, H, W)."""
        h = self.conv1(F.silu(self.norm1(x)))  # (N, out, H, W)
        h = self.conv2(self.dropout(F.silu(self.norm2(h))))
        return h + (x if self.shortcut is None else self.shortcut(h))


def from_pretrained(weights: Mapping[str, Tensor], config: Mapping[str, Any]) -> MaskGIT:
    """A tokenizer of the sizes that released weights and a flat configuration tell; not yet with these weights.

    Raises:
        UserError: weights of another family, or a configuration that contradicts them.
    """
    encoder, decoder = (
        conv_sizes(weights, side, NAMES) | {"middle_blocks": depth_of(weights, f"{side}.mid.")}
        for side in ("encoder", "decoder")
    )
    size, dim = shape_of(weights, "quantize.embedding.weight", 2)
    facts = {
        "width": encoder["width"],
        "multipliers": encoder["multipliers"],
        "levels": len(encoder["multipliers"]),
        "blocks": encoder["blocks"],
        "channels": shape_of(weights, "encoder.conv_in.weight", 4)[1],
        "z_channels": dim,
        "codebook_size": size,
        "codebook_dim": dim,
        "norm_eps": NORM_EPSILON,
        "factor": 2 ** (len(encoder["multipliers"]) - 1),
    }
    defaults = {"groups": 32, "dropout": 0.0, "commitment_weight": 0.25, "image_size": 256}
    settings = settle(facts, dict(config), CONFIG_NAMES, **defaults)
    shared = {key: settings[key] for key in ("groups", "dropout")}
    ours = {
        "image_size": settings["image_size"],
        "encoder": encoder | shared,
        "decoder": decoder | shared,
        "quantizer": {
            "size": size,
            "dim": dim,
            "normalize": False,
            "commitment_weight": settings["commitment_weight"],
        },
    }
    return MaskGIT(validate(MaskGITConfig, ours, source="config"))


def export_name(name: str) -> str:
    """The release's name of our weight."""
    return rename(name, NAMES)
