"""What a run will need, for ``--dry-run``: parameters, memory, steps and disk, without training or writing anything.

Models are built without memory (on PyTorch's meta device), so that the largest is counted at once on any machine.
"""

import json
import os
from collections.abc import Callable, Iterable
from typing import Any

import torch
import yaml
from torch import nn

from robustok.classifier import SmallClassifier
from robustok.config import Config, plain
from robustok.discriminators import DISCRIMINATORS
from robustok.encode import EncodeRun
from robustok.generate import GenerateRun, MakePairsRun
from robustok.generators import build_generator, check_kind, load_generator
from robustok.images import open_images
from robustok.latents import LatentCache
from robustok.tokenizers import TOKENIZERS, load_tokenizer
from robustok.train_classifier import TrainClassifierRun
from robustok.training.generator_training import GeneratorTrainingRun
from robustok.training.loop import TrainingConfig
from robustok.training.main_training import MainTrainingRun
from robustok.training.post_training import PostTrainingRun
from robustok.types import Generator, Tokenizer

Facts = dict[str, int | str]

FLOAT = 4  # bytes; weights, gradients and optimiser states are float32, whatever the autocast dtype
RECORD = 4 + 8 + 8 + 1  # bytes of a cache's record beside its latents: label, index, seed, flip

NOTES = {
    "training_memory_bytes": "weights, gradients, Adam's two moments, averaged weights; activations come on top",
    "state_bytes": "each; the two newest are kept, a third is there while it is written",
    "snapshot_bytes": "each",
    "disk_bytes": "states and snapshots; logs and pictures come on top",
    "cache_bytes": "the whole cache",
}


def estimate(run: Config) -> Facts:
    """Facts about a run by name; those that end in ``_bytes`` are sizes.

    Raises:
        UserError: what the run starts from (latents, tokenizer, images) is missing or unusable.
    """
    return ESTIMATES[type(run)](run) if type(run) in ESTIMATES else {}


def show(run: Config, facts: Facts, as_json: bool) -> str:
    """The merged configuration with its facts: one JSON object, or YAML in which the facts are comments."""
    if as_json:
        return json.dumps({"config": plain(run), "facts": facts}, indent=2)
    lines = []
    for name, value in facts.items():
        size = name.endswith("_bytes")
        words = name.removesuffix("_bytes").replace("_", " ")
        shown = _size(value) if size else f"{value:,}" if isinstance(value, int) else value
        lines.append(f"# {words}: {shown}{f' ({NOTES[name]})' if name in NOTES else ''}")
    return "\n".join([yaml.safe_dump(plain(run), sort_keys=False).rstrip(), *lines])


def _size(count: int) -> str:
    """Bytes in decimal units, three digits."""
    for size, unit in ((10**12, "TB"), (10**9, "GB"), (10**6, "MB"), (10**3, "kB")):
        if count >= size:
            return f"{count / size:.3g} {unit}"
    return f"{count} bytes"


def _main_training(run: MainTrainingRun) -> Facts:
    tokenizer = _meta(lambda: TOKENIZERS[run.tokenizer.name][0](run.tokenizer))
    size = _count(tokenizer.parameters())
    return {
        "tokenizer_parameters": size,
        "encoder_parameters": size - _decoder(tokenizer),
        "decoder_parameters": _decoder(tokenizer),
        "latents_per_image": tokenizer.latent_shape[0],
        **_training(run, size, size, _discriminator(run)),
    }


def _generator_training(run: GeneratorTrainingRun) -> Facts:
    m = LatentCache(run.latents).manifest
    check_kind(run.generator.name, m.kind, str(run.latents))
    generator = _meta(lambda: build_generator(run.generator, m.latent_shape, m.classes, m.codebook_size))
    size = _count(generator.parameters())
    facts = {"generator_parameters": size, "latents_per_image": m.latent_shape[0]}
    facts |= {"codebook_size": m.codebook_size} if m.codebook_size else {"latent_width": m.latent_shape[1]}
    return facts | _training(run, size, size, 0)


