import pytest
import torch

from robustok.metrics import GaussianStatistics, frechet_distance, latent_gap
from robustok.metrics.gap import mean_vectors
from robustok.types import UserError


def draw(shape, high, seed=0):
    return torch.randint(0, high, shape, generator=torch.Generator().manual_seed(seed))


CODEBOOK = torch.randn(16, 4, generator=torch.Generator().manual_seed(0))


def test_a_set_has_no_gap_to_itself():
    tokens = draw((30, 6), 16)
    gap = latent_gap(tokens, tokens, CODEBOOK, paired=True)
    assert gap.divergence == pytest.approx(0, abs=1e-12)
    assert gap.distance == pytest.approx(0, abs=1e-9)
    assert gap.agreement == 1
    assert gap.generated_usage == gap.encoded_usage == 1


def test_every_part_of_the_gap_is_the_one_it_says():
    generated, encoded = draw((30, 6), 8), draw((40, 6), 16, seed=1)
    gap = latent_gap(generated, encoded, CODEBOOK)
    sets = [GaussianStatistics.of(CODEBOOK[tokens].mean(dim=1)) for tokens in (generated, encoded)]
    assert gap.distance == pytest.approx(frechet_distance(*sets), rel=1e-4)
    assert (gap.generated_usage, gap.encoded_usage) == (0.5, 1)
    assert gap.divergence > 0.1
    assert gap.agreement is None


def test_distance_sees_tokens_that_go_together_where_frequencies_do_not():
    """Images of one code each, and the same tokens shuffled among the images: equal frequencies, another covariance."""
    uniform = torch.arange(16).repeat(10)[:, None].expand(-1, 6)
    shuffled = uniform.reshape(-1)[torch.randperm(uniform.numel(), generator=torch.Generator().manual_seed(0))].view(
        -1, 6
    )
    gap = latent_gap(shuffled, uniform, CODEBOOK)
    assert gap.divergence == pytest.approx(0, abs=1e-12)
    assert gap.distance > 0.5


def test_mean_vectors():
    tokens = draw((5, 6), 16)
    assert torch.allclose(mean_vectors(tokens, CODEBOOK), CODEBOOK[tokens].mean(dim=1), atol=1e-6)


def test_tokens_of_another_codebook_are_refused():
    with pytest.raises(UserError, match="codes 0 to 15"):
        latent_gap(torch.full((3, 2), 16), draw((3, 2), 16), CODEBOOK)
