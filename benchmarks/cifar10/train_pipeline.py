"""Train a small Stable Diffusion on CIFAR-10 with the classes of diffusers, for the study of docs/results/pipelines.md.

    python benchmarks/cifar10/train_pipeline.py --data "data.name=parquet data.path=cifar10-jpeg" \
        --classifiers cifar10-classifiers --out runs/cifar10/pipeline

The autoencoder (AutoencoderKL, 32x32 pixels to 8x8 latents of 4 channels) learns from L1, ResNet-20's features and a
small KL term. The denoiser (UNet2DConditionModel) learns as in the library's own script for text-to-image: DDPM's
``add_noise`` at random times, mean squared error of the noise, a tenth of the prompts empty. Prompts are "a photo of a
dog" and the like; the text encoder (CLIP, one layer, letters) is trained along. ``OUT`` is the folder of the pipeline.
"""

import os

os.environ |= {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}

import argparse
import time
from collections.abc import Iterator
from pathlib import Path

import diffusers
import torch
import torch.nn.functional as F
import transformers
from diffusers.training_utils import EMAModel
from setting import GUIDES
from torch import Tensor

from robustok.config import Config, load
from robustok.data.dataset import ImageDataset, open_images
from robustok.data.pixels import from_pixels
from robustok.data.sources import Data
from robustok.losses.reconstruction import ReconstructionConfig, ReconstructionTerms

VAE_STEPS, VAE_BATCH, UNET_STEPS, UNET_BATCH = 450, 48, 700, 96
KL_WEIGHT, EMPTY = 1e-5, 0.1  # weight of the KL term; share of empty prompts
PROMPT = "a photo of a {label}"
LETTERS = "abcdefghijklmnopqrstuvwxyz"


class Images(Config):
    """Which images."""

    data: Data


