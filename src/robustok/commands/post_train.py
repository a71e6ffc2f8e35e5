"""The command `post-train`: with given pairs, with those of a generator, without pairs, or with what proves to be best.

    robustok post-train pairs/llamagen.yaml tokenizer.weights=vq_ds16_c2i.pt generator.weights=c2i_L_256.pt ...
    robustok post-train pairs/diffusers.yaml pipeline=FOLDER ...
    robustok post-train tokenizer=runs/tok pairs=runs/pairs ...
    robustok post-train tokenizer=runs/tok generator=runs/gen latents=runs/latents sigma=0.9 ...
    robustok post-train tokenizer=runs/tok generator=runs/gen latents=runs/latents sigma=auto held_out.extractor... ...
    robustok post-train tokenizer=runs/tok generator=runs/gen objective=free adversarial.adaptive=false ...
    robustok post-train tokenizer=runs/tok generator=runs/gen objective=auto held_out.extractor... ...

The training loop is ``training/decoder.py``; objectives beside pairs are in ``training/objectives.py``; conversion of
pretrained weights is ``pretrained_sources.py``. Where caches are made, they and the trainings have folders inside the
run folder, and the best decoder is copied to ``snapshot/best``, which users load:

    runs/post/  latents/  samples/  pairs/  held-out/  unseen/  candidate-0.8/  post-0.8/  snapshot/best/  metrics.jsonl
"""

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator

from robustok.commands.candidates import Search, gap_in_words, verdict
from robustok.commands.encode import EncodeRun, encode
from robustok.commands.generate import GenerateRun, generate, load_for_sampling
from robustok.commands.make_pairs import MakePairsRun, make_pairs
from robustok.commands.pictures import draw_before_after
from robustok.commands.post_train_settings import BANK, Candidate, PostTrainRun, objective_name
from robustok.commands.pretrained_sources import (
    Pretrained,
    check_given,
    check_together,
    convert_sources,
    export_decoder,
    pipeline_of,
    refused_as_a_whole,
)
from robustok.console import note
from robustok.data.buckets import bucket_name, describe_buckets, open_buckets, shares
from robustok.data.latent_cache import LatentCache, caches_in
from robustok.data.order import batch_indices
from robustok.devices import start_accelerator
from robustok.evaluation.held_out import HeldOutScore, held_out_images, reconstruction_score
from robustok.files import inside, writing
from robustok.generators.pipeline_families import check_mixes, family_of
from robustok.metrics.latent_gap import latent_gap
from robustok.pretrained.pipelines import export_pipeline
from robustok.randomness import bucket_seed, step_rng
from robustok.runs import RunFolder
from robustok.snapshots import read_extra, read_header, write_snapshot
from robustok.tokenizers import load_tokenizer
from robustok.training.common import STATISTICS, processes_of
from robustok.training.decoder import train_decoder
from robustok.training.decoder_losses import check_networks
from robustok.training.latent_crops import cropping
from robustok.training.objectives import needed_caches
from robustok.training.tracking import check_tracker

GAP_IMAGES = 10_000  # on either side


def post_train(run: PostTrainRun) -> Path:
    """Post-train a decoder; convert weights, encode images, make pairs, and choose objective and sigma where asked to.

    The same command again continues. With ``objective=auto`` or ``sigma=auto`` the result is never worse on the
    held-out samples than the decoder before post-training. A decoder of pretrained weights is also written in their
    own layout, to ``out/export``.

    Returns:
        The folder of the best snapshot.

    Raises:
        UserError: weights, tokenizer, generator, latents and images do not belong together; or as ``encode``,
            ``make_pairs`` and the training raise it.
    """
    check_tracker(run)
    accelerator = start_accelerator(run.batch_size)
    if run.complete:
        check_networks(run.training())
        best = train_decoder(run.training())
    else:
        ready = _prepare(run, accelerator)
        if run.searches:
            best = _search(ready, accelerator)
        else:
            out = run.out / (f"post-{run.sigma:g}" if run.makes_pairs else "post")
            made = {"pairs": _pairs(ready, run.sigma, run.steps)} if run.makes_pairs else {}
            best = _publish(run, accelerator, train_decoder(ready.training(out=out, **made)), {})
    if accelerator.is_main_process:
        pipeline, export = pipeline_of(run.sources), run.out / "export"
        if pipeline is not None:
            picture = _picture(run, best, export / "before-after.png", accelerator)
            note(f"the pipeline with this decoder: {export_pipeline(best, pipeline, export, picture)}")
        elif file := export_decoder(best, run.tokenizer, export):
            note(f"in the authors' layout: {file}")
    accelerator.wait_for_everyone()
    return best


