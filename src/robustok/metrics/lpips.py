"""LPIPS of reconstructions, image by image (Zhang et al. 2018, arXiv 1801.03924), through the lpips package."""

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor, nn
from torchvision.models import AlexNet_Weights, VGG16_Weights

from robustok.data.pixels import from_pixels
from robustok.errors import UserError
from robustok.metrics.features.official_weights import load_weights, unfit
from robustok.metrics.guards import check_pair, exact_float32

Backbone = Literal["alex", "vgg"]


@dataclass(frozen=True)
class _Backbone:
    """A network of torchvision under the lpips package: name, address of its weights, smallest image side."""

    title: str
    url: str
    least: int


BACKBONES = {
    "alex": _Backbone("AlexNet", AlexNet_Weights.IMAGENET1K_V1.url, 31),
    "vgg": _Backbone("VGG-16", VGG16_Weights.IMAGENET1K_V1.url, 16),
}


class LPIPS:
    """Learned perceptual distance of each pair of images; 0 for equal ones.

    Values of the two networks cannot be compared, so the network is part of the metric's name. Most papers report
    ``alex``; tokenizers that train with VGG often ``vgg``.

    Args:
        net: "alex" or "vgg".
        path: file of torchvision's weights of that network; None takes torch.hub's cache or the official address. The
            linear layers on top come with the lpips package.
        device: where it runs.

    Attributes:
        name: ``lpips_alex`` or ``lpips_vgg``.
        extractor: the network below with the digest of its file, ``alexnet-7be5be79`` or ``vgg-16-397923af`` for the
            official ones, ``custom-...`` for others, whose distances are not LPIPS.

    Raises:
        UserError: the lpips package or the weights are missing or damaged.
    """

    def __init__(self, net: Backbone = "alex", path: str | Path | None = None, device: torch.device | str = "cpu"):
        self.net, self.name, self.device = net, f"lpips_{net}", torch.device(device)
        network, self.extractor = load_lpips(net, path, setting="lpips.weights")
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
        self.network.eval()  # the linear layers have dropout before them
        with exact_float32(self.device):
            a, b = (from_pixels(x.to(self.device)) for x in (pixels, reference))
            return self.network(a, b).flatten()  # (N, 1, 1, 1) -> (N,)


def check_sides(net: Backbone, shape: Sequence[int], remedy: str) -> None:
    """Refuse images, whose shape ends in height and width, that are too small for the network.

    Raises:
        UserError: they are too small; the message ends in ``remedy``.
    """
    height, width = shape[-2:]
    if min(height, width) < (least := BACKBONES[net].least):
        raise UserError(f"got images of {height}x{width} pixels, lpips_{net} needs {least} a side; {remedy}")


def load_lpips(net: Backbone, path: str | Path | None, setting: str) -> tuple[nn.Module, str]:
    """The lpips package's network, frozen and in evaluation mode: images in [-1, 1] in pairs to (N, 1, 1, 1).

    Args:
        net: "alex" or "vgg".
        path: file of torchvision's weights; None takes torch.hub's cache or the official address.
        setting: names the setting that takes this path, for messages.

    Returns:
        The network; and the name of what lies below with the digest of its file.

    Raises:
        UserError: the package or the weights are missing or damaged.
    """
    try:
        import lpips
    except ImportError:
        raise UserError("LPIPS needs the lpips package; pip install 'robustok[lpips]'") from None
    backbone = BACKBONES[net]
    weights = load_weights(backbone.url, path, backbone.title, setting)
    with warnings.catch_warnings():  # lpips calls torchvision in a way that it calls deprecated
        warnings.simplefilter("ignore")
        network = lpips.LPIPS(net=net, pnet_rand=True, verbose=False)
    # The package cuts torchvision's ``features.N.*`` into slices: slice1.0.weight is features.0.weight.
    slices = {f"features.{name.split('.', 1)[1]}": name for name in network.net.state_dict()}
    try:
        network.net.load_state_dict({name: weights.state[theirs] for theirs, name in slices.items()})
    except (RuntimeError, KeyError, AttributeError) as error:
        raise unfit(weights.source, backbone.title, error, Path(backbone.url).name) from None
    origin = "" if weights.official else "custom-"
    return network.eval().requires_grad_(False), f"{origin}{backbone.title.lower()}-{weights.digest}"
