"""The command `post-train`: with given pairs, with pairs of a generator at a given or the best sigma, or without pairs.

    robustok post-train pairs/llamagen.yaml tokenizer.weights=vq_ds16_c2i.pt generator.weights=c2i_L_256.pt ...
    robustok post-train tokenizer=runs/tok pairs=runs/pairs ...
    robustok post-train tokenizer=runs/tok generator=runs/gen latents=runs/latents sigma=0.9 ...
    robustok post-train tokenizer=runs/tok generator=runs/gen latents=runs/latents sigma=auto held_out.extractor... ...
    robustok post-train tokenizer=runs/tok generator=runs/gen objective=free adversarial.adaptive=false ...

The training loop is ``training/decoder.py``; objectives beside pairs are in ``training/objectives.py``; conversion of
pretrained weights is ``pretrained_sources.py``. Where caches are made, they and the trainings have folders inside the
run folder, and the best decoder is copied to ``snapshot/best``, which users load:

    runs/post/  latents/  samples/  pairs/  held-out/  candidate-0.8/  post-0.8/  snapshot/best/  metrics.jsonl
"""

import shutil
from pathlib import Path
from typing import Annotated, Any, Literal

from accelerate import Accelerator
from pydantic import Field, model_validator

from robustok.commands.encode import EncodeRun, encode
from robustok.commands.generate import GenerateRun, SampleCacheSettings, generate
from robustok.commands.make_pairs import MakePairsRun, make_pairs
from robustok.commands.pretrained_sources import (
    GeneratorSource,
    Pretrained,
    TokenizerSource,
    check_given,
    check_together,
    convert_sources,
    export_decoder,
    refused_as_a_whole,
)
from robustok.commands.sigma_search import SigmaSearch
from robustok.config import Config
from robustok.console import note
from robustok.data.dataset import open_images
from robustok.data.latent_cache import LatentCache
from robustok.data.order import batch_indices
from robustok.devices import start_accelerator
from robustok.evaluation.held_out import HeldOutScore
from robustok.generators import SamplingConfig
from robustok.randomness import step_rng
from robustok.runs import RunFolder
from robustok.snapshots import read_extra, read_header, write_snapshot
from robustok.tokenizers import load_tokenizer
from robustok.training.decoder import train_decoder
from robustok.training.decoder_losses import check_networks
from robustok.training.decoder_settings import DecoderTrainingRun, check_objective
from robustok.training.objectives import needed_caches


class Mixture(Config):
    """How the pairs are made; every sigma has the same images and random numbers."""

    count: int = Field(200_000, ge=1, description="number of pairs; never more than the training uses are made")
    mode: Literal["direct", "reencoded"] = Field(
        "direct",
        description="direct: the mixture itself; reencoded: decoded to uint8 and encoded again (the authors)",
    )
    sampling: SamplingConfig | None = Field(None, description="null takes the settings stored with the generator")


class Sweep(Config):
    """How sigma=auto searches for the best sigma."""

    sigmas: list[Annotated[float, Field(ge=0, le=1)]] | None = Field(
        None,
        min_length=1,
        description="candidates; null: [0.7, 0.8, 0.9, 1] for family robustok, else [0.8, 0.9, 0.95, 1]",
    )
    steps: int | None = Field(None, ge=1, description="training steps of a candidate; null is a tenth of steps")
    sets: int = Field(4, ge=2, description="held-out sets, over which differences have a standard error")
    samples: int = Field(2_500, ge=2, description="samples in a held-out set, if held_out.latents does not give them")