def main() -> None:
    """Read the arguments, train what is not there yet, save the pipeline."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True, help="words that name CIFAR-10, as for robustok main-train")
    parser.add_argument("--classifiers", type=Path, required=True, help="folder with resnet20.safetensors")
    parser.add_argument("--out", type=Path, required=True, help="folder of the pipeline")
    arguments = parser.parse_args()
    torch.manual_seed(0)
    data = open_images(load(Images, None, arguments.data.split()).data, 32, "train")
    pixels = data.read(torch.arange(len(data))).pixels
    vae_folder = arguments.out / "vae"
    if not vae_folder.exists():
        guide = arguments.classifiers / f"resnet{GUIDES[0]}.safetensors"
        train_autoencoder(pixels, guide).save_pretrained(vae_folder)
    vae = diffusers.AutoencoderKL.from_pretrained(vae_folder)
    train_denoiser(vae, pixels, data).save_pretrained(arguments.out)


def batches(count: int, size: int, steps: int, optimizer: torch.optim.Optimizer) -> Iterator[Tensor]:
    """Random indices for each step, with a warm-up of 50 steps and a cosine; prints the time."""
    schedule = diffusers.optimization.get_cosine_schedule_with_warmup(optimizer, 50, steps)
    started = time.process_time()
    for step in range(steps):
        yield torch.randint(count, (size,))
        torch.nn.utils.clip_grad_norm_(optimizer.param_groups[0]["params"], 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        if (step + 1) % 50 == 0:
            print(f"{step + 1}/{steps}: {time.process_time() - started:.0f} s of a core", flush=True)


def train_autoencoder(pixels: Tensor, guide: Path) -> diffusers.AutoencoderKL:
    """An autoencoder of images (N, 3, 32, 32) uint8; its scaling_factor gives latents a standard deviation of 1."""
    vae = diffusers.AutoencoderKL(
        block_out_channels=(16, 32, 64),
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        layers_per_block=1,
        norm_num_groups=8,
        latent_channels=4,
        sample_size=32,
    )
    config = ReconstructionConfig(
        pixel="l1", perceptual="cifar-resnet", perceptual_weights=str(guide), perceptual_weight=0.1
    )
    compare = ReconstructionTerms(config, torch.device("cpu"))
    optimizer = torch.optim.AdamW(vae.parameters(), lr=2e-3, betas=(0.5, 0.95), weight_decay=0)
    for rows in batches(len(pixels), VAE_BATCH, VAE_STEPS, optimizer):
        images = mirrored(from_pixels(pixels[rows]))
        posterior = vae.encode(images).latent_dist
        terms = compare(images, vae.decode(posterior.sample()).sample)
        loss = sum(terms.values()) + KL_WEIGHT * posterior.kl().mean()
        loss.backward()
    vae.eval()
    vae.register_to_config(scaling_factor=1 / encoded(vae, pixels[:5_000]).std().item())
    return vae


def mirrored(images: Tensor) -> Tensor:
    """Half of the images (N, C, H, W) mirrored, by chance."""
    return torch.where((torch.rand(len(images)) < 0.5)[:, None, None, None], images.flip(3), images)


@torch.no_grad()
def encoded(vae: diffusers.AutoencoderKL, pixels: Tensor) -> Tensor:
    """Modes of the posteriors (N, 4, 8, 8)."""
    return torch.cat([vae.encode(from_pixels(part)).latent_dist.mode() for part in pixels.split(500)])


def train_denoiser(vae: diffusers.AutoencoderKL, pixels: Tensor, data: ImageDataset) -> diffusers.DiffusionPipeline:
    """The pipeline of an autoencoder: text encoder and denoiser trained on its latents."""
    latents = encoded(vae, pixels) * vae.config.scaling_factor
    labels = torch.from_numpy(data.labels)
    tokenizer, text_encoder = text_parts()
    prompts = [PROMPT.replace("{label}", name) for name in data.classes] + [""]
    tokens = tokenizer(prompts, padding="max_length", return_tensors="pt").input_ids  # (11, 26)
    unet = diffusers.UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(32, 64),
        layers_per_block=1,
        down_block_types=("CrossAttnDownBlock2D",) * 2,
        up_block_types=("CrossAttnUpBlock2D",) * 2,
        cross_attention_dim=text_encoder.config.hidden_size,
        attention_head_dim=4,
        norm_num_groups=8,
    )
    scheduler = diffusers.DDPMScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", clip_sample=False, steps_offset=1
    )  # of Stable Diffusion
    both = torch.nn.ModuleList([unet, text_encoder])
    average = EMAModel(both.parameters(), decay=0.995)
    optimizer = torch.optim.AdamW(both.parameters(), lr=1e-3, weight_decay=1e-2)
    for rows in batches(len(labels), UNET_BATCH, UNET_STEPS, optimizer):
        clean = latents[rows]
        noise, times = torch.randn_like(clean), torch.randint(1_000, (len(rows),))
        numbers = torch.where(torch.rand(len(rows)) < EMPTY, len(prompts) - 1, labels[rows])
        states = text_encoder(tokens)[0][numbers]  # (N, 26, 64)
        found = unet(scheduler.add_noise(clean, noise, times), times, states).sample
        F.mse_loss(found, noise).backward()
        average.step(both.parameters())  # the weights before this step: one step late
    average.copy_to(both.parameters())
    return diffusers.StableDiffusionPipeline(
        vae=vae,
        text_encoder=text_encoder.eval(),
        tokenizer=tokenizer,
        unet=unet.eval(),
        scheduler=diffusers.DDIMScheduler.from_config(scheduler.config, set_alpha_to_one=False),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def text_parts() -> tuple[transformers.CLIPTokenizer, transformers.CLIPTextModel]:
    """A tokenizer of letters and a text encoder of one layer."""
    words = [*LETTERS, *(f"{letter}</w>" for letter in LETTERS), "<|startoftext|>", "<|endoftext|>"]
    ends = {"bos_token_id": len(words) - 2, "eos_token_id": len(words) - 1, "pad_token_id": len(words) - 1}
    config = transformers.CLIPTextConfig(
        vocab_size=len(words),
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=1,
        num_attention_heads=4,
        max_position_embeddings=26,
        **ends,
    )
    vocab = {word: number for number, word in enumerate(words)}
    tokenizer = transformers.CLIPTokenizer(vocab=vocab, merges=[], model_max_length=26)
    return tokenizer, transformers.CLIPTextModel(config)


if __name__ == "__main__":
    main()
