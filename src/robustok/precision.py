"""The precision of computations: one setting, for training, encoding, sampling, decoding and evaluation."""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, Literal, TypeVar

import torch
from torch import nn

from robustok.console import note

Precision = Literal["float32", "tf32", "bf16"]
"""Of products and convolutions; all else is float32.

float32: exact, on a GPU too: its TF32 is off in products and in convolutions.
tf32: inputs are rounded to 10 bits of mantissa on a GPU that can; elsewhere as float32.
bf16: inputs and results are rounded to 7 bits of mantissa, by autocast; products that stay float32 are exact.

Nearest codes, statistics and the features of metrics are exact whatever the setting.
"""
DESCRIPTION = "float32 (exact, without TF32 in products and convolutions), tf32, or bf16 (autocast)"

Model = TypeVar("Model", bound=nn.Module)
# What multiplies in float32, each with its own switch. PyTorch starts with TF32 in convolutions and not in products.
_SWITCHES = (
    torch.backends.cuda.matmul,
    torch.backends.cudnn.conv,
    torch.backends.cudnn.rnn,
    torch.backends.mkldnn.matmul,
    torch.backends.mkldnn.conv,
    torch.backends.mkldnn.rnn,
)


def use_precision(precision: Precision) -> None:
    """Set what float32 is in this process from now on: TF32 for ``tf32``, exact for the others."""
    tf32 = precision == "tf32"
    # The older switches too: PyTorch refuses to read them where they contradict the newer ones.
    torch.set_float32_matmul_precision("high" if tf32 else "highest")
    torch.backends.cudnn.allow_tf32 = tf32
    for switch in _SWITCHES:
        switch.fp32_precision = "tf32" if tf32 else "ieee"


@contextmanager
def at_precision(device: torch.device | str, precision: Precision) -> Iterator[None]:
    """Context: computations without gradients in this precision, whatever is set outside.

    Afterwards all switches are as before, whichever of PyTorch's ways had set them.
    """
    older = _read(torch.get_float32_matmul_precision), _read(lambda: torch.backends.cudnn.allow_tf32)
    before = [switch.fp32_precision for switch in _SWITCHES]
    use_precision(precision)
    kind = torch.device(device).type
    cast = torch.amp.is_autocast_available(kind)  # the meta device, of dry runs, has none
    try:
        with torch.autocast(kind, torch.bfloat16, enabled=precision == "bf16") if cast else nullcontext():
            yield
    finally:
        if older[0] is not None:
            torch.set_float32_matmul_precision(older[0])
        if older[1] is not None:
            torch.backends.cudnn.allow_tf32 = older[1]
        for switch, value in zip(_SWITCHES, before, strict=True):
            switch.fp32_precision = value


def exact_float32(device: torch.device | str) -> AbstractContextManager[None]:
    """Context: neither autocast nor TF32, which would change features by more than a good tokenizer does."""
    return at_precision(device, "float32")


def _read(getter: Callable[[], Any]) -> Any:
    """An older switch; None where a newer one contradicts it."""
    try:
        return getter()
    except RuntimeError:
        return None


def autocast(device: torch.device, precision: Precision) -> AbstractContextManager[Any]:
    """Context: autocast to bf16 for ``bf16``, else nothing; for a process that has :func:`use_precision`."""
    return torch.autocast(device.type, torch.bfloat16) if precision == "bf16" else nullcontext()


def cast_weights(model: Model, precision: Precision) -> Model:
    """For ``bf16``, round the weights of products and convolutions once, in place, to what autocast rounds them to.

    Autocast would round frozen weights at every call. Under autocast results are the same bit for bit. Codes and other
    embeddings, positions and norms stay float32. Digests of the weights change.
    """
    if precision != "bf16":
        return model
    layers = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose2d)
    for module in model.modules():
        names = ("weight", "bias") if isinstance(module, layers) else ()
        names = ("in_proj_weight", "in_proj_bias") if isinstance(module, nn.MultiheadAttention) else names
        for name in names:
            if (parameter := getattr(module, name)) is not None:
                parameter.data = parameter.data.bfloat16()
    return model


def note_slow(device: torch.device, precision: Precision) -> None:
    """Say if bf16 is slower than float32 on this hardware."""
    if precision == "bf16" and not has_fast_bf16(device):
        note("this hardware does not multiply bf16; precision=float32 is faster here", "yellow")


def has_fast_bf16(device: torch.device) -> bool:
    """Whether the hardware multiplies bf16: recent GPUs, and CPUs with AMX or AVX512-BF16."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    if device.type == "cpu":
        return torch.cpu._is_amx_tile_supported() or torch.cpu._is_avx512_bf16_supported()
    return False
