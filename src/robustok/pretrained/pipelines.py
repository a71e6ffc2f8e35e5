"""Pipelines of the diffusers library as pairs of a tokenizer and a generator, and back to their folders.

    stable-diffusion/  model_index.json  vae/  unet/  scheduler/  text_encoder/  tokenizer/

A snapshot of such a generator does not copy the pipeline: it names its folder, and holds the prompts.
"""

import os
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from robustok.checkpoints import write_checkpoint
from robustok.config import plain, validate
from robustok.data.buckets import check_sizes
from robustok.data.dataset import ImageDataset
from robustok.errors import UserError, printable
from robustok.files import atomic_folder, read_json, write_file
from robustok.generators.pipeline import DTYPES, PipelineConfig, PipelineGenerator
from robustok.generators.pipeline_families import family_of, fetch_pipeline, licence_of
from robustok.hub import is_remote
from robustok.model_card import licence_fields, model_card
from robustok.pretrained.export import export_folder
from robustok.pretrained.load import load_pretrained
from robustok.pretrained.single_file import has_single_file, single_file
from robustok.snapshots import read_header, write_snapshot
from robustok.tokenizers import encoder_digest, load_tokenizer
from robustok.types import Tokenizer

PIPELINE = "pipeline"  # the family, in settings
SETTINGS = ("prompt", "precision", "offload")  # of a generator of this family


def load_pipeline(
    path: str | Path, prompts: Sequence[str] = ("",), image_size: int | None = None, precision: str = "auto"
) -> tuple[Tokenizer, PipelineGenerator]:
    """The autoencoder and the rest of an image-to-image pipeline, as a tokenizer and a generator like all others.

    Args:
        path: folder of the pipeline, or ``hf://ORG/REPO``.
        prompts: the prompt of each label.
        image_size: in pixels; None is the one that the pipeline is meant for.
        precision: of the pipeline's weights: bf16, fp16, float32, or auto: bf16 on a GPU, else float32. The
            autoencoder is float32.

    Returns:
        The tokenizer, and the generator, in eval mode, frozen, on the CPU.

    Raises:
        UserError: no pipeline of a known family, or one that cannot be loaded.
    """
    family_of(path)
    tokenizer = load_pretrained("diffusers", path, {} if image_size is None else {"image_size": image_size})
    settings = {"folder": path, "image_size": tokenizer.image_size, "precision": precision}
    generator = PipelineGenerator(validate(PipelineConfig, settings, "load_pipeline"), prompts)
    generator.latent_space = encoder_digest(tokenizer)
    return tokenizer, generator


def write_pipeline(
    path: Path, config: dict[str, Any], licence: str | None, tokenizer: Path, buckets: Sequence[ImageDataset], out: Path
) -> None:
    """Write the snapshot of a pipeline's generator, whose prompts are the captions of images, or one for each class.

    Args:
        path: folder of the pipeline, or hf://ORG/REPO.
        config: perhaps ``prompt``, of images without captions, in which {label} is the name of the class, and
            ``precision`` and ``offload``.
        licence: of the weights.
        tokenizer: snapshot of the pipeline's autoencoder.
        buckets: images of one size each, whose labels are numbers of the prompts.
        out: folder of the snapshot.

    Raises:
        UserError: unknown settings; no usable pipeline; images smaller than it makes; another tokenizer.
    """
    if unknown := [key for key in config if key not in SETTINGS]:
        raise UserError(f"generator.config.{unknown[0]} is not known; of a pipeline are {', '.join(SETTINGS)}")
    prompt = config.get("prompt") or ""
    images = buckets[0]  # all have the captions and classes of the whole data set
    if images.captions and prompt:
        raise UserError("generator.config.prompt is for images without captions, these have some; drop one of them")
    prompts = images.captions or [str(prompt).replace("{label}", name) for name in images.classes]
    check_sizes(buckets)
    decoder = load_tokenizer(tokenizer)
    folder = path if is_remote(path) else path.absolute()
    settings = {key: value for key, value in config.items() if key != "prompt"}
    settings |= {"folder": folder, "image_size": decoder.image_size}
    generator = PipelineGenerator(validate(PipelineConfig, settings, "generator.config"), prompts)
    if generator.latent_shape != tuple(decoder.latent_shape):
        found = tuple(decoder.latent_shape)
        raise UserError(f"{path} samples latents of {generator.latent_shape}, {tokenizer} has {found}; give its own")
    header = {
        "kind": "generator",
        "config": plain(generator.config),
        "step": 0,
        "trained_on": f"the pipeline {printable(path.name)}, used where it is",
        "latent_shape": list(generator.latent_shape),
        "codebook_size": None,
        "classes": generator.classes,
        "latent_space": encoder_digest(decoder),
        "sampling": plain(generator.sampling),
        **({} if images.captions else {"class_names": images.classes}),
        **licence_fields(licence or generator.licence),
    }
    write_snapshot(out, header, generator.state_dict(), {})


