from functools import partial

import numpy as np
import pytest
import torch

from robustok.errors import UserError
from robustok.metrics.kernel import _sums, cubic, gaussian, kernel_distance, median_distance


def normal(n, f, seed):
    return torch.randn(n, f, generator=torch.Generator().manual_seed(seed))


def cube(a, b):
    return (float(a.double() @ b.double()) / len(a) + 1) ** 3


def brute_force(x, y, kernel=cube):

    within_x = np.mean([kernel(a, b) for i, a in enumerate(x) for j, b in enumerate(x) if i != j])
    within_y = np.mean([kernel(a, b) for i, a in enumerate(y) for j, b in enumerate(y) if i != j])
    return within_x + within_y - 2 * np.mean([kernel(a, b) for a in x for b in y])


def test_value_and_error_against_brute_force():
    x, y = normal(7, 4, 0) + 0.5, normal(9, 4, 1)
    estimate = kernel_distance(x, y)
    assert estimate.value == pytest.approx(brute_force(x, y), rel=1e-9)
    variance = 0.0
    for n, without in (
        (7, [brute_force(torch.cat([x[:i], x[i + 1 :]]), y) for i in range(7)]),
        (9, [brute_force(x, torch.cat([y[:i], y[i + 1 :]])) for i in range(9)]),
    ):
        variance += (n - 1) * np.var(without)
    assert estimate.standard_error == pytest.approx(variance**0.5, rel=1e-9)


def test_unbiased_at_every_size_and_its_error_is_the_spread():
    """Its mean is zero for two sets of one distribution; for two distributions it is the same for all sizes of sets."""
    same = [kernel_distance(normal(10, 3, 2 * s), normal(12, 3, 2 * s + 1)).value for s in range(400)]
    assert abs(np.mean(same)) < 3 * np.std(same) / 20
    small = [kernel_distance(normal(20, 3, 2 * s) + 1, normal(20, 3, 2 * s + 1)) for s in range(400)]
    values = [estimate.value for estimate in small]
    large = kernel_distance(normal(4000, 3, 10_000) + 1, normal(4000, 3, 10_001))
    assert abs(np.mean(values) - large.value) < 3 * np.hypot(np.std(values) / 20, large.standard_error)
    spread = np.sqrt(np.mean([estimate.standard_error**2 for estimate in small]))
    assert 0.85 * np.std(values) < spread < 1.5 * np.std(values)


def test_a_gaussian_kernel_against_brute_force():
    x, y = normal(7, 4, 0) + 0.5, normal(9, 4, 1)
    whole = lambda a, b: np.exp(-float((a - b).double().square().sum()) / 1.5**2)  # noqa: E731
    halves = lambda a, b: (whole(a[:2], b[:2]) + whole(a[2:], b[2:])) / 2  # noqa: E731
    for parts, kernel in ((1, whole), (2, halves)):
        found = kernel_distance(x, y, partial(gaussian, bandwidth=1.5, parts=parts))
        assert found.value == pytest.approx(brute_force(x, y, kernel), rel=1e-6)
    same = torch.zeros(3, 2)
    apart = kernel_distance(same, same + torch.tensor([3.0, 4.0]), partial(gaussian, bandwidth=5))
    assert apart.value == pytest.approx(2 - 2 * np.exp(-1))


def test_the_median_distance_by_hand():
    points = torch.tensor([[0.0, 0.0], [3.0, 4.0], [0.0, 1.0]])
    assert median_distance(points) == pytest.approx(18**0.5)  # of 1, sqrt(18), 5
    assert median_distance(torch.tensor([[1.0], [1.0], [1.0], [3.0]])) == 2  # of the three that are not 0
    assert median_distance(torch.tensor([[0.0, 0.0], [1.0, 2.0], [5.0, 9.0]]), parts=2) == 4  # of 1, 4, 5 and 2, 7, 9


def test_blocks_of_rows_do_not_matter():
    x, y = normal(23, 5, 0), normal(11, 5, 1)
    kernel = (x @ y.T / 5 + 1) ** 3
    for rows in (4, 1024):
        of_x, of_y = _sums(x, y, cubic, rows)
        assert torch.allclose(of_x, kernel.sum(1))
        assert torch.allclose(of_y, kernel.sum(0))


def test_sets_that_cannot_be_compared():
    with pytest.raises(UserError, match="at least 3"):
        kernel_distance(normal(2, 4, 0), normal(9, 4, 1))
    with pytest.raises(UserError, match="expected"):
        kernel_distance(normal(9, 3, 0), normal(9, 4, 1))
    with pytest.raises(UserError, match="not finite"):
        kernel_distance(normal(9, 4, 0).log(), normal(9, 4, 1))
