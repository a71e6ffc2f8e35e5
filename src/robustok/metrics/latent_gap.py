"""The gap between the latents that a generator makes and those that the encoder makes of real images.

A distance between two finite sets is never zero. So each value has a baseline: the same with *other real latents
in the place of the generated ones*. Results are dictionaries of figures by their names in metrics.jsonl.
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
        baseline: of real latents, or by chance.
        standard_error: of ``value``; None where it is not known.
        images: number of images behind ``value``.
    """

    value: float
    baseline: float
    standard_error: float | None = None
    images: int = 0


def latent_gap(
    generated: Tensor,
    encoded: Tensor,
    codebook: Tensor | None = None,
    rng: torch.Generator | None = None,
    draws: int = 5,
) -> dict[str, Figure]:
    """Compare generated latents with those of real images, and these with each other.

    Distances of finite sets shrink as the sets grow. So n generated images are compared with n real ones, and n real
    ones with n others: n is half the real images, or all generated ones where these are fewer. The figures are means
    over several draws of such sets, without replacement. The kernel distance is unbiased at every size and uses all
    images. The figures:

    * ``generated_usage``: share of the codes that occur in n images, [0, 1]. Tokens only.
    * ``token_divergence``: Jensen-Shannon divergence of the token frequencies in bits, [0, 1]. Tokens only.
    * ``latent_distance``: Frechet distance of the images' mean latents.
    * ``latent_position_distance``: Frechet distance of the latents at each position with variances in the place of
      covariances, mean over positions. It depends on the order of the latents, which the mean latents do not.
    * ``latent_kernel_distance``: squared MMD of the images' mean latents, with a standard error.

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
        fake = _Latents.of(generated[chosen], codebook)
        real, other = (_Latents.of(encoded[half], codebook) for half in halves)
        usages.append((fake.usage, (real.usage + other.usage) / 2))
        values.append(fake.distances(real))
        floors.append(other.distances(real))
    usage, value, floor = (
        torch.tensor(found, dtype=torch.float64).mean(dim=0).tolist() for found in (usages, values, floors)
    )
    fakes, reals = mean_vectors(generated, codebook), mean_vectors(encoded, codebook)
    standard = reals.double().mean(dim=0), reals.double().std(dim=0)
    kernel = _kernel_distance(fakes, reals, *standard)
    kernel_floor = _kernel_distance(reals[halves[0]], reals[halves[1]], *standard)
    found = {
        "generated_usage": Figure(*usage, images=images),
        "token_divergence": Figure(value[0], floor[0], images=images),
        "latent_distance": Figure(value[1], floor[1], images=images),
        "latent_position_distance": Figure(value[2], floor[2], images=images),
        "latent_kernel_distance": Figure(kernel.value, kernel_floor.value, kernel.standard_error, images),
    }
    return {name: figure for name, figure in found.items() if not math.isnan(figure.value)}


def reencoding_gap(
    generated: Tensor,
    generated_again: Tensor,
    encoded: Tensor,
    encoded_again: Tensor,
    codebook: Tensor | None = None,
) -> dict[str, Figure]:
    """Compare latents with what the encoder makes of the images that they decode to, for generated and real ones.

    Decoder and encoder were trained on latents of real images; generated ones change more. The figures:

    * ``token_agreement``: share of tokens that stay the same, [0, 1]. Tokens only.
    * ``reencoded_displacement``: mean squared distance between a latent and the encoded one, as a share of that between
      two real images at the same position: 0 is the same, 1 unrelated.
    * ``reencoded_distance``: Frechet distance of the images' mean latents before and after.

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
    found = {} if codebook is None else {"token_agreement": [(a == b).double().mean(dim=1) for a, b in pairs]}
    found["reencoded_displacement"] = [_squared_distances(a, b, codebook) / spread for a, b in pairs]
    pooled = [[GaussianStatistics.of(mean_vectors(latents, codebook)) for latents in pair] for pair in pairs]
    distance, floor = (frechet_distance(*pair) for pair in pooled)
    figures = {name: _over_images(fake, real.mean().item()) for name, (fake, real) in found.items()}
    return figures | {"reencoded_distance": Figure(distance, floor, images=len(generated))}


