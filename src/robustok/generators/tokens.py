"""What the generators of tokens share: sampling with a cache, mixtures, fast projections and initialisation.

Letters beside those of ``robustok.types``: T positions of a sequence, W width of the transformer.
"""

import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from robustok.config import Config
from robustok.errors import UserError
from robustok.generators.key_value_cache import KeyValueCache, StaticCache
from robustok.generators.sampling import (
    Sampling,
    check_labels,
    check_mixture,
    guidance_scales,
    guide,
    token_chooser,
)
from robustok.randomness import per_image
from robustok.types import GeneratorOutput

COLUMN_ROWS = 8  # rows from which on `project` is faster


class TokenGenerator(nn.Module):
    """A class-conditional model of tokens. Families implement ``logits``, ``_steps`` and ``_transform``.

    Args:
        config: size and variant of the transformer.
        codebook_size: K.
        length: L, tokens per image.
        classes: number of classes.

    Attributes:
        latent_shape: (L, D) of the tokenizer; None until :func:`robustok.generators.build_generator` or a checkpoint
            sets it, because the transformer does not depend on D.
        latent_space: digest of the tokenizer whose tokens these are; None where unknown.
        sampling: sampling settings stored with the weights.

    The other attributes are those of :class:`robustok.types.Generator`.
    """

    kind = "discrete"
    objective = "cross_entropy"
    sampling_type = Sampling
    licence: str

    def __init__(self, config: Config, codebook_size: int, length: int, classes: int) -> None:
        super().__init__()
        self.config = config
        self.codebook_size = codebook_size
        self.length = length
        self.classes = self.null_label = classes
        self.latent_shape: tuple[int, int] | None = None
        self.latent_space: str | None = None
        self.sampling = Sampling()
        self._compiled: Callable[..., Tensor] | None = None
        self._static_caches: list[StaticCache] | None = None

    def forward(self, tokens: Tensor, labels: Tensor, orders: Tensor | None = None) -> GeneratorOutput:
        """Predict every token from those before it in its image's order, for the cross-entropy of training.

        Args:
            tokens: (N, L) int64, in raster order.
            labels: (N,) int64; ``null_label`` is the condition "no class".
            orders: (N, L) int64, a permutation of 0..L-1 per image; None is raster.

        Returns:
            Logits (N, L, K), and as targets the tokens (N, L) in the order in which they were predicted.

        Raises:
            UserError: another number of tokens than the model was built for, or an order that it does not support.
        """
        if tokens.shape[1] != self.length:
            raise UserError(f"got {tokens.shape[1]} tokens per image, this generator was built for {self.length}")
        prediction = self.logits(tokens, labels, orders)[:, :-1]
        return GeneratorOutput(prediction, targets=tokens if orders is None else tokens.gather(1, orders))

    def logits(self, tokens: Tensor, labels: Tensor, orders: Tensor | None = None) -> Tensor:
        """Teacher-forced logits (N, T + 1, K) without the cache; row i predicts the i-th token of the order."""
        raise NotImplementedError

    def check(self, latents: Tensor | None = None) -> list[str]:
        """Sentences on what is wrong with a converted model; empty if nothing is."""
        return []

    def mixture_details(self, sampling: Sampling, sigma: float) -> dict[str, Any]:
        """Nothing: sigma is the share of tokens that are kept, whatever the sampling settings."""
        return {}

    # Not inference_mode: its tensors could not be trained on afterwards.
    @torch.no_grad()
    def generate(
        self,
        labels: Tensor,
        sampling: Sampling,
        rng: torch.Generator | Sequence[torch.Generator],
        reference: Tensor | None = None,
        sigma: float | None = None,
    ) -> Tensor:
        """Sample tokens in raster order, or mix them with the tokens of real images.

        For a mixture, each position keeps its real token with probability ``sigma``, drawn once per image before
        all other numbers. The model's context is the mixture, so the sampled tokens fit the kept ones.

        Args:
            labels: (N,) int64; ``null_label`` samples without a class.
            sampling: guidance, temperature, top_k, top_p.
            rng: one CPU generator per image (:func:`robustok.randomness.image_rngs`), or one that seeds them.
            reference: tokens (N, L) int64 of real images.
            sigma: share in [0, 1] of the reference that is kept; 1 returns the reference, 0 or None ignores it.

        Returns:
            Tokens (N, L) int64 on the model's device.

        Raises:
            UserError: labels, reference, sigma or the number of generators do not fit.
        """
        check_labels(labels, self.classes)
        check_mixture(sigma, reference, (len(labels), self.length), self.codebook_size)
        device, rngs = next(self.parameters()).device, per_image(rng, len(labels))
        choose = token_chooser(sampling, rngs, self.length, reference, sigma, device)
        if reference is not None and sigma == 1:
            return reference.to(device, copy=True)
        with evaluating(self):
            return self._sample(labels.to(device), sampling, choose)

    def _sample(self, labels: Tensor, sampling: Sampling, choose: Callable[[int, Tensor], Tensor]) -> Tensor:
        """Sample one token after another; ``choose(step, guided logits (N, K))`` returns each token (N,)."""
        count = len(labels)
        if sampling.guided:  # both passes in one batch
            labels = torch.cat([labels, torch.full_like(labels, self.null_label)])  # (2N,)
        scales = guidance_scales(self.length, sampling).tolist()
        tokens = torch.empty(count, self.length, dtype=torch.int64, device=labels.device)
        for step, logits in enumerate(self._steps(labels, tokens)):
            logits = logits.to(torch.promote_types(logits.dtype, torch.float32))  # guidance amplifies rounding
            if sampling.guided:
                logits = guide(logits[:count], logits[count:], scales[step])  # (N, K)
            tokens[:, step] = choose(step, logits)
        return tokens

    def _steps(self, labels: Tensor, tokens: Tensor) -> Iterator[Tensor]:
        """Logits of one step after another, with a cache.

        Args:
            labels: (N,), or (2N,) with the second half for guidance.
            tokens: (N, L); step i reads the first i columns, which the caller fills between the steps.

        Yields:
            Logits (N or 2N, K).
        """
        raise NotImplementedError

    def _transform(self, *inputs: Any) -> Tensor:
        """Inputs (N, T, W), and what the family passes with them, through blocks and head to logits (N, T, K)."""
        raise NotImplementedError

    def compile_sampling(self) -> None:
        """Compile the sampling step from now on, on CUDA into a CUDA graph; no gain on a CPU.

        The first batch of a size takes longer, and the key-value cache of the last batch stays in memory. The weights
        may change afterwards: the compiled step holds no copy of them.

        Raises:
            UserError: the model is on a CPU and there is no C++ compiler.
        """
        compiler = os.environ.get("CXX", "g++")
        if next(self.parameters()).device.type == "cpu" and shutil.which(compiler) is None:
            raise UserError(
                f"cache.compile=true needs a C++ compiler and {compiler} is none; install g++, or leave it out"
            )
        self._compiled = torch.compile(self._transform, mode="reduce-overhead", dynamic=False)

    def _step(self, position: int, *inputs: Any) -> Tensor:
        """``_transform`` of one position, compiled if asked for; not the first one, which allocates the caches."""
        return (self._compiled if self._compiled and position else self._transform)(*inputs)

    def _caches(self, layers: int, capacity: int) -> list[KeyValueCache]:
        """Empty caches for a sample: new ones, or the same ones every time for a compiled step."""
        if self._compiled is None:
            return [KeyValueCache(capacity) for _ in range(layers)]
        if self._static_caches is None:
            self._static_caches = [StaticCache(capacity) for _ in range(layers)]
        for cache in self._static_caches:
            cache.restart()
        return self._static_caches


