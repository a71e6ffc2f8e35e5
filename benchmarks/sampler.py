"""The sampler of RAR, compared with one that works as published RAR samplers do: same weights and random numbers.

    python benchmarks/sampler.py
    python benchmarks/sampler.py --size l --precision bf16 --images 64 --device cuda --compile

The baseline has a key-value cache, but at every step it embeds the whole prefix again, repeats and permutes both
position tables for the batch, computes the modulation of every block for every row, and extends its cache by
concatenation. Logits are compared for given tokens, since one different token would change all later ones. Both run in
turns; each pair of runs gives a ratio, after a first run on a GPU, which compiles. On a CPU the time is that of this
process on all its cores, so that other load matters less. Goal: 3 times faster.
"""

import copy
import statistics

import torch
import torch.nn.functional as F
from torch import Tensor

from robustok.generators.rar import RAR, RAR_SIZES, Block
from robustok.generators.sampling import Sampling, draw_tokens, guidance_scales, guide
from robustok.generators.tokens import modulate
from robustok.precision import cast_weights
from robustok.randomness import image_rngs, image_uniforms
from timing import arguments, measure

SAMPLING = Sampling(guidance_scale=6.0, guidance_power=1.15, temperature=1.02)
CODES, CLASSES = 4096, 1000
POSITION_ROWS, TIMESTEP_ROWS = 1280, 356  # of the published checkpoints


def build(size: str, tokens: int = 256, depth: int | None = None) -> RAR:
    torch.manual_seed(0)
    changes = {"position_rows": POSITION_ROWS, "timestep_rows": TIMESTEP_ROWS, "depth": depth or RAR_SIZES[size].depth}
    model = RAR(RAR_SIZES[size].model_copy(update=changes), CODES, tokens, CLASSES).eval().requires_grad_(False)
    for block in (*model.blocks, model.adaln_before_head):  # a new model's blocks are identities, which hides errors
        torch.nn.init.normal_(block.adaLN_modulation[1].weight, std=0.02)
    return model


