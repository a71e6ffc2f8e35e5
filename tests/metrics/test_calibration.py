import math
from dataclasses import dataclass
from functools import partial

import pytest
import torch

from robustok.errors import UserError
from robustok.metrics.calibration import calibrate
from robustok.metrics.frechet import Estimate, GaussianStatistics
from robustok.metrics.kernel import gaussian, kernel_distance, median_distance
from robustok.metrics.noise import CalibratedNoiseGrid, NoiseFD, latent_scale, noised_latents
from robustok.metrics.pfid import PFID, CalibratedGrid, RelativeGrid, perturbed_protocol, perturbed_tokens
from robustok.tokenizers.levels import digits_of
from robustok.tokenizers.perturbation import nearest_codes

SIZE, LENGTH, WIDTH = 64, 16, 3
LEVELS = (4, 4, 4)


def rng(seed):
    return torch.Generator().manual_seed(seed)


GRID = digits_of(torch.arange(SIZE), LEVELS) + 0.1 * torch.randn(SIZE, WIDTH, generator=rng(8))  # without ties


def normal_latents(count, seed):
    """Latents (count, L, D) whose positions go together, as those of images do."""
    mixing = torch.randn(3, LENGTH * WIDTH, generator=rng(9))
    common = torch.randn(count, 3, generator=rng(seed)) @ mixing
    own = torch.randn(count, LENGTH * WIDTH, generator=rng(seed + 1))
    return (common + 0.5 * own).view(count, LENGTH, WIDTH)


def tokens_of_images(count, seed):
    return torch.cdist(0.7 * normal_latents(count, seed) + 1.5, GRID).argmin(-1)


class FirstPixel:
    name, dim = "toy-3", 3

    def __call__(self, pixels):
        return pixels[:, :, 0, 0].float()


def measured(kind, latents, generated, grid, **settings):
    colour = lambda x: (100 + 20 * x).clamp(0, 255).to(torch.uint8).transpose(1, 2)[:, :, None]  # noqa: E731
    decode = (lambda tokens: colour(GRID[tokens])) if kind is PFID else colour
    reference = GaussianStatistics.of(FirstPixel()(decode(latents)))
    given = {"decode": decode, "extractor": FirstPixel(), "reference": reference, "generated": generated}
    return kind(grid=grid, latents=latents, **given, **settings)


@dataclass(frozen=True)
class Shift:
    by: float
    mmd: Estimate | None = None

    @property
    def noise(self):
        return (self.by,)


def test_the_choice_by_hand():
    """Real images at 0, 1, 3 and generated ones at 10, 12, 13, one latent of width 1 each."""
    real, fake = torch.tensor([0.0, 1, 3]), torch.tensor([10.0, 12, 13])
    shape = lambda x: x[:, None, None]  # noqa: E731
    noisy = lambda cell, indices: shape(real[indices] + cell.by)  # noqa: E731
    cells = [Shift(0), Shift(12), Shift(9), Shift(20)]
    found = calibrate(cells, 2, shape(fake), shape(real), noisy, lambda x: x)
    # Distances between the six: 1, 1, 2, 2, 3, 3, 7, 9, 9, 10, 10, 11, 12, 12, 13; the median is 9.
    assert found.bandwidth == 9
    k = lambda a, b: math.exp(-((a - b) ** 2) / 81)  # noqa: E731
    within = lambda xs: (k(xs[0], xs[1]) + k(xs[0], xs[2]) + k(xs[1], xs[2])) / 3  # noqa: E731
    by_hand = []
    for cell in cells:
        moved = [x + cell.by for x in (0.0, 1.0, 3.0)]
        across = sum(k(a, b) for a in moved for b in (10.0, 12.0, 13.0)) / 9
        by_hand.append(within(moved) + within([10.0, 12.0, 13.0]) - 2 * across)
    assert [cell.mmd.value for cell in found.candidates] == pytest.approx(by_hand)
    assert found.unperturbed.value == pytest.approx(by_hand[0])
    assert [cell.by for cell in found.cells] == [12, 9]  # the best two, in the order of the candidates
    details = found.details()
    assert details["mmd_images"] == [3, 3]
    assert details["mmd_candidates"][1][:2] == [12, pytest.approx(by_hand[1])]


@pytest.mark.parametrize("rate", [0.2, 0.9])
@pytest.mark.parametrize("share", [0.05, 0.4])
@pytest.mark.parametrize("levels", [None, LEVELS])
def test_a_known_perturbation_is_found_again(rate, share, levels):
    """The generator's tokens are those of other images, perturbed: its rate and strength have the least MMD."""
    real, others = tokens_of_images(300, 1), tokens_of_images(300, 3)
    near = nearest_codes(GRID, round(share * SIZE), include_self=True, levels=levels)
    generated = perturbed_tokens(others, near, rate, 77, torch.arange(300))
    grid = CalibratedGrid(rates=(0.2, 0.9), shares=(0.05, 0.4), keep=1)
    pfid = measured(PFID, real, generated, grid, codebook=GRID, levels=levels)
    found = pfid.run()
    assert [cell.noise for cell in found.cells] == [(rate, round(share * SIZE))]
    assert found.calibration.unperturbed.value > found.cells[0].mmd.value
    assert found.protocol == "calibrated-custom"
    # The value is that of the same cell in any other grid.
    alone = measured(PFID, real, None, RelativeGrid(rates=(rate,), shares=(share,)), codebook=GRID, levels=levels)
    assert found.mean.value == alone.run().mean.value


def test_a_known_noise_is_found_again():
    latents, others = normal_latents(300, 1) * torch.tensor([1.0, 50.0, 0.1]), normal_latents(300, 3)
    others = others * torch.tensor([1.0, 50.0, 0.1])  # channels of very different size count alike
    generated = noised_latents(others, latent_scale(others), 0.6, 5, torch.arange(300))
    noise = measured(NoiseFD, latents, generated, CalibratedNoiseGrid(levels=(0.3, 0.6, 0.9), keep=1))
    found = noise.run()
    assert [cell.level for cell in found.cells] == [0.6]
    assert found.protocol == "noise-calibrated-custom"
    noisy = noised_latents(latents, noise.scale, 0.6, 0, torch.arange(300))
    noisy, fake, real = (noise.vectors(x).flatten(1) for x in (noisy, generated, latents))
    bandwidth = median_distance(torch.cat([fake, real]), LENGTH)
    assert found.cells[0].mmd == kernel_distance(noisy, fake, partial(gaussian, bandwidth=bandwidth, parts=LENGTH))


def test_candidates_by_default_are_about_those_of_the_paper():
    assert CalibratedGrid().strengths(16384) == (164, 205, 287, 369, 410, 492)
    assert perturbed_protocol(CalibratedGrid(), 16384)["protocol"] == "calibrated"
    assert perturbed_protocol(CalibratedGrid(keep=3), 16384)["protocol"] == "calibrated-custom"


def test_what_cannot_be_chosen():
    real = tokens_of_images(20, 1)
    make = partial(measured, PFID, real, codebook=GRID)
    grid = CalibratedGrid(rates=(0.5,), shares=(0.1, 0.2), keep=2)
    for pfid, says in (
        (make(None, grid), "give generated"),
        (make(real[:, :5], grid), r"\(20, 5\) and \(20, 16\)"),
        (make(real, CalibratedGrid()), "keep is 15, there are 5 cells"),
        (make(real[:2], grid), "at least 3"),
        (measured(PFID, real * 0, real * 0, grid, codebook=GRID), "all the same"),
    ):
        with pytest.raises(UserError, match=says):
            pfid.run()
