"""What ``check.py`` is made of: a file of reference outputs, tolerances, and the table of comparisons."""

import json
import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn

from robustok import load_pretrained
from robustok.tokenizers.quantizer import QuantizerConfig, VectorQuantizer


@dataclass(frozen=True)
class Tolerance:
    """How far an entry may lie from its reference; the parts add up.

    Attributes:
        absolute: for every entry, or one for each.
        relative: share of the entry's own reference.
        of_largest: share of the tensor's largest reference.
    """

    absolute: float | Tensor = 0.0
    relative: float = 0.0
    of_largest: float = 0.0

    def allowed(self, expected: Tensor) -> Tensor:
        """The tolerance of each entry, in the shape of ``expected``."""
        sizes = expected.abs()
        largest = sizes.max() if sizes.numel() else 0.0
        return self.absolute + self.relative * sizes + self.of_largest * largest

    def __str__(self) -> str:
        if isinstance(self.absolute, Tensor):
            return "5 s.e."
        parts = [
            f"{self.absolute:.0e}" if self.absolute else "",
            f"{self.relative:.0e} rel" if self.relative else "",
            f"{self.of_largest:.0e} max" if self.of_largest else "",
        ]
        return " + ".join(part for part in parts if part) or "exact"


EXACT = Tolerance()
LOSS = Tolerance(relative=1e-5)
USAGE = "the release reports usage from a moving average of hits; ours counts the codes that occur"
QUANTITY = 58  # width of the names of outputs in the table


@dataclass(frozen=True)
class Row:
    """One output.

    Attributes:
        file: stem of the file.
        quantity: name of the output.
        status: "OK", "FAIL" or "not ours".
        difference: largest absolute one; for exact comparisons, how many entries differ.
        tolerance: in words.
        share: of the tolerance, at the entry where it is largest.
        reason: why it failed without a comparison, or is not ours.
    """

    file: str
    quantity: str
    status: str
    difference: float = math.nan
    tolerance: str = ""
    share: float = math.nan
    reason: str = ""

    def __str__(self) -> str:
        numbers = "" if self.reason else f"{self.difference:10.2e}  {self.tolerance:<17} {self.share:8.4f}"
        return f"{self.file:<24}  {self.quantity:<{QUANTITY}}  {numbers:<38}  {self.status}  {self.reason}".rstrip()