def prediction_scores(logits: Tensor, tokens: Tensor, k: int = 10) -> Tensor:
    """How well logits predict tokens, image by image, so that the rows of batches and processes can be joined.

    Args:
        logits: (n, L, K), as predicted from the real tokens before each.
        tokens: (n, L) int64, the real tokens in the order of the logits.
        k: of the third column.

    Returns:
        (n, 3) float64 on the CPU: share of tokens that are the most likely one, mean cross-entropy in nats, share of
        tokens among the k most likely. Among equal logits the token ranks last, so that constant logits score 0.

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


def teacher_forcing(scores: Tensor, counts: Tensor, k: int = 10) -> dict[str, Figure]:
    """How well a generator predicts each token of real images from the real tokens before it.

    The baselines are what the frequencies of the tokens alone would reach. The figures:

    * ``generator_accuracy``: share of tokens that are the most likely one, [0, 1].
    * ``generator_cross_entropy``: mean of -ln p(token) in nats.
    * ``generator_top_k``: share of tokens among the k most likely ones, [0, 1].

    Args:
        scores: (N, 3), N >= 2, :func:`prediction_scores` of all images.
        counts: (K,) of the same tokens, from :func:`count_tokens`.
        k: the one of ``scores``.

    Raises:
        UserError: fewer than two images, or nothing was counted.
    """
    if scores.ndim != 2 or scores.shape[1] != 3 or len(scores) < 2:
        raise UserError(f"got scores {tuple(scores.shape)}, expected (N, 3) of two or more images; predict more images")
    frequent = counts.double().sort(descending=True).values / counts.sum()
    chance = {
        "generator_accuracy": frequent[0].item(),
        "generator_cross_entropy": math.log(codebook_perplexity(counts)),
        "generator_top_k": frequent[:k].sum().item(),
    }
    columns = zip(chance.items(), scores.double().T, strict=True)
    return {name: _over_images(column, baseline) for (name, baseline), column in columns}


def mean_vectors(latents: Tensor, codebook: Tensor | None = None) -> Tensor:
    """The mean over positions of an image's latents, (N, D) float32: tokens (N, L) with a codebook, or (N, L, D).

    One vector for each image rather than for each position: their covariance depends on which latents occur in the
    same image, which token frequencies do not.
    """
    if codebook is None:
        return latents.float().mean(dim=1)  # (N, D)
    return F.embedding_bag(latents, codebook.detach().float(), mode="mean")  # (N, D)


@dataclass(frozen=True)
class _Latents:
    """A set of latents, summarised; what is defined for tokens alone is NaN for continuous latents."""

    counts: Tensor | None
    pooled: GaussianStatistics
    mean: Tensor
    spread: Tensor

    @classmethod
    def of(cls, latents: Tensor, codebook: Tensor | None) -> "_Latents":
        counts = None if codebook is None else count_tokens(latents, len(codebook))
        pooled = GaussianStatistics.of(mean_vectors(latents, codebook))
        return cls(counts, pooled, *_position_moments(latents, codebook))

    @property
    def usage(self) -> float:
        return math.nan if self.counts is None else codebook_usage(self.counts)

    def distances(self, real: "_Latents") -> tuple[float, float, float]:
        """Divergence, distance and position distance."""
        divergence = math.nan if self.counts is None else token_divergence(self.counts, real.counts)
        squares = (self.mean - real.mean).square() + (self.spread - real.spread).square()  # (L, D)
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

    KID's cubic kernel has no bandwidth to choose and an exact jackknife error, and compares means, covariances and
    third moments. It needs standardised channels, for its "+ 1" and for the weights of the channels.
    """
    scale = torch.where(scale > 0, scale, 1.0)  # a channel that never changes
    some = [(vectors[:: -(-len(vectors) // KERNEL_IMAGES)].double() - center) / scale for vectors in (a, b)]
    return kernel_distance(*some)


def _over_images(values: Tensor, baseline: float) -> Figure:
    """Mean and standard error over images (N,)."""
    return Figure(values.mean().item(), baseline, values.std().item() / math.sqrt(len(values)), len(values))


def _check(latents: Tensor, codebook: Tensor | None) -> None:
    """Refuse latents of another kind than the codebook, or its absence, says."""
    discrete = codebook is not None
    if latents.ndim != (2 if discrete else 3) or latents.is_floating_point() == discrete:
        expected = "tokens (N, L) int64 with a codebook" if discrete else "floats (N, L, D) without a codebook"
        raise UserError(f"got latents {tuple(latents.shape)} of {latents.dtype}, expected {expected}")
    if discrete:
        count_tokens(latents, len(codebook))
    elif not torch.isfinite(latents).all():
        raise UserError("got latents that are not finite, expected numbers; look for broken images or weights")
