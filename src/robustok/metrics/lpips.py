"""LPIPS (Zhang et al. 2018, arXiv 1801.03924): torchvision's network, and the linear layers of the lpips package."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.models import AlexNet_Weights, VGG16_Weights, alexnet, vgg16

from robustok.checkpoints import read_checkpoint
from robustok.data.pixels import from_pixels
from robustok.devices import layout
from robustok.errors import UserError
from robustok.metrics.features.official_weights import load_weights, unfit
from robustok.metrics.guards import check_pair
from robustok.precision import exact_float32
from robustok.snapshots import check_finite_weights

EPSILON = 1e-10  # of the package, beside the length of features
Backbone = Literal["alex", "vgg"]


@dataclass(frozen=True)
class _Backbone:
    """A network of torchvision.

    Attributes:
        title: its name.
        url: address of its weights.
        least: smallest side of an image in pixels.
        build: makes it.
        read_after: layers, each a ReLU, after which features are compared.
        widths: channels there.
    """

    title: str
    url: str
    least: int
    build: Callable[..., nn.Module]
    read_after: tuple[int, ...]
    widths: tuple[int, ...]


BACKBONES = {
    "alex": _Backbone(
        "AlexNet", AlexNet_Weights.IMAGENET1K_V1.url, 31, alexnet, (1, 4, 7, 9, 11), (64, 192, 384, 256, 256)
    ),
    "vgg": _Backbone(
        "VGG-16", VGG16_Weights.IMAGENET1K_V1.url, 16, vgg16, (3, 8, 15, 22, 29), (64, 128, 256, 512, 512)
    ),
}


class LPIPS:
    """Learned perceptual distance of each pair of images; 0 for equal ones.

    Values of the two networks cannot be compared, so the network is part of the metric's name. Most papers report
    ``alex``; tokenizers that train with VGG often ``vgg``.

    Args:
        net: "alex" or "vgg".
        path: file of torchvision's weights of that network; None takes torch.hub's cache or the official address.
        device: where it runs.
        linear: file of the linear layers; None takes that of the installed lpips package.

    Attributes:
        name: ``lpips_alex`` or ``lpips_vgg``.
        extractor: the network below with the digest of its file, ``alexnet-7be5be79`` or ``vgg-16-397923af`` for the
            official ones, ``custom-...`` for others, whose distances are not LPIPS.

    Raises:
        UserError: the lpips package or the weights are missing or damaged.
    """

    def __init__(
        self,
        net: Backbone = "alex",
        path: str | Path | None = None,
        device: torch.device | str = "cpu",
        linear: str | Path | None = None,
    ) -> None:
        self.net, self.name, self.device = net, f"lpips_{net}", torch.device(device)
        network, self.extractor = load_lpips(net, path, linear, ("lpips.weights", "lpips.linear"))
        self.network = network.to(self.device)

    @torch.no_grad()
    def __call__(self, pixels: Tensor, reference: Tensor) -> Tensor:
        """LPIPS of each image.

        Args:
            pixels: (N, 3, H, W) uint8, at least 31 pixels a side for "alex" and 16 for "vgg".
            reference: (N, 3, H, W) uint8.

        Returns:
            (N,) float32, on the device of the network.

        Raises:
            UserError: not uint8 pixels of one shape, or too small for the network.
        """
        check_pair(pixels, reference)
        check_sides(self.net, pixels.shape, "leave it out here")
        with exact_float32(self.device):
            a, b = (from_pixels(x.to(self.device)) for x in (pixels, reference))
            return self.network(a, b)


def check_sides(net: Backbone, shape: Sequence[int], remedy: str) -> None:
    """Refuse images, whose shape ends in height and width, that are too small for the network.

    Raises:
        UserError: they are too small; the message ends in ``remedy``.
    """
    height, width = shape[-2:]
    if min(height, width) < (least := BACKBONES[net].least):
        raise UserError(f"got images of {height}x{width} pixels, lpips_{net} needs {least} a side; {remedy}")


class LPIPSNetwork(nn.Module):
    """Distances of images in the features of a network, whose channels the linear layers weight.

    It computes in the type of its weights, even under autocast: in bf16 the features are normalised in bf16, too. The
    dropout before the linear layers, which were trained with it, is left out.

    Attributes:
        features: torchvision's layers up to the last one whose output is compared.
        heads: weights (1, C, 1, 1) of the channels of each compared layer.
    """

    def __init__(self, net: Backbone) -> None:
        super().__init__()
        self.read_after = BACKBONES[net].read_after
        with torch.device("meta"):  # the weights come later, and most of torchvision's are of layers not used here
            self.features = BACKBONES[net].build(weights=None).features[: self.read_after[-1] + 1]
        self.heads = nn.ParameterList(torch.ones(1, width, 1, 1) for width in BACKBONES[net].widths)
        self.register_buffer("shift", torch.tensor([-0.030, -0.088, -0.188]).view(1, 3, 1, 1))
        self.register_buffer("scale", torch.tensor([0.458, 0.448, 0.450]).view(1, 3, 1, 1))

    def forward(self, images: Tensor, others: Tensor) -> Tensor:
        """Images (N, 3, H, W) in [-1, 1], without gradients, and others, to distances (N,) float32."""
        with torch.autocast(images.device.type, enabled=False):
            with torch.no_grad():
                targets = list(self.maps(images))
            found = zip(targets, self.maps(others), self.heads, strict=True)
            return sum(F.conv2d((a - b).square(), head).float().mean(dim=(1, 2, 3)) for a, b, head in found)

    def maps(self, images: Tensor) -> Iterator[Tensor]:
        """The compared features (N, C, h, w) of images, each position divided by its length."""
        x = (images.float() - self.shift.float()) / self.scale.float()  # (N, 3, H, W)
        x = x.to(self.heads[0].dtype, memory_format=layout(x.device))
        for number, layer in enumerate(self.features):
            x = layer(x)
            if number in self.read_after:
                yield x / (torch.linalg.vector_norm(x, dim=1, keepdim=True) + EPSILON)


def load_lpips(
    net: Backbone, path: str | Path | None, linear: str | Path | None, settings: tuple[str, str]
) -> tuple[LPIPSNetwork, str]:
    """LPIPS, frozen.

    Args:
        net: "alex" or "vgg".
        path: file of torchvision's weights; None takes torch.hub's cache or the official address.
        linear: file of the linear layers, the package's ``lpips/weights/v0.1/NET.pth``; None takes the installed one.
        settings: name the settings that take these two paths, for messages.

    Returns:
        The network; and the name of what lies below with the digest of its file.

    Raises:
        UserError: the package or the weights are missing or damaged.
    """
    backbone, heads = BACKBONES[net], _linear_layers(net, linear, settings[1])
    weights = load_weights(backbone.url, path, backbone.title, settings[0])
    network = LPIPSNetwork(net)
    try:
        network.features.load_state_dict(
            {name: weights.state[f"features.{name}"] for name in network.features.state_dict()}, assign=True
        )
    except (RuntimeError, KeyError, AttributeError) as error:
        raise unfit(weights.source, backbone.title, error, Path(backbone.url).name) from None
    network.heads = nn.ParameterList(heads)
    origin = "" if weights.official else "custom-"
    return network.eval().requires_grad_(False), f"{origin}{backbone.title.lower()}-{weights.digest}"


def _linear_layers(net: Backbone, path: str | Path | None, setting: str) -> list[Tensor]:
    """Weights (1, C, 1, 1) of the five linear layers."""
    name = f"lpips/weights/v0.1/{net}.pth"
    if path is None:
        package = find_spec("lpips")
        if package is None:
            raise UserError(f"LPIPS needs {name}; pip install 'robustok[lpips]', or give that file as {setting}")
        path = Path(package.origin).parent / name.partition("/")[2]
    try:
        state = read_checkpoint(path).weights
        check_finite_weights(state, path)
        heads = [state[f"lin{i}.model.1.weight"].float() for i in range(len(BACKBONES[net].read_after))]
    except (KeyError, AttributeError):
        raise UserError(f"{path} holds no linear layers of LPIPS; give the package's {name} as {setting}") from None
    if any(head.shape != (1, width, 1, 1) for head, width in zip(heads, BACKBONES[net].widths, strict=True)):
        title = BACKBONES[net].title
        raise UserError(f"{path} holds the linear layers of another network than {title}; give {name} as {setting}")
    return heads
