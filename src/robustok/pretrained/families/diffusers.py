"""Autoencoders of the diffusers library, in their folders."""

from functools import partial
from pathlib import Path

from robustok.config import validate
from robustok.pretrained.diffusers_folders import component, latent_side, load_model
from robustok.pretrained.family import FolderFamily
from robustok.tokenizers.diffusers import (
    DiffusersConfig,
    DiffusersDC,
    DiffusersKL,
    DiffusersQwen,
    DiffusersTokenizer,
    DiffusersVQ,
)

MODELS = {
    "diffusers_kl": DiffusersKL,
    "diffusers_qwen": DiffusersQwen,
    "diffusers_dc": DiffusersDC,
    "diffusers_vq": DiffusersVQ,
}


def from_folder(name: str, path: str | Path, image_size: int | None = None) -> DiffusersTokenizer:
    """Load a tokenizer from the folder of its autoencoder, or of a pipeline; in eval mode, frozen, on the CPU.

    Args:
        name: of the family.
        path: the folder.
        image_size: in pixels; by default the one whose latents the pipeline's denoiser models, or that of the
            autoencoder's configuration.

    Raises:
        UserError: no such folder, another class, or weights that do not fit.
    """
    found = component(path, MODELS[name].class_name)

    def make() -> DiffusersTokenizer:
        size, side = found.settings.get("sample_size") or MODELS[name].default_size, latent_side(path)
        if side is not None:
            size = side * MODELS[name].factor_of(found.settings)
        settings = {"name": name, "image_size": image_size or size, "settings": found.settings}
        return MODELS[name](validate(DiffusersConfig, settings, source=str(found.folder)))

    return load_model(make, "vae", found)


FAMILIES = {
    name: FolderFamily(
        kind="tokenizer",
        model=model,
        class_name=model.class_name,
        load=partial(from_folder, name),
        network=lambda tokenizer: tokenizer.vae,
        settings=("image_size",),
    )
    for name, model in MODELS.items()
}