def _picture(run: PostTrainRun, best: Path, file: Path, accelerator: Accelerator) -> str | None:
    """A picture of generated latents, free samples if there are, before and after; its name, if there are any."""
    caches = [run.out / "held-out", run.samples or run.out / "samples", *sorted((run.out / "pairs").glob("*"))]
    made = (cache for cache in [*caches, run.pairs] if cache and (caches_in(cache)[0] / "manifest.json").is_file())
    cache = next(made, None)
    before = run.out / "tokenizer" if isinstance(run.tokenizer, Pretrained) else run.tokenizer
    if cache is not None and not file.is_file():
        with writing(file.parent):
            file.parent.mkdir(parents=True, exist_ok=True)
        draw_before_after(file, (before, best), cache, accelerator.device)
    return file.name if file.is_file() else None


def _prepare(run: PostTrainRun, accelerator: Accelerator) -> PostTrainRun:
    """Convert pretrained weights, encode images and draw free samples; returns the run with the paths of all.

    The run folder is created once nothing is missing.
    """
    sources = run.sources
    check_given(sources)
    if run.makes_pairs and (pipeline := pipeline_of(sources)) is not None:
        check_mixes(pipeline, family_of(pipeline))
    folder = RunFolder(run, accelerator.is_main_process, later={"data.path"})  # encode and the training compare images
    accelerator.wait_for_everyone()  # before the folder changes, all have read it
    with refused_as_a_whole(sources, run.out):
        if accelerator.is_main_process:
            folder.start()
            paths = convert_sources(sources, run.out, run.data)
            available = check_together(paths, run.latents, run.data)
            caches = {name: getattr(run, name) or run.out / name for name in needed_caches(run.used)}
            one = max(run.bank, key=lambda objective: "free" in objective)  # with the Frechet term
            check_networks(run.training(one, tokenizer=paths["tokenizer"], **caches))
            tokenizer = load_tokenizer(paths["tokenizer"])
            buckets = open_buckets(run.data, tokenizer)
            for images in buckets:
                cropping(run.crop, tokenizer, images.shape)  # refuses sizes that do not fit
            if run.max_reconstruction_loss is not None:
                held_out_images(run.data, tokenizer)
            if run.makes_pairs:
                batch_indices(min(run.pairs_used(), available), run.batch_size, run.seed, 0)  # refuses too few pairs
            if run.data.buckets:
                note(describe_buckets(run.data, buckets, run.batch_size))
            if run.data.buckets and (run.held_out is not None or run.max_reconstruction_loss is not None):
                note(describe_buckets(run.data, open_buckets(run.data, tokenizer, "test"), run.batch_size))
    accelerator.wait_for_everyone()
    ready = run.model_copy(update=convert_sources(sources, run.out, run.data))
    if "free" in run.used and run.samples is None:
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


