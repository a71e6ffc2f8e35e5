"""Tokenizers: images to latents and back. One family a file; a new one adds a line to ``TOKENIZERS``."""

import os
from pathlib import Path
from typing import Annotated

import torch
from pydantic import Field

from robustok.config import validate
from robustok.errors import UserError
from robustok.files import tensor_digest
from robustok.hub import is_remote
from robustok.snapshots import Snapshot, build, check_finite_weights, read_snapshot, resolve, split_scale
from robustok.tokenizers.deltas import Delta, apply_delta
from robustok.tokenizers.diffusers import DiffusersConfig, DiffusersDC, DiffusersKL, DiffusersQwen, DiffusersVQ
from robustok.tokenizers.gigatok import GigaTok, GigaTokConfig
from robustok.tokenizers.kl import KL, KLConfig
from robustok.tokenizers.llamagen import LlamaGen, LlamaGenConfig
from robustok.tokenizers.maetok import MAETok, MAETokConfig
from robustok.tokenizers.maskgit import MaskGIT, MaskGITConfig
from robustok.tokenizers.robustok import RobusTok, RobusTokConfig
from robustok.types import Tokenizer

TOKENIZERS = {
    "robustok": (RobusTok, RobusTokConfig),
    "maetok": (MAETok, MAETokConfig),
    "llamagen": (LlamaGen, LlamaGenConfig),
    "maskgit": (MaskGIT, MaskGITConfig),
    "gigatok": (GigaTok, GigaTokConfig),
    "kl": (KL, KLConfig),
    "diffusers_kl": (DiffusersKL, DiffusersConfig),
    "diffusers_qwen": (DiffusersQwen, DiffusersConfig),
    "diffusers_dc": (DiffusersDC, DiffusersConfig),
    "diffusers_vq": (DiffusersVQ, DiffusersConfig),
}
TokenizerConfig = Annotated[
    RobusTokConfig | LlamaGenConfig | MaskGITConfig | GigaTokConfig | KLConfig | MAETokConfig,
    Field(discriminator="name"),
]
"""The families that can be trained."""


def load_tokenizer(path: str | Path) -> Tokenizer:
    """Load a tokenizer from a snapshot, or from the newest snapshot of a run folder; in eval mode, on the CPU.

    Args:
        path: of the snapshot or run folder, or ``hf://ORG/NAME`` on the Hub. ``PATH@0.5`` is a delta of `robustok
            make-delta` with its strength: 0 is the original, 1, the default, the post-trained tokenizer.

    Raises:
        UserError: no snapshot, another kind, an unknown family, or weights that do not fit; a delta whose original is
            missing or another one; a strength without a delta.
    """
    snapshot = read_snapshot(path, kind="tokenizer")
    strength = split_scale(path)[1]
    if strength is not None and not torch.tensor(strength, dtype=torch.float32).isfinite():
        raise UserError(f"{path}: the strength {strength} is no finite number; give one such as 0.5")
    if "delta" in snapshot.header:
        return _load_delta(snapshot, 1.0 if strength is None else strength)
    if strength is not None:
        raise UserError(
            f"{snapshot.path} is no delta and has no strength; leave the {strength:g} out, or give a folder that "
            "`robustok make-delta` wrote"
        )
    settings = snapshot.header["config"]
    if settings.get("name") not in TOKENIZERS:
        raise UserError(f"{path}: unknown tokenizer family {settings.get('name')!r}; known: {', '.join(TOKENIZERS)}")
    family, config = TOKENIZERS[settings["name"]]
    settings = validate(config, settings, source=str(path))
    tokenizer = build(lambda: family(settings), snapshot)
    if (snapshot.header.get("post_trained") or {}).get("trainable") == "authors":
        tokenizer.latent_space = snapshot.header["latent_space"]  # of the tokenizer whose latents it learned to decode
    return tokenizer.eval().requires_grad_(False)


def _load_delta(snapshot: Snapshot, strength: float) -> Tokenizer:
    """The original of a delta, with ``strength`` times the difference added."""
    delta = snapshot.header["delta"]
    base = Path(os.path.normpath(snapshot.path.absolute() / delta["base"]))
    if is_remote(delta["base"]):
        base = resolve(delta["base"])
    if not (base / "model.safetensors").exists():
        raise UserError(
            f"{snapshot.path} is a difference to {base}, which is missing; put that snapshot there, or its path into "
            f"delta.base of {snapshot.path / 'config.yaml'}"
        )
    tokenizer = load_tokenizer(base)
    try:
        apply_delta(tokenizer, Delta(delta["digest"], snapshot.weights, delta["relative_error"]), strength)
    except UserError as error:
        raise UserError(f"{snapshot.path} on {base}: {error}") from None
    check_finite_weights(tokenizer.state_dict(), f"{snapshot.path}@{strength:g}")
    return tokenizer


def frozen_weights(tokenizer: Tokenizer) -> dict[str, torch.Tensor]:
    """All weights that are not the decoder's: encoder and quantiser, which determine the latents of an image."""
    decoder = {id(p) for module in tokenizer.decoder_modules() for p in module.parameters()}
    return {name: p for name, p in tokenizer.named_parameters() if id(p) not in decoder}


def encoder_digest(tokenizer: Tokenizer) -> str:
    """Digest of the latent space: equal for a tokenizer and its post-trained version, which differ in the decoder."""
    return tokenizer.latent_space or tensor_digest(frozen_weights(tokenizer))
