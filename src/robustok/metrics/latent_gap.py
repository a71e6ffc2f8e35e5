"""The gap between the latents that a generator makes and those that the encoder makes, before any decoder sees them.

A distance between two finite sets is never zero, so every figure stands beside the same figure with *other real latents
in the place of the generated ones*: the floor of a distance, and what to compare a share with.
"""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from robustok.errors import UserError
from robustok.metrics.codebook import codebook_perplexity, codebook_usage, count_tokens, token_divergence
from robustok.metrics.frechet import Estimate, GaussianStatistics, frechet_distance
from robustok.metrics.kernel import kernel_distance

KERNEL_IMAGES = 10_000  # of a set: the kernel distance is unbiased at every size, and quadratic in it
CHUNK = 1024  # images at a time


@dataclass(frozen=True)
class Figure:
    """One figure of the gap.

    Attributes:
        value: of the generated latents, or of the generator.
        baseline: what it would be for real latents, or by chance.
        standard_error: of ``value``; None where it is not known.
    """

    value: float
    baseline: float
    standard_error: float | None = None


@dataclass(frozen=True)
class LatentGap:
    """How far generated latents lie from encoded ones, at equal numbers of images.

    The floors are distances of real latents to other real latents, as many of each: what sampling alone makes.

    Attributes:
        images: n, generated images that are compared with as many real ones.
        generated_usage: share of the codes that n generated images use, in [0, 1]; None for continuous latents.
        encoded_usage: share of the codes that n real images use, in [0, 1]; None for continuous latents.
        divergence: Jensen-Shannon divergence of their token frequencies in bits, [0, 1]; None for continuous latents.
        divergence_floor: the same between real images.
        distance: Frechet distance between the images' mean latents.
        distance_floor: the same between real images.
        position_distance: Frechet distance of the latents at each position, mean over positions, with variances in the
            place of covariances: what is where, which a mean over positions cannot see.
        position_floor: the same between real images.
        kernel: squared MMD of the images' mean latents, unbiased, with its standard error.
        kernel_floor: the same between real images: zero up to its error.
    """

    images: int
    generated_usage: float | None
    encoded_usage: float | None
    divergence: float | None
    divergence_floor: float | None
    distance: float
    distance_floor: float
    position_distance: float
    position_floor: float
    kernel: Estimate
    kernel_floor: Estimate

    def figures(self) -> dict[str, Figure]:
        """Every figure by the name that it has in metrics.jsonl."""
        found = {
            "generated_usage": (self.generated_usage, self.encoded_usage),
            "token_divergence": (self.divergence, self.divergence_floor),
            "latent_distance": (self.distance, self.distance_floor),
            "latent_position_distance": (self.position_distance, self.position_floor),
        }
        kernel = Figure(self.kernel.value, self.kernel_floor.value, self.kernel.standard_error)
        of_tokens = {name: Figure(*pair) for name, pair in found.items() if pair[0] is not None}
        return of_tokens | {"latent_kernel_distance": kernel}


