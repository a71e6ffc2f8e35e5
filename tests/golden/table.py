"""A file of reference outputs, tolerances, and the table of comparisons; see ``check.py``."""

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
    """Largest allowed difference between an entry and its reference: the sum of three parts.

    Attributes:
        absolute: one number, or a tensor with one for each entry.
        relative: factor of the reference of the entry.
        of_largest: factor of the largest reference of the tensor.
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
USAGE = "the authors' code reports usage from a moving average of hits; ours counts the codes that occur"
QUANTITY = 58  # width of the column of names in the table


@dataclass(frozen=True)
class Row:
    """One output.

    Attributes:
        file: stem of the file.
        quantity: name of the output.
        status: "OK", "FAIL" or "not ours".
        difference: largest absolute difference; for exact comparisons, the number of entries that differ.
        tolerance: as text.
        share: largest difference / tolerance of all entries.
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
    """A file of reference outputs, its metadata, and the rows of its comparisons so far.

    Attributes:
        path: the .safetensors file.
        tensors: all tensors in it, including weights.
        weights: names of the tensors that are weights of the model.
        notes: metadata of the file, and the content of the JSON file of the same name.
        rows: comparisons.
        read: names of the tensors that a check has read.
    """

    path: Path
    tensors: dict[str, Tensor]
    weights: set[str]
    notes: dict[str, Any]
    rows: list[Row] = field(default_factory=list)
    read: set[str] = field(default_factory=set)

    @classmethod
    def open(cls, path: Path) -> "Golden":
        """Read a file, its metadata, and the JSON file of the same name."""
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
        """The tensors whose names start with the prefix, by the rest of their names."""
        return {name.removeprefix(prefix): self[name] for name in sorted(self.tensors) if name.startswith(prefix)}

    def unread(self) -> list[str]:
        """Names of the outputs that no check has read."""
        rest = self.tensors.keys() - self.weights - self.read
        return sorted(name for name in rest if not name.startswith("input."))

    def companion(self, note: str) -> "Golden":
        """The file whose name is the first word of an entry of the metadata."""
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
        # Equal entries have a share of 0, also where the tolerance is 0; NaN stays NaN and fails.
        shares = torch.where(differences == 0, 0.0, differences / allowed)
        share = shares.max().item() if shares.numel() else 0.0
        if str(tolerance) == "exact":
            difference = float((differences != 0).sum())
        else:
            difference = differences.max().item() if differences.numel() else 0.0
        status = "OK" if share <= 1 else "FAIL"
        self.rows.append(Row(self.path.stem, quantity, status, difference, str(tolerance), share))

    def not_ours(self, quantity: str, reason: str) -> None:
        """Record an output that the library computes differently on purpose, or not at all."""
        self.read |= {quantity, f"output.{quantity}"}
        self.rows.append(Row(self.path.stem, quantity, "not ours", reason=reason))

    def fail(self, quantity: str, reason: str) -> None:
        """Record an output that could not be compared."""
        self.rows.append(Row(self.path.stem, quantity, "FAIL", reason=reason))

    def precisions(self, family: str, single: float, double: float) -> Iterator["Run"]:
        """The model of this file in float32 and, if the file has outputs in float64, in float64."""
        yield Run(self, load_pretrained(family, self.path), torch.float32, "output.", single)
        if any(name.startswith("output.fp64.") for name in self.tensors):
            yield Run(self, load_pretrained(family, self.path).double(), torch.float64, "output.fp64.", double)


@dataclass(frozen=True)
class Run:
    """A model in one precision.

    Attributes:
        golden: the file.
        model: loaded from the file.
        dtype: dtype of the weights.
        prefix: start of the names of the outputs in this precision.
        tolerance: absolute tolerance of most outputs.
    """

    golden: Golden
    model: nn.Module
    dtype: torch.dtype
    prefix: str
    tolerance: float

    def input(self, name: str) -> Tensor:
        """An input tensor; floats are cast to the dtype of the model."""
        tensor = self.golden[f"input.{name}"]
        return tensor.to(self.dtype) if tensor.is_floating_point() else tensor

    def row(self, name: str, found: Tensor, single: float | None = None, double: float | None = None) -> None:
        """Compare with the output of this name, if the file has it in this precision.

        Args:
            name: without prefix.
            found: the library's output.
            single: tolerance in float32; None takes that of most outputs.
            double: tolerance in float64; None takes that of most outputs.
        """
        key = self.prefix + name
        if key in self.golden.tensors:
            own = single if self.dtype == torch.float32 else double
            tolerance = Tolerance(self.tolerance if own is None else own)
            self.golden.row(key.removeprefix("output."), found, self.golden[key], tolerance)


def strided(found: Tensor, expected: Tensor) -> Tensor:
    """The rows and columns of images (N, 3, H, W) that the reference stored: evenly spaced, from the first on."""
    step = -(-found.shape[-1] // expected.shape[-1])
    return found[:, :, ::step, ::step]


def codebook_of(weight: Tensor, geometry: str, commitment: float = 0.25) -> VectorQuantizer:
    """A quantiser with the codebook ``weight`` (K, D)."""
    size, dim = weight.shape
    normalize = geometry == "normalized"
    quantizer = VectorQuantizer(QuantizerConfig(size=size, dim=dim, normalize=normalize, commitment_weight=commitment))
    quantizer.embedding.weight.data.copy_(weight)
    return quantizer
