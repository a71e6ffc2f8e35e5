"""The `evaluate` verb: tokenizers, and generated latents with one or more decoders, to numbers with their protocol.

rFID and pFID judge reconstructions of held-out images, gFID free samples against training images. Several decoders
are judged on the *same* latents, and their difference is reported with its own standard error, over independent sets
of latents.
"""

import importlib.metadata
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from pydantic import Field, model_validator
from torch import Tensor

from robustok.config import Config, read_yaml
from robustok.images import Data, ImageDataset, batches_in_order, open_images, to_pixels
from robustok.latents import LatentCache, check_cache
from robustok.metrics.codebook import codebook_perplexity, codebook_usage, count_tokens
from robustok.metrics.features import ExtractorConfig, load_extractor
from robustok.metrics.frechet import (
    Estimate,
    GaussianStatistics,
    covariance_factor,
    frechet_bias,
    frechet_distance,
    mean_and_standard_error,
)
from robustok.metrics.gap import latent_gap
from robustok.metrics.kernel import kernel_distance
from robustok.metrics.perturbed import PerturbedGrid, RelativeGrid, perturbed_cells, summarise
from robustok.metrics.pixels import psnr, ssim
from robustok.snapshots import resolve
from robustok.tokenizers import encoder_digest, load_tokenizer
from robustok.tokenizers.perturbation import nearest_codes
from robustok.training.loop import append_line, start_accelerator
from robustok.types import FeatureExtractor, Measurement, Tokenizer, UserError

Reconstruction = Literal["rfid", "psnr", "ssim", "codebook", "pfid"]
Generation = Literal["gfid", "kid", "gap"]


class EvaluateRun(Config):
    """What to measure. Numbers are appended to ``out``/metrics.jsonl and printed."""

    out: Path = Field(description="folder whose metrics.jsonl the results are appended to")
    data: Data = Field(description="real images: the test split for reconstructions, the train split for samples")
    tokenizer: Path | None = Field(None, description="tokenizer whose reconstructions are judged")
    latents: list[Path] = Field(
        [], description="caches of free samples; several independent ones give a standard error"
    )
    decoders: dict[str, Path] = Field(
        {}, description="names and tokenizers that decode the same latents; the first is the baseline"
    )
    metrics: list[Reconstruction | Generation] = Field(
        ["rfid", "psnr", "codebook", "pfid", "gfid", "kid"],
        description="those that apply to what is given are measured",
    )
    extractor: ExtractorConfig | None = Field(None, description="feature space of the distances")
    grid: PerturbedGrid = Field(RelativeGrid(), description="cells of pFID")
    perturbation_seeds: int = Field(1, ge=1, description="repetitions of pFID, for its standard error")
    seed: int = Field(0, ge=0, description="seed of the perturbations")
    batch_size: int = Field(64, ge=1, description="images at a time")
    tags: dict[str, str | float | int] = Field(
        {}, description="further facts to write into every line, such as tokenizer=plain"
    )

    @model_validator(mode="after")
    def _something_to_do(self) -> "EvaluateRun":
        if self.tokenizer is None and not (self.latents and self.decoders):
            raise ValueError("nothing to evaluate; give tokenizer=PATH, or latents=[PATH] with decoders.NAME=PATH")
        needed = {"rfid", "pfid", "gfid", "kid"} & set(self.metrics)
        if needed and self.extractor is None:
            raise ValueError(f"{sorted(needed)[0]} needs extractor.path, the folder of a saved classifier")
        return self


def evaluate(run: EvaluateRun) -> list[Measurement]:
    """Measure everything that was asked for and applies; append the lines to metrics.jsonl.

    Raises:
        UserError: tokenizers, latents or data are missing or do not belong together.
    """
    accelerator = start_accelerator()
    judge = Judge(accelerator, run.data, run.extractor, run.batch_size)
    found: list[Measurement] = []
    if run.tokenizer is not None:
        found += judge.reconstructions(load_tokenizer(run.tokenizer), run)
    if run.latents and run.decoders:
        found += judge.samples(run)
    if accelerator.is_main_process:
        try:
            run.out.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"cannot write to {run.out}: {error.strerror}; choose another out=FOLDER") from None
        for measurement in found:
            append_line(run.out / "metrics.jsonl", measurement.line())
    return found


