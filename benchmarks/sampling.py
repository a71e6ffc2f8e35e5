"""Guided sampling of 256 tokens with and without a key-value cache: same model, same random numbers, same process.

    python benchmarks/sampling.py

Without a cache the whole prefix runs through the model at every step. Goal: at least 8 times faster with the cache.
"""

import torch

from robustok.generators.rar import RAR, RARConfig
from robustok.generators.sampling import Sampling, draw_tokens, guidance_scales, guide
from robustok.randomness import image_rngs, image_uniforms
from timing import arguments, measure

SAMPLING = Sampling(guidance_scale=4.0, guidance_power=1.15)
IMAGES, TOKENS, CODEBOOK_SIZE, CLASSES = 2, 256, 4096, 1000


def build() -> RAR:
    torch.manual_seed(0)
    config = RARConfig(width=256, depth=6, heads=8)
    model = RAR(config, CODEBOOK_SIZE, TOKENS, CLASSES).eval()
    for parameter in model.parameters():  # a new model's blocks are identities, which hides errors
        torch.nn.init.normal_(parameter, std=0.05)
    return model


@torch.no_grad()
def sample_uncached(model: RAR, labels: torch.Tensor) -> torch.Tensor:
    rngs = image_rngs(0, range(len(labels)))
    image_uniforms(rngs, TOKENS)  # RAR.generate first draws the random numbers of the mixture
    device = model.cls_token.device
    uniforms = image_uniforms(rngs, TOKENS).to(device)
    both = torch.cat([labels, torch.full_like(labels, model.null_label)]).to(device)
    tokens = torch.empty(len(labels), 0, dtype=torch.int64, device=device)
    for step, scale in enumerate(guidance_scales(TOKENS, SAMPLING).tolist()):
        conditional, unconditional = model.logits(tokens.repeat(2, 1), both)[:, -1].chunk(2)
        chosen = draw_tokens(guide(conditional, unconditional, scale), uniforms[:, step], SAMPLING)
        tokens = torch.cat([tokens, chosen[:, None]], dim=1)
    return tokens


def main() -> None:
    device = arguments(__doc__).parse_args().device
    model, labels = build().to(device), torch.arange(IMAGES) * 7
    cached, own = measure(lambda: model.generate(labels, SAMPLING, image_rngs(0, range(IMAGES))), device)
    uncached, other = measure(lambda: sample_uncached(model, labels), device)
    same = (cached == uncached).float().mean().item()
    print(f"sampling {IMAGES} images of {TOKENS} tokens, width 256, depth 6, guided, {torch.get_num_threads()} threads")
    print(f"{device}; cached {own}; uncached {other}; same tokens {same:.1%}")
    print(f"ratio {other.seconds / own.seconds:.1f} (goal >= 8)")


if __name__ == "__main__":
    main()
