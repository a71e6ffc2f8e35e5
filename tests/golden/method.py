"""Latent perturbation and the training pass, compared with their reference outputs; see ``check.py``."""

import math
from unittest import mock

import torch
import torch.nn.functional as F
from table import EXACT, LOSS, USAGE, Golden, Tolerance, codebook_of, strided
from torch import Tensor

from robustok import load_pretrained
from robustok.backbones import ImageNetRange
from robustok.errors import UserError
from robustok.losses.reconstruction import pixel_loss
from robustok.losses.semantic import contrastive_loss
from robustok.metrics.codebook import count_tokens
from robustok.pretrained.families import FAMILIES
from robustok.tokenizers import perturbation as perturbing
from robustok.tokenizers.conv import to_grid, to_row
from robustok.tokenizers.perturbation import (
    PerturbationConfig,
    PerturbationDraw,
    annealing_ratio,
    draw_perturbation,
    nearest_to,
    perturb_latents,
)
from robustok.tokenizers.quantizer import VectorQuantizer

# How the authors' code differs from the paper.
AUTHORS = PerturbationConfig(
    selection="bernoulli",
    image_selection="floor",
    neighbour_of="feature",
    include_self=True,
    semantic_on="perturbed",
)


def forced_draw(random_prob: Tensor, random_rank: Tensor, alpha: float, beta: float, delta: int, count: int):
    """A draw from given random numbers: a token is replaced by the code of its rank where its number <= alpha."""
    images = draw_perturbation(count, 1, alpha, beta, torch.Generator(), "bernoulli", "floor").images  # (N,)
    positions, ranks = (random_prob <= alpha).view(count, -1), ((random_rank + 0.5) / delta).view(count, -1)
    return PerturbationDraw(images, positions, ranks)


def ordered_neighbours():
    """Sort neighbours by distance, so that ranks can be compared; the library leaves them unsorted, which is faster."""
    return mock.patch.object(
        perturbing, "nearest_to", lambda *inputs, ordered=True, **rest: nearest_to(*inputs, **rest)
    )


def robustok_tokenizer_train(golden: Golden) -> None:
    """Losses and gradients of a training pass, with and without perturbed images."""
    notes, inputs = golden.notes, golden.companion("weights_and_images")
    model = load_pretrained("robustok", inputs.path).requires_grad_(True)
    name_of, weight = FAMILIES["robustok"].export_name, model.quantizer.config.commitment_weight
    images, alpha, delta = inputs["input.images"], notes["alpha"], notes["delta"]
    semantic_weight, scale = (inputs.notes["config"][f"sem_loss_{key}"] for key in ("weight", "scale"))
    prepared = golden["output.semantic_input_strided"]
    golden.row("semantic_input_strided", strided(ImageNetRange()(images), prepared), prepared, Tolerance(1e-5))
    hits = count_tokens(model.encode(images), model.quantizer.config.size)
    golden.row("ema_vocab_hit (the first call's hits)", hits.float(), golden["output.ema_vocab_hit"], EXACT)
    golden.not_ours("codebook_usage_percent", USAGE)
    for case, beta in notes["beta"].items():
        draw = forced_draw(golden["input.random_prob"], golden["input.random_rank"], alpha, beta, delta, len(images))
        model.zero_grad(set_to_none=True)
        with ordered_neighbours():
            output = model(images, AUTHORS, draw, delta, golden["input.semantic_features"])
            quantized = model.quantizer(model.features(images))
            _, tokens = perturb_latents(
                quantized.features, quantized.tokens, model.codebook.detach(), draw, delta, AUTHORS
            )
        losses = {
            "vq_loss": output.codebook_loss,
            "commit_loss": weight * output.commitment_loss,
            "sem_loss": semantic_weight * contrastive_loss(output.semantic_targets, output.semantic_latents, scale),
        }
        losses["objective"] = pixel_loss("l2", images, output.reconstructions) + sum(losses.values())
        losses["objective"].backward()
        for name, loss in losses.items():
            golden.row(f"{case}.{name}", loss, golden[f"{case}.{name}"], LOSS)
        decoded = golden[f"{case}.decoded"]
        golden.row(f"{case}.decoded", strided(output.reconstructions, decoded), decoded, Tolerance(1e-4))
        if f"{case}.tokens" in golden.tensors:
            golden.row(f"{case}.tokens", tokens[draw.images], golden[f"{case}.tokens"], EXACT)
        found = {name_of(name): parameter.grad for name, parameter in model.named_parameters()}
        for name, expected in golden.under(f"{case}.grad.").items():
            # Linear layers on grids are 1 x 1 convolutions in the authors' code.
            gradient = torch.zeros_like(expected) if found[name] is None else found[name].reshape(expected.shape)
            golden.row(f"{case}.grad.{name}", gradient, expected, Tolerance(1e-7, of_largest=1e-4))


