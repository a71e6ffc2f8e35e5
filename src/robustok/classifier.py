"""A small convolutional classifier, trained in seconds, that stands in where no pretrained network is at hand.

It has three users, each with a seed of its own so that none judges itself: the feature space of a metric
(:class:`robustok.metrics.ClassifierExtractor`), a perceptual loss (:meth:`SmallClassifier.feature_maps`) and a frozen
semantic teacher (:meth:`SmallClassifier.features`). Distances in its features are never called plain "FID".
"""

from collections.abc import Callable
from pathlib import Path
from typing import Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from robustok.config import Config, plain, validate
from robustok.images import from_pixels
from robustok.snapshots import digest, load_weights, read_snapshot, write_snapshot
from robustok.types import UserError


class ClassifierConfig(Config):
    """A small classifier and its training. The defaults suit the digits; CIFAR-10 wants more width, steps and flips."""

    name: Literal["classifier"] = "classifier"
    width: int = Field(16, ge=8, multiple_of=8, description="channels of the first stage; each stage doubles them")
    features: int = Field(64, ge=8, multiple_of=8, description="length of the feature vector before the last layer")
    steps: int = Field(200, ge=1, description="training steps")
    batch_size: int = Field(128, ge=1, description="images in a step")
    learning_rate: float = Field(3e-3, gt=0, description="peak of the one-cycle schedule")
    weight_decay: float = Field(0.05, ge=0, description="decoupled weight decay of AdamW")
    shift: float = Field(0.0625, ge=0, lt=0.5, description="largest shift in training, as a share of the image size")
    flip: bool = Field(False, description="mirror half of the training images; wrong for digits, right for photographs")
    precision: Literal["float32", "bf16"] = Field("float32", description="of training; bf16 suits hardware that has it")


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

    BatchNorm helps it learn and is then folded into the convolutions, so a trained classifier is the same function in
    training and evaluation mode: no forgotten ``eval()`` can move a metric or a loss. Any image from 16x16 up.

    Args:
        config: sizes.
        classes: number of classes.
        batch_norm: for training; a trained classifier has none.
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
        return digest(self.state_dict())[:8]


def train_classifier(
    pixels: Tensor,
    labels: Tensor,
    config: ClassifierConfig,
    seed: int,
    device: torch.device | str = "cpu",
    progress: Callable[[int, int], None] | None = None,
) -> SmallClassifier:
    """Train a classifier from scratch with AdamW on a one-cycle schedule; on a CPU the seed decides every bit.

    Args:
        pixels: (N, 3, H, W) uint8, H and W at least 16.
        labels: (N,) int64, classes from 0.
        config: the network and its training.
        seed: decides the first weights, the order of the images and their shifts.
        device: where to train.
        progress: called after each step with (steps done, all steps).

    Returns:
        The classifier on ``device``, in evaluation mode, its weights frozen.

    Raises:
        UserError: shapes or types that do not fit, negative labels, images smaller than 16x16.
    """
    _check(pixels, labels)
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        model = SmallClassifier(config, int(labels.max()) + 1, batch_norm=True)
    model.to(device, memory_format=torch.channels_last)
    optimizer = torch.optim.AdamW(model.parameters(), lr=config.learning_rate, weight_decay=config.weight_decay)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, config.learning_rate, total_steps=config.steps + 1)
    rng = torch.Generator().manual_seed(seed)
    order = torch.empty(0, dtype=torch.int64)
    with torch.enable_grad():
        for step in range(config.steps):
            while len(order) < config.batch_size:
                order = torch.cat([order, torch.randperm(len(pixels), generator=rng)])
            batch, order = order[: config.batch_size], order[config.batch_size :]
            images = _augment(from_pixels(pixels[batch]), config, rng)
            images = images.to(device, memory_format=torch.channels_last)
            # Without the cache: under a caller's autocast it would keep the weights of the first step for ever.
            with torch.autocast(
                images.device.type, torch.bfloat16, enabled=config.precision == "bf16", cache_enabled=False
            ):
                logits = model(images)  # (N, classes)
            loss = F.cross_entropy(logits.float(), labels[batch].to(device))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            if progress is not None:
                progress(step + 1, config.steps)
    optimizer.zero_grad()  # the last step's gradients would stay in memory for ever
    for module in model.modules():
        if isinstance(module, Convolution):
            module.fold()
    return model.eval().requires_grad_(False)


@torch.no_grad()
def accuracy(classifier: SmallClassifier, pixels: Tensor, labels: Tensor, batch_size: int = 256) -> float:
    """Share in [0, 1] of the images (N, 3, H, W) uint8 whose most likely class is their label (N,)."""
    device = classifier.head.weight.device
    guesses = [classifier(from_pixels(batch.to(device))).argmax(dim=1).cpu() for batch in pixels.split(batch_size)]
    return (torch.cat(guesses) == labels.cpu()).double().mean().item()


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
        UserError: there is no snapshot, it is of another kind, or its weights do not fit.
    """
    snapshot = read_snapshot(path, kind="classifier")
    settings, classes = snapshot.header.get("config"), snapshot.header.get("classes")
    if not isinstance(settings, dict) or not isinstance(classes, int):
        raise UserError(f"{path}: config.yaml lacks 'config' or 'classes'; give a folder written by save_classifier")
    model = SmallClassifier(validate(ClassifierConfig, settings, source=str(path)), classes)
    load_weights(model, snapshot)
    return model.to(device, memory_format=torch.channels_last).eval().requires_grad_(False)


def _augment(images: Tensor, config: ClassifierConfig, rng: torch.Generator) -> Tensor:
    """Shift each image (N, 3, H, W) by whole pixels, repeating its border; mirror half of them where that is wanted."""
    n, _, height, width = images.shape
    most = round(config.shift * min(height, width))
    padded = F.pad(images, (most,) * 4, mode="replicate")
    down, right = torch.randint(0, 2 * most + 1, (2, n), generator=rng)
    rows = down[:, None] + torch.arange(height)  # (N, H)
    columns = right[:, None] + torch.arange(width)  # (N, W)
    if config.flip:
        mirrored = torch.rand(n, generator=rng) < 0.5
        columns = torch.where(mirrored[:, None], columns.flip(1), columns)
    image, channel = torch.arange(n)[:, None, None, None], torch.arange(3)[:, None, None]
    return padded[image, channel, rows[:, None, :, None], columns[:, None, None, :]]  # (N, 3, H, W)


def _check(pixels: Tensor, labels: Tensor) -> None:
    shape = tuple(pixels.shape)
    if pixels.dtype != torch.uint8 or pixels.ndim != 4 or shape[1] != 3 or min(shape[2:]) < 16 or shape[0] == 0:
        raise UserError(f"got pixels {shape} {pixels.dtype}, expected (N, 3, H, W) uint8 with H and W at least 16")
    if labels.shape != shape[:1] or labels.dtype != torch.int64:
        raise UserError(f"got labels {tuple(labels.shape)} {labels.dtype}, expected ({shape[0]},) int64, one per image")
    if labels.min() < 0:
        raise UserError(f"got the label {labels.min().item()}, expected classes from 0 upward; renumber the labels")
