"""Metrics: pixels to features, features to statistics, statistics to a number. Nothing here knows a model or a trainer.

To add one, write a function and add a line to ``METRICS``.
"""

from robustok.metrics.codebook import (
    codebook_perplexity,
    codebook_usage,
    count_tokens,
    token_agreement,
    token_divergence,
)
from robustok.metrics.features import ClassifierExtractor, InceptionExtractor, InceptionFeatures, compute_features
from robustok.metrics.frechet import (
    Estimate,
    GaussianStatistics,
    covariance_factor,
    delete_half_error,
    frechet_bias,
    frechet_distance,
    load_statistics,
    mean_and_standard_error,
    save_statistics,
    small_sample_note,
)
from robustok.metrics.gap import LatentGap, latent_gap
from robustok.metrics.inception_score import InceptionScore, inception_score
from robustok.metrics.kernel import kernel_distance
from robustok.metrics.manifold import PrecisionRecall, precision_recall
from robustok.metrics.perturbed import (
    ExplicitGrid,
    PerturbedCell,
    PerturbedGrid,
    PerturbedSummary,
    PublishedGrid,
    RelativeGrid,
    decoded_statistics,
    perturbed_cells,
    summarise,
)
from robustok.metrics.pixels import psnr, ssim

# What the names in metrics.jsonl mean.
METRICS = {
    "rfid": "Frechet distance of reconstructions to the original images",
    "pfid": "Frechet distance of reconstructions from perturbed tokens to the original images, mean over a grid",
    "gfid": "Frechet distance of generated images to real ones",
    "kid": "unbiased squared MMD with the kernel (x.y / F + 1)^3, all images at once",
    "sfid": "Frechet distance of generated images to real ones on 7 x 17 x 17 spatial features of Inception",
    "inception_score": "exp of the mean KL divergence of p(class | image) from p(class), 10 splits of shuffled images",
    "precision": "share of generated images within the real manifold, balls up to the 3rd neighbour",
    "recall": "share of real images within the generated manifold, balls up to the 3rd neighbour",
    "psnr": "peak signal-to-noise ratio in dB, mean over images, data range 255",
    "ssim": "structural similarity, Gaussian window 11 of sigma 1.5, mean over channels and images",
    "codebook_usage": "share of the codes that occur in the tokens of the evaluation set",
    "codebook_perplexity": "exp of the entropy of the code frequencies",
    "token_agreement": "share of tokens that stay the same when the decoded image is encoded again",
    "token_divergence": "Jensen-Shannon divergence of token frequencies, generated against encoded, in bits",
    "latent_distance": "Frechet distance of the images' mean code vectors, generated against encoded",
}

__all__ = [
    "METRICS",
    "ClassifierExtractor",
    "Estimate",
    "ExplicitGrid",
    "GaussianStatistics",
    "InceptionExtractor",
    "InceptionFeatures",
    "InceptionScore",
    "LatentGap",
    "PerturbedCell",
    "PerturbedGrid",
    "PerturbedSummary",
    "PrecisionRecall",
    "PublishedGrid",
    "RelativeGrid",
    "codebook_perplexity",
    "codebook_usage",
    "compute_features",
    "count_tokens",
    "covariance_factor",
    "decoded_statistics",
    "delete_half_error",
    "frechet_bias",
    "frechet_distance",
    "inception_score",
    "kernel_distance",
    "latent_gap",
    "load_statistics",
    "mean_and_standard_error",
    "perturbed_cells",
    "precision_recall",
    "psnr",
    "save_statistics",
    "small_sample_note",
    "ssim",
    "summarise",
    "token_agreement",
    "token_divergence",
]
