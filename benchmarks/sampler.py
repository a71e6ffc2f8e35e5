"""The sampler of RAR, compared with one that works as published RAR samplers do: same weights and random numbers.

    python benchmarks/sampler.py [b|l|xl|xxl] [bf16] [compile]

The baseline has a key-value cache, but at every step it embeds the whole prefix again, repeats and permutes both
position tables for the batch, computes the modulation of every block for every row, and extends its cache by
concatenation. Logits are compared for given tokens, since one different token would change all later ones. The better
of two runs counts, so the time to compile does not. Goal: 3 times faster.
"""

import sys
import time

import torch
import torch.nn.functional as F
from torch import Tensor

from robustok.generators.rar import RAR, RAR_SIZES, Block
from robustok.generators.sampling import Sampling, draw_tokens, guidance_scales, guide
from robustok.generators.tokens import modulate
from robustok.randomness import image_rngs, image_uniforms

SAMPLING = Sampling(guidance_scale=6.0, guidance_power=1.15, temperature=1.02)
IMAGES, TOKENS, CODES, CLASSES = 8, 256, 4096, 1000
REPEATS = 2
POSITION_ROWS, TIMESTEP_ROWS = 1280, 356  # of the published checkpoints


def build(size: str) -> RAR:
    torch.manual_seed(0)
    config = RAR_SIZES[size].model_copy(update={"position_rows": POSITION_ROWS, "timestep_rows": TIMESTEP_ROWS})
    model = RAR(config, CODES, TOKENS, CLASSES).eval()
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
    orders = torch.arange(TOKENS, device=device).repeat(2 * count, 1)
    for step, scale in enumerate(guidance_scales(TOKENS, SAMPLING).tolist()):
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


def draws(model: RAR):
    """A ``choose`` that draws as ``RAR.generate`` does."""
    rngs = image_rngs(0, range(IMAGES))
    image_uniforms(rngs, TOKENS)  # RAR.generate first draws the random numbers of the mixture
    uniforms = image_uniforms(rngs, TOKENS).to(model.cls_token.device)
    return lambda step, logits: draw_tokens(logits, uniforms[:, step], SAMPLING)


def forced(tokens: Tensor, recorded: list[Tensor]):
    """A ``choose`` that records the logits and returns given tokens."""
    return lambda step, logits: (recorded.append(logits.cpu()), tokens[:, step])[1]


def main() -> None:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    size = next((word for word in sys.argv[1:] if word in RAR_SIZES), "b")
    model = build(size).to(device)
    if "compile" in sys.argv:
        model.compile_sampling()
    labels = (torch.arange(IMAGES) * 37 % CLASSES).to(device)
    seconds = {"ours": [], "plain": []}
    # CPU time of this process, so that other load on the machine does not matter.
    clock = time.perf_counter if device == "cuda" else time.process_time
    with torch.autocast(device, torch.bfloat16, enabled="bf16" in sys.argv):
        for _ in range(REPEATS):  # in turns, so that other load on the machine affects both
            for name, sample in (
                ("ours", lambda: model.generate(labels, SAMPLING, image_rngs(0, range(IMAGES)))),
                ("plain", lambda: plain_sampler(model, labels, draws(model))),
            ):
                start = clock()
                sample()
                if device == "cuda":
                    torch.cuda.synchronize()
                seconds[name].append(clock() - start)
        tokens = torch.randint(CODES, (IMAGES, TOKENS), generator=torch.Generator().manual_seed(1)).to(device)
        ours, plain = [], []
        with torch.no_grad():
            model._sample(labels, SAMPLING, forced(tokens, ours))
        plain_sampler(model, labels, forced(tokens, plain))
    apart = max((a - b).abs().max().item() for a, b in zip(ours, plain, strict=True))
    best = {name: min(values) for name, values in seconds.items()}
    print(
        f"RAR-{size.upper()}, {IMAGES} images of {TOKENS} tokens, guided, {device}, {torch.get_num_threads()} threads"
    )
    print(f"ours {best['ours']:.1f} s, plain {best['plain']:.1f} s of {clock.__name__}")
    print(f"guided logits differ by at most {apart:.1e}")
    print(f"ratio {best['plain'] / best['ours']:.2f} (goal >= 3)")


if __name__ == "__main__":
    main()
