import pytest
import torch

from robustok.errors import UserError
from robustok.evaluation.collector import FeatureCollector
from robustok.metrics.processes import ALONE, Processes


class Colours:
    """The mean colour and the first pixel."""

    name, dim = "colours-6", 6

    def __call__(self, pixels):
        pixels = pixels.float()
        return torch.cat([pixels.mean((2, 3)), pixels[:, :, 0, 0]], 1)


PIXELS = torch.randint(256, (90, 3, 4, 4), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


def collect(pixels, parts=("features",), processes=None, rank=0, world=1, every=1, batch=16):
    collector = FeatureCollector(Colours(), parts, every)
    for indices in Processes(rank, world).batches(len(pixels), batch):
        collector.update(indices, pixels[indices])
    return collector if processes is None else collector.finish("somewhere", processes)


@pytest.mark.parametrize("batch", [1, 7, 90])
def test_batches_do_not_matter(batch):
    found, whole = collect(PIXELS, processes=ALONE, batch=batch), Colours()(PIXELS)
    assert torch.equal(found.features, whole)
    torch.testing.assert_close(found.statistics.covariance, whole.double().T.cov(), rtol=1e-10, atol=1e-8)
    assert (found.count, found.name, found.data) == (90, "colours-6", "somewhere")


@pytest.mark.parametrize("world", [2, 4])
def test_uneven_shards_of_several_processes_are_one_set(world):
    """90 images in 4 shards of 23 and 22: none lost, none twice, in order."""
    shards = [collect(PIXELS, rank=rank, world=world) for rank in range(world)]
    statistics = sum(s.statistics.as_tensor() for s in shards)
    features = [part for s in shards for part in s.features]
    processes = Processes(0, world, add=lambda tensor: statistics, gather=lambda parts: features)
    found, alone = shards[0].finish("somewhere", processes), collect(PIXELS, processes=ALONE)
    assert torch.equal(found.features, alone.features)
    torch.testing.assert_close(found.statistics.covariance, alone.statistics.covariance, rtol=1e-9, atol=1e-8)
    assert found.count == 90


def test_features_are_kept_only_where_they_are_needed():
    assert collect(PIXELS, (), ALONE).features is None
    assert torch.equal(collect(PIXELS, {"features"}, ALONE, every=4).features, Colours()(PIXELS)[::4])


def test_no_images_are_an_error():
    with pytest.raises(UserError, match="no images to evaluate"):
        collect(PIXELS[:0], processes=ALONE)
