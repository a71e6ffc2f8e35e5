"""The Frechet term: its value, its gradient, its moments, and what it refuses."""

import pytest
import torch

from robustok.config import validate
from robustok.errors import UserError
from robustok.losses.frechet import FrechetConfig, FrechetTerm, RunningDistance
from robustok.metrics.frechet import GaussianStatistics, frechet_distance
from tiny_models import save_resnet20

CPU = torch.device("cpu")


def noise(*shape, seed=0):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def some_real(dim, seed=5):
    return GaussianStatistics.of(noise(50, dim, seed=seed) @ noise(dim, dim, seed=seed + 1) + 3)


def biased(features):
    """Statistics with the covariance divided by N, as moments have it."""
    return GaussianStatistics.from_moments(features.mean(0), torch.cov(features.T, correction=0), None)


def test_the_distance_of_two_gaussians_on_a_line():
    real = GaussianStatistics.from_moments(torch.tensor([1.0]), torch.tensor([[4.0]]), 10)
    features = torch.tensor([[0.0], [6.0]])  # mean 3, standard deviation 3: (3 - 1)^2 + (3 - 2)^2, over 4
    assert RunningDistance(real)(features, 1.0).item() == pytest.approx(5 / 4)


@pytest.mark.parametrize("share", [1.0, 0.25])
def test_the_distance_is_that_of_the_running_moments(share):
    real, first, second = some_real(5), noise(40, 5) + 2, 2 * noise(20, 5, seed=1)
    distance = RunningDistance(real)
    distance(first, 1.0)
    found = distance(second, share)
    mean = (1 - share) * first.mean(0) + share * second.mean(0)
    square = (1 - share) * first.T @ first / 40 + share * second.T @ second / 20
    expected = GaussianStatistics.from_moments(mean, square - torch.outer(mean, mean), None)
    assert found.item() == pytest.approx(frechet_distance(expected, real) / real.covariance.trace().item(), rel=1e-9)


@pytest.mark.parametrize("share", [1.0, 0.1])
def test_the_gradient_is_that_of_finite_differences(share):
    real, before, features = some_real(4), noise(30, 4, seed=3), noise(12, 4, seed=2) + 1

    def value(x):
        distance = RunningDistance(real)
        distance.update(before, 1.0)
        return distance(x, share)

    inputs = features.clone().requires_grad_()
    value(inputs).backward()
    for i, j in ((0, 0), (3, 2), (11, 3)):
        step = torch.zeros_like(features)
        step[i, j] = 1e-5
        slope = (value(features + step) - value(features - step)).item() / 2e-5
        assert inputs.grad[i, j].item() == pytest.approx(slope / share, rel=1e-6)  # as if all samples were the batch


def test_fewer_samples_than_features_have_a_finite_gradient():
    features = noise(3, 8).float().requires_grad_()
    found = RunningDistance(some_real(8))(features, 1.0)
    expected = frechet_distance(biased(features.detach().double()), some_real(8)) / some_real(8).covariance.trace()
    assert found.item() == pytest.approx(expected.item(), rel=1e-5)
    found.backward()
    assert features.grad.isfinite().all()
    assert features.grad.abs().max() < 10
    broken = torch.full((3, 8), torch.nan)
    assert RunningDistance(some_real(8))(broken, 1.0).isnan()


def test_following_the_gradient_lowers_the_distance():
    real, distance = some_real(4), RunningDistance(some_real(4))
    distance.update(noise(64, 4), 1.0)
    scale, shift = (start.double().requires_grad_() for start in (torch.eye(4), torch.zeros(4)))
    optimizer, values = torch.optim.Adam([scale, shift], lr=0.1), []
    for step in range(200):
        optimizer.zero_grad()
        value = distance(noise(16, 4, seed=step) @ scale + shift, 0.1)  # a tenth of what a covariance of 4 would take
        value.backward()
        optimizer.step()
        values.append(value.item())
    assert values[-1] < 0.05 * values[0]
    torch.testing.assert_close(shift, real.mean, rtol=0, atol=0.5)


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    return save_resnet20(tmp_path_factory.mktemp("weights") / "resnet20.safetensors")


@pytest.fixture
def config(weights, classifier):
    spaces = [{"name": "cifar-resnet", "path": weights}, {"name": "classifier", "path": classifier}]
    return FrechetConfig(weight=2.0, decay=0.75, extractors=spaces)


def test_each_space_is_a_term_and_the_state_brings_it_back(config):
    images = [torch.rand(6, 3, 32, 32, generator=torch.Generator().manual_seed(i)) * 2 - 1 for i in range(4)]
    term = FrechetTerm(config, CPU, evaluator=None, data="some")
    features = [[space(((x + 1) * 127.5).byte()) for x in images] for space in term.extractors]
    real = [GaussianStatistics.of(torch.cat(found[:2])) for found in features]
    assert not term.started
    term.start(real, images[2:])  # each counts a half
    for moments, found in zip(term._distances.values(), features, strict=True):
        mean, expected = moments.moments[0] + moments.center, torch.cat(found[2:]).double().mean(0)
        torch.testing.assert_close(mean, expected, rtol=0.02, atol=0.02)  # pixels are rounded
    saved = term.state()
    decoded = images[0].clone().requires_grad_()
    terms = term(decoded)
    assert [name.split("-")[0] for name in terms] == ["frechet_cifar", "frechet_classifier"]
    assert all(value.dtype == torch.float32 and value > 0 for value in terms.values())
    separate = [torch.autograd.grad(value, decoded)[0] for value in terms.values()]  # each frees its own graph only
    assert all(gradient.abs().max() > 0 for gradient in separate)

    other = FrechetTerm(config, CPU, evaluator=None, data="some")
    other.load_state(saved)
    assert other.started
    assert {name: value.item() for name, value in other(images[0]).items()} == {n: v.item() for n, v in terms.items()}
    for elsewhere in ({}, term.state()):
        moved = FrechetTerm(config, CPU, evaluator=None, data="others")
        moved.load_state(elsewhere)
        assert not moved.started


def test_the_evaluating_space_and_no_space_are_refused(config):
    evaluator = FrechetTerm(config, CPU, evaluator=None, data="").extractors[1].name
    with pytest.raises(UserError, match=rf"the same feature space, {evaluator}: what is trained on cannot evaluate"):
        FrechetTerm(config, CPU, evaluator, data="")
    twice = config.model_copy(update={"extractors": [config.extractors[0]] * 2})
    with pytest.raises(UserError, match="has the same feature space twice: cifar-resnet20-"):
        FrechetTerm(twice, CPU, evaluator, data="")
    with pytest.raises(UserError, match=r"frechet\.weight needs feature spaces"):
        validate(FrechetConfig, {"weight": 1})
    with pytest.raises(UserError, match="all images of the reference have the same features"):
        FrechetTerm(config, CPU, None, "").start([GaussianStatistics.of(torch.ones(5, 64))] * 2, [])
