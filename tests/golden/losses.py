"""Losses and the discriminator, compared with their reference outputs; see ``check.py``."""

from types import SimpleNamespace

import torch
import torch.nn.functional as F
from table import EXACT, LOSS, USAGE, Golden, Tolerance, codebook_of, strided

from robustok.data.pixels import to_pixels
from robustok.losses.adversarial import (
    AdversarialConfig,
    LeCam,
    adaptive_weight,
    generator_loss,
    hinge_loss,
    lecam_loss,
)
from robustok.losses.discriminators import augment, load_heads
from robustok.losses.discriminators.dino import DinoBackbone, LocalBatchNorm
from robustok.losses.reconstruction import pixel_loss
from robustok.losses.semantic import contrastive_loss
from robustok.metrics.codebook import count_tokens
from robustok.pretrained.families.robustok import discriminator_settings
from robustok.tokenizers.conv import to_grid, to_row
from robustok.training.adversary import Adversary
from robustok.training.generator import accuracy, cross_entropy
from robustok.types import GeneratorOutput

TENSOR = Tolerance(5e-6)


def losses(golden: Golden) -> None:
    """Every term of the losses, and their sum."""
    for geometry in ("normalized", "plain"):
        quantizer_losses(golden, f"quantizer.{geometry}", geometry)
    semantic(golden)
    adversarial(golden)
    for prefix in ("lecam", "lecam_warm"):
        lecam(golden, prefix)
    pairs = zip(golden["adaptive.nll_grad"], golden["adaptive.adversarial_grad"], strict=True)
    found = torch.stack([adaptive_weight(a, b) for a, b in pairs])
    golden.row("adaptive.weight", found, golden["adaptive.weight"], LOSS)
    batchnorm(golden)
    diffaug(golden)
    objective(golden)
    logits = golden["ar.logits"].clone().requires_grad_(True)
    output = GeneratorOutput(prediction=logits[:, :-1], targets=golden["ar.labels"])
    loss = cross_entropy(output)["cross_entropy"]
    golden.row("ar.loss", loss, golden["ar.loss"], LOSS)
    golden.row("ar.token_accuracy", accuracy(output), golden["ar.token_accuracy"], LOSS)
    golden.row("ar.logits_grad", torch.autograd.grad(loss, logits)[0], golden["ar.logits_grad"], TENSOR)
    golden.row(
        "to_uint8.output", to_pixels(golden["to_uint8.input"][:, None]).flatten(), golden["to_uint8.output"], EXACT
    )


def quantizer_losses(golden: Golden, at: str, geometry: str) -> None:
    """Losses and gradients of the quantiser for the first input."""
    quantizer = codebook_of(golden["quantizer.codebook"], geometry, golden.notes["quantizer"]["beta"])
    z = golden["quantizer.z"][0].clone().requires_grad_(True)
    found = quantizer(to_row(z))
    vectors = to_grid(found.vectors, tuple(z.shape[2:]))
    commitment = quantizer.config.commitment_weight * found.commitment_loss
    golden.row(f"{at}.z_q", vectors, golden[f"{at}.z_q"], TENSOR)
    golden.row(f"{at}.codes", found.tokens, golden[f"{at}.codes"], EXACT)
    golden.row(f"{at}.vq_loss", found.codebook_loss, golden[f"{at}.vq_loss"], LOSS)
    golden.row(f"{at}.commit_loss", commitment, golden[f"{at}.commit_loss"], LOSS)
    total = (vectors * golden["quantizer.output_grad"]).sum() + found.codebook_loss + commitment
    gradients = torch.autograd.grad(total, [z, quantizer.embedding.weight])
    for name, gradient in zip(("z_grad", "codebook_grad"), gradients, strict=True):
        golden.row(f"{at}.{name}", gradient, golden[f"{at}.{name}"], TENSOR)
    hits = count_tokens(found.tokens, quantizer.config.size)
    golden.row(f"{at}.ema_hits, the first call", hits.float(), golden[f"{at}.ema_hits"][0], Tolerance(1e-4))
    golden.not_ours(f"{at}.ema_hits, later calls", USAGE)
    golden.not_ours(f"{at}.usage_percent", USAGE)


def semantic(golden: Golden) -> None:
    """The contrastive loss; cases that normalise the features first are normalised here, since the loss does not."""
    found = []
    for normalise, scale in golden["semantic.cases"].tolist():
        features = [golden[f"semantic.features_{i}"].clone().requires_grad_(True) for i in (1, 2)]
        inputs = [F.normalize(x, dim=-1) for x in features] if normalise else features
        loss = contrastive_loss(*inputs, logit_scale=scale)
        found.append((loss, *torch.autograd.grad(loss, features)))
    for name, values in zip(("value", "grad_1", "grad_2"), zip(*found, strict=True), strict=True):
        tolerance = LOSS if name == "value" else TENSOR
        golden.row(f"semantic.{name}", torch.stack(values), golden[f"semantic.{name}"], tolerance)


