import math

import pytest
import torch

from robustok.errors import UserError
from robustok.metrics.frechet import GaussianStatistics, frechet_distance
from robustok.metrics.noise import NoiseFD, NoiseGrid, latent_scale, noised_latents
from robustok.metrics.processes import Processes

IMAGES, LENGTH, WIDTH = 30, 5, 3
CHANNELS = torch.tensor([0.1, 1.0, 20.0])  # channels of very different size
LATENTS = torch.randn(IMAGES, LENGTH, WIDTH, generator=torch.Generator().manual_seed(0)) * CHANNELS + CHANNELS


class FirstPixel:
    """A toy feature space: the colour of the first pixel."""

    name, dim = "toy-3", 3

    def __call__(self, pixels):
        assert pixels.dtype == torch.uint8
        return pixels[:, :, 0, 0].float()


def decode(latents):
    """One pixel for each latent, its channels scaled to alike colours."""
    return (128 + 30 * (latents / CHANNELS - 1)).clamp(0, 255).to(torch.uint8).transpose(1, 2)[:, :, None]


def reference():
    return GaussianStatistics.of(FirstPixel()(decode(LATENTS)))


def measure(levels=(0.0, 0.5), latents=LATENTS, decode=decode, **options):
    given = dict(latents=latents, decode=decode, extractor=FirstPixel(), reference=reference())
    return NoiseFD(grid=NoiseGrid(levels=levels), **given, **options).run()


def test_scale_is_the_standard_deviation_of_each_channel():
    assert torch.allclose(latent_scale(LATENTS), LATENTS.double().flatten(0, 1).std(dim=0), rtol=1e-12)
    shifted = LATENTS + 1e4  # float32 sums of squares would lose it
    assert torch.allclose(latent_scale(shifted), shifted.double().flatten(0, 1).std(dim=0), rtol=1e-9)
    for wrong in (LATENTS.long(), LATENTS[0], torch.full((2, 2, 2), math.nan)):
        with pytest.raises(UserError, match=r"\(N, L, D\)|not finite"):
            latent_scale(wrong)


def test_noise_has_the_stated_spread_in_every_channel():
    latents = torch.zeros(4000, LENGTH, WIDTH)
    noise = noised_latents(latents, CHANNELS.double(), 0.3, 0, torch.arange(4000))
    error = 1 / math.sqrt(2 * 4000 * LENGTH)
    assert (noise.flatten(0, 1).std(dim=0) / (0.3 * CHANNELS) - 1).abs().max() < 4 * error
    assert (noise.flatten(0, 1).mean(dim=0) / (0.3 * CHANNELS)).abs().max() < 4 / math.sqrt(4000 * LENGTH)
    assert torch.corrcoef(noise[:, :2].flatten(1).T).fill_diagonal_(0).abs().max() < 4.5 / math.sqrt(4000)


def test_noise_of_an_image_is_its_own():
    indices = torch.tensor([7, 2, 29])
    alone = torch.cat([noised_latents(LATENTS, CHANNELS, 0.2, 1, index[None]) for index in indices])
    assert torch.equal(noised_latents(LATENTS, CHANNELS, 0.2, 1, indices), alone)
    assert not torch.equal(noised_latents(LATENTS, CHANNELS, 0.2, 2, indices), alone)


def test_cells_match_a_plain_loop_and_no_noise_is_the_reconstruction():
    found = measure((0.0, 0.5), seeds=(0, 1), batch_size=8)
    scale, values = LATENTS.double().flatten(0, 1).std(dim=0), []
    for seed in (0, 1):
        noisy = [noised_latents(LATENTS, scale, 0.5, seed, torch.tensor([i])) for i in range(IMAGES)]
        features = torch.cat([FirstPixel()(decode(image)) for image in noisy])
        values.append(frechet_distance(GaussianStatistics.of(features), reference()))
    clean, half = found.cells
    assert clean.value == pytest.approx(0, abs=1e-9)
    assert (half.level, half.value) == (0.5, pytest.approx(sum(values) / 2))
    assert half.standard_error == pytest.approx(abs(values[0] - values[1]) / 2)
    assert found.mean.value == pytest.approx(half.value / 2)
    assert (found.images, found.seeds, found.protocol) == (IMAGES, (0, 1), "noise-custom")


def test_units_batches_and_processes_do_not_matter():
    whole = measure((0.5,)).mean.value
    assert measure((0.5,), batch_size=7).mean.value == pytest.approx(whole, rel=1e-12)
    other = measure((0.5,), LATENTS * 8, lambda latents: decode(latents / 8))  # a power of two: no rounding
    assert other.mean.value == pytest.approx(whole, rel=1e-12)
    parts = []
    for rank in (0, 1):
        measure((0.5,), processes=Processes(rank, 2, lambda own: parts.append(own) or own))
    total = GaussianStatistics.from_tensor(parts[0] + parts[1])
    assert frechet_distance(total, reference()) == pytest.approx(whole, rel=1e-12)


def test_it_never_goes_by_the_name_of_pfid():
    assert measure(NoiseGrid().levels).protocol == "noise"
    assert NoiseGrid().levels == (0.1, 0.2, 0.3, 0.4, 0.5)