def _search(run: PostTrainRun, accelerator: Accelerator) -> Path:
    """Train each candidate, continue the best one, and publish the best decoder of all."""
    if run.objective == "auto" and run.sweep.objectives is None:
        for objective in BANK:
            if obstacle := run.obstacle(objective):
                note(f"{objective_name(objective)} is not tried: {obstacle}", "yellow")
    held_out, count = run.held_out.latents, run.sweep.samples
    if held_out is None:
        held_out = _free_samples(run, run.out / "held-out", count, "held-out samples", run.sweep.sets)
    search = _start_search(run, accelerator, held_out)
    search.add("untouched", None, 0, run.tokenizer)
    steps = run.candidate_steps
    for candidate in run.candidates(read_header(run.tokenizer)["config"].get("name")):
        search.add("candidate", candidate, steps, _train_candidate(run, candidate, steps))
    best = search.best()
    if best is search.untouched:
        priced = len(search.found) - len(search.allowed)
        cost = f" (the reconstructions of {priced} of them lose more than the limit)" if priced else ""
        note(f"no candidate made the decoder better on the held-out samples{cost}: it stays as it was", "yellow")
    elif steps < run.steps:
        _continue(run, search, best.candidate)
    search.show()
    best = search.best()
    fields = {
        "held_out": {"distance": best.distance, "at_the_start": search.untouched.distance},
        "sweep": search.rows(),
        **search.price(),
    }
    if run.objective == "auto":
        fields["verdict"] = _verdict(run, search, held_out, count)
        search.conclude(fields["verdict"])
    return _publish(run, accelerator, best.path, fields)


def _start_search(run: PostTrainRun, accelerator: Accelerator, held_out: Path, chooses: bool = True) -> Search:
    """A search on held-out samples; one that ``chooses`` measures reconstructions too."""
    tokenizer = load_tokenizer(run.tokenizer)
    buckets = open_buckets(run.data, tokenizer)
    config = run.held_out.model_copy(update={"latents": held_out})
    processes, cache = processes_of(accelerator), config.cache or inside(run.out, STATISTICS)
    make_score = lambda: HeldOutScore(  # noqa: E731
        config, tokenizer, buckets, accelerator.device, run.sweep.sets, run.workers, processes, cache
    )
    limit = run.max_reconstruction_loss
    make_other = lambda: reconstruction_score(  # noqa: E731
        run.data,
        tokenizer.to(accelerator.device),
        run.held_out.extractor,
        limit is not None,
        run.sweep.images,
        run.workers,
        processes,
    )
    return Search(
        run.out,
        make_score,
        make_other if chooses else lambda: None,
        accelerator,
        run.seed,
        "; ".join(data.describe() for data in buckets),
        limit if chooses else None,
    )


