import pytest
import torch
from torch_fidelity import metric_prc

from robustok.errors import UserError
from robustok.metrics import manifold
from robustok.metrics.manifold import precision_recall


def normal(count, dim=6, seed=0, shift=0.0):
    return torch.randn(count, dim, generator=torch.Generator().manual_seed(seed)) + shift


def by_hand(real, fake, k):
    """The definition, a point at a time."""

    def share_inside(points, centres):
        inside = 0
        for point in points:
            for centre in centres:
                radius = sorted((centre - other).square().sum().item() for other in centres)[k]  # [0] is itself
                if (point - centre).square().sum().item() <= radius:
                    inside += 1
                    break
        return inside / len(points)

    return share_inside(fake.double(), real.double()), share_inside(real.double(), fake.double())


@pytest.mark.parametrize("k", [1, 3])
def test_the_definition(k):
    real, fake = normal(17, dim=2), normal(12, dim=2, seed=1, shift=0.8)
    found = precision_recall(real=real, fake=fake, k=k)
    assert (found.precision, found.recall) == pytest.approx(by_hand(real, fake, k))
    assert 0 < found.precision < 1
    assert 0 < found.recall < 1
    assert found.precision != found.recall
    assert (found.k, found.real, found.fake) == (k, 17, 12)


def test_parity_with_torch_fidelity():
    real, fake = normal(230, 32).double(), 0.8 * normal(170, 32, seed=1, shift=0.1).double()
    precision, recall = metric_prc.calculate_precision_recall_part(fake, real, 3, 100)
    found = precision_recall(real=real, fake=fake)
    assert (found.precision, found.recall) == pytest.approx((precision, recall), rel=1e-6)
    assert 0 < recall < precision < 1


@pytest.mark.parametrize(
    ("far", "dtype"), [(0, "float64"), (1000, "float64"), (0, "float32"), (1000, "float32"), (0, "float16")]
)
def test_a_collapsed_model_is_precise_and_recalls_nothing(far, dtype):
    """Every sample is a copy of one real image: its ball has the radius 0, and rounding must not empty it."""
    real = normal(60, 64, shift=far)
    found = precision_recall(real=real, fake=real[7].expand(40, -1), distance_dtype=dtype)
    assert found.precision == 1
    assert found.recall == 1 / 60
    assert precision_recall(real=real[7].expand(40, -1), fake=real, distance_dtype=dtype).recall == 1


def test_modes_that_are_missing_cost_recall_and_no_precision():
    """Swapped arguments would show: all samples lie in one of two clusters of real images."""
    real = torch.cat([normal(100), normal(100, seed=1, shift=50.0)])
    found = precision_recall(real=real, fake=normal(200, seed=2))
    assert found.precision > 0.9
    assert 0.4 < found.recall <= 0.5


def in_half(x, y):
    """Distances with every step in float16 and sums in float32, an entry at a time."""
    x, y = x.half(), y.half()
    return torch.stack([
        torch.stack([((a * a).sum() - 2 * (a.float() @ b.float()).half() + (b * b).sum()).clamp(min=0) for b in y])
        for a in x
    ])  # fmt: skip


def test_half_precision_is_that_of_adm():
    """Its coarse distances put points on the surface of balls, and so inside."""
    real, fake = 3 * normal(90, 32) + 10, 3 * normal(70, 32, seed=1) + 10
    found = precision_recall(real=real, fake=fake, distance_dtype="float16")
    across, radii = in_half(real, fake), [in_half(x, x).kthvalue(4, dim=1).values for x in (real, fake)]
    assert found.precision == (across <= radii[0][:, None]).any(0).double().mean()
    assert found.recall == (across <= radii[1]).any(1).double().mean()
    assert found.distance_dtype == "float16"
    exact = precision_recall(real=real, fake=fake)
    assert (found.precision, found.recall) != (exact.precision, exact.recall)


def test_half_precision_gives_way_where_it_overflows():
    real, fake = 100 * normal(40, 32), 100 * normal(30, 32, seed=1)  # squared norms of 320,000
    half, single = (precision_recall(real=real, fake=fake, distance_dtype=d) for d in ("float16", "float32"))
    assert (half.precision, half.recall) == (single.precision, single.recall)
    assert 0 < half.recall < 1


def test_single_precision_is_equal_but_for_ties():
    real, fake = normal(300, 32), 0.8 * normal(250, 32, seed=1)
    exact, single = (precision_recall(real=real, fake=fake, distance_dtype=d) for d in ("float64", "float32"))
    assert (single.precision, single.recall) == (exact.precision, exact.recall)


def test_equal_sets_and_distant_sets():
    features = normal(30)
    same, apart = (precision_recall(real=features, fake=features + shift) for shift in (0, 100))
    assert (same.precision, same.recall) == (1, 1)
    assert (apart.precision, apart.recall) == (0, 0)


def test_blocks_change_nothing(monkeypatch):
    real, fake = normal(53), normal(41, seed=1, shift=0.3)
    whole = precision_recall(real=real, fake=fake)
    monkeypatch.setattr(manifold, "_rows", lambda y: 8)
    assert precision_recall(real=real, fake=fake) == whole


def test_errors():
    with pytest.raises(UserError, match="one extractor"):
        precision_recall(real=normal(9, 4), fake=normal(9, 5))
    with pytest.raises(UserError, match="k=3 with 9 real and 3 fake"):
        precision_recall(real=normal(9), fake=normal(3))
    with pytest.raises(UserError, match="got distance_dtype='bfloat16', expected one of float64, float32, float16"):
        precision_recall(real=normal(9), fake=normal(9), distance_dtype="bfloat16")
    with pytest.raises(UserError, match="not finite"):
        precision_recall(real=normal(9), fake=normal(9).log())
