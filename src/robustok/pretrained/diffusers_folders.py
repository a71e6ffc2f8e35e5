"""Models in the folders of the diffusers library: a ``config.json`` beside weights, alone or as part of a pipeline.

    DiT-XL-2-256/  model_index.json  vae/  transformer/  scheduler/

The library's own classes load and save the models. Weights in pickles are read by robustok, so that nothing in them is
executed.
"""

import json
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from robustok.backbones import silent_diffusers
from robustok.checkpoints import read_checkpoint, write_checkpoint
from robustok.errors import UserError
from robustok.files import atomic_folder, one_line
from robustok.hub import download_folder, is_remote

AUTOENCODERS = ("vae", "vqvae", "movq")  # parts of a pipeline that may be a tokenizer
PARTS = (*AUTOENCODERS, "transformer")  # or a generator
STEM = "diffusion_pytorch_model"  # of the names of weight files
FILES = ("config.json", f"{STEM}.safetensors", f"{STEM}-*.safetensors", f"{STEM}.safetensors.index.json")


@dataclass(frozen=True)
class Component:
    """A model in a folder.

    Attributes:
        folder: with its config.json.
        class_name: of the library.
        settings: content of its config.json without private keys.
    """

    folder: Path
    class_name: str
    settings: dict[str, Any]


def fetch(path: str | Path) -> Path:
    """A folder on disk: the given one, or what was downloaded of ``hf://ORG/REPO`` or ``hf://ORG/REPO/FOLDER``.

    Raises:
        UserError: it cannot be downloaded.
    """
    if not is_remote(path):
        return Path(path)
    subfolders = ("", *(f"{part}/" for part in PARTS))
    folder = download_folder(
        path, ["scheduler/scheduler_config.json", *(p + file for p in subfolders for file in FILES)]
    )
    held = [part for part in subfolders if (folder / part / "config.json").is_file()]
    if pickled := [f"{part}{STEM}.bin" for part in held if not [*(folder / part).glob("*.safetensors")]]:
        folder = download_folder(path, pickled)
    return folder


def components(path: str | Path) -> list[Component]:
    """The models in a folder: the parts of a pipeline, or a single model.

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
            name = "DiTTransformer2DModel"  # which had no class of its own when its weights were published
        found.append(Component(folder, name, own))
    return found


def component(path: str | Path, class_name: str) -> Component:
    """The model of this class in a folder.

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
    """Height and width of the latents that a pipeline's transformer models; None without a transformer."""
    sides = [each.settings.get("sample_size") for each in components(path) if each.folder == Path(path) / "transformer"]
    return sides[0] if sides and isinstance(sides[0], int) else None


def read_json(file: Path) -> dict[str, Any]:
    """The content of a JSON file.

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


def load_network(network: nn.Module, found: Component) -> None:
    """Fill a model with the weights of its folder, all of them and none besides.

    Raises:
        UserError: weights are missing, cannot be read, or do not fit.
    """
    folder = found.folder
    with _safetensors(found) as safe:
        try:
            with silent_diffusers():  # its warnings are errors here
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
    """A folder with the model as safetensors: its own, or a temporary one if it holds a pickle."""
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
