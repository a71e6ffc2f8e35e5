"""Guidance, temperature, truncation, sigma and random draws of token sampling: pure functions of logits.

Every image has its own random generator, of which each of its tokens uses exactly one uniform number. So image 4711 is
the same in any batch and on any process (up to the rounding of the logits).
"""

import math
from collections.abc import Sequence
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor

from robustok.config import Config
from robustok.devices import to_device
from robustok.errors import UserError
from robustok.randomness import image_uniforms

# GigaTok's step schedule multiplies by this, not by 1, before it guides.
FAINT_GUIDANCE = 1.0001


class Sampling(Config):
    """How tokens are drawn from a generator.

    Guidance acts inside a window of the image, both ends included. Token p of L is at the share p / (L - 1), from 0 to
    1. The schedules of the authors' codes:

    * RAR: ``guidance_power`` alone;
    * LlamaGen: ``guidance_power`` 0, and for its ``cfg_interval`` n, which guides tokens 0 to n + 1,
      ``guidance_until`` (n + 1) / (L - 1);
    * GigaTok: ``guidance_power`` 0 and ``guidance_from`` 0.18.
    """

    name: Literal["tokens"] = "tokens"
    guidance_scale: float = Field(
        1.0, ge=0, description="classifier-free guidance at the last token; 1 (or 0, as in RAR's code) switches it off"
    )
    guidance_power: float = Field(
        1.0, ge=0, description="exponent of the power-cosine guidance schedule; 0 is constant"
    )
    guidance_from: float = Field(
        0.0, ge=0, le=1, description="share of the image before which tokens are not guided; the first token always is"
    )
    guidance_until: float = Field(1.0, ge=0, le=1, description="share of the image after which tokens are not guided")
    temperature: float = Field(1.0, gt=0, description="divides the logits")
    top_k: int = Field(0, ge=0, description="keep only the k most likely tokens; 0 keeps all")
    top_p: float = Field(
        1.0, gt=0, le=1, description="keep the smallest set of tokens with this probability; 1 keeps all"
    )

    @property
    def guided(self) -> bool:
        """Whether sampling needs a second, unconditional pass. RAR's code writes "none" as a scale of 0."""
        return self.guidance_scale not in (0.0, 1.0)


def guidance_scales(length: int, sampling: Sampling) -> Tensor:
    """Guidance scale of each step: the power-cosine schedule inside the window.

    ``1 + (g - 1) * (1 - cos(pi * (s / L) ** power)) / 2`` rises from 1 at the first step towards g at the last:
    early tokens stay diverse, late ones follow their class. With power 0 it is g throughout. Before the window the
    scale is 1.0001 and the first token is guided nevertheless, as in GigaTok's code; after the window it is 1.

    Returns:
        (L,) float64; ones where guidance is off.
    """
    steps = torch.arange(length, dtype=torch.float64)
    if not sampling.guided:
        return torch.ones_like(steps)
    progress = (steps / length) ** sampling.guidance_power  # 0 ** 0 is 1
    scales = 1 + (sampling.guidance_scale - 1) * (1 - torch.cos(math.pi * progress)) / 2
    shares = steps / max(1, length - 1)
    scales[(shares < sampling.guidance_from) & (steps > 0)] = FAINT_GUIDANCE
    scales[shares > sampling.guidance_until] = 1.0
    return scales


def guide(conditional: Tensor, unconditional: Tensor, scale: float | Tensor) -> Tensor:
    """Classifier-free guidance: 0 is unconditional, 1 is conditional, more amplifies what the class changes."""
    return unconditional + scale * (conditional - unconditional)


def truncate(logits: Tensor, top_k: int, top_p: float) -> Tensor:
    """Set the logits (..., K) of unlikely tokens to -inf: first all but the ``top_k`` best, then nucleus sampling.

    Args:
        logits: (..., K), temperature applied.
        top_k: how many tokens stay; 0, or K and more, keeps all. Among equal logits the lower token stays.
        top_p: of those, the smallest set of most likely tokens with this probability stays; 1 keeps all.
    """
    if not top_k and top_p >= 1:
        return logits
    best, tokens = logits.sort(dim=-1, descending=True, stable=True)
    dropped = torch.zeros_like(best, dtype=torch.bool)
    if top_k:
        dropped[..., top_k:] = True
    if top_p < 1:
        probabilities = best.masked_fill(dropped, -torch.inf).softmax(-1, dtype=torch.float64)
        dropped |= probabilities.cumsum(-1) - probabilities >= top_p  # the more likely ones suffice
    return logits.masked_fill(torch.zeros_like(dropped).scatter(-1, tokens, dropped), -torch.inf)


