"""How the weights of other people's models are read and written."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from torch import Tensor, nn


@dataclass(frozen=True)
class Family:
    """A layout of checkpoints.

    Attributes:
        kind: "tokenizer" or "generator".
        model: our class.
        build: the tensors and the flat configuration to a model of these sizes, not yet with these weights.
        has: names that a state dict of this family has,
        lacks: and names that it does not have; together they distinguish it from all other families.
        export_name: our name of a weight to the authors' name.
        complete: our model and its renamed weights to the authors' layout.
        dropped: prefixes of tensors that our model does not use.
        read_under: keys of a file under which one or another of the authors' loaders expects the state dict.
        discriminator: tensors and configuration of the discriminator in a training checkpoint to its settings here.
    """

    kind: Literal["tokenizer", "generator"]
    model: type[nn.Module]
    build: Callable[[Mapping[str, Tensor], dict[str, Any]], nn.Module]
    has: tuple[str, ...]
    lacks: tuple[str, ...] = ()
    export_name: Callable[[str], str] = lambda name: name
    complete: Callable[[Any, dict[str, Tensor]], dict[str, Tensor]] = lambda model, weights: weights
    dropped: tuple[str, ...] = ()
    read_under: tuple[str, ...] = ()
    discriminator: Callable[[Mapping[str, Tensor], dict[str, Any]], dict[str, Any]] | None = None


@dataclass(frozen=True)
class FolderFamily:
    """A class of the diffusers library, whose models are folders.

    Attributes:
        kind: "tokenizer" or "generator".
        model: our class.
        class_name: that of the library.
        load: the folder, and settings that it does not contain, to the model.
        network: our model to the library's, which is written to a folder.
        settings: names of the settings that ``load`` takes.
    """

    kind: Literal["tokenizer", "generator"]
    model: type[nn.Module]
    class_name: str
    load: Callable[..., nn.Module]
    network: Callable[[Any], nn.Module]
    settings: tuple[str, ...]


CODEBOOK = "quantize.embedding.weight"
