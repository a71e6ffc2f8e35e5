"""A state of a training on disk: a folder with the tensors, and with all the rest as JSON; no pickle."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, NonNegativeInt
from safetensors.torch import save_file
from torch import Tensor

from robustok.errors import UserError
from robustok.files import bytes_digest, regular_file, tensor_digest
from robustok.snapshots import read_weights


def pack(tree: Any, name: str, tensors: dict[str, Tensor]) -> Any:
    """Move the tensors of a tree of dicts, lists and scalars into ``tensors``; return the rest, ready for JSON."""
    if isinstance(tree, Tensor):
        # a clone: safetensors refuses tensors that share memory, as tied or sliced weights do
        tensors[name] = tree.detach().cpu().contiguous().clone()
        return {"__tensor__": name}
    if isinstance(tree, Mapping):
        return {"__dict__": [[key, pack(value, f"{name}/{key}", tensors)] for key, value in tree.items()]}
    if isinstance(tree, list | tuple):
        return [pack(value, f"{name}/{i}", tensors) for i, value in enumerate(tree)]
    return tree


def unpack(tree: Any, tensors: Mapping[str, Tensor]) -> Any:
    """Undo :func:`pack`."""
    if isinstance(tree, list):
        return [unpack(value, tensors) for value in tree]
    if isinstance(tree, dict) and "__tensor__" in tree:
        return tensors[tree["__tensor__"]]
    if isinstance(tree, dict) and "__dict__" in tree:
        return {key: unpack(value, tensors) for key, value in tree["__dict__"]}
    return tree


class StateFile(BaseModel):
    """Content of state.json.

    Attributes:
        step: how many steps the run has done.
        state: what :func:`pack` returned.
        inputs: digests of what the run reads; None in states of earlier versions.
        digest: of all the rest and the tensors; None in states of earlier versions.
    """

    model_config = ConfigDict(strict=True)

    step: NonNegativeInt
    state: Any
    inputs: dict[str, str] | None = None
    digest: str | None = None

    def digest_with(self, tensors: Mapping[str, Tensor]) -> str:
        """The digest that the file must have."""
        content = json.dumps([self.step, self.state, self.inputs, tensor_digest(tensors)])
        return bytes_digest(content.encode(), 16)


def write_state(folder: Path, step: int, state: Mapping[str, Any], inputs: dict[str, str]) -> None:
    """Write a state into a folder.

    Args:
        folder: exists and is empty.
        step: how many steps the run has done.
        state: dicts, lists, tensors and scalars.
        inputs: digests of what the run reads.

    Raises:
        UserError: weights are not finite, with which nothing could be resumed.
    """
    tensors: dict[str, Tensor] = {}
    skeleton = pack(state, "", tensors)
    broken = [name for name, value in tensors.items() if value.is_floating_point() and not value.isfinite().all()]
    if broken:
        raise UserError(
            f"{broken[0].strip('/')} is not finite after step {step}; the state before is kept: "
            "lower learning_rate, set clip_norm, or precision=float32, in a new run folder, from step 0"
        )
    content = StateFile(step=step, state=skeleton, inputs=inputs)
    content.digest = content.digest_with(tensors)
    save_file(tensors, folder / "state.safetensors")
    (folder / "state.json").write_text(json.dumps(content.model_dump()))


def read_state(folder: Path) -> tuple[StateFile, dict[str, Any]]:
    """Read what :func:`write_state` wrote into a folder whose name is the step.

    Raises:
        Exception: of many types, if it is damaged.
    """
    content = StateFile.model_validate(json.loads(regular_file(folder / "state.json").read_text()))
    tensors = read_weights(folder / "state.safetensors")
    if content.digest not in (None, content.digest_with(tensors)):
        raise ValueError("its digest is not the one it was saved with")
    if content.step != int(folder.name):
        raise ValueError(f"it says that it is of step {content.step}")
    return content, unpack(content.state, tensors)