class Judge:
    """Real images in one feature space, and what is compared with them. Shares the work among processes.

    Args:
        accelerator: devices and processes.
        data: real images.
        extractor: feature space; None where no distance is asked for.
        batch_size: images at a time.
    """

    def __init__(
        self, accelerator: Accelerator, data: Data, extractor: ExtractorConfig | None, batch_size: int
    ) -> None:
        self.accelerator, self.data, self.batch_size = accelerator, data, batch_size
        self.device, self.rank, self.world = accelerator.device, accelerator.process_index, accelerator.num_processes
        self.extractor: FeatureExtractor | None = load_extractor(extractor, self.device) if extractor else None
        self.references: dict[tuple[int, str], tuple[ImageDataset, GaussianStatistics, Tensor]] = {}

    def reconstructions(self, tokenizer: Tokenizer, run: EvaluateRun) -> list[Measurement]:
        """Reconstruction metrics on the test split, encoded once: rFID, pFID, PSNR, SSIM, use of the codebook."""
        tokenizer = tokenizer.to(self.device)
        images = open_images(self.data, tokenizer.image_size, "test")
        encoded, sums = [], torch.zeros(3, dtype=torch.float64)
        for batch in batches_in_order(images, self.batch_size, self.rank, self.world):
            with torch.no_grad():
                tokens = tokenizer.encode(batch.images.to(self.device))
                pixels, real = self._decode(tokenizer)(tokens), to_pixels(batch.images).to(self.device)
            encoded.append((batch.indices, tokens.cpu()))
            if "psnr" in run.metrics:
                sums[0] += (
                    psnr(pixels, real).clamp(max=100).sum().cpu()
                )  # identical images would make the mean infinite
            if "ssim" in run.metrics:
                sums[1] += ssim(pixels, real).sum().cpu()
            sums[2] += len(tokens)
        tokens = self._in_order(encoded)  # (N, L), the same in every process
        sums, count = self._sum(sums), len(tokens)
        note = lambda metric, value, **more: self._measurement(run, metric, value, count, images.describe(), **more)  # noqa: E731
        found = []
        for i, name in enumerate(("psnr", "ssim")):
            if name in run.metrics:
                found.append(note(name, Estimate((sums[i] / sums[2]).item(), None), features=False))
        if "codebook" in run.metrics and tokenizer.kind == "discrete":
            counts = count_tokens(tokens, len(tokenizer.codebook))
            found.append(note("codebook_usage", Estimate(codebook_usage(counts), None), features=False))
            found.append(note("codebook_perplexity", Estimate(codebook_perplexity(counts), None), features=False))
        if "rfid" in run.metrics:
            _, reference, factor = self._reference(tokenizer.image_size, "test")
            value = frechet_distance(self._decoded(tokenizer, tokens), reference, factor)
            found.append(note("rfid", Estimate(value, None), bias=frechet_bias(reference)))
        if "pfid" in run.metrics and tokenizer.kind == "discrete":
            found += self._perturbed(tokenizer, tokens, run, note)
        return found

    def _perturbed(
        self, tokenizer: Tokenizer, tokens: Tensor, run: EvaluateRun, note: Callable[..., Measurement]
    ) -> list[Measurement]:
        """Every cell of pFID and their mean, over the perturbation seeds."""
        _, reference, _ = self._reference(tokenizer.image_size, "test")
        strengths = run.grid.strengths(len(tokenizer.codebook))
        neighbours = nearest_codes(tokenizer.codebook, max(strengths)).cpu()
        runs = []
        for seed in range(run.seed, run.seed + run.perturbation_seeds):
            cells = perturbed_cells(
                run.grid, tokens, neighbours, self._decode(tokenizer), self.extractor, reference, seed,
                self.batch_size, self.rank, self.world, self._sum,
            )  # fmt: skip
            runs.append(summarise(cells))
        protocol = {"grid": run.grid.name, "neighbour_of": "code", "include_self": False, "selection": "exact"}
        found = []
        for cells in zip(*(r.cells for r in runs), strict=True):
            estimate = mean_and_standard_error([cell.value for cell in cells])
            found.append(note("pfid", estimate, rate=cells[0].rate, strength=cells[0].strength, **protocol))
        found.append(note("pfid_mean", mean_and_standard_error([r.mean for r in runs]), cells=len(found), **protocol))
        found.append(note("pfid_geometric_mean", mean_and_standard_error([r.geometric_mean for r in runs]), **protocol))
        return found

    def samples(self, run: EvaluateRun) -> list[Measurement]:
        """Each decoder's gFID and KID on the same latents, their differences, and the gap of the latents themselves."""
        sets = [LatentCache(path) for path in run.latents]
        names = list(run.decoders)
        found, values = [], {}
        for name in names:
            tokenizer = load_tokenizer(run.decoders[name]).to(self.device)
            for cache in sets:
                check_cache(cache, encoder_digest(tokenizer))
            images, reference, factor = self._reference(tokenizer.image_size, "train")
            count = sum(len(cache) for cache in sets)
            facts = (
                {"decoder": name, "sets": len(sets)} | _post_training_facts(run.decoders[name]) | _sampling_facts(sets)
            )
            note = lambda metric, estimate, facts=facts, images=images, count=count, **more: self._measurement(  # noqa: E731
                run, metric, estimate, count, images.describe(), **facts, **more
            )
            if "gfid" in run.metrics:
                values[name] = [
                    frechet_distance(self._decoded(tokenizer, _all(cache)), reference, factor) for cache in sets
                ]
                found.append(note("gfid", mean_and_standard_error(values[name]), samples_per_set=len(sets[0])))
            if "kid" in run.metrics:
                real = self._features(
                    to_pixels(b.images) for b in batches_in_order(images, self.batch_size, self.rank, self.world)
                )
                fake = [self._features(self._decoded_pixels(tokenizer, _all(cache))) for cache in sets]
                one = kernel_distance(fake[0], real)
                estimate = (
                    mean_and_standard_error([kernel_distance(f, real).value for f in fake]) if len(sets) > 1 else one
                )
                found.append(note("kid", estimate))
            if "gap" in run.metrics and name == names[0]:
                found += self._gap(tokenizer, sets, images, note)
        for name in names[1:] if values else []:
            for other in names[: names.index(name)]:
                # The same latents decoded twice: the difference has far less noise than either value.
                change = mean_and_standard_error([a - b for a, b in zip(values[name], values[other], strict=True)])
                facts = {"decoder": name, "versus": other, "sets": len(sets)} | _sampling_facts(sets)
                facts |= _post_training_facts(run.decoders[name])
                found.append(self._measurement(run, "gfid_difference", change, count, images.describe(), **facts))
        return found

    def _gap(
        self, tokenizer: Tokenizer, sets: list[LatentCache], images: ImageDataset, note: Callable
    ) -> list[Measurement]:
        """How far the generated latents are from those of real images."""
        encoded = [
            (batch.indices, tokenizer.encode(batch.images.to(self.device)).cpu())
            for batch in batches_in_order(images, self.batch_size, self.rank, self.world)
        ]
        gap = latent_gap(torch.cat([_all(cache) for cache in sets]), self._in_order(encoded), tokenizer.codebook.cpu())
        facts = {
            "latent_distance": gap.distance,
            "token_divergence": gap.divergence,
            "generated_usage": gap.generated_usage,
        }
        return [note(name, Estimate(value, None)) for name, value in facts.items()]

    def _reference(self, size: int, split: str) -> tuple[ImageDataset, GaussianStatistics, Tensor]:
        """Real images of a split with their statistics, computed once."""
        if (size, split) not in self.references:
            images = open_images(self.data, size, split)
            statistics = GaussianStatistics(self.extractor.dim)
            for batch in batches_in_order(images, self.batch_size, self.rank, self.world):
                statistics.update(self.extractor(to_pixels(batch.images).to(self.device)).cpu())
            statistics = GaussianStatistics.from_tensor(self._sum(statistics.as_tensor()))
            self.references[size, split] = images, statistics, covariance_factor(statistics)
        return self.references[size, split]

    def _decode(self, tokenizer: Tokenizer) -> Callable[[Tensor], Tensor]:
        @torch.no_grad()
        def decode(tokens: Tensor) -> Tensor:
            return to_pixels(tokenizer.decode(tokens.to(self.device)))

        return decode

    def _decoded_pixels(self, tokenizer: Tokenizer, latents: Tensor) -> Any:
        decode = self._decode(tokenizer)
        return (decode(part) for part in latents[self.rank :: self.world].split(self.batch_size))

    def _decoded(self, tokenizer: Tokenizer, latents: Tensor) -> GaussianStatistics:
        """Statistics of the images that latents (N, L) decode to, summed over processes."""
        statistics = GaussianStatistics(self.extractor.dim)
        for pixels in self._decoded_pixels(tokenizer, latents):
            statistics.update(self.extractor(pixels).cpu())
        return GaussianStatistics.from_tensor(self._sum(statistics.as_tensor()))

    def _features(self, pixels: Any) -> Tensor:
        """Features (N, F) of all processes."""
        own = [self.extractor(part.to(self.device)).cpu() for part in pixels]
        return torch.cat(gather_object([torch.cat(own)]) if self.world > 1 else own)

    def _sum(self, tensor: Tensor) -> Tensor:
        if self.world == 1:
            return tensor
        return self.accelerator.reduce(tensor.to(self.device), "sum").cpu()

    def _in_order(self, parts: Sequence[tuple[Tensor, Tensor]]) -> Tensor:
        """Tokens (N, L) of all processes, in the order of the data set."""
        if self.world > 1:
            parts = gather_object(list(parts))
        indices = torch.cat([i for i, _ in parts])
        return torch.cat([t for _, t in parts])[indices.argsort()]

    def _measurement(
        self,
        run: EvaluateRun,
        metric: str,
        estimate: Estimate,
        samples: int,
        reference: str,
        features: bool = True,
        **details: Any,
    ) -> Measurement:
        versions = {name: importlib.metadata.version(name) for name in ("robustok", "torch")}
        extractor = self.extractor.name if features and self.extractor is not None else None
        facts = dict(run.tags) | details | {"uint8": "trunc(127.5 x + 128)", "versions": versions}
        return Measurement(
            metric, estimate.value, estimate.standard_error, samples, run.seed, extractor, reference, facts
        )


def _all(cache: LatentCache) -> Tensor:
    return cache.read(slice(None)).latents


def _post_training_facts(path: Path) -> dict[str, Any]:
    """The sigma and steps of a post-trained decoder; nothing for one that only main training made."""
    found = read_yaml(resolve(path) / "config.yaml").get("post_trained") or {}
    return {key: found[key] for key in ("sigma", "mode", "steps") if key in found}


def _sampling_facts(sets: list[LatentCache]) -> dict[str, Any]:
    """How the latents were drawn, if all sets agree."""
    settings = sets[0].manifest.source.get("sampling")
    same = all(cache.manifest.source.get("sampling") == settings for cache in sets)
    keys = ("guidance_scale", "guidance_power", "temperature", "top_k", "top_p")
    return {key: settings[key] for key in keys} if same and settings else {}
