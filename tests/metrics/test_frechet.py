import math

import numpy as np
import pytest
import torch

from robustok.errors import UserError
from robustok.metrics.frechet import (
    GaussianStatistics,
    covariance_factor,
    delete_half_error,
    frechet_bias,
    frechet_distance,
    mean_and_standard_error,
    small_sample_note,
)


def rng(seed=0):
    return torch.Generator().manual_seed(seed)


def normal(n, f, seed=0):
    return torch.randn(n, f, generator=rng(seed), dtype=torch.float64)


def exact(mean, covariance, count=1000):
    """Statistics with a given mean and covariance."""
    return GaussianStatistics.from_moments(mean, covariance, count)


def test_mean_and_covariance_are_the_textbook_ones():
    x = normal(50, 6) * 3 + 100
    statistics = GaussianStatistics.of(x)
    assert torch.allclose(statistics.mean, x.mean(0))
    assert torch.allclose(statistics.covariance, torch.cov(x.T))


def test_diagonal_gaussians_have_a_closed_form():
    sa, sb = torch.tensor([1.0, 4.0, 9.0]).double(), torch.tensor([4.0, 4.0, 0.25]).double()
    ma, mb = torch.tensor([0.0, 1.0, 2.0]).double(), torch.tensor([1.0, 1.0, 0.0]).double()
    expected = (ma - mb).square().sum() + (sa.sqrt() - sb.sqrt()).square().sum()
    assert frechet_distance(exact(ma, sa.diag()), exact(mb, sb.diag())) == pytest.approx(expected.item(), rel=1e-12)


def test_a_linear_map_between_gaussians_has_a_closed_form():
    """With S_b = M S_a M for symmetric positive M, tr (S_a S_b)^(1/2) = tr (S_a M)."""
    a, m = torch.cov(normal(40, 12).T), torch.cov(normal(40, 12, seed=1).T)
    b, zero = m @ a @ m, torch.zeros(12, dtype=torch.float64)
    expected = (a.trace() + b.trace() - 2 * (a @ m).trace()).item()
    assert frechet_distance(exact(zero, a), exact(zero, b)) == pytest.approx(expected, rel=1e-10)
    assert frechet_distance(exact(zero, b), exact(zero, a)) == pytest.approx(expected, rel=1e-10)


@pytest.mark.parametrize(("n", "m"), [(10, 200), (200, 10), (10, 14)])
def test_fewer_images_than_features(n, m):
    """Against the nuclear norm of X Y^T, which needs no square root of a covariance."""
    x, y = normal(n, 32), normal(m, 32, seed=1) * 2 + 1
    xc, yc = (x - x.mean(0)) / math.sqrt(n - 1), (y - y.mean(0)) / math.sqrt(m - 1)
    root = torch.linalg.svdvals(xc @ yc.T).sum()
    expected = (x.mean(0) - y.mean(0)).square().sum() + xc.square().sum() + yc.square().sum() - 2 * root
    found = frechet_distance(GaussianStatistics.of(x), GaussianStatistics.of(y))
    assert found == pytest.approx(expected.item(), rel=1e-12)  # 1e-8 with the noise of empty directions


HARD = {
    "full rank": lambda: normal(300, 48),
    "fewer images than features": lambda: normal(20, 48),
    "as many": lambda: normal(48, 48),
    "one more": lambda: normal(49, 48),
    "two images": lambda: normal(2, 48),
    "singular": lambda: normal(300, 24).repeat(1, 2),
    "nearly singular": lambda: normal(300, 24).repeat(1, 2) + 1e-7 * normal(300, 48, seed=9),
    "rank one": lambda: normal(300, 1) * normal(1, 48, seed=9),
    "scales from 1e-6 to 1e6": lambda: normal(300, 48) * torch.logspace(-6, 6, 48).double(),
    "scales and few": lambda: normal(20, 48) * torch.logspace(-6, 6, 48).double(),
    "tiny": lambda: 1e-30 * normal(300, 48),
    "huge": lambda: 1e30 * normal(300, 48),
    "far from zero": lambda: normal(300, 48) + 1e6,
    "some constant": lambda: torch.cat([normal(300, 24), torch.full((300, 24), 1e6 / 7).double()], dim=1),
    "all constant": lambda: torch.full((300, 48), 1e6 / 7).double(),
}


