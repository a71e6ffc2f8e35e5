"""A small convolutional classifier, trained in seconds, for where no pretrained network is available.

It has three uses: the feature space of a metric (:class:`ClassifierExtractor`), a perceptual loss
(:meth:`SmallClassifier.feature_maps`) and a frozen semantic teacher (:meth:`SmallClassifier.features`). Train one for
each use, with different seeds, so that a loss does not optimise the metric. Distances in its features are not "FID".
"""

from pathlib import Path
from typing import Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from robustok.config import Config, plain, validate
from robustok.data.pixels import from_pixels
from robustok.errors import UserError
from robustok.files import tensor_digest
from robustok.metrics.guards import check_pixels
from robustok.precision import DESCRIPTION, Precision, exact_float32
from robustok.snapshots import build, read_snapshot, write_snapshot


class ClassifierConfig(Config):
    """A small classifier and its training. The defaults suit the digits; CIFAR-10 wants more width, steps and flips."""

    name: Literal["classifier"] = "classifier"
    width: int = Field(16, ge=8, multiple_of=8, description="channels of the first stage; each stage doubles them")
    features: int = Field(64, ge=8, multiple_of=8, description="length of the feature vector before the last layer")
    steps: int = Field(200, ge=1, description="training steps")
    batch_size: int = Field(128, ge=1, le=1_000_000, description="images in a step")
    learning_rate: float = Field(3e-3, gt=0, description="peak of the one-cycle schedule")
    weight_decay: float = Field(0.05, ge=0, description="decoupled weight decay of AdamW")
    shift: float = Field(0.0625, ge=0, lt=0.5, description="largest shift in training, as a share of the image size")
    flip: bool = Field(False, description="mirror half of the training images; wrong for digits, right for photographs")
    precision: Precision = Field("float32", description=f"of its training: {DESCRIPTION}")


