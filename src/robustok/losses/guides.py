"""Which feature spaces guided a decoder in training. Distances that are measured there flatter it."""

from collections.abc import Sequence

from robustok.losses.discriminators import DinoConfig, PatchConfig, ResNetConfig
from robustok.losses.reconstruction import CLASSIFIERS, ReconstructionConfig
from robustok.metrics.features import ExtractorConfig, load_extractor


def guide_names(
    reconstruction: ReconstructionConfig,
    discriminator: PatchConfig | DinoConfig | ResNetConfig | None,
    others: Sequence[ExtractorConfig] = (),
) -> list[str]:
    """The networks of a loss that are feature spaces of `evaluate` too, by the names that these have in results.

    Args:
        reconstruction: with its perceptual network.
        discriminator: with the network that its heads are on; None for training without adversary.
        others: further networks.

    Raises:
        UserError: weights are missing or damaged.
    """
    spaces = list(others)
    if reconstruction.perceptual in CLASSIFIERS and reconstruction.perceptual_weight:
        spaces.append(ExtractorConfig(name=reconstruction.perceptual, path=reconstruction.perceptual_weights))
    if discriminator is not None and discriminator.name == "cifar-resnet":
        spaces.append(ExtractorConfig(name="cifar-resnet", path=discriminator.weights))
    return sorted({load_extractor(space).name for space in spaces})
