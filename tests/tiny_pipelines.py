"""Tiny pipelines of diffusers, built from its own classes with random weights, without text encoders or downloads."""

import json
import sys
from contextlib import nullcontext
from pathlib import Path

import diffusers
import torch
from diffusers.utils import logging

from robustok.data.captions import caption_digest
from robustok.generators.pipeline import PipelineConfig, PipelineGenerator
from robustok.generators.pipeline_families import FAMILIES
from tiny_models import TINY_TOKENIZERS

logging.set_verbosity(logging.CRITICAL)
SIZE, TOKENS = 32, 3  # pixels; tokens of a prompt
KL = {
    "block_out_channels": (4, 8),
    "down_block_types": ("DownEncoderBlock2D",) * 2,
    "up_block_types": ("UpDecoderBlock2D",) * 2,
    "layers_per_block": 1,
    "norm_num_groups": 2,
    "sample_size": SIZE,
}
UNET = {
    "block_out_channels": (8, 16),
    "layers_per_block": 1,
    "sample_size": 16,
    "in_channels": 4,
    "out_channels": 4,
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
    "cross_attention_dim": 16,
    "attention_head_dim": 2,
    "norm_num_groups": 2,
}
SD_NOISE = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "steps_offset": 1}


def flow(**settings):
    return diffusers.FlowMatchEulerDiscreteScheduler(**settings)


def dynamic():
    return flow(
        use_dynamic_shifting=True, base_shift=0.5, max_shift=1.15, base_image_seq_len=256, max_image_seq_len=4096
    )


def kl(channels=4, **settings):
    return diffusers.AutoencoderKL(latent_channels=channels, **KL, **settings)


def texts(count, *others):
    """No text encoder and no tokenizer."""
    numbers = ["", *(f"_{i}" for i in range(2, count + 1))]
    return dict.fromkeys([f"{part}{n}" for part in ("text_encoder", "tokenizer") for n in numbers] + [*others])


def sd(**parts):
    parts = {"text_encoder": None, "tokenizer": None} | parts
    scheduler = diffusers.DDIMScheduler(**SD_NOISE, clip_sample=False, set_alpha_to_one=False)
    return diffusers.StableDiffusionPipeline(
        vae=kl(scaling_factor=0.18215), unet=diffusers.UNet2DConditionModel(**UNET), scheduler=scheduler,
        safety_checker=None, feature_extractor=None, requires_safety_checker=False, **parts,
    )  # fmt: skip


def sdxl():
    added = {"addition_embed_type": "text_time", "addition_time_embed_dim": 4}
    unet = diffusers.UNet2DConditionModel(**UNET, **added, projection_class_embeddings_input_dim=16 + 6 * 4)
    vae = kl(scaling_factor=0.13025, latents_mean=[0.1, -0.2, 0.3, 0.4], latents_std=[1.1, 0.9, 0.8, 1.3])
    scheduler = diffusers.EulerDiscreteScheduler(**SD_NOISE)
    return diffusers.StableDiffusionXLPipeline(vae=vae, unet=unet, scheduler=scheduler, **texts(2))


def sd3():
    transformer = diffusers.SD3Transformer2DModel(
        sample_size=16, patch_size=2, in_channels=8, num_layers=1, attention_head_dim=8, num_attention_heads=2,
        joint_attention_dim=16, caption_projection_dim=16, pooled_projection_dim=16, out_channels=8,
        pos_embed_max_size=32,
    )  # fmt: skip
    vae = kl(8, scaling_factor=1.5305, shift_factor=0.0609, use_quant_conv=False, use_post_quant_conv=False)
    return diffusers.StableDiffusion3Pipeline(vae=vae, transformer=transformer, scheduler=flow(shift=3.0), **texts(3))


def flux():
    transformer = diffusers.FluxTransformer2DModel(
        patch_size=1, in_channels=32, num_layers=1, num_single_layers=1, attention_head_dim=16, num_attention_heads=2,
        joint_attention_dim=16, pooled_projection_dim=16, axes_dims_rope=(4, 4, 8), guidance_embeds=True,
    )  # fmt: skip
    vae = kl(8, scaling_factor=0.3611, shift_factor=0.1159, use_quant_conv=False, use_post_quant_conv=False)
    return diffusers.FluxPipeline(vae=vae, transformer=transformer, scheduler=dynamic(), **texts(2))


