"""The `evaluate` command: images from any source to numbers with their protocol.

    robustok evaluate data.name=folder data.path=imagenet tokenizer=runs/tok ...             reconstructions
    robustok evaluate samples.latents=[runs/samples] samples.decoders.before=A samples.decoders.after=B ...
    robustok evaluate samples.generator=runs/gen tokenizer=runs/tok ...                      samples made first
    robustok evaluate images.mine=samples.npz reference=VIRTUAL_imagenet256.npz ...          images of any program

Reconstructions are compared with the test split, samples with the train split or ``reference``. Images are made and
their features computed once for all metrics.
"""

from dataclasses import fields
from pathlib import Path
from typing import Annotated, Literal

from pydantic import AfterValidator, Field, model_validator

from robustok.config import Config
from robustok.data.loader import Workers
from robustok.data.sources import Data
from robustok.generators import SamplingConfig
from robustok.metrics import METRICS
from robustok.metrics.comparison import ComparisonConfig
from robustok.metrics.features import ExtractorConfig
from robustok.metrics.interpolation import InterpolationConfig
from robustok.metrics.lpips import Backbone
from robustok.metrics.noise import AnyNoiseGrid, NoiseGrid
from robustok.metrics.pfid import PerturbedGrid, RelativeGrid
from robustok.precision import DESCRIPTION, Precision
from robustok.types import Measurement


def _known_metrics(names: list[str] | Literal["all"]) -> list[str] | Literal["all"]:
    unknown = [] if names == "all" else [name for name in names if name not in METRICS]
    if unknown:
        raise ValueError(f"there is no metric {unknown[0]!r}; one of {', '.join(METRICS)}")
    return names


def _no_measured_fields(tags: dict[str, str | float | int]) -> dict[str, str | float | int]:
    measured = {field.name for field in fields(Measurement)} | {"uint8", "precision", "versions"}
    if taken := sorted(tags.keys() & measured):
        raise ValueError(f"{taken[0]!r} is measured and would be replaced; give the tag another name")
    return tags


MetricNames = Annotated[list[str] | Literal["all"], AfterValidator(_known_metrics)]


class SamplesConfig(Config):
    """Generated latents, and the tokenizers that decode them."""

    latents: list[Path] = Field(
        [], description="caches of free samples; several independent ones give a standard error"
    )
    generator: Path | None = Field(
        None, description="sample from it first, into out/samples; also how well it predicts real tokens (gap)"
    )
    count: int = Field(50_000, ge=2, description="samples of the generator in a set; exactly as many of each class")
    sets: int = Field(1, ge=1, le=1000, description="independent sets of samples of the generator")
    sampling: SamplingConfig | None = Field(None, description="null takes the settings stored with the generator")
    decoders: dict[str, Path] = Field(
        {}, description="names and tokenizers that decode the same latents, the first is the baseline; or tokenizer"
    )

    @model_validator(mode="after")
    def _something_to_decode(self) -> "SamplesConfig":
        if not self.latents and self.generator is None:
            raise ValueError("nothing to decode; give samples.latents=[PATH] or samples.generator=PATH")
        return self


class LPIPSConfig(Config):
    """The network of LPIPS."""

    net: Backbone = Field("alex", description="it is part of the metric's name")
    weights: Path | None = Field(None, description="file of its weights; null is torch.hub's cache or download")
    linear: Path | None = Field(
        None, description="file of the linear layers, weights/v0.1/NET.pth; null: that of the lpips package"
    )


class PFIDConfig(Config):
    """Grids of pFID, and of ``noise_fd``, which is measured in its place on continuous latents."""

    grid: PerturbedGrid = Field(RelativeGrid(), description="cells of pFID")
    include_self: bool = Field(True, description="whether a token is among its own neighbours, as in the paper")
    noise: AnyNoiseGrid = Field(NoiseGrid(), description="cells of noise_fd")
    seeds: int = Field(1, ge=1, le=1000, description="repetitions, for the standard error")

    @property
    def calibrated(self) -> bool:
        """Whether a generator's samples choose the cells."""
        return "calibrated" in (self.grid.name, self.noise.name)


class FDrConfig(Config):
    """FDr-k, a mean over the feature spaces of ``extractor`` and ``more_extractors``."""

    normalisers: dict[str, Annotated[float, Field(gt=0)]] = Field(
        {},
        description="distances to divide by, for feature spaces by their names in results; those not given are of the "
        "test split to what samples are compared with",
    )


