"""Public CIFAR-10 classifiers as a feature space: ResNet-20 to ResNet-110 of He et al. (arXiv 1512.03385, section 4.2).

They were trained by others on CIFAR-10 and are the same on every machine, so distances in their features can be
compared between machines, and are independent of any network that was trained here. They are never called FID.
"""

from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from robustok.checkpoints import read_checkpoint
from robustok.data.pixels import from_pixels
from robustok.devices import layout
from robustok.errors import UserError
from robustok.files import tensor_digest
from robustok.metrics.guards import check_pixels
from robustok.precision import exact_float32

WIDTHS = (16, 32, 64)  # channels of the three stages
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # of the input in [0, 1]


class Block(nn.Module):
    """Two 3x3 convolutions with a shortcut that has no parameters (option A of the paper)."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.stride, self.padding = outputs // inputs, (outputs - inputs) // 2
        self.conv1 = nn.Conv2d(inputs, outputs, 3, self.stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)

    def forward(self, x: Tensor) -> Tensor:
        """Maps (N, inputs, H, W) to (N, outputs, H / stride, W / stride), not negative."""
        out = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        shortcut = F.pad(x[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, self.padding, self.padding))
        return F.relu(out + shortcut)


class CifarResNet(nn.Module):
    """A ResNet for 32x32 images with 64 features and ten classes.

    Args:
        depth: number of layers, 6 n + 2 with n blocks in each of the three stages.
    """

    def __init__(self, depth: int) -> None:
        super().__init__()
        self.depth, blocks = depth, (depth - 2) // 6
        self.conv1 = nn.Conv2d(3, WIDTHS[0], 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(WIDTHS[0])
        inputs = WIDTHS[0]
        for number, width in enumerate(WIDTHS, 1):
            sizes = [inputs, *[width] * (blocks - 1)]
            self.add_module(f"layer{number}", nn.Sequential(*(Block(size, width) for size in sizes)))
            inputs = width
        self.linear = nn.Linear(WIDTHS[-1], 10)
        self.register_buffer("mean", torch.tensor(MEAN).view(1, 3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(STD).view(1, 3, 1, 1), persistent=False)

    def feature_maps(self, images: Tensor) -> list[Tensor]:
        """Activations of the three stages, for a perceptual loss; differentiable with respect to the images.

        Args:
            images: (N, 3, H, W) in [-1, 1].

        Returns:
            Maps (N, 16, H, W), (N, 32, H/2, W/2) and (N, 64, H/4, W/4), not negative.
        """
        images = images.contiguous(memory_format=layout(images.device))
        x = F.relu(self.bn1(self.conv1((images / 2 + 0.5 - self.mean) / self.std)))
        maps = []
        for stage in (self.layer1, self.layer2, self.layer3):
            maps.append(x := stage(x))
        return maps

    def features(self, images: Tensor) -> Tensor:
        """Images (N, 3, H, W) in [-1, 1] to the features (N, 64) before the last layer."""
        return self.feature_maps(images)[-1].mean(dim=(2, 3))  # (N, 64)

    def forward(self, images: Tensor) -> Tensor:
        """Images (N, 3, H, W) in [-1, 1] to logits (N, 10)."""
        return self.linear(self.features(images))


def load_cifar_resnet(path: str | Path) -> CifarResNet:
    """Load a classifier, in evaluation mode and frozen.

    Args:
        path: safetensors or PyTorch file with the names of akamaster/pytorch_resnet_cifar10 (BSD-2-Clause); its depth
            is read from the number of tensors.

    Raises:
        UserError: no such file, or weights of another network.
    """
    weights = {name: tensor for name, tensor in read_checkpoint(path).weights.items() if "num_batches" not in name}
    blocks = len({name.split(".")[1] for name in weights if name.startswith("layer1.")})
    network = CifarResNet(6 * blocks + 2) if blocks else None
    own = {} if network is None else network.state_dict()
    expected = {name: tensor.shape for name, tensor in own.items() if "num_batches" not in name}
    if {name: tensor.shape for name, tensor in weights.items()} != expected:
        raise UserError(
            f"{path} holds other weights than a CIFAR-10 ResNet of 6 n + 2 layers (conv1, layer1 to layer3, linear "
            "with 10 classes); give a file of akamaster/pytorch_resnet_cifar10"
        )
    network.load_state_dict(weights, strict=False)  # but for the counters of batches, which nothing reads
    return network.eval().requires_grad_(False)


class CifarResNetExtractor:
    """The 64 features of a public CIFAR-10 classifier.

    Args:
        path: as for :func:`load_cifar_resnet`.
        device: where to compute.

    Attributes:
        name: such as ``cifar-resnet56-3f9a12bc``, with a digest of the weights.
        dim: 64.
    """

    dim = WIDTHS[-1]

    def __init__(self, path: str | Path, device: torch.device | str = "cpu") -> None:
        self.network = load_cifar_resnet(path).to(device)
        self.name = f"cifar-resnet{self.network.depth}-{tensor_digest(self.network.state_dict())[:8]}"
        self.device = device

    @torch.no_grad()
    def __call__(self, pixels: Tensor) -> Tensor:
        """Pixels (N, 3, H, W) uint8 to features (N, 64) float32.

        Raises:
            UserError: not uint8 pixels, or not 32x32.
        """
        check_pixels(pixels)
        if pixels.shape[2:] != (32, 32):
            size = "x".join(map(str, pixels.shape[2:]))
            raise UserError(f"the CIFAR-10 ResNets take images of 32x32 pixels, got {size}; use another extractor")
        with exact_float32(torch.device(self.device)):
            return self.network.features(from_pixels(pixels.to(self.device))).float()
