"""Write models of ours under the names that their authors use."""

from torch import Tensor, nn

from robustok.errors import UserError
from robustok.pretrained.families import FAMILIES


def export_weights(model: nn.Module) -> dict[str, Tensor]:
    """The model's weights under the official names and in the official shapes, bit for bit, on the CPU.

    They share memory with the model. What nothing reads but official loaders ask for is only made up here: statistics
    of codes in use are zeros, and a frozen teacher is no part of it. The verb takes both from the ``original`` file.

    Raises:
        UserError: a model that the release has no place for.
    """
    room = next((family for family in FAMILIES.values() if type(model) is family.model), None)
    if room is None:
        raise UserError(
            f"a {type(model).__name__} has no released layout; "
            f"convertible are {', '.join(sorted({family.model.__name__ for family in FAMILIES.values()}))}"
        )
    weights = {room.export_name(name): tensor.detach().cpu() for name, tensor in model.state_dict().items()}
    return room.complete(model, weights)
