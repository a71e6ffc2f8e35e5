"""Post-training as in the authors' code: images are encoded again, and more than the decoder is trained.

The paper trains the decoder. The authors' code decodes each mixture, rounds the image to 8 bits, encodes it again and
freezes only the encoder's transformer: latent tokens, level embedding, projections and codebook are trained too, with
the terms of the quantiser and the teacher. Source: the code of arXiv 2509.12474.
"""

import copy

import torch
from torch import Tensor

from robustok.data.pixels import rounded
from robustok.errors import UserError
from robustok.losses.semantic import Teacher
from robustok.tokenizers.robustok import RobusTok
from robustok.training.common import TrainingConfig, quantizer_terms
from robustok.types import Tokenizer, TokenizerOutput


class AuthorsStep:
    """The authors' procedure for a training step; the paper's is :class:`robustok.training.decoder.DecoderStep`.

    Attributes:
        model: the tokenizer, trainable but for the encoder's transformer. All of it is in training mode: stochastic
            depth is active in the frozen transformer too.

    Args:
        run: settings; the teacher's are read.
        tokenizer: to train; a copy of it, as it is now, decodes the mixtures.
        mode: of the pairs.

    Raises:
        UserError: another family of tokenizers; pairs that were encoded again already; an unusable teacher.
    """

    def __init__(self, run: TrainingConfig, tokenizer: Tokenizer, mode: str | None) -> None:
        if not isinstance(tokenizer, RobusTok):
            raise UserError(f"trainable=authors is for robustok, got {tokenizer.config.name}; set trainable=decoder")
        if mode != "direct":
            raise UserError(f"trainable=authors encodes images itself, the pairs are {mode}; make pairs mode=direct")
        self.run = run
        self.original = copy.deepcopy(tokenizer).eval().requires_grad_(False)
        self.model = tokenizer.requires_grad_(True)
        self.model.encoder.backbone.requires_grad_(False)
        self.teacher = None
        if run.teacher.name != "none":
            sizes = tokenizer.image_size, tokenizer.config.patch_size
            self.teacher = Teacher(run.teacher, *sizes).to(next(tokenizer.parameters()).device)
            own = tokenizer.config.teacher_width or tokenizer.encoder.width
            if self.teacher.width != own:
                raise UserError(
                    f"the teacher has width {self.teacher.width}, the tokenizer learned from {own}; set teacher"
                )

    @torch.no_grad()
    def inputs(self, latents: Tensor) -> tuple:
        """Inputs of the model's forward: images (N, 3, H, W) of the mixtures, and the teacher's features."""
        images = rounded(self.original.decode(latents))  # to 8 bits, as in a PNG
        return images, None, None, 0, None if self.teacher is None else self.teacher(images)

    def reconstructions(self, output: TokenizerOutput) -> Tensor:
        """The images (N, 3, H, W) of the model's output."""
        return output.reconstructions

    def terms(self, output: TokenizerOutput) -> dict[str, Tensor]:
        """Weighted terms of the quantiser, and of the teacher where there is one."""
        return quantizer_terms(self.model.config.quantizer, self.run.teacher, output)
