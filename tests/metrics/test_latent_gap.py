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
    assert {figure.images for figure in gap.values()} == {20}
    assert gap["generated_usage"].value == len(fake.unique()) / 16
    assert gap["generated_usage"].baseline == (len(real.unique()) + len(other.unique())) / 32
    for side, (divergence, distance, position) in ((fake, values(gap)), (other, floors(gap))):
        assert divergence == pytest.approx(token_divergence(*(count_tokens(s, 16) for s in (side, real))))
        a, b = (CODEBOOK[s].double() for s in (side, real))
        expected = frechet_distance(GaussianStatistics.of(a.mean(dim=1)), GaussianStatistics.of(b.mean(dim=1)))
        assert distance == pytest.approx(expected, rel=1e-4)
        squares = (a.mean(dim=0) - b.mean(dim=0)).square() + (a.std(dim=0) - b.std(dim=0)).square()
        assert position == pytest.approx(squares.sum().item() / 6)
    standard = [CODEBOOK[s].mean(dim=1) for s in (generated, encoded)]
    standard = [(v - standard[1].mean(dim=0)) / standard[1].std(dim=0) for v in standard]
    assert gap[KERNEL].value == pytest.approx(kernel_distance(*standard).value, rel=1e-4)
    assert gap[KERNEL].standard_error == pytest.approx(kernel_distance(*standard).standard_error, rel=1e-4)


def test_latents_of_one_distribution_lie_at_their_baselines():
    ratios, errors = [], []
    for seed in range(8):
        gap = latent_gap(draw((300, 8), 16, seed), draw((400, 8), 16, 100 + seed), CODEBOOK)
        ratios.append([a / b for a, b in zip(values(gap), floors(gap), strict=True)])
        errors.append(gap[KERNEL].value / gap[KERNEL].standard_error)
    assert (torch.tensor(ratios).mean(dim=0) - 1).abs().max() < 0.25
    assert max(map(abs, errors)) < 3
    # Tokens are drawn one by one here, and the baseline of the divergence is the expected one of 2 x 200 x 8 of them.
    assert gap["token_divergence"].baseline == pytest.approx(15 / (8 * math.log(2)) * 2 / 1600, rel=0.5)


DISTANCES = ("token_divergence", "latent_distance", "latent_position_distance")
KERNEL = "latent_kernel_distance"


def values(gap):
    return tuple(gap[name].value for name in DISTANCES)


def floors(gap):
    return tuple(gap[name].baseline for name in DISTANCES)


@pytest.mark.parametrize("continuous", [False, True])
def test_every_distance_shows_another_distribution(continuous):
    if continuous:
        gap = latent_gap(normal((300, 8, 4)) + 0.5, normal((400, 8, 4), seed=1))
    else:
        gap = latent_gap(draw((300, 8), 8), draw((400, 8), 16, seed=1), CODEBOOK)
        assert gap["token_divergence"].value > 20 * gap["token_divergence"].baseline
        assert (gap["generated_usage"].value, gap["generated_usage"].baseline) == (0.5, 1)
    for name in DISTANCES[1:]:
        assert gap[name].value > 5 * gap[name].baseline
        assert gap[name].standard_error is None
    assert gap[KERNEL].value > 5 * gap[KERNEL].standard_error
    names = {"latent_distance", "latent_position_distance", KERNEL}
    assert gap.keys() == names | (set() if continuous else {"token_divergence", "generated_usage"})


def test_continuous_latents_are_their_own_vectors():
    tokens, others = draw((30, 6), 16), draw((40, 6), 16, seed=1)
    a, b = latent_gap(tokens, others, CODEBOOK), latent_gap(CODEBOOK[tokens], CODEBOOK[others])
    for name in DISTANCES[1:]:
        assert a[name].value == pytest.approx(b[name].value, rel=1e-4)
        assert a[name].baseline == pytest.approx(b[name].baseline, rel=1e-4)
    assert a[KERNEL].value == pytest.approx(b[KERNEL].value, rel=1e-3)


def test_distance_depends_on_which_tokens_go_together_and_frequencies_do_not():
    """Images of one code each, and the same tokens shuffled among the images: equal frequencies, another covariance."""
    uniform = torch.arange(16).repeat(20)[:, None].expand(-1, 6)
    order = torch.randperm(uniform.numel(), generator=torch.Generator().manual_seed(0))
    gap = latent_gap(uniform.reshape(-1)[order].view(-1, 6), uniform, CODEBOOK)
    assert gap["token_divergence"].value < 2 * gap["token_divergence"].baseline
    assert gap["latent_distance"].value > 10 * gap["latent_distance"].baseline
    assert gap[KERNEL].value > 5 * gap[KERNEL].standard_error


def test_position_distance_depends_on_positions_and_means_do_not():
    """The tokens of every image in the order of their codes: the same mean vectors, other positions."""
    encoded = draw((400, 8), 16)
    gap = latent_gap(draw((300, 8), 16, seed=1).sort(dim=1).values, encoded, CODEBOOK)
    assert gap["latent_distance"].value < 2 * gap["latent_distance"].baseline
    assert gap["latent_position_distance"].value > 10 * gap["latent_position_distance"].baseline


