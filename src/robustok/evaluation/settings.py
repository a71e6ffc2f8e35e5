"""The `evaluate` verb: images from anywhere to numbers with their protocol.

    robustok evaluate data.name=folder data.path=imagenet tokenizer=runs/tok ...      reconstructions
    robustok evaluate latents=[runs/samples] decoders.before=A decoders.after=B ...   decoders on the same latents
    robustok evaluate generator=runs/gen tokenizer=runs/tok ...                       samples made on the way
    robustok evaluate images.mine=samples.npz reference=VIRTUAL_imagenet256.npz ...   images of any program

rFID and pFID compare reconstructions with the test split, gFID and its kin samples with the train split or with
``reference``. Images are made and their features computed once for all metrics.
"""

from pathlib import Path
from typing import Literal, get_args

from pydantic import Field, model_validator

from robustok.config import Config
from robustok.data.sources import Data
from robustok.evaluation.comparison import COMPARED, OF_INCEPTION
from robustok.generators import SamplingConfig
from robustok.metrics.features import ExtractorConfig
from robustok.metrics.noise import NoiseGrid
from robustok.metrics.pfid import PerturbedGrid, RelativeGrid

Reconstruction = Literal["rfid", "psnr", "ssim", "lpips", "codebook", "token_agreement", "pfid", "noise_fd"]


Generation = Literal["gfid", "kid", "precision", "recall", "sfid", "inception_score", "gfid_infinity", "gap"]


OF_REFERENCE = {"rfid", "pfid", "noise_fd"} | COMPARED  # need a feature space


class EvaluateRun(Config):
    """What to measure. Numbers are appended to ``out``/metrics.jsonl and printed."""

    out: Path = Field(description="folder whose metrics.jsonl the results are appended to")
    data: Data | None = Field(
        None, description="real images: the test split for reconstructions, the train split for samples"
    )
    tokenizer: Path | None = Field(None, description="tokenizer whose reconstructions are judged")
    latents: list[Path] = Field(
        [], description="caches of free samples; several independent ones give a standard error"
    )
    decoders: dict[str, Path] = Field(
        {}, description="names and tokenizers that decode the same latents; the first is the baseline"
    )
    generator: Path | None = Field(
        None, description="sample from it first, into out/samples; also how well it predicts real tokens (gap)"
    )
    count: int = Field(50_000, ge=2, description="samples of the generator in a set; exactly as many of each class")
    sets: int = Field(1, ge=1, description="independent sets of samples of the generator")
    sampling: SamplingConfig | None = Field(None, description="null takes the settings stored with the generator")
    images: dict[str, Path] = Field(
        {}, description="names and finished images to evaluator: a folder, .npz (arr_0), .npy or parquet"
    )
    paired: bool = Field(
        False, description="image i of such a set belongs to image i of the reference: psnr, ssim, lpips apply"
    )
    reference: Path | None = Field(
        None, description="what samples are compared with: images, or .npz statistics (mu, sigma); null is data's train"
    )
    cache: Path | None = Field(
        None, description="folder that keeps the statistics of real images; any file of it can be a reference"
    )
    metrics: list[Reconstruction | Generation] | Literal["all"] = Field(
        ["rfid", "psnr", "codebook", "pfid", "gfid", "kid"],
        description="those that apply to what is given are measured; all is everything",
    )
    extractor: ExtractorConfig | None = Field(None, description="feature space of the distances")
    more_extractors: list[ExtractorConfig] = Field(
        [], description="further feature spaces, on the same images, such as [{name: dinov2}]"
    )
    lpips_net: Literal["alex", "vgg"] = Field("alex", description="network of lpips; it is part of the metric's name")
    lpips_weights: Path | None = Field(None, description="file of its weights; null is torch.hub's cache or download")
    grid: PerturbedGrid = Field(RelativeGrid(), description="cells of pFID")
    noise: NoiseGrid = Field(
        NoiseGrid(), description="cells of noise_fd, which stands in for pFID on continuous latents"
    )
    include_self: bool = Field(False, description="pFID: a token may be replaced by itself, as in released training")
    perturbation_seeds: int = Field(1, ge=1, description="repetitions of pFID, for its standard error")
    halves: int = Field(
        0, ge=0, description="random halves behind the standard errors of rFID and of gFID of one set; 10 are enough"
    )
    distance_dtype: Literal["float64", "float32", "float16"] = Field(
        "float64", description="distances of precision and recall; float16 is ADM's"
    )
    shuffle: bool = Field(True, description="shuffle images before the splits of the Inception Score; ADM does not")
    allow_fewer: bool = Field(
        False, description="measure published protocols on fewer than their 50,000 images; the name then carries @COUNT"
    )
    seed: int = Field(0, ge=0, description="seed of samples, perturbations, halves and shuffles")
    batch_size: int = Field(64, ge=1, description="images at a time")
    tags: dict[str, str | float | int] = Field(
        {}, description="further facts to write into every line, such as tokenizer=plain"
    )

    @property
    def wanted(self) -> set[str]:
        """Names of the metrics; of ``all``, those that the feature space allows."""
        if self.metrics != "all":
            return set(self.metrics)
        everything = set(get_args(Reconstruction)) | set(get_args(Generation))
        return everything if self._inception else everything - OF_INCEPTION

    @property
    def _inception(self) -> bool:
        return self.extractor is not None and self.extractor.name == "inception"

    @model_validator(mode="after")
    def _something_to_do(self) -> "EvaluateRun":
        decoded = self.latents and self.decoders
        sampled = self.generator is not None and (self.tokenizer is not None or self.decoders)
        if not (self.tokenizer is not None or decoded or sampled or self.images):
            raise ValueError(
                "nothing to evaluate; give tokenizer=PATH, latents=[PATH] with decoders.NAME=PATH, "
                "generator=PATH with tokenizer=PATH, or images.NAME=PATH"
            )
        if self.data is None and (self.reference is None or (self.tokenizer is not None and self.generator is None)):
            raise ValueError(
                "no real images to compare with; give data.name=... data.path=..., or reference=PATH for samples"
            )
        wanted = self.wanted
        special = sorted(OF_INCEPTION & wanted)
        if special and not self._inception:
            raise ValueError(f"{special[0]} needs extractor.name=inception, the network that defines it")
        if OF_REFERENCE & wanted and self.extractor is None:
            folder = "extractor.path, the folder of a saved classifier"
            raise ValueError(f"{sorted(OF_REFERENCE & wanted)[0]} needs {folder}, or extractor.name=inception")
        if "gap" in self.metrics and self.data is None:
            raise ValueError("gap compares latents with those of real images; give data.name=... data.path=...")
        if self.halves == 1:
            raise ValueError("halves=1 has no spread; give at least 2, or 0 for none")
        return self
