"""Pixels to features: the spaces in which distances between sets of images are measured.

An extractor is anything that satisfies :class:`robustok.types.FeatureExtractor`. Its name carries a digest of its
weights and goes with every number. It takes uint8 pixels and nothing else, so that no float image slips into a metric.
"""

import contextlib
import hashlib
import io
import pickle
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal
from urllib.parse import urlparse

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from robustok.classifier import load_classifier
from robustok.config import Config
from robustok.images import from_pixels
from robustok.types import FeatureExtractor, UserError


class ClassifierExtractor:
    """The penultimate features of a classifier, in float32, in evaluation mode and without gradients.

    Distances in this space are reported under its name, for example ``classifier-64-3f9a12bc``, never as plain "FID".

    Args:
        classifier: a network with ``features(images) -> (N, F)`` and ``digest``, such as
            :class:`robustok.classifier.SmallClassifier`.

    Attributes:
        name: ``classifier-F-DIGEST``.
        dim: F.
    """

    def __init__(self, classifier: nn.Module):
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


# The name holds the first digits of the file's SHA-256, as torch.hub expects it.
INCEPTION_URL = (
    "https://github.com/toshas/torch-fidelity/releases/download/v0.2.0/weights-inception-2015-12-05-6726825d.pth"
)
INCEPTION_DIGEST = "6726825d"
INCEPTION_DIM = 2048
SPATIAL_DIM = 7 * 17 * 17


@dataclass(frozen=True)
class InceptionFeatures:
    """What one pass through the Inception network gives.

    Attributes:
        pool: (N, 2048) float32, the features of FID, KID, precision and recall.
        logits: (N, 1008) float32 without the bias, for the Inception Score.
        spatial: (N, 2023) float32, 7 channels of 17 x 17 places in the order (row, column, channel), for sFID.
    """

    pool: Tensor
    logits: Tensor
    spatial: Tensor


class InceptionExtractor:
    """The Inception network of FID (TensorFlow's of 2015-12-05), in float32 and without gradients.

    torch-fidelity's port with TensorFlow's own resizing. Its pool features make a Frechet distance FID.

    Args:
        path: file of weights; None takes the official one, from torch.hub's cache or its address.
        device: where it runs.

    Attributes:
        name: ``inception-2048-6726825d`` for the official weights, ``custom-inception-2048-DIGEST`` (of the file's
            SHA-256) for others, whose distances nobody should call FID.
        dim: 2048.

    Raises:
        UserError: torch-fidelity or the weights are missing, damaged, or not what they are said to be.
    """

    dim = INCEPTION_DIM

    def __init__(self, path: str | Path | None = None, device: torch.device | str = "cpu"):
        try:
            from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3
        except ImportError:
            raise UserError("extractor.name=inception needs torch-fidelity; pip install 'robustok[fid]'") from None
        path = Path(path) if path is not None else None
        content = _read(path or _official_weights())
        digest = hashlib.sha256(content).hexdigest()[: len(INCEPTION_DIGEST)]
        if path is None and digest != INCEPTION_DIGEST:
            found = f"{_cached_weights()} has the SHA-256 {digest}..., expected {INCEPTION_DIGEST}..."
            raise UserError(f"{found}; delete it to download it again, or give extractor.path=FILE")
        origin = "" if digest == INCEPTION_DIGEST else "custom-"
        self.name, self.device = f"{origin}inception-{self.dim}-{digest}", torch.device(device)
        try:
            # The network unpickles whatever it is given: it gets a copy of what could be read without running code.
            safe = io.BytesIO()
            torch.save(torch.load(io.BytesIO(content), map_location="cpu", weights_only=True), safe)
            safe.seek(0)
            network = FeatureExtractorInceptionV3(self.name, ["2048", "logits_unbiased"], safe)
        except (
            RuntimeError,
            ValueError,
            TypeError,
            AttributeError,
            KeyError,
            EOFError,
            pickle.UnpicklingError,
        ) as error:
            reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
            expected = f"expected the state dict of {_file_name()}"
            raise UserError(f"{path or _cached_weights()} holds no Inception weights ({reason}); {expected}") from None
        self.network = network.to(self.device).eval()

    def __call__(self, pixels: Tensor) -> Tensor:
        """Pixels (N, 3, H, W) uint8 to pool features (N, 2048) float32, on the device of the network.

        Raises:
            UserError: the pixels are not uint8 or not of this shape.
        """
        return self.features(pixels).pool

    @torch.no_grad()
    def features(self, pixels: Tensor) -> InceptionFeatures:
        """Everything that one pass over pixels (N, 3, H, W) uint8 gives.

        Raises:
            UserError: the pixels are not uint8 or not of this shape.
        """
        check_pixels(pixels)
        maps = []
        # ADM's sFID reads TensorFlow's mixed_6/conv, which is this branch.
        hook = self.network.Mixed_6d.branch1x1.register_forward_hook(lambda _, __, output: maps.append(output[:, :7]))
        try:
            with exact_float32(self.device):
                pool, logits = self.network.eval()(pixels.to(self.device))  # (N, 2048), (N, 1008)
        finally:
            hook.remove()
        # TensorFlow keeps channels last; in PyTorch's order the features would not fit published statistics.
        spatial = maps[0].permute(0, 2, 3, 1).flatten(1)  # (N, 17, 17, 7) -> (N, 2023)
        return InceptionFeatures(pool, logits, spatial)