def _post_training(run: PostTrainingRun) -> Facts:
    tokenizer = load_tokenizer(run.tokenizer)
    size, trained = _count(tokenizer.parameters()), _decoder(tokenizer)
    facts = {"tokenizer_parameters": size, "trained_parameters": trained, "pairs": len(LatentCache(run.pairs))}
    return facts | _training(run, size, trained, _discriminator(run))


def _training(run: TrainingConfig, size: int, trained: int, discriminator: int) -> Facts:
    """What the three trainings have in common.

    Args:
        run: its configuration.
        size: parameters of the model.
        trained: how many of them learn.
        discriminator: parameters of the discriminator, all of which learn.
    """
    processes = int(os.environ.get("WORLD_SIZE", "1"))
    snapshots = -(-run.steps // run.snapshot_every) if run.snapshot_every else 1
    state = FLOAT * (2 * size + 2 * trained + 3 * discriminator)
    snapshot = FLOAT * (size + discriminator)
    return {
        **({"discriminator_parameters": discriminator} if discriminator else {}),
        "steps": run.steps,
        "samples_seen": run.steps * run.batch_size,
        "processes": processes,
        "samples_per_process_and_step": run.batch_size // processes,
        "training_memory_bytes": FLOAT * (2 * size + 3 * trained + 4 * discriminator),
        "state_bytes": state,
        "snapshots": snapshots,
        "snapshot_bytes": snapshot,
        "disk_bytes": 2 * state + snapshots * snapshot,
    }


def _encode(run: EncodeRun) -> Facts:
    tokenizer = load_tokenizer(run.tokenizer)
    images = len(open_images(run.data, tokenizer.image_size, run.split))
    return {"images": images, **_cache(tokenizer, images * run.variants, run.shard_size)}


def _generate(run: GenerateRun) -> Facts:
    facts = _cache(load_generator(run.generator), run.count, run.shard_size)
    if run.tokenizer is not None:
        facts["images_bytes"] = run.count * 3 * load_tokenizer(run.tokenizer).image_size ** 2  # of uint8 pixels
    return facts


def _make_pairs(run: MakePairsRun) -> Facts:
    available = len(LatentCache(run.latents))
    return _cache(load_generator(run.generator), min(run.count or available, available), run.shard_size)


def _cache(model: Tokenizer | Generator, records: int, shard_size: int) -> Facts:
    length, width = model.latent_shape
    if getattr(model, "kind", "discrete") == "discrete":
        codes = model.codebook_size if hasattr(model, "codebook_size") else len(model.codebook)
        latents = length * (2 if codes <= 65536 else 4)
    else:
        latents = length * width * FLOAT
    return {"records": records, "shards": -(-records // shard_size), "cache_bytes": records * (latents + RECORD)}


def _classifier(run: TrainClassifierRun) -> Facts:
    classes = len(open_images(run.data, run.image_size, "test").classes)
    size = _count(_meta(lambda: SmallClassifier(run.classifier, classes)).parameters())
    return {"classifier_parameters": size, "steps": run.classifier.steps, "snapshot_bytes": FLOAT * size}


# Verbs that are not listed have nothing to estimate beyond their settings.
ESTIMATES: dict[type[Config], Callable[[Any], Facts]] = {
    MainTrainingRun: _main_training,
    GeneratorTrainingRun: _generator_training,
    PostTrainingRun: _post_training,
    EncodeRun: _encode,
    GenerateRun: _generate,
    MakePairsRun: _make_pairs,
    TrainClassifierRun: _classifier,
}


def _meta(build: Callable[[], nn.Module]) -> nn.Module:
    with torch.device("meta"):
        return build()


def _count(parameters: Iterable[nn.Parameter]) -> int:
    return sum(parameter.numel() for parameter in parameters)


def _decoder(tokenizer: Tokenizer) -> int:
    return sum(_count(module.parameters()) for module in tokenizer.decoder_modules())


def _discriminator(run: MainTrainingRun | PostTrainingRun) -> int:
    if not run.adversarial.weight:
        return 0
    config = run.discriminator
    return _count(_meta(lambda: DISCRIMINATORS[config.name][0](config)).parameters())
