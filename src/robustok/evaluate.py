"""The `evaluate` verb: tokenizers, and generated latents with one or more decoders, to numbers with their protocol.

rFID and pFID judge reconstructions of held-out images, gFID free samples against training images. Several decoders
are judged on the *same* latents, and their difference is reported with its own standard error, over independent sets
of latents.
"""

import importlib.metadata
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
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
from robustok.metrics.features import SPATIAL_DIM, ExtractorConfig, load_extractor
from robustok.metrics.frechet import (
    Estimate,
    GaussianStatistics,
    covariance_factor,
    frechet_bias,
    frechet_distance,
    mean_and_standard_error,
    small_sample_note,
)
from robustok.metrics.gap import latent_gap
from robustok.metrics.inception_score import inception_score
from robustok.metrics.kernel import kernel_distance
from robustok.metrics.manifold import precision_recall
from robustok.metrics.perturbed import PerturbedGrid, RelativeGrid, perturbed_cells, summarise
from robustok.metrics.pixels import psnr, ssim
from robustok.snapshots import resolve
from robustok.tokenizers import encoder_digest, load_tokenizer
from robustok.tokenizers.perturbation import nearest_codes
from robustok.training.loop import append_line, start_accelerator
from robustok.types import Batch, FeatureExtractor, Measurement, Tokenizer, UserError

Reconstruction = Literal["rfid", "psnr", "ssim", "codebook", "pfid"]
Generation = Literal["gfid", "kid", "precision", "recall", "sfid", "inception_score", "gap"]

ONE_BY_ONE = {"kid", "precision", "recall"}  # need every image's features, not just their mean and covariance
KID_IMAGES = 10_000  # of the reference, evenly spread
OF_INCEPTION = {"sfid", "inception_score"}  # need more than the pool features
OF_SAMPLES = {"gfid"} | ONE_BY_ONE | OF_INCEPTION


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
    seed: int = Field(0, ge=0, description="seed of the perturbations and of the splits of the Inception Score")
    batch_size: int = Field(64, ge=1, description="images at a time")
    tags: dict[str, str | float | int] = Field(
        {}, description="further facts to write into every line, such as tokenizer=plain"
    )

    @model_validator(mode="after")
    def _something_to_do(self) -> "EvaluateRun":
        if self.tokenizer is None and not (self.latents and self.decoders):
            raise ValueError("nothing to evaluate; give tokenizer=PATH, or latents=[PATH] with decoders.NAME=PATH")
        special = sorted(OF_INCEPTION & set(self.metrics))
        if special and (self.extractor is None or self.extractor.name != "inception"):
            raise ValueError(f"{special[0]} needs extractor.name=inception, the network that defines it")
        needed = ({"rfid", "pfid"} | OF_SAMPLES) & set(self.metrics)
        if needed and self.extractor is None:
            folder = "extractor.path, the folder of a saved classifier"
            raise ValueError(f"{sorted(needed)[0]} needs {folder}, or extractor.name=inception")
        return self


def evaluate(run: EvaluateRun) -> list[Measurement]:
    """Measure everything that was asked for and applies; append the lines to metrics.jsonl.

    Raises:
        UserError: tokenizers, latents or data are missing or do not belong together.
    """
    accelerator = start_accelerator()
    judge = Judge(accelerator, run)
    found: list[Measurement] = []
    if run.tokenizer is not None:
        found += judge.reconstructions(load_tokenizer(run.tokenizer))
    if run.latents and run.decoders:
        found += judge.samples()
    if accelerator.is_main_process:
        try:
            run.out.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"cannot write to {run.out}: {error.strerror}; choose another out=FOLDER") from None
        for measurement in found:
            append_line(run.out / "metrics.jsonl", measurement.line())
    return found


@dataclass(frozen=True)
class FeatureSet:
    """A set of images in feature space, of all processes: what its metrics share.

    Attributes:
        statistics: of the features.
        features: (N, F) in the order of the set; None unless a metric needs them one by one.
        logits: (N, 1008); None unless the Inception Score is asked for.
        spatial: statistics of the spatial features; None unless sFID is asked for.
    """

    statistics: GaussianStatistics
    features: Tensor | None
    logits: Tensor | None
    spatial: GaussianStatistics | None

    @cached_property
    def factor(self) -> Tensor:
        """Of the covariance, for many comparisons with one reference."""
        return covariance_factor(self.statistics)

    @cached_property
    def spatial_factor(self) -> Tensor:
        """The same of the spatial features."""
        return covariance_factor(self.spatial)


