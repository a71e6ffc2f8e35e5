import math
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from pydantic import TypeAdapter, ValidationError

from robustok.errors import UserError
from robustok.metrics.frechet import GaussianStatistics, frechet_distance
from robustok.metrics.grid import decoded_statistics, geometric_mean
from robustok.metrics.pfid import (
    PFID,
    PUBLISHED_STRENGTHS,
    ExplicitGrid,
    PerturbedGrid,
    PublishedFastGrid,
    PublishedGrid,
    RelativeGrid,
    perturbed_protocol,
    perturbed_tokens,
)
from robustok.metrics.processes import Processes
from robustok.randomness import image_draws
from robustok.tokenizers.perturbation import nearest_codes

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
    """The cells of one seed."""
    seeds = (options.pop("seed", 0),)
    return list(frechet(grid, seeds=seeds, **options).cells)


def test_rate_zero_is_the_reconstruction_distance():
    cells = measure(ExplicitGrid(rates=(0.0,), codes=(1, 6)))
    rfid = frechet_distance(decoded_statistics([TOKENS], decode, MeanColours()), reference())
    assert [cell.value for cell in cells] == [rfid, rfid]


def test_cells_match_a_plain_loop():
    grid = ExplicitGrid(rates=(0.5, 1.0), codes=(2, 5))
    cells = measure(grid, seed=7, batch_size=16)
    assert [(cell.rate, cell.strength) for cell in cells] == [(0.5, 2), (0.5, 5), (1.0, 2), (1.0, 5)]
    for cell in cells:
        near = nearest_codes(CODEBOOK, cell.strength)
        images = [perturbed_tokens(TOKENS, near, cell.rate, 7, torch.tensor([i])) for i in range(IMAGES)]
        for clean, noisy in zip(TOKENS, torch.cat(images), strict=True):
            changed = clean != noisy
            assert changed.sum() == round(cell.rate * LENGTH)
            assert all(new in near[old] for old, new in zip(clean[changed], noisy[changed], strict=True))
        features = torch.cat([MeanColours()(decode(image)) for image in images])
        expected = frechet_distance(GaussianStatistics.of(features), reference())
        assert cell.value == pytest.approx(expected, rel=1e-9)


def test_every_position_and_every_neighbour_is_drawn_equally_often():
    tokens = torch.zeros(4000, 6, dtype=torch.int64)
    near = torch.tensor([[1, 2, 3, 4, 5]]).expand(6, 5)
    noisy = perturbed_tokens(tokens, near, 0.5, 0, torch.arange(4000))
    assert (noisy != 0).sum(dim=1).unique().tolist() == [3]
    at = (noisy != 0).double().mean(dim=0)  # half each, sd 0.008
    assert (at - 0.5).abs().max() < 4 * 0.008
    drawn = torch.bincount(noisy[noisy > 0], minlength=6)[1:] / 12000  # a fifth each, sd 0.0037
    assert (drawn - 0.2).abs().max() < 4 * 0.0037
    pairs = (
        torch.bincount(6 * noisy[:, 0] + noisy[:, 1], minlength=36).view(6, 6)[1:, 1:] / 4000
    )  # positions go together
    assert (pairs - 0.2 / 25).abs().max() < 4 * math.sqrt(0.008 * 0.992 / 4000)  # both of 3 in 6: chance 0.2


@pytest.mark.parametrize(("include_self", "share"), [(False, 0.5), (True, 0.5 * (1 - 1 / 4))])
def test_share_of_tokens_that_change(include_self, share):
    near = nearest_codes(CODEBOOK, 4, include_self)
    tokens = torch.randint(0, SIZE, (3000, LENGTH), generator=torch.Generator().manual_seed(3))
    changed = (perturbed_tokens(tokens, near, 0.5, 0, torch.arange(3000)) != tokens).double()
    error = changed.mean(dim=1).std().item() / math.sqrt(3000)
    assert changed.mean().item() == pytest.approx(share, abs=4 * error + 1e-12)  # error is 0 without self


def test_noise_of_an_image_is_its_own():
    indices = torch.tensor([5, 0, 31])
    alone = torch.cat([perturbed_tokens(TOKENS, NEIGHBOURS, 0.5, 1, index[None]) for index in indices])
    assert torch.equal(perturbed_tokens(TOKENS, NEIGHBOURS, 0.5, 1, indices), alone)
    # Nor does it matter how many other images there are.
    assert torch.equal(perturbed_tokens(TOKENS[:32], NEIGHBOURS, 0.5, 1, indices), alone)
    # Other cells and seeds replace other tokens.
    moved = [
        perturbed_tokens(TOKENS, NEIGHBOURS[:, :strength], 0.5, seed, indices) != TOKENS[indices]
        for seed, strength in ((1, 6), (1, 5), (2, 6))
    ]
    assert not torch.equal(moved[0], moved[1])
    assert not torch.equal(moved[0], moved[2])
    many = image_draws(torch.rand, "a", torch.arange(500), (4,))
    assert len(many.unique(dim=0)) == 500
    assert not torch.equal(many, image_draws(torch.rand, "b", torch.arange(500), (4,)))


