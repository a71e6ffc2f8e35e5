"""Post-training of weights as their authors released them: what comes before the training, and what after.

    robustok post-train pairs/llamagen.yaml tokenizer.weights=vq_ds16_c2i.pt generator.weights=c2i_L_256.pt ...

Before: both become snapshots in the run folder and are held against each other, against the latents and the images.
After: the decoder goes back into a file of the original's layout, with a card that says how it was made:

    runs/post/  tokenizer/  generator/  latents/  ...  snapshot/best/  released/  README.md  vq_ds16_c2i.safetensors
"""

import re
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

from pydantic import Discriminator, Field, Tag

from robustok.checkpoints import file_beside
from robustok.commands.convert import ConvertRun, convert
from robustok.config import Config
from robustok.data.dataset import open_images
from robustok.data.latent_cache import LatentCache, check_cache, check_center_crops
from robustok.data.sources import Data
from robustok.errors import UserError
from robustok.generators import check_kind
from robustok.hub import download, is_remote
from robustok.model_card import model_card
from robustok.pretrained.diffusers_folders import AUTOENCODERS, fetch
from robustok.pretrained.families import FAMILIES, FOLDERS, families_named
from robustok.pretrained.load import load_pretrained
from robustok.snapshots import read_header
from robustok.tokenizers import TOKENIZERS, encoder_digest, load_tokenizer
from robustok.types import Tokenizer

SUFFIXES = (".safetensors", ".pt", ".pth", ".bin", ".ckpt")  # of released files; what has none of them is a folder


class Pretrained(Config):
    """A model as it was released, where the path of a snapshot or run folder may stand too."""

    family: str = Field(description="whose layout the released file has, as robustok convert takes it")
    weights: Path | None = Field(
        None,
        description="released file or folder, or where it is on the Hub (hf://ORG/REPO/FILE, hf://ORG/REPO); KEY=PATH "
        "alone takes a snapshot or run folder instead",
    )
    published: str | None = Field(None, description="where the weights are to be had, for whoever has none yet")
    config: dict[str, Any] = Field({}, description="what the shapes do not tell, as robustok convert takes it")
    licence: str | None = Field(None, description="of these weights, where it is not that of the release")


class PretrainedTokenizer(Pretrained):
    """A released tokenizer."""

    discriminator: bool = Field(True, description="take along the discriminator that training left in the file")


class PretrainedGenerator(Pretrained):
    """A released generator."""

    statistics: Path | None = Field(
        None, description="file with mean and std of the latents that a diffusion model was trained on"
    )


def _form(value: Any) -> str:
    return "released" if isinstance(value, dict | Pretrained) else "path"


TokenizerSource = Annotated[
    Annotated[Path, Tag("path")] | Annotated[PretrainedTokenizer, Tag("released")], Discriminator(_form)
]
GeneratorSource = Annotated[
    Annotated[Path, Tag("path")] | Annotated[PretrainedGenerator, Tag("released")], Discriminator(_form)
]
Sources = Mapping[str, Path | Pretrained | None]
"""Where "tokenizer" and "generator" come from; None where there is none."""


# Before the training


def check_given(sources: Sources) -> None:
    """Refuse released models whose files are not named, or not there.

    Raises:
        UserError: says which file is meant, and where it is to be had.
    """
    for name, source in sources.items():
        if not isinstance(source, Pretrained):
            continue
        if source.weights is None:
            where = f" ({source.published})" if source.published else ""
            raise UserError(
                f"{name}.weights is missing; give {name}.weights=FILE, the released {source.family} weights{where}, or "
                f"{name}=FOLDER of a snapshot"
            )
        for key in ("weights", "statistics"):
            path = getattr(source, key, None)
            if path is not None and not is_remote(path) and not path.exists():
                where = f"; {source.published}" if source.published else ""
                raise UserError(f"{name}.{key}={path} is not there; give the path of the released file{where}")


