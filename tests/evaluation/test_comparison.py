import pytest
import torch

from robustok.errors import UserError
from robustok.evaluation.comparison import Comparison, FeatureCollector, Processes, compare
from robustok.metrics.frechet import GaussianStatistics, frechet_distance
from robustok.metrics.kernel import kernel_distance
from robustok.metrics.manifold import precision_recall


class Colours:
    """The mean colour and the first pixel."""

    name, dim = "colours-6", 6

    def __call__(self, pixels):
        pixels = pixels.float()
        return torch.cat([pixels.mean((2, 3)), pixels[:, :, 0, 0]], 1)


PIXELS = torch.randint(256, (90, 3, 4, 4), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
OTHERS = (PIXELS.flip(0)[:70].int() // 2 + 40).to(torch.uint8)


def describe(pixels, metrics=("kid",), processes=None, rank=0, world=1, every=1, batch=16):
    collector = FeatureCollector(Colours(), metrics, every)
    own = torch.arange(len(pixels))[rank::world]
    for indices in own.split(batch):
        collector.update(indices, pixels[indices])
    return collector if processes is None else collector.finish("somewhere", processes)


@pytest.mark.parametrize("batch", [1, 7, 90])
def test_batches_do_not_matter(batch):
    found, whole = describe(PIXELS, processes=Processes(), batch=batch), Colours()(PIXELS)
    assert torch.equal(found.features, whole)
    torch.testing.assert_close(found.statistics.covariance, whole.double().T.cov(), rtol=1e-10, atol=1e-8)
    assert (found.count, found.name, found.data) == (90, "colours-6", "somewhere")


@pytest.mark.parametrize("world", [2, 4])
def test_uneven_shards_of_several_processes_are_one_set(world):
    """90 images in 4 shards of 23 and 22: none lost, none twice, in order."""
    shards = [describe(PIXELS, rank=rank, world=world) for rank in range(world)]
    statistics = sum(s.statistics.as_tensor() for s in shards)
    features = [part for s in shards for part in s.features]
    processes = Processes(0, world, add=lambda tensor: statistics, gather=lambda parts: features)
    found, alone = shards[0].finish("somewhere", processes), describe(PIXELS, processes=Processes())
    assert torch.equal(found.features, alone.features)
    torch.testing.assert_close(found.statistics.covariance, alone.statistics.covariance, rtol=1e-9, atol=1e-8)
    assert found.count == 90


def test_features_are_kept_only_where_they_are_needed():
    assert describe(PIXELS, {"gfid"}, Processes()).features is None
    assert torch.equal(describe(PIXELS, {"recall"}, Processes(), every=4).features, Colours()(PIXELS)[::4])


def test_every_metric_is_that_of_its_own_module():
    real, fake = describe(PIXELS, processes=Processes()), describe(OTHERS, processes=Processes())
    found = compare(fake, real, Comparison({"gfid", "kid", "precision", "recall"}, distance_dtype="float32"))
    x, y = Colours()(OTHERS), Colours()(PIXELS)
    expected = frechet_distance(GaussianStatistics.of(x), GaussianStatistics.of(y))
    assert found["gfid"][0].value == pytest.approx(expected)
    assert found["kid"][0] == kernel_distance(x, y)
    both = precision_recall(real=y, fake=x)
    assert (found["precision"][0].value, found["recall"][0].value) == (both.precision, both.recall)
    assert found["recall"][1] == {"k": 3, "distance_dtype": "float32", "reference_samples": 90}
    assert found["gfid"][1]["bias"] > 0


def test_what_the_reference_lacks_is_said():
    fake, bare = describe(OTHERS, processes=Processes()), describe(PIXELS, {"gfid"}, Processes())
    assert compare(fake, bare, Comparison({"gfid"})).keys() == {"gfid"}
    with pytest.raises(UserError, match="no features of single images"):
        compare(fake, bare, Comparison({"kid"}))
    with pytest.raises(UserError, match="no spatial features"):
        compare(fake, bare, Comparison({"sfid"}))
    with pytest.raises(UserError, match="no images to evaluate"):
        describe(PIXELS[:0], processes=Processes())


def test_too_few_images_have_no_infinity():
    sets = [describe(pixels, processes=Processes()) for pixels in (OTHERS, PIXELS)]
    assert compare(*sets, Comparison({"gfid_infinity"})) == {}
