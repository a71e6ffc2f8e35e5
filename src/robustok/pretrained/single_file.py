"""An AutoencoderKL of diffusers in the layout of the first Stable Diffusion, one file that many programs read.

The names are those of latent diffusion's code: levels of the decoder are counted from the finest, and the attention's
projections are convolutions of 1 x 1.
"""

import re

from torch import Tensor

from robustok.tokenizers.diffusers import DiffusersKL
from robustok.types import Tokenizer

BLOCKS = {"down_block_types": "DownEncoderBlock2D", "up_block_types": "UpDecoderBlock2D"}
NAMES = (  # patterns of diffusers, what is there instead
    (r"mid_block\.attentions\.0\.", "mid.attn_1."),
    (r"mid_block\.resnets\.0\.", "mid.block_1."),
    (r"mid_block\.resnets\.1\.", "mid.block_2."),
    (r"down_blocks\.(\d+)\.resnets\.", r"down.\1.block."),
    (r"down_blocks\.(\d+)\.downsamplers\.0\.", r"down.\1.downsample."),
    (r"conv_shortcut\.", "nin_shortcut."),
    (r"conv_norm_out\.", "norm_out."),
)
ATTENTION = {"group_norm": "norm", "to_q": "q", "to_k": "k", "to_v": "v", "to_out.0": "proj_out"}


def has_single_file(tokenizer: Tokenizer) -> bool:
    """Whether the layout has a place for all of this autoencoder."""
    if not isinstance(tokenizer, DiffusersKL):
        return False
    settings = tokenizer.vae.config
    return settings.mid_block_add_attention and all(set(settings[key]) == {name} for key, name in BLOCKS.items())


def single_file(tokenizer: DiffusersKL) -> dict[str, Tensor]:
    """The weights under the names of this layout, on the CPU; they share memory with the model."""
    levels = len(tokenizer.vae.config.up_block_types)
    found = {}
    for name, tensor in tokenizer.vae.state_dict().items():
        tensor = tensor.detach().cpu()
        new = _name(name, levels)
        if ".mid.attn_1." in new and tensor.ndim == 2:
            tensor = tensor[:, :, None, None]  # (out, in, 1, 1)
        found[new] = tensor
    return found


def _name(name: str, levels: int) -> str:
    for pattern, there in NAMES:
        name = re.sub(pattern, there, name)
    name = re.sub(
        r"up_blocks\.(\d+)\.(resnets|upsamplers\.0)\.",
        lambda m: f"up.{levels - 1 - int(m[1])}.{'block' if m[2] == 'resnets' else 'upsample'}.",
        name,
    )
    if ".attn_1." in name:
        for there, here in ATTENTION.items():
            name = name.replace(f".attn_1.{there}.", f".attn_1.{here}.")
    return name
