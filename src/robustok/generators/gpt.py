"""GPT, the raster-order autoregressive generator of tokens: LlamaGen's and GigaTok's.

Source: Sun et al., "Autoregressive Model Beats Diffusion: Llama for Scalable Image Generation" (arXiv 2406.06525), and
Xiong et al., "GigaTok" (arXiv 2504.08736). A causal transformer of the Llama kind reads ``[class, token, token, ...]``
and predicts the next token. LlamaGen's tokens form a grid and have rotary positions in two dimensions; GigaTok's form a
sequence and have learned positions, and its larger models add adaptive norms and norms of queries and keys.

Parameters have the names of the authors' code, so that its checkpoints load as they are.
"""

import math
from collections.abc import Iterator
from typing import Any, Literal

import torch
import torch.nn.functional as F
from pydantic import Field, model_validator
from torch import Tensor, nn

from robustok.config import Config
from robustok.devices import to_device
from robustok.errors import UserError
from robustok.generators.key_value_cache import KeyValueCache, Window
from robustok.generators.token_batch import TokenBatch
from robustok.generators.tokens import TokenGenerator, initialise, modulate, project

QUERY_KEY_NORM_EPSILON = 1e-5


class GPTConfig(Config):
    """Size and variant of a GPT generator. The defaults are LlamaGen's GPT-B."""

    name: Literal["gpt"] = "gpt"
    width: int = Field(768, gt=0, description="width of the transformer, a multiple of heads")
    depth: int = Field(12, gt=0, description="number of transformer blocks")
    heads: int = Field(12, gt=0, description="attention heads; must divide width")
    kv_heads: int | None = Field(None, gt=0, description="heads of keys and values; default: heads, which they divide")
    mlp_width: int | None = Field(
        None, gt=0, description="hidden width of the MLP; default: 8/3 widths, rounded up to a multiple of 256"
    )
    positions: Literal["rotary", "learned"] = Field(
        "rotary", description="rotary: row and column of a square grid (LlamaGen); learned: a sequence (GigaTok)"
    )
    rotary_base: float = Field(10_000.0, gt=1, description="the longest wave of rotary positions, in 2 pi tokens")
    adaptive_norm: bool = Field(False, description="the class shifts, scales and gates every block (adaLN)")
    query_key_norm: bool = Field(False, description="layer norm of the queries and keys of each head")
    norm_epsilon: float = Field(1e-5, gt=0, description="epsilon of the RMS norms")
    dropout: float = Field(0.1, ge=0, lt=1, description="dropout of inputs, projections and MLP, in training")
    label_dropout: float = Field(0.1, ge=0, le=1, description="share of training labels dropped, for guidance")

    @model_validator(mode="after")
    def _heads_fit(self) -> "GPTConfig":
        if self.width % self.heads:
            raise ValueError(f"heads {self.heads} do not divide width {self.width}; choose a divisor")
        if self.kv_heads is not None and self.heads % self.kv_heads:
            raise ValueError(f"kv_heads {self.kv_heads} do not divide heads {self.heads}; choose a divisor")
        if self.positions == "rotary" and self.head_width % 4:
            raise ValueError(f"rotary positions need heads of a multiple of 4 in width, these have {self.head_width}")
        return self

    @property
    def head_width(self) -> int:
        """Width of one attention head."""
        return self.width // self.heads

    @property
    def hidden(self) -> int:
        """Hidden width of the MLP."""
        return self.mlp_width or 256 * math.ceil(int(8 * self.width / 3) / 256)


GPT_SIZES = {
    "b": GPTConfig(width=768, depth=12, heads=12),
    "l": GPTConfig(width=1024, depth=24, heads=16),
    "xl": GPTConfig(width=1280, depth=36, heads=20),
    "xxl": GPTConfig(width=1536, depth=48, heads=24),
    "3b": GPTConfig(width=3200, depth=24, heads=32),
}
"""The sizes of LlamaGen, which GigaTok shares up to XXL."""