def project(layer: nn.Linear, x: Tensor) -> Tensor:
    """``layer(x)`` for ``x`` (N, T, in), faster on a CPU for one position (T = 1) of several images.

    ``nn.Linear`` computes ``x @ W.T``, for which the BLAS rearranges the weights at every call. ``W @ x.T`` takes
    them as they are, without a copy that could become outdated. In float32 at width 768 this saves 15 % of the time at
    8 rows, 30 % at 12, 11 % at 16 and 6 % at 128; below ``COLUMN_ROWS`` it is slower.
    """
    count, positions, _ = x.shape
    if x.device.type != "cpu" or positions > 1 or count < COLUMN_ROWS:
        return layer(x)
    columns = x[:, 0].t()  # (in, N)
    if layer.bias is None:
        return torch.mm(layer.weight, columns).t()[:, None]  # (N, 1, out)
    return torch.addmm(layer.bias[:, None], layer.weight, columns).t()[:, None]  # (N, 1, out)


def modulate(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """Adaptive layer norm: shift and scale a normalised ``x`` by a condition."""
    return x * (1 + scale) + shift


def initialise(module: nn.Module) -> None:
    """For ``Module.apply``: linear and embedding weights from a truncated normal of standard deviation 0.02."""
    if isinstance(module, (nn.Linear, nn.Embedding)):
        nn.init.trunc_normal_(module.weight, std=0.02)
    if isinstance(module, nn.Linear) and module.bias is not None:
        nn.init.zeros_(module.bias)


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Evaluation mode inside, the previous mode afterwards."""
    training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(training)
