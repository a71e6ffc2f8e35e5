import pytest
import torch

from robustok.errors import UserError
from robustok.metrics import METRICS
from robustok.metrics.comparison import Comparison, ComparisonConfig
from robustok.metrics.frechet import GaussianStatistics, frechet_distance
from robustok.metrics.kernel import kernel_distance
from robustok.metrics.manifold import precision_recall
from robustok.metrics.reference import Reference

REAL = torch.randn(90, 6, generator=torch.Generator().manual_seed(0))
FAKE = REAL.flip(0)[:70] / 2 + 1


def of(features, keep=True):
    return Reference(GaussianStatistics.of(features), "toy-6", "somewhere", features if keep else None)


def measure(name, sets):
    return METRICS[name].function(sets)


def test_every_metric_is_that_of_its_own_module():
    sets = Comparison(of(FAKE), of(REAL), ComparisonConfig(distance_dtype="float32"))
    expected = frechet_distance(GaussianStatistics.of(FAKE), GaussianStatistics.of(REAL))
    assert measure("gfid", sets).estimate.value == measure("rfid", sets).estimate.value == expected
    assert measure("kid", sets).estimate == kernel_distance(FAKE, REAL)
    both = precision_recall(real=REAL, fake=FAKE, distance_dtype="float32")
    found = measure("precision", sets).estimate.value, measure("recall", sets).estimate.value
    assert found == (both.precision, both.recall)
    assert measure("recall", sets).details == {"k": 3, "distance_dtype": "float32", "reference_samples": 90}
    assert measure("gfid", sets).details["bias"] > 0


def test_an_error_says_what_the_reference_lacks():
    sets = Comparison(of(FAKE), of(REAL, keep=False))
    assert measure("gfid", sets).estimate.value > 0
    with pytest.raises(UserError, match="no features of single images"):
        measure("kid", sets)
    with pytest.raises(UserError, match="no spatial features"):
        measure("sfid", sets)


def test_too_few_images_have_no_infinity():
    assert measure("gfid_infinity", Comparison(of(FAKE), of(REAL))) is None
