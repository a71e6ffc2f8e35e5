"""Tokenizers: images to latents and back. One family a file; a new one adds a line to ``TOKENIZERS``."""

from pathlib import Path
from typing import Annotated

import torch
from pydantic import Field

from robustok.config import validate
from robustok.snapshots import digest, load_weights, read_snapshot
from robustok.tokenizers.diffusers_kl import DiffusersKL, DiffusersKLConfig
from robustok.tokenizers.gigatok import GigaTok, GigaTokConfig
from robustok.tokenizers.kl import KL, KLConfig
from robustok.tokenizers.llamagen import LlamaGen, LlamaGenConfig
from robustok.tokenizers.maetok import MAETok, MAETokConfig
from robustok.tokenizers.maskgit import MaskGIT, MaskGITConfig
from robustok.tokenizers.robustok import RobusTok, RobusTokConfig
from robustok.types import Tokenizer, UserError

TOKENIZERS = {
    "robustok": (RobusTok, RobusTokConfig),
    "maetok": (MAETok, MAETokConfig),
    "llamagen": (LlamaGen, LlamaGenConfig),
    "maskgit": (MaskGIT, MaskGITConfig),
    "gigatok": (GigaTok, GigaTokConfig),
    "kl": (KL, KLConfig),
    "diffusers_kl": (DiffusersKL, DiffusersKLConfig),
}
TokenizerConfig = Annotated[
    RobusTokConfig | LlamaGenConfig | MaskGITConfig | GigaTokConfig | KLConfig | MAETokConfig,
    Field(discriminator="name"),
]
"""The families that main training trains."""


def load_tokenizer(path: str | Path) -> Tokenizer:
    """Load a tokenizer from a snapshot, or from the newest snapshot of a run folder; in eval mode, on the CPU.

    Raises:
        UserError: no snapshot, another kind, an unknown family, or weights that do not fit.
    """
    snapshot = read_snapshot(path, kind="tokenizer")
    settings = snapshot.header["config"]
    if settings.get("name") not in TOKENIZERS:
        raise UserError(f"{path}: unknown tokenizer family {settings.get('name')!r}; known: {', '.join(TOKENIZERS)}")
    family, config = TOKENIZERS[settings["name"]]
    tokenizer = family(validate(config, settings, source=str(path)))
    load_weights(tokenizer, snapshot)
    return tokenizer.eval().requires_grad_(False)


def frozen_weights(tokenizer: Tokenizer) -> dict[str, torch.Tensor]:
    """All weights that are not the decoder's: encoder and quantiser, what decides the latents of an image."""
    decoder = {id(p) for module in tokenizer.decoder_modules() for p in module.parameters()}
    return {name: p for name, p in tokenizer.named_parameters() if id(p) not in decoder}


def encoder_digest(tokenizer: Tokenizer) -> str:
    """Names the latent space: equal for a tokenizer and its post-trained self, whose decoder alone differs."""
    return digest(frozen_weights(tokenizer))
