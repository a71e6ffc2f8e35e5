"""What a run needs, for ``--dry-run``: parameters, memory, steps and disk, without training or writing anything.

Models are built on PyTorch's meta device, without memory, where a step of the training is counted in float32. Under
bf16 autocast it needs ``BF16_SHARE`` of that, and a copy of the weights.
"""

import json
import math
import os
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import timm
import torch
import yaml
from torch import Tensor, nn
from torchvision.models import vgg16

from robustok.commands.encode import EncodeRun, chosen_shard_size
from robustok.commands.generate import GenerateRun
from robustok.commands.make_pairs import MakePairsRun
from robustok.commands.post_train import PostTrainRun
from robustok.commands.pretrained_sources import Pretrained, check_given, look_at, pipeline_of
from robustok.commands.step_memory import LossNetworks, generator_step, image_step, step_bytes
from robustok.commands.train_classifier import TrainClassifierRun
from robustok.config import Config, plain
from robustok.data.buckets import bucket_name, open_buckets
from robustok.data.dataset import ImageDataset, open_images
from robustok.data.latent_cache import LatentCache, caches_in
from robustok.data.latent_checks import check_squares
from robustok.generators import build_generator, check_kind, load_generator
from robustok.generators.continuous import ContinuousConfig
from robustok.hub import is_remote
from robustok.losses.discriminators import DISCRIMINATORS, frozen_features
from robustok.losses.discriminators.dino import DinoBackbone
from robustok.losses.perceptual import LPIPSLoss
from robustok.losses.semantic import TeacherConfig
from robustok.metrics.features.classifier import SmallClassifier
from robustok.metrics.lpips import check_sides
from robustok.tokenizers import TOKENIZERS, load_tokenizer
from robustok.training.common import TrainingConfig, quantizer_terms
from robustok.training.decoder import DecoderTrainingRun, LatentDecoder
from robustok.training.generator import GeneratorTrainingRun, cross_entropy, squared_error
from robustok.training.latent_crops import cropping
from robustok.training.objectives import needed_caches
from robustok.training.prepared import adapt_blocks, blocks_of
from robustok.training.tokenizer import ContinuousPass, TokenizerTrainingRun, latent_terms
from robustok.types import Generator, Tokenizer

Estimates = dict[str, int | str]

FLOAT = 4  # bytes; weights, gradients and optimiser states are float32, whatever the autocast dtype
RECORD = 4 + 8 + 8 + 1  # bytes of a record of a cache beside its latents: label, index, seed, flip
# Of the activations in float32. With it the peaks of tokenizer, RAR-B and RAR-L on an H100 are met within 7 %.
BF16_SHARE = 0.7
PAPER = {"latent_shape": (256, 64), "codebook_size": 4096, "classes": 1000}  # where there is no cache yet

NOTES = {
    "training_memory_bytes": "in a process: weights, gradients, Adam's two moments, averaged weights, frozen networks",
    "activations_bytes": "estimate, in addition: the most that a step of a process needs at once",
    "checkpointed_activations_bytes": "the same with gradient_checkpointing=true",
    "cache_bytes_per_image": "of an encoded image, or crop",
    "buckets": "height x width, and number of images; memory is counted for the largest",
    "crop_pixels": "a side of what the loss sees",
    "decoded_pixels": "a side, with the margin",
    "state_bytes": "each; the two newest are kept, and a third while it is written",
    "snapshot_bytes": "each",
    "disk_bytes": "states and snapshots; logs and pictures come on top",
    "cache_bytes": "the whole cache",
    "pairs_bytes": "of all sigmas that are tried",
    "latents_bytes": "of the images, which are encoded first",
    "converted_bytes": "at most, of snapshots of the pretrained files",
}


def estimate(run: Config) -> Estimates:
    """Estimates for a run by name; those that end in ``_bytes`` are sizes.

    Raises:
        UserError: what the run starts from (latents, tokenizer, images) is missing or unusable.
    """
    return ESTIMATES[type(run)](run) if type(run) in ESTIMATES else {}


def show(run: Config, found: Estimates, as_json: bool) -> str:
    """The merged configuration with its estimates: one JSON object, or YAML with the estimates as comments."""
    if as_json:
        return json.dumps({"config": plain(run), "facts": found}, indent=2)
    lines = [yaml.safe_dump(plain(run), sort_keys=False).rstrip()]
    for name, value in found.items():
        label = name.removesuffix("_bytes").replace("_", " ")
        text = _size(value) if name.endswith("_bytes") else f"{value:,}" if isinstance(value, int) else value
        lines.append(f"# {label}: {text}{f' ({NOTES[name]})' if name in NOTES else ''}")
    return "\n".join(lines)


