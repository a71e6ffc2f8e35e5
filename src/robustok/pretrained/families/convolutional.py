"""What the layouts of convolutional tokenizers share: renaming, and sizes from shapes."""

import re
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from robustok.errors import UserError
from robustok.pretrained.shapes import depth_of, shape_of
from robustok.tokenizers.conv import NORM_EPSILON

Names = Sequence[tuple[str, str]]  # our pattern, the authors' replacement


def rename(name: str, names: Names) -> str:
    """The authors' name of our weight."""
    for pattern, replacement in names:
        name = re.sub(pattern, replacement, name)
    return name


def without_teacher(model: Any, weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """Leave out the projection of a teacher's features: only training uses it, and other layouts do not have it."""
    return {name: tensor for name, tensor in weights.items() if not name.startswith("from_teacher.")}


def conv_sizes(
    weights: Mapping[str, Tensor], names: Names, extra_blocks: int = 0, lowest_first: bool = False
) -> tuple[dict[str, Any], dict[str, Any], dict[str, Any]]:
    """Sizes of encoder and decoder, as fields of :class:`robustok.tokenizers.conv.ConvConfig`.

    Args:
        weights: tensors under the authors' names.
        names: how the authors name our weights.
        extra_blocks: residual blocks of a decoder's level beyond ``ConvConfig.blocks``.
        lowest_first: the decoder's levels are numbered from the lowest resolution.

    Returns:
        The fields of the encoder; those of the decoder; and what merge_settings compares with the configuration.

    Raises:
        UserError: weights of another family, or channels that are no multiples of the encoder's first.
    """
    encoder = _side(weights, "encoder", names, 0, False)
    decoder = _side(weights, "decoder", names, extra_blocks, lowest_first)
    factor = 2 ** (len(encoder["multipliers"]) - 1)
    return (
        encoder,
        decoder,
        {key: encoder[key] for key in ("width", "blocks")}
        | {
            "norm_eps": NORM_EPSILON,
            "factor": factor,
        },
    )


def _side(
    weights: Mapping[str, Tensor], side: str, names: Names, extra_blocks: int, lowest_first: bool
) -> dict[str, Any]:
    width = shape_of(weights, rename("encoder.conv_in.weight", names), 4)[0]
    levels = range(depth_of(weights, rename(f"{side}.levels.", names)))
    prefixes = [f"{side}.levels.{number}." for number in (reversed(levels) if lowest_first else levels)]
    channels = [shape_of(weights, rename(f"{prefix}blocks.0.conv1.weight", names), 4)[0] for prefix in prefixes]
    if any(c % width for c in channels):
        raise UserError(
            f"{side} has levels of {channels} channels, expected multiples of the {width} of encoder.conv_in; "
            "check the file"
        )
    attended = [rename(f"{prefix}attentions.0.q.weight", names) in weights for prefix in prefixes]
    return {
        "width": width,
        "multipliers": [c // width for c in channels],
        "blocks": depth_of(weights, rename(f"{prefixes[0]}blocks.", names)) - extra_blocks,
        "attention": [level for level, attends in enumerate(attended) if attends],
        "middle_attention": rename(f"{side}.middle.1.q.weight", names) in weights,
    }
