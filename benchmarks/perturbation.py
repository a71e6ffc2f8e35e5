"""The cost of latent perturbation: as a share of a main-training step, and compared with ranking all codes.

    python benchmarks/perturbation.py

256 tokens x 32 images, 4,096 codes of width 64, strength 100, proportion 0.1. The baseline ranks all codes by distance
for every token of the batch, although only a tenth of the images is perturbed. The authors' code ranks only the
nearest 100; that is timed too. Goals: under 1 % of a step, 50 times faster than ranking all codes.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F

from robustok.tokenizers.perturbation import PerturbationConfig, draw_perturbation, perturb_latents, straight_through
from robustok.tokenizers.quantizer import QuantizerConfig
from robustok.tokenizers.robustok import RobusTok, RobusTokConfig, ViTConfig
from robustok.training.common import average_copy, update_average
from timing import arguments, median

IMAGES, TOKENS, CODES, WIDTH = 32, 256, 4096, 64
CONFIG = PerturbationConfig(rate=1.0, proportion=0.1, strength=100)


def training_step(device: str) -> Callable[[], object]:
    """A small step of main training: width 384, depth 6, without adversary and teacher."""
    vit = ViTConfig(width=384, depth=6, heads=6)
    model = RobusTok(RobusTokConfig(encoder=vit, decoder=vit, quantizer=QuantizerConfig(size=CODES, dim=WIDTH)))
    model = model.train().to(device)
    average, optimizer = average_copy(model), torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
    images, rng = torch.rand(IMAGES, 3, 256, 256, device=device) * 2 - 1, torch.Generator().manual_seed(0)

    def step() -> None:
        draw = draw_perturbation(IMAGES, TOKENS, CONFIG.rate, CONFIG.proportion, rng)
        output = model(images, CONFIG, draw, CONFIG.strength)
        loss = F.mse_loss(output.reconstructions, images) + output.codebook_loss + 0.25 * output.commitment_loss
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        update_average(average, model, 0.999)

    return step


def ranking(
    features: torch.Tensor, tokens: torch.Tensor, codebook: torch.Tensor, rng: torch.Generator, whole: bool
) -> torch.Tensor:
    """Rank the codes for all tokens of the batch, all codes (``whole``) or the nearest ``strength``, then choose."""
    z = features.flatten(0, 1)  # (N * L, D)
    distances = z.square().sum(1, keepdim=True) + codebook.square().sum(1) - 2 * z @ codebook.T  # (N * L, K)
    delta = CONFIG.strength
    near = distances.argsort(1)[:, :delta] if whole else distances.topk(delta, largest=False, sorted=True).indices
    ranks = torch.randint(delta, (len(z), 1), generator=rng)
    ranks[torch.rand(len(z), 1, generator=rng) > CONFIG.rate] = 0
    ranks = ranks.to(z.device)
    perturbed = straight_through(features, codebook[near.gather(1, ranks)[:, 0]].view_as(features))
    chosen = int(CONFIG.proportion * len(features))
    return torch.cat([perturbed[:chosen], straight_through(features, codebook[tokens])[chosen:]])


@torch.no_grad()
def main() -> None:
    device = arguments(__doc__).parse_args().device
    torch.manual_seed(0)
    features = F.normalize(torch.randn(IMAGES, TOKENS, WIDTH), dim=-1).to(device)
    codebook = F.normalize(torch.randn(CODES, WIDTH), dim=-1).to(device)
    tokens, rng = (features @ codebook.T).argmax(-1), torch.Generator().manual_seed(0)

    def ours() -> None:
        draw = draw_perturbation(IMAGES, TOKENS, CONFIG.rate, CONFIG.proportion, rng)
        perturb_latents(features, tokens, codebook, draw, CONFIG.strength, CONFIG)

    where = f"{device}, {torch.get_num_threads()} threads"
    print(f"{IMAGES} images x {TOKENS} tokens, {CODES} codes x {WIDTH}, strength 100, proportion 0.1, {where}")
    own = median(ours, 20, device)
    print(f"{'perturbation':<35} {own}")
    for name, goal in (("ranking all codes", " (goal >= 50)"), ("nearest 100, sorted (authors)", "")):
        other = median(lambda goal=goal: ranking(features, tokens, codebook, rng, whole=bool(goal)), 3, device)
        print(f"{name:<35} {other}, ratio {other.seconds / own.seconds:.1f}{goal}")
    with torch.enable_grad():
        step = median(training_step(device), 1, device)
    share = f", share {own.seconds / step.seconds:.3%} (goal < 1 %)"
    print(f"{'training step, width 384, depth 6':<35} {step}{share}")


if __name__ == "__main__":
    main()