def chroma():
    transformer = diffusers.ChromaTransformer2DModel(
        patch_size=1, in_channels=32, num_layers=1, num_single_layers=1, attention_head_dim=16, num_attention_heads=2,
        joint_attention_dim=16, axes_dims_rope=(4, 4, 8), approximator_num_channels=8, approximator_hidden_dim=8,
        approximator_layers=1,
    )  # fmt: skip
    vae = kl(8, scaling_factor=0.3611, shift_factor=0.1159, use_quant_conv=False, use_post_quant_conv=False)
    return diffusers.ChromaPipeline(vae=vae, transformer=transformer, scheduler=dynamic(), **texts(1))


def qwen():
    transformer = diffusers.QwenImageTransformer2DModel(
        patch_size=2, in_channels=16, out_channels=4, num_layers=1, attention_head_dim=16, num_attention_heads=2,
        joint_attention_dim=16, axes_dims_rope=(4, 4, 8),
    )  # fmt: skip
    vae = diffusers.AutoencoderKLQwenImage(
        base_dim=8, z_dim=4, dim_mult=[1, 2], num_res_blocks=1, temperal_downsample=[False], attn_scales=[],
        latents_mean=[0.1, -0.2, 0.3, 0.4], latents_std=[1.1, 0.9, 0.8, 1.3],
    )  # fmt: skip
    return diffusers.QwenImagePipeline(vae=vae, transformer=transformer, scheduler=dynamic(), **texts(1))


def z_image():
    transformer = diffusers.ZImageTransformer2DModel(
        in_channels=8, dim=32, n_layers=1, n_refiner_layers=1, n_heads=2, n_kv_heads=2, cap_feat_dim=16,
        axes_dims=[4, 4, 8], axes_lens=[64, 32, 32],
    )  # fmt: skip
    vae = kl(8, scaling_factor=0.3611, shift_factor=0.1159, use_quant_conv=False, use_post_quant_conv=False)
    return diffusers.ZImagePipeline(vae=vae, transformer=transformer, scheduler=flow(shift=3.0), **texts(1))


def lcm():
    unet = diffusers.UNet2DConditionModel(**UNET, time_cond_proj_dim=8)
    scheduler = diffusers.LCMScheduler(**{key: value for key, value in SD_NOISE.items() if key != "steps_offset"})
    return diffusers.LatentConsistencyModelPipeline(
        vae=kl(scaling_factor=0.18215), unet=unet, scheduler=scheduler, safety_checker=None, feature_extractor=None,
        requires_safety_checker=False, **texts(1),
    )  # fmt: skip


def kolors():
    added = {"addition_embed_type": "text_time", "addition_time_embed_dim": 4}
    unet = diffusers.UNet2DConditionModel(**UNET, **added, projection_class_embeddings_input_dim=16 + 6 * 4)
    scheduler = diffusers.EulerDiscreteScheduler(**SD_NOISE)
    return diffusers.KolorsPipeline(vae=kl(scaling_factor=0.13025), unet=unet, scheduler=scheduler, **texts(1))


def pixart(family):
    transformer = diffusers.PixArtTransformer2DModel(
        sample_size=16, num_layers=1, patch_size=2, attention_head_dim=8, num_attention_heads=2, caption_channels=16,
        in_channels=4, cross_attention_dim=16, out_channels=8,
    )  # fmt: skip
    scheduler = diffusers.DPMSolverMultistepScheduler(beta_start=0.0001, beta_end=0.02)
    return family(vae=kl(scaling_factor=0.18215), transformer=transformer, scheduler=scheduler, **texts(1))