class Attention(nn.Module):
    """Causal self-attention with rotary positions or a norm of queries and keys, as the configuration asks."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.heads, self.kv_heads, self.head_width = config.heads, config.kv_heads or config.heads, config.head_width
        self.dropout = config.dropout
        self.wqkv = nn.Linear(config.width, (self.heads + 2 * self.kv_heads) * self.head_width, bias=False)
        self.wo = nn.Linear(config.width, config.width, bias=False)
        normed = config.query_key_norm
        self.q_norm = nn.LayerNorm(self.head_width, eps=QUERY_KEY_NORM_EPSILON) if normed else nn.Identity()
        self.k_norm = nn.LayerNorm(self.head_width, eps=QUERY_KEY_NORM_EPSILON) if normed else nn.Identity()

    def forward(
        self, x: Tensor, rotation: Tensor | None, cache: KeyValueCache | None = None, window: Window | None = None
    ) -> Tensor:
        """Attend from every position of ``x`` (N, T, W) to itself and those before it.

        With a cache, ``x`` is one new position (T = 1) that attends to itself and to the cached ones of the window.
        ``rotation`` (2, T, head width / 2) holds the cosines and sines of the positions.
        """
        x = project(self.wqkv, x).unflatten(-1, (-1, self.head_width)).transpose(1, 2)  # (N, all heads, T, head width)
        queries, keys, values = x.split([self.heads, self.kv_heads, self.kv_heads], dim=1)
        queries, keys = self.q_norm(queries), self.k_norm(keys)
        if rotation is not None:
            queries, keys = rotate(queries, rotation), rotate(keys, rotation)
        # Norms and tables are float32 under autocast; back to one dtype for the cache and for the attention kernel.
        queries, keys = queries.to(values.dtype), keys.to(values.dtype)
        mask = None
        if cache is not None:
            keys, values = cache.append(keys, values, window)
            mask = window.mask
        # is_causal instead of a mask, so that the fused kernels apply. The one query of a cached step attends to all.
        x = F.scaled_dot_product_attention(
            queries, keys, values, mask, is_causal=cache is None, enable_gqa=self.kv_heads != self.heads
        )
        x = project(self.wo, x.transpose(1, 2).flatten(2))  # (N, T, W)
        return F.dropout(x, self.dropout, self.training)


class FeedForward(nn.Module):
    """SwiGLU: the product of two linear layers, projected by a third; dropout at the end."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.dropout = config.dropout
        self.w1 = nn.Linear(config.width, config.hidden, bias=False)
        self.w3 = nn.Linear(config.width, config.hidden, bias=False)
        self.w2 = nn.Linear(config.hidden, config.width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """(N, T, W) to (N, T, W)."""
        x = F.silu(project(self.w1, x)) * project(self.w3, x)  # (N, T, hidden)
        return F.dropout(project(self.w2, x), self.dropout, self.training)


class Block(nn.Module):
    """A transformer block; with adaptive norms its branches are shifted, scaled and gated by the class."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.attention = Attention(config)
        self.feed_forward = FeedForward(config)
        self.attention_norm = nn.RMSNorm(config.width, eps=config.norm_epsilon)
        self.ffn_norm = nn.RMSNorm(config.width, eps=config.norm_epsilon)
        if config.adaptive_norm:
            self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(config.width, 6 * config.width))

    def forward(
        self,
        x: Tensor,
        modulation: Tensor | None,
        rotation: Tensor | None,
        cache: KeyValueCache | None = None,
        window: Window | None = None,
    ) -> Tensor:
        """``x`` (N, T, W) and ``modulation`` (N, 1, 6W), this block's ``adaLN_modulation`` of the class."""
        if modulation is None:
            x = x + self.attention(self.attention_norm(x), rotation, cache, window)
            return x + self.feed_forward(self.ffn_norm(x))
        shift1, scale1, gate1, shift2, scale2, gate2 = modulation.chunk(6, dim=-1)  # each (N, 1, W)
        x = x + gate1 * self.attention(modulate(self.attention_norm(x), shift1, scale1), rotation, cache, window)
        return x + gate2 * self.feed_forward(modulate(self.ffn_norm(x), shift2, scale2))


class GPT(TokenGenerator):
    """Class-conditional generator of tokens in raster order.

    Args:
        config: size and variant of the transformer.
        codebook_size: K.
        length: L, tokens per image.
        classes: number of classes.

    Raises:
        UserError: rotary positions with a number of tokens that is no square.
    """

    licence = "MIT"

    def __init__(self, config: GPTConfig, codebook_size: int, length: int, classes: int) -> None:
        super().__init__(config, codebook_size, length, classes)
        self.tok_embeddings = nn.Embedding(codebook_size, config.width)
        self.cls_embedding = nn.ModuleDict({"embedding_table": nn.Embedding(classes + 1, config.width)})
        rotation = positional_embedding = None
        if config.positions == "rotary":
            rotation = rotary_table(length, config.head_width, config.rotary_base)
        else:
            positional_embedding = nn.Parameter(torch.empty(1 + length, config.width))
        self.positional_embedding = positional_embedding  # (1 + L, W): the class, then the tokens
        self.register_buffer("rotation", rotation, persistent=False)  # (2, 1 + L, head width / 2)
        self.layers = nn.ModuleList(Block(config) for _ in range(config.depth))
        self.norm = nn.RMSNorm(config.width, eps=config.norm_epsilon)
        if config.adaptive_norm:
            self.final_adaLN = nn.Sequential(nn.SiLU(), nn.Linear(config.width, 2 * config.width))
        self.output = nn.Linear(config.width, codebook_size, bias=False)
        self._initialise()

    def _initialise(self) -> None:
        self.apply(initialise)
        if self.positional_embedding is not None:
            nn.init.trunc_normal_(self.positional_embedding, std=0.02)
        if self.config.adaptive_norm:
            for modulation in (*(layer.adaLN_modulation for layer in self.layers), self.final_adaLN):
                nn.init.zeros_(modulation[1].weight)  # every block starts as the identity

    def logits(self, tokens: Tensor, labels: Tensor, orders: Tensor | None = None) -> Tensor:
        """Teacher-forced logits (N, T + 1, K) without the cache; row i predicts token i.

        Args:
            tokens: (N, T) int64, T <= L: all tokens (the last row then predicts nothing) or the first ones.
            labels: (N,) int64.
            orders: None, or raster order for every image, the only one this generator supports.

        Raises:
            UserError: another order.
        """
        if orders is not None and bool((orders != torch.arange(self.length, device=orders.device)).any()):
            raise UserError("a gpt generator visits tokens in raster order only; set random_until=0 raster_from=0")
        condition = self._condition(labels)  # (N, 1, W)
        x = torch.cat([condition, self._embed(tokens)], dim=1)  # (N, T + 1, W)
        x = F.dropout(x, self.config.dropout, self.training)
        rotation = None if self.rotation is None else self.rotation[:, : x.shape[1]]
        return self._transform(x, self._modulations(condition), rotation)

    def _condition(self, labels: Tensor) -> Tensor:
        """Labels (N,) to the first input of the sequence (N, 1, W)."""
        condition = self.cls_embedding["embedding_table"](labels)[:, None]  # (N, 1, W)
        return condition if self.positional_embedding is None else condition + self.positional_embedding[:1]

    def _embed(self, tokens: Tensor) -> Tensor:
        """The first tokens of an image (N, T) to inputs (N, T, W)."""
        x = self.tok_embeddings(tokens)  # (N, T, W)
        return x if self.positional_embedding is None else x + self.positional_embedding[1 : 1 + tokens.shape[1]]

    def _modulations(self, condition: Tensor) -> list[Tensor | None]:
        """Modulation of each block (N, 1, 6W) and, last, of the final norm (N, 1, 2W) by the class (N, 1, W)."""
        if not self.config.adaptive_norm:
            return [None] * (len(self.layers) + 1)
        return [*(layer.adaLN_modulation(condition) for layer in self.layers), self.final_adaLN(condition)]

    def _transform(
        self,
        x: Tensor,
        modulations: list[Tensor | None],
        rotation: Tensor | None,
        caches: list[KeyValueCache] | None = None,
        window: Window | None = None,
    ) -> Tensor:
        """Inputs (N, T, W) through the blocks and the head to logits (N, T, K)."""
        for i, layer in enumerate(self.layers):
            if caches is None:
                x = layer(x, modulations[i], rotation)
            else:
                x = self._part(Block.forward, layer, x, modulations[i], rotation, caches[i], window)
        x = self.norm(x)
        if modulations[-1] is not None:
            x = modulate(x, *modulations[-1].chunk(2, dim=-1))
        return project(self.output, x)

    def _sequence(self) -> dict[str, Any]:
        config = self.config
        heads = (config.kv_heads or config.heads, config.head_width)
        return {"length": self.length, "first": 0, "heads": heads, "depth": len(self.layers)}

    def _start(self, labels: Tensor, batch: TokenBatch) -> Iterator[Tensor]:
        condition = self._condition(to_device(self._rows(labels, batch), batch.position.device))  # (R, 1, W)
        if self.config.adaptive_norm:
            batch.hold(self._modulations(condition))
        yield condition

    def _inputs(self, batch: TokenBatch) -> Tensor:
        x = self.tok_embeddings(batch.previous())  # (R, 1, W)
        if self.positional_embedding is None:
            return x
        return x + self.positional_embedding.index_select(0, batch.position)

    def _outputs(self, x: Tensor, batch: TokenBatch, end: int) -> Tensor:
        modulations = batch.conditions or [None] * (len(self.layers) + 1)
        rotation = None if self.rotation is None else self.rotation.index_select(1, batch.position)
        return self._transform(x, modulations, rotation, batch.caches, batch.window(end))[:, 0]

    def check(self, latents: Tensor | None = None) -> list[str]:
        """Sentences on what is wrong with the class embeddings or the sampling settings; empty if nothing is."""
        problems = []
        table = self.cls_embedding["embedding_table"].weight
        null, others = table[self.null_label], table[: self.classes]
        if not null.any() or bool((others == null).all(1).any()):
            problems.append(
                f"Row {self.null_label} of the table of classes, the row of no class, is zero or repeats a "
                "class; guidance needs a model trained with dropped labels."
            )
        if not self.sampling.guided:
            problems.append("No guidance scale is set; published results of LlamaGen and GigaTok use 1.65 to 2.")
        return problems


def rotary_table(length: int, head_width: int, base: float) -> Tensor:
    """Cosines and sines for the position of the class, followed by a square grid of tokens.

    The first half of a head's pairs rotates by the row, the second by the column. The class has zeros for both, as in
    the authors' code: its queries and keys vanish.

    Returns:
        (2, 1 + L, head width / 2) float32.

    Raises:
        UserError: the tokens form no square.
    """
    side = math.isqrt(length)
    if side**2 != length:
        raise UserError(f"rotary positions need a square grid, got {length} tokens per image; set positions=learned")
    half = head_width // 2
    angles = torch.outer(torch.arange(side), base ** (-torch.arange(0, half, 2) / half))  # (side, half / 2)
    rows, columns = angles[:, None].expand(-1, side, -1), angles[None].expand(side, -1, -1)
    grid = torch.cat([rows, columns], dim=-1).flatten(0, 1)  # (L, half)
    return F.pad(torch.stack([grid.cos(), grid.sin()]), (0, 0, 1, 0))  # (2, 1 + L, half)


def rotate(x: Tensor, rotation: Tensor) -> Tensor:
    """Rotate neighbouring pairs of ``x`` (..., T, D) by angles whose cosines and sines are (2, T, D / 2)."""
    cosines, sines = rotation
    even, odd = x.unflatten(-1, (-1, 2)).unbind(-1)  # each (..., T, D / 2)
    return torch.stack([even * cosines - odd * sines, odd * cosines + even * sines], dim=-1).flatten(-2)
