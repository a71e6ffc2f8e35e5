"""Post-training of other people's weights: what comes before the training, and what after.

    robustok post-train pairs/llamagen.yaml tokenizer.weights=vq_ds16_c2i.pt generator.weights=c2i_L_256.pt ...

Before: both become snapshots in the run folder, and are checked against each other, the latents and the images.
After: the decoder is written in the layout of the original file, with a model card:

    runs/post/  tokenizer/  generator/  latents/  ...  snapshot/best/  export/  README.md  vq_ds16_c2i.safetensors
"""

import json
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

from pydantic import Discriminator, Field, Tag

from robustok.checkpoints import file_beside
from robustok.commands.convert import ConvertRun, convert
from robustok.config import Config
from robustok.console import note
from robustok.data.buckets import bucket_folder, open_buckets
from robustok.data.labels import check_same_classes
from robustok.data.latent_cache import LatentCache
from robustok.data.latent_checks import check_cache, check_center_crops, check_real_latents
from robustok.data.sources import Data
from robustok.errors import UserError, printable
from robustok.files import regular_file, write_file
from robustok.generators import check_kind
from robustok.generators.pipeline_families import family_of
from robustok.hub import download, is_remote
from robustok.model_card import model_card
from robustok.pretrained.diffusers_folders import AUTOENCODERS, fetch
from robustok.pretrained.families import FAMILIES, FOLDERS, families_named
from robustok.pretrained.load import load_pretrained
from robustok.pretrained.pipelines import PIPELINE, pipeline_licence, write_pipeline
from robustok.snapshots import read_header, resolve
from robustok.tokenizers import encoder_digest, load_tokenizer
from robustok.types import Tokenizer

SUFFIXES = (".safetensors", ".pt", ".pth", ".bin", ".ckpt")  # of files of weights; a path without one is a folder


class Pretrained(Config):
    """Other people's weights, in the place of the path of a snapshot or run folder."""

    family: str = Field(description="layout of the weights, as in robustok convert")
    weights: Path | None = Field(
        None,
        description="file or folder, or its address on the Hub (hf://ORG/REPO/FILE, hf://ORG/REPO); KEY=PATH alone is "
        "a snapshot or run folder instead",
    )
    published: str | None = Field(None, description="where the weights can be downloaded, for error messages")
    config: dict[str, Any] = Field({}, description="settings that are in no shape, as in robustok convert")
    licence: str | None = Field(None, description="of these weights, where it is not that of the family")


class PretrainedTokenizer(Pretrained):
    """A pretrained tokenizer."""

    discriminator: bool = Field(True, description="keep the discriminator of a training checkpoint")


class PretrainedGenerator(Pretrained):
    """A pretrained generator; of family pipeline, ``config`` has ``prompt`` and ``precision``."""

    statistics: Path | None = Field(
        None, description="file with mean and std of the latents that a diffusion model was trained on"
    )


def _form(value: Any) -> str:
    return "pretrained" if isinstance(value, dict | Pretrained) else "path"


TokenizerSource = Annotated[
    Annotated[Path, Tag("path")] | Annotated[PretrainedTokenizer, Tag("pretrained")], Discriminator(_form)
]
GeneratorSource = Annotated[
    Annotated[Path, Tag("path")] | Annotated[PretrainedGenerator, Tag("pretrained")], Discriminator(_form)
]
Sources = Mapping[str, Path | Pretrained | None]
"""What "tokenizer" and "generator" are read from; None where there is none."""


# Before the training


def check_given(sources: Sources) -> None:
    """Refuse pretrained models whose files are not given, or do not exist.

    Raises:
        UserError: names the setting, and where the file can be downloaded.
    """
    generator = sources.get("generator")
    if isinstance(generator, Pretrained) and generator.family == PIPELINE:
        if generator.weights is None:
            raise UserError("pipeline is missing; give pipeline=FOLDER of a diffusers pipeline, or hf://ORG/REPO")
        family_of(generator.weights)
    for name, source in sources.items():
        if not isinstance(source, Pretrained):
            continue
        if source.weights is None:
            where = f" ({source.published})" if source.published else ""
            raise UserError(
                f"{name}.weights is missing; give {name}.weights=FILE, the {source.family} weights{where}, or "
                f"{name}=FOLDER of a snapshot"
            )
        files = {"weights": source.weights}
        if isinstance(source, PretrainedGenerator):
            files["statistics"] = source.statistics
        for key, path in files.items():
            if path is not None and not is_remote(path) and not path.exists():
                where = f"; {source.published}" if source.published else ""
                raise UserError(f"{name}.{key}={path} is not there; give the path of the file{where}")


