"""The VQGAN of MaskGIT, in the port that RAR and TiTok use: no attention, a plain Euclidean codebook, images in [0, 1].

Source: Chang et al., "MaskGIT: Masked Generative Image Transformer" (arXiv 2202.04200), in the PyTorch port of
Yu et al., "Randomized Autoregressive Visual Generation" (arXiv 2411.00776).
"""

from collections.abc import Sequence
from typing import Literal

import torch.nn.functional as F
from torch import Tensor, nn

from robustok.tokenizers.conv import ConvConfig, Decoder, Encoder, check_images, conv, group_norm, to_row
from robustok.tokenizers.quantizer import QuantizerConfig
from robustok.tokenizers.quantizers import AnyQuantizerConfig
from robustok.tokenizers.vq import VQConfig, VQTokenizer

PLAIN = ConvConfig(attention=(), middle_attention=False)


class MaskGITConfig(VQConfig):
    """MaskGIT's VQGAN; the defaults are its ImageNet 256x256 model."""

    name: Literal["maskgit"] = "maskgit"
    encoder: ConvConfig = PLAIN
    decoder: ConvConfig = PLAIN
    quantizer: AnyQuantizerConfig = QuantizerConfig(size=1024, dim=256, normalize=False)


class MaskGIT(VQTokenizer):
    """MaskGIT's VQGAN; the encoder's features are compared with the codebook as they are, without a projection.

    The network takes and makes images in [0, 1]; they are converted to and from [-1, 1] here.
    """

    licence = "Apache-2.0"
    image_range = (0.0, 1.0)

    def __init__(self, config: MaskGITConfig) -> None:
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
    input is not added: unusual, but the published weights were trained with it.
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
