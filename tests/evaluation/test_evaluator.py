import json

import numpy as np
import pytest
import torch

import tiny
from robustok.commands.evaluate import evaluate
from robustok.config import load
from robustok.data.dataset import open_images
from robustok.data.latent_cache import LatentCache
from robustok.data.pixels import to_pixels
from robustok.data.sources import Digits
from robustok.errors import UserError
from robustok.evaluation.collector import FeatureCollector
from robustok.evaluation.settings import EvaluateRun
from robustok.metrics.features import ExtractorConfig, load_extractor
from robustok.metrics.features.classifier import ClassifierConfig, save_classifier
from robustok.metrics.frechet import GaussianStatistics, frechet_distance
from robustok.metrics.sliced_wasserstein import sliced_wasserstein
from robustok.tokenizers import load_tokenizer
from robustok.training.classifier import fit_classifier


@pytest.fixture(scope="module")
def second(tmp_path_factory):
    """Another feature space, hardly trained."""
    path = tmp_path_factory.mktemp("second") / "saved"
    batch = open_images(Digits(limit=64), 16).read(range(64))
    config = ClassifierConfig(width=8, features=8, steps=2, batch_size=32)
    save_classifier(fit_classifier(to_pixels(batch.images), batch.labels, config, seed=1), path)
    return path


@pytest.fixture(scope="module")
def features(tokenizer, samples, classifier, second):
    """Features of the two sets of samples, the training and the validation images, in each space, and their names."""
    extractors = [load_extractor(ExtractorConfig(path=path)) for path in (classifier, second)]
    train, test = (open_images(Digits(limit=128), 16, split).read(range(128)).images for split in ("train", "test"))
    with torch.no_grad():
        made = [load_tokenizer(tokenizer).decode(LatentCache(path).read(slice(None)).latents) for path in samples]
    spaces = [[extract(to_pixels(images)) for images in (*made, train, test)] for extract in extractors]
    return spaces, [extractor.name for extractor in extractors]


def distance(a, b):
    return frechet_distance(GaussianStatistics.of(a), GaussianStatistics.of(b))


@pytest.fixture
def measure(tmp_path, tokenizer, samples, classifier, second):
    def run(*words, sets=samples, data=tiny.DATA):
        decoders = (f"samples.latents=[{','.join(map(str, sets))}]", f"samples.decoders.d={tokenizer}")
        spaces = (f"extractor.path={classifier}", f"more_extractors=[{{path: {second}}}]")
        return evaluate(load(EvaluateRun, None, (f"out={tmp_path / 'out'}", *data, *decoders, *spaces, *words)))

    return run


def test_gfid_against_training_and_validation_images(measure, features):
    found = measure("metrics=[gfid,gfid_validation]")
    (spaces, names), lines = features, {(m.metric, m.extractor): m for m in found}
    for (first, other, train, test), name in zip(spaces, names, strict=True):
        for metric, real, split in (("gfid", train, "train"), ("gfid_validation", test, "test")):
            line, values = lines[metric, name], [distance(first, real), distance(other, real)]
            assert line.value == pytest.approx(np.mean(values), rel=1e-5)
            assert line.standard_error == pytest.approx(abs(values[0] - values[1]) / 2, rel=1e-3)
            assert f"digits {split}" in line.reference
            assert line.details["bias"] > 0
    assert len(found) == 4


def test_fdr_by_hand(measure, features):
    """The mean over both spaces of what samples have against training images, over what validation images have."""
    (found,) = (m for m in measure("metrics=[gfid,fdr]") if m.metric == "fdr")
    spaces, names = features
    normalisers = [distance(test, train) for _, _, train, test in spaces]
    values = [
        np.mean([distance(space[i], space[2]) / n for space, n in zip(spaces, normalisers, strict=True)])
        for i in range(2)
    ]
    assert found.value == pytest.approx(np.mean(values), rel=1e-5)
    assert found.standard_error == pytest.approx(abs(values[0] - values[1]) / 2, rel=1e-3)
    assert found.extractor == " + ".join(names)
    assert found.details["normalisers"] == pytest.approx(dict(zip(names, normalisers, strict=True)), rel=1e-5)
    assert found.details["normalisers_given"] == []


