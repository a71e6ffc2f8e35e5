import math
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from pydantic import TypeAdapter, ValidationError

from robustok.metrics import (
    ExplicitGrid,
    GaussianStatistics,
    PerturbedCell,
    PerturbedGrid,
    PublishedGrid,
    RelativeGrid,
    decoded_statistics,
    frechet_distance,
    perturbed_cells,
    summarise,
)
from robustok.metrics.perturbed import cell_rng
from robustok.tokenizers.perturbation import nearest_codes, perturb
from robustok.types import UserError

SIZE, LENGTH, IMAGES = 24, 12, 40
CODEBOOK = torch.rand(SIZE, 3, generator=torch.Generator().manual_seed(0))
TOKENS = torch.randint(0, SIZE, (IMAGES, LENGTH), generator=torch.Generator().manual_seed(1))
NEIGHBOURS = nearest_codes(CODEBOOK, 6)


class MeanColours:
    """A toy feature space: the colours of the first two pixels."""

    name, dim = "toy-6", 6

    def __call__(self, pixels):
        assert pixels.dtype == torch.uint8
        return pixels[:, :, 0, :2].flatten(1).float()


def decode(tokens):
    """One pixel for each token, of the colour of its code."""
    return (CODEBOOK[tokens] * 255).to(torch.uint8).transpose(1, 2)[:, :, None]  # (n, 3, 1, L)


def reference():
    colours = torch.rand(60, 6, generator=torch.Generator().manual_seed(2)) * 255
    return GaussianStatistics.of(colours)


def measure(grid, **options):
    return perturbed_cells(grid, TOKENS, NEIGHBOURS, decode, MeanColours(), reference(), **({"seed": 0} | options))


def test_rate_zero_is_the_reconstruction_distance():
    cells = measure(ExplicitGrid(rates=(0.0,), codes=(1, 6)))
    rfid = frechet_distance(decoded_statistics(TOKENS, decode, MeanColours()), reference())
    assert [cell.value for cell in cells] == [rfid, rfid]


def test_cells_match_a_plain_loop():
    grid = ExplicitGrid(rates=(0.5, 1.0), codes=(2, 5))
    cells = measure(grid, seed=7, batch_size=16)
    assert [(cell.rate, cell.strength) for cell in cells] == [(0.5, 2), (0.5, 5), (1.0, 2), (1.0, 5)]
    for cell in cells:
        noisy = perturb(
            TOKENS, nearest_codes(CODEBOOK, cell.strength), cell.rate, 1.0, cell_rng(7, cell.rate, cell.strength)
        )
        assert ((noisy != TOKENS).sum(dim=1) == round(cell.rate * LENGTH)).all()
        features = torch.cat([MeanColours()(decode(image[None])) for image in noisy])
        expected = frechet_distance(GaussianStatistics.of(features), reference())
        assert cell.value == pytest.approx(expected, rel=1e-9)


def test_batch_size_and_processes_do_not_matter():
    grid = ExplicitGrid(rates=(0.5,), codes=(2, 5))
    whole = [cell.value for cell in measure(grid)]
    assert [cell.value for cell in measure(grid, batch_size=7)] == pytest.approx(whole, rel=1e-12)

    barrier, sums = threading.Barrier(3), [None] * 3

    def process(rank):  # a thread stands in for it
        def add_up(own):
            sums[rank] = own
            barrier.wait()
            total = sum(sums)
            barrier.wait()
            return total

        return [c.value for c in measure(grid, rank=rank, processes=3, sum_over_processes=add_up)]

    with ThreadPoolExecutor(3) as pool:
        for values in pool.map(process, range(3)):
            assert values == pytest.approx(whole, rel=1e-12)


def test_noise_depends_on_the_seed_and_not_on_the_rest_of_the_grid():
    alone = measure(ExplicitGrid(rates=(0.5,), codes=(5,)))[0]
    among = measure(ExplicitGrid(rates=(0.25, 0.5), codes=(2, 5)))
    assert alone in among
    assert measure(ExplicitGrid(rates=(0.5,), codes=(5,)), seed=1)[0].value != alone.value
    assert torch.rand(1, generator=cell_rng(0, 0.5, 5)) != torch.rand(1, generator=cell_rng(0, 0.5, 6))


def test_more_perturbation_lies_further_away():
    clean = decoded_statistics(TOKENS, decode, MeanColours())
    grid = ExplicitGrid(rates=(0.1, 1.0), codes=(1, 6))
    values = {
        (c.rate, c.strength): c.value
        for c in perturbed_cells(grid, TOKENS, NEIGHBOURS, decode, MeanColours(), clean, 0)
    }
    assert values[0.1, 1] < values[1.0, 1] < values[1.0, 6]


@pytest.mark.parametrize(
    ("size", "strengths"),
    [
        (16384, (200, 280, 360)),
        (8192, (100, 140, 180)),
        (4096, (50, 70, 90)),
        (1024, (10, 15, 20)),
        (32768, (400, 560, 721)),
        (128, (2, 3, 4)),
        (16, (1, 2, 3)),
    ],
)
def test_published_grid(size, strengths):
    grid = PublishedGrid()
    assert grid.strengths(size) == strengths
    assert sorted(grid.rates) == [0.5, 0.6, 0.7, 0.8, 0.9]


@pytest.mark.parametrize(
    ("size", "strengths"),
    [(4096, (41, 102, 205, 410)), (128, (2, 3, 6, 13)), (100, (2, 3, 5, 10)), (64, (2, 3, 6)), (16, (2,))],
)
def test_relative_grid(size, strengths):
    assert RelativeGrid().strengths(size) == strengths
    assert RelativeGrid().rates == (0.1, 0.25, 0.5, 1.0)


def test_grids_are_told_apart_by_name():
    grids = TypeAdapter(PerturbedGrid)
    assert isinstance(grids.validate_python({"name": "published"}), PublishedGrid)
    assert grids.validate_python({"name": "explicit", "rates": [0.5], "codes": [3]}).strengths(64) == (3,)
    for wrong in ({"rates": [1.5], "codes": [3]}, {"rates": [0.5], "codes": [0]}, {"rates": [], "codes": [1]}):
        with pytest.raises(ValidationError):
            grids.validate_python({"name": "explicit"} | wrong)


def test_more_neighbours_than_there_are():
    with pytest.raises(UserError, match="asks for 7 nearest codes, there are 6"):
        measure(ExplicitGrid(rates=(0.5,), codes=(7,)))


def test_summary():
    summary = summarise([PerturbedCell(0.5, 2, 1.0), PerturbedCell(0.5, 4, 8.0), PerturbedCell(1.0, 2, 27.0)])
    assert summary.mean == 12
    assert summary.geometric_mean == pytest.approx(6)
    assert summarise([PerturbedCell(0.0, 1, 0.0), PerturbedCell(0.5, 4, 8.0)]).geometric_mean == 0
    assert math.isfinite(summary.geometric_mean)