def sample_tokens(logits: Tensor, uniforms: Tensor) -> Tensor:
    """Draw one token per row by inverting its cumulative distribution.

    ``torch.multinomial`` takes one generator for the whole batch, so an image would depend on the others. Here one
    uniform number per image decides. The sum is float64: rare tokens of large codebooks keep their probability.

    Args:
        logits: (N, K); -inf excludes a token.
        uniforms: (N,) in [0, 1).

    Returns:
        Tokens (N,) int64.
    """
    cumulative = logits.softmax(-1, dtype=torch.float64).cumsum(-1)  # (N, K)
    # Scaled by the sum, which may miss 1 by rounding: the first entry above the threshold then always exists.
    thresholds = uniforms.double()[:, None] * cumulative[:, -1:]  # (N, 1)
    return torch.searchsorted(cumulative, thresholds, right=True)[:, 0]


def draw_tokens(logits: Tensor, uniforms: Tensor, sampling: Sampling) -> Tensor:
    """Temperature, truncation and the draw: guided logits (N, K) and uniforms (N,) to tokens (N,) int64."""
    return sample_tokens(truncate(logits.float() / sampling.temperature, sampling.top_k, sampling.top_p), uniforms)


def mixture_draws(
    rngs: Sequence[torch.Generator], length: int, reference: Tensor | None, sigma: float | None, device: torch.device
) -> tuple[Tensor, Tensor]:
    """The random numbers of a sample, or of its mixture with real tokens, and the real tokens that the mixture keeps.

    Each position keeps its real token with probability ``sigma``, drawn once per image before all other numbers.
    All numbers are drawn whatever sigma is, so that the tokens of an image use the same ones at every sigma.

    Args:
        rngs: one per image.
        length: L.
        reference: tokens (N, L) int64 of real images, or None.
        sigma: sigma in [0, 1], or None for 0.
        device: where they are needed.

    Returns:
        Uniforms (N, L) float32, and kept tokens (N, L) int64, -1 where a token is drawn.
    """
    keep = to_device(image_uniforms(rngs, length) < (sigma or 0.0), device)  # (N, L)
    uniforms = to_device(image_uniforms(rngs, length), device)  # (N, L)
    if reference is None:
        return uniforms, torch.full_like(uniforms, -1, dtype=torch.int64)
    return uniforms, torch.where(keep, to_device(reference, device), -1)


def check_labels(labels: Tensor, classes: int) -> None:
    """Refuse labels other than a vector of classes 0..C-1, or C for "no class".

    Raises:
        UserError: wrong shape or dtype, or a label out of range.
    """
    if labels.ndim != 1 or labels.dtype != torch.int64:
        raise UserError(f"labels have shape {tuple(labels.shape)} and dtype {labels.dtype}; expected (N,) torch.int64")
    if labels.numel() and not 0 <= int(labels.min()) <= int(labels.max()) <= classes:
        raise UserError(
            f"labels range from {int(labels.min())} to {int(labels.max())}; accepted are 0 to {classes - 1}, "
            f"and {classes} for no class"
        )


def check_mixture(
    sigma: float | None, reference: Tensor | None, shape: tuple[int, ...], codebook_size: int | None
) -> None:
    """Refuse a sigma or real latents that cannot be mixed with samples of ``shape``: (N, L), or (N, L, D) continuous.

    Raises:
        UserError: sigma outside [0, 1]; sigma above 0 without a reference; a reference of another shape or dtype, or
            with tokens outside 0..K-1.
    """
    if sigma is not None and not 0 <= sigma <= 1:
        raise UserError(f"sigma is {sigma}; accepted is 0 (free sample) to 1 (the reference itself)")
    if reference is None:
        if sigma:
            raise UserError(f"sigma is {sigma} but no reference is given; pass the latents of real images")
        return
    fits = reference.dtype == torch.int64 if codebook_size else reference.is_floating_point()
    remedy = "encode the images with the tokenizer this generator was trained on"
    if reference.shape != shape or not fits:
        found = f"shape {tuple(reference.shape)} and dtype {reference.dtype}"
        raise UserError(
            f"the reference has {found}; expected {'torch.int64' if codebook_size else 'floats'} {shape}; {remedy}"
        )
    if codebook_size and reference.numel() and not 0 <= int(reference.min()) <= int(reference.max()) < codebook_size:
        found = f"tokens {int(reference.min())} to {int(reference.max())}"
        raise UserError(f"the reference has {found}; this generator has 0 to {codebook_size - 1}; {remedy}")