def test_fdr_with_given_normalisers(measure, features, tmp_path):
    spaces, names = features
    given = f"fdr.normalisers={json.dumps({names[0]: 0.5, names[1]: 4})}"
    (found,) = measure("metrics=[fdr]", given)
    one, other = (np.mean([distance(space[i], space[2]) for i in (0, 1)]) for space in spaces)
    assert found.value == pytest.approx((one / 0.5 + other / 4) / 2, rel=1e-5)
    assert found.details["normalisers_given"] == sorted(names)
    real = to_pixels(open_images(Digits(limit=128), 16, "train").read(range(128)).images)
    np.savez(tmp_path / "real.npz", arr_0=real.permute(0, 2, 3, 1).numpy())
    reference = f"reference={tmp_path}/real.npz"
    (alone,) = measure("metrics=[fdr]", given, reference, data=())  # no validation images needed
    assert alone.value == pytest.approx(found.value, rel=1e-5)
    with pytest.raises(UserError, match=f"no distance to divide by in {names[1]}; give data, or fdr.normalisers"):
        measure("metrics=[fdr]", f"fdr.normalisers.{names[0]}=1", reference, data=())
    with pytest.raises(UserError, match=f"wrong is none of the feature spaces in use, {names[0]}, {names[1]}"):
        measure("metrics=[fdr]", "fdr.normalisers.wrong=1")
    for metric in ("fdr", "gfid_validation", "gap"):
        with pytest.raises(UserError, match=f"{metric} takes real images beside the reference; give data.name"):
            measure(f"metrics=[{metric}]", reference, data=())


def test_validation_images_that_are_the_reference(measure, tmp_path):
    real = to_pixels(open_images(Digits(limit=128), 16, "test").read(range(128)).images)
    np.savez(tmp_path / "real.npz", arr_0=real.permute(0, 2, 3, 1).numpy())
    with pytest.raises(UserError, match=r"digits test, .* is the reference too, so that fdr would divide by 0"):
        measure("metrics=[fdr]", f"reference={tmp_path}/real.npz")


def test_sliced_wasserstein_by_hand(measure, features):
    found = measure("metrics=[sliced_wasserstein]", "comparison.projections=20", "seed=3")
    for (first, other, train, _), line in zip(features[0], found, strict=True):
        values = [sliced_wasserstein(some, train, torch.Generator().manual_seed(3), 20) for some in (first, other)]
        assert line.value == pytest.approx(np.mean(values), rel=1e-5)
        details = line.details
        assert (details["projections"], details["order"], details["reference_samples"]) == (20, 2, 128)


def test_decoders_are_compared_set_by_set(measure, tokenizer, features):
    """The second decoder is the first one, so that every difference is zero with an error of zero."""
    names = ("gfid", "gfid_validation", "fdr", "sliced_wasserstein")
    found = measure(f"metrics=[{','.join(names)}]", f"samples.decoders.again={tokenizer}")
    differences = [m for m in found if m.metric.endswith("_difference")]
    assert [m.metric.removesuffix("_difference") for m in differences] == [*names, "gfid", "gfid_validation", names[3]]
    for line in differences:
        assert (line.value, line.standard_error, line.details["versus"]) == (0, 0, "d")
        assert ("digits test" in line.reference) == (line.metric == "gfid_validation_difference")
    assert differences[2].extractor == " + ".join(features[1])


def test_features_of_every_image_are_computed_once_and_kept(measure, samples, tmp_path, monkeypatch):
    counts, update = [], FeatureCollector.update
    monkeypatch.setattr(FeatureCollector, "update", lambda self, i, p: counts.append(len(p)) or update(self, i, p))
    words = ("metrics=[gfid,gfid_validation,fdr,kid,sliced_wasserstein]", f"cache={tmp_path}/cache")
    first = measure(*words, sets=samples[:1])
    assert sum(counts) == 2 * (40 + 128 + 128)  # in each of two spaces: samples, training and validation images
    counts.clear()
    again = measure(*words, sets=samples[:1])
    assert sum(counts) == 2 * 40
    assert [m.value for m in again] == pytest.approx([m.value for m in first])
