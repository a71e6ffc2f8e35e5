import math

import pytest
import torch

from robustok.errors import UserError
from robustok.metrics.codebook import codebook_usage, count_tokens, token_divergence
from robustok.metrics.frechet import GaussianStatistics, frechet_distance
from robustok.metrics.kernel import kernel_distance
from robustok.metrics.latent_gap import latent_gap, mean_vectors, prediction_scores, reencoding_gap, teacher_forcing


def draw(shape, high, seed=0):
    return torch.randint(0, high, shape, generator=torch.Generator().manual_seed(seed))


def normal(shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


CODEBOOK = normal((16, 4))


def test_every_part_of_the_gap_is_the_one_it_says():
    """One draw, its sets drawn again by hand, every figure from its definition."""
    generated, encoded = draw((30, 6), 8), draw((40, 6), 16, seed=1)
    gap = latent_gap(generated, encoded, CODEBOOK, torch.Generator().manual_seed(5), draws=1)
    rng = torch.Generator().manual_seed(5)
    fake = generated[torch.randperm(30, generator=rng)[:20]]
    real, other = encoded[torch.randperm(40, generator=rng)].split(20)
    assert gap.images == 20
    assert gap.generated_usage == len(fake.unique()) / 16
    assert gap.encoded_usage == (len(real.unique()) + len(other.unique())) / 32
    for side, divergence, distance, position in (
        (fake, gap.divergence, gap.distance, gap.position_distance),
        (other, gap.divergence_floor, gap.distance_floor, gap.position_floor),
    ):
        assert divergence == pytest.approx(token_divergence(*(count_tokens(s, 16) for s in (side, real))))
        a, b = (CODEBOOK[s].double() for s in (side, real))
        expected = frechet_distance(GaussianStatistics.of(a.mean(dim=1)), GaussianStatistics.of(b.mean(dim=1)))
        assert distance == pytest.approx(expected, rel=1e-4)
        squares = (a.mean(dim=0) - b.mean(dim=0)).square() + (a.std(dim=0) - b.std(dim=0)).square()
        assert position == pytest.approx(squares.sum().item() / 6)
    standard = [CODEBOOK[s].mean(dim=1) for s in (generated, encoded)]
    standard = [(v - standard[1].mean(dim=0)) / standard[1].std(dim=0) for v in standard]
    assert gap.kernel.value == pytest.approx(kernel_distance(*standard).value, rel=1e-4)
    assert gap.kernel.standard_error == pytest.approx(kernel_distance(*standard).standard_error, rel=1e-4)


def test_latents_of_one_law_lie_at_their_floors():
    ratios, errors = [], []
    for seed in range(8):
        gap = latent_gap(draw((300, 8), 16, seed), draw((400, 8), 16, 100 + seed), CODEBOOK)
        of_distances = (gap.divergence, gap.distance, gap.position_distance)
        ratios.append([a / b for a, b in zip(of_distances, floors(gap), strict=True)])
        errors.append(gap.kernel.value / gap.kernel.standard_error)
    assert (torch.tensor(ratios).mean(dim=0) - 1).abs().max() < 0.25
    assert max(map(abs, errors)) < 3
    # Tokens are drawn one by one here, and the floor of the divergence is what theory says of 2 x 200 x 8 of them.
    assert gap.divergence_floor == pytest.approx(15 / (8 * math.log(2)) * 2 / 1600, rel=0.5)


def floors(gap):
    return gap.divergence_floor, gap.distance_floor, gap.position_floor


@pytest.mark.parametrize("continuous", [False, True])
def test_every_distance_sees_another_law(continuous):
    if continuous:
        gap = latent_gap(normal((300, 8, 4)) + 0.5, normal((400, 8, 4), seed=1))
        assert (gap.divergence, gap.divergence_floor, gap.generated_usage, gap.encoded_usage) == (None,) * 4
    else:
        gap = latent_gap(draw((300, 8), 8), draw((400, 8), 16, seed=1), CODEBOOK)
        assert gap.divergence > 20 * gap.divergence_floor
        assert (gap.generated_usage, gap.encoded_usage) == (0.5, 1)
    assert gap.distance > 5 * gap.distance_floor
    assert gap.position_distance > 5 * gap.position_floor
    assert gap.kernel.value > 5 * gap.kernel.standard_error
    names = {"latent_distance", "latent_position_distance", "latent_kernel_distance"}
    figures = gap.figures()
    assert figures.keys() == names | (set() if continuous else {"token_divergence", "generated_usage"})
    assert (figures["latent_distance"].value, figures["latent_distance"].baseline) == (gap.distance, gap.distance_floor)
    assert figures["latent_kernel_distance"].standard_error == gap.kernel.standard_error


def test_continuous_latents_are_their_own_vectors():
    tokens, others = draw((30, 6), 16), draw((40, 6), 16, seed=1)
    a, b = latent_gap(tokens, others, CODEBOOK), latent_gap(CODEBOOK[tokens], CODEBOOK[others])
    for name in ("distance", "distance_floor", "position_distance", "position_floor"):
        assert getattr(a, name) == pytest.approx(getattr(b, name), rel=1e-4)
    assert a.kernel.value == pytest.approx(b.kernel.value, rel=1e-3)


def test_distance_sees_tokens_that_go_together_where_frequencies_do_not():
    """Images of one code each, and the same tokens shuffled among the images: equal frequencies, another covariance."""
    uniform = torch.arange(16).repeat(20)[:, None].expand(-1, 6)
    order = torch.randperm(uniform.numel(), generator=torch.Generator().manual_seed(0))
    gap = latent_gap(uniform.reshape(-1)[order].view(-1, 6), uniform, CODEBOOK)
    assert gap.divergence < 2 * gap.divergence_floor
    assert gap.distance > 10 * gap.distance_floor
    assert gap.kernel.value > 5 * gap.kernel.standard_error


def test_position_distance_sees_places_where_means_do_not():
    """The tokens of every image in the order of their codes: the same mean vectors, other places."""
    encoded = draw((400, 8), 16)
    gap = latent_gap(draw((300, 8), 16, seed=1).sort(dim=1).values, encoded, CODEBOOK)
    assert gap.distance < 2 * gap.distance_floor
    assert gap.position_distance > 10 * gap.position_floor


def test_usage_is_compared_at_equal_numbers_of_images():
    tokens = draw((2000, 4), 500)
    gap = latent_gap(tokens[:50], tokens, torch.zeros(500, 2))
    assert gap.images == 50
    assert gap.generated_usage == codebook_usage(count_tokens(tokens[:50], 500))
    assert gap.encoded_usage == pytest.approx(gap.generated_usage, abs=0.05)
    assert codebook_usage(count_tokens(tokens, 500)) > 0.99


def test_the_same_call_gives_the_same_gap():
    tokens = draw((30, 6), 8), draw((40, 6), 16, seed=1)
    assert latent_gap(*tokens, CODEBOOK) == latent_gap(*tokens, CODEBOOK)
    other = latent_gap(*tokens, CODEBOOK, torch.Generator().manual_seed(1))
    assert other.distance != latent_gap(*tokens, CODEBOOK).distance


def test_mean_vectors():
    tokens = draw((5, 6), 16)
    assert torch.allclose(mean_vectors(tokens, CODEBOOK), CODEBOOK[tokens].mean(dim=1), atol=1e-6)
    assert torch.equal(mean_vectors(CODEBOOK[tokens]), CODEBOOK[tokens].mean(dim=1))


# Encoding again


def test_what_comes_back_is_counted_image_by_image():
    real = draw((2000, 6), 16)
    changed = draw((2000, 6), 16, seed=1)  # of another image: 1 in 16 agrees by chance
    gap = reencoding_gap(changed, real, real, real, CODEBOOK)
    assert (gap.agreement.baseline, gap.displacement.baseline, gap.distance.baseline) == (
        1,
        0,
        pytest.approx(0, abs=1e-9),
    )
    shares = (changed == real).double().mean(dim=1)
    assert gap.agreement.value == pytest.approx(shares.mean().item())
    assert gap.agreement.standard_error == pytest.approx(shares.std().item() / math.sqrt(2000))
    squares = (CODEBOOK[changed] - CODEBOOK[real]).double().square().sum(dim=2).mean(dim=1)
    spread = 2 * CODEBOOK[real].double().var(dim=0).sum(dim=1).mean()
    assert gap.displacement.value == pytest.approx((squares / spread).mean().item(), rel=1e-5)
    assert gap.displacement.value == pytest.approx(1, abs=4 * gap.displacement.standard_error)  # unrelated latents
    pooled = [GaussianStatistics.of(mean_vectors(t, CODEBOOK)) for t in (changed, real)]
    assert gap.distance.value == pytest.approx(frechet_distance(*pooled))
    assert gap.figures().keys() == {"token_agreement", "reencoded_displacement", "reencoded_distance"}


def test_continuous_latents_are_displaced_and_do_not_agree():
    latents = normal((500, 6, 4))
    gap = reencoding_gap(latents, latents + 0.5, latents, latents + 0.1)
    assert gap.agreement is None
    assert gap.displacement.value / gap.displacement.baseline == pytest.approx(25, rel=1e-4)
    assert gap.distance.value == pytest.approx(4 * 0.25, rel=1e-3)
    assert gap.figures().keys() == {"reencoded_displacement", "reencoded_distance"}


# Teacher forcing


def test_scores_match_a_plain_loop():
    logits, tokens = normal((5, 7, 9)), draw((5, 7), 9)
    found = prediction_scores(logits, tokens, k=3)
    assert found.shape == (5, 3)
    for i in range(5):
        best, loss, top = 0, 0, 0
        for j in range(7):
            order = logits[i, j].argsort(descending=True).tolist()
            best += order[0] == tokens[i, j].item()
            top += tokens[i, j].item() in order[:3]
            loss -= logits[i, j].double().softmax(-1)[tokens[i, j]].log().item()
        assert found[i].tolist() == pytest.approx([best / 7, loss / 7, top / 7], rel=1e-5)
    parts = torch.cat([prediction_scores(logits[i : i + 1], tokens[i : i + 1], k=3) for i in range(5)])
    assert torch.allclose(parts, found, rtol=1e-6)


def test_constant_logits_earn_nothing():
    accuracy, loss, top = prediction_scores(torch.zeros(2, 3, 8), draw((2, 3), 8), k=7).mean(dim=0).tolist()
    assert (accuracy, top) == (0, 0)
    assert loss == pytest.approx(math.log(8))


def test_teacher_forcing_beside_chance():
    """Logits that know the frequencies and nothing else reach chance and no more."""
    chances = torch.tensor([0.5, 0.25, 0.125, 0.125])
    tokens = torch.multinomial(chances.expand(4000, 4), 5, replacement=True, generator=torch.Generator().manual_seed(0))
    counts = count_tokens(tokens, 4)
    logits = (counts / counts.sum()).log().expand(4000, 5, 4)
    scores = prediction_scores(logits, tokens, k=2)
    found = teacher_forcing(scores, counts, k=2)
    assert found.accuracy.value == pytest.approx(found.chance_accuracy)
    assert found.top_k.value == pytest.approx(found.chance_top_k)
    assert found.cross_entropy.value == pytest.approx(found.chance_cross_entropy, rel=1e-5)
    assert found.chance_cross_entropy == pytest.approx(1.75 * math.log(2), rel=0.01)
    assert found.accuracy.standard_error == pytest.approx(scores[:, 0].std().item() / math.sqrt(4000))
    assert (found.k, found.images) == (2, 4000)
    figures = found.figures()
    assert figures.keys() == {"generator_accuracy", "generator_cross_entropy", "generator_top_k"}
    assert figures["generator_top_k"].baseline == found.chance_top_k
    assert figures["generator_cross_entropy"].standard_error == found.cross_entropy.standard_error


# Bad input


def test_what_cannot_be_compared():
    some = draw((9, 2), 16)
    with pytest.raises(UserError, match="codes 0 to 15"):
        latent_gap(torch.full((9, 2), 16), some, CODEBOOK)
    with pytest.raises(UserError, match="need at least 3 and 6"):
        latent_gap(some, some[:5], CODEBOOK)
    with pytest.raises(UserError, match="those of one tokenizer"):
        latent_gap(some, draw((9, 3), 16), CODEBOOK)
    with pytest.raises(UserError, match=r"tokens \(N, L\) int64 with a codebook"):
        latent_gap(some, CODEBOOK[some], CODEBOOK)
    with pytest.raises(UserError, match=r"floats \(N, L, D\) without a codebook"):
        latent_gap(some, some)
    with pytest.raises(UserError, match="not finite"):
        latent_gap(normal((9, 2, 3)), torch.full((9, 2, 3), math.nan))
    with pytest.raises(UserError, match="before and after"):
        reencoding_gap(some, some[:8], some, some, CODEBOOK)
    with pytest.raises(UserError, match=r"expected \(N, L, K\)"):
        prediction_scores(torch.zeros(2, 4, 8), draw((2, 3), 8))
    with pytest.raises(UserError, match="k = 10 for 8 codes"):
        prediction_scores(torch.zeros(2, 3, 8), draw((2, 3), 8))
    with pytest.raises(UserError, match="codes 0 to 7"):
        prediction_scores(torch.zeros(2, 3, 8), torch.full((2, 3), 8), k=2)
    with pytest.raises(UserError, match="not numbers"):
        prediction_scores(torch.full((2, 3, 8), math.nan), draw((2, 3), 8), k=2)
    with pytest.raises(UserError, match="two or more images"):
        teacher_forcing(torch.zeros(1, 3), torch.ones(4))
