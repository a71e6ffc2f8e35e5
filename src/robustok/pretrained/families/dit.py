"""DiT in a folder of the diffusers library, alone or beside the scheduler of its pipeline (arXiv 2212.09748)."""

from pathlib import Path
from typing import Any

from pydantic import ConfigDict, Field

from robustok.config import Config, validate
from robustok.errors import UserError
from robustok.files import read_json
from robustok.generators.ddpm import DDPMSampling
from robustok.generators.dit import DiT, DiTConfig
from robustok.pretrained.diffusers_folders import component, load_model
from robustok.pretrained.family import FolderFamily

CLASS_NAME = "DiTTransformer2DModel"
PUBLISHED = DDPMSampling(
    sampler="ancestral", steps=250, spacing="linspace", variance="learned", guidance_scale=1.5, guided_channels=3
)
XL = {"num_layers": 28, "num_attention_heads": 16, "attention_head_dim": 72}


class Sizes(Config):
    """Sizes of the library's transformer that DiT has, too."""

    model_config = ConfigDict(extra="ignore")

    sample_size: int = Field(32, ge=1, le=1024, description="height and width of the latents")
    in_channels: int = Field(4, ge=1, description="channels of a latent")
    num_embeds_ada_norm: int = Field(1000, ge=1, description="number of classes")


def from_folder(path: str | Path, **statistics: Any) -> DiT:
    """Load a DiT from the folder of its pipeline, or from its own; in eval mode, frozen, on the CPU.

    A transformer without a scheduler beside it gets DiT's schedule: 1000 timesteps, linear betas.

    Args:
        path: the folder.
        statistics: latent_mean, latent_std, latent_multiplier, which are in the configuration of the autoencoder;
            without them the model does not sample.

    Raises:
        UserError: no such folder, another class, weights that do not fit, or a noise schedule that is not supported.
    """
    found = component(path, CLASS_NAME)
    sizes = validate(Sizes, found.settings, f"{found.folder}/config.json")
    settings = {key: value for key, value in found.settings.items() if key not in Sizes.model_fields}
    file = found.folder.parent / "scheduler" / "scheduler_config.json"
    scheduler = read_json(file) if file.exists() or found.folder != Path(path) else {}
    fields = _noise_schedule(scheduler, found.folder) | statistics | {"settings": settings}
    shape = (sizes.sample_size**2, sizes.in_channels)
    config = validate(DiTConfig, fields, str(found.folder))
    model = load_model(lambda: DiT(config, shape, sizes.num_embeds_ada_norm), "transformer", found)
    if model.learned_variance and all(settings.get(key, value) == value for key, value in XL.items()):
        model.sampling = PUBLISHED
    else:
        spacing = {"spacing": scheduler.get("timestep_spacing", "leading")}
        model.sampling = validate(DDPMSampling, spacing, f"the scheduler beside {found.folder}")
    return model


def _noise_schedule(scheduler: dict[str, Any], folder: Path) -> dict[str, Any]:
    """Fields of DiTConfig from the configuration of the library's scheduler."""
    accepted = {
        "prediction_type": ("epsilon",),
        "beta_schedule": ("linear", "scaled_linear"),
        "trained_betas": (None,),
        "thresholding": (False,),
        "rescale_betas_zero_snr": (False,),
        "set_alpha_to_one": (True,),
    }
    for key, values in accepted.items():
        if key in scheduler and scheduler[key] not in values:
            raise UserError(
                f"the scheduler beside {folder} has {key} = {scheduler[key]!r}; accepted is "
                f"{' or '.join(map(repr, values))}; give the scheduler it was trained with"
            )
    names = {"timesteps": "num_train_timesteps", **{key: key for key in ("beta_start", "beta_end", "beta_schedule")}}
    found = {ours: scheduler[theirs] for ours, theirs in names.items() if theirs in scheduler}
    return found | {"clip": scheduler.get("clip_sample_range", 1.0) if scheduler.get("clip_sample") else None}


FAMILY = FolderFamily(
    kind="generator",
    model=DiT,
    class_name=CLASS_NAME,
    load=from_folder,
    network=lambda model: model.transformer,
    settings=("latent_mean", "latent_std", "latent_multiplier"),
)