def test_batch_size_and_processes_do_not_matter():
    grid = ExplicitGrid(rates=(0.5,), codes=(2, 5))
    whole = [cell.value for cell in measure(grid)]
    assert [cell.value for cell in measure(grid, batch_size=7)] == pytest.approx(whole, rel=1e-12)

    barrier, sums = threading.Barrier(3), [None] * 3

    def process(rank):  # simulated by a thread
        def add_up(own):
            sums[rank] = own
            barrier.wait()
            total = sum(sums)
            barrier.wait()
            return total

        return [c.value for c in measure(grid, processes=Processes(rank, 3, add_up))]

    with ThreadPoolExecutor(3) as pool:
        for values in pool.map(process, range(3)):
            assert values == pytest.approx(whole, rel=1e-12)


def test_noise_depends_on_the_seed_and_not_on_the_rest_of_the_grid():
    alone = measure(ExplicitGrid(rates=(0.5,), codes=(5,)))[0]
    among = measure(ExplicitGrid(rates=(0.25, 0.5), codes=(2, 5)))
    assert alone in among
    assert measure(ExplicitGrid(rates=(0.5,), codes=(5,)), seed=1)[0].value != alone.value


def test_more_perturbation_lies_further_away():
    clean = decoded_statistics([TOKENS], decode, MeanColours())
    grid = ExplicitGrid(rates=(0.1, 1.0), codes=(1, 6))
    values = {(c.rate, c.strength): c.value for c in frechet(grid, reference=clean).cells}
    assert values[0.1, 1] < values[1.0, 1] < values[1.0, 6]


