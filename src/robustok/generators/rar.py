"""RAR, the random-order autoregressive generator of tokens (arXiv 2411.00776).

Source: Yu et al., "Randomized Autoregressive Visual Generation". In training, a causal transformer predicts the tokens
of an image in a random order, so that every token learns to use context from all sides; during training the orders
anneal to raster order, in which it samples.

The sequence is ``[start, condition, token, token, ...]``. Three learned tables encode what the order hides:

* ``pos_embed``: the grid position of this token;
* ``target_aware_pos_embed``: the grid position of the token that is predicted next;
* ``timesteps_embeddings``: the index in the sequence. Its sum with the class embedding modulates every block (adaLN).

Parameters have the names of the authors' code, so that its checkpoints load as they are.
"""

from collections.abc import Iterator
from typing import Any, Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from robustok.config import Config, Heads
from robustok.devices import to_device
from robustok.errors import UserError
from robustok.generators.key_value_cache import KeyValueCache, Window
from robustok.generators.token_batch import TokenBatch
from robustok.generators.tokens import TokenGenerator, initialise, modulate, project

LAYER_NORM_EPSILON = 1e-6
# Sampling computes the modulation of many positions at once; at most this many values (256 MB in float32).
MODULATION_VALUES = 2**26


class RARConfig(Config):
    """Size and regularisation of a RAR generator. The defaults are the paper's RAR-B."""

    name: Literal["rar"] = "rar"
    width: int = Field(768, gt=0, description="width of the transformer, a multiple of heads")
    depth: int = Field(24, gt=0, description="number of transformer blocks")
    heads: Heads = 16
    mlp_ratio: float = Field(4.0, gt=0, description="hidden width of the MLP, in widths")
    dropout: float = Field(
        0.1, ge=0, lt=1, description="dropout of attention weights, projections and MLP, in training"
    )
    label_dropout: float = Field(0.1, ge=0, le=1, description="share of training labels dropped, for guidance")
    position_rows: int | None = Field(
        None, gt=0, description="rows of the two position tables; default: tokens + 2 (published checkpoints: 1280)"
    )
    timestep_rows: int | None = Field(
        None, gt=0, description="rows of the timestep table; default: tokens + 2 (published checkpoints: 356)"
    )


RAR_SIZES = {
    "b": RARConfig(width=768, depth=24),
    "l": RARConfig(width=1024, depth=24),
    "xl": RARConfig(width=1280, depth=32),
    "xxl": RARConfig(width=1408, depth=40, mlp_ratio=6144 / 1408),
}
"""The paper's sizes, all with 16 heads."""


