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
from robustok.metrics.features.classifier import ClassifierExtractor, compute_features
from robustok.metrics.features.dinov2 import DINOv2Extractor
from robustok.metrics.features.inception import InceptionExtractor, InceptionFeatures
from robustok.metrics.frechet import (
    Estimate,
    GaussianStatistics,
    covariance_factor,
    delete_half_error,
    frechet_bias,
    frechet_distance,
    frechet_distance_of_features,
    mean_and_standard_error,
    small_sample_note,
)
from robustok.metrics.inception_score import InceptionScore, inception_score
from robustok.metrics.kernel import kernel_distance
from robustok.metrics.latent_gap import (
    Figure,
    LatentGap,
    ReencodingGap,
    TeacherForcing,
    latent_gap,
    prediction_scores,
    reencoding_gap,
    teacher_forcing,
)
from robustok.metrics.lpips import LPIPS
from robustok.metrics.manifold import PrecisionRecall, precision_recall
from robustok.metrics.noise import NoiseCell, NoiseGrid, noise_frechet
from robustok.metrics.pfid import (
    ExplicitGrid,
    PerturbedCell,
    PerturbedGrid,
    PerturbedSummary,
    PublishedFastGrid,
    PublishedGrid,
    RelativeGrid,
    decoded_statistics,
    perturbed_frechet,
    perturbed_protocol,
    summarise,
)
from robustok.metrics.pixels import psnr, ssim
from robustok.metrics.reference import (
    Reference,
    cached_reference,
    load_reference,
    load_statistics,
    save_reference,
    save_statistics,
)
from robustok.metrics.small_samples import FrechetInfinity, frechet_error, frechet_infinity

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
    "lpips_alex": "learned perceptual distance on AlexNet, mean over images",
    "lpips_vgg": "learned perceptual distance on VGG-16, mean over images",
    "codebook_usage": "share of the codes that occur in the tokens of the evaluation set",
    "codebook_perplexity": "exp of the entropy of the code frequencies",
    "token_agreement": "share of tokens that stay the same when the decoded image is encoded again",
    "token_divergence": "Jensen-Shannon divergence of token frequencies, generated against encoded, in bits",
    "generated_usage": "share of the codes that generated images use, beside that of as many real ones",
    "latent_distance": "Frechet distance of the images' mean latents, generated against encoded",
    "latent_position_distance": "Frechet distance of the latents at each position, no covariances, mean over positions",
    "latent_kernel_distance": "unbiased squared MMD of the images' mean latents, standardised, the kernel of KID",
    "reencoded_displacement": "mean squared move of latents decoded and encoded again, 1 between two real images",
    "reencoded_distance": "Frechet distance of the images' mean latents before and after encoding again",
    "generator_accuracy": "share of real tokens that the generator finds most likely, given the real ones before",
    "generator_cross_entropy": "mean of -ln p(real token) in nats, given the real ones before",
    "generator_top_k": "share of real tokens among the generator's k most likely, given the real ones before",
    "noise_fd": "Frechet distance of reconstructions from noised continuous latents, mean over noise levels; no pFID",
}

__all__ = [
    "LPIPS",
    "METRICS",
    "ClassifierExtractor",
    "DINOv2Extractor",
    "Estimate",
    "ExplicitGrid",
    "Figure",
    "FrechetInfinity",
    "GaussianStatistics",
    "InceptionExtractor",
    "InceptionFeatures",
    "InceptionScore",
    "LatentGap",
    "NoiseCell",
    "NoiseGrid",
    "PerturbedCell",
    "PerturbedGrid",
    "PerturbedSummary",
    "PrecisionRecall",
    "PublishedFastGrid",
    "PublishedGrid",
    "ReencodingGap",
    "Reference",
    "RelativeGrid",
    "TeacherForcing",
    "cached_reference",
    "codebook_perplexity",
    "codebook_usage",
    "compute_features",
    "count_tokens",
    "covariance_factor",
    "decoded_statistics",
    "delete_half_error",
    "frechet_bias",
    "frechet_distance",
    "frechet_distance_of_features",
    "frechet_error",
    "frechet_infinity",
    "inception_score",
    "kernel_distance",
    "latent_gap",
    "load_reference",
    "load_statistics",
    "mean_and_standard_error",
    "noise_frechet",
    "perturbed_frechet",
    "perturbed_protocol",
    "precision_recall",
    "prediction_scores",
    "psnr",
    "reencoding_gap",
    "save_reference",
    "save_statistics",
    "small_sample_note",
    "ssim",
    "summarise",
    "teacher_forcing",
    "token_agreement",
    "token_divergence",
]
