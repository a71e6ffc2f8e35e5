"""The evaluator: real images in one or more feature spaces, shared by all metrics and all processes."""

import importlib.metadata
from collections.abc import Callable, Collection, Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch import Tensor

from robustok.data.dataset import ImageDataset, open_images
from robustok.data.latent_cache import LatentCache
from robustok.data.loader import batches_in_order
from robustok.data.pixels import to_pixels
from robustok.data.sources import Data, data_at
from robustok.errors import UserError
from robustok.evaluation.comparison import COMPARED, REFERENCE_IMAGES, Comparison, FeatureCollector, Processes, compare
from robustok.evaluation.settings import EvaluateRun
from robustok.metrics.features import load_extractor
from robustok.metrics.frechet import Estimate
from robustok.metrics.lpips import LPIPS
from robustok.metrics.reference import Reference, cached_reference, load_reference
from robustok.types import Batch, FeatureExtractor, Measurement, Tokenizer

# Published values of these stand on as many images; kid and gfid_infinity are made for fewer.
PUBLISHED = dict.fromkeys(
    ("rfid", "pfid", "noise_fd", "gfid", "sfid", "inception_score", "precision", "recall"), 50_000
)
KID_BELOW = 10_000  # images: where FID is mostly bias, KID goes beside it


class Evaluator:
    """Real images in the feature spaces of a run, and what is compared with them. Shares the work among processes.

    Args:
        accelerator: devices and processes.
        run: what to measure.
    """

    def __init__(self, accelerator: Accelerator, run: EvaluateRun) -> None:
        self.run, self.device, self.wanted = run, accelerator.device, run.wanted
        self.main = accelerator.is_main_process
        path = run.reference
        self.given_statistics = path is not None and path.suffix == ".npz" and "mu" in _keys(path)
        configs = [run.extractor, *run.more_extractors] if run.extractor is not None else []
        self.extractors: list[FeatureExtractor] = [load_extractor(config, self.device) for config in configs]
        self.official = [config.name != "classifier" for config in configs]  # spaces of published values
        self.lpips = LPIPS(run.lpips_net, run.lpips_weights, self.device) if "lpips" in self.wanted else None
        self.processes = Processes(
            accelerator.process_index,
            accelerator.num_processes,
            lambda tensor: accelerator.reduce(tensor.to(self.device), "sum").cpu(),
            gather_object if accelerator.num_processes > 1 else lambda parts: parts,
        )
        self.opened: dict[tuple[Any, ...], ImageDataset] = {}
        self.references: dict[tuple[str, int], Reference] = {}

    def compare_set(
        self, batches: Iterable[tuple[Tensor, Tensor]], count: int, shape: int | tuple[int, int], paired: bool = False
    ) -> list[dict[str, tuple[Estimate, dict[str, Any]]]]:
        """All metrics of one set of images, in every feature space, each with what it depends on."""
        wanted = (self.wanted & COMPARED) | ({"errors"} if self.run.halves else set())
        if count < KID_BELOW and any(self.official) and not paired:  # its error takes the sets for independent
            references = [self.reference_of(shape, space, wanted | {"kid"}) for space in range(len(self.extractors))]
            wanted |= {"kid"} if all(reference.features is not None for reference in references) else set()
        collectors = [
            FeatureCollector(extractor, wanted if space == 0 else wanted - {"sfid", "inception_score"})
            for space, extractor in enumerate(self.extractors)
        ]
        for indices, pixels in batches:
            for collector in collectors:
                collector.update(indices, pixels)
        run, found = self.run, []
        for space, collector in enumerate(collectors):
            how = Comparison(
                collector.metrics, run.halves, run.distance_dtype, run.shuffle, run.seed, self.official[space], paired
            )
            found.append(
                compare(collector.finish("samples", self.processes), self.reference_of(shape, space, wanted), how)
            )
        return found

    def reference_of(self, shape: int | tuple[int, int], space: int, wanted: Collection[str] = ()) -> Reference:
        """What samples of this size are compared with: the reference, or the train split."""
        path = self.run.reference
        if not self.given_statistics:
            return self.described(self.real_images(shape), space, wanted)
        extractor, key = self.extractors[space], (str(path), space)
        if key not in self.references:
            reference = load_reference(path, extractor.name)
            one_by_one = {"kid", "precision", "recall"} & set(wanted)
            if reference.features is None and one_by_one and _has_images(path):
                # ADM's file: moments of the whole data set, and beside them 10,000 images for precision and recall.
                collector = FeatureCollector(extractor, one_by_one)
                for batch in self.batches(self.open(data_at(path), None, "train")):
                    collector.update(batch.indices, to_pixels(batch.images).to(self.device))
                reference = replace(reference, features=collector.finish("", self.processes).features)
            self.references[key] = reference
        return self.references[key]

    def reference_name(self, shape: int | tuple[int, int], space: int) -> str:
        """What results say they were compared with."""
        reference = self.reference_of(shape, space)
        return reference.describe() if self.given_statistics else reference.data  # which says all of it already

    def real_images(self, shape: int | tuple[int, int]) -> ImageDataset:
        """Real images of a size: those of the reference, or the train split."""
        if self.run.reference is None:
            size = shape if isinstance(shape, int) else shape[0]
            if not isinstance(shape, int) and shape[0] != shape[1]:
                raise UserError(f"images of {shape[0]}x{shape[1]} are not square as data's crops; give reference=PATH")
            return self.open(self.run.data, size, "train")
        if isinstance(shape, int):
            return self.open(data_at(self.run.reference), shape, "train")
        images = self.open(data_at(self.run.reference), None, "train")
        if images.shape != shape:
            sizes = " and ".join("x".join(map(str, size)) for size in (shape, images.shape))
            raise UserError(f"samples and reference have {sizes} pixels; expected one size, crop one of them first")
        return images

    def described(self, images: ImageDataset, space: int, wanted: Collection[str] = ()) -> Reference:
        """Real images in feature space: computed once, or taken from the cache."""
        key, extractor = (images.fingerprint, space), self.extractors[space]
        # What any later comparison may need, so that nothing is described twice.
        kept = set(wanted) | (
            self.wanted & {"kid", "precision", "recall", "sfid"} if images.split == "train" else set()
        )
        kept -= {"inception_score", "gfid_infinity"} | ({"sfid"} if space else set())

        def make() -> Reference:
            collector = FeatureCollector(extractor, kept, every=-(-len(images) // REFERENCE_IMAGES))
            for batch in self.batches(images):
                collector.update(batch.indices, to_pixels(batch.images).to(self.device))
            return collector.finish(images.describe(), self.processes)

        if key not in self.references:
            if self.run.cache is None:
                self.references[key] = make()
            else:
                needs = {"features"} if kept & {"kid", "precision", "recall"} else set()
                needs |= {"spatial"} if "sfid" in kept else set()
                count = len(images) - len(images.broken)
                self.references[key] = cached_reference(
                    self.run.cache, extractor.name, images.describe(), count, make, needs, write=self.main
                )
        return self.references[key]

    def open(self, data: Data, size: int | None, split: str) -> ImageDataset:
        """Images of a split, opened once: they remember which of them turned out to be broken."""
        key = (data.model_dump_json(), size, split)
        if key not in self.opened:
            self.opened[key] = open_images(data, size, split)
        return self.opened[key]

    def batches(self, images: ImageDataset) -> Iterator[Batch]:
        """This process's share of a set of images, in order."""
        return batches_in_order(images, self.run.batch_size, self.processes.rank, self.processes.world)

    def own(self, count: int) -> Iterator[Tensor]:
        """Places of this process's share of a set, a batch at a time."""
        own = torch.arange(count)[self.processes.rank :: self.processes.world]
        return (indices for indices in own.split(self.run.batch_size) if len(indices))

    def decoder(self, tokenizer: Tokenizer) -> Callable[[Tensor], Tensor]:
        """Function of latents to pixels (n, 3, H, W) uint8."""

        @torch.no_grad()
        def decode(latents: Tensor) -> Tensor:
            return to_pixels(tokenizer.decode(latents.to(self.device)))

        return decode

    def decoded(self, tokenizer: Tokenizer, cache: LatentCache) -> Iterator[tuple[Tensor, Tensor]]:
        """Places (n,) and pixels (n, 3, H, W) of this process's share of the latents, a batch at a time."""
        decode, latents = self.decoder(tokenizer), cache.read(slice(None)).latents
        return ((indices, decode(latents[indices])) for indices in self.own(len(latents)))

    def check_counts(self, metrics: Collection[str], count: int) -> None:
        """Refuse published protocols on fewer images than they have.

        Raises:
            UserError: a metric has more, and nobody said ``allow_fewer``.
        """
        short = sorted(name for name in self.wanted & set(metrics) if count < PUBLISHED.get(name, 0))
        if short and any(self.official) and not self.run.allow_fewer:
            raise UserError(
                f"{short[0]} is published on {PUBLISHED[short[0]]:,} images, there are {count:,}; "
                f"with allow_fewer=true it is measured as {short[0]}@{count}"
            )

    def measurement(
        self, metric: str, estimate: Estimate, *, samples: int, reference: str, space: int | None = None, **details: Any
    ) -> Measurement:
        """A number with its protocol; a published one of fewer images than published is called by its count."""
        versions = {name: importlib.metadata.version(name) for name in ("robustok", "torch")}
        facts = {"uint8": "trunc(127.5 x + 128)"} | dict(self.run.tags) | details | {"versions": versions}
        base = metric.removesuffix("_mean").removesuffix("_geometric").removesuffix("_cell")
        count = details.get("samples_per_set", samples)
        if space is not None and self.official[space] and count < PUBLISHED.get(base, 0):
            metric += f"@{count}"
        name = self.extractors[space].name if space is not None else None
        return Measurement(
            metric, estimate.value, estimate.standard_error, samples, self.run.seed, name, reference, facts
        )


def _has_images(path: Path) -> bool:
    return "arr_0" in _keys(path)


def _keys(path: Path) -> list[str]:
    try:
        with np.load(path, allow_pickle=False) as file:
            return list(file.files)
    except Exception:  # whoever opens it next says what is wrong
        return ["mu"]