@dataclass
class Golden:
    """A file of reference outputs, its notes, and the rows of its comparisons so far.

    Attributes:
        path: of the .safetensors file.
        tensors: all of it, weights too.
        weights: names of those that are the model's.
        notes: the JSON file beside it, or the metadata, decoded.
        rows: comparisons.
        read: names of the tensors that a check asked for.
    """

    path: Path
    tensors: dict[str, Tensor]
    weights: set[str]
    notes: dict[str, Any]
    rows: list[Row] = field(default_factory=list)
    read: set[str] = field(default_factory=set)

    @classmethod
    def open(cls, path: Path) -> "Golden":
        """Read a file with what is said of it in its metadata or beside it."""
        with safe_open(path, "pt") as file:
            notes = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (no mapping)
        coded = ("state_keys", "input_keys", "output_keys", "config", "sampling", "noise_floor")
        notes = {key: json.loads(value) if key in coded else value for key, value in notes.items()}
        beside = path.with_suffix(".json")
        notes |= json.loads(beside.read_text()) if beside.is_file() else {}
        weights = {*notes.get("state_keys", ()), *notes.get("state_dict_keys", ())}
        prefixes = tuple(notes.get("weight_prefixes", ()))
        weights |= {name for name in tensors if prefixes and name.startswith(prefixes)}
        return cls(path, tensors, weights, notes)

    def __getitem__(self, name: str) -> Tensor:
        self.read.add(name)
        return self.tensors[name]

    def under(self, prefix: str) -> dict[str, Tensor]:
        """The tensors whose names start so, by the rest of their names."""
        return {name.removeprefix(prefix): self[name] for name in sorted(self.tensors) if name.startswith(prefix)}

    def unread(self) -> list[str]:
        """Tensors that are neither weights nor inputs and that no check asked for."""
        rest = self.tensors.keys() - self.weights - self.read
        return sorted(name for name in rest if not name.startswith("input."))

    def companion(self, note: str) -> "Golden":
        """The file whose name is the first word of a note."""
        return Golden.open(self.path.with_name(self.notes[note].split()[0]))

    def row(self, quantity: str, found: Tensor, expected: Tensor, tolerance: Tolerance) -> None:
        """Compare; integers and ``EXACT`` count the entries that differ."""
        found, expected = found.detach(), expected.detach()
        if found.shape != expected.shape:
            reason = f"shape {tuple(found.shape)}, expected {tuple(expected.shape)}"
            self.rows.append(Row(self.path.stem, quantity, "FAIL", reason=reason))
            return
        if not expected.is_floating_point():
            tolerance = EXACT
        differences = (found.double() - expected.double()).abs()
        allowed = tolerance.allowed(expected.double())
        # Where nothing differs nothing is used, even of a tolerance of zero; NaN stays NaN and fails.
        shares = torch.where(differences == 0, 0.0, differences / allowed)
        share = shares.max().item() if shares.numel() else 0.0
        if str(tolerance) == "exact":
            difference = float((differences != 0).sum())
        else:
            difference = differences.max().item() if differences.numel() else 0.0
        status = "OK" if share <= 1 else "FAIL"
        self.rows.append(Row(self.path.stem, quantity, status, difference, str(tolerance), share))

    def not_ours(self, quantity: str, reason: str) -> None:
        """Note an output that our library gives differently, or not at all, on purpose."""
        self.read |= {quantity, f"output.{quantity}"}
        self.rows.append(Row(self.path.stem, quantity, "not ours", reason=reason))

    def fail(self, quantity: str, reason: str) -> None:
        """Note what could not be compared."""
        self.rows.append(Row(self.path.stem, quantity, "FAIL", reason=reason))

    def precisions(self, family: str, single: float, double: float) -> Iterator["Run"]:
        """The model of this file in float32 and, where there are such outputs, in float64."""
        yield Run(self, load_pretrained(family, self.path), torch.float32, "output.", single)
        if any(name.startswith("output.fp64.") for name in self.tensors):
            yield Run(self, load_pretrained(family, self.path).double(), torch.float64, "output.fp64.", double)


@dataclass(frozen=True)
class Run:
    """A model in one precision.

    Attributes:
        golden: the file.
        model: loaded from it.
        dtype: of its weights.
        prefix: of the outputs in this precision.
        tolerance: of most outputs, absolute.
    """

    golden: Golden
    model: nn.Module
    dtype: torch.dtype
    prefix: str
    tolerance: float

    def input(self, name: str) -> Tensor:
        """An input; floats in the model's precision."""
        tensor = self.golden[f"input.{name}"]
        return tensor.to(self.dtype) if tensor.is_floating_point() else tensor

    def row(self, name: str, found: Tensor, single: float | None = None, double: float | None = None) -> None:
        """Compare with the output of this name, if the file has it in this precision.

        Args:
            name: without prefix.
            found: ours.
            single: tolerance in float32 where it is another than that of most outputs.
            double: likewise in float64.
        """
        key = self.prefix + name
        if key in self.golden.tensors:
            own = single if self.dtype == torch.float32 else double
            tolerance = Tolerance(self.tolerance if own is None else own)
            self.golden.row(key.removeprefix("output."), found, self.golden[key], tolerance)


def strided(found: Tensor, expected: Tensor) -> Tensor:
    """Of images (N, 3, H, W) the evenly spaced rows and columns that were stored, the first ones among them."""
    step = -(-found.shape[-1] // expected.shape[-1])
    return found[:, :, ::step, ::step]


def codebook_of(weight: Tensor, geometry: str, commitment: float = 0.25) -> VectorQuantizer:
    """A quantiser with these codes."""
    size, dim = weight.shape
    normalize = geometry == "normalized"
    quantizer = VectorQuantizer(QuantizerConfig(size=size, dim=dim, normalize=normalize, commitment_weight=commitment))
    quantizer.embedding.weight.data.copy_(weight)
    return quantizer