def _continue(run: PostTrainRun, search: Search, candidate: Candidate) -> None:
    """Train a candidate to the end and score its snapshots; with objective=auto stop where they no longer gain."""
    steps, auto = run.candidate_steps, run.objective == "auto"
    folder, patience = run.out / f"post-{candidate.name}", run.sweep.patience

    def enough(step: int, path: Path) -> bool:
        search.add("continued", candidate, step, path)
        return auto and search.stalled(patience)

    done = [path for path in sorted((folder / "snapshot").glob("[0-9]*")) if int(path.name) > steps]
    if any([enough(int(path.name), path) for path in done]):
        return
    made = {"pairs": _pairs(run, candidate.sigma, run.steps)} if candidate.sigma is not None else {}
    every = run.snapshot_every or (max(1, run.steps // 10) if auto else 0)
    start = run.out / f"candidate-{candidate.name}"
    changes = {"held_out": None, "max_reconstruction_loss": None, "continue_from": start, "snapshot_every": every}
    train_decoder(run.training(candidate.objective, out=folder, **made, **changes), enough)


def _verdict(run: PostTrainRun, search: Search, held_out: Path, count: int) -> str:
    """Whether post-training pays, on samples that chose nothing, and what the gap says where it does not."""
    chosen, before, control = search.best(), search.untouched, search.control
    best = min(search.allowed[1:] or search.found[1:], key=lambda scored: scored.distance)
    short = next(one for one in search.found if one.stage == "candidate" and one.candidate == best.candidate)
    roles, where = [before, best, short, control], "the samples that chose the decoder"
    if run.generator is not None and chosen is not before:
        samples = _free_samples(run, run.out / "unseen", count, "unseen samples", run.sweep.sets)
        where = "samples that chose nothing"
        unseen = _start_search(run, search.accelerator, samples, chooses=False)
        for one in filter(None, roles):
            unseen.add("unseen", one.candidate, one.steps, one.path)
        roles = [one and unseen.like(one) for one in roles]
    words = f"on {where}: {verdict(*roles)}"
    if "does not pay" in words and run.latents is not None:
        words += f"; {_gap(run, held_out)}"
    return words


def _free_samples(run: PostTrainRun, out: Path, count: int, purpose: str, sets: int = 1) -> Path:
    """Free samples, ``count`` for each set, of a seed that no user will choose, so that no result reuses them.

    Each bucket has its share of every set, with the prompts of its images.
    """
    samples = GenerateRun(
        out=out,
        generator=run.generator,
        count=count * sets,
        sampling=run.mixture.sampling,
        seed=step_rng(run.seed, 0, purpose).initial_seed(),
        cache=run.cache,
    )
    if not run.data.buckets:
        return generate(samples)
    buckets = open_buckets(run.data, load_tokenizer(run.tokenizer))
    accelerator = start_accelerator()
    generator = load_for_sampling(run.generator, run.cache, accelerator.device)
    with accelerator.main_process_first():
        generator.embed(torch.from_numpy(np.concatenate([data.labels for data in buckets])))
    parts = shares(count, [len(data) for data in buckets])
    for i, (data, part) in enumerate(zip(buckets, parts, strict=True)):
        height, width = data.shape
        own = {
            "out": out / bucket_name(data.shape),
            "count": part * sets,
            "seed": bucket_seed(samples.seed, i),
            "classes": np.unique(data.labels).tolist(),
            "sampling": (samples.sampling or generator.sampling).model_copy(update={"height": height, "width": width}),
        }
        generate(samples.model_copy(update=own), generator)
    return out


def _train_candidate(run: PostTrainRun, candidate: Candidate, steps: int) -> Path:
    """Train for a few steps, with everything that is given in steps shortened in proportion; returns the snapshot."""
    out = run.out / f"candidate-{candidate.name}"
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
        "held_out": None,
        "max_reconstruction_loss": None,
    }
    made = {"pairs": _pairs(run, candidate.sigma, steps)} if candidate.sigma is not None else {}
    return train_decoder(run.training(candidate.objective, out=out, **made, **shorter))


def _pairs(run: PostTrainRun, sigma: float, steps: int) -> Path:
    """The cache of pairs for so many steps; images and random numbers do not depend on sigma."""
    count = min(run.pairs_used(steps), sum(len(LatentCache(path)) for path in caches_in(run.latents)))
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


def _gap(run: PostTrainRun, held_out: Path) -> str:
    """The gap between the held-out samples and latents of real images, of the largest bucket, in words."""
    names = [{path.relative_to(folder) for path in caches_in(folder)} for folder in (held_out, run.latents)]
    if not (shared := names[0] & names[1]):
        return "the gap of the latents is not known, as samples and images have no bucket in common"
    some, largest = [], max(sorted(shared), key=lambda name: len(LatentCache(run.latents / name)))
    for cache in (LatentCache(held_out / largest), LatentCache(run.latents / largest)):
        latents = cache.read(slice(None, None, -(-len(cache) // GAP_IMAGES))).latents
        some.append(latents.flatten(1, -2) if latents.ndim == 4 else latents)  # (n, L) or (n, L, D)
    tokenizer = load_tokenizer(run.tokenizer)
    return gap_in_words(latent_gap(*some, tokenizer.codebook if tokenizer.kind == "discrete" else None))


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
