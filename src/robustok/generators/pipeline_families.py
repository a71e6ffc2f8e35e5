"""Which pipelines of the diffusers library sample latents for us, how they differ, and what their folders hold.

A pipeline makes pairs if it has an image-to-image class with a ``strength``: SDEdit (arXiv 2108.01073). With a
text-to-image class alone it makes free samples. To add a family, add a line to ``FAMILIES``, a tiny pipeline to the
tests, and its latents to the docs.
"""

import hashlib
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from robustok.errors import UserError
from robustok.files import read_json, regular_file
from robustok.hub import download, download_folder, is_remote

# Whose classes are loaded; a pipeline with code of its own is refused. "kolors" is a module of diffusers.
LIBRARIES = ("diffusers", "transformers", "kolors")
UNUSED = ("safety_checker", "feature_extractor", "image_encoder")  # parts that are never loaded
FILES = ("*.json", "*.txt", "*.model", "*.jinja")  # besides weights
STEMS = ("diffusion_pytorch_model", "model")
WEIGHTS = tuple(
    f"{stem}{end}" for stem in STEMS for end in (".safetensors", "-*.safetensors", ".safetensors.index.json")
)


@dataclass(frozen=True)
class PipelineFamily:
    """How the pipelines of one kind are called.

    Attributes:
        text: class of text-to-image.
        image: class of image-to-image; None where diffusers has none.
        denoiser: its part that predicts noise or velocity.
        encoded: the arguments of a call that its ``encode_prompt`` returns, in this order; None for what is no
            argument.
        packed: whether latents come out as a sequence of patches of 2 x 2.
        video: whether its autoencoder has a time axis: (N, C, 1, h, w).
        guidance: the argument that is its guidance scale.
        unguided: the guidance scale that switches guidance off.
        negative: what guidance moves away from; None is the pipeline's own default.
        floors: whether a strength below one step is an error and not one step.
        lists: whether encoded prompts are a list of tensors of several lengths.
        skips: whether ``strength`` is a share of the steps of its training, of which the sampler skips most.
        why: there are no pairs, where ``image`` is None.
    """

    text: str
    image: str | None
    denoiser: str
    encoded: tuple[str | None, ...]
    packed: bool = False
    video: bool = False
    guidance: str = "guidance_scale"
    unguided: float = 1.0
    negative: str | None = None
    floors: bool = False
    lists: bool = False
    skips: bool = False
    why: str = "which has no image-to-image in diffusers"


PAIR = ("prompt_embeds", "negative_prompt_embeds")
POOLED = (*PAIR, "pooled_prompt_embeds", "negative_pooled_prompt_embeds")
MASKED = ("prompt_embeds", None, "prompt_attention_mask")
BOTH_MASKED = ("prompt_embeds", "prompt_attention_mask", "negative_prompt_embeds", "negative_prompt_attention_mask")
FAMILIES = {
    "Stable Diffusion": PipelineFamily(
        "StableDiffusionPipeline", "StableDiffusionImg2ImgPipeline", "unet", PAIR, floors=True
    ),
    "Stable Diffusion XL": PipelineFamily(
        "StableDiffusionXLPipeline", "StableDiffusionXLImg2ImgPipeline", "unet", POOLED, floors=True
    ),
    "Stable Diffusion 3": PipelineFamily(
        "StableDiffusion3Pipeline", "StableDiffusion3Img2ImgPipeline", "transformer", POOLED
    ),
    "Flux": PipelineFamily(
        "FluxPipeline", "FluxImg2ImgPipeline", "transformer", ("prompt_embeds", "pooled_prompt_embeds", None),
        packed=True,
    ),
    "Chroma": PipelineFamily(
        "ChromaPipeline", "ChromaImg2ImgPipeline", "transformer",
        (*MASKED, "negative_prompt_embeds", None, "negative_prompt_attention_mask"), packed=True,
    ),
    "Qwen-Image": PipelineFamily(
        "QwenImagePipeline", "QwenImageImg2ImgPipeline", "transformer", ("prompt_embeds", "prompt_embeds_mask"),
        packed=True, video=True, guidance="true_cfg_scale", negative=" ",
    ),
    "Z-Image": PipelineFamily("ZImagePipeline", "ZImageImg2ImgPipeline", "transformer", PAIR, unguided=0.0, lists=True),
    "LCM": PipelineFamily(
        "LatentConsistencyModelPipeline", "LatentConsistencyModelImg2ImgPipeline", "unet", PAIR, floors=True, skips=True
    ),
    "Kolors": PipelineFamily(
        "KolorsPipeline", None, "unet", POOLED,
        why="whose image-to-image in diffusers forgets the pooled prompts that it is given",
    ),
    "PixArt-alpha": PipelineFamily("PixArtAlphaPipeline", None, "transformer", BOTH_MASKED),
    "PixArt-Sigma": PipelineFamily("PixArtSigmaPipeline", None, "transformer", BOTH_MASKED),
    "Sana": PipelineFamily("SanaPipeline", None, "transformer", BOTH_MASKED),
}  # fmt: skip
REFUSED = {  # patterns of class names: why
    r"Flux2.*|FluxKontext.*|.*Edit.*": "it conditions on reference images and has no strength, so no share of an image "
    "can be kept",
    r"DiTPipeline": "it is conditioned on classes; post-train it with pairs/dit.yaml",
    r".*(Inpaint|ControlNet|Upscale|Depth2Img|Img2ImgSuper|Control).*": "it needs more than an image and a prompt",
    r".*(Video|Audio|Music).*|(Wan|LTX|CogVideoX|Mochi|Hunyuan|Allegro).*Pipeline": "it does not make images",
}