@contextmanager
def refused_as_a_whole(sources: Sources, out: Path) -> Iterator[None]:
    """Context: a run that is refused in it leaves no run folder behind, if there was none before."""
    fresh = not (out / "config.yaml").exists()
    try:
        yield
    except UserError as error:
        if not fresh:
            raise
        shutil.rmtree(out, ignore_errors=True)
        reason = str(error)
        for name, source in sources.items():
            if isinstance(source, Pretrained):  # its snapshot is gone
                reason = reason.replace(str(out / name), str(source.weights))
        raise UserError(reason) from None


def convert_sources(sources: Sources, out: Path) -> dict[str, Path]:
    """Pretrained models to snapshots in the run folder, those apart that are there already; paths stay what they are.

    Args:
        sources: "tokenizer", and "generator" where there is one.
        out: the run folder.

    Returns:
        Paths of snapshots, or run folders, by the same names.

    Raises:
        UserError: as ``convert`` raises it; a tokenizer where a generator should be, or the reverse.
    """
    paths: dict[str, Path] = {}
    for name, source in sources.items():
        if isinstance(source, Pretrained) and not (out / name / "model.safetensors").exists():
            _convert(name, source, out / name, paths.get("tokenizer"))
        if source is not None:
            paths[name] = out / name if isinstance(source, Pretrained) else source
    return paths


def _convert(name: str, source: Pretrained, out: Path, tokenizer: Path | None) -> None:
    own = {key: value for key, value in source if key != "published"}
    try:
        convert(ConvertRun(out=out, **own, **({"tokenizer": tokenizer} if name == "generator" else {})))
    except UserError as error:
        raise UserError(f"{name}: {error} (its settings are written {name}.KEY=VALUE here)") from None
    if not (out / "config.yaml").exists():
        raise UserError(f"{source.weights} holds more than a {name}; set {name}.family to that of the {name} alone")
    if (kind := read_header(out)["kind"]) != name:
        raise UserError(f"{name}.weights={source.weights} holds a {kind}; give the file of the {name}")


def check_together(paths: Mapping[str, Path], latents: Path | None, data: Data) -> int:
    """Refuse, before the long work, a generator or latents of another tokenizer, and images that are not there.

    Args:
        paths: of the snapshots, "tokenizer" and perhaps "generator".
        latents: cache of the images' latents, if there is one already.
        data: the images.

    Returns:
        How many latents pairs can be made of.

    Raises:
        UserError: names what does not fit.
    """
    tokenizer = load_tokenizer(paths["tokenizer"])
    space, images = encoder_digest(tokenizer), open_images(data, tokenizer.image_size, split="train")
    if "generator" in paths:
        _check_generator(paths, tokenizer, space, len(images.classes))
    if latents is None:
        return len(images)
    cache = LatentCache(latents)
    check_center_crops(cache)
    check_cache(cache, space)
    if cache.manifest.data != images.fingerprint:
        raise UserError(
            f"{latents} holds latents of other images than {images.describe()}; give the data they were encoded from, "
            "or latents=null, which encodes them"
        )
    return len(cache)


def _check_generator(paths: Mapping[str, Path], tokenizer: Tokenizer, space: str, classes: int) -> None:
    """Hold a generator's facts against its tokenizer, which makes latents of this space, and the data's classes."""
    path, header = paths["generator"], read_header(paths["generator"])
    if header.get("kind") != "generator":
        raise UserError(f"{path} is a snapshot of a {header.get('kind')}, expected a generator; give another path")
    check_kind(header["config"]["name"], tokenizer.kind, str(paths["tokenizer"]))
    codes = len(tokenizer.codebook) if tokenizer.kind == "discrete" else None
    found = header.get("latent_space"), tuple(header["latent_shape"]), header["codebook_size"]
    expected = space if found[0] else None, tuple(tokenizer.latent_shape), codes  # not all say whose latents they model
    if found != expected:
        raise UserError(
            f"{path} models the latents of another tokenizer: (latent space, shape, codes) are {found}, those of "
            f"{paths['tokenizer']} {expected}; give the tokenizer that it was trained with"
        )
    if classes > header["classes"]:
        raise UserError(
            f"the images have {classes} classes, {path} knows {header['classes']}; give the images it was trained on"
        )