def adversarial(golden: Golden) -> None:
    """The hinge losses; the library has no others."""
    real, fake = golden["adversarial.logits_real"], golden["adversarial.logits_fake"]
    hinge = torch.stack([hinge_loss(*pair) for pair in zip(real, fake, strict=True)])
    golden.row("adversarial.hinge_d", hinge, golden["adversarial.hinge_d"], LOSS)
    golden.row(
        "adversarial.hinge_g", torch.stack([generator_loss(x) for x in fake]), golden["adversarial.hinge_g"], LOSS
    )
    for name in ("vanilla_d", "non_saturating_d", "non_saturating_g"):
        why = "" if name == "vanilla_d" else "; the authors' code exchanges logits and targets"
        golden.not_ours(f"adversarial.{name}", f"the library has only the hinge losses{why}")


def lecam(golden: Golden, prefix: str) -> None:
    """The moving averages and the loss over six batches, one after the other."""
    averages, decay = LeCam(*golden[f"{prefix}.ema_initial"].tolist()), golden.notes["lecam"]["decay"]
    values, moved = [], []
    for real, fake in zip(golden["adversarial.logits_real"], golden["adversarial.logits_fake"], strict=True):
        averages.update(real.mean().item(), fake.mean().item(), decay)
        values.append(lecam_loss(real, fake, averages))
        moved.append([averages.real, averages.fake])
    golden.row(f"{prefix}.value", torch.stack(values), golden[f"{prefix}.value"], LOSS)
    golden.row(f"{prefix}.ema", torch.tensor(moved, dtype=torch.float64), golden[f"{prefix}.ema"], Tolerance(1e-6))


def batchnorm(golden: Golden) -> None:
    """Batch normalisation in groups of images."""
    norm = LocalBatchNorm(len(golden["batchnorm.weight"]))
    norm.load_state_dict({name: golden[f"batchnorm.{name}"] for name in ("weight", "bias")})
    x = golden["batchnorm.input"]
    golden.row("batchnorm.output", norm(x), golden["batchnorm.output"], Tolerance(1e-5))
    first = golden["batchnorm.output_first_8"]
    golden.row("batchnorm.output_first_8", norm(x[: len(first)]), first, Tolerance(1e-5))


def diffaug(golden: Golden) -> None:
    """All three augmentations are always applied; a single one is tested with neutral random numbers for the others."""
    x, draw = golden["diffaug.input"], golden["diffaug.random"]
    neutral = torch.full_like(draw, 0.5)
    neutral[5:] = 2.0  # the cutout lies outside of the image
    parts = {"translation": slice(0, 2), "color": slice(2, 5), "cutout": slice(5, 7)}
    chosen = {"all": list(parts), "none": []} | {f"{part}_only": [part] for part in parts}
    for name, active in chosen.items():
        mixed = neutral.clone()
        for part in active:
            mixed[parts[part]] = draw[parts[part]]
        golden.row(f"diffaug.{name}", augment(x, mixed), golden[f"diffaug.{name}"], Tolerance(1e-5))
    for name in ("blur_full", "blur_half"):
        golden.not_ours(f"diffaug.{name}", "the library's augmentation has no blur")