class PostTrainRun(DecoderTrainingRun):
    """Everything about post-training, and about the pairs where they are not given."""

    tokenizer: TokenizerSource = Field(description="tokenizer snapshot or run folder; or pretrained weights, as below")
    pairs: Path | None = Field(
        None, description="paired: cache of pairs, made by `robustok make-pairs`; null makes them"
    )
    samples: Path | None = Field(
        None, description="free: cache of free samples, made by `robustok generate`; null makes them"
    )
    generator: GeneratorSource | None = Field(
        None,
        description="generator whose samples are mixed with real latents, or free, where pairs or samples are null: a "
        "path, or pretrained weights",
    )
    latents: Path | None = Field(
        None,
        description="cache of the real images' latents, for noise, clean, and for pairs where they are null; null "
        "encodes as many as are needed",
    )
    sigma: float | Literal["auto"] | None = Field(
        None, description="share of the real latents that is kept; auto tries a few; only where pairs are made"
    )
    mixture: Mixture = Mixture()
    cache: SampleCacheSettings = SampleCacheSettings()
    sweep: Sweep = Sweep()

    @model_validator(mode="after")
    def _caches_fit(self) -> "PostTrainRun":
        check_objective(self)
        uses = {
            "pairs": "paired" in self.objective,
            "samples": "free" in self.objective,
            "generator": self.makes_pairs or ("free" in self.objective and self.samples is None),
            "latents": self.needs_latents,
            "sigma": self.makes_pairs,
        }
        for name in (name for name, used in uses.items() if not used and getattr(self, name) is not None):
            if self.pairs is not None and name != "samples" and uses["pairs"]:
                raise ValueError(
                    f"pairs are given, and so is {name}, which would make them; drop one ({name}=null drops it)"
                )
            raise ValueError(f"objective {' and '.join(self.objective)} does not use {name}; drop it ({name}=null)")
        missing = [name for name in ("generator", "sigma") if uses[name] and getattr(self, name) is None]
        if missing and self.makes_pairs:
            raise ValueError(f"no pairs: give pairs=PATH, or generator and sigma ({', '.join(missing)} missing)")
        if missing:
            raise ValueError("objective free has no samples: give samples=PATH, or generator")
        if isinstance(self.sigma, float) and not 0 <= self.sigma <= 1:
            raise ValueError(f"sigma {self.sigma} is to be a share from 0 to 1, or auto")
        if self.sigma == "auto" and self.held_out is None:
            raise ValueError(
                "sigma=auto compares decoders on held-out samples; set held_out.extractor.path, the folder of a saved "
                "classifier, or held_out.extractor.name=inception"
            )
        return self

    @property
    def makes_pairs(self) -> bool:
        """Whether pairs are needed and not given."""
        return "paired" in self.objective and self.pairs is None

    @property
    def needs_latents(self) -> bool:
        """Whether latents of the real images are needed."""
        return self.makes_pairs or "latents" in needed_caches(self.objective)

    @property
    def complete(self) -> bool:
        """Whether nothing has to be made before the training."""
        caches = (getattr(self, name) for name in needed_caches(self.objective))
        return None not in caches and not isinstance(self.tokenizer, Pretrained)

    @property
    def candidate_steps(self) -> int:
        """Training steps of a candidate of sigma=auto."""
        return min(self.sweep.steps or max(1, self.steps // 10), self.steps)

    def candidates(self, family: str | None) -> list[float]:
        """The values of sigma that sigma=auto tries, for a tokenizer of this family; 1 is the control."""
        # A tokenizer trained with perturbation decodes wrong tokens better, so lower values are worth trying.
        default = [0.7, 0.8, 0.9, 1.0] if family == "robustok" else [0.8, 0.9, 0.95, 1.0]
        return self.sweep.sigmas or default

    def pairs_used(self, steps: int | None = None) -> int:
        """Pairs that so many training steps use (by default all steps), if there are as many images."""
        return min(self.mixture.count, (steps or self.steps) * self.batch_size)

    def training(self, **changes: Any) -> DecoderTrainingRun:
        """The settings of a training alone, with changes."""
        made_from = {"pairs", "samples", "latents"} - {*needed_caches(self.objective)}
        own = {name: value for name, value in self if name in DecoderTrainingRun.model_fields.keys() - made_from}
        return DecoderTrainingRun(**own | changes)


def post_train(run: PostTrainRun) -> Path:
    """Post-train a decoder; convert weights, encode images, make pairs and search sigma where asked to.

    The same command again continues. With ``sigma=auto`` the result is never worse on the held-out samples than the
    decoder before post-training. A decoder of pretrained weights is also written in their own layout, to
    ``out/export``.

    Returns:
        The folder of the best snapshot.

    Raises:
        UserError: weights, tokenizer, generator, latents and images do not belong together; or as ``encode``,
            ``make_pairs`` and the training raise it.
    """
    accelerator = start_accelerator(run.batch_size)
    if run.complete:
        check_networks(run.training())
        best = train_decoder(run.training())
    else:
        ready = _prepare(run, accelerator)
        if run.sigma == "auto":
            best = _search_sigma(ready, accelerator)
        else:
            out = run.out / (f"post-{run.sigma:g}" if run.makes_pairs else "post")
            made = {"pairs": _pairs(ready, run.sigma, run.steps)} if run.makes_pairs else {}
            best = _publish(run, accelerator, train_decoder(ready.training(out=out, **made)), {})
    if accelerator.is_main_process and (file := export_decoder(best, run.tokenizer, run.out / "export")):
        note(f"in the authors' layout: {file}")
    accelerator.wait_for_everyone()
    return best


def _prepare(run: PostTrainRun, accelerator: Accelerator) -> PostTrainRun:
    """Convert pretrained weights, encode images and draw free samples; returns the run with the paths of all.

    The run folder is created once nothing is missing.
    """
    sources = {"tokenizer": run.tokenizer, "generator": run.generator}
    check_given(sources)
    folder = RunFolder(run, accelerator.is_main_process, later={"data.path"})  # encode and the training compare images
    accelerator.wait_for_everyone()  # before the folder changes, all have read it
    with refused_as_a_whole(sources, run.out):
        if accelerator.is_main_process:
            folder.start()
            paths = convert_sources(sources, run.out)
            available = check_together(paths, run.latents, run.data)
            caches = {name: getattr(run, name) or run.out / name for name in needed_caches(run.objective)}
            check_networks(run.training(tokenizer=paths["tokenizer"], **caches))
            if run.makes_pairs:
                batch_indices(min(run.pairs_used(), available), run.batch_size, run.seed, 0)  # refuses too few pairs
    accelerator.wait_for_everyone()
    ready = run.model_copy(update=convert_sources(sources, run.out))
    if "free" in run.objective and run.samples is None:
        samples = _free_samples(ready, run.out / "samples", run.pairs_used(), "free samples")
        ready = ready.model_copy(update={"samples": samples})
    if not run.needs_latents or run.latents is not None:
        return ready
    latents = EncodeRun(
        out=run.out / "latents",
        tokenizer=ready.tokenizer,
        data=run.data,
        count=run.pairs_used(),
        seed=run.seed,
        workers=run.workers,
        cache=run.cache.model_copy(update={"precision": "float32"}),
    )
    return ready.model_copy(update={"latents": encode(latents)})


def _search_sigma(run: PostTrainRun, accelerator: Accelerator) -> Path:
    """Train a candidate at each sigma, continue the best one to the end, and publish the best decoder of all."""
    search = _start_search(run, accelerator)
    search.add("untouched", None, 0, run.tokenizer)
    steps = run.candidate_steps
    for sigma in run.candidates(read_header(run.tokenizer)["config"].get("name")):
        search.add("candidate", sigma, steps, _train_candidate(run, sigma, steps))
    best = search.best()
    if best is search.untouched:
        note("no sigma made the decoder better on the held-out samples: it stays as it was", "yellow")
    elif steps < run.steps:
        folder, start = run.out / f"post-{best.sigma:g}", run.out / f"candidate-{best.sigma:g}"
        pairs = _pairs(run, best.sigma, run.steps)
        train_decoder(run.training(out=folder, pairs=pairs, held_out=None, continue_from=start))
        for path in sorted((folder / "snapshot").glob("[0-9]*")):
            if int(path.name) > steps:
                search.add("continued", best.sigma, int(path.name), path)
    search.show()
    return _publish(run, accelerator, search.best().path, _scores(search))


def _start_search(run: PostTrainRun, accelerator: Accelerator) -> SigmaSearch:
    """The search, with its held-out samples."""
    held_out, sweep = run.held_out, run.sweep
    if held_out.latents is None:
        samples = _free_samples(run, run.out / "held-out", sweep.sets * sweep.samples, "held-out samples")
        held_out = held_out.model_copy(update={"latents": samples})
    tokenizer = load_tokenizer(run.tokenizer)
    data = open_images(run.data, tokenizer.image_size, split="train")
    make_score = lambda: HeldOutScore(held_out, tokenizer, data, accelerator.device, sweep.sets)  # noqa: E731
    return SigmaSearch(run.out, make_score, accelerator, run.seed, data.describe())


def _free_samples(run: PostTrainRun, out: Path, count: int, purpose: str) -> Path:
    """Free samples, of a seed that no user will choose, so that no result reuses them."""
    return generate(
        GenerateRun(
            out=out,
            generator=run.generator,
            count=count,
            sampling=run.mixture.sampling,
            seed=step_rng(run.seed, 0, purpose).initial_seed(),
            cache=run.cache,
        )
    )


def _train_candidate(run: PostTrainRun, sigma: float, steps: int) -> Path:
    """Train for a few steps, with everything that is given in steps shortened in proportion; returns the snapshot."""
    out = run.out / f"candidate-{sigma:g}"
    snapshot = out / "snapshot" / f"{steps:08d}"
    if (snapshot / "model.safetensors").exists():
        return snapshot
    share = steps / run.steps
    adversarial = run.adversarial.model_copy(update={"start": round(run.adversarial.start * share)})
    shorter = {
        "steps": steps,
        "warmup_steps": min(round(run.warmup_steps * share), steps - 1),
        "ema_decay": min(run.ema_decay, max(0.0, 1 - 10 / steps)),  # or the average would stay close to its start
        "adversarial": adversarial,
        "snapshot_every": 0,
    }
    return train_decoder(run.training(out=out, pairs=_pairs(run, sigma, steps), held_out=None, **shorter))


def _pairs(run: PostTrainRun, sigma: float, steps: int) -> Path:
    """The cache of pairs for so many steps; images and random numbers do not depend on sigma."""
    count = min(run.pairs_used(steps), len(LatentCache(run.latents)))
    return make_pairs(
        MakePairsRun(
            out=run.out / "pairs" / f"sigma-{sigma:g}-{count}",
            generator=run.generator,
            latents=run.latents,
            sigma=sigma,
            count=count,
            mode=run.mixture.mode,
            tokenizer=run.tokenizer if run.mixture.mode == "reencoded" else None,
            sampling=run.mixture.sampling,
            seed=run.seed,
            cache=run.cache,
        )
    )


def _scores(search: SigmaSearch) -> dict[str, Any]:
    """For the model card: the score of the best decoder, and all that were tried."""
    rows = []
    for scored in search.found:
        change = scored.change(search.untouched)
        row = {"sigma": scored.sigma, "steps": scored.steps, "distance": round(scored.distance, 6)}
        rows.append(row | {"change": round(change.value, 6), "standard_error": round(change.standard_error or 0, 6)})
    held_out = {"distance": search.best().distance, "at_the_start": search.untouched.distance}
    return {"held_out": held_out, "sweep": rows}


def _publish(run: PostTrainRun, accelerator: Accelerator, path: Path, fields: dict[str, Any]) -> Path:
    """Copy a snapshot to ``snapshot/best``, with further header fields, and remove the states of candidates."""
    target = run.out / "snapshot" / "best"
    if accelerator.is_main_process:
        header = {key: value for key, value in read_header(path).items() if key != "delta"} | fields
        extra = read_extra(path, "discriminator", "released")
        write_snapshot(target, header, load_tokenizer(path).state_dict(), extra)
        for candidate in run.out.glob("candidate-*"):
            shutil.rmtree(candidate / "state", ignore_errors=True)
    accelerator.wait_for_everyone()
    return target
