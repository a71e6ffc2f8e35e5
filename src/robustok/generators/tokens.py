"""What the generators of tokens share: sampling with a cache, mixtures, fast projections and initialisation.

Letters beside those of ``robustok.types``: T positions of a sequence, W width of the transformer.
"""

import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from robustok.config import Config
from robustok.errors import UserError
from robustok.generators.sampling import Sampling, check_labels, check_mixture, mixture_draws
from robustok.generators.token_batch import TokenBatch
from robustok.randomness import per_image
from robustok.types import GeneratorOutput

COLUMN_ROWS = 8  # rows from which on `project` is faster
RECOMPILE_LIMIT = 64  # lengths of the cache times sizes of a batch


@dataclass
class Compiled:
    """What compiled sampling keeps from one batch to the next; a copy of a model starts without.

    Attributes:
        functions: the compiled parts of a step, by what they were; None where sampling is not compiled.
        batch: the memory of the last batch.
    """

    functions: dict[Callable[..., Tensor], Callable[..., Tensor]] | None = None
    batch: TokenBatch | None = None

    def __deepcopy__(self, memo: dict) -> "Compiled":
        return Compiled()


class TokenGenerator(nn.Module):
    """A class-conditional model of tokens. Families implement ``logits``, ``_start``, ``_inputs`` and ``_outputs``.

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
        self._compiled = Compiled()

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
        uniforms, kept = mixture_draws(rngs, self.length, reference, sigma, device)
        if reference is not None and sigma == 1:
            return reference.to(device, copy=True)
        with evaluating(self):
            batch = self._sample(labels, sampling, uniforms, kept)
        return batch.tokens[: len(labels)].clone()

    @torch.no_grad()
    def cached_logits(self, tokens: Tensor, labels: Tensor, sampling: Sampling) -> Tensor:
        """The guided logits (N, L, K) of sampling that is made to choose these tokens (N, L) for labels (N,)."""
        with evaluating(self):
            return self._sample(labels, sampling, torch.zeros(tokens.shape, device=tokens.device), tokens, True).logits

    def _sample(
        self, labels: Tensor, sampling: Sampling, uniforms: Tensor, kept: Tensor, record: bool = False
    ) -> TokenBatch:
        """Sample one token after another.

        Args:
            labels: (N,) int64, better on the CPU.
            sampling: guidance, temperature, top_k, top_p.
            uniforms: (N, L) on the model's device.
            kept: tokens (N, L) int64 to keep, on the model's device; -1 where one is drawn.
            record: whether to record the guided logits.

        Returns:
            The batch, of N or more images.
        """
        batch = self._batch(sampling, len(labels), record)
        batch.start(sampling, uniforms, kept)
        if batch.static:
            batch.forget_graphs(self._state())
        rest = labels.new_full((batch.count - len(labels),), self.null_label)
        autocast = _uncached_autocast(batch.device.type) if batch.static else nullcontext()
        with autocast, torch._dynamo.config.patch(recompile_limit=RECOMPILE_LIMIT):
            # The first inputs do not depend on tokens.
            for position, x in enumerate(self._start(torch.cat([labels, rest]), batch)):
                if position:
                    batch.position += 1
                logits = self._outputs(x, batch, batch.end(position))  # (R, K)
            self._part(TokenBatch.draw, batch, logits)
            for position in range(batch.first + 1, batch.first + self.length):
                batch.step(self._next, batch.end(position))
        return batch

    def _next(self, batch: TokenBatch, end: int) -> Tensor:
        """Sample the next token of every image (N,); ``end`` is how much of the cache attention reads.

        Without a wait for the device, and with static shapes if the batch is static, so that it can be recorded.
        """
        return self._part(TokenBatch.draw, batch, self._outputs(self._inputs(batch), batch, end))

    def _part(self, function: Callable[..., Tensor], *inputs: Any) -> Tensor:
        """``function(*inputs)``, a part of a step, compiled if sampling is.

        Blocks of a transformer, which are alike, share what is compiled: a step as a whole would take minutes.
        """
        if self._compiled.functions is None:
            return function(*inputs)
        if function not in self._compiled.functions:
            self._compiled.functions[function] = torch.compile(function, dynamic=False, fullgraph=True)
        return self._compiled.functions[function](*inputs)

    def _state(self) -> tuple:
        """What a recorded step contains beside the sampling settings: where the weights are, and the precision."""
        device = next(self.parameters()).device.type
        precision = torch.get_autocast_dtype(device) if _autocast(device) else None
        weights = (tensor.data_ptr() for tensor in (*self.parameters(), *self.buffers()) if device == "cuda")
        return precision, torch.backends.cuda.matmul.fp32_precision, *weights

    def _batch(self, sampling: Sampling, count: int, record: bool) -> TokenBatch:
        """Memory for a batch of images: new, or that of the last batch if the step is compiled."""
        weight = next(self.parameters())
        device, dtype = weight.device, weight.dtype
        memory = {
            "count": count,
            "rows": count * (1 + sampling.guided),
            "dtype": self._cache_type(),
            "device": device,
        }
        batch = self._compiled.batch
        if batch is None or not batch.fits(memory) or record or batch.logits is not None:
            batch = TokenBatch(**memory, **self._sequence(), static=self._compiled.functions is not None)
            if record:
                wide = torch.promote_types(dtype, torch.float32)
                batch.logits = torch.zeros(count, self.length, self.codebook_size, dtype=wide, device=device)
        if batch.static:
            self._compiled.batch = batch
        return batch

    def cache_bytes(self, sampling: Sampling) -> int:
        """Memory of the keys and values of one image, under the present autocast."""
        sequence = self._sequence()
        heads, width = sequence["heads"]
        positions = sequence["first"] + sequence["length"]
        values = 2 * (1 + sampling.guided) * sequence["depth"] * heads * width * positions
        return values * self._cache_type().itemsize

    def _cache_type(self) -> torch.dtype:
        weight = next(self.parameters())
        device = weight.device.type
        return torch.get_autocast_dtype(device) if _autocast(device) else weight.dtype

    def _sequence(self) -> dict[str, Any]:
        """``length``, ``first``, ``heads`` and ``depth`` of this family's :class:`TokenBatch`."""
        raise NotImplementedError

    def _start(self, labels: Tensor, batch: TokenBatch) -> Iterator[Tensor]:
        """Inputs (R, 1, W) of the positions before the first token; the batch holds what else the labels (N,) give."""
        raise NotImplementedError

    def _inputs(self, batch: TokenBatch) -> Tensor:
        """Inputs (R, 1, W) of the batch's present position, from the last token."""
        raise NotImplementedError

    def _outputs(self, x: Tensor, batch: TokenBatch, end: int) -> Tensor:
        """Inputs (R, 1, W) of the present position to logits (R, K); attention reads the cache up to ``end``."""
        raise NotImplementedError

    def _rows(self, labels: Tensor, batch: TokenBatch) -> Tensor:
        """The label of each row (R,), of the images' labels (N,)."""
        return labels if batch.rows == batch.count else torch.cat([labels, torch.full_like(labels, self.null_label)])

    def compile_sampling(self) -> None:
        """Compile the blocks of the sampling step from now on, and on CUDA record it as CUDA graphs; no gain on a CPU.

        The first batch takes longer, because a block is compiled for each of a few lengths of the cache, and the memory
        of the last batch stays allocated. A smaller batch is sampled in the memory of a larger one, and nothing is
        compiled again. The weights may change afterwards.

        Raises:
            UserError: the model is on a CPU and there is no C++ compiler.
        """
        compiler = os.environ.get("CXX", "g++")
        if next(self.parameters()).device.type == "cpu" and shutil.which(compiler) is None:
            raise UserError(
                f"cache.compile=true needs a C++ compiler and {compiler} is none; install g++, or leave it out"
            )
        self._compiled = Compiled({})


def _uncached_autocast(device: str) -> AbstractContextManager[Any]:
    """Autocast as it is, without its cache: a CUDA graph would read weights that were cast before it was recorded."""
    if not _autocast(device):
        return nullcontext()
    return torch.autocast(device, torch.get_autocast_dtype(device), cache_enabled=False)


def _autocast(device: str) -> bool:
    return device != "meta" and torch.is_autocast_enabled(device)


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
