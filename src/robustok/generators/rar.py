"""RAR, the random-order autoregressive generator of tokens (arXiv 2411.00776).

Source: Yu et al., "Randomized Autoregressive Visual Generation". A causal transformer visits the tokens of an image in
any order during training and in raster order when it samples. Training starts with random orders, so that every token
learns to use context from all sides, and anneals to raster.

The sequence is ``[start, condition, token, token, ...]``. Three learned tables say what the order hides:

* ``pos_embed``: where on the grid this token lies;
* ``target_aware_pos_embed``: where the token lies that is to be predicted next;
* ``timesteps_embeddings``: how far the sequence has come. With the class embedding it modulates every block (adaLN).

Parameters carry the released names, so that a released checkpoint loads as it is.
"""

from collections.abc import Callable
from typing import Literal

import torch
import torch.nn.functional as F
from pydantic import Field, ValidationInfo, field_validator
from torch import Tensor, nn

from robustok.config import Config
from robustok.errors import UserError
from robustok.generators.sampling import Sampling, guidance_scales, guide
from robustok.generators.tokens import (
    LAYER_NORM_EPSILON,
    MLP,
    Attention,
    KeyValueCache,
    TokenGenerator,
    initialise,
    modulate,
    project,
)
from robustok.types import GeneratorOutput

# Sampling computes the modulation of many positions at once; this many values (256 MB in float32) bound its memory.
MODULATION_VALUES = 2**26


class RARConfig(Config):
    """Size and regularisation of a RAR generator. The defaults are the paper's RAR-B."""

    name: Literal["rar"] = "rar"
    width: int = Field(768, gt=0, description="width of the transformer, a multiple of heads")
    depth: int = Field(24, gt=0, description="number of transformer blocks")
    heads: int = Field(16, gt=0, description="attention heads; must divide width")
    mlp_ratio: float = Field(4.0, gt=0, description="hidden width of the MLP, in widths")
    dropout: float = Field(
        0.1, ge=0, lt=1, description="dropout of attention weights, projections and MLP, in training"
    )
    label_dropout: float = Field(0.1, ge=0, le=1, description="share of training labels dropped, for guidance")
    position_rows: int | None = Field(
        None, gt=0, description="rows of the two position tables; default: tokens + 2 (released checkpoints: 1280)"
    )
    timestep_rows: int | None = Field(
        None, gt=0, description="rows of the timestep table; default: tokens + 2 (released checkpoints: 356)"
    )

    @field_validator("heads")
    @classmethod
    def _heads_divide_width(cls, heads: int, info: ValidationInfo) -> int:
        width = info.data.get("width")
        if width is not None and width % heads:
            raise ValueError(f"heads must divide width, which is {width}")
        return heads


RAR_SIZES = {
    "b": RARConfig(width=768, depth=24),
    "l": RARConfig(width=1024, depth=24),
    "xl": RARConfig(width=1280, depth=32),
    "xxl": RARConfig(width=1408, depth=40, mlp_ratio=6144 / 1408),
}
"""The paper's sizes, all with 16 heads."""


class Block(nn.Module):
    """A transformer block whose branches are shifted, scaled and gated by the condition (adaLN-zero)."""

    def __init__(self, config: RARConfig) -> None:
        super().__init__()
        width = config.width
        self.norm1 = nn.LayerNorm(width, eps=LAYER_NORM_EPSILON)
        self.attn = Attention(width, config.heads, config.dropout)
        self.norm2 = nn.LayerNorm(width, eps=LAYER_NORM_EPSILON)
        self.mlp = MLP(width, round(width * config.mlp_ratio), config.dropout)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(width, 6 * width))

    def forward(self, x: Tensor, modulation: Tensor, cache: KeyValueCache | None = None) -> Tensor:
        """``x`` (N, T, W) and ``modulation`` (N, T, 6W), this block's ``adaLN_modulation`` of the conditions."""
        shift1, scale1, gate1, shift2, scale2, gate2 = modulation.chunk(6, dim=-1)  # each (N, T, W)
        x = x + gate1 * self.attn(modulate(self.norm1(x), shift1, scale1), cache)
        return x + gate2 * self.mlp(modulate(self.norm2(x), shift2, scale2))

    def conditioned(self, x: Tensor, conditions: Tensor) -> Tensor:
        """The same from ``conditions`` (N, T, W): training has one for every position of every image."""
        return self(x, self.adaLN_modulation(conditions))


