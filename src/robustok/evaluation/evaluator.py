"""The evaluator: real images in one or more feature spaces, shared by all metrics and all processes."""

import importlib.metadata
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from robustok.console import note
from robustok.data.dataset import Batch, ImageDataset, described_shape, open_images
from robustok.data.latent_cache import LatentCache
from robustok.data.loader import batches_in_order
from robustok.data.pixels import to_pixels
from robustok.data.sources import Data, data_at
from robustok.errors import UserError
from robustok.evaluation.collector import FeatureCollector
from robustok.evaluation.settings import EvaluateRun
from robustok.files import regular_file
from robustok.metrics import METRICS
from robustok.metrics.comparison import REFERENCE_IMAGES, Comparison, Score, frechet_ratio
from robustok.metrics.features import load_extractor
from robustok.metrics.frechet import Estimate, check_varied, frechet_distance
from robustok.metrics.lpips import LPIPS
from robustok.metrics.processes import ALONE, Processes
from robustok.metrics.reference import Part, Reference, cached_reference, load_reference
from robustok.precision import Model, at_precision, cast_weights
from robustok.snapshots import read_header
from robustok.types import FeatureExtractor, Measurement, Tokenizer

KID_BELOW = 10_000  # images: where FID is mostly bias, KID is measured too


class Evaluator:
    """The real images of a run in its feature spaces, and what sets of images are compared with.

    A ``space`` is the index of a feature space.

    Args:
        run: what to measure.
        device: where to compute.
        processes: how images are shared.
    """

    def __init__(self, run: EvaluateRun, device: torch.device, processes: Processes = ALONE) -> None:
        self.run, self.device, self.processes, self.wanted = run, device, processes, run.wanted
        path = run.reference
        self.given_statistics = path is not None and path.suffix == ".npz" and "mu" in _keys(regular_file(path))
        configs = [run.extractor, *run.more_extractors] if run.extractor is not None else []
        self.extractors: list[FeatureExtractor] = [load_extractor(config, device) for config in configs]
        self.official = [config.name in ("inception", "dinov2") for config in configs]  # spaces of published values
        self.pair_metrics = {name: m.function for name, m in METRICS.items() if m.applies_to == "pairs"}
        if "lpips" in self.wanted:
            self.pair_metrics["lpips"] = LPIPS(run.lpips.net, run.lpips.weights, device, run.lpips.linear)
        self.opened: dict[tuple[Any, ...], ImageDataset] = {}
        self.references: dict[tuple[str, int], Reference] = {}
        self.normalisers: dict[tuple[int | tuple[int, int], int], float] = {}  # of FDr-k, by size and space

    def note_guides(self, decoder: Path) -> None:
        """Say which of the feature spaces guided the training of a decoder."""
        guides = read_header(decoder).get("guides", ())
        for extractor in self.extractors:
            if extractor.name in guides:
                note(
                    f"{decoder} was trained on the features of {extractor.name}, so distances measured in them flatter "
                    "it; evaluate in another feature space",
                    "yellow",
                )

    def wanted_of(self, applies_to: str, space: int = 0) -> list[str]:
        """The metrics to measure that apply to this, in the order of METRICS."""
        names = [name for name, m in METRICS.items() if name in self.wanted and m.applies_to == applies_to]
        return [name for name in names if space == 0 or not METRICS[name].needs_inception]

    def compare_set(
        self, batches: Iterable[tuple[Tensor, Tensor]], count: int, shape: int | tuple[int, int], paired: bool = False
    ) -> list[dict[str, Score]]:
        """All metrics of one set of ``count`` images in every feature space, by their names.

        Args:
            batches: indices (n,) and pixels (n, 3, H, W) of this process's images.
            count: images in the whole set.
            shape: their height and width.
            paired: whether image i was made from image i of the reference.
        """
        spaces = range(len(self.extractors))
        errors: set[Part] = {"features"} if self.run.comparison.halves else set()
        wanted = [self.wanted_of("samples", space) for space in spaces]
        # KID takes the two sets for independent, which pairs are not.
        if count < KID_BELOW and any(self.official) and not paired:
            references = [self.reference_of(shape, space, {"features"}) for space in spaces]
            if all(reference.features is not None for reference in references):
                wanted = [[name for name in METRICS if name in names or name == "kid"] for names in wanted]
        collectors = [
            FeatureCollector(extractor, errors.union(*(METRICS[name].parts for name in names)))
            for extractor, names in zip(self.extractors, wanted, strict=True)
        ]
        for indices, pixels in batches:
            for collector in collectors:
                collector.update(indices, pixels)
        found, distances = [], []
        for space, (collector, names) in enumerate(zip(collectors, wanted, strict=True)):
            real = self.reference_of(shape, space, errors if paired else set())
            sets = self.comparison(collector.finish("samples", self.processes), real, space, paired)
            if "gfid_validation" in names:
                sets = replace(sets, validation=self.validation(shape, space))
            scores = {name: METRICS[name].function(sets) for name in names if METRICS[name].function is not None}
            found.append({name: score for name, score in scores.items() if score is not None})
            if "fdr" in names:
                distances.append(sets.distance)
        if distances:
            found[0]["fdr"] = self._fdr(distances, shape)
        return found

    def validation(self, shape: int | tuple[int, int], space: int) -> Reference:
        """The images of data's test split, of the size of the samples, in a feature space.

        Raises:
            UserError: samples that are not square, as its crops are; features that are all alike.
        """
        images = self.open(self.run.data, _square(shape), "test")
        found = self.real_features(images, space)
        check_varied(found.statistics, found.describe())
        return found

    def _fdr(self, distances: list[float], shape: int | tuple[int, int]) -> Score:
        """FDr-k of a set of samples from its distances in all feature spaces."""
        names, given = [extractor.name for extractor in self.extractors], self.run.fdr.normalisers
        if unknown := sorted(given.keys() - set(names)):
            raise UserError(f"fdr.normalisers: {unknown[0]} is none of the feature spaces in use, {', '.join(names)}")
        used = {name: given[name] if name in given else self._normaliser(shape, i) for i, name in enumerate(names)}
        details = {"extractor": " + ".join(names), "normalisers": used, "normalisers_given": sorted(given)}
        return Score(Estimate(frechet_ratio(distances, list(used.values()))), details)

    def _normaliser(self, shape: int | tuple[int, int], space: int) -> float:
        """The Frechet distance of the validation images to what samples are compared with."""
        if (shape, space) not in self.normalisers:
            if self.run.data is None:
                name = self.extractors[space].name
                raise UserError(f"fdr has no distance to divide by in {name}; give data, or fdr.normalisers.{name}=")
            real, validation = self.reference_of(shape, space), self.validation(shape, space)
            found = frechet_distance(validation.statistics, real.statistics, real.factor)
            if not found > 0:
                raise UserError(f"{validation.data} is the reference too, so that fdr would divide by 0; give another")
            self.normalisers[shape, space] = found
        return self.normalisers[shape, space]

    def comparison(self, fake: Reference, real: Reference, space: int, paired: bool) -> Comparison:
        """Two sets in a feature space, compared as the run says.

        Raises:
            UserError: the features of the reference are all alike.
        """
        check_varied(real.statistics, real.describe())
        device = self.device if self.device.type == "cuda" else "cpu"  # MPS has no float64
        official = self.official[space]
        return Comparison(fake, real, self.run.comparison, self.run.seed, official, paired, device=device)

    def reference_of(self, shape: int | tuple[int, int], space: int, parts: set[Part] = frozenset()) -> Reference:
        """What samples of this size are compared with: the reference, or the train split."""
        if not self.given_statistics:
            return self.real_features(self.real_images(shape), space, parts)
        path, extractor = self.run.reference, self.extractors[space]
        key = (str(path), space)
        if key not in self.references:
            reference = load_reference(path, extractor.name)
            size = described_shape(reference.data)
            if size not in (None, shape, (shape, shape)):
                sizes = " and ".join("x".join(map(str, s if isinstance(s, tuple) else (s, s))) for s in (shape, size))
                raise UserError(f"samples and the images of {path} have {sizes} pixels; give statistics of one size")
            if (
                reference.features is None
                and "features" in self._reference_parts(space, parts)
                and "arr_0" in _keys(path)
            ):
                # ADM's file: moments of the whole data set, and beside them 10,000 images for precision and recall.
                images = self._collected(self.open(data_at(path), None, "train"), space, {"features"})
                reference = replace(reference, features=images.features)
            self.references[key] = reference
        return self.references[key]

    def reference_name(self, shape: int | tuple[int, int], space: int) -> str:
        """The ``reference`` of a result."""
        reference = self.reference_of(shape, space)
        return reference.describe() if self.given_statistics else reference.data  # which has count and digest already

    def real_images(self, shape: int | tuple[int, int]) -> ImageDataset:
        """Real images of a size: those of the reference, or the train split."""
        if self.run.reference is None:
            return self.open(self.run.data, _square(shape), "train")
        if isinstance(shape, int):
            return self.open(data_at(self.run.reference), shape, "train")
        images = self.open(data_at(self.run.reference), None, "train")
        if images.shape != shape:
            sizes = " and ".join("x".join(map(str, size)) for size in (shape, images.shape))
            raise UserError(f"samples and reference have {sizes} pixels; expected one size, crop one of them first")
        return images

    def real_features(self, images: ImageDataset, space: int, parts: set[Part] = frozenset()) -> Reference:
        """Real images in a feature space: computed once, or taken from the cache."""
        key, extractor = (images.fingerprint, space), self.extractors[space]
        if key not in self.references:
            if images.split == "train":
                parts = self._reference_parts(space, parts)
            if self.run.cache is None:
                self.references[key] = self._collected(images, space, parts)
            else:
                count = len(images) - len(images.broken)
                self.references[key] = cached_reference(
                    self.run.cache, extractor.name, images.describe(), count,
                    lambda: self._collected(images, space, parts), parts, self.processes.rank == 0, images.stamp,
                )  # fmt: skip
        return self.references[key]

    def _reference_parts(self, space: int, parts: set[Part]) -> set[Part]:
        """These parts and all that any metric of samples needs, so that no features are computed twice."""
        return set(parts).union(*(METRICS[name].reference_parts for name in self.wanted_of("samples", space)))

    def _collected(self, images: ImageDataset, space: int, parts: set[Part]) -> Reference:
        collector = FeatureCollector(self.extractors[space], parts, every=-(-len(images) // REFERENCE_IMAGES))
        for batch in self.batches(images):
            collector.update(batch.indices, batch.pixels)
        return collector.finish(images.describe(), self.processes)

    def open(self, data: Data, size: int | None, split: str) -> ImageDataset:
        """Images of a split, opened once: they remember which of them turned out to be broken."""
        key = (repr(data), size, split)
        if key not in self.opened:
            self.opened[key] = open_images(data, size, split)
        return self.opened[key]

    def batches(self, images: ImageDataset) -> Iterator[Batch]:
        """This process's share of a set of images, in order, on the device."""
        share = self.run.batch_size, self.processes.rank, self.processes.world
        return batches_in_order(images, *share, self.run.workers, self.device)

    def own(self, count: int) -> Iterator[Tensor]:
        """Indices of this process's share of a set, a batch at a time."""
        return self.processes.batches(count, self.run.batch_size)

    def decoder(self, tokenizer: Tokenizer) -> Callable[[Tensor], Tensor]:
        """Function of latents to pixels (n, 3, H, W) uint8."""

        @torch.no_grad()
        def decode(latents: Tensor) -> Tensor:
            with self.precisely():
                return to_pixels(tokenizer.decode(latents.to(self.device)))

        return decode

    @torch.no_grad()
    def encode(self, tokenizer: Tokenizer, images: Tensor) -> Tensor:
        """Latents of images (n, 3, H, W) in [-1, 1]."""
        with self.precisely():
            return tokenizer.encode(images)

    def ready(self, model: Model) -> Model:
        """A tokenizer or generator for computations in the run's precision, which changes digests of its weights."""
        return cast_weights(model, self.run.precision)

    def precisely(self) -> AbstractContextManager[Any]:
        """Context: the run's precision."""
        return at_precision(self.device, self.run.precision)

    def decoded(self, tokenizer: Tokenizer, cache: LatentCache) -> Iterator[tuple[Tensor, Tensor]]:
        """Indices (n,) and pixels (n, 3, H, W) of this process's share of the latents, a batch at a time."""
        decode = self.decoder(tokenizer)
        return ((indices, decode(cache.read(indices).latents)) for indices in self.own(len(cache)))

    def check_count(self, applies_to: str, count: int) -> None:
        """Refuse metrics on fewer images than their published protocols have.

        Raises:
            UserError: a metric has more, without ``allow_fewer``.
        """
        short = sorted(name for name in self.wanted_of(applies_to) if count < METRICS[name].published)
        if short and any(self.official) and not self.run.allow_fewer:
            raise UserError(
                f"{short[0]} is published on {METRICS[short[0]].published:,} images, there are {count:,}; "
                f"with allow_fewer=true it is measured as {short[0]}@{count}"
            )

    def measurement(
        self,
        metric: str,
        estimate: Estimate,
        *,
        samples: int,
        reference: str,
        space: int | None = None,
        extractor: str | None = None,
        **details: Any,
    ) -> Measurement:
        """A number with its protocol; @COUNT is added to the name where its published protocol has more images.

        ``extractor`` names the feature spaces of a metric of several; otherwise it is that of ``space``.
        """
        versions = {name: importlib.metadata.version(name) for name in ("robustok", "torch")}
        if "source" not in details:  # which finished images have, that no network of this run made
            details = {"precision": self.run.precision} | details
        for name in sorted(self.run.tags.keys() & details):
            warnings.warn(f"tags.{name} is left out of the lines in which {name} is measured", stacklevel=2)
        details = {"uint8": "trunc(127.5 x + 128)"} | dict(self.run.tags) | details | {"versions": versions}
        base = METRICS.get(metric.removesuffix("_mean").removesuffix("_geometric").removesuffix("_cell"))
        count = details.get("samples_per_set", samples)
        if space is not None and self.official[space] and base is not None and count < base.published:
            metric += f"@{count}"
        name = extractor or (self.extractors[space].name if space is not None else None)
        return Measurement(
            metric, estimate.value, estimate.standard_error, samples, self.run.seed, name, reference, details
        )


def _square(shape: int | tuple[int, int]) -> int:
    """The side of square images, which data's crops are.

    Raises:
        UserError: they are not square.
    """
    height, width = (shape, shape) if isinstance(shape, int) else shape
    if height != width:
        raise UserError(f"images of {height}x{width} are not square as data's crops; give reference=PATH")
    return height


def _keys(path: Path) -> list[str]:
    """Names of the arrays in an .npz file."""
    try:
        with np.load(path, allow_pickle=False) as file:
            return list(file.files)
    except Exception:  # load_reference will say what is wrong with the file
        return ["mu"]