@contextmanager
def refused_as_a_whole(sources: Sources, out: Path) -> Iterator[None]:
    """Context: a UserError removes the run folder, unless there was one before."""
    fresh = not (out / "config.yaml").exists()
    try:
        yield
    except UserError as error:
        if not fresh:
            raise
        shutil.rmtree(out, ignore_errors=True)
        reason = str(error)
        for name, source in sources.items():
            if isinstance(source, Pretrained):  # its snapshot is removed, too
                reason = reason.replace(str(out / name), str(source.weights))
        raise UserError(reason) from None


def convert_sources(sources: Sources, out: Path, data: Data) -> dict[str, Path]:
    """Convert pretrained models to snapshots in the run folder, unless they are there already.

    Args:
        sources: "tokenizer", and "generator" where there is one.
        out: the run folder.
        data: the images, whose captions or classes are the prompts of a pipeline.

    Returns:
        Paths of snapshots or run folders by the same names; a source that is a path is returned as it is.

    Raises:
        UserError: as ``convert`` raises it; a path without a snapshot; a tokenizer where a generator should be, or the
            reverse.
    """
    paths: dict[str, Path] = {}
    pipeline = pipeline_of(sources)
    for name, source in sources.items():
        if isinstance(source, Pretrained):
            paths[name] = out / name
            if (out / name / "model.safetensors").exists():
                continue
            licence = source.licence or (pipeline and pipeline_licence(pipeline, vae=name == "tokenizer"))
            if source.family == PIPELINE:
                buckets = open_buckets(data, load_tokenizer(paths["tokenizer"]))
                write_pipeline(source.weights, source.config, licence, paths["tokenizer"], buckets, out / name)
            else:
                source = source.model_copy(update={"licence": licence})
                _convert(name, source, out / name, paths.get("tokenizer"))
        elif source is not None:
            resolve(source)
            paths[name] = source
    return paths


def pipeline_of(sources: Sources) -> Path | None:
    """The folder, or address, of the pipeline that the generator is; None where it is none."""
    found = sources.get("generator")
    return found.weights if isinstance(found, Pretrained) and found.family == PIPELINE else None


def _convert(name: str, source: Pretrained, out: Path, tokenizer: Path | None) -> None:
    settings = {key: value for key, value in source if key != "published"}
    try:
        convert(ConvertRun(out=out, **settings, tokenizer=tokenizer if name == "generator" else None))
    except UserError as error:
        raise UserError(f"{name}: {error} (its settings are written {name}.KEY=VALUE here)") from None
    if not (out / "config.yaml").exists():
        raise UserError(f"{source.weights} holds more than a {name}; set {name}.family to that of the {name} alone")
    if (kind := read_header(out)["kind"]) != name:
        raise UserError(f"{name}.weights={source.weights} holds a {kind}; give the file of the {name}")


def check_together(paths: Mapping[str, Path], latents: Path | None, data: Data) -> int:
    """Check, before the long work, that generator and latents belong to the tokenizer and that the images exist.

    Args:
        paths: of the snapshots, "tokenizer" and perhaps "generator".
        latents: cache of the images' latents, if there is one already.
        data: the images.

    Returns:
        How many pairs can be made at most.

    Raises:
        UserError: names what does not fit.
    """
    tokenizer = load_tokenizer(paths["tokenizer"])
    space, buckets = encoder_digest(tokenizer), open_buckets(data, tokenizer)
    if "generator" in paths:
        _check_generator(paths, tokenizer, space, buckets[0].classes, bool(data.buckets))
    if latents is None:
        return sum(map(len, buckets))
    caches = [LatentCache(bucket_folder(latents, data, images)) for images in buckets]
    for cache, images in zip(caches, buckets, strict=True):
        check_real_latents(cache)
        check_center_crops(cache)
        check_cache(cache, space)
        if cache.manifest.data != images.fingerprint:
            raise UserError(
                f"{cache.path} holds latents of other images than {images.describe()}; give the data they were encoded "
                "from, or latents=null, which encodes them"
            )
    return sum(map(len, caches))


def _check_generator(
    paths: Mapping[str, Path], tokenizer: Tokenizer, space: str, classes: list[str], buckets: bool
) -> None:
    """Check a generator against its tokenizer, whose latent space has the digest ``space``, and the data's classes."""
    path, header = paths["generator"], read_header(paths["generator"])
    if header.get("kind") != "generator":
        raise UserError(f"{path} is a snapshot of a {header.get('kind')}, expected a generator; give another path")
    if buckets and header["config"]["name"] != PIPELINE:
        raise UserError(
            f"data.buckets needs a generator whose images may have any size, a pipeline of diffusers; {path} is of "
            f"family {header['config']['name']}; set data.buckets=false"
        )
    check_kind(header["config"]["name"], tokenizer.kind, str(paths["tokenizer"]))
    codes = len(tokenizer.codebook) if tokenizer.kind == "discrete" else None
    found = header.get("latent_space"), tuple(header["latent_shape"]), header["codebook_size"]
    expected = space if found[0] else None, tuple(tokenizer.latent_shape), codes  # a latent space may be unknown
    if found != expected:
        raise UserError(
            f"{path} models the latents of another tokenizer: (latent space, shape, codes) are {found}, those of "
            f"{paths['tokenizer']} {expected}; give the tokenizer that it was trained with"
        )
    check_same_classes(header.get("class_names"), classes, str(path), "the images")
    if len(classes) > header["classes"]:
        raise UserError(
            f"the images have {len(classes)} classes, {path} has {header['classes']}; give the images it was trained on"
        )


