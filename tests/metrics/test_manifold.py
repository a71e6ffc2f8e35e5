import pytest
import torch

from robustok.metrics import manifold
from robustok.metrics.manifold import precision_recall
from robustok.types import UserError


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
    metric_prc = pytest.importorskip("torch_fidelity.metric_prc")
    real, fake = normal(230, 32).double(), 0.8 * normal(170, 32, seed=1, shift=0.1).double()
    precision, recall = metric_prc.calculate_precision_recall_part(fake, real, 3, 100)
    found = precision_recall(real=real, fake=fake)
    assert (found.precision, found.recall) == pytest.approx((precision, recall), rel=1e-6)
    assert 0 < recall < precision < 1


@pytest.mark.parametrize("far", [0.0, 1000.0])
def test_a_collapsed_model_is_precise_and_recalls_nothing(far):
    """Every sample is a copy of one real image: its ball has the radius 0, and rounding must not empty it."""
    real = normal(60, 64, shift=far)
    found = precision_recall(real=real, fake=real[7].expand(40, -1))
    assert found.precision == 1
    assert found.recall == 1 / 60
    assert precision_recall(real=real[7].expand(40, -1), fake=real).recall == 1


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
    with pytest.raises(UserError, match="not finite"):
        precision_recall(real=normal(9), fake=normal(9).log())
