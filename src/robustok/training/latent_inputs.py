"""What main training does differently for tokens and for continuous latents: the inputs of a pass, and its terms."""

import torch
from torch import Tensor, nn

from robustok.losses.semantic import contrastive_loss
from robustok.randomness import step_rng
from robustok.tokenizers.kl import KLOutput
from robustok.tokenizers.maetok import AutoencoderOutput
from robustok.tokenizers.perturbation import draw_perturbation
from robustok.training.common import TrainingConfig
from robustok.types import Tokenizer, TokenizerOutput


class ContinuousPass(nn.Module):
    """A continuous tokenizer whose forward is a training pass: what DDP may wrap.

    Its randomness comes in as numbers, so that they are the same however the batch is divided among processes.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        super().__init__()
        self.tokenizer = tokenizer

    def forward(
        self, images: Tensor, sample: Tensor, noise: Tensor | None = None, levels: Tensor | None = None
    ) -> AutoencoderOutput | KLOutput:
        """Reconstruct images (N, 3, H, W) from their latents, or from a sample of these where they are Gaussians.

        Args:
            images: in [-1, 1].
            sample: standard normal (N, L, D), for the posterior of a variational autoencoder; others ignore it.
            noise: standard normal (N, L, D) that is added to the latents; None adds nothing.
            levels: (N,), deviation of that noise as a share of the deviation of the image's own latents.
        """
        posterior = self.tokenizer.posterior(images) if hasattr(self.tokenizer, "posterior") else None
        latents = self.tokenizer.encode(images) if posterior is None else posterior.mean + posterior.std * sample
        seen = latents  # (N, L, D)
        if noise is not None:
            deviation = latents.detach().float().std(dim=(1, 2), keepdim=True)  # (N, 1, 1)
            seen = latents + levels[:, None, None] * deviation * noise
        reconstructions = self.tokenizer.decode(seen)
        if posterior is None:
            return AutoencoderOutput(reconstructions, latents)
        return KLOutput(reconstructions, latents, posterior, posterior.divergence())


def draw_inputs(
    run: TrainingConfig, latent_shape: tuple[int, int], step: int, rows: slice, device: torch.device
) -> tuple:
    """What the pass of a step takes after the images, drawn for the global batch; ``rows`` are this process's.

    Tokens: the perturbation's settings, draw and strength. Continuous latents: the inputs of :class:`ContinuousPass`.
    """
    length, _ = latent_shape
    if run.discrete:
        p = run.perturbation
        rate, strength = p.at(step)
        if not p.active:
            return p, None, strength
        rng = step_rng(run.seed, step, "perturb")
        draw = draw_perturbation(run.batch_size, length, rate, p.proportion, rng, p.selection, p.image_selection)
        return p, draw.rows(rows.start, rows.stop).to(device), strength
    rng = step_rng(run.seed, step, "latents")
    sample = torch.randn(run.batch_size, *latent_shape, generator=rng)[rows].to(device)  # (N, L, D)
    if not run.latent_noise:
        return (sample,)
    noise = torch.randn(run.batch_size, *latent_shape, generator=rng)[rows].to(device)  # (N, L, D)
    levels = run.latent_noise * torch.rand(run.batch_size, generator=rng)[rows].to(device)  # (N,)
    return sample, noise, levels


def latent_terms(run: TrainingConfig, output: TokenizerOutput | AutoencoderOutput | KLOutput) -> dict[str, Tensor]:
    """Weighted terms of the latents: the quantiser's and the teacher's, or the KL divergence, or none."""
    if isinstance(output, KLOutput):
        return {"kl": run.kl_weight * output.kl_loss}
    if isinstance(output, AutoencoderOutput):
        return {}
    quantizer = run.tokenizer.quantizer
    terms = {
        "codebook": quantizer.codebook_weight * output.codebook_loss,
        "commitment": quantizer.commitment_weight * output.commitment_loss,
    }
    if output.semantic_targets is not None:
        terms["semantic"] = run.teacher.weight * contrastive_loss(output.semantic_targets, output.semantic_latents)
    return terms
