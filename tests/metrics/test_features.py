import pytest
import torch

from robustok.errors import UserError
from robustok.metrics.features.classifier import ClassifierConfig, ClassifierExtractor, SmallClassifier
from robustok.types import FeatureExtractor


@pytest.fixture(scope="module")
def extractor():
    return ClassifierExtractor(SmallClassifier(ClassifierConfig(width=8, features=24), classes=5))


def pixels(count=7):
    return torch.randint(0, 256, (count, 3, 16, 16), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


def test_it_names_itself_and_its_size(extractor):
    assert isinstance(extractor, FeatureExtractor)
    assert extractor.dim == 24
    assert extractor.name == f"classifier-24-{extractor.classifier.digest}"
    assert extractor(pixels()).shape == (7, 24)


def test_float32_without_gradients_even_under_autocast(extractor):
    plain = extractor(pixels())
    with torch.autocast("cpu", torch.bfloat16):
        inside = extractor(pixels())
    assert plain.dtype == torch.float32
    assert not plain.requires_grad
    assert torch.equal(plain, inside)


def test_features_do_not_depend_on_batch_size(extractor):
    parts = torch.cat([extractor(part) for part in pixels().split(2)])
    assert torch.allclose(parts, extractor(pixels()), atol=1e-5)


@pytest.mark.parametrize("wrong", [torch.zeros(2, 3, 16, 16), torch.zeros(3, 16, 16, dtype=torch.uint8)])
def test_only_uint8_pixels_enter(extractor, wrong):
    with pytest.raises(UserError, match="uint8"):
        extractor(wrong)
