"""Write models of ours in the layouts of their authors."""

from pathlib import Path

from torch import Tensor, nn

from robustok.errors import UserError
from robustok.files import atomic_folder
from robustok.pretrained.families import FAMILIES, FOLDERS


def export_weights(model: nn.Module) -> dict[str, Tensor]:
    """The model's weights under the authors' names and in their shapes, bit for bit, on the CPU.

    They share memory with the model. Statistics of codes in use are zeros, and a frozen teacher is left out: the
    command takes both from the ``original`` file.

    Raises:
        UserError: a model, or a variant of it, that no layout has.
    """
    family = next((family for family in FAMILIES.values() if type(model) is family.model), None)
    if any(type(model) is folder.model for folder in FOLDERS.values()):
        raise UserError(f"a {type(model).__name__} is a model of the diffusers library; write it with export_folder")
    if family is None:
        raise UserError(
            f"a {type(model).__name__} has no layout to export to; "
            f"models that have: {', '.join(sorted({family.model.__name__ for family in FAMILIES.values()}))}"
        )
    quantizer = getattr(getattr(model.config, "quantizer", None), "name", "vq")
    if quantizer != "vq":
        raise UserError(f"the layouts of the authors have a learned codebook, this tokenizer has {quantizer}; use ours")
    weights = {family.export_name(name): tensor.detach().cpu() for name, tensor in model.state_dict().items()}
    return family.complete(model, weights)


def export_folder(model: nn.Module, path: str | Path) -> Path:
    """Write a folder that ``from_pretrained`` of the diffusers library loads.

    Raises:
        UserError: no model of that library; the folder holds something else, or cannot be written.
    """
    family = next((family for family in FOLDERS.values() if type(model) is family.model), None)
    if family is None:
        raise UserError(f"a {type(model).__name__} is no model of the diffusers library; export it to a file")
    with atomic_folder(path, once=True) as folder:
        family.network(model).save_pretrained(folder)
    return Path(path)