def objective(golden: Golden) -> None:
    """The sum of the terms as in training, with linear maps from the file in place of the networks."""
    at, settings = golden.under("objective."), golden.notes["objective"]
    config = AdversarialConfig(
        weight=settings["disc_weight"], start=settings["disc_start"], lecam_weight=settings["lecam_weight"]
    )
    started = [Adversary.started(SimpleNamespace(config=config), int(step)) for step, _ in golden["adopt.table"]]
    adopted = config.weight * torch.tensor(started).double()
    golden.row("adopt.table", adopted, golden["adopt.table"][:, 1], EXACT)

    averages, images, found = LeCam(), at["images"], {}
    for step in at["steps"].tolist():
        counts = Adversary.started(SimpleNamespace(config=config), step)
        last_layer = at["last_layer"].clone().requires_grad_(True)
        matrix = at["discriminator_matrix"].clone().requires_grad_(True)
        reconstructions = (at["features"] @ last_layer.T).view_as(images)
        perceptual = (reconstructions - images).abs().mean((1, 2, 3)).mean()
        reconstruction = settings["reconstruction_weight"] * pixel_loss("l2", images, reconstructions)
        reconstruction = reconstruction + settings["perceptual_weight"] * perceptual
        adversarial_loss = generator_loss(reconstructions.flatten(1) @ matrix)
        gradients = [
            torch.autograd.grad(term, last_layer, retain_graph=True)[0] for term in (reconstruction, adversarial_loss)
        ]
        adaptive = adaptive_weight(*gradients, config.max_adaptive)
        total = reconstruction + at["vq_loss"] + at["commit_loss"] + at["sem_loss"]
        if counts:
            total = total + config.weight * adaptive * adversarial_loss
        real, fake = images.flatten(1) @ matrix, reconstructions.detach().flatten(1) @ matrix
        averages.update(real.mean().item(), fake.mean().item(), golden.notes["lecam"]["decay"])
        discriminator = hinge_loss(real, fake) + config.lecam_weight * lecam_loss(real, fake, averages)
        # The authors' code multiplies this by the weight of the adversarial term, which does not change AdamW's steps.
        discriminator = config.weight * discriminator * counts
        for name, value in {
            "generator_total": total.squeeze(),
            "discriminator_total": discriminator,
            "adaptive_weight": adaptive,
            "lecam_ema": torch.tensor([averages.real, averages.fake], dtype=torch.float64),
            "last_layer_grad": torch.autograd.grad(total, last_layer, retain_graph=True)[0],
            "discriminator_matrix_grad": torch.autograd.grad(discriminator, matrix)[0],
        }.items():
            found.setdefault(name, []).append(value.detach())
    for name, values in found.items():
        tolerance = Tolerance(1e-6) if name == "lecam_ema" else TENSOR if name.endswith("grad") else LOSS
        golden.row(f"objective.{name}", torch.stack(values), at[name], tolerance)
    reason = "the authors' code updates the averages before the discriminator's start too; our training does not"
    golden.not_ours("objective.lecam_ema in training", reason)
    reason = (
        "the authors' loss has the factor disc_weight, added here; ours has none, which AdamW's steps do not depend on"
    )
    golden.not_ours("objective.discriminator_total in training", reason)


# Discriminator


def dino_discriminator(golden: Golden) -> None:
    """Logits in evaluation and training mode, gradients, power iteration."""
    notes = golden.notes
    weights = {name: golden[name] for name in golden.weights}
    of_backbone, of_heads = (
        {name.removeprefix(prefix): value for name, value in weights.items() if name.startswith(prefix)}
        for prefix in ("dino.", "disc.")
    )
    for constant in ("x_scale", "x_shift"):  # of ImageNet's range
        of_backbone.pop(constant, None)
    heads = load_heads(discriminator_settings(of_heads, notes["config"]), of_heads).eval()
    backbone = DinoBackbone(heads.config).load(of_backbone)
    images, size = golden["input.images"].clone().requires_grad_(True), notes["config"]["input_size"]
    logits = heads(backbone(images))
    golden.row("logits_resized", logits, golden["logits_resized"], Tolerance(1e-4))
    upsampled = heads(backbone(golden["input.small_images"]))
    golden.row("logits_upsampled", upsampled, golden["logits_upsampled"], Tolerance(1e-4))
    top, left = golden["crop_top_left"].tolist()
    cropped = heads(backbone(images[:, :, top : top + size, left : left + size]))
    golden.row("logits_cropped", cropped, golden["logits_cropped"], Tolerance(1e-4))
    (gradient,) = torch.autograd.grad(generator_loss(logits), images)
    expected, gradients = golden["image_grad_strided"], Tolerance(1e-6, of_largest=1e-3)
    golden.row("image_grad_strided", strided(gradient, expected), expected, gradients)
    expected = golden["backbone_activations"]
    activations = backbone(images)[:, 0]  # (heads, width, P)
    step = -(-activations.shape[-1] // expected.shape[-1])
    golden.row("backbone_activations", activations[..., ::step], expected, Tolerance(1e-4))

    heads.train()
    logits = heads(backbone(images.detach()))
    golden.row("train.logits", logits, golden["train.logits"], Tolerance(1e-4))
    still = logits.detach()
    loss = hinge_loss(logits, still.roll(1, 0) - 0.3) + hinge_loss(still, 0.5 * logits)
    golden.row("train.hinge", loss, golden["train.hinge"], Tolerance(1e-4))
    heads.zero_grad()
    loss.backward()
    found = {name: parameter.grad for name, parameter in heads.named_parameters()}
    for name, expected in golden.under("train.grad.").items():
        golden.row(f"train.grad.{name}", found[name], expected, gradients)
    state = heads.state_dict()
    for name, expected in golden.under("train.after.").items():
        golden.row(f"train.after.{name}", state[name], expected, Tolerance(1e-4))
    for batch, result in notes.get("batch_sizes_of_local_batch_norm", {}).items():
        if result != "ok":
            golden.not_ours(f"local batch norm of {batch} images", f"{result} in the authors' code; uneven groups here")
