import pytest
import torch

from robustok.errors import UserError
from robustok.metrics.sliced_wasserstein import sliced_wasserstein


def measure(x, y, projections=7, seed=0):
    return sliced_wasserstein(x, y, torch.Generator().manual_seed(seed), projections)


def column(*values):
    return torch.tensor(values)[:, None]


def normal(n, f, seed):
    return torch.randn(n, f, generator=torch.Generator().manual_seed(seed))


def test_on_a_line_by_hand():
    """Sorted values are compared in turn; a direction is 1 or -1 there, which makes no difference."""
    assert measure(column(3.0, 0.0, 1.0), column(6.0, 8.0, 5.0)) == pytest.approx(25)
    assert measure(column(0.0, 4.0), column(1.0, 1.0)) == pytest.approx((1 + 9) / 2)


def test_sets_of_different_size_by_hand():
    """{0, 2} and {0, 1, 2} differ by 1 between the levels 1/3 and 2/3 and are equal elsewhere."""
    assert measure(column(0.0, 2.0), column(0.0, 1.0, 2.0)) == pytest.approx(1 / 3)
    assert measure(column(5.0), column(4.0, 5.0, 7.0)) == pytest.approx((1 + 0 + 4) / 3)
    x, y = normal(6, 4, 0), normal(10, 4, 1)
    assert measure(x, y) == pytest.approx(measure(x.repeat(3, 1), y), rel=1e-9)  # the same law


def test_equal_sets_have_no_distance():
    x = normal(40, 5, 0)
    assert measure(x, x.flip(0)) == 0
    assert measure(x, x + 1e-3) > 0


def test_each_direction_by_hand():
    x, y = normal(9, 3, 0).double(), normal(9, 3, 1).double()
    directions = torch.randn(200, 3, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    values = []
    for direction in directions:
        unit = direction / direction.norm()
        values.append((((x @ unit).sort().values - (y @ unit).sort().values) ** 2).mean())
    assert measure(x, y, 200, seed=5) == pytest.approx(torch.stack(values).mean().item(), rel=1e-9)
    assert measure(x, y, 200, seed=6) != measure(x, y, 200, seed=5)


def test_a_shift_is_its_squared_length_over_the_features():
    x, shift = normal(50, 4, 0), torch.tensor([1.0, -2.0, 0.5, 3.0])
    assert measure(x + shift, x, 20_000) == pytest.approx(shift.square().sum().item() / 4, rel=0.03)


def test_gaussians_have_the_closed_form():
    """Of spreads 1 and 3 and a shift s: (3 - 1)^2 + |s|^2 / F, on average over directions."""
    x, y = normal(20_000, 3, 0), 3 * normal(10_000, 3, 1) + 2
    assert measure(x, y, 500) == pytest.approx(4 + 4, rel=0.05)


def test_sets_that_cannot_be_compared():
    with pytest.raises(UserError, match="use one extractor for both sets"):
        measure(normal(5, 3, 0), normal(5, 4, 0))
    with pytest.raises(UserError, match="not finite"):
        measure(normal(5, 3, 0) / 0, normal(5, 3, 0))
    with pytest.raises(UserError, match="without images"):
        measure(normal(0, 3, 0), normal(5, 3, 0))