def test_usage_is_compared_at_equal_numbers_of_images():
    tokens = draw((2000, 4), 500)
    usage = latent_gap(tokens[:50], tokens, torch.zeros(500, 2))["generated_usage"]
    assert usage.images == 50
    assert usage.value == codebook_usage(count_tokens(tokens[:50], 500))
    assert usage.baseline == pytest.approx(usage.value, abs=0.05)
    assert codebook_usage(count_tokens(tokens, 500)) > 0.99


def test_the_same_call_gives_the_same_gap():
    tokens = draw((30, 6), 8), draw((40, 6), 16, seed=1)
    assert latent_gap(*tokens, CODEBOOK) == latent_gap(*tokens, CODEBOOK)
    other = latent_gap(*tokens, CODEBOOK, torch.Generator().manual_seed(1))
    assert other["latent_distance"] != latent_gap(*tokens, CODEBOOK)["latent_distance"]


def test_mean_vectors():
    tokens = draw((5, 6), 16)
    assert torch.allclose(mean_vectors(tokens, CODEBOOK), CODEBOOK[tokens].mean(dim=1), atol=1e-6)
    assert torch.equal(mean_vectors(CODEBOOK[tokens]), CODEBOOK[tokens].mean(dim=1))


# Encoding again


def test_what_comes_back_is_counted_image_by_image():
    real = draw((2000, 6), 16)
    changed = draw((2000, 6), 16, seed=1)  # of another image: 1 in 16 agrees by chance
    gap = reencoding_gap(changed, real, real, real, CODEBOOK)
    agreement, displacement, distance = gap.values()
    assert (agreement.baseline, displacement.baseline, distance.baseline) == (1, 0, pytest.approx(0, abs=1e-9))
    shares = (changed == real).double().mean(dim=1)
    assert agreement.value == pytest.approx(shares.mean().item())
    assert agreement.standard_error == pytest.approx(shares.std().item() / math.sqrt(2000))
    squares = (CODEBOOK[changed] - CODEBOOK[real]).double().square().sum(dim=2).mean(dim=1)
    spread = 2 * CODEBOOK[real].double().var(dim=0).sum(dim=1).mean()
    assert displacement.value == pytest.approx((squares / spread).mean().item(), rel=1e-5)
    assert displacement.value == pytest.approx(1, abs=4 * displacement.standard_error)  # unrelated latents
    pooled = [GaussianStatistics.of(mean_vectors(t, CODEBOOK)) for t in (changed, real)]
    assert distance.value == pytest.approx(frechet_distance(*pooled))
    assert list(gap) == ["token_agreement", "reencoded_displacement", "reencoded_distance"]
    assert {figure.images for figure in gap.values()} == {2000}


def test_continuous_latents_are_displaced_and_do_not_agree():
    latents = normal((500, 6, 4))
    gap = reencoding_gap(latents, latents + 0.5, latents, latents + 0.1)
    assert list(gap) == ["reencoded_displacement", "reencoded_distance"]
    assert gap["reencoded_displacement"].value / gap["reencoded_displacement"].baseline == pytest.approx(25, rel=1e-4)
    assert gap["reencoded_distance"].value == pytest.approx(4 * 0.25, rel=1e-3)


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


def test_constant_logits_score_zero():
    accuracy, loss, top = prediction_scores(torch.zeros(2, 3, 8), draw((2, 3), 8), k=7).mean(dim=0).tolist()
    assert (accuracy, top) == (0, 0)
    assert loss == pytest.approx(math.log(8))


def test_teacher_forcing_beside_chance():
    """Logits made of the frequencies alone reach chance and no more."""
    chances = torch.tensor([0.5, 0.25, 0.125, 0.125])
    tokens = torch.multinomial(chances.expand(4000, 4), 5, replacement=True, generator=torch.Generator().manual_seed(0))
    counts = count_tokens(tokens, 4)
    logits = (counts / counts.sum()).log().expand(4000, 5, 4)
    scores = prediction_scores(logits, tokens, k=2)
    found = teacher_forcing(scores, counts, k=2)
    accuracy, cross_entropy, top_k = found.values()
    assert list(found) == ["generator_accuracy", "generator_cross_entropy", "generator_top_k"]
    assert accuracy.value == pytest.approx(accuracy.baseline)
    assert top_k.value == pytest.approx(top_k.baseline)
    assert cross_entropy.value == pytest.approx(cross_entropy.baseline, rel=1e-5)
    assert cross_entropy.baseline == pytest.approx(1.75 * math.log(2), rel=0.01)
    for column, figure in enumerate(found.values()):
        assert figure.standard_error == pytest.approx(scores[:, column].std().item() / math.sqrt(4000))
        assert figure.images == 4000


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
