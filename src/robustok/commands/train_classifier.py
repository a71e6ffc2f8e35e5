"""The `train-classifier` command: a small classifier of labelled images, for metrics, perceptual loss or teacher."""

import warnings
from dataclasses import dataclass
from pathlib import Path

import torch
from pydantic import Field
from torch import Tensor

from robustok.config import Config
from robustok.console import track
from robustok.data.dataset import ImageDataset, open_images
from robustok.data.loader import batches_in_order
from robustok.data.sources import Data
from robustok.devices import start_accelerator
from robustok.metrics.features.classifier import ClassifierConfig, load_classifier, save_classifier
from robustok.runs import RunFolder
from robustok.training.classifier import accuracy, fit_classifier


class TrainClassifierRun(Config):
    """A feature space for Frechet distances, a perceptual loss or a teacher. Use another seed for each of them."""

    out: Path = Field(description="run folder; use it as extractor.path, perceptual_weights or teacher.path")
    data: Data = Field(description="labelled images: the train split trains, the test split gives the accuracy")
    image_size: int = Field(32, ge=16, description="height and width of the images in pixels")
    classifier: ClassifierConfig = ClassifierConfig()
    seed: int = Field(
        0, ge=0, description="seed of the initial weights, of the order of the images and of their shifts"
    )


@dataclass(frozen=True)
class TrainedClassifier:
    """A saved classifier and its accuracy.

    Attributes:
        path: folder of its snapshot.
        accuracy: share in [0, 1] of the held-out images whose class is predicted correctly.
        samples: number of held-out images.
    """

    path: Path
    accuracy: float
    samples: int


def train_classifier(run: TrainClassifierRun) -> TrainedClassifier:
    """Train a classifier, or load the one that the same command saved before, and measure its accuracy.

    Raises:
        UserError: the data cannot be read, or the run folder belongs to another configuration.
    """
    accelerator = start_accelerator()
    path = run.out / "snapshot" / f"{run.classifier.steps:08d}"
    folder = RunFolder(run, accelerator.is_main_process)
    held_out = open_images(run.data, run.image_size, "test")
    held_out.check_labels()
    if len(held_out.classes) < 2:
        warnings.warn(
            f"{held_out.name} has one class, from which a classifier learns nothing: its accuracy of 1 is no success, "
            "its features are nearly random; give images of two classes or more, as CLASS/FILE",
            stacklevel=2,
        )
    if not (path / "model.safetensors").exists():
        pixels, labels = _pixels(open_images(run.data, run.image_size, "train"))
        bar = iter(track(range(run.classifier.steps), f"train-classifier {run.out.name}", accelerator.is_main_process))
        advance = lambda done, steps: next(bar, None)  # noqa: E731
        model = fit_classifier(pixels, labels, run.classifier, run.seed, accelerator.device, advance)
        folder.start()
        if accelerator.is_main_process:
            save_classifier(model, path)
        accelerator.wait_for_everyone()
    share = accuracy(load_classifier(path, accelerator.device), *_pixels(held_out))
    return TrainedClassifier(path, share, len(held_out) - len(held_out.broken))


def _pixels(data: ImageDataset) -> tuple[Tensor, Tensor]:
    """All pixels (N, 3, H, W) uint8 and labels (N,) of a data set."""
    data.check_labels()
    batches = list(batches_in_order(data, batch_size=256, workers=None))
    return torch.cat([batch.pixels for batch in batches]), torch.cat([batch.labels for batch in batches])