def _size(count: int) -> str:
    """Bytes in decimal units, three digits."""
    for size, unit in ((10**12, "TB"), (10**9, "GB"), (10**6, "MB"), (10**3, "kB")):
        if count >= size:
            return f"{count / size:.3g} {unit}"
    return f"{count} bytes"


# Trainings


def _tokenizer_training(run: TokenizerTrainingRun) -> Estimates:
    tokenizer = _meta(lambda: TOKENIZERS[run.tokenizer.name][0](run.tokenizer))
    size, decoder = _count(tokenizer), sum(map(_count, tokenizer.decoder_modules()))
    noise = () if run.discrete else (_zeros(run, *tokenizer.latent_shape),)
    return {
        "tokenizer_parameters": size,
        "encoder_parameters": size - decoder,
        "decoder_parameters": decoder,
        "latents_per_image": tokenizer.latent_shape[0],
        "cache_bytes_per_image": _latent_bytes(tokenizer) + RECORD,
        **_training(
            run,
            tokenizer if run.discrete else ContinuousPass(tokenizer),
            (_images(run, tokenizer), *noise),
            partial(latent_terms, run),
            _loss_networks(run, (tokenizer.image_size, tokenizer.image_size)),
            _teacher(run.teacher, run.tokenizer),
        ),
    }


def _generator_training(run: GeneratorTrainingRun) -> Estimates:
    continuous = isinstance(run.generator, ContinuousConfig)
    sizes, source = PAPER, f"{run.latents} is not there yet; counted for the paper's tokens"
    if run.latents.exists() or continuous:
        manifest = (cache := LatentCache(run.latents)).manifest
        check_kind(run.generator.name, manifest.kind, str(run.latents))
        check_squares(cache, f"generator {run.generator.name}")
        sizes, source = {name: getattr(manifest, name) for name in PAPER}, str(run.latents)
    length, width = sizes["latent_shape"]
    model = _meta(lambda: build_generator(run.generator, **sizes))
    labels = _zeros(run).long()
    if continuous:
        if model.latent_mean is None:
            model.set_latent_statistics([0.0] * width, [1.0] * width, run.generator.latent_multiplier)
        inputs = (_zeros(run, length, width), labels, _zeros(run), _zeros(run, length, width))
    else:
        orders = (_zeros(run, length).long(),) if run.generator.name == "rar" else ()
        inputs = (_zeros(run, length).long(), labels, *orders)
    objective = partial(squared_error, objective=model.objective) if continuous else cross_entropy
    return {
        "generator_parameters": _count(model),
        "latents": source,
        "latents_per_image": length,
        **({"latent_width": width} if continuous else {"codebook_size": sizes["codebook_size"]}),
        **_training(run, model, inputs, objective),
    }


