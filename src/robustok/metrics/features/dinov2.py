"""DINOv2 features for FD-DINOv2, the Frechet distance of Stein et al. 2023 (arXiv 2306.04675) and Karras et al. 2024.

Its authors measured that it agrees with people where FID does not. The features are those of the original model on
torch.hub: timm's has the same layers and weights, but resamples the table of positions in another way, which moves
features by half a percent; the original way is written here.
"""

import math
import re
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from robustok.backbones import ImageNetRange, pretrained_backbone
from robustok.data.pixels import from_pixels
from robustok.errors import UserError
from robustok.files import tensor_digest
from robustok.metrics.guards import check_pixels
from robustok.precision import exact_float32

DINOV2_MODEL = "vit_large_patch14_dinov2.lvd142m"
IMAGE_SIZE, PATCH_SIZE = 224, 14


class DINOv2Extractor:
    """The class token of DINOv2 after its last norm, in float32 and without gradients.

    Images are resized to 224 x 224 by torch's antialiased bicubic interpolation in float32, without rounding back to
    uint8 (Karras et al. 2024 do the same; Stein et al. resize through PIL, which rounds).

    Args:
        path: file of weights: the original ``dinov2_vitl14_pretrain.pth`` or timm's ``model.safetensors``; None takes
            timm's download or cache.
        device: where it runs.
        model: timm model name, ``vit_SIZE_patch14_dinov2.lvd142m`` with SIZE small, base, large (the one of the
            papers) or giant.

    Attributes:
        name: ``dinov2-vitl14-1024-DIGEST`` with a digest of the weights, the same for both layouts of a file; weights
            from a path, whose origin cannot be checked, have the name ``custom-dinov2-...``.
        dim: width of the class token, 1024 for large.

    Raises:
        UserError: no such model; its weights are missing, damaged or of another model.
    """

    def __init__(
        self,
        path: str | Path | None = None,
        device: torch.device | str = "cpu",
        model: str = DINOV2_MODEL,
    ):
        size = re.fullmatch(r"vit_(small|base|large|giant)_patch14_dinov2(\.lvd142m)?", model)
        if size is None:
            raise UserError(
                f"extractor.model={model} is not of FD-DINOv2; expected {DINOV2_MODEL} or another size of it"
            )
        short = f"vit{size[1][0]}14"
        try:
            network = pretrained_backbone(model, path and Path(path), "the network of FD-DINOv2,", "extractor.path")
        except UserError as error:
            url = f"https://dl.fbaipublicfiles.com/dinov2/dinov2_{short}/dinov2_{short}_pretrain.pth"
            raise UserError(f"{error}, which {url} offers") from None
        origin = "" if path is None else "custom-"
        self.dim, self.device = network.num_features, torch.device(device)
        self.name = f"{origin}dinov2-{short}-{self.dim}-{tensor_digest(network.state_dict())[:8]}"
        table = resample_positions(network.pos_embed.detach(), IMAGE_SIZE // PATCH_SIZE)  # (1, 257, F)
        network.set_input_size((IMAGE_SIZE, IMAGE_SIZE))
        network.pos_embed = nn.Parameter(table)
        self.network = network.to(self.device).eval().requires_grad_(False)
        self.to_imagenet_range = ImageNetRange().to(self.device)

    @torch.no_grad()
    def __call__(self, pixels: Tensor) -> Tensor:
        """Pixels (N, 3, H, W) uint8 of any size to features (N, F) float32, on the device of the network.

        Raises:
            UserError: the pixels are not uint8 or not of this shape.
        """
        check_pixels(pixels)
        return self.from_images(from_pixels(pixels.to(self.device)))

    def from_images(self, images: Tensor) -> Tensor:
        """Images (N, 3, H, W) in [-1, 1], not rounded, to features (N, F), with gradients by the images."""
        self.network.eval()
        with exact_float32(self.device):
            images = F.interpolate(images, (IMAGE_SIZE, IMAGE_SIZE), mode="bicubic", antialias=True)
            tokens = self.network.forward_features(self.to_imagenet_range(images))  # (N, 257, F)
            return tokens[:, 0]  # (N, F)


def resample_positions(table: Tensor, grid: int) -> Tensor:
    """A table of positions for another grid, as the original model resamples it.

    Bicubic without antialiasing, and by the scale (grid + 0.1) / old grid instead of the ratio of the two sizes: the
    original adds 0.1 against rounding, which shifts every position a little.

    Args:
        table: (1, 1 + old * old, F), the class token's position first.
        grid: positions per side of the new table.

    Returns:
        (1, 1 + grid * grid, F).
    """
    own, positions = table[:, :1], table[:, 1:]
    old = math.isqrt(positions.shape[1])
    square = positions.unflatten(1, (old, old)).permute(0, 3, 1, 2).float()  # (1, F, old, old)
    scale = (grid + 0.1) / old
    square = F.interpolate(square, scale_factor=(scale, scale), mode="bicubic", antialias=False)  # (1, F, grid, grid)
    return torch.cat([own, square.permute(0, 2, 3, 1).flatten(1, 2)], dim=1)
