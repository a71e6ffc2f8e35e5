"""Models in the folders of the diffusers library: a ``config.json`` beside weights, alone or as part of a pipeline.

    DiT-XL-2-256/  model_index.json  vae/  transformer/  scheduler/

Nothing but the library itself makes its models. Weights that older releases hold as pickles are read by us, so that
nothing in them is executed.
"""

import json
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from robustok.checkpoints import read_checkpoint, write_checkpoint
from robustok.errors import UserError
from robustok.files import atomic_folder, one_line
from robustok.hub import download_folder, is_remote

AUTOENCODERS = ("vae", "vqvae", "movq")  # folders of a pipeline that may hold a tokenizer
PARTS = (*AUTOENCODERS, "transformer")  # or another model of ours
STEM = "diffusion_pytorch_model"  # of files of weights
FILES = ("config.json", f"{STEM}.safetensors", f"{STEM}-*.safetensors", f"{STEM}.safetensors.index.json")


@dataclass(frozen=True)
class Component:
    """A model that lies in a folder.

    Attributes:
        folder: with its config.json.
        class_name: of the library.
        settings: what the class is made from.
    """

    folder: Path
    class_name: str
    settings: dict[str, Any]


def fetch(path: str | Path) -> Path:
    """A folder on disk: the one given, or for ``hf://ORG/REPO`` and ``hf://ORG/REPO/FOLDER`` what is needed of it.

    Raises:
        UserError: it cannot be downloaded.
    """
    if not is_remote(path):
        return Path(path)
    places = ("", *(f"{part}/" for part in PARTS))
    folder = download_folder(path, ["scheduler/scheduler_config.json", *(p + file for p in places for file in FILES)])
    held = [place for place in places if (folder / place / "config.json").is_file()]
    if pickled := [f"{place}{STEM}.bin" for place in held if not [*(folder / place).glob("*.safetensors")]]:
        folder = download_folder(path, pickled)
    return folder


def components(path: str | Path) -> list[Component]:
    """The models in a folder: the parts of a pipeline, or the one that it is of.

    Raises:
        UserError: there are none, or a config.json is damaged.
    """
    folders = [folder for part in PARTS if ((folder := Path(path) / part) / "config.json").is_file()] or [Path(path)]
    if not (folders[0] / "config.json").is_file():
        raise UserError(f"{path} has no config.json; give the folder of a diffusers model, or of its pipeline")
    found = []
    for folder in folders:
        settings = read_json(folder / "config.json")
        own = {key: value for key, value in settings.items() if not key.startswith("_")}
        name = str(settings.get("_class_name"))
        if name == "Transformer2DModel" and settings.get("norm_type") == "ada_norm_zero":
            name = "DiTTransformer2DModel"  # which had no class of its own when its weights were released
        found.append(Component(folder, name, own))
    return found


def component(path: str | Path, class_name: str) -> Component:
    """The one of this class.

    Raises:
        UserError: the folder has none.
    """
    found = components(path)
    for each in found:
        if each.class_name == class_name:
            return each
    held = " and ".join(each.class_name for each in found)
    raise UserError(f"{path} holds {held}, expected {class_name}; give its folder")


def latent_side(path: str | Path) -> int | None:
    """Height and width of the latents that the transformer of a pipeline models; None where there is none."""
    sides = [each.settings.get("sample_size") for each in components(path) if each.folder == Path(path) / "transformer"]
    return sides[0] if sides and isinstance(sides[0], int) else None


def read_json(file: Path) -> dict[str, Any]:
    """What a JSON file says.

    Raises:
        UserError: it is missing, or no JSON object.
    """
    try:
        content = json.loads(file.read_text())
    except OSError:
        raise UserError(f"{file} is missing; copy the whole folder") from None
    except ValueError as error:
        raise UserError(f"{file} is no JSON ({one_line(error, 200)}); copy it again") from None
    if not isinstance(content, dict):
        raise UserError(f"{file} holds no JSON object; copy it again")
    return content


def build_network(class_name: str, settings: Mapping[str, Any]) -> nn.Module:
    """A model of the library with random weights.

    Raises:
        UserError: diffusers is not installed, or does not take the settings.
    """
    try:
        import diffusers
    except ImportError:
        raise UserError(f"{class_name} needs diffusers; pip install 'robustok[diffusers]'") from None
    try:
        with _quietly():
            return getattr(diffusers, class_name).from_config(dict(settings))
    except Exception as error:  # diffusers validates with errors of many types
        raise UserError(
            f"diffusers makes no {class_name} of these settings ({one_line(error, 200)}); correct them"
        ) from None


def load_network(network: nn.Module, found: Component) -> None:
    """Fill a model with the weights of its folder, all of them and none besides.

    Raises:
        UserError: weights are missing, cannot be read, or do not fit.
    """
    folder = found.folder
    with _safetensors(found) as safe:
        try:
            with _quietly():  # what it would warn of is an error here
                loaded, report = type(network).from_pretrained(
                    safe, local_files_only=True, use_safetensors=True, low_cpu_mem_usage=False, output_loading_info=True
                )
        except Exception as error:  # of many types, all of which the user can act on
            reason = f"cannot be loaded as {found.class_name} ({one_line(error, 200)})"
            raise UserError(f"{folder} {reason}; copy it again") from None
    problems = [f"{kind.removesuffix('_keys')} {name}" for kind, names in report.items() for name in names]
    if problems:
        raise UserError(f"{folder}: the weights do not fit its config.json: {'; '.join(problems[:3])}; copy it again")
    weights = loaded.state_dict()
    if broken := [name for name, tensor in weights.items() if not torch.isfinite(tensor).all()]:
        raise UserError(f"{folder}: {broken[0]} holds infinite values or no numbers; copy it again")
    network.load_state_dict(weights)


@contextmanager
def _safetensors(found: Component) -> Iterator[Path]:
    """A folder with the same model as safetensors: its own, or a temporary one if it holds a pickle."""
    folder, pickled = found.folder, found.folder / f"{STEM}.bin"
    if [*folder.glob("*.safetensors")]:
        yield folder
        return
    if not pickled.is_file():
        raise UserError(
            f"{folder} has no weights; it needs {STEM}.safetensors or .bin, as {found.class_name}.save_pretrained of "
            "diffusers writes them"
        )
    with tempfile.TemporaryDirectory() as temporary:
        write_checkpoint(Path(temporary) / f"{STEM}.safetensors", read_checkpoint(pickled).weights)
        shutil.copy(folder / "config.json", temporary)
        yield Path(temporary)


def write_network(network: nn.Module, path: Path) -> Path:
    """Write a folder that ``from_pretrained`` of the model's class loads.

    Raises:
        UserError: it exists, or cannot be written.
    """
    if path.exists():
        raise UserError(f"{path} exists; choose another folder or remove it first")
    with atomic_folder(path) as folder:
        network.save_pretrained(folder)
    return path


@contextmanager
def _quietly() -> Iterator[None]:
    from diffusers.utils import logging

    before = logging.get_verbosity()
    logging.set_verbosity(logging.CRITICAL)
    try:
        yield
    finally:
        logging.set_verbosity(before)