class Attention(nn.Module):
    """Causal self-attention with a layer norm on the queries and keys of each head.

    Args:
        width: W.
        heads: number of heads; divides ``width``.
        dropout: probability for the attention weights and after the projection.
    """

    def __init__(self, width: int, heads: int, dropout: float) -> None:
        super().__init__()
        self.heads = heads
        self.dropout = dropout
        self.qkv = nn.Linear(width, 3 * width)
        self.q_norm = nn.LayerNorm(width // heads, eps=LAYER_NORM_EPSILON)
        self.k_norm = nn.LayerNorm(width // heads, eps=LAYER_NORM_EPSILON)
        self.proj = nn.Linear(width, width)

    def forward(self, x: Tensor, cache: KeyValueCache | None = None, window: Window | None = None) -> Tensor:
        """Attend from every position of ``x`` (N, T, W) to itself and those before it.

        With a cache, ``x`` is one new position (T = 1) that attends to itself and to the cached ones of the window.
        """
        count, positions, width = x.shape
        qkv = project(self.qkv, x).view(count, positions, 3, self.heads, width // self.heads)
        queries, keys, values = qkv.permute(2, 0, 3, 1, 4)  # each (N, heads, T, head width)
        # Autocast runs layer norms in float32; back to one dtype for the cache and for the attention kernel.
        queries = self.q_norm(queries).to(values.dtype)
        keys = self.k_norm(keys).to(values.dtype)
        mask = None
        if cache is not None:
            keys, values = cache.append(keys, values, window)
            mask = window.mask
        dropout = self.dropout if self.training else 0.0
        # is_causal instead of a mask, so that the fused kernels apply. The one query of a cached step attends to all.
        x = F.scaled_dot_product_attention(queries, keys, values, mask, dropout, is_causal=cache is None)
        x = project(self.proj, x.transpose(1, 2).reshape(count, positions, width))  # (N, T, W)
        return F.dropout(x, self.dropout, self.training)


class MLP(nn.Module):
    """Two linear layers with an exact GELU between them; dropout after each."""

    def __init__(self, width: int, hidden: int, dropout: float) -> None:
        super().__init__()
        self.dropout = dropout
        self.fc1 = nn.Linear(width, hidden)
        self.fc2 = nn.Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        """(N, T, W) to (N, T, W)."""
        x = F.dropout(F.gelu(project(self.fc1, x)), self.dropout, self.training)  # (N, T, hidden)
        return F.dropout(project(self.fc2, x), self.dropout, self.training)  # (N, T, W)


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

    def forward(self, x: Tensor, conditions: Tensor) -> Tensor:
        """``x`` (N, T, W) and ``conditions`` (N, T, W): in training every position of every image has its own.

        The modulation is computed here, so that gradient checkpointing need not store that of all blocks.
        """
        return self.modulated(x, self.adaLN_modulation(conditions))

    def modulated(
        self, x: Tensor, modulation: Tensor, cache: KeyValueCache | None = None, window: Window | None = None
    ) -> Tensor:
        """``x`` (N, T, W) and ``modulation`` (N, T, 6W), this block's ``adaLN_modulation`` of the conditions."""
        shift1, scale1, gate1, shift2, scale2, gate2 = modulation.chunk(6, dim=-1)  # each (N, T, W)
        x = x + gate1 * self.attn(modulate(self.norm1(x), shift1, scale1), cache, window)
        return x + gate2 * self.mlp(modulate(self.norm2(x), shift2, scale2))


class FinalNorm(nn.Module):
    """The modulated norm before the head. Its modulation is scale, then shift: the other way round than in blocks."""

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

    Raises:
        UserError: a position or timestep table with fewer than L + 2 rows.
    """

    licence = "Apache-2.0 for the weights of RAR; those of RobusTok were released without a licence"

    def __init__(self, config: RARConfig, codebook_size: int, length: int, classes: int) -> None:
        super().__init__(config, codebook_size, length, classes)
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

    def logits(self, tokens: Tensor, labels: Tensor, orders: Tensor | None = None) -> Tensor:
        """Teacher-forced logits (N, T + 1, K) without the cache; row i predicts the i-th token of the order.

        Args:
            tokens: (N, T) int64: all tokens (T = L; the last row then predicts nothing) or a prefix in raster order.
            labels: (N,) int64; ``null_label`` is the condition "no class" (see :func:`drop_labels`).
            orders: (N, L) int64 (see :func:`draw_orders`), or one for all images (L,); needs T = L; None is raster.
        """
        if orders is not None:
            orders = orders.expand(len(tokens), -1)  # (N, L)
            tokens = tokens.gather(1, orders)  # (N, L), now in the order of prediction
        positions = tokens.shape[1] + 2
        condition = self._condition(labels)[:, None]  # (N, 1, W)
        start = self.cls_token.expand(len(tokens), -1, -1)  # (N, 1, W)
        x = torch.cat([start, condition, self.embeddings(tokens)], dim=1)  # (N, T + 2, W)
        x = x + self._positions(orders)[:, :positions]
        conditions = condition + self.timesteps_embeddings[:, :positions]  # (N, T + 2, W)
        for block in self.blocks:
            x = block(x, conditions)
        final = self.adaln_before_head
        return self.lm_head(final(x, final.adaLN_modulation(conditions)))[:, 1:]

    def _condition(self, labels: Tensor) -> Tensor:
        """Labels (N,) to their embeddings (N, W)."""
        return self.embeddings(labels + self.codebook_size + 1)

    def _positions(self, orders: Tensor | None) -> Tensor:
        """Embeddings of the grid positions of each token and of the next one, for every index of the sequence.

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
        """Modulation of each block (N, T, 6W) and, last, of the final norm (N, T, 2W) by conditions (N, T, W)."""
        conditions = F.silu(conditions)  # once for all
        return [module.adaLN_modulation[1](conditions) for module in (*self.blocks, self.adaln_before_head)]

    def _sequence(self) -> dict[str, Any]:
        heads = (self.config.heads, self.config.width // self.config.heads)
        return {"length": self.length, "first": 1, "heads": heads, "depth": len(self.blocks)}

    def _start(self, labels: Tensor, batch: TokenBatch) -> Iterator[Tensor]:
        # The modulation depends on class and position only. So it is computed once per class, not per image; those of
        # a compiled step are the labels of all images and "no class", because their number must not change.
        device, rows = batch.position.device, self._rows(labels, batch)
        if batch.static:
            classes = rows[: batch.count + 1]
            index = torch.arange(batch.rows).clamp(max=batch.count)
        else:
            classes, index = rows.unique(return_inverse=True)
        batch.hold([self._condition(to_device(classes, device)), to_device(index, device)])
        batch.ahead = None
        start = self.cls_token.expand(batch.rows, -1, -1) + self.pos_embed[:, :1]  # (R, 1, W)
        yield start
        condition = self._condition(to_device(rows, device))[:, None]  # (R, 1, W)
        yield condition + (self.pos_embed[:, 1:2] + self.target_aware_pos_embed[:, 2:3])

    def _inputs(self, batch: TokenBatch) -> Tensor:
        own = self.pos_embed.index_select(1, batch.position)  # (1, 1, W)
        target = self.target_aware_pos_embed.index_select(1, batch.position + 1)  # (1, 1, W)
        return self.embeddings(batch.previous()) + (own + target)

    def _outputs(self, x: Tensor, batch: TokenBatch, end: int) -> Tensor:
        window = batch.window(end)
        if batch.static:
            # With the large batches of a GPU the products of the modulation take as long one position at a time, and
            # the modulations of many positions do not fit into memory.
            classes, rows = batch.conditions
            times = self.timesteps_embeddings[0].index_select(0, batch.position)  # (1, W)
            conditions = F.silu(classes + times)  # (classes, W)
            for block, cache in zip(self.blocks, batch.caches, strict=True):
                x = self._part(_static_block, block, x, conditions, rows, cache, window)
            modulations = [self.adaln_before_head.adaLN_modulation[1](conditions)[rows, None]]
        else:
            modulations = self._class_modulations(batch, end)
            for block, modulation, cache in zip(self.blocks, modulations, batch.caches, strict=False):
                x = block.modulated(x, modulation, cache, window)
        return project(self.lm_head, self.adaln_before_head(x, modulations[-1]))[:, 0]

    def _class_modulations(self, batch: TokenBatch, end: int) -> list[Tensor]:
        """Modulation of each block (R, 1, 6W) and, last, of the final norm (R, 1, 2W) at the present position.

        They are computed for many positions at once: step by step it would read a third of all parameters again for
        every token.
        """
        classes, rows = batch.conditions
        values = max(1, len(classes)) * len(self.blocks) * 6 * self.config.width
        ahead, position = max(1, MODULATION_VALUES // values), end - 1
        if position % ahead == 0:
            times = self.timesteps_embeddings[0, position : min(end - 1 + ahead, self.length + 1), None]
            batch.ahead = self._modulations(classes + times)  # each (ahead, classes, 6W or 2W)
        return [m[position % ahead, rows, None] for m in batch.ahead]


def _static_block(
    block: Block, x: Tensor, conditions: Tensor, rows: Tensor, cache: KeyValueCache, window: Window
) -> Tensor:
    """A block for one position ``x`` (R, 1, W); ``rows`` (R,) chooses among activated ``conditions`` (classes, W)."""
    return block.modulated(x, block.adaLN_modulation[1](conditions)[rows, None], cache, window)


def random_share(step: int, start: int, end: int) -> float:
    """Share of images trained in random order: 1 before ``start``, linear to 0 at ``end``, in steps."""
    if step < start:
        return 1.0
    return 0.0 if step >= end else 1 - (step - start) / (end - start)


def draw_orders(
    count: int, length: int, random_share: float, rng: torch.Generator, rows: slice = slice(None)
) -> Tensor:
    """One order per image: a random permutation with probability ``random_share``, else raster.

    Args:
        count: images in the batch.
        length: L.
        random_share: in [0, 1].
        rng: source of all draws.
        rows: those of the batch that are wanted; the draws are the same for any.

    Returns:
        (N, L) int64 on the device of ``rng``.
    """
    keys = torch.rand(count, length, generator=rng, device=rng.device)[rows]  # (N, L)
    shuffled = torch.rand(count, 1, generator=rng, device=rng.device)[rows] < random_share  # (N, 1)
    raster = torch.arange(length, device=rng.device)
    return torch.where(shuffled, keys.argsort(dim=1, stable=True), raster)  # sorting random keys shuffles all at once


def drop_labels(labels: Tensor, rate: float, null_label: int, rng: torch.Generator) -> Tensor:
    """Replace each label (N,) by ``null_label`` with probability ``rate``: guidance needs a model without class."""
    dropped = torch.rand(labels.shape, generator=rng, device=rng.device) < rate
    return labels.masked_fill(dropped.to(labels.device), null_label)
