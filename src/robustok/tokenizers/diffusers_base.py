"""What the autoencoders of the diffusers library share behind the contract of a tokenizer: sizes, checks, folders."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeVar

import torch
from pydantic import Field
from torch import Tensor, nn

from robustok.config import Config, validate
from robustok.errors import UserError
from robustok.pretrained.diffusers_folders import build_network, component, latent_side, load_network, write_network
from robustok.tokenizers.conv import image_problems, to_grid

T = TypeVar("T", bound="DiffusersTokenizer")


class DiffusersConfig(Config):
    """An autoencoder of the library."""

    name: str
    image_size: int = Field(256, ge=1, description="height and width of the images it is used at, in pixels")
    settings: dict[str, Any] = Field({}, description="what its config.json holds, under the names of diffusers")


class DiffusersTokenizer(nn.Module):
    """An autoencoder of the library. Families give ``encode`` and ``decode``.

    Args:
        config: image size and the library's own settings.
        pretrained: for the signature's sake; only tokenizers with a backbone start from pretrained weights.

    Attributes:
        class_name: of the library.
        levels: the setting that lists the widths of the encoder's levels, each but the first of which halves the
            image, and how many there are by default.

    Raises:
        UserError: diffusers is not installed, or does not take the settings; the image size does not divide.
    """

    class_name: str
    levels: tuple[str, int] = ("block_out_channels", 1)
    licence = "that of the model card which came with the weights"
    image_range = (-1.0, 1.0)
    latent_space: str | None = None

    def __init__(self, config: DiffusersConfig, pretrained: bool = False) -> None:
        super().__init__()
        self.config = config
        self.vae = build_network(self.class_name, config.settings)
        self.factor = self.factor_of(config.settings)
        if config.image_size % self.factor:
            raise UserError(f"image_size {config.image_size} is not divisible by {self.factor}; choose a multiple")
        self.image_size = config.image_size
        self.latent_shape = ((config.image_size // self.factor) ** 2, self.width)

    @classmethod
    def factor_of(cls, settings: dict[str, Any]) -> int:
        """Pixels to a latent, along a side."""
        name, default = cls.levels
        return 2 ** ((len(settings[name]) if name in settings else default) - 1)

    @property
    def width(self) -> int:
        """Channels of a latent (D)."""
        return self.vae.config.latent_channels

    def decoder_modules(self) -> Sequence[nn.Module]:
        """What post-training may train."""
        found = (getattr(self.vae, name, None) for name in ("post_quant_conv", "decoder"))
        return [module for module in found if module is not None]


class ContinuousDiffusersTokenizer(DiffusersTokenizer):
    """One with vectors as latents: raw, row by row.

    Diffusion models see :meth:`normalise` of them: ``(z - latent_mean) / latent_std * latent_multiplier``, from the
    configuration's ``shift_factor`` or ``latents_mean``, ``latents_std``, and ``scaling_factor``.
    """

    kind = "continuous"

    def __init__(self, config: DiffusersConfig, pretrained: bool = False) -> None:
        super().__init__(config, pretrained)
        facts = self.vae.config
        self.latent_multiplier: float = facts.scaling_factor
        self.latent_mean: float | list[float] = facts.get("latents_mean") or facts.get("shift_factor") or 0.0
        self.latent_std: float | list[float] = facts.get("latents_std") or 1.0

    def decode(self, latents: Tensor, grid: tuple[int, int] | None = None) -> Tensor:
        """Raw latents (N, L, D) to images (N, 3, H, W), nominally in [-1, 1], not clamped.

        Args:
            latents: row by row.
            grid: (rows, columns); a square where it is not given.

        Raises:
            UserError: latents of another width, or not as many as the grid has places.
        """
        if latents.ndim != 3 or latents.shape[2] != self.width:
            raise UserError(f"got latents of shape {tuple(latents.shape)}, this tokenizer decodes (N, L, {self.width})")
        return self.vae.decode(to_grid(latents, grid)).sample

    def normalise(self, latents: Tensor) -> Tensor:
        """Raw latents (N, L, D) to what diffusion models of this autoencoder see."""
        mean, std = (latents.new_tensor(value) for value in (self.latent_mean, self.latent_std))
        return (latents - mean) / std * self.latent_multiplier

    def denormalise(self, latents: Tensor) -> Tensor:
        """Undo :meth:`normalise`."""
        mean, std = (latents.new_tensor(value) for value in (self.latent_mean, self.latent_std))
        return latents / self.latent_multiplier * std + mean

    @torch.no_grad()
    def check(self, images: Tensor | None = None) -> list[str]:
        """What is wrong with the settings, or with a few images (N, 3, H, W): plain sentences, none if all is well.

        The deviation of normalised latents can only be judged with images.
        """
        facts, found = self.vae.config, []
        if (facts.get("latents_mean") is None) != (facts.get("latents_std") is None):
            found.append("Of latents_mean and latents_std one is missing; they go together.")
        if images is None:
            return found
        latents = self.encode(images)
        std = self.normalise(latents).std().item()
        if not 0.25 < std < 4:
            found.append(
                f"Normalised latents have a standard deviation of {std:.3g}, far from 1: scaling_factor "
                f"{facts.scaling_factor:g} or latents_std is left at its default, inverted, or another model's."
            )
        return found + image_problems(images, self.decode(latents))


def read_tokenizer(family: type[T], config: type[DiffusersConfig], path: str | Path, image_size: int | None) -> T:
    """A tokenizer from the folder of its autoencoder, or of a pipeline; in eval mode, frozen, on the CPU.

    Args:
        family: our class.
        config: of its settings.
        path: the folder.
        image_size: in pixels; by default the one that the pipeline's transformer makes latents of, or its configuration
            names.

    Raises:
        UserError: no such folder, another class, or weights that do not fit.
    """
    found = component(path, family.class_name)
    size, side = found.settings.get("sample_size") or 256, latent_side(path)
    if side is not None:
        size = side * family.factor_of(found.settings)
    settings = {"image_size": image_size or size, "settings": found.settings}
    model = family(validate(config, settings, source=str(found.folder)))
    load_network(model.vae, found)
    return model.eval().requires_grad_(False)


def to_folder(model: DiffusersTokenizer, path: Path) -> Path:
    """Write a folder that ``from_pretrained`` of the library's class loads.

    Raises:
        UserError: it exists, or cannot be written.
    """
    return write_network(model.vae, path)