class Judge:
    """Real images in one feature space, and what is compared with them. Shares the work among processes.

    Args:
        accelerator: devices and processes.
        run: what to measure.
    """

    def __init__(self, accelerator: Accelerator, run: EvaluateRun) -> None:
        self.accelerator, self.run = accelerator, run
        self.device, self.rank, self.world = accelerator.device, accelerator.process_index, accelerator.num_processes
        self.extractor: FeatureExtractor | None = load_extractor(run.extractor, self.device) if run.extractor else None
        self.images: dict[tuple[int, str], ImageDataset] = {}
        self.references: dict[tuple[int, str], FeatureSet] = {}

    def reconstructions(self, tokenizer: Tokenizer) -> list[Measurement]:
        """Reconstruction metrics on the test split, encoded once: rFID, pFID, PSNR, SSIM, use of the codebook."""
        tokenizer, wanted = tokenizer.to(self.device), self.run.metrics
        images, decode = self._open(tokenizer, "test"), self._decode(tokenizer)
        encoded, sums = [], torch.zeros(3, dtype=torch.float64)
        statistics = GaussianStatistics(self.extractor.dim) if "rfid" in wanted else None
        for batch in self._batches(images):
            with torch.no_grad():
                tokens = tokenizer.encode(batch.images.to(self.device))
            pixels, real = decode(tokens), to_pixels(batch.images).to(self.device)
            encoded.append((batch.indices, tokens.cpu()))
            if "psnr" in wanted:  # identical images would make the mean infinite
                sums[0] += psnr(pixels, real).clamp(max=100).sum().cpu()
            if "ssim" in wanted:
                sums[1] += ssim(pixels, real).sum().cpu()
            if statistics is not None:
                statistics.update(self.extractor(pixels).cpu())
            sums[2] += len(tokens)
        tokens = self._in_order(encoded)  # (N, L), the same in every process
        sums = self._sum(sums)
        line = partial(self._measurement, samples=len(tokens), reference=images)
        found = []
        for i, name in enumerate(("psnr", "ssim")):
            if name in wanted:
                found.append(line(name, Estimate((sums[i] / sums[2]).item(), None), features=False))
        if "codebook" in wanted and tokenizer.kind == "discrete":
            counts = count_tokens(tokens, len(tokenizer.codebook))
            found.append(line("codebook_usage", Estimate(codebook_usage(counts), None), features=False))
            found.append(line("codebook_perplexity", Estimate(codebook_perplexity(counts), None), features=False))
        if statistics is not None:
            reference = self._reference(images, "test")
            value = frechet_distance(self._sum_statistics(statistics), reference.statistics, reference.factor)
            found.append(line("rfid", Estimate(value, None), **self._honesty(reference.statistics, paired=True)))
        if "pfid" in wanted and tokenizer.kind == "discrete":
            found += self._perturbed(tokenizer, tokens, self._reference(images, "test").statistics, line)
        return found

    def _perturbed(
        self, tokenizer: Tokenizer, tokens: Tensor, reference: GaussianStatistics, line: Callable[..., Measurement]
    ) -> list[Measurement]:
        """Every cell of pFID and their mean, over the perturbation seeds."""
        run = self.run
        strengths = run.grid.strengths(len(tokenizer.codebook))
        neighbours = nearest_codes(tokenizer.codebook, max(strengths)).cpu()
        runs = []
        for seed in range(run.seed, run.seed + run.perturbation_seeds):
            cells = perturbed_cells(
                run.grid, tokens, neighbours, self._decode(tokenizer), self.extractor, reference, seed,
                run.batch_size, self.rank, self.world, self._sum,
            )  # fmt: skip
            runs.append(summarise(cells))
        protocol = {"grid": run.grid.name, "neighbour_of": "code", "include_self": False, "selection": "exact"}
        found = []
        for cells in zip(*(r.cells for r in runs), strict=True):
            estimate = mean_and_standard_error([cell.value for cell in cells])
            found.append(line("pfid", estimate, rate=cells[0].rate, strength=cells[0].strength, **protocol))
        found.append(line("pfid_mean", mean_and_standard_error([r.mean for r in runs]), cells=len(found), **protocol))
        found.append(line("pfid_geometric_mean", mean_and_standard_error([r.geometric_mean for r in runs]), **protocol))
        return found

    def samples(self) -> list[Measurement]:
        """Each decoder's metrics on the same latents, differences of gFID, and the gap of the latents themselves."""
        run, sets = self.run, [LatentCache(path) for path in self.run.latents]
        found, values = [], {}
        for name, path in run.decoders.items():
            tokenizer = load_tokenizer(path).to(self.device)
            for cache in sets:
                check_cache(cache, encoder_digest(tokenizer))
            images = self._open(tokenizer, "train")
            facts = {"decoder": name, "sets": len(sets)} | _post_training_facts(path) | _sampling_facts(sets)
            counts = {"samples": sum(len(cache) for cache in sets), "reference": images}
            line = partial(self._measurement, **counts, **facts)
            if OF_SAMPLES & set(run.metrics):
                compared = [self._compare(tokenizer, _all(cache), self._reference(images, "train")) for cache in sets]
                for metric, (one, details) in compared[0].items():
                    several = [estimates[metric][0].value for estimates in compared]
                    estimate = mean_and_standard_error(several) if len(sets) > 1 else one
                    found.append(line(metric, estimate, **({"samples_per_set": len(sets[0])} | details)))
                values[name] = [estimates["gfid"][0].value for estimates in compared if "gfid" in estimates]
            if "gap" in run.metrics and name == next(iter(run.decoders)):
                found += self._gap(tokenizer, sets, images, line)
            # The same latents decoded twice: the difference has far less noise than either value.
            for other in list(values)[:-1] if "gfid" in run.metrics else []:
                change = mean_and_standard_error([a - b for a, b in zip(values[name], values[other], strict=True)])
                found.append(line("gfid_difference", change, versus=other))
        return found

    def _compare(
        self, tokenizer: Tokenizer, latents: Tensor, real: FeatureSet
    ) -> dict[str, tuple[Estimate, dict[str, Any]]]:
        """All metrics of one set of latents (N, L), decoded once, each with what it depends on."""
        wanted = set(self.run.metrics)
        own = torch.arange(len(latents))[self.rank :: self.world].split(self.run.batch_size)
        decode = self._decode(tokenizer)
        fake = self._features(((indices, decode(latents[indices])) for indices in own if len(indices)), wanted)
        found = {}
        if "gfid" in wanted:
            value = frechet_distance(fake.statistics, real.statistics, real.factor)
            found["gfid"] = Estimate(value, None), self._honesty(fake.statistics)
        if "sfid" in wanted:
            value = frechet_distance(fake.spatial, real.spatial, real.spatial_factor)
            found["sfid"] = Estimate(value, None), {"features": "mixed_6/conv, 7 channels, 17 x 17"}
        if "kid" in wanted:
            # Unbiased at every size, and quadratic in it: a part of a large reference is as good.
            some = real.features[:: -(-len(real.features) // KID_IMAGES)]
            found["kid"] = kernel_distance(fake.features, some), {"reference_samples": len(some)}
        if wanted & {"precision", "recall"}:
            both = precision_recall(real=real.features, fake=fake.features)
            sizes = {"k": both.k, "reference_samples": both.real}
            for name in sorted(wanted & {"precision", "recall"}):
                found[name] = Estimate(getattr(both, name), None), sizes
        if "inception_score" in wanted:
            score = inception_score(fake.logits, rng=torch.Generator().manual_seed(self.run.seed))
            spread = {"splits": score.splits, "standard_deviation_over_splits": score.standard_deviation}
            found["inception_score"] = Estimate(score.mean, None), spread
        return found

    def _gap(
        self, tokenizer: Tokenizer, sets: list[LatentCache], images: ImageDataset, line: Callable[..., Measurement]
    ) -> list[Measurement]:
        """How far the generated latents are from those of real images."""
        encoded = [
            (batch.indices, tokenizer.encode(batch.images.to(self.device)).cpu()) for batch in self._batches(images)
        ]
        gap = latent_gap(torch.cat([_all(cache) for cache in sets]), self._in_order(encoded), tokenizer.codebook.cpu())
        facts = {"latent_distance": gap.distance, "token_divergence": gap.divergence}
        facts["generated_usage"] = gap.generated_usage
        return [line(name, Estimate(value, None)) for name, value in facts.items()]

    def _open(self, tokenizer: Tokenizer, split: str) -> ImageDataset:
        """Images of a split, opened once: they remember which of them turned out to be broken."""
        key = (tokenizer.image_size, split)
        if key not in self.images:
            self.images[key] = open_images(self.run.data, *key)
        return self.images[key]

    def _reference(self, images: ImageDataset, split: str) -> FeatureSet:
        """Real images of a split in feature space, computed once."""
        key = (images.image_size, split)
        if key not in self.references:
            batches = ((batch.indices, to_pixels(batch.images).to(self.device)) for batch in self._batches(images))
            kept = set(self.run.metrics) - {"inception_score"} if split == "train" else ()
            self.references[key] = self._features(batches, kept)
        return self.references[key]

    def _features(self, batches: Iterable[tuple[Tensor, Tensor]], metrics: Collection[str]) -> FeatureSet:
        """What these metrics need of the images of all processes, given the places and pixels of this one's."""
        statistics = GaussianStatistics(self.extractor.dim)
        spatial = GaussianStatistics(SPATIAL_DIM) if "sfid" in metrics else None
        features, logits = [], []
        for indices, pixels in batches:
            if OF_INCEPTION & set(metrics):
                found = self.extractor.features(pixels)
                pool = found.pool.cpu()
                if "inception_score" in metrics:
                    logits.append((indices, found.logits.cpu()))
                if spatial is not None:
                    spatial.update(found.spatial.cpu())
            else:
                pool = self.extractor(pixels).cpu()
            statistics.update(pool)
            if ONE_BY_ONE & set(metrics):
                features.append((indices, pool))
        return FeatureSet(
            self._sum_statistics(statistics),
            self._in_order(features) if ONE_BY_ONE & set(metrics) else None,
            self._in_order(logits) if "inception_score" in metrics else None,
            self._sum_statistics(spatial) if spatial is not None else None,
        )

    def _honesty(self, statistics: GaussianStatistics, paired: bool = False) -> dict[str, Any]:
        """The bias of a Frechet distance of so many samples and, for FID, what it means."""
        bias = frechet_bias(statistics)
        inception = self.run.extractor.name == "inception"
        note = small_sample_note(statistics.count, bias, statistics.dim, paired) if inception else None
        return {"bias": bias} | ({"note": note} if note else {})

    def _batches(self, images: ImageDataset) -> Iterator[Batch]:
        return batches_in_order(images, self.run.batch_size, self.rank, self.world)

    def _decode(self, tokenizer: Tokenizer) -> Callable[[Tensor], Tensor]:
        @torch.no_grad()
        def decode(tokens: Tensor) -> Tensor:
            return to_pixels(tokenizer.decode(tokens.to(self.device)))

        return decode

    def _sum(self, tensor: Tensor) -> Tensor:
        if self.world == 1:
            return tensor
        return self.accelerator.reduce(tensor.to(self.device), "sum").cpu()

    def _sum_statistics(self, statistics: GaussianStatistics) -> GaussianStatistics:
        return GaussianStatistics.from_tensor(self._sum(statistics.as_tensor()))

    def _in_order(self, parts: Sequence[tuple[Tensor, Tensor]]) -> Tensor:
        """Rows (N, ...) of all processes, such as tokens, in the order of the set."""
        if self.world > 1:
            parts = gather_object(list(parts))
        indices = torch.cat([i for i, _ in parts])
        return torch.cat([t for _, t in parts])[indices.argsort()]

    def _measurement(
        self,
        metric: str,
        estimate: Estimate,
        *,
        samples: int,
        reference: ImageDataset,
        features: bool = True,
        **details: Any,
    ) -> Measurement:
        versions = {name: importlib.metadata.version(name) for name in ("robustok", "torch")}
        extractor = self.extractor.name if features and self.extractor is not None else None
        facts = dict(self.run.tags) | details | {"uint8": "trunc(127.5 x + 128)", "versions": versions}
        return Measurement(
            metric,
            estimate.value,
            estimate.standard_error,
            samples,
            self.run.seed,
            extractor,
            reference.describe(),
            facts,
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