def perturbation(golden: Golden) -> None:
    """Neighbours, a draw from given numbers, frequencies of random draws, the schedule, the number of images."""
    delta = golden.notes["delta"]
    for geometry, tolerance in (("normalized", 1e-5), ("plain", 1e-4)):
        quantizer = codebook_of(golden["input.codebook"], geometry)
        quantized = quantizer(to_row(golden["input.z"]))
        near = nearest_to(
            quantized.features.flatten(0, 1), quantizer.codebook, delta, quantized.tokens.flatten(), include_self=True
        )
        gap = golden[f"{geometry}.rank_gap"]
        clear = (gap > tolerance) & (F.pad(gap[:, :-1], (1, 0), value=math.inf) > tolerance)
        codes = golden[f"{geometry}.nearest_codes"]
        golden.row(f"{geometry}.nearest_codes", near[clear], codes[clear], EXACT)
        distances = (quantized.features.flatten(0, 1)[:, None] - quantizer.codebook[near]).square().sum(-1)
        expected = golden[f"{geometry}.nearest_distances"]
        golden.row(f"{geometry}.nearest_distances", distances, expected, Tolerance(tolerance))
        forced(golden, geometry, quantizer)
    statistics(golden)
    for name, settings in golden.notes["schedule"]["configs"].items():
        schedule(golden, f"schedule.{name}", settings)
    table = golden["image_count.table"]
    counts = [
        int(draw_perturbation(int(batch), 1, 1.0, beta, torch.Generator(), "bernoulli", "floor").images.sum())
        for batch, beta, _ in table.tolist()
    ]
    golden.row("image_count.table", torch.tensor(counts).double(), table[:, 2], EXACT)
    edges(golden)


def forced(golden: Golden, geometry: str, quantizer: VectorQuantizer) -> None:
    """A draw from given random numbers; in the authors' code images that are not replaced are a constant."""
    at, settings = f"{geometry}.forced", golden.notes["forced"]
    z = golden["input.z"].clone().requires_grad_(True)
    grid, delta = tuple(z.shape[2:]), settings["delta"]
    quantized, codebook = quantizer(to_row(z)), quantizer.codebook.detach()
    numbers = golden[f"{at}.random_prob"], golden[f"{at}.random_rank"]
    draw = forced_draw(*numbers, settings["alpha"], settings["beta"], delta, len(z))
    everywhere = PerturbationDraw(torch.ones_like(draw.images), draw.positions, draw.ranks)
    with ordered_neighbours():
        vectors, _ = perturb_latents(quantized.features, quantized.tokens, codebook, draw, delta, AUTHORS)
        _, tokens = perturb_latents(quantized.features, quantized.tokens, codebook, everywhere, delta, AUTHORS)
    output = to_grid(vectors, grid)
    replaced = torch.tensor([int(draw.images.sum())])
    golden.row(f"{at}.images_replaced", replaced, torch.tensor([settings["images_replaced"]]), EXACT)
    unperturbed = golden[f"{at}.unperturbed_zq"]
    golden.row(f"{at}.unperturbed_zq", to_grid(quantized.vectors, grid), unperturbed, Tolerance(1e-5))
    golden.row(f"{at}.codes", tokens.flatten(), golden[f"{at}.codes"], EXACT)
    golden.row(f"{at}.output", output, golden[f"{at}.output"], Tolerance(1e-5))
    mixed = torch.where(draw.images[:, None, None, None], output, unperturbed)
    (gradient,) = torch.autograd.grad((mixed * golden[f"{at}.output_grad"]).sum(), z)
    golden.row(f"{at}.z_grad", gradient, golden[f"{at}.z_grad"], Tolerance(1e-5))


