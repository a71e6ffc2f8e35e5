"""Metrics: pixels to features, features to statistics, statistics to a number. Nothing here imports a model or trainer.

To add a metric, write a function and add one entry to :data:`METRICS`, which `robustok evaluate` reads.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

from robustok.metrics import comparison, pixels
from robustok.metrics.codebook import codebook_use
from robustok.metrics.reference import Part


@dataclass(frozen=True)
class Metric:
    """A metric of `robustok evaluate`.

    Attributes:
        applies_to: what it is a metric of, which decides the function.

            * ``pairs``: images and their originals. The function takes the pixels (n, 3, H, W) uint8 of both and
              returns (n,) values, whose mean is reported.
            * ``tokens``: tokens (N, L) of the test images. The function takes them and the codebook size and returns a
              dictionary of names and values.
            * ``reconstructions``: reconstructions of the test images in a feature space. The function takes a
              :class:`~robustok.metrics.comparison.Comparison` and returns a Score.
            * ``samples``: generated images in a feature space. As ``reconstructions``; None where it does not apply.
            * ``latents``: generated latents.
        description: what it measures.
        function: see above; None for the few that the evaluator computes in code of their own.
        parts: what it needs of the evaluated images beside mean and covariance of their features: the ``features`` of
            single images; ``spatial`` features or ``logits``, which only the Inception network has.
        reference_parts: the same of the reference.
        published: number of images behind published values; 0 where there is no such number.
        needs_data: whether it takes real images beside the reference.
    """

    applies_to: Literal["pairs", "tokens", "reconstructions", "samples", "latents"]
    description: str
    function: Callable[..., Any] | None = None
    parts: tuple[Part, ...] = ()
    reference_parts: tuple[Part, ...] = ()
    published: int = 0
    needs_data: bool = False

    @property
    def needs_inception(self) -> bool:
        """Whether it is defined on the Inception network only."""
        return bool({"spatial", "logits"} & set(self.parts))

    @property
    def needs_extractor(self) -> bool:
        """Whether it is measured in a feature space."""
        return self.applies_to in ("reconstructions", "samples")


_FEATURES: tuple[Part, ...] = ("features",)
_SPATIAL: tuple[Part, ...] = ("spatial",)

# By the names that the setting `metrics` takes, in the order of the lines in metrics.jsonl.
METRICS: dict[str, Metric] = {
    "psnr": Metric("pairs", "peak signal-to-noise ratio in dB, data range 255", pixels.capped_psnr),
    "ssim": Metric("pairs", "structural similarity, Gaussian window 11 of sigma 1.5", pixels.ssim),
    "lpips": Metric("pairs", "learned perceptual distance on AlexNet (lpips_alex) or VGG-16 (lpips_vgg)"),
    "codebook": Metric(
        "tokens", "share of the codes in use, and exp of the entropy of their frequencies", codebook_use
    ),
    "token_agreement": Metric("tokens", "share of tokens that stay the same when the decoded image is encoded again"),
    "rfid": Metric("reconstructions", "Frechet distance to the original images", comparison.rfid, published=50_000),
    "pfid": Metric("reconstructions", "rfid with perturbed tokens, mean over a grid", published=50_000),
    "noise_fd": Metric("reconstructions", "rfid with noised continuous latents, mean over levels", published=50_000),
    "ifid": Metric("reconstructions", "rfid of latents half-way to a near training latent", published=50_000),
    "gfid": Metric("samples", "Frechet distance to real images", comparison.gfid, published=50_000),
    "gfid_validation": Metric(
        "samples", "gfid to the validation images", comparison.gfid_validation, published=50_000, needs_data=True
    ),
    "fdr": Metric(
        "samples", "mean over feature spaces of gfid / gfid of validation images", published=50_000, needs_data=True
    ),
    "gfid_infinity": Metric("samples", "gfid of infinitely many images", comparison.gfid_infinity, _FEATURES),
    "sfid": Metric("samples", "gfid on spatial features of Inception", comparison.sfid, _SPATIAL, _SPATIAL, 50_000),
    "kid": Metric("samples", "unbiased squared MMD, kernel (x.y / F + 1)^3", comparison.kid, _FEATURES, _FEATURES),
    "sliced_wasserstein": Metric(
        "samples", "squared Wasserstein distance over random directions", comparison.sliced, _FEATURES, _FEATURES
    ),
    "precision": Metric(
        "samples", "share of samples in the real manifold", comparison.precision, _FEATURES, _FEATURES, 50_000
    ),
    "recall": Metric(
        "samples", "share of real images in the samples' manifold", comparison.recall, _FEATURES, _FEATURES, 50_000
    ),
    "inception_score": Metric(
        "samples", "exp KL of p(class | image) from p(class)", comparison.inception, ("logits",), published=50_000
    ),
    "gap": Metric(
        "latents", "generated latents against those of real images, see robustok.metrics.latent_gap", needs_data=True
    ),
}