def latent_gap(
    generated: Tensor,
    encoded: Tensor,
    codebook: Tensor | None = None,
    rng: torch.Generator | None = None,
    draws: int = 5,
) -> LatentGap:
    """Compare generated latents with those of real images, and these with each other.

    Distances of finite sets shrink as the sets grow. So n generated images are compared with n real ones, and n real
    ones with n others: n is half the real images, or all generated ones where these are fewer. The figures are means
    over several draws of such sets, without replacement; the kernel distance needs no equal sizes and takes them all.

    Args:
        generated: tokens (N, L) int64, or latents (N, L, D).
        encoded: (M, L) or (M, L, D), of real images.
        codebook: (K, D) for tokens; None for continuous latents.
        rng: draws the sets, a CPU generator; None is one seeded with 0.
        draws: how many times, at least 1.

    Raises:
        UserError: tokens outside the codebook, latents of different shape or not finite, fewer than three generated or
            six real images.
    """
    _check(generated, codebook)
    _check(encoded, codebook)
    if generated.shape[1:] != encoded.shape[1:]:
        shapes = f"{tuple(generated.shape)} and {tuple(encoded.shape)}"
        raise UserError(f"got generated and encoded latents {shapes}, expected those of one tokenizer")
    images = min(len(generated), len(encoded) // 2)
    if images < 3:
        found = f"{len(generated)} generated and {len(encoded)} real images"
        raise UserError(f"got latents of {found}, need at least 3 and 6 for the gap; encode more images")
    rng = torch.Generator().manual_seed(0) if rng is None else rng
    usages, values, floors = [], [], []
    for _ in range(draws):
        chosen = torch.randperm(len(generated), generator=rng)[:images]
        halves = torch.randperm(len(encoded), generator=rng)[: 2 * images].split(images)
        fake = _Side.of(generated[chosen], codebook)
        real, other = (_Side.of(encoded[half], codebook) for half in halves)
        usages.append((fake.usage, (real.usage + other.usage) / 2))
        values.append(fake.distances(real))
        floors.append(other.distances(real))
    usage, value, floor = (
        torch.tensor(found, dtype=torch.float64).mean(dim=0).tolist() for found in (usages, values, floors)
    )
    fakes, reals = mean_vectors(generated, codebook), mean_vectors(encoded, codebook)
    standard = reals.double().mean(dim=0), reals.double().std(dim=0)
    discrete = codebook is not None
    return LatentGap(
        images,
        generated_usage=usage[0] if discrete else None,
        encoded_usage=usage[1] if discrete else None,
        divergence=value[0] if discrete else None,
        divergence_floor=floor[0] if discrete else None,
        distance=value[1],
        distance_floor=floor[1],
        position_distance=value[2],
        position_floor=floor[2],
        kernel=_kernel_distance(fakes, reals, *standard),
        kernel_floor=_kernel_distance(reals[halves[0]], reals[halves[1]], *standard),
    )


@dataclass(frozen=True)
class ReencodingGap:
    """How much of the latents comes back when their images are encoded again; real latents give the standard.

    Attributes:
        agreement: share of tokens that stay the same, [0, 1]; None for continuous latents.
        displacement: mean squared distance between a latent and the one that comes back, as a share of that between two
            real images at the same position: 0 is the same, 1 unrelated.
        distance: Frechet distance between the mean latents of the images and of those that come back.
    """

    agreement: Figure | None
    displacement: Figure
    distance: Figure

    def figures(self) -> dict[str, Figure]:
        """Every figure by the name that it has in metrics.jsonl."""
        agreement = {} if self.agreement is None else {"token_agreement": self.agreement}
        return agreement | {"reencoded_displacement": self.displacement, "reencoded_distance": self.distance}


def reencoding_gap(
    generated: Tensor,
    generated_again: Tensor,
    encoded: Tensor,
    encoded_again: Tensor,
    codebook: Tensor | None = None,
) -> ReencodingGap:
    """Compare latents with what the encoder makes of the images that they decode to, for generated and real ones.

    A decoder and encoder that know the latents they are given bring them back; less comes back of latents that they
    have not seen.

    Args:
        generated: tokens (N, L) int64, or latents (N, L, D).
        generated_again: of the same shape: ``generated`` decoded and encoded again, image by image.
        encoded: (M, L) or (M, L, D), of real images.
        encoded_again: of the same shape: ``encoded`` decoded and encoded again.
        codebook: (K, D) for tokens; None for continuous latents.

    Raises:
        UserError: pairs of different shape, tokens outside the codebook, values that are not finite, or fewer than two
            images.
    """
    pairs = ((generated, generated_again), (encoded, encoded_again))
    for before, after in pairs:
        _check(before, codebook)
        _check(after, codebook)
        if before.shape != after.shape or len(before) < 2:
            shapes = f"{tuple(before.shape)} and {tuple(after.shape)}"
            raise UserError(f"got latents {shapes} before and after encoding again, expected pairs of 2 or more images")
    spread = 2 * _position_moments(encoded, codebook)[1].square().sum(dim=1).mean().item()
    agreements = [_over_images((a == b).double().mean(dim=1)) for a, b in pairs] if codebook is not None else None
    moved = [_over_images(_squared_distances(a, b, codebook) / spread) for a, b in pairs]
    pooled = [[GaussianStatistics.of(mean_vectors(latents, codebook)) for latents in pair] for pair in pairs]
    apart = [frechet_distance(*pair) for pair in pooled]
    return ReencodingGap(
        None if agreements is None else _beside(*agreements), _beside(*moved), Figure(apart[0], apart[1])
    )


@dataclass(frozen=True)
class TeacherForcing:
    """How well a generator predicts each token of real images from the real tokens before it.

    ``chance`` is what one would reach by knowing how frequent each token is, and nothing else.

    Attributes:
        accuracy: share of tokens that are the most likely one, [0, 1].
        cross_entropy: mean of -ln p(token) in nats.
        top_k: share of tokens among the k most likely ones, [0, 1].
        k: of ``top_k``.
        chance_accuracy: share of the most frequent token.
        chance_cross_entropy: entropy of the token frequencies in nats.
        chance_top_k: share of the k most frequent tokens.
        images: N, over which the standard errors are taken.
    """

    accuracy: Estimate
    cross_entropy: Estimate
    top_k: Estimate
    k: int
    chance_accuracy: float
    chance_cross_entropy: float
    chance_top_k: float
    images: int

    def figures(self) -> dict[str, Figure]:
        """Every figure by the name that it has in metrics.jsonl."""
        pairs = {
            "generator_accuracy": (self.accuracy, self.chance_accuracy),
            "generator_cross_entropy": (self.cross_entropy, self.chance_cross_entropy),
            "generator_top_k": (self.top_k, self.chance_top_k),
        }
        return {name: Figure(e.value, chance, e.standard_error) for name, (e, chance) in pairs.items()}


def prediction_scores(logits: Tensor, tokens: Tensor, k: int = 10) -> Tensor:
    """How well logits predict tokens, image by image, so that the rows of batches and processes can be joined.

    Args:
        logits: (n, L, K), as predicted from the real tokens before each.
        tokens: (n, L) int64, the real tokens in the order of the logits.
        k: of the third column.

    Returns:
        (n, 3) float64 on the CPU: share of tokens that are the most likely one, mean cross-entropy in nats, share of
        tokens among the k most likely. Of equal logits the token comes last, so that constant ones earn nothing.

    Raises:
        UserError: shapes that do not belong together, tokens outside 0..K-1, NaN, or k outside 1..K.
    """
    if logits.ndim != 3 or logits.shape[:2] != tokens.shape:
        shapes = f"{tuple(logits.shape)} and tokens {tuple(tokens.shape)}"
        raise UserError(f"got logits {shapes}, expected (N, L, K) and (N, L)")
    if not 1 <= k <= logits.shape[2]:
        raise UserError(f"got k = {k} for {logits.shape[2]} codes, expected 1 to {logits.shape[2]}")
    count_tokens(tokens, logits.shape[2])  # refuses those of another codebook
    logits = logits.float()
    if logits.isnan().any():
        raise UserError("got logits that are not numbers, expected finite ones; look for broken weights")
    own = logits.gather(2, tokens[..., None])  # (n, L, 1)
    rank = (logits >= own).sum(dim=2)  # (n, L), 1 for the most likely
    losses = logits.logsumexp(dim=2) - own[..., 0]  # (n, L)
    columns = [(rank == 1).double(), losses.double(), (rank <= k).double()]
    return torch.stack([column.mean(dim=1) for column in columns], dim=1).cpu()  # (n, 3)


def teacher_forcing(scores: Tensor, counts: Tensor, k: int = 10) -> TeacherForcing:
    """Summarise :func:`prediction_scores` of all images.

    Args:
        scores: (N, 3), N >= 2.
        counts: (K,) of the same tokens, from :func:`count_tokens`.
        k: the one of ``scores``.

    Raises:
        UserError: fewer than two images, or nothing was counted.
    """
    if scores.ndim != 2 or scores.shape[1] != 3 or len(scores) < 2:
        raise UserError(f"got scores {tuple(scores.shape)}, expected (N, 3) of two or more images; predict more images")
    estimates = [_over_images(column) for column in scores.double().T]
    frequent = counts.double().sort(descending=True).values / counts.sum()
    return TeacherForcing(
        *estimates,
        k=k,
        chance_accuracy=frequent[0].item(),
        chance_cross_entropy=math.log(codebook_perplexity(counts)),
        chance_top_k=frequent[:k].sum().item(),
        images=len(scores),
    )


def mean_vectors(latents: Tensor, codebook: Tensor | None = None) -> Tensor:
    """The mean over positions of an image's latents, (N, D) float32: tokens (N, L) with a codebook, or (N, L, D).

    One vector an image, rather than one a position: their covariance sees how the latents of an image go together,
    which token frequencies cannot.
    """
    if codebook is None:
        return latents.float().mean(dim=1)  # (N, D)
    return F.embedding_bag(latents, codebook.detach().float(), mode="mean")  # (N, D)


@dataclass(frozen=True)
class _Side:
    """One of two sets that are compared; what is of tokens alone is NaN for continuous latents."""

    counts: Tensor | None
    pooled: GaussianStatistics
    mean: Tensor
    deviation: Tensor

    @classmethod
    def of(cls, latents: Tensor, codebook: Tensor | None) -> "_Side":
        counts = None if codebook is None else count_tokens(latents, len(codebook))
        pooled = GaussianStatistics.of(mean_vectors(latents, codebook))
        return cls(counts, pooled, *_position_moments(latents, codebook))

    @property
    def usage(self) -> float:
        return math.nan if self.counts is None else codebook_usage(self.counts)

    def distances(self, real: "_Side") -> tuple[float, float, float]:
        """Divergence, distance and position distance."""
        divergence = math.nan if self.counts is None else token_divergence(self.counts, real.counts)
        squares = (self.mean - real.mean).square() + (self.deviation - real.deviation).square()  # (L, D)
        return divergence, frechet_distance(self.pooled, real.pooled), squares.sum(dim=1).mean().item()


def _position_moments(latents: Tensor, codebook: Tensor | None) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation over images at each position, (L, D) float64 each."""
    count, total, squares = len(latents), 0.0, 0.0
    shift = _vectors(latents[:1], codebook)[0]  # (L, D), near the mean, so that the squares do not cancel
    for chunk in latents.split(CHUNK):
        vectors = _vectors(chunk, codebook) - shift  # (n, L, D)
        total, squares = total + vectors.sum(dim=0), squares + vectors.square().sum(dim=0)
    mean = total / count
    return mean + shift, ((squares - count * mean.square()) / (count - 1)).clamp(min=0).sqrt()


def _vectors(latents: Tensor, codebook: Tensor | None) -> Tensor:
    """(n, L, D) float64."""
    return (latents if codebook is None else F.embedding(latents, codebook.detach())).double()


def _squared_distances(a: Tensor, b: Tensor, codebook: Tensor | None) -> Tensor:
    """(N,) float64, mean over positions."""
    parts = zip(a.split(CHUNK), b.split(CHUNK), strict=True)
    apart = [(_vectors(x, codebook) - _vectors(y, codebook)).square().sum(dim=2).mean(dim=1) for x, y in parts]
    return torch.cat(apart)


def _kernel_distance(a: Tensor, b: Tensor, center: Tensor, scale: Tensor) -> Estimate:
    """The kernel distance of mean latents, each channel standardised by that of real images.

    KID's cubic kernel, not a Gaussian one: it has no bandwidth to choose and an exact jackknife error, and sees means,
    covariances and third moments. What it needs is a unit, for its "+ 1" and for the weights of the channels.
    """
    scale = torch.where(scale > 0, scale, 1.0)  # a channel that never changes
    some = [(vectors[:: -(-len(vectors) // KERNEL_IMAGES)].double() - center) / scale for vectors in (a, b)]
    return kernel_distance(*some)


def _over_images(values: Tensor) -> Estimate:
    return Estimate(values.mean().item(), values.std().item() / math.sqrt(len(values)))


def _beside(generated: Estimate, real: Estimate) -> Figure:
    return Figure(generated.value, real.value, generated.standard_error)


def _check(latents: Tensor, codebook: Tensor | None) -> None:
    """Refuse latents that are not those of one kind of tokenizer."""
    discrete = codebook is not None
    if latents.ndim != (2 if discrete else 3) or latents.is_floating_point() == discrete:
        expected = "tokens (N, L) int64 with a codebook" if discrete else "floats (N, L, D) without a codebook"
        raise UserError(f"got latents {tuple(latents.shape)} of {latents.dtype}, expected {expected}")
    if discrete:
        count_tokens(latents, len(codebook))
    elif not torch.isfinite(latents).all():
        raise UserError("got latents that are not finite, expected numbers; look for broken images or weights")
