"""Networks of other libraries: pretrained backbones of timm, and the models of diffusers."""

import logging
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import timm
import torch
from torch import Tensor, nn

from robustok.checkpoints import read_checkpoint
from robustok.errors import UserError
from robustok.files import one_line
from robustok.snapshots import check_finite_weights


class ImageNetRange(nn.Module):
    """Images in [-1, 1], normalised by ImageNet's mean and standard deviation."""

    def __init__(self) -> None:
        super().__init__()
        mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
        self.register_buffer("mean", mean.view(1, 3, 1, 1), persistent=False)
        self.register_buffer("std", std.view(1, 3, 1, 1), persistent=False)

    def forward(self, images: Tensor) -> Tensor:
        """Images (N, 3, H, W) to the same shape."""
        return ((images * 0.5 + 0.5) - self.mean) / self.std


def pretrained_backbone(name: str, weights: str | Path | None, role: str, setting: str, **sizes: Any) -> nn.Module:
    """A timm model without its classifier, with its pretrained weights.

    If ``sizes`` give a vision transformer another image or patch size than it was trained with, timm resamples its
    position embeddings (bicubic, antialiased, the class token's unchanged) and its patch embedding (FlexiViT's
    pseudo-inverse, arXiv 2212.08013).

    Args:
        name: timm's name, such as ``vit_base_patch14_dinov2.lvd142m``.
        weights: local file, in timm's layout or the authors' own; None downloads through timm.
        role: what the network is for, named in the error.
        setting: the setting that takes a local file, named in the error.
        sizes: ``img_size``, ``patch_size`` and the like.

    Raises:
        UserError: unknown name; no network, an unreadable file, or weights of another model.
    """
    try:
        overlay = {"state_dict": read_checkpoint(weights).weights} if weights else None
        if overlay is not None:
            check_finite_weights(overlay["state_dict"], weights)
        model = timm.create_model(name, pretrained=True, pretrained_cfg_overlay=overlay, num_classes=0, **sizes)
    except Exception as error:  # timm and huggingface_hub raise many types
        reason = one_line(error).split("; ")[0].split(". ")[0]  # the rest is advice for other settings
        config = timm.get_pretrained_cfg(name, allow_unregistered=True)
        where = f", such as {config.url}" if config and config.url else ""
        raise UserError(f"cannot load {role} {name}: {reason[:200]}; give a local file as {setting}{where}") from None
    model.pretrained_cfg.pop("state_dict", None)  # timm keeps a copy of all weights there
    return model


def diffusers_network(class_name: str, settings: Mapping[str, Any]) -> nn.Module:
    """A model of the diffusers library with random weights.

    Args:
        class_name: of the library, such as ``AutoencoderKL``.
        settings: content of its config.json.

    Raises:
        UserError: diffusers is not installed, or does not accept the settings.
    """
    try:
        import diffusers
    except ImportError:
        raise UserError(f"{class_name} needs diffusers; pip install 'robustok[diffusers]'") from None
    try:
        with silent_diffusers():
            return getattr(diffusers, class_name).from_config(dict(settings))
    except Exception as error:  # diffusers validates with errors of many types
        reason = one_line(error, 200)
        raise UserError(f"diffusers makes no {class_name} of these settings ({reason}); correct them") from None


def unscale_latents(latents: Tensor, settings: Mapping[str, Any]) -> Tensor:
    """Latents (N, L, D) as diffusion models take them to those that an autoencoder of diffusers decodes.

    The operations are those of the pipelines, in their order, so that images are equal bit for bit.

    Args:
        latents: normalised ones.
        settings: of the autoencoder.
    """
    mean, std = settings.get("latents_mean") or settings.get("shift_factor") or 0.0, settings.get("latents_std") or 1.0
    mean, std, scale = latents.new_tensor(mean), latents.new_tensor(std), settings.get("scaling_factor")
    return latents / (1.0 / std) + mean if scale is None else latents * std / scale + mean


@contextmanager
def silent_diffusers() -> Iterator[None]:
    """Context without logs, warnings and progress of diffusers and transformers, which would print parts of prompts.

    What they warn of is checked by us, or is an error.
    """
    names = [name for name in ("diffusers", "transformers") if find_spec(name)]
    loggers = [logging.getLogger(name) for name in names]
    bars = [import_module(f"{name}.utils.logging") for name in names]
    shown = [bar for bar in bars if bar.is_progress_bar_enabled()]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.CRITICAL)
    for bar in shown:
        bar.disable_progress_bar()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
        for bar in shown:
            bar.enable_progress_bar()