@torch.no_grad()
def statistics(golden: Golden) -> None:
    """Frequencies over as many random draws as the reference made, with another seed."""
    settings, table = golden.notes["statistics"], golden["statistics.table"]
    quantizer = codebook_of(golden["input.codebook"], "normalized" if settings["codebook_norm"] else "plain")
    quantized, codebook, draws = quantizer(to_row(golden["input.z"])), quantizer.codebook, settings["draws"]
    features, tokens = quantized.features, quantized.tokens
    count, length = tokens.shape
    rng = torch.Generator().manual_seed(0)
    for i, line in enumerate(table.tolist()):
        case = dict(zip(settings["columns"], line, strict=True))
        alpha, beta, delta = case["alpha"], case["beta"], int(case["delta"])
        near = nearest_to(features.flatten(0, 1), codebook, delta, tokens.flatten(), include_self=True)
        near = near.view(count, length, delta)
        changed, ranks = [], torch.zeros(delta, dtype=torch.int64)
        for _ in range(draws):
            draw = draw_perturbation(count, length, alpha, beta, rng, "bernoulli", "floor")
            _, drawn = perturb_latents(features, tokens, codebook, draw, delta, AUTHORS)
            changed.append((drawn != tokens).double().mean())
            taken = (near[draw.images] == drawn[draw.images][..., None]).int().argmax(-1)
            ranks += torch.bincount(taken.flatten(), minlength=delta)
        changed, images = torch.stack(changed), int(draw.images.sum())
        error, spread = case["standard_error"], case["per_draw_standard_deviation"]
        inside = count / max(1, images)
        for name, found, standard_error in (
            ("images_replaced", images, 0.0),
            ("changed_fraction_of_all_tokens", changed.mean(), error),
            ("per_draw_standard_deviation", changed.std(), spread / math.sqrt(2 * draws)),
            ("changed_fraction_within_replaced_images", inside * changed.mean(), inside * error),
            ("alpha*(delta-1)/delta*images_replaced/images", changed.mean(), error),
        ):
            found, expected = torch.as_tensor(found).double(), torch.tensor(case[name], dtype=torch.float64)
            allowed = Tolerance(torch.tensor(5 * standard_error, dtype=torch.float64)) if standard_error else EXACT
            golden.row(f"statistics[{i}].{name}", found, expected, allowed)
        expected = golden[f"statistics.rank_counts_{i}"].double()
        likely = expected.clamp(min=1)
        variance = likely * (1 - likely / max(1.0, expected.sum().item()))
        difference = (2 * variance).sqrt()  # both sides are draws
        golden.row(f"statistics.rank_counts_{i}", ranks.double(), expected, Tolerance(5 * difference))


def schedule(golden: Golden, name: str, settings: dict) -> None:
    """Ratio, alpha and delta in every epoch."""
    start, end, end_ratio = (settings[key] for key in ("anneal_start", "anneal_end", "end_ratio"))
    config = PerturbationConfig(
        rate=settings["alpha"],
        proportion=settings["beta"],
        strength=settings["delta"],
        anneal_start=start,
        anneal_end=end,
        end_ratio=end_ratio,
    )
    expected = golden[name]
    epochs = torch.arange(len(expected))
    found = torch.tensor(
        [[annealing_ratio(epoch, start, end, end_ratio), *config.at(epoch)] for epoch in epochs.tolist()],
        dtype=torch.float64,
    )
    if end_ratio == 0.5:
        golden.row(name, found, expected, Tolerance(1e-12))
        return
    outside = (epochs <= start) | (epochs > end)
    golden.row(f"{name}, before and after the ramp", found[outside], expected[outside], Tolerance(1e-12))
    golden.not_ours(f"{name}, on the ramp", "the authors' ramp ends at 1 - end_ratio and jumps; ours ends at end_ratio")


def edges(golden: Golden) -> None:
    """Settings that the authors' code refuses."""
    codebook = golden["input.codebook"]
    own = torch.arange(len(codebook))
    try:
        nearest_to(codebook, codebook, len(codebook) + 1, own, include_self=True)
        golden.fail("delta larger than the codebook", "is accepted")
    except UserError:
        golden.row("delta larger than the codebook (refused)", torch.tensor(1), torch.tensor(1), EXACT)
    golden.not_ours("delta 0", "the authors' code raises RuntimeError; here a strength of 0 means no perturbation")