def look_at(source: Path | PretrainedTokenizer, out: Path) -> Tokenizer:
    """The tokenizer that a run would start from, without writing anything."""
    if not isinstance(source, Pretrained):
        return load_tokenizer(source)
    if (out / "tokenizer" / "model.safetensors").exists():
        return load_tokenizer(out / "tokenizer")
    config = {key: value for key, value in source.config.items() if key != "discriminator"}
    return load_pretrained(source.family, source.weights, config or None)


# After it


def export_decoder(snapshot: Path, source: Path | PretrainedTokenizer, out: Path) -> Path | None:
    """Write a post-trained tokenizer in the layout of the file that it came from, and a card beside it.

    Args:
        snapshot: the post-trained one.
        source: what it was post-trained from: a released file, or a snapshot.
        out: folder, which is made.

    Returns:
        What was written, or was there already; None where a snapshot does not tell all of the file that it came from.

    Raises:
        UserError: as ``convert`` raises it.
    """
    if isinstance(source, Pretrained):
        family, name = source.family, source.weights
        original = None if families_named(family)[0] in FOLDERS else name
    else:
        family, name, original = _family_of(source), _file_of(read_header(source)), None
        if family is None or name is None:
            return None
    target = out / (f"{name.stem}.safetensors" if name.suffix in SUFFIXES else _part(name))
    if not target.exists():
        convert(ConvertRun(family=family, to="export", weights=snapshot, original=original, out=target))
    header = read_header(snapshot)
    (out / "README.md").write_text(model_card(header, use=_use(header, name, target, family)))
    if original is not None:  # its official loader, and ours, may need the configuration beside it
        notes = file_beside(download(original) if is_remote(original) else original)
        if notes is not None:
            shutil.copy(notes, out / notes.name)
    return target


def _part(source: Path) -> str:
    """What to call the folder of an autoencoder: as a pipeline of diffusers calls it, or as it was called."""
    folder, name = fetch(source), source.name.partition("@")[0]
    return next((part for part in AUTOENCODERS if (folder / part).is_dir()), name)


def _family_of(source: Path) -> str | None:
    """The family whose file can be written from a snapshot alone: it has none of the parts that we drop on reading."""
    model = TOKENIZERS.get(read_header(source)["config"].get("name"), (None,))[0]
    whole = {name: room for name, room in FAMILIES.items() if not room.dropped} | FOLDERS
    fits = (name for name, room in whole.items() if room.model is model)
    return next(fits, None)


def _file_of(header: Mapping[str, Any]) -> Path | None:
    """Name of the released file that a snapshot was converted from; None where it was not, or not as a whole."""
    if "delta" in header:
        return None
    found = re.match(r"converted from (.+?), ", str(header.get("trained_on", "")))
    return Path(Path(found[1]).name) if found else None


def _use(header: Mapping[str, Any], name: Path, target: Path, family: str) -> str:
    """How the weights are put back into the project that they came from, in Markdown."""
    if target.is_dir():
        place = f"the folder `{target.name}` of `{name.name}`" if target.name != name.name else f"`{name.name}`"
        return f"Put `{target.name}` in the place of {place}, and load it as before."
    if name.suffix == ".safetensors":
        return f"Put `{target.name}` in the place of the original `{name.name}`."
    part = re.match(r"converted from .+?, ([^,;]+)", str(header.get("trained_on", "")))
    content = f'load_file("{target.name}")'
    for wrapper in part[1].split(" of ") if part and part[1] != "flat state dict" else ():
        content = f'{{"{wrapper}": {content}}}'
    return (
        f"In the place of the original `{name.name}`:\n\n```python\nimport torch\nfrom safetensors.torch import "
        f'load_file\ntorch.save({content}, "{name.name}")\n```\n\n'
        f'In robustok: `robustok.load_pretrained("{family}", "{target.name}")`.'
    )
