"""The memory that a training step needs, counted by running it on PyTorch's meta device, where nothing is computed.

Every tensor of the step has its size there, and lives as long as on a GPU: activations, the networks of the losses a
few images at a time, gradients. The largest sum of sizes is what the step needs at once, in float32.
"""

import weakref
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from robustok.losses.adversarial import generator_loss, hinge_loss
from robustok.losses.discriminators import augment
from robustok.losses.perceptual import perceptual_loss
from robustok.losses.reconstruction import pixel_loss
from robustok.training.adversary import last_layer
from robustok.training.common import TrainingConfig
from robustok.training.prepared import Prepared, PreparedInParts, differentiated

META = torch.device("meta")
# Of accelerate's only what `Prepared` needs in one process.
ALONE = SimpleNamespace(
    device=META,
    num_processes=1,
    prepare=lambda model: model,
    no_sync=lambda _: nullcontext(),
    backward=lambda loss: loss.backward(),
)


@dataclass(frozen=True)
class LossNetworks:
    """Networks of the losses between images, on the meta device; each may be missing.

    Attributes:
        shape: height and width of the images.
        vgg: the layers of VGG-16 up to the last that LPIPS compares.
        backbone: frozen part of the discriminator.
        discriminator: what is trained of it.
    """

    shape: tuple[int, int]
    vgg: nn.Sequential | None
    backbone: nn.Module | None
    discriminator: nn.Module | None

    @property
    def modules(self) -> list[nn.Module]:
        """Those that there are."""
        return [x for x in (self.vgg, self.backbone, self.discriminator) if isinstance(x, nn.Module)]

    def maps(self, images: Tensor) -> list[Tensor]:
        """The feature maps that LPIPS compares: the last before each halving of the resolution, and the last one."""
        found = []
        for layer in self.vgg:
            if isinstance(layer, nn.MaxPool2d):
                found.append(images)
            images = layer(images)
        return [*found, images]


class LiveBytes(TorchDispatchMode):
    """Context that counts the bytes of all tensors that are made in it and still live.

    Args:
        before: tensors that are not counted, nor their views.

    Attributes:
        now: the bytes.
        peak: the most so far.
    """

    def __init__(self, before: Iterable[Tensor] = ()) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._known: set[int] = set()  # addresses of storages, which are used again once a storage is freed
        for tensor in before:
            storage = tensor.untyped_storage()
            self._known.add(storage._cdata)
            weakref.finalize(storage, self._known.discard, storage._cdata)

    def __torch_dispatch__(self, function: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        result = function(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor):
                self._count(tensor.untyped_storage())
        return result

    def _count(self, storage: torch.UntypedStorage) -> None:
        address, size = storage._cdata, storage.nbytes()
        if address in self._known:
            return
        self._known.add(address)
        self.now += size
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self._forget, address, size)

    def _forget(self, address: int, size: int) -> None:
        self._known.discard(address)
        self.now -= size


def step_bytes(step: Callable[[], Any], networks: Sequence[nn.Module]) -> int:
    """Bytes that a step needs at once, in float32, beside its weights and their gradients.

    Args:
        step: one step of a training, from :func:`generator_step` or :func:`image_step`.
        networks: all that it uses, on the meta device.
    """
    parameters = [p for network in networks for p in network.parameters()]
    before = [*parameters, *(buffer for network in networks for buffer in network.buffers())]
    with _as_on_a_gpu(), LiveBytes(before) as live:
        step()
    gradients = [p.grad for p in parameters if p.grad is not None]
    for p in parameters:
        p.grad = None
    return live.peak - sum(gradient.nbytes for gradient in gradients)


def generator_step(
    run: TrainingConfig, model: nn.Module, inputs: Sequence[Tensor], loss: Callable[[Any], dict[str, Tensor]]
) -> None:
    """Forward and backward pass of all parts of the batch, whose terms are ``loss(output)``."""
    prepared = Prepared(model, _plain(run), ALONE)
    prepared.train()
    for rows in prepared.parts(len(inputs[0])):
        prepared.backward(sum(loss(prepared(*(x[rows] for x in inputs))).values()))


def image_step(
    run: TrainingConfig,
    model: nn.Module,
    inputs: Sequence[Tensor],
    images: Tensor,
    networks: LossNetworks,
    terms: Callable[[Any], dict[str, Tensor]],
) -> None:
    """A step of a tokenizer or decoder, then one of its discriminator.

    Args:
        run: settings, among them ``reconstruction``.
        model: its forward returns images or something with ``reconstructions``.
        inputs: of its forward.
        images: (N, 3, H, W), of all parts; a crop of what is decoded, if they are smaller.
        networks: of the losses.
        terms: of the forward's output, beside those between images.
    """
    tokenizer = getattr(model, "tokenizer", model)
    prepared = PreparedInParts(model, _plain(run), ALONE, last_layer(tokenizer))
    prepared.train()
    output = prepared(*inputs)
    height, width = images.shape[-2:]
    decoded = getattr(output, "reconstructions", output)[..., :height, :width]  # (N, 3, H, W)

    def compared(targets: Tensor, part: Tensor) -> dict[str, Tensor]:
        found = {"pixel": pixel_loss(run.reconstruction.pixel, targets, part)}
        if networks.vgg is not None:
            found["perceptual"] = perceptual_loss(networks.maps, targets, part)
        return found

    loss = sum((prepared.means(compared, images, decoded) | terms(output)).values())
    if networks.discriminator is None:
        prepared.backward(loss)
        return

    def features(x: Tensor) -> Tensor:
        x = augment(x, torch.zeros(7, len(x), 1, 1, device=META)) if run.discriminator.augment else x.float()
        return x if networks.backbone is None else networks.backbone(x)

    fake = features(decoded)
    networks.discriminator.requires_grad_(False)
    loss = loss + differentiated(generator_loss(networks.discriminator(fake)), decoded)
    networks.discriminator.requires_grad_(True)
    prepared.backward(loss)
    hinge_loss(*networks.discriminator(features(images), fake.detach()).chunk(2)).backward()


def _plain(run: TrainingConfig) -> TrainingConfig:
    """The settings, of which those that `Prepared` cannot have here are off."""
    return run.model_copy(
        update={"precision": "float32", "compile": False, "fsdp": False, "gradient_checkpointing": False}
    )


class _SaveAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        output = torch.empty_like(q)
        ctx.save_for_backward(q, k, v, output)
        return output

    @staticmethod
    def backward(ctx: Any, _gradient: Tensor) -> tuple[Tensor, ...]:
        return tuple(torch.empty_like(x) for x in ctx.saved_tensors[:3])


@contextmanager
def _as_on_a_gpu() -> Iterator[None]:
    """Context: attention keeps queries, keys, values and output and no matrix of weights, dropout a mask of bytes."""

    def attention(q: Tensor, k: Tensor, v: Tensor, *_: Any, **__: Any) -> Tensor:
        return _SaveAttention.apply(q, k, v)

    def dropout(x: Tensor, p: float = 0.5, training: bool = True, inplace: bool = False) -> Tensor:
        return torch.native_dropout(x, p, training)[0] if p and training else x

    with mock.patch.multiple(F, scaled_dot_product_attention=attention, dropout=dropout):
        yield
