"""LlamaGen's tokenizer VQ-16 (and VQ-8): a convolutional network with an l2-normalised codebook.

Source: Sun et al., "Autoregressive Model Beats Diffusion: Llama for Scalable Image Generation" (arXiv 2406.06525).
"""

from typing import Literal

from pydantic import Field
from torch import nn

from robustok.tokenizers.conv import Decoder, Encoder
from robustok.tokenizers.vq import VQConfig, VQTokenizer


class LlamaGenConfig(VQConfig):
    """LlamaGen's tokenizer; the defaults are its VQ-16."""

    name: Literal["llamagen"] = "llamagen"
    z_channels: int = Field(256, ge=1, description="channels between the encoder and the projection to the codebook")
    show_usage: bool = Field(
        True, description="whether exported files hold the usage of codes, as all published ones do"
    )


class LlamaGen(VQTokenizer):
    """LlamaGen's tokenizer. Tokens are on a grid, row by row; the decoder takes grids of any shape."""

    licence = "MIT"

    def __init__(self, config: LlamaGenConfig) -> None:
        super().__init__(config)
        self.encoder = Encoder(config.encoder, config.z_channels)
        self.to_latent = nn.Conv2d(config.z_channels, config.quantizer.dim, 1)
        self.from_latent = nn.Conv2d(config.quantizer.dim, config.z_channels, 1)
        self.decoder = Decoder(config.decoder, config.z_channels, config.decoder.blocks + 1, lowest_first=True)