@pytest.mark.parametrize("name", HARD)
def test_it_never_fails(name):
    """Zero for equal sets, the same for every order, batch and direction, and never a complex number or a nan."""
    x = HARD[name]()
    y = 1.1 * x[torch.randperm(len(x), generator=rng())]
    one, other, fewer = (GaussianStatistics.of(z) for z in (x, y, y[: max(2, len(x) - 1)]))
    trace = one.covariance.trace().item()
    assert 0 <= frechet_distance(one, one) <= 1e-12 * trace
    batched = GaussianStatistics(48)
    for batch in x[torch.randperm(len(x), generator=rng(1))].split(7):
        batched.update(batch)
    assert frechet_distance(batched, one) <= 1e-12 * trace
    expected = (0.1 * one.mean).square().sum().item() + 0.01 * trace
    assert frechet_distance(one, other) == pytest.approx(expected, rel=1e-12, abs=1e-8 * trace)
    values = [frechet_distance(one, fewer), frechet_distance(batched, fewer), frechet_distance(fewer, one)]
    assert all(isinstance(value, float) and math.isfinite(value) for value in values)
    assert max(values) - min(values) <= 1e-6 * min(values)


@pytest.mark.parametrize("spectrum", [torch.logspace(0, -14, 64), torch.tensor([1.0] + 63 * [1e-10])])
def test_equal_gaussians_are_at_distance_zero(spectrum):
    """Small variances beside large ones, where rounding errors of the size of the largest would add up."""
    basis = torch.linalg.qr(normal(64, 64)).Q
    covariance = (basis * spectrum.double()) @ basis.T
    statistics = exact(torch.zeros(64, dtype=torch.float64), (covariance + covariance.T) / 2)
    assert frechet_distance(statistics, statistics) <= 1e-11 * covariance.trace()


def test_a_solver_that_gives_up_is_replaced(monkeypatch):
    pairs = [(GaussianStatistics.of(normal(n, 32)), GaussianStatistics.of(normal(n, 32, seed=1))) for n in (20, 100)]
    expected = [frechet_distance(*pair) for pair in pairs]

    def give_up(matrix):
        raise torch.linalg.LinAlgError("too many repeated eigenvalues")

    monkeypatch.setattr(torch.linalg, "eigh", give_up)
    monkeypatch.setattr(torch.linalg, "eigvalsh", give_up)
    assert [frechet_distance(*pair) for pair in pairs] == pytest.approx(expected, rel=1e-7)


def test_far_from_zero_the_variance_is_kept():
    x = normal(200, 4)
    far = x.clone()
    far[:, :2] += 1e7  # raw squares of 1e14 would leave two digits
    covariance = GaussianStatistics.of(far).covariance
    assert torch.allclose(covariance, torch.cov(x.T), rtol=1e-6, atol=1e-6)
    assert GaussianStatistics.of(torch.full((1000, 1), 1e6 / 7)).covariance.item() == 0


def test_moments_of_an_unknown_number_of_images():
    a, mean, covariance = GaussianStatistics.of(normal(30, 3)), torch.ones(3).double(), torch.eye(3).double()
    known, unknown = exact(mean, covariance, 50), exact(mean, covariance, None)
    assert frechet_distance(a, unknown) == pytest.approx(frechet_distance(a, known), rel=1e-12)
    assert frechet_distance(unknown, a) == pytest.approx(frechet_distance(known, a), rel=1e-12)
    for use in (unknown.as_tensor, lambda: unknown.update(torch.ones(2, 3)), lambda: frechet_bias(unknown)):
        with pytest.raises(UserError, match="without their number of images"):
            use()


