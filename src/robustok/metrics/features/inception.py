"""The Inception network of FID: TensorFlow's of 2015-12-05, in torch-fidelity's port, made fast.

Batch norms are folded into the convolutions, channels are last in memory, and TensorFlow's resizing is a blend and a
matrix product. None of it changes a feature by more than the rounding of float32.
"""

import io
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from robustok.data.pixels import unrounded_pixels
from robustok.errors import UserError
from robustok.metrics.features.official_weights import OfficialWeights, load_weights, unfit
from robustok.metrics.guards import check_pixels
from robustok.precision import Precision, at_precision

INCEPTION_URL = (
    "https://github.com/toshas/torch-fidelity/releases/download/v0.2.0/weights-inception-2015-12-05-6726825d.pth"
)
INCEPTION_DIM = 2048
SPATIAL_DIM = 7 * 17 * 17
INPUT_SIZE = 299


@dataclass(frozen=True)
class InceptionFeatures:
    """What one pass through the Inception network gives.

    Attributes:
        pool: (N, 2048) float32, the features of FID, KID, precision and recall.
        logits: (N, 1008) float32 without the bias, for the Inception Score.
        spatial: (N, 2023) float32, 7 channels of 17 x 17 positions in the order (row, column, channel), for sFID.
    """

    pool: Tensor
    logits: Tensor
    spatial: Tensor


class InceptionExtractor:
    """The Inception network of FID, without gradients. Its pool features make a Frechet distance FID.

    Args:
        path: file of weights; None takes the official one, from torch.hub's cache or its address.
        device: where it runs.
        precision: "float32" for numbers to report. "tf32" and "bf16" are several times faster where hardware has them,
            and other feature spaces: the same images in two precisions have a distance above zero, so both sides of a
            comparison need the same.

    Attributes:
        name: ``inception-2048-6726825d`` for the official weights, ``custom-inception-2048-DIGEST`` (of the file's
            SHA-256) for others, whose distances are not FID; with ``-tf32`` or ``-bf16`` at its end in these.
        dim: 2048.

    Raises:
        UserError: torch-fidelity or the weights are missing, or the weights are damaged or of another network.
    """

    dim = INCEPTION_DIM

    def __init__(
        self,
        path: str | Path | None = None,
        device: torch.device | str = "cpu",
        precision: Precision = "float32",
    ):
        try:
            import torch_fidelity.feature_extractor_inceptionv3  # noqa: F401  (before a download)
        except ImportError:
            raise UserError("extractor.name=inception needs torch-fidelity; pip install 'robustok[fid]'") from None
        weights = load_weights(INCEPTION_URL, path, "Inception", "extractor.path")
        origin, suffix = "" if weights.official else "custom-", "" if precision == "float32" else f"-{precision}"
        self.name, self.device = f"{origin}inception-{self.dim}-{weights.digest}{suffix}", torch.device(device)
        network = _fold(_build(weights))
        self.head = network.fc.weight.detach().to(self.device)  # (1008, 2048), always float32
        self.precision = "tf32" if precision == "tf32" else "float32"  # of what is not bf16
        self.dtype = torch.bfloat16 if precision == "bf16" else torch.float32
        self.network = network.to(self.device, self.dtype, memory_format=torch.channels_last)

    def __call__(self, pixels: Tensor) -> Tensor:
        """Pixels (N, 3, H, W) uint8 to pool features (N, 2048) float32, on the device of the network.

        Raises:
            UserError: the pixels are not uint8 or not of this shape.
        """
        return self.features(pixels).pool

    def from_images(self, images: Tensor) -> Tensor:
        """Images (N, 3, H, W) in [-1, 1], not rounded, to pool features (N, 2048), with gradients by the images."""
        return self._features(unrounded_pixels(images)).pool

    @torch.no_grad()
    def features(self, pixels: Tensor) -> InceptionFeatures:
        """Everything that one pass over pixels (N, 3, H, W) uint8 gives.

        Raises:
            UserError: the pixels are not uint8 or not of this shape.
        """
        check_pixels(pixels)
        return self._features(pixels)

    def _features(self, pixels: Tensor) -> InceptionFeatures:
        maps = []
        # ADM's sFID reads TensorFlow's mixed_6/conv, which is this branch.
        hook = self.network.Mixed_6d.branch1x1.register_forward_hook(lambda _, __, output: maps.append(output[:, :7]))
        try:
            with at_precision(self.device, self.precision):
                x = (resize_like_tensorflow(pixels.to(self.device)) - 128) / 128  # (N, 3, 299, 299)
                x = x.to(self.dtype, memory_format=torch.channels_last)
                for name, stage in self.network.named_children():
                    if name not in ("AvgPool", "fc"):
                        x = stage(x)
                pool = x.float().mean(dim=(2, 3))  # (N, 2048, 8, 8) -> (N, 2048)
                logits = pool @ self.head.T  # (N, 1008)
        finally:
            hook.remove()
        # TensorFlow keeps channels last; in PyTorch's order the features would not fit published statistics.
        spatial = maps[0].float().permute(0, 2, 3, 1).flatten(1)  # (N, 17, 17, 7) -> (N, 2023)
        return InceptionFeatures(pool, logits, spatial)


def resize_like_tensorflow(pixels: Tensor, size: int = INPUT_SIZE) -> Tensor:
    """TensorFlow 1's bilinear resizing, without half-pixel offset and without antialiasing.

    Output row i is at i * H / size of the input, between two rows. Rows are blended in pairs; columns, whose
    gathering would be slow, are blended by a product with a matrix of two non-zeros a row.

    Args:
        pixels: (N, C, H, W) uint8 or float, of any size.
        size: height and width of the result.

    Returns:
        (N, C, size, size) float32 in [0, 255], within 1e-4 of TensorFlow's.
    """
    above, below, share = _neighbours(pixels.shape[2], size, pixels.device)
    rows = torch.lerp(pixels[:, :, above].float(), pixels[:, :, below].float(), share[:, None])  # (N, C, size, W)
    left, right, share = _neighbours(pixels.shape[3], size, pixels.device)
    blend, row = rows.new_zeros(size, pixels.shape[3]), torch.arange(size, device=pixels.device)
    blend[row, left] += 1 - share
    blend[row, right] += share  # the last column is its own neighbour
    return rows @ blend.T  # (N, C, size, size)


def _neighbours(old: int, new: int, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """For each of the new positions the old ones before and after it, and the weight (new,) of the latter."""
    # TensorFlow computes the positions in float32; float64 would pick another neighbour now and then.
    positions = torch.arange(new, dtype=torch.float32, device=device) * torch.tensor(old / new, dtype=torch.float32)
    before = positions.long()
    return before, (before + 1).clamp(max=old - 1), positions - before


def _build(weights: OfficialWeights) -> nn.Module:
    """torch-fidelity's network with these weights."""
    from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

    # It unpickles whatever file it is given, so it gets a copy of what could be read without running code.
    file = io.BytesIO()
    torch.save(weights.state, file)
    file.seek(0)
    try:
        return FeatureExtractorInceptionV3("inception", ["2048"], file).eval()
    except (RuntimeError, ValueError, TypeError, AttributeError, KeyError) as error:
        raise unfit(weights.source, "Inception", error, Path(INCEPTION_URL).name) from None


def _fold(network: nn.Module) -> nn.Module:
    """Fold every batch norm into the convolution before it."""
    for block in network.modules():
        if isinstance(getattr(block, "bn", None), nn.BatchNorm2d):
            block.conv, block.bn = fuse_conv_bn_eval(block.conv, block.bn), nn.Identity()
    return network
