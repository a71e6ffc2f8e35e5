import math

import numpy as np
import pytest
import torch

from robustok.metrics import (
    GaussianStatistics,
    covariance_factor,
    delete_half_error,
    frechet_bias,
    frechet_distance,
    load_statistics,
    mean_and_standard_error,
    save_statistics,
    small_sample_note,
)
from robustok.types import UserError


def rng(seed=0):
    return torch.Generator().manual_seed(seed)


def normal(n, f, seed=0):
    return torch.randn(n, f, generator=rng(seed), dtype=torch.float64)


def exact(mean, covariance, count=1000):
    """Statistics with a given mean and covariance."""
    statistics = GaussianStatistics(len(mean))
    statistics.count = count
    statistics.sum = count * mean
    statistics.outer = (count - 1) * covariance + count * torch.outer(mean, mean)
    return statistics


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
    assert found == pytest.approx(expected.item(), rel=1e-7)


@pytest.mark.parametrize(("n", "f"), [(500, 16), (20, 64)])
def test_equal_sets_are_at_distance_zero(n, f):
    statistics = GaussianStatistics.of(normal(n, f) * 5)
    distance = frechet_distance(statistics, statistics)
    assert 0 <= distance < 1e-6 * statistics.covariance.trace()


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
    merged = parts[0].merge(parts[1]).merge(parts[2])
    reduced = GaussianStatistics.from_tensor(sum(part.as_tensor() for part in parts))
    for statistics in (batched, merged, reduced):
        assert statistics.count == 101
        assert frechet_distance(statistics, reference) == pytest.approx(whole, rel=1e-12)


def test_bias_is_the_mean_distance_of_samples_to_their_law():
    scales = torch.linspace(0.2, 2, 8, dtype=torch.float64)
    law = exact(torch.zeros(8, dtype=torch.float64), scales.square().diag(), count=400)
    distances = [frechet_distance(GaussianStatistics.of(normal(400, 8, seed) * scales), law) for seed in range(200)]
    assert np.mean(distances) == pytest.approx(frechet_bias(law), rel=0.06)


def test_statistics_survive_a_file(tmp_path):
    a, b = GaussianStatistics.of(normal(30, 8) + 3), GaussianStatistics.of(normal(40, 8, seed=1))
    save_statistics(a, tmp_path / "reference", "toy-8")
    loaded = load_statistics(tmp_path / "reference", name="toy-8")
    assert loaded.count == 30
    assert frechet_distance(loaded, b) == pytest.approx(frechet_distance(a, b), rel=1e-12)
    with pytest.raises(UserError, match="toy-8 features, expected other-8"):
        load_statistics(tmp_path / "reference", name="other-8")


def test_reference_files_of_adm_need_their_count(tmp_path):
    np.savez(tmp_path / "adm.npz", mu=np.zeros(3), sigma=np.eye(3), arr_0=np.zeros(1))
    with pytest.raises(UserError, match="pass count"):
        load_statistics(tmp_path / "adm.npz")
    assert torch.allclose(load_statistics(tmp_path / "adm.npz", count=50).covariance, torch.eye(3, dtype=torch.float64))


def test_files_without_statistics_are_refused(tmp_path):
    (tmp_path / "text.npz").write_text("no")
    np.savez(tmp_path / "other.npz", mu=np.zeros(3))
    np.savez(tmp_path / "pickle.npz", mu=np.array([None]), sigma=np.eye(1))
    np.savez(tmp_path / "shape.npz", mu=np.zeros(3), sigma=np.eye(2), count=5)
    for name in ("text", "other", "pickle", "shape", "missing"):
        with pytest.raises(UserError):
            load_statistics(tmp_path / f"{name}.npz")


def test_what_cannot_be_compared_is_named():
    few, narrow = GaussianStatistics.of(normal(1, 4)), GaussianStatistics.of(normal(9, 3))
    with pytest.raises(UserError, match="need at least 2"):
        frechet_distance(few, few)
    with pytest.raises(UserError, match="4 and 3"):
        frechet_distance(GaussianStatistics.of(normal(9, 4)), narrow)
    with pytest.raises(UserError, match="4 and 3"):
        few.merge(narrow)
    with pytest.raises(UserError, match="1 of 2 features are not finite"):
        narrow.update(torch.tensor([[1.0, 2.0, float("nan")], [0.0, 0.0, 0.0]]))


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


def test_the_note_of_small_samples():
    assert small_sample_note(50_000, 0.6, 2048) is None
    assert "FID of 5000 samples: biased upward by about c/N = 6.59" in small_sample_note(5000, 6.588, 2048)
    assert "rough" not in small_sample_note(5000, 6.588, 2048)
    assert "fewer samples than the 2048 features" in small_sample_note(2000, 18.4, 2048)
    assert "reconstructions" in small_sample_note(5000, 6.588, 2048, paired=True)
