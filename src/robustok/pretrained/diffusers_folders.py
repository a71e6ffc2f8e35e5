"""Models in the folders of the diffusers library: a ``config.json`` beside weights, alone or as part of a pipeline.

    DiT-XL-2-256/  model_index.json  vae/  transformer/  scheduler/

The library's own classes load and save the models. Weights in pickles are read by robustok, so that nothing in them is
executed.
"""

import re
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from torch import Tensor, nn

from robustok.backbones import silent_diffusers
from robustok.checkpoints import read_checkpoint, write_checkpoint
from robustok.errors import UserError
from robustok.files import one_line, read_json
from robustok.hub import download_folder, is_remote
from robustok.snapshots import check_finite_weights, outline_for, read_weights

Model = TypeVar("Model", bound=nn.Module)

AUTOENCODERS = ("vae", "vqvae", "movq")  # parts of a pipeline that may be a tokenizer
PARTS = (*AUTOENCODERS, "transformer")  # or a generator
STEM = "diffusion_pytorch_model"  # of the names of weight files
NAMES = re.compile(  # such as STEM.bin, STEM.fp16.safetensors, STEM-00001-of-00002.fp16.bin, STEM.bin.index.fp16.json
    rf"{STEM}(\.(?P<before>\w+))?(-\d+-of-(?P<of>\d+))?(\.(?P<after>\w+))?\.(?P<suffix>safetensors|bin)"
    r"(?P<index>\.index(\.(?P<last>\w+))?\.json)?"
)
MOST_PARTS = 1000  # files of weights
DOWNLOADS = (  # patterns of names, tried one after the other
    ("config.json", f"{STEM}.safetensors", f"{STEM}-*.safetensors", f"{STEM}.safetensors.index.json"),
    (f"{STEM}.bin", f"{STEM}-*.bin", f"{STEM}.bin.index.json"),
    (f"{STEM}*",),
)


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
    lacking = ["", *(f"{part}/" for part in PARTS)]
    wanted = ["scheduler/scheduler_config.json", "unet/config.json"]
    for patterns in DOWNLOADS:
        folder = download_folder(path, [*wanted, *(part + pattern for part in lacking for pattern in patterns)])
        held = [part for part in lacking if (folder / part / "config.json").is_file()]
        lacking, wanted = [part for part in held if not _weight_sets(folder / part)], []
        if not lacking:
            break
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
    """Height and width of the latents that a pipeline's denoiser models; None where it says none."""
    files = [file for part in ("transformer", "unet") if (file := Path(path) / part / "config.json").is_file()]
    sides = [read_json(file).get("sample_size") for file in files]
    return sides[0] if sides and isinstance(sides[0], int) else None


def load_model(make: Callable[[], Model], network: str, found: Component) -> Model:
    """Make a model of ours and fill its network with the weights of a folder, all of them and none besides.

    Args:
        make: makes the model from the folder's settings. It is first made without memory, for a comparison with the
            size of the weights: a configuration that asks for a giant is refused before anything is allocated.
        network: the model's attribute with the network of the library.
        found: the folder.

    Raises:
        UserError: weights are missing, cannot be read, are not finite, or do not fit; no model can be made.
    """
    folder = found.folder
    with _safetensors(found) as safe:
        weights = read_weights(safe / f"{STEM}.safetensors")
        check_finite_weights(weights, folder)
        outline_for(make, weights, f"{folder}/config.json asks for")
        model = make()
        try:
            with silent_diffusers():  # its warnings are errors here
                loaded, report = type(getattr(model, network)).from_pretrained(
                    safe, local_files_only=True, use_safetensors=True, low_cpu_mem_usage=False, output_loading_info=True
                )
        except Exception as error:  # of many types, all of which the user can act on
            reason = f"cannot be loaded as {found.class_name} ({one_line(error, 200)})"
            raise UserError(f"{folder} {reason}; copy it again") from None
    problems = [f"{kind.removesuffix('_keys')} {name}" for kind, names in report.items() for name in names]
    if problems:
        raise UserError(f"{folder}: the weights do not fit its config.json: {'; '.join(problems[:3])}; copy it again")
    getattr(model, network).load_state_dict(loaded.state_dict())
    return model.eval().requires_grad_(False)


@contextmanager
def _safetensors(found: Component) -> Iterator[Path]:
    """A folder with the model in one safetensors file: its own, or a temporary one that holds the same."""
    files = weight_files(found)
    if files == [found.folder / f"{STEM}.safetensors"]:
        yield found.folder
        return
    weights: dict[str, Tensor] = {}
    for file in files:
        weights |= read_checkpoint(file).weights
    with tempfile.TemporaryDirectory() as temporary:
        write_checkpoint(Path(temporary) / f"{STEM}.safetensors", weights)
        shutil.copy(found.folder / "config.json", temporary)
        yield Path(temporary)


def weight_files(found: Component) -> list[Path]:
    """The files that together hold the weights.

    Full precision is preferred to a variant such as ``fp16``, which is taken if it is the only one; and safetensors to
    pickles.

    Raises:
        UserError: there are none, only several variants, or not all files that belong together.
    """
    folder, sets = found.folder, _weight_sets(found.folder)
    best = min(((variant != "", suffix != "safetensors") for variant, suffix in sets), default=None)
    chosen = [key for key in sets if (key[0] != "", key[1] != "safetensors") == best]
    if not chosen:
        raise UserError(
            f"{folder} has no weights; it needs {STEM}.safetensors or .bin, as {found.class_name}.save_pretrained of "
            "diffusers writes them"
        )
    if len(chosen) > 1:
        variants = " and ".join(sorted(variant for variant, _ in chosen))
        raise UserError(f"{folder} has weights of the variants {variants}; keep one of them in a copy of the folder")
    names = sets[chosen[0]]
    if missing := [name for name in names if not (folder / name).exists()]:
        raise UserError(f"{folder} lacks {missing[0]}, one of its {len(names)} files of weights; copy it, too")
    return [folder / name for name in names]


def _weight_sets(folder: Path) -> dict[tuple[str, str], list[str]]:
    """Variant, or "", and suffix to the names of the files that belong together, whether they exist or not."""
    sets: dict[tuple[str, str], dict[str, list[str]]] = {}
    for path in sorted(folder.glob(f"{STEM}*")):
        if named := NAMES.fullmatch(path.name):
            variant = named["before"] or named["after"] or named["last"] or ""
            forms = sets.setdefault((variant, named["suffix"]), {})
            if named["index"]:
                forms["index"] = _indexed(path)
            elif named["of"]:
                parts = re.sub(r"\d+(-of-\d+)", r"{:05}\1", path.name)
                forms["parts"] = [parts.format(k + 1) for k in range(min(int(named["of"]), MOST_PARTS))]
            else:
                forms["whole"] = [path.name]
    return {key: next(forms[k] for k in ("index", "whole", "parts") if k in forms) for key, forms in sets.items()}


def _indexed(file: Path) -> list[str]:
    """The names of files that an index lists."""
    names = read_json(file).get("weight_map")
    names = sorted(set(map(str, names.values()))) if isinstance(names, dict) else []
    if not names or any(Path(name).name != name for name in names):
        raise UserError(f"{file} lists no files beside it under weight_map; copy it again")
    return names