@contextlib.contextmanager
def exact_float32(device: torch.device) -> Iterator[None]:
    """Neither autocast nor TF32: made for training, they would move features by more than a good tokenizer does."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        with (
            torch.autocast(device.type, enabled=False),
            torch.backends.cudnn.flags(enabled=True, allow_tf32=False),
        ):
            yield
    finally:
        torch.set_float32_matmul_precision(before)


def compute_features(extractor: FeatureExtractor, pixel_batches: Iterable[Tensor]) -> Tensor:
    """Features (N, F) float32 on the CPU of all images of an iterable of pixels (n, 3, H, W) uint8.

    Raises:
        UserError: the iterable holds no batch.
    """
    features = [extractor(pixels).cpu() for pixels in pixel_batches]
    if not features:
        raise UserError("got no images to compute features of, expected at least one batch; check the data set")
    return torch.cat(features)  # (N, F)


def check_pixels(pixels: Tensor) -> None:
    """Refuse anything but pixels (N, 3, H, W) uint8.

    Raises:
        UserError: another shape or type.
    """
    if pixels.dtype != torch.uint8 or pixels.ndim != 4 or pixels.shape[1] != 3:
        found = f"{tuple(pixels.shape)} {pixels.dtype}"
        raise UserError(f"got {found}, metrics take pixels (N, 3, H, W) torch.uint8; convert with images.to_pixels")


class ExtractorConfig(Config):
    """The feature space of a Frechet distance."""

    name: Literal["classifier", "inception"] = Field(
        "classifier", description="a small classifier of images of the domain, or the Inception network of FID"
    )
    path: Path | None = Field(
        None,
        description="classifier: its folder (`robustok train-classifier` makes one); "
        "inception: file of weights, by default the official one",
    )

    @model_validator(mode="after")
    def _classifier_has_a_path(self) -> "ExtractorConfig":
        if self.name == "classifier" and self.path is None:
            raise ValueError("a classifier needs extractor.path, its folder; or set extractor.name=inception")
        return self


def load_extractor(config: ExtractorConfig, device: torch.device | str = "cpu") -> FeatureExtractor:
    """The extractor of a configuration.

    Raises:
        UserError: its weights are missing or damaged.
    """
    if config.name == "inception":
        return InceptionExtractor(config.path, device)
    return ClassifierExtractor(load_classifier(config.path, device))


def _file_name() -> str:
    return Path(urlparse(INCEPTION_URL).path).name


def _cached_weights() -> Path:
    return Path(torch.hub.get_dir()) / "checkpoints" / _file_name()


def _official_weights() -> Path:
    """Their place in torch.hub's cache, downloaded if they are not there yet."""
    path = _cached_weights()
    if not path.exists():
        try:
            torch.hub.load_state_dict_from_url(
                INCEPTION_URL, map_location="cpu", progress=False, check_hash=True, weights_only=True
            )
        except (OSError, RuntimeError) as error:  # no network, no room; a hash that does not fit
            reason = " ".join(str(error).split())
            put = f"download {INCEPTION_URL} elsewhere and put it there, or give its place as extractor.path=FILE"
            raise UserError(f"the Inception weights are not at {path} and did not arrive ({reason}); {put}") from None
    return path


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        reason = f"cannot read the Inception weights {path}: {error.strerror}"
        raise UserError(f"{reason}; give the file {_file_name()} as extractor.path") from None