class EvaluateRun(Config):
    """What to measure. Numbers are appended to ``out``/metrics.jsonl and printed."""

    out: Path = Field(description="folder whose metrics.jsonl the results are appended to")
    data: Data | None = Field(
        None, description="real images: the test split for reconstructions, the train split for samples"
    )
    reference: Path | None = Field(
        None, description="what samples are compared with: images, or .npz statistics (mu, sigma); null is data's train"
    )
    cache: Path | None = Field(
        None, description="folder that keeps the statistics of real images; any file of it can be a reference"
    )
    tokenizer: Path | None = Field(
        None, description="tokenizer whose reconstructions are evaluated; also decodes samples without decoders"
    )
    samples: SamplesConfig | None = Field(None, description="generated latents and the tokenizers that decode them")
    images: dict[str, Path] = Field(
        {}, description="names and finished images to evaluate: a folder, .npz (arr_0), .npy or parquet"
    )
    paired_images: dict[str, Path] = Field(
        {}, description="the same, where image i was made from image i of the reference: also psnr, ssim, lpips"
    )
    adm_reference: int | None = Field(
        None,
        ge=1,
        description="size in pixels: also write out/reference.npz, the real images of this size for ADM's evaluator, "
        "with statistics if extractor.name=inception",
    )
    metrics: MetricNames = Field(
        ["rfid", "psnr", "codebook", "pfid", "gfid", "kid"],
        description=f"those of {', '.join(METRICS)}, or all; measured where they apply",
    )
    extractor: ExtractorConfig | None = Field(None, description="feature space of the distances")
    more_extractors: list[ExtractorConfig] = Field(
        [], description="further feature spaces, on the same images, such as [{name: dinov2}]"
    )
    pfid: PFIDConfig = PFIDConfig()
    ifid: InterpolationConfig = InterpolationConfig()
    fdr: FDrConfig = FDrConfig()
    lpips: LPIPSConfig = LPIPSConfig()
    comparison: ComparisonConfig = ComparisonConfig()
    allow_fewer: bool = Field(
        False, description="measure published protocols on fewer than their 50,000 images; the name then has @COUNT"
    )
    precision: Precision = Field(
        "float32",
        description=f"of encoding, sampling and decoding: {DESCRIPTION}; features and statistics are exact",
    )
    seed: int = Field(0, ge=0, description="seed of samples, perturbations, halves and shuffles")
    batch_size: int = Field(64, ge=1, description="images at a time")
    workers: Workers = None
    tags: Annotated[dict[str, str | float | int], AfterValidator(_no_measured_fields)] = Field(
        {}, description="further fields to write into every line, such as tokenizer=plain; none that is measured"
    )

    @property
    def wanted(self) -> set[str]:
        """Names of the metrics; of ``all``, those that feature space and data allow."""
        if self.metrics != "all":
            return set(self.metrics)
        possible = {name for name, metric in METRICS.items() if self.inception or not metric.needs_inception}
        return possible - {name for name in self._of_data if self.data is None}

    @property
    def _of_data(self) -> list[str]:
        """Metrics that take images of ``data`` whatever the reference is."""
        return [name for name, m in METRICS.items() if m.needs_data and not (name == "fdr" and self.fdr.normalisers)]

    @property
    def inception(self) -> bool:
        """Whether the feature space is that of the Inception network."""
        return self.extractor is not None and self.extractor.name == "inception"

    @model_validator(mode="after")
    def _something_to_do(self) -> "EvaluateRun":
        undecoded = self.samples is not None and not self.samples.decoders and self.tokenizer is None
        something = self.tokenizer or self.samples or self.images or self.paired_images or self.adm_reference
        if undecoded or not something:
            raise ValueError(
                "nothing to evaluate; give tokenizer=PATH, samples.latents=[PATH] or samples.generator=PATH with "
                "samples.decoders.NAME=PATH, or images.NAME=PATH"
            )
        reconstructs = self.tokenizer is not None and (self.samples is None or self.samples.generator is None)
        if self.data is None and (self.reference is None or reconstructs):
            raise ValueError(
                "no real images to compare with; give data.name=... data.path=..., or reference=PATH for samples"
            )
        for name in sorted(self.wanted):
            if METRICS[name].needs_inception and not self.inception:
                raise ValueError(f"{name} needs extractor.name=inception, the network that defines it")
            if METRICS[name].needs_extractor and self.extractor is None:
                folder = "extractor.path, the folder of a saved classifier"
                raise ValueError(f"{name} needs {folder}, or extractor.name=inception")
        if self.pfid.calibrated and self.samples is None:
            raise ValueError(
                "a calibrated grid of pfid is chosen by a generator's samples; give samples.latents=[PATH] or "
                "samples.generator=PATH"
            )
        if self.data is None and (lacking := [name for name in self._of_data if name in self.wanted]):
            raise ValueError(f"{lacking[0]} takes real images beside the reference; give data.name=... data.path=...")
        if self.comparison.halves == 1:
            raise ValueError("comparison.halves=1 has no spread; give at least 2, or 0 for none")
        return self