def export_pipeline(snapshot: Path, path: Path, out: Path, picture: str | None = None) -> Path:
    """Write a pipeline with a post-trained autoencoder: a folder that differs from the original in ``vae`` alone.

    Beside it is ``vae.safetensors``, in the layout of the first Stable Diffusion that other programs read, where the
    autoencoder has that layout, in float32, bfloat16 and float16, and a model card. Other parts are hard links where
    the file system has them.

    Args:
        snapshot: the post-trained tokenizer.
        path: folder of the original, or hf://ORG/REPO.
        out: folder, which is made.
        picture: name of a file in it, of images before and after, for the card.

    Returns:
        The folder of the pipeline, which may have existed already.

    Raises:
        UserError: a folder cannot be written.
    """
    tokenizer, target, source = load_tokenizer(snapshot), out / "pipeline", fetch_pipeline(path)
    index = read_json(source / "model_index.json")
    if not target.exists():
        with atomic_folder(target) as folder:
            shutil.copyfile(source / "model_index.json", folder / "model_index.json")
            listed = [key for key in index if key.isidentifier() and (source / key).is_dir()]  # no path leads out
            for part in (part for part in listed if part != "vae"):
                shutil.copytree((source / part).resolve(), folder / part, copy_function=_link_or_copy)
            export_folder(tokenizer, folder / "vae")
    use = f"Load `pipeline` with `from_pretrained` of diffusers; only its `vae` differs from {printable(path.name)}."
    if has_single_file(tokenizer):
        for kind, dtype in DTYPES.items():
            file = out / ("vae.safetensors" if kind == "float32" else f"vae.{kind}.safetensors")
            if not file.exists():
                weights = single_file(tokenizer)
                write_checkpoint(file, {name: tensor.to(dtype) for name, tensor in weights.items()})
        use += (
            " `vae.safetensors` is the same autoencoder for programs such as ComfyUI and A1111 (models/vae, "
            "models/VAE), and so are `vae.bf16.safetensors` and `vae.fp16.safetensors`, at half the size. Where images "
            "come out black, this autoencoder overflows in float16: take bfloat16."
        )
    if picture is not None:
        use = f"![The same generated latents, decoded before and after]({picture})\n\n{use}"
    write_file(out / "README.md", printable(model_card(read_header(snapshot), use=use)))
    return target


def pipeline_licence(path: Path, vae: bool) -> str | None:
    """The licence in the model card of a pipeline, or of its autoencoder if that has its own; None without any."""
    folder = fetch_pipeline(path)
    return (licence_of(folder / "vae") if vae else None) or licence_of(folder)


def _link_or_copy(source: str, target: str) -> str:
    """A hard link to the file, which takes no space; a copy on another file system."""
    source = os.path.realpath(source)
    try:
        os.link(source, target)
    except OSError:
        shutil.copyfile(source, target)
    return target