class GrowingCache:
    """Keys and values, extended by concatenation at every step."""

    def __init__(self) -> None:
        self.keys, self.values = None, None

    def append(self, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values of all positions so far."""
        if self.keys is not None:
            keys, values = torch.cat([self.keys, keys], dim=2), torch.cat([self.values, values], dim=2)
        self.keys, self.values = keys, values
        return keys, values


def attend(block: Block, x: Tensor, cache: GrowingCache) -> Tensor:
    attention = block.attn
    count, positions, width = x.shape
    qkv = attention.qkv(x).view(count, positions, 3, attention.heads, -1).permute(2, 0, 3, 1, 4)
    queries, (keys, values) = attention.q_norm(qkv[0]), cache.append(attention.k_norm(qkv[1]), qkv[2])
    past = keys.shape[2] - positions
    mask = torch.full((positions, keys.shape[2]), -torch.inf).triu(1 + past)  # (T, T + past)
    x = F.scaled_dot_product_attention(queries, keys, values, attn_mask=mask.to(queries.dtype))
    return attention.proj(x.transpose(1, 2).reshape(count, positions, width))


@torch.no_grad()
def plain_sampler(model: RAR, labels: Tensor, choose) -> None:
    """The baseline; ``choose(step, guided logits)`` gives the tokens (N,)."""
    count, device = len(labels), labels.device
    both = torch.cat([labels, torch.full_like(labels, model.null_label)])  # (2N,)
    caches = [GrowingCache() for _ in model.blocks]
    tokens = torch.empty(count, 0, dtype=torch.int64, device=device)
    orders = torch.arange(model.length, device=device).repeat(2 * count, 1)
    for step, scale in enumerate(guidance_scales(model.length, SAMPLING).tolist()):
        condition = model.embeddings(both + CODES + 1)[:, None]
        x = torch.cat([model.cls_token.expand(2 * count, -1, -1), condition, model.embeddings(tokens.repeat(2, 1))], 1)
        positions, targets = (t.repeat(2 * count, 1, 1) for t in (model.pos_embed, model.target_aware_pos_embed))
        index = (orders + 2)[..., None].expand(-1, -1, x.shape[-1])
        own = torch.cat([positions[:, :2], positions.gather(1, index)], 1)
        target = F.pad(targets.gather(1, index), (0, 0, 1, 1))
        x = x + own[:, : x.shape[1]] + target[:, : x.shape[1]]
        conditions = condition + model.timesteps_embeddings[:, : x.shape[1]]
        new = 2 if step == 0 else 1
        x, conditions = x[:, -new:], conditions[:, -new:]
        for block, cache in zip(model.blocks, caches, strict=True):
            shift1, scale1, gate1, shift2, scale2, gate2 = block.adaLN_modulation(conditions).chunk(6, dim=-1)
            x = x + gate1 * attend(block, modulate(block.norm1(x), shift1, scale1), cache)
            x = x + gate2 * block.mlp(modulate(block.norm2(x), shift2, scale2))
        x = model.adaln_before_head(x, model.adaln_before_head.adaLN_modulation(conditions))
        logits = model.lm_head(x)[:, -1].float()
        tokens = torch.cat([tokens, choose(step, guide(logits[:count], logits[count:], scale))[:, None]], 1)


def draws(images: int, length: int, device: str):
    """A ``choose`` that draws as ``RAR.generate`` does."""
    rngs = image_rngs(0, range(images))
    image_uniforms(rngs, length)  # RAR.generate first draws the random numbers of the mixture
    uniforms = image_uniforms(rngs, length).to(device)
    return lambda step, logits: draw_tokens(logits, uniforms[:, step], SAMPLING)


def forced(tokens: Tensor, recorded: list[Tensor]):
    """A ``choose`` that records the logits and returns given tokens."""
    return lambda step, logits: (recorded.append(logits), tokens[:, step])[1]


def main() -> None:
    words = arguments(__doc__)
    words.add_argument("--size", choices=list(RAR_SIZES), default="b")
    words.add_argument("--depth", type=int, help="blocks, if not those of the size")
    words.add_argument("--tokens", type=int, default=256)
    words.add_argument("--images", type=int, default=8)
    words.add_argument("--precision", choices=["float32", "bf16"], default="float32")
    words.add_argument("--compile", action="store_true", help="compile our sampling step")
    words.add_argument("--runs", type=int, default=2, help="of each of the two")
    words.add_argument("--threads", type=int, default=torch.get_num_threads())
    given = words.parse_args()
    torch.set_num_threads(given.threads)
    device, count, model = given.device, given.images, build(given.size, given.tokens, given.depth).to(given.device)
    ours_model = cast_weights(copy.deepcopy(model), given.precision)  # as the commands do it
    labels = torch.arange(count) * 37 % CLASSES
    there = labels.to(device)
    with torch.autocast(device, torch.bfloat16, enabled=given.precision == "bf16"):
        tokens = torch.randint(CODES, (count, model.length), generator=torch.Generator().manual_seed(1)).to(device)
        ours, plain = ours_model.cached_logits(tokens, labels, SAMPLING), []
        plain_sampler(model, there, forced(tokens, plain))
        apart = (ours - torch.stack(plain, 1)).abs().max().item()
        del ours, plain
        if given.compile:
            ours_model.compile_sampling()
        samplers = {
            "ours": lambda: ours_model.generate(labels, SAMPLING, image_rngs(0, range(count))),
            "plain": lambda: plain_sampler(model, there, draws(count, model.length, device)),
        }
        if given.compile or device == "cuda":
            for _ in range(2):  # compiles, records a CUDA graph
                samplers["ours"]()
        print(
            f"RAR-{given.size.upper()}, {len(model.blocks)} blocks, {count} images of {model.length} tokens, guided, "
            f"{given.precision}, {device}, {given.threads} threads"
        )
        print(f"guided logits differ by at most {apart:.1e}", flush=True)
        pairs = []
        for _ in range(given.runs):
            pairs.append({name: measure(sample, device)[1] for name, sample in samplers.items()})
            costs = (f"{name} {cost.seconds:.2f} s, peak {cost.peak:.1f} GB" for name, cost in pairs[-1].items())
            print("   ".join(costs), flush=True)
    ratios = [pair["plain"].seconds / pair["ours"].seconds for pair in pairs]
    print(f"ratios {', '.join(f'{r:.2f}' for r in ratios)}; median {statistics.median(ratios):.2f} (goal >= 3)")


if __name__ == "__main__":
    main()