@pytest.mark.parametrize(
    ("size", "strengths"),
    [
        (16384, (200, 280, 360)),
        (8192, (100, 140, 180)),
        (4096, (50, 70, 90)),
        (1024, (10, 15, 20)),
        (32768, (400, 560, 720)),
        (512, (6, 9, 11)),
        (128, (2, 3, 4)),
        (16, (2, 3, 4)),
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


def test_a_grid_is_chosen_by_its_name():
    grids = TypeAdapter(PerturbedGrid)
    assert isinstance(grids.validate_python({"name": "published"}), PublishedGrid)
    assert grids.validate_python({"name": "explicit", "rates": [0.5], "codes": [3]}).strengths(64) == (3,)
    for wrong in ({"rates": [1.5], "codes": [3]}, {"rates": [0.5], "codes": [0]}, {"rates": [], "codes": [1]}):
        with pytest.raises(ValidationError):
            grids.validate_python({"name": "explicit"} | wrong)


def test_the_fast_grid_is_every_rate_at_the_middle_strength():
    for size in (16384, 8192, 4096, 1024, 512, 16):
        whole, fast = PublishedGrid(), PublishedFastGrid()
        assert (fast.rates, fast.strengths(size)) == (whole.rates, whole.strengths(size)[1:2])
    # Any surface that is linear in the strength has the same mean over the five as over all fifteen.
    strengths = PublishedGrid().strengths(4096)
    surface = {(r, s): math.exp(3 * r) + s * r**4 for r in PublishedGrid().rates for s in strengths}
    five = [value for (_, s), value in surface.items() if s in PublishedFastGrid().strengths(4096)]
    assert sum(five) / 5 == pytest.approx(sum(surface.values()) / 15)


def test_protocols_cannot_be_confused():
    def name(grid, size=4096, **settings):
        return perturbed_protocol(grid, size, **settings)["protocol"]

    assert all(name(PublishedGrid(), size) == "published" for size in PUBLISHED_STRENGTHS)
    assert name(PublishedGrid(), images=50_000) == "published"
    others = [
        name(PublishedGrid(), 512),
        name(PublishedGrid(), include_self=False),
        name(PublishedGrid(), images=5_000),
        name(PublishedFastGrid()),
        name(PublishedFastGrid(), 512, include_self=False, images=360),
        name(RelativeGrid()),
        name(RelativeGrid(rates=(0.5,))),
        name(RelativeGrid(), include_self=False),
        name(ExplicitGrid(rates=PublishedGrid().rates, codes=(50, 70, 90))),
    ]
    assert others == [
        "published-scaled", "published-without-self", "published@5000", "published-fast",
        "published-fast-scaled-without-self@360", "relative", "relative-custom", "relative-without-self", "explicit",
    ]  # fmt: skip
    found = perturbed_protocol(PublishedGrid(), 1024)
    assert (found["rates"], found["strengths"]) == ([0.9, 0.8, 0.7, 0.6, 0.5], [10, 15, 20])
    assert (found["codebook_size"], found["include_self"], found["neighbour_of"]) == (1024, True, "code")


def given():
    grid = ExplicitGrid(rates=(0.5, 1.0), codes=(2, 5))
    inputs = dict(latents=TOKENS, codebook=CODEBOOK, decode=decode, extractor=MeanColours(), reference=reference())
    return inputs | {"grid": grid}


def frechet(grid=None, **options):
    grid = grid or ExplicitGrid(rates=(0.5, 1.0), codes=(2, 5))
    return PFID(**given() | {"grid": grid, "include_self": False} | options).run()


def test_one_call_is_all_seeds_of_all_cells():
    runs = [measure(ExplicitGrid(rates=(0.5, 1.0), codes=(2, 5)), seed=seed) for seed in (3, 4, 8)]
    found = frechet(seeds=(3, 4, 8))
    values = torch.tensor([[cell.value for cell in run] for run in runs], dtype=torch.float64)  # (seeds, cells)
    assert [(c.rate, c.strength) for c in found.cells] == [(0.5, 2), (0.5, 5), (1.0, 2), (1.0, 5)]
    assert [c.value for c in found.cells] == pytest.approx(values.mean(dim=0).tolist())
    assert [c.standard_error for c in found.cells] == pytest.approx((values.std(dim=0) / 3**0.5).tolist())
    assert found.mean.value == pytest.approx(values.mean().item())
    assert found.mean.standard_error == pytest.approx(values.mean(dim=1).std().item() / 3**0.5)
    geometric = values.log().mean(dim=1).exp()
    assert found.geometric_mean.value == pytest.approx(geometric.mean().item())
    assert found.geometric_mean.standard_error == pytest.approx(geometric.std().item() / 3**0.5)
    assert (found.images, found.seeds, found.protocol) == (IMAGES, (3, 4, 8), "explicit-without-self")
    assert found.seconds > 0
    assert frechet().mean.standard_error is None
    assert frechet().cells[0].standard_error is None


def test_one_call_with_self():
    with_self = frechet(include_self=True)  # the default of pFID, as in the paper
    neighbours, by_hand = nearest_codes(CODEBOOK, 5, include_self=True), []
    for rate, strength in ((0.5, 2), (0.5, 5), (1.0, 2), (1.0, 5)):
        noisy = perturbed_tokens(TOKENS, neighbours[:, :strength], rate, 0, torch.arange(IMAGES))
        by_hand.append(frechet_distance(decoded_statistics([noisy], decode, MeanColours()), reference()))
    assert [c.value for c in with_self.cells] == pytest.approx(by_hand, rel=1e-9)
    assert with_self.protocol == "explicit"
    assert [c.value for c in PFID(**given()).run().cells] == pytest.approx(by_hand, rel=1e-9)
    assert [c.value for c in frechet().cells] != pytest.approx(by_hand)
    assert frechet().protocol == "explicit-without-self"


def test_every_cell_decodes_every_image_once():
    seen = []

    def counting(tokens):
        assert not torch.is_grad_enabled()
        seen.append(len(tokens))
        return decode(tokens)

    steps = []
    grid = ExplicitGrid(rates=(0.5, 1.0), codes=(2, 5, 6))
    frechet(grid, decode=counting, seeds=(0, 1), batch_size=16, progress=lambda done, of: steps.append((done, of)))
    assert sum(seen) == 2 * 6 * IMAGES
    assert max(seen) == 16
    assert steps == [(done, 12) for done in range(1, 13)]


def test_what_cannot_be_measured():
    with pytest.raises(UserError, match="replaces every token by itself; use strengths from 2"):
        frechet(ExplicitGrid(rates=(0.5,), codes=(1, 3)), include_self=True)
    with pytest.raises(UserError, match="a codebook of 24 codes has 23 neighbours"):
        frechet(ExplicitGrid(rates=(0.5,), codes=(24,)))
    with pytest.raises(UserError, match="codes 0 to 9"):
        frechet(RelativeGrid(), codebook=CODEBOOK[:10])
    with pytest.raises(UserError, match="no values to average"):
        frechet(seeds=())


def test_geometric_mean():
    assert geometric_mean([1.0, 8.0, 27.0]) == pytest.approx(6)
    assert geometric_mean([0.0, 8.0]) == 0