def fetch_index(path: str | Path) -> dict[str, Any]:
    """The content of a pipeline's model_index.json, of which the rest need not be downloaded yet.

    Raises:
        UserError: there is none.
    """
    if is_remote(path):
        return read_json(download(f"{path}/model_index.json"))
    if not (Path(path) / "model_index.json").is_file():
        found = "is no folder" if not Path(path).is_dir() else "has no model_index.json"
        raise UserError(f"{path} {found}; give the folder of a diffusers pipeline, as its save_pretrained writes it")
    return read_json(Path(path) / "model_index.json")


def family_of(path: str | Path) -> PipelineFamily:
    """The family of a pipeline.

    Raises:
        UserError: no pipeline; or one that cannot be used, and why.
    """
    index = fetch_index(path)
    name = index.get("_class_name")
    for family in FAMILIES.values():
        if name in (family.text, family.image):
            _check_parts(path, index, family)
            return family
    why = next((why for pattern, why in REFUSED.items() if re.fullmatch(pattern, str(name))), None)
    known = ", ".join(FAMILIES)
    raise UserError(f"{path} is a {name}: {why or 'of no known family'}; robustok post-trains those of {known}")


def check_mixes(path: str | Path, family: PipelineFamily) -> None:
    """Refuse a pipeline that makes free samples only, where pairs are to be made.

    Raises:
        UserError: diffusers has no image-to-image for it.
    """
    if family.image is None:
        raise UserError(
            f"{path} is a {family.text}, {family.why}, so no share of an image can be kept and no pairs are made; "
            "learn from its free samples: objective=free adversarial.adaptive=false sigma=null"
        )


def _check_parts(path: str | Path, index: dict[str, Any], family: PipelineFamily) -> None:
    """Refuse a pipeline that brings code of its own or lacks a part."""
    for part in parts_of(index):
        library, name = index[part]
        if library not in LIBRARIES:
            raise UserError(f"{path}: {part} is a {name} of {library}, whose code is not run; give a pipeline without")
        if not is_remote(path) and not (Path(path) / part).is_dir():
            raise UserError(
                f"{path} lacks the folder {part}, which its model_index.json lists; copy the whole pipeline"
            )
    if lacking := [part for part in ("vae", "scheduler", family.denoiser) if part not in parts_of(index)]:
        raise UserError(f"{path} has no {' and no '.join(lacking)}; give a whole pipeline")


def parts_of(index: dict[str, Any]) -> list[str]:
    """The parts that a model_index.json lists, without those that are never loaded."""
    found = (key for key, value in index.items() if isinstance(value, list) and len(value) == 2 and value[0])
    return [key for key in found if key not in UNUSED and key.isidentifier() and key[0] != "_"]  # no path leads out


def fetch_pipeline(path: str | Path) -> Path:
    """The folder of a pipeline on disk: the given one, or what was downloaded of ``hf://ORG/REPO``.

    Raises:
        UserError: it cannot be downloaded.
    """
    if not is_remote(path):
        return Path(path)
    inside = [f"{part}/{name}" for part in parts_of(fetch_index(path)) for name in (*FILES, *WEIGHTS)]
    return download_folder(path, ["model_index.json", "README.md", "vae/README.md", *inside])


def weights_digest(path: Path, family: PipelineFamily) -> str:
    """Digest of the denoiser's weights and of the scheduler's settings: what the latents come from."""
    sha = hashlib.sha256(regular_file(path / "scheduler" / "scheduler_config.json").read_bytes())
    for file in sorted((path / family.denoiser).glob("*.safetensors")):
        with regular_file(file).open("rb") as stream:
            sha.update(hashlib.file_digest(stream, "sha256").digest())
    return sha.hexdigest()[:16]


def licence_of(path: str | Path) -> str | None:
    """The licence in the model card of a folder, by its name on the Hub; None where it says none."""
    file = Path(path) / "README.md"
    if not file.is_file():
        return None
    head = re.match(r"---\n(.*?)\n---\n", regular_file(file).read_text("utf-8", "replace"), re.DOTALL)
    try:
        found = yaml.safe_load(head[1]) if head else None
    except yaml.YAMLError:
        return None
    if not isinstance(found, dict) or not found.get("license"):
        return None
    named = found.get("license_name") if found["license"] == "other" else found["license"]
    return " ".join(str(named or "other, see the model card of the original").split())[:200]
