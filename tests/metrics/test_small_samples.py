import numpy as np
import pytest
import torch

from robustok.errors import UserError
from robustok.metrics import small_samples
from robustok.metrics.frechet import (
    GaussianStatistics,
    covariance_factor,
    delete_half_error,
    frechet_bias,
    frechet_distance,
)
from robustok.metrics.small_samples import frechet_error, frechet_infinity

SCALES = torch.linspace(1.5, 0.3, 16, dtype=torch.float64)


def rng(seed=0):
    return torch.Generator().manual_seed(seed)


def normal(n, seed=0, scales=SCALES):
    return torch.randn(n, len(scales), generator=rng(seed), dtype=torch.float64) * scales


def known(factor=1.3):
    """A reference known exactly, at the distance (factor - 1)^2 |scales|^2 from the distribution of ``normal``."""
    zero = torch.zeros(len(SCALES), dtype=torch.float64)
    return GaussianStatistics.from_moments(zero, (factor * SCALES).square().diag(), None)


def test_the_error_is_the_spread_over_fresh_sets():
    reference = known()
    values = [frechet_distance(GaussianStatistics.of(normal(400, seed)), reference) for seed in range(200)]
    estimates = [frechet_error(normal(400, seed), reference, rng=rng(seed)) for seed in range(20)]
    assert estimates[3].value == pytest.approx(values[3], rel=1e-12)
    found = np.sqrt(np.mean([estimate.standard_error**2 for estimate in estimates]))
    assert found == pytest.approx(np.std(values), rel=0.25)


@pytest.mark.parametrize("n", [20, 31, 32, 200])
def test_halves_of_fewer_images_than_features_cost_less_and_change_nothing(n):
    x, reference = normal(n), GaussianStatistics.of(normal(300, seed=1) + 0.2)

    def plainly(some):
        return frechet_distance(GaussianStatistics.of(some), reference)

    found, expected = frechet_error(x, reference, rng=rng(5)), delete_half_error(x, plainly, rng(5))
    assert found.value == pytest.approx(expected.value, rel=1e-9)
    assert found.standard_error == pytest.approx(expected.standard_error, rel=1e-6)


def test_the_reference_is_decomposed_once_or_not_at_all(monkeypatch):
    calls = []
    monkeypatch.setattr(small_samples, "covariance_factor", lambda s: calls.append(s) or covariance_factor(s))
    reference = known()
    kept = covariance_factor(reference)
    for arguments in ({}, {"factor": kept}):
        frechet_error(normal(100), reference, rng=rng(), **arguments)
        frechet_infinity(normal(100), reference, rng=rng(), smallest=50, **arguments)
    assert len(calls) == 2


def test_infinitely_many_images():
    """Off by far less than the distance of all images to their own distribution, whose bias is the slope."""
    reference = known(1)
    found = [frechet_infinity(normal(600, seed), reference, rng=rng(seed), smallest=150) for seed in range(40)]
    bias = frechet_bias(GaussianStatistics.from_moments(reference.mean, reference.covariance, 600))
    assert np.mean([f.distances[-1] for f in found]) == pytest.approx(bias, rel=0.1)
    assert np.mean([f.slope for f in found]) == pytest.approx(600 * bias, rel=0.15)
    assert abs(np.mean([f.estimate.value for f in found])) < 0.15 * bias
    assert found[0].estimate.standard_error is None


def test_the_points_of_the_line():
    x, reference = normal(101), known()
    found = frechet_infinity(x, reference, rng=rng(3), sizes=4, smallest=50)
    assert found.sizes == (50, 67, 84, 101)
    order = torch.randperm(101, generator=rng(3))
    for count, distance in zip(found.sizes, found.distances, strict=True):
        part = GaussianStatistics.of(x[order[:count]])
        assert distance == pytest.approx(frechet_distance(part, reference), rel=1e-10)
    inverse = 1 / np.array(found.sizes)
    rows = np.stack([np.ones(4), inverse], axis=1)
    value, slope = np.linalg.lstsq(rows, np.array(found.distances), rcond=None)[0]
    assert (found.estimate.value, found.slope) == pytest.approx((value, slope), rel=1e-8)


def test_too_few_images_for_a_line():
    with pytest.raises(UserError, match="got 9999 images, need 10000 for FID-infinity: a line in 1/N"):
        frechet_infinity(normal(9999), known(), rng=rng())
    with pytest.raises(UserError, match="sizes=1"):
        frechet_infinity(normal(100), known(), rng=rng(), sizes=1, smallest=50)
    with pytest.raises(UserError, match="at least 4"):
        frechet_error(normal(3), known(), rng=rng())
    with pytest.raises(UserError, match="one extractor"):
        frechet_error(normal(30)[:, :3], known(), rng=rng())