class Convolution(nn.Module):
    """Convolution, BatchNorm until it is folded, ReLU."""

    def __init__(self, inputs: int, outputs: int, size: int, batch_norm: bool):
        super().__init__()
        self.convolution = nn.Conv2d(inputs, outputs, size, padding=size // 2)
        self.norm = nn.BatchNorm2d(outputs) if batch_norm else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        """Maps (N, inputs, H, W) to (N, outputs, H, W), not negative."""
        return F.relu(self.norm(self.convolution(x)))

    def fold(self) -> None:
        """Put the BatchNorm, with its running statistics, into the weights of the convolution."""
        if isinstance(self.norm, nn.BatchNorm2d):
            self.convolution = fuse_conv_bn_eval(self.convolution.eval(), self.norm.eval())
            self.norm = nn.Identity()


class SmallClassifier(nn.Module):
    """Three stages of 3x3 convolutions, a projection, global average pooling and a linear layer.

    BatchNorm is folded into the convolutions after training, so a trained classifier computes the same in training and
    evaluation mode. It takes images from 16x16 up.

    Args:
        config: sizes.
        classes: number of classes.
        batch_norm: whether it has BatchNorm, for training; a trained classifier has none.
    """

    def __init__(self, config: ClassifierConfig, classes: int, batch_norm: bool = False):
        super().__init__()
        self.config, self.classes = config, classes
        w = config.width
        # The first stage works at full size, where a second convolution would cost as much as a whole later stage.
        self.stages = nn.ModuleList(
            [
                nn.Sequential(Convolution(3, w, 3, batch_norm)),
                nn.Sequential(Convolution(w, 2 * w, 3, batch_norm), Convolution(2 * w, 2 * w, 3, batch_norm)),
                nn.Sequential(Convolution(2 * w, 4 * w, 3, batch_norm), Convolution(4 * w, 4 * w, 3, batch_norm)),
            ]
        )
        self.projection = Convolution(4 * w, config.features, 1, batch_norm)
        self.head = nn.Linear(config.features, classes)

    def feature_maps(self, images: Tensor) -> list[Tensor]:
        """Activations of the three stages, for a perceptual loss; differentiable with respect to the images.

        Args:
            images: (N, 3, H, W) in [-1, 1].

        Returns:
            Maps (N, width, H, W), (N, 2 width, H/2, W/2) and (N, 4 width, H/4, W/4), not negative.
        """
        maps = [self.stages[0](images)]  # (N, width, H, W)
        for stage in self.stages[1:]:
            maps.append(stage(F.max_pool2d(maps[-1], 2)))
        return maps

    def features(self, images: Tensor) -> Tensor:
        """Images (N, 3, H, W) in [-1, 1] to the features (N, F) before the last layer."""
        maps = self.projection(self.feature_maps(images)[-1])  # (N, F, H/4, W/4)
        return maps.mean(dim=(2, 3))  # (N, F)

    def forward(self, images: Tensor) -> Tensor:
        """Images (N, 3, H, W) in [-1, 1] to logits (N, classes)."""
        return self.head(self.features(images))

    @property
    def digest(self) -> str:
        """Eight hexadecimal digits of the SHA-256 of all weights: names this feature space in results."""
        return tensor_digest(self.state_dict())[:8]


def save_classifier(classifier: SmallClassifier, path: str | Path) -> None:
    """Write a snapshot of kind ``classifier`` into the folder ``path``, which is replaced if it exists.

    Raises:
        UserError: the disk is full or not writable.
    """
    header = {"kind": "classifier", "classes": classifier.classes, "digest": classifier.digest}
    header["config"] = plain(classifier.config)
    write_snapshot(Path(path), header, classifier.state_dict(), extra={})


def load_classifier(path: str | Path, device: torch.device | str = "cpu") -> SmallClassifier:
    """Load what :func:`save_classifier` wrote, in evaluation mode, its weights frozen.

    Raises:
        UserError: there is no snapshot, it is of another kind, or its weights do not fit or are all 0.
    """
    snapshot = read_snapshot(path, kind="classifier")
    if not any(weight.any() for weight in snapshot.weights.values()):
        raise UserError(f"{path}: all weights are 0, so that all images are alike; train the classifier again")
    settings, classes = snapshot.header.get("config"), snapshot.header.get("classes")
    if not isinstance(settings, dict) or not isinstance(classes, int):
        raise UserError(f"{path}: config.yaml lacks 'config' or 'classes'; give a folder written by save_classifier")
    config = validate(ClassifierConfig, settings, source=str(path))
    model = build(lambda: SmallClassifier(config, classes), snapshot)
    return model.to(device, memory_format=torch.channels_last).eval().requires_grad_(False)


def check_images(pixels: Tensor, labels: Tensor) -> None:
    """Refuse training images and labels that do not fit.

    Raises:
        UserError: wrong shapes or types, negative labels, images of fewer than 16 pixels a side.
    """
    shape = tuple(pixels.shape)
    if pixels.dtype != torch.uint8 or pixels.ndim != 4 or shape[1] != 3 or min(shape[2:]) < 16 or shape[0] == 0:
        raise UserError(f"got pixels {shape} {pixels.dtype}, expected (N, 3, H, W) uint8 with H and W at least 16")
    if labels.shape != shape[:1] or labels.dtype != torch.int64:
        raise UserError(f"got labels {tuple(labels.shape)} {labels.dtype}, expected ({shape[0]},) int64, one per image")
    if labels.min() < 0:
        raise UserError(f"got the label {labels.min().item()}, expected classes from 0 upward; renumber the labels")


class ClassifierExtractor:
    """The penultimate features of a classifier, in float32, in evaluation mode and without gradients.

    Args:
        classifier: the trained network.

    Attributes:
        name: ``classifier-F-DIGEST``, such as ``classifier-64-3f9a12bc``.
        dim: F.
    """

    def __init__(self, classifier: SmallClassifier):
        self.classifier = classifier
        self.device = next(classifier.parameters()).device
        self.dim = self._features(torch.zeros(1, 3, 32, 32, device=self.device)).shape[1]
        self.name = f"classifier-{self.dim}-{classifier.digest}"

    def __call__(self, pixels: Tensor) -> Tensor:
        """Pixels (N, 3, H, W) uint8 to features (N, F) float32, on the device of the classifier.

        Raises:
            UserError: the pixels are not uint8 or not of this shape.
        """
        check_pixels(pixels)
        return self._features(from_pixels(pixels.to(self.device)))

    @torch.no_grad()
    def _features(self, images: Tensor) -> Tensor:
        self.classifier.eval()
        with exact_float32(self.device):
            return self.classifier.features(images).float()