def look_at(source: Path | PretrainedTokenizer, out: Path) -> Tokenizer:
    """The tokenizer that a run would start from; nothing is written."""
    if not isinstance(source, Pretrained):
        return load_tokenizer(source)
    if (out / "tokenizer" / "model.safetensors").exists():
        return load_tokenizer(out / "tokenizer")
    config = {key: value for key, value in source.config.items() if key != "discriminator"}
    return load_pretrained(source.family, source.weights, config or None)


# After the training


def export_decoder(snapshot: Path, source: Path | PretrainedTokenizer, out: Path) -> Path | None:
    """Write a post-trained tokenizer in the layout of the file that it came from, and a model card beside it.

    Args:
        snapshot: the post-trained one.
        source: what it was post-trained from: pretrained weights, or a snapshot.
        out: folder, which is made.

    Returns:
        What was written, or existed already. None where the source is a snapshot that was not converted from another
        layout, or does not hold all that this layout has.

    Raises:
        UserError: as ``convert`` raises it.
    """
    origin, original = origin_of(read_header(snapshot)), None
    if isinstance(source, Pretrained):
        family, file = source.family, source.weights
        original = None if families_named(family)[0] in FOLDERS else file
    else:
        found = origin_of(read_header(source))
        if found is None:
            return None
        if found["family"] in FAMILIES and FAMILIES[found["family"]].dropped:
            note(
                f"for the layout of {found['file']}, which holds more than {source}: robustok convert to=export "
                f"family={found['family']} weights={snapshot} original={found['file']} out=FILE.safetensors"
            )
            return None
        family, file = found["family"], Path(Path(found["file"]).name)
    target = out / (f"{file.stem}.safetensors" if file.suffix in SUFFIXES else _folder_name(file))
    if not target.exists():
        convert(ConvertRun(family=family, to="export", weights=snapshot, original=original, out=target))
    use = _use(origin or {"family": family, "part": "flat state dict"}, file, target)
    write_file(out / "README.md", printable(model_card(read_header(snapshot), use=use)))
    if original is not None:  # the authors' loader, and ours, may need the configuration beside it
        config = file_beside(download(original) if is_remote(original) else original)
        if config is not None:
            write_file(out / config.name, regular_file(config).read_bytes())
    return target


def origin_of(header: Mapping[str, Any]) -> dict[str, str] | None:
    """What a snapshot of a tokenizer was converted from: ``file``, ``part`` and ``family``; None where it was not."""
    return None if "delta" in header else header.get("source")


def _folder_name(source: Path) -> str:
    """What to call the folder of an autoencoder: as in its pipeline, or like the folder that it came from."""
    folder, name = fetch(source), source.name.partition("@")[0]
    return next((part for part in AUTOENCODERS if (folder / part).is_dir()), name)


def _use(origin: Mapping[str, str], file: Path, target: Path) -> str:
    """How the weights are used in the project that they came from, in Markdown.

    Args:
        origin: ``family``, and the ``part`` of the original file that the weights were in, such as "ema".
        file: the original.
        target: what was written.
    """
    if target.is_dir():
        folder = f"the folder `{target.name}` of `{file.name}`" if target.name != file.name else f"`{file.name}`"
        return f"Replace {folder} by `{target.name}`, and load it as before."
    if file.suffix == ".safetensors":
        return f"Replace the original `{file.name}` by `{target.name}`."
    new, old = (json.dumps(path.name, ensure_ascii=False) for path in (target, file))
    content, family = "weights", FAMILIES.get(origin["family"])
    if family is not None and family.read_under:
        content = "{" + ", ".join(f'"{key}": weights' for key in family.read_under) + "}"
    else:
        for wrapper in origin["part"].split(" of ") if origin["part"] != "flat state dict" else ():
            content = f"{{{json.dumps(wrapper)}: {content}}}"
    return (
        f"To replace the original `{file.name}`:\n\n```python\nimport torch\nfrom safetensors.torch import "
        f"load_file\n\nweights = load_file({new})\ntorch.save({content}, {old})\n```\n\n"
        f'In robustok: `robustok.load_pretrained("{origin["family"]}", {new})`.'
    )
