"""The numbers of other evaluators on the same features: torch-fidelity, and ADM's formulas written out in float64."""

import numpy as np
import pytest
import scipy.linalg
import torch
from torch_fidelity import metric_fid, metric_isc, metric_kid, metric_prc

from robustok.metrics.frechet import GaussianStatistics, frechet_distance
from robustok.metrics.inception_score import inception_score
from robustok.metrics.kernel import kernel_distance
from robustok.metrics.manifold import precision_recall
from robustok.metrics.reference import load_reference


def features(n, f, seed=0):
    """Correlated, skewed and never negative, as after a ReLU and a mean."""
    rng = torch.Generator().manual_seed(seed)
    mixing = torch.randn(f, f, generator=torch.Generator().manual_seed(99)) / f**0.5
    return (torch.randn(n, f, generator=rng) @ mixing + 0.2).relu() * (1 + 0.05 * seed)


def by_sqrtm(a, b):
    """ADM's Frechet distance, in float64."""
    a, b = a.double().numpy(), b.double().numpy()
    s, t = np.cov(a, rowvar=False), np.cov(b, rowvar=False)
    root = scipy.linalg.sqrtm(s @ t)
    return np.sum((a.mean(0) - b.mean(0)) ** 2) + np.trace(s) + np.trace(t) - 2 * np.trace(root).real


@pytest.mark.parametrize(("n", "m", "f"), [(300, 400, 64), (500, 300, 128), (600, 700, 256)])
def test_fid(n, m, f):
    fake, real = features(n, f, 1), features(m, f)
    found = frechet_distance(GaussianStatistics.of(fake), GaussianStatistics.of(real))
    sets = (metric_fid.fid_features_to_statistics(x.double()) for x in (fake, real))
    theirs = metric_fid.fid_statistics_to_metric(*sets, verbose=False)
    assert found == pytest.approx(theirs[metric_fid.KEY_METRIC_FID], rel=1e-6)
    assert found == pytest.approx(by_sqrtm(fake, real), rel=1e-6)


def test_sfid_to_a_reference_batch_of_adm(tmp_path):
    """Spatial features are flattened with channels last, and compared with mu_s and sigma_s, not with mu and sigma."""
    maps = [features(n, 7 * 3 * 3, seed).view(n, 7, 3, 3) for n, seed in ((200, 1), (250, 0))]
    fake, real = (m.permute(0, 2, 3, 1).flatten(1) for m in maps)  # (N, 63)
    pool = features(250, 8)
    moments = {f"mu{s}": x.double().mean(0).numpy() for s, x in (("", pool), ("_s", real))}
    moments |= {f"sigma{s}": np.cov(x.double().numpy(), rowvar=False) for s, x in (("", pool), ("_s", real))}
    np.savez(tmp_path / "adm.npz", arr_0=np.zeros((2, 4, 4, 3), dtype=np.uint8), **moments)
    reference = load_reference(tmp_path / "adm.npz")
    found = frechet_distance(GaussianStatistics.of(fake), reference.spatial, reference.spatial_factor)
    assert found == pytest.approx(by_sqrtm(fake, real), rel=1e-6)
    assert by_sqrtm(maps[0].flatten(1), real) > 1.5 * found  # channels first


@pytest.mark.parametrize(("n", "f"), [(200, 64), (300, 256)])
def test_kid_of_a_whole_set(n, f):
    """Their subset estimator takes two sets of equal size; a subset of all images is ours."""
    fake, real = features(n, f, 1), features(n, f)
    theirs = metric_kid.kid_features_to_metric(
        fake.double(), real.double(), kid_subsets=1, kid_subset_size=n, verbose=False
    )
    assert kernel_distance(fake, real).value == pytest.approx(theirs[metric_kid.KEY_METRIC_KID_MEAN], rel=1e-6)


def test_kid_of_subsets():
    """The mean over their subsets is the mean of ours over the same, and lies within the error of the whole."""
    fake, real = features(300, 64, 1), features(400, 64)
    theirs = metric_kid.kid_features_to_metric(
        fake.double(), real.double(), kid_subsets=20, kid_subset_size=100, rng_seed=7, verbose=False
    )[metric_kid.KEY_METRIC_KID_MEAN]
    rng = np.random.RandomState(7)
    values = []
    for _ in range(20):
        chosen = [torch.from_numpy(rng.choice(n, 100, replace=False)) for n in (300, 400)]
        values.append(kernel_distance(fake[chosen[0]], real[chosen[1]]).value)
    assert np.mean(values) == pytest.approx(theirs, rel=1e-6)
    whole = kernel_distance(fake, real)
    assert abs(whole.value - theirs) < 3 * whole.standard_error


@pytest.mark.parametrize("splits", [1, 10])
def test_inception_score(splits):
    logits = 4 * features(500, 128, 1)
    order = torch.from_numpy(np.random.RandomState(2020).permutation(500))
    theirs = metric_isc.isc_features_to_metric(logits, splits, shuffle=True, rng_seed=2020)
    found = inception_score(logits[order], splits, shuffle=False)
    assert found.mean == pytest.approx(theirs[metric_isc.KEY_METRIC_ISC_MEAN], rel=1e-6)
    assert found.standard_deviation == pytest.approx(theirs[metric_isc.KEY_METRIC_ISC_STD], rel=1e-6, abs=1e-9)


def test_inception_score_of_adm():
    """Splits of so many images, in the order given, mean over splits."""
    logits = 4 * features(500, 128, 1)
    p = torch.softmax(logits.double(), dim=1).numpy()
    scores = []
    for i in range(0, 500, 100):
        part = p[i : i + 100]
        divergence = part * (np.log(part) - np.log(np.mean(part, axis=0, keepdims=True)))
        scores.append(np.exp(np.mean(np.sum(divergence, axis=1))))
    assert inception_score(logits, splits=5, shuffle=False).mean == pytest.approx(np.mean(scores), rel=1e-6)


@pytest.mark.parametrize(("n", "m", "f"), [(300, 200, 64), (250, 400, 256)])
def test_precision_and_recall(n, m, f):
    fake, real = features(n, f, 1), features(m, f)
    found = precision_recall(real=real, fake=fake)
    theirs = metric_prc.calculate_precision_recall_part(fake.double(), real.double(), 3, 100)
    assert (found.precision, found.recall) == pytest.approx(theirs, rel=1e-6)
    assert (found.precision, found.recall) == pytest.approx(adm_precision_recall(real, fake), rel=1e-6)
    assert found.precision != found.recall
    assert min(found.precision, found.recall) > 0
    assert max(found.precision, found.recall) < 1


def adm_precision_recall(real, fake):
    """Radii are the entries 3 of the sorted rows, where entry 0 is the image itself."""

    def squared(x, y):
        return ((x[:, None] - y[None]) ** 2).sum(-1)

    real, fake = real.double().numpy(), fake.double().numpy()
    radii_real, radii_fake = (np.sort(squared(x, x), axis=1)[:, 3] for x in (real, fake))
    across = squared(real, fake)  # (real, fake)
    return (across <= radii_real[:, None]).any(0).mean(), (across <= radii_fake).any(1).mean()
