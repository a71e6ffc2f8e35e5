"""Post-training as it was released: re-encoded images, and more that learns than the decoder.

The paper optimises the decoder. The released code decodes each mixture, rounds the image as a PNG would, encodes it
again and freezes nothing but the encoder's transformer: its latent tokens and level embedding, the projections and the
codebook move too, with the quantiser's and the teacher's terms on. Source: the release of arXiv 2509.12474.
"""

import copy

import torch
from torch import Tensor

from robustok.data.pixels import from_pixels, to_pixels
from robustok.errors import UserError
from robustok.losses.semantic import Teacher, contrastive_loss
from robustok.tokenizers.robustok import RobusTok
from robustok.training.common import TrainingConfig
from robustok.types import Tokenizer, TokenizerOutput


class AuthorsStep:
    """What the released training step does around its model.

    Attributes:
        model: the tokenizer, of which all but the encoder's transformer learns. It stays in training mode as a whole:
            stochastic depth is active in the frozen transformer too.

    Args:
        run: settings; the teacher's are read.
        tokenizer: untrained yet; a copy of it decodes the mixtures.
        mode: of the pairs.

    Raises:
        UserError: another family of tokenizers; pairs that are re-encoded already; a teacher that cannot be had.
    """

    def __init__(self, run: TrainingConfig, tokenizer: Tokenizer, mode: str | None) -> None:
        if not isinstance(tokenizer, RobusTok):
            raise UserError(f"trainable=authors is for robustok, got {tokenizer.config.name}; set trainable=decoder")
        if mode not in ("direct", "generated"):
            raise UserError(f"trainable=authors encodes images itself, the pairs are {mode}; make pairs mode=direct")
        self.run = run
        self.untouched = copy.deepcopy(tokenizer).eval().requires_grad_(False)
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
        """What the model's forward takes: images (N, 3, H, W) of the mixtures, and the teacher's features."""
        images = from_pixels(to_pixels(self.untouched.decode(latents)))  # as read back from a PNG
        return images, None, None, 0, None if self.teacher is None else self.teacher(images)

    def terms(self, output: TokenizerOutput) -> dict[str, Tensor]:
        """Weighted terms of the quantiser, and of the teacher where there is one."""
        quantizer = self.model.config.quantizer
        terms = {
            "codebook": quantizer.codebook_weight * output.codebook_loss,
            "commitment": quantizer.commitment_weight * output.commitment_loss,
        }
        if output.semantic_targets is not None:
            contrast = contrastive_loss(output.semantic_targets, output.semantic_latents)
            terms["semantic"] = self.run.teacher.weight * contrast
        return terms