class FinalNorm(nn.Module):
    """The modulated norm before the head. It yields scale first, then shift: the other way round than the blocks."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width, eps=LAYER_NORM_EPSILON, elementwise_affine=False)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(width, 2 * width))

    def forward(self, x: Tensor, modulation: Tensor) -> Tensor:
        """``x`` (N, T, W) and ``modulation`` (N, T, 2W)."""
        scale, shift = modulation.chunk(2, dim=-1)  # each (N, T, W)
        return modulate(self.norm(x), shift, scale)


class RAR(TokenGenerator):
    """Class-conditional generator of tokens.

    Args:
        config: size of the transformer.
        codebook_size: K.
        length: L, tokens per image.
        classes: number of classes.

    Attributes:
        null_label: the label that stands for "no class"; equals ``classes``.
        licence: of the released weights.

    Raises:
        UserError: a position or timestep table with fewer than L + 2 rows.
    """

    licence = "Apache-2.0 for the weights of RAR; those of RobusTok were released without a licence"

    def __init__(self, config: RARConfig, codebook_size: int, length: int, classes: int) -> None:
        super().__init__()
        self.config = config
        self.codebook_size = codebook_size
        self.length = length
        self.classes = classes
        self.null_label = classes
        positions = config.position_rows or length + 2
        timesteps = config.timestep_rows or length + 2
        if min(positions, timesteps) < length + 2:
            raise UserError(
                f"position_rows {positions} and timestep_rows {timesteps} are too few for {length} tokens; "
                f"give at least {length + 2} or leave them out"
            )
        width = config.width
        # One table for all: tokens, a mask token that RAR never uses, the classes, "no class".
        self.embeddings = nn.Embedding(codebook_size + 1 + classes + 1, width)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, width))
        self.pos_embed = nn.Parameter(torch.empty(1, positions, width))
        self.target_aware_pos_embed = nn.Parameter(torch.empty(1, positions, width))
        self.timesteps_embeddings = nn.Parameter(torch.empty(1, timesteps, width))
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.depth))
        self.adaln_before_head = FinalNorm(width)
        self.lm_head = nn.Linear(width, codebook_size)
        self._initialise()

    def _initialise(self) -> None:
        self.apply(initialise)
        for table in (self.pos_embed, self.target_aware_pos_embed, self.timesteps_embeddings):
            nn.init.trunc_normal_(table, std=0.02)
        for module in (*self.blocks, self.adaln_before_head):
            nn.init.zeros_(module.adaLN_modulation[1].weight)  # every block starts as the identity

    def forward(self, tokens: Tensor, labels: Tensor, orders: Tensor | None = None) -> GeneratorOutput:
        """Predict every token from those before it in its image's order: what cross-entropy is taken of in training.

        Args:
            tokens: (N, L) int64, in raster order.
            labels: (N,) int64; ``null_label`` is the condition "no class" (see :func:`drop_labels`).
            orders: (N, L) int64, a permutation of 0..L-1 per image (see :func:`draw_orders`); None is raster.

        Returns:
            Logits (N, L, K), and as targets the tokens (N, L) in the order in which they were predicted.

        Raises:
            UserError: another number of tokens than the model was built for.
        """
        if tokens.shape[1] != self.length:
            raise UserError(f"got {tokens.shape[1]} tokens per image, this generator was built for {self.length}")
        targets = tokens if orders is None else tokens.gather(1, orders)  # (N, L)
        return GeneratorOutput(prediction=self.logits(tokens, labels, orders)[:, :-1], targets=targets)

    def logits(self, tokens: Tensor, labels: Tensor, orders: Tensor | None = None) -> Tensor:
        """Teacher-forced logits (N, T + 1, K) without the cache; row i predicts the i-th token of the order.

        Args:
            tokens: (N, T) int64: all tokens (T = L; the last row then predicts nothing) or a prefix in raster order.
            labels: (N,) int64.
            orders: (N, L) int64, or one for all images (L,); needs T = L; None is raster.
        """
        if orders is not None:
            orders = orders.expand(len(tokens), -1)  # (N, L)
            tokens = tokens.gather(1, orders)  # (N, L), now in visiting order
        positions = tokens.shape[1] + 2
        condition = self._condition(labels)[:, None]  # (N, 1, W)
        start = self.cls_token.expand(len(tokens), -1, -1)  # (N, 1, W)
        x = torch.cat([start, condition, self.embeddings(tokens)], dim=1)  # (N, T + 2, W)
        x = x + self._places(orders)[:, :positions]
        conditions = condition + self.timesteps_embeddings[:, :positions]  # (N, T + 2, W)
        for block in self.blocks:  # each with its modulation, so that checkpointing need not keep those of all blocks
            x = block.conditioned(x, conditions)
        final = self.adaln_before_head
        return self.lm_head(final(x, final.adaLN_modulation(conditions)))[:, 1:]

    def _condition(self, labels: Tensor) -> Tensor:
        """Labels (N,) to their embeddings (N, W)."""
        return self.embeddings(labels + self.codebook_size + 1)

    def _places(self, orders: Tensor | None) -> Tensor:
        """For every position of the sequence: where its own token lies and where the next one does.

        The first two rows of the position table belong to start and condition. Start and the last token predict nothing
        and get no target.

        Returns:
            (N, L + 2, W), or (1, L + 2, W) for raster order.
        """
        if orders is None:
            orders = torch.arange(self.length, device=self.pos_embed.device)[None]  # (1, L)
        rows = orders + 2
        first = self.pos_embed[:, :2].expand(len(rows), -1, -1)
        own = torch.cat([first, self.pos_embed[0][rows]], dim=1)  # (N, L + 2, W)
        target = F.pad(self.target_aware_pos_embed[0][rows], (0, 0, 1, 1))  # (N, L + 2, W)
        return own + target

    def _modulations(self, conditions: Tensor) -> list[Tensor]:
        """What the conditions (N, T, W) do to each block (N, T, 6W) and, last, to the final norm (N, T, 2W)."""
        conditions = F.silu(conditions)  # once for all
        return [module.adaLN_modulation[1](conditions) for module in (*self.blocks, self.adaln_before_head)]

    def _transform(self, x: Tensor, modulations: list[Tensor], caches: list[KeyValueCache] | None = None) -> Tensor:
        """Inputs (N, T, W) through the blocks and the head to logits (N, T, K)."""
        for i, block in enumerate(self.blocks):
            x = block(x, modulations[i], caches[i] if caches else None)
        return project(self.lm_head, self.adaln_before_head(x, modulations[-1]))

    def _sample(self, labels: Tensor, sampling: Sampling, choose: Callable[[int, Tensor], Tensor]) -> Tensor:
        """Run the sequence with a cache; ``choose(step, guided logits (N, K))`` gives each token (N,)."""
        count = len(labels)
        scales = guidance_scales(self.length, sampling).tolist()
        if sampling.guided:  # both halves in one batch
            labels = torch.cat([labels, torch.full_like(labels, self.null_label)])  # (2N,)
        condition = self._condition(labels)  # (N or 2N, W)
        # The modulation depends on class and position only. So it is computed once per class, not per image, and for
        # many positions at once: step by step it would read a third of all parameters again for every token.
        classes, rows = labels.unique(return_inverse=True)
        class_conditions = self._condition(classes)  # (classes, W)
        values = max(1, len(classes)) * len(self.blocks) * 6 * self.config.width
        ahead = max(1, MODULATION_VALUES // values)
        places = self._places(None)  # (1, L + 2, W)
        caches = self._caches(len(self.blocks), self.length + 1)
        tokens = torch.empty(count, self.length, dtype=torch.int64, device=labels.device)
        x = self.cls_token[0].expand(len(labels), -1)  # (N or 2N, W)
        for position in range(self.length + 1):
            if position % ahead == 0:
                times = self.timesteps_embeddings[0, position : min(position + ahead, self.length + 1), None]
                class_modulations = self._modulations(class_conditions + times)  # each (ahead, classes, 6W or 2W)
            modulations = [m[position % ahead, rows, None] for m in class_modulations]  # each (N or 2N, 1, 6W or 2W)
            x = (x + places[:, position])[:, None]  # (N or 2N, 1, W)
            logits = self._step(position, x, modulations, caches)[:, 0]  # (N or 2N, K)
            logits = logits.to(torch.promote_types(logits.dtype, torch.float32))  # guidance amplifies rounding
            if position == 0:  # the start predicts nothing
                x = condition
                continue
            step = position - 1
            if sampling.guided:
                logits = guide(logits[:count], logits[count:], scales[step])  # (N, K)
            tokens[:, step] = choose(step, logits)
            x = self.embeddings(tokens[:, step]).repeat(2 if sampling.guided else 1, 1)  # (N or 2N, W)
        return tokens


def random_share(step: int, start: int, end: int) -> float:
    """Share of images trained in random order: 1 before ``start``, linear to 0 at ``end``, in steps."""
    if step < start:
        return 1.0
    return 0.0 if step >= end else 1 - (step - start) / (end - start)


def draw_orders(count: int, length: int, random_share: float, rng: torch.Generator) -> Tensor:
    """One visiting order per image: a random permutation with probability ``random_share``, else raster.

    Returns:
        (N, L) int64 on the device of ``rng``.
    """
    keys = torch.rand(count, length, generator=rng, device=rng.device)
    shuffled = torch.rand(count, 1, generator=rng, device=rng.device) < random_share
    raster = torch.arange(length, device=rng.device)
    return torch.where(shuffled, keys.argsort(dim=1, stable=True), raster)  # sorting random keys shuffles all at once


def drop_labels(labels: Tensor, rate: float, null_label: int, rng: torch.Generator) -> Tensor:
    """Replace each label (N,) by ``null_label`` with probability ``rate``: guidance needs a model without class."""
    dropped = torch.rand(labels.shape, generator=rng, device=rng.device) < rate
    return labels.masked_fill(dropped.to(labels.device), null_label)