def sana():
    transformer = diffusers.SanaTransformer2DModel(
        patch_size=1, in_channels=4, out_channels=4, num_layers=1, num_attention_heads=2, attention_head_dim=8,
        num_cross_attention_heads=2, cross_attention_head_dim=8, cross_attention_dim=16, caption_channels=16,
        sample_size=16,
    )  # fmt: skip
    vae = diffusers.AutoencoderDC(**TINY_TOKENIZERS["diffusers_dc"]["settings"], scaling_factor=0.41407)
    scheduler = diffusers.DPMSolverMultistepScheduler(
        prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0
    )
    return diffusers.SanaPipeline(vae=vae, transformer=transformer, scheduler=scheduler, **texts(1))


MADE = (sd, sdxl, sd3, flux, chroma, qwen, z_image, lcm, kolors)
MADE += (lambda: pixart(diffusers.PixArtAlphaPipeline), lambda: pixart(diffusers.PixArtSigmaPipeline), sana)
PIPELINES = dict(zip(FAMILIES, MADE, strict=True))
MIXING = [name for name, family in FAMILIES.items() if family.image]


def saved(name: str, path: Path) -> Path:
    """A pipeline in a folder, as its library saves it."""
    torch.manual_seed(0)
    PIPELINES[name]().save_pretrained(path)
    return path


def conditions(name: str, *prompts: str):
    """Random encoded prompts, and what guidance moves away from."""
    family, found = FAMILIES[name], {}
    for i, key in enumerate([*map(caption_digest, prompts), "negative"]):
        rng = torch.Generator().manual_seed(i)
        negative = key == "negative"
        names = [n for n in family.encoded if n and n.startswith("negative") is negative]
        names = names or [f"negative_{n}" for n in family.encoded if n]
        found[key] = {
            n: torch.ones(TOKENS, dtype=torch.float32 if "attention" in n else torch.int64)
            if "mask" in n
            else torch.randn(*([16] if "pooled" in n else [TOKENS, 16]), generator=rng)
            for n in names
        }
    return found


def generator(name: str, path: Path, *prompts: str) -> PipelineGenerator:
    """The generator of a saved pipeline, with random encoded prompts in the place of text encoders."""
    made = PipelineGenerator(PipelineConfig(folder=path, image_size=SIZE), prompts)
    made.conditions = conditions(name, *prompts)
    return made


def set_class(path: Path, name: str) -> Path:
    """Rename the class in a saved pipeline's model_index.json."""
    index = json.loads((path / "model_index.json").read_text())
    (path / "model_index.json").write_text(json.dumps(index | {"_class_name": name}))
    return path


def text_encoder():
    """A CLIP text encoder of one layer with its tokenizer, which knows letters only."""
    import transformers

    letters = "abcdefghijklmnopqrstuvwxyz"
    words = [*letters, *(f"{letter}</w>" for letter in letters), "<|startoftext|>", "<|endoftext|>"]
    vocab = {word: number for number, word in enumerate(words)}
    ends = {"bos_token_id": len(vocab) - 2, "eos_token_id": len(vocab) - 1, "pad_token_id": len(vocab) - 1}
    config = transformers.CLIPTextConfig(
        vocab_size=len(vocab), hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2,
        max_position_embeddings=8, **ends,
    )  # fmt: skip
    tokenizer = transformers.CLIPTokenizer(vocab=vocab, merges=[], model_max_length=8)
    return {"text_encoder": transformers.CLIPTextModel(config).eval(), "tokenizer": tokenizer}


def saved_with_text(path: Path) -> Path:
    """A Stable Diffusion that takes prompts, in a folder with a model card."""
    import transformers

    transformers.utils.logging.disable_progress_bar()
    torch.manual_seed(0)
    sd(**text_encoder()).save_pretrained(path)
    (path / "README.md").write_text("---\nlicense: creativeml-openrail-m\n---\n# Tiny\n")
    (path / "vae" / "README.md").write_text("---\nlicense: mit\n---\n# Its autoencoder\n")
    return path


def make_pairs_as(monkeypatch, rank: int, world: int) -> None:
    """From now on pairs are made as by this process of several, which torchrun would start at once."""

    class Process:
        process_index, num_processes, is_main_process, device = rank, world, rank == 0, torch.device("cpu")
        wait_for_everyone, main_process_first = staticmethod(lambda: None), staticmethod(nullcontext)

    monkeypatch.setattr(sys.modules["robustok.commands.make_pairs"], "start_accelerator", lambda: Process)
