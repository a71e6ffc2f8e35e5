import math

import numpy as np
import pytest
import torch
from torch_fidelity import metric_isc

from robustok.errors import UserError
from robustok.metrics.inception_score import inception_score


def rng(seed=0):
    return torch.Generator().manual_seed(seed)


def logits(count=60, classes=12, scale=3.0):
    return scale * torch.randn(count, classes, generator=rng(1))


def test_one_split_by_hand():
    p = logits().double().softmax(dim=1)
    divergence = (p * (p / p.mean(dim=0)).log()).sum(dim=1).mean()
    found = inception_score(logits(), splits=1, rng=rng())
    assert found.mean == pytest.approx(divergence.exp().item(), rel=1e-9)
    assert (found.standard_deviation, found.splits) == (0, 1)


@pytest.mark.parametrize("splits", [1, 4, 7])
def test_parity_with_torch_fidelity(splits):
    order = torch.randperm(60, generator=rng())  # ours, so that theirs need not shuffle
    theirs = metric_isc.isc_features_to_metric(logits()[order], splits, shuffle=False)
    found = inception_score(logits(), splits, rng=rng())
    assert found.mean == pytest.approx(theirs["inception_score_mean"], rel=1e-6)
    assert found.standard_deviation == pytest.approx(theirs["inception_score_std"], rel=1e-6, abs=1e-12)


def test_images_sorted_by_class_have_the_same_score():
    certain = 30 * torch.eye(10).repeat_interleave(100, dim=0)  # sorted: each of 10 splits holds one class
    mixed = certain[torch.as_tensor(np.random.default_rng(3).permutation(1000))]
    sorted_score, score = inception_score(certain, rng=rng()), inception_score(mixed, rng=rng())
    assert sorted_score.mean == pytest.approx(score.mean, rel=0.01)
    assert sorted_score.mean == pytest.approx(10, rel=0.08)  # 1 without the shuffle


def test_sure_and_even_is_the_number_of_classes_and_equal_is_1():
    assert inception_score(2000 * torch.eye(8), splits=1, rng=rng()).mean == pytest.approx(8)
    assert inception_score(torch.ones(20, 8), rng=rng()).mean == pytest.approx(1)


def test_classes_that_no_image_has_are_no_nan():
    assert math.isfinite(inception_score(torch.tensor([[2000.0, 0, -2000]] * 4), splits=2, rng=rng()).mean)


def test_the_seed_decides():
    one, again, other = (inception_score(logits(), rng=rng(seed)) for seed in (0, 0, 1))
    assert one == again
    assert one != other


def test_in_the_order_given_as_adm_does():
    """Splits of consecutive images: sorted ones leave a single class in each."""
    certain = 30 * torch.eye(10).repeat_interleave(100, dim=0)
    assert inception_score(certain, shuffle=False).mean == pytest.approx(1)
    theirs = metric_isc.isc_features_to_metric(logits(), 4, shuffle=False)
    assert inception_score(logits(), 4, shuffle=False).mean == pytest.approx(theirs["inception_score_mean"], rel=1e-9)


def test_errors():
    with pytest.raises(UserError, match="pass rng"):
        inception_score(logits())
    with pytest.raises(UserError, match="9 images for 10 splits"):
        inception_score(logits(9), rng=rng())
    with pytest.raises(UserError, match="finite"):
        inception_score(logits().log(), rng=rng())
