"""Autoencoders of the diffusers library: AutoencoderKL, AutoencoderDC and VQModel, in their folders."""

from functools import partial
from pathlib import Path
from typing import TypeVar

from robustok.config import validate
from robustok.pretrained.diffusers_folders import component, latent_side, load_network
from robustok.pretrained.family import FolderFamily
from robustok.tokenizers.diffusers import (
    DiffusersConfig,
    DiffusersDC,
    DiffusersDCConfig,
    DiffusersKL,
    DiffusersKLConfig,
    DiffusersTokenizer,
    DiffusersVQ,
    DiffusersVQConfig,
)

T = TypeVar("T", bound=DiffusersTokenizer)


def from_folder(
    model_class: type[T], config_class: type[DiffusersConfig], path: str | Path, image_size: int | None = None
) -> T:
    """Load a tokenizer from the folder of its autoencoder, or of a pipeline; in eval mode, frozen, on the CPU.

    Args:
        model_class: one of ours.
        config_class: of its settings.
        path: the folder.
        image_size: in pixels; by default the one whose latents the pipeline's transformer models, or that of the
            autoencoder's configuration.

    Raises:
        UserError: no such folder, another class, or weights that do not fit.
    """
    found = component(path, model_class.class_name)
    size, side = found.settings.get("sample_size") or 256, latent_side(path)
    if side is not None:
        size = side * model_class.factor_of(found.settings)
    settings = {"image_size": image_size or size, "settings": found.settings}
    model = model_class(validate(config_class, settings, source=str(found.folder)))
    load_network(model.vae, found)
    return model.eval().requires_grad_(False)


FAMILIES = {
    config.model_fields["name"].default: FolderFamily(
        kind="tokenizer",
        model=model,
        class_name=model.class_name,
        load=partial(from_folder, model, config),
        network=lambda tokenizer: tokenizer.vae,
        settings=("image_size",),
    )
    for model, config in (
        (DiffusersKL, DiffusersKLConfig),
        (DiffusersDC, DiffusersDCConfig),
        (DiffusersVQ, DiffusersVQConfig),
    )
}
