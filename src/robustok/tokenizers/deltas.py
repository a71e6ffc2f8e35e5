"""Deltas: a post-trained tokenizer as its difference to the original, whole or as a LoRA, added at any strength.

    weights = original + strength * difference

Strength 0 is the original bit for bit; 1 is the post-trained one, bit for bit where the whole difference was kept in
float32. In between the decoder moves along a straight line (Wortsman et al., "Robust fine-tuning of zero-shot models",
arXiv 2109.01903). LoRA: the difference of a matrix by its best approximation of low rank (Hu et al., arXiv 2106.09685).
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from robustok.errors import UserError
from robustok.files import one_line, tensor_digest

UP, DOWN = ":up", ":down"  # factors of a difference: up (rows, rank) times down (rank, columns)
INDICES, VALUES = ":places", ":values"  # where original + difference rounds to another float, and the right one


@dataclass(frozen=True)
class Delta:
    """The difference of two versions of one tokenizer.

    Attributes:
        base: digest of all weights of the original.
        tensors: by the name of the weight, its difference, or its two factors under ``:up`` and ``:down``. Weights that
            did not change are left out.
        relative_error: norm of the error by rank and rounding over the norm of the difference; 0 is exact.
    """

    base: str
    tensors: dict[str, Tensor]
    relative_error: float


def compute_delta(
    original: nn.Module, post_trained: nn.Module, rank: int | None = None, dtype: torch.dtype = torch.float32
) -> Delta:
    """The difference between a tokenizer and its post-trained version.

    Args:
        original: what post-training started from.
        post_trained: the same tokenizer with other weights.
        rank: of the LoRA; None stores every difference whole. Vectors, and matrices of which two factors would be no
            smaller, are always stored whole. A convolution is a matrix of (output, input * height * width).
        dtype: of the stored tensors. Only float32 without a rank is exact.

    Raises:
        UserError: the two are not versions of one tokenizer.
    """
    before, after = original.state_dict(), post_trained.state_dict()
    wrong = [name for name in sorted(before.keys() | after.keys()) if not _alike(before.get(name), after.get(name))]
    if wrong:
        raise UserError(
            f"the two tokenizers differ in more than numbers, first in {wrong[0]}; give a tokenizer and its "
            "post-trained version"
        )
    tensors: dict[str, Tensor] = {}
    lost, whole = 0.0, 0.0
    for name, old in before.items():
        new = after[name]
        if torch.equal(old, new):
            continue
        difference = new.double() - old.double()
        kept = _kept(name, difference, rank, dtype)
        if rank is None and dtype == torch.float32:
            sum_ = old + kept[name]
            # Few: mostly where a weight changed its sign. The sign of zero is compared, too.
            wrong_bits = ((sum_ != new) | (sum_.signbit() != new.signbit())).flatten().nonzero()[:, 0]
            if len(wrong_bits):
                kept |= {name + INDICES: wrong_bits, name + VALUES: new.flatten()[wrong_bits].clone()}
        else:
            lost += (difference - _difference(name, kept, old.shape).double()).square().sum().item()
        whole += difference.square().sum().item()
        tensors |= kept
    return Delta(tensor_digest(before), tensors, (lost / whole) ** 0.5 if whole else 0.0)


@torch.no_grad()
def apply_delta(tokenizer: nn.Module, delta: Delta, strength: float = 1.0) -> nn.Module:
    """Add ``strength`` times the difference to the original, in place.

    Args:
        tokenizer: the original.
        delta: from :func:`compute_delta`.
        strength: 0 is the original, 1 the post-trained one; values above 1 and below 0 extrapolate.

    Returns:
        The same tokenizer.

    Raises:
        UserError: it is not the original of this delta, or a difference has another shape than its weight.
    """
    weights = tokenizer.state_dict()
    if (found := tensor_digest(weights)) != delta.base:
        raise UserError(
            f"the delta belongs to the tokenizer with the digest {delta.base}, this one has {found}; "
            "give the tokenizer that was post-trained"
        )
    if not strength:
        return tokenizer
    for name in sorted({key.partition(":")[0] for key in delta.tensors}):
        try:
            weight = weights[name]
            weight.add_(_difference(name, delta.tensors, weight.shape).to(weight.device), alpha=strength)
            if strength == 1 and name + INDICES in delta.tensors:
                indices, values = (delta.tensors[name + part].to(weight.device) for part in (INDICES, VALUES))
                weight.view(-1)[indices] = values
        except (KeyError, IndexError, RuntimeError) as error:
            raise UserError(f"the difference of {name} does not fit ({one_line(error, 200)}); make it again") from None
    return tokenizer


def _alike(a: Tensor | None, b: Tensor | None) -> bool:
    """Whether two weights have the same shape and type, and are equal unless they are floats."""
    if a is None or b is None or a.shape != b.shape or a.dtype != b.dtype:
        return False
    return a.is_floating_point() or torch.equal(a, b)


def _kept(name: str, difference: Tensor, rank: int | None, dtype: torch.dtype) -> dict[str, Tensor]:
    """The stored form of a difference: itself, or the two factors of its best approximation of this rank."""
    rows, columns = len(difference) if difference.ndim else 1, difference[0].numel() if difference.ndim else 1
    if rank is None or difference.ndim < 2 or rank * (rows + columns) >= rows * columns:
        return {name: difference.to(dtype)}
    u, s, v = torch.linalg.svd(difference.reshape(rows, columns), full_matrices=False)
    share = s[:rank].sqrt()  # half of each singular value to either factor
    up, down = u[:, :rank] * share, share[:, None] * v[:rank]  # (rows, rank), (rank, columns)
    return {name + UP: up.to(dtype).contiguous(), name + DOWN: down.to(dtype).contiguous()}


def _difference(name: str, tensors: Mapping[str, Tensor], shape: torch.Size) -> Tensor:
    """The difference of a weight, float32, in its shape."""
    if name not in tensors:
        return (tensors[name + UP].float() @ tensors[name + DOWN].float()).reshape(shape)
    return tensors[name].float().view(shape)