def test_constant_features_leave_the_distance_of_the_means():
    a, b = (GaussianStatistics.of(torch.full((5, 4), value)) for value in (1.0, 3.0))
    assert frechet_distance(a, b) == pytest.approx(16)


def test_a_cached_factor_changes_nothing():
    a, b = GaussianStatistics.of(normal(30, 8)), GaussianStatistics.of(normal(40, 8, seed=1))
    assert frechet_distance(a, b, covariance_factor(b)) == frechet_distance(a, b)


def test_order_batches_and_processes_do_not_matter():
    x, reference = normal(101, 8), GaussianStatistics.of(normal(60, 8, seed=1) + 1)
    whole = frechet_distance(GaussianStatistics.of(x), reference)
    batched = GaussianStatistics(8)
    for batch in x[torch.randperm(101, generator=rng())].split(7):
        batched.update(batch)
    parts = [GaussianStatistics.of(x[rank::3]) for rank in range(3)]
    reduced = GaussianStatistics.from_tensor(sum(part.as_tensor() for part in parts))
    for statistics in (batched, reduced):
        assert statistics.count == 101
        assert frechet_distance(statistics, reference) == pytest.approx(whole, rel=1e-12)


def test_bias_is_the_mean_distance_of_samples_to_their_distribution():
    scales = torch.linspace(0.2, 2, 8, dtype=torch.float64)
    known = exact(torch.zeros(8, dtype=torch.float64), scales.square().diag(), count=400)
    distances = [frechet_distance(GaussianStatistics.of(normal(400, 8, seed) * scales), known) for seed in range(200)]
    assert np.mean(distances) == pytest.approx(frechet_bias(known), rel=0.06)


def test_what_cannot_be_compared_is_named():
    few, narrow = GaussianStatistics.of(normal(1, 4)), GaussianStatistics.of(normal(9, 3))
    with pytest.raises(UserError, match="need at least 2"):
        frechet_distance(few, few)
    with pytest.raises(UserError, match="4 and 3"):
        frechet_distance(GaussianStatistics.of(normal(9, 4)), narrow)
    for wrong in (math.nan, math.inf, 1e200):
        with pytest.raises(UserError, match="1 of 2 features are not finite"):
            narrow.update(torch.tensor([[1.0, 2.0, wrong], [0.0, 0.0, 0.0]]).double())


def test_mean_and_standard_error():
    estimate = mean_and_standard_error([1.0, 2.0, 3.0, 6.0])
    assert estimate.value == 3
    assert estimate.standard_error == pytest.approx(math.sqrt(14 / 3) / 2)
    assert mean_and_standard_error([5.0]).standard_error is None
    with pytest.raises(UserError):
        mean_and_standard_error([])


def test_delete_half_finds_the_error_of_a_mean():
    """The standard error of a mean of N draws is sd / sqrt(N)."""
    x = normal(400, 1) * 2
    estimate = delete_half_error(x, lambda half: half.mean().item(), rng(), repeats=300)
    assert estimate.value == pytest.approx(x.mean().item())
    assert estimate.standard_error == pytest.approx(x.std().item() / 20, rel=0.15)


def test_delete_half_needs_enough():
    with pytest.raises(UserError, match="at least 4"):
        delete_half_error(normal(3, 1), lambda half: 0.0, rng())
    with pytest.raises(UserError, match="repeats=1"):
        delete_half_error(normal(9, 1), lambda half: 0.0, rng(), repeats=1)


def test_the_note_of_small_samples():
    assert small_sample_note(50_000, 0.6, 2048) is None
    assert "FID of 5000 samples: biased upward by about c/N = 6.59" in small_sample_note(5000, 6.588, 2048)
    assert "rough" not in small_sample_note(5000, 6.588, 2048)
    assert "fewer samples than the 2048 features" in small_sample_note(2000, 18.4, 2048)
    assert "reconstructions" in small_sample_note(5000, 6.588, 2048, paired=True)