def _post_training(run: DecoderTrainingRun | PostTrainRun) -> Estimates:
    sources = {"tokenizer": run.tokenizer} | ({"generator": run.generator} if isinstance(run, PostTrainRun) else {})
    check_given(sources)
    tokenizer = look_at(run.tokenizer, run.out).to("meta")
    buckets = open_buckets(run.data, tokenizer) if run.data.buckets else []
    shapes = [data.shape for data in buckets] or [(tokenizer.image_size, tokenizer.image_size)]
    size, frozen, crops, shape = _count(tokenizer), 0, None, max(shapes, key=math.prod)
    if run.trainable == "authors":
        model, inputs = tokenizer.requires_grad_(True), _images(run, tokenizer)
        model.encoder.backbone.requires_grad_(False)
        frozen = size + _teacher(run.teacher, tokenizer.config)  # a copy of the original tokenizer decodes
    else:
        sizes = filter(None, [cropping(run.crop, tokenizer, one) for one in shapes])
        crops = max(sizes, key=lambda one: math.prod(one.window), default=None)
        model, (length, width) = LatentDecoder(tokenizer), tokenizer.latent_shape
        grid = tuple(side // tokenizer.factor for side in shape) if buckets else (length,)
        if crops is not None:
            grid, shape = crops.window if buckets else (math.prod(crops.window),), (run.crop.size, run.crop.size)
        inputs = _zeros(run, *grid).long() if tokenizer.kind == "discrete" else _zeros(run, *grid, width)
    found = {"tokenizer_parameters": size, "trained_parameters": _count(model, trainable=True)}
    if buckets:
        found["buckets"] = ", ".join(f"{bucket_name(data.shape)} {len(data):,}" for data in buckets)
    if crops is not None:
        found |= {"crop_pixels": run.crop.size, "decoded_pixels": max(crops.window) * crops.factor}
    used = run.used if isinstance(run, PostTrainRun) else run.objective
    caches = {name: getattr(run, name) for name in needed_caches(used)}
    for name in (name for name, path in caches.items() if path is not None):
        found[name] = sum(len(LatentCache(path)) for path in caches_in(caches[name]))
    if None in caches.values():
        found |= _to_make(run, tokenizer, buckets)
    given = [source.weights for source in sources.values() if isinstance(source, Pretrained)]
    if (pipeline := pipeline_of(sources)) is not None:
        given = [pipeline / "vae"]  # the rest is used where it is
    if given and not any(map(is_remote, given)):  # remote files have no size before they are downloaded
        files = [file for path in given for file in (path, *path.rglob("*")) if file.is_file()]
        found["converted_bytes"] = sum(file.stat().st_size for file in files)
    terms = partial(quantizer_terms, tokenizer.config.quantizer, run.teacher) if run.trainable == "authors" else _none
    return found | _training(run, model, (inputs,), terms, _loss_networks(run, shape), frozen)


def _to_make(run: PostTrainRun, tokenizer: Tokenizer, buckets: Sequence[ImageDataset]) -> Estimates:
    """What is made before the training: latents, free samples, and pairs of each sigma that is tried.

    Images are those of the buckets, or without buckets opened where their number is needed.
    """
    record, found = _latent_bytes(tokenizer, run.cache.dtype) + RECORD, {}
    if buckets:
        pixels = sum(len(data) * math.prod(data.shape) for data in buckets) / sum(map(len, buckets))
        record = round(pixels / tokenizer.image_size**2 * (record - RECORD)) + RECORD  # on average
    count = run.pairs_used()
    if "samples" in needed_caches(run.used) and run.samples is None:
        found |= {"samples": count, "samples_bytes": count * record}
    if run.needs_latents and run.latents is None:
        count = min(count, sum(map(len, buckets or open_buckets(run.data, tokenizer))))
        found["latents_bytes"] = count * record
    if not run.makes_pairs:
        return found
    records = count
    if run.searches:
        steps = run.candidate_steps
        tried = sum(one.sigma is not None for one in run.candidates(tokenizer.config.name))
        records = tried * min(count, run.pairs_used(steps)) + (count if steps < run.steps else 0)
    return {"pairs": count, "pairs_bytes": records * record, **found}


def _training(
    run: TrainingConfig,
    model: nn.Module,
    inputs: tuple[Tensor, ...],
    terms: Callable[[Any], dict[str, Tensor]],
    networks: LossNetworks | None = None,
    frozen: int = 0,
) -> Estimates:
    """What the three trainings have in common.

    Args:
        run: its configuration.
        model: what is trained, on the meta device.
        inputs: of its forward pass, for all samples of a process.
        terms: of the loss, of its output.
        networks: of losses between images; None for a generator.
        frozen: parameters of other frozen networks.
    """
    processes, size, trained = _processes(), _count(model), _count(model, trainable=True)
    others = () if networks is None else networks.modules
    discriminator = 0 if networks is None or networks.discriminator is None else _count(networks.discriminator)
    frozen += sum(map(_count, others)) - discriminator
    blocks = blocks_of(model)
    sharded = sum(map(_count, blocks)) if run.fsdp else 0
    # The averaged weights are not sharded.
    moments = 2 * trained if run.optimizer == "adamw" else trained // 2  # of 8 bits
    memory = 2 * size + trained + moments - 4 * (sharded - sharded // processes) + 4 * discriminator + frozen
    snapshots = -(-run.steps // run.snapshot_every) if run.snapshot_every else 1
    state, snapshot = FLOAT * (2 * size + moments + 3 * discriminator), FLOAT * (size + discriminator)
    if networks is None:
        step = partial(generator_step, run, model, inputs, terms)
    else:
        images = torch.zeros(len(inputs[0]), 3, *networks.shape, device="meta")
        step = partial(image_step, run, model, inputs, images, networks, terms)
    whole = checkpointed = step_bytes(step, (model, *others))
    if blocks:
        adapt_blocks(model, checkpointing=True, compiling=False)
        checkpointed = step_bytes(step, (model, *others))
    bf16 = run.precision == "bf16"
    scale, copy = (BF16_SHARE, 2 * size) if bf16 else (1, 0)
    return {
        **({"discriminator_parameters": discriminator} if discriminator else {}),
        **({"frozen_parameters": frozen} if frozen else {}),
        "steps": run.steps,
        "samples_seen": run.steps * run.batch_size,
        "processes": processes,
        "samples_per_process_and_step": run.batch_size // processes,
        "training_memory_bytes": FLOAT * memory,
        "state_bytes": state,
        "snapshots": snapshots,
        "snapshot_bytes": snapshot,
        "disk_bytes": 2 * state + snapshots * snapshot,
        "samples_at_once": len(inputs[0]) // run.gradient_accumulation,
        "activations_bytes": round(scale * whole) + copy,
        "checkpointed_activations_bytes": round(scale * checkpointed) + copy,
        "activation_dtype": "bf16" if bf16 else "float32",
    }


def _loss_networks(run: TokenizerTrainingRun | DecoderTrainingRun, shape: tuple[int, int]) -> LossNetworks:
    """The networks of the losses between images, on the meta device; a small classifier is neglected."""
    vgg = backbone = discriminator = None
    if run.reconstruction.perceptual == "lpips" and run.reconstruction.perceptual_weight:
        check_sides("vgg", shape, LPIPSLoss.REMEDY)
        vgg = _meta(lambda: vgg16(weights=None).features[:30]).requires_grad_(False)
    if run.adversarial.weight:
        discriminator = _meta(lambda: DISCRIMINATORS[run.discriminator.name][0](run.discriminator))
        if run.discriminator.name == "dino":
            backbone = _meta(lambda: DinoBackbone(run.discriminator))
        elif run.discriminator.name == "cifar-resnet":
            backbone = frozen_features(run.discriminator, torch.device("meta"))
    return LossNetworks(shape, vgg, backbone, discriminator)


def _none(_output: Any) -> dict[str, Tensor]:
    """No terms beside those between images."""
    return {}


def _teacher(teacher: TeacherConfig, tokenizer: Config) -> int:
    """Parameters of the semantic teacher; those of a small classifier are neglected."""
    if teacher.name != "timm":
        return 0
    size = {"img_size": tokenizer.image_size, "patch_size": tokenizer.patch_size}
    sizes = size if teacher.model.startswith("vit_") else {}
    return _count(_meta(lambda: timm.create_model(teacher.model, num_classes=0, **sizes)))


# Caches and classifiers


def _encode(run: EncodeRun) -> Estimates:
    tokenizer = load_tokenizer(run.tokenizer)
    images = sum(map(len, open_buckets(run.data, tokenizer, run.split)))
    images = min(images, run.count or images)
    return {"images": images, **_cache(tokenizer, images * run.variants, run)}


def _generate(run: GenerateRun) -> Estimates:
    found = _cache(load_generator(run.generator), run.count, run)
    if run.tokenizer is not None:
        found["images_bytes"] = run.count * 3 * load_tokenizer(run.tokenizer).image_size ** 2  # of uint8 pixels
    return found


def _make_pairs(run: MakePairsRun) -> Estimates:
    available = sum(len(LatentCache(path)) for path in caches_in(run.latents))
    return _cache(load_generator(run.generator), min(run.count or available, available), run)


def _cache(model: Tokenizer | Generator, records: int, run: EncodeRun | GenerateRun | MakePairsRun) -> Estimates:
    size = records * (_latent_bytes(model, run.cache.dtype) + RECORD)
    return {"records": records, "shards": -(-records // chosen_shard_size(run.cache, records)), "cache_bytes": size}


def _latent_bytes(model: Tokenizer | Generator, dtype: str = "float32") -> int:
    length, width = model.latent_shape
    if model.kind == "continuous":
        return length * width * getattr(torch, dtype).itemsize
    codes = model.codebook_size if isinstance(model, Generator) else len(model.codebook)
    return length * (2 if codes <= 65536 else 4)


def _classifier(run: TrainClassifierRun) -> Estimates:
    classes = len(open_images(run.data, run.image_size, "test").classes)
    size = _count(_meta(lambda: SmallClassifier(run.classifier, classes)))
    return {"classifier_parameters": size, "steps": run.classifier.steps, "snapshot_bytes": FLOAT * size}


# Other commands have nothing to estimate.
ESTIMATES: dict[type[Config], Callable[[Any], Estimates]] = {
    TokenizerTrainingRun: _tokenizer_training,
    GeneratorTrainingRun: _generator_training,
    DecoderTrainingRun: _post_training,
    PostTrainRun: _post_training,
    EncodeRun: _encode,
    GenerateRun: _generate,
    MakePairsRun: _make_pairs,
    TrainClassifierRun: _classifier,
}


def _meta(build: Callable[[], nn.Module]) -> nn.Module:
    with torch.device("meta"):
        return build().to("meta")  # with the tables that a model always makes on the CPU


def _count(model: nn.Module, trainable: bool = False) -> int:
    """Number of parameters, or of those that are trained."""
    return sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad or not trainable)


def _processes() -> int:
    return int(os.environ.get("WORLD_SIZE", "1"))


def _zeros(run: TrainingConfig, *shape: int) -> Tensor:
    """Zeros of this shape for each sample of a process, on the meta device."""
    parts = run.gradient_accumulation
    return torch.zeros(run.batch_size // _processes() // parts * parts, *shape, device="meta")


def _images(run: TrainingConfig, tokenizer: Tokenizer) -> Tensor:
    return _zeros(run, 3, tokenizer.image_size, tokenizer.image_size)
