"""What a run will need, for ``--dry-run``: parameters, memory, steps and disk, without training or writing anything.

Models are built without memory (on PyTorch's meta device), so that the largest is counted at once on any machine.
"""

import json
import os
from collections.abc import Callable, Iterable
from typing import Any

import timm
import torch
import yaml
from torch import Tensor, nn
from torchvision.models import vgg16

from robustok.commands.encode import EncodeRun
from robustok.commands.generate import GenerateRun
from robustok.commands.make_pairs import MakePairsRun
from robustok.commands.post_train import PostTrainRun
from robustok.commands.pretrained_sources import Pretrained, check_given, look_at
from robustok.commands.train_classifier import TrainClassifierRun
from robustok.config import Config, plain
from robustok.data.dataset import open_images
from robustok.data.latent_cache import LatentCache
from robustok.devices import has_fast_bf16
from robustok.generators import GENERATORS, build_generator, check_kind, load_generator
from robustok.hub import is_remote
from robustok.losses.discriminators import DISCRIMINATORS, DiscriminatorConfig
from robustok.losses.discriminators.dino import DinoBackbone
from robustok.losses.perceptual import LPIPSLoss
from robustok.losses.semantic import TeacherConfig
from robustok.metrics.features.classifier import SmallClassifier
from robustok.metrics.lpips import check_sides
from robustok.tokenizers import TOKENIZERS, load_tokenizer
from robustok.training.activations import count_activations
from robustok.training.common import TrainingConfig
from robustok.training.decoder import DecoderTrainingRun, LatentDecoder
from robustok.training.generator import GeneratorTrainingRun, cross_entropy, squared_error
from robustok.training.latent_inputs import ContinuousPass
from robustok.training.prepared import blocks_of
from robustok.training.tokenizer import TokenizerTrainingRun
from robustok.types import Generator, Tokenizer

Facts = dict[str, int | str]

FLOAT = 4  # bytes; weights, gradients and optimiser states are float32, whatever the autocast dtype
RECORD = 4 + 8 + 8 + 1  # bytes of a cache's record beside its latents: label, index, seed, flip

VGG_PARAMETERS = 14_714_688  # of the perceptual network
PAPER = {"latent_shape": (256, 64), "codebook_size": 4096, "classes": 1000}  # where the cache is still to be made

NOTES = {
    "training_memory_bytes": "in a process: weights, gradients, Adam's two moments, averaged weights, frozen networks",
    "activations_bytes": "on top: what the samples that a process has in memory at once keep for the backward pass",
    "checkpointed_activations_bytes": "the same with gradient_checkpointing=true",
    "cache_bytes_per_image": "of an encoded image, or crop",
    "state_bytes": "each; the two newest are kept, a third is there while it is written",
    "snapshot_bytes": "each",
    "disk_bytes": "states and snapshots; logs and pictures come on top",
    "cache_bytes": "the whole cache",
    "pairs_bytes": "of all sigmas that are tried",
    "latents_bytes": "of the images, which are encoded first",
    "converted_bytes": "at most, of snapshots of the released files",
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


def _main_training(run: TokenizerTrainingRun) -> Facts:
    tokenizer = _meta(lambda: TOKENIZERS[run.tokenizer.name][0](run.tokenizer))
    size = _count(tokenizer.parameters())
    shape = (3, tokenizer.image_size, tokenizer.image_size)

    def forward(model: nn.Module, count: int) -> Tensor:
        inputs = () if run.discrete else (torch.zeros(count, *tokenizer.latent_shape),)
        return model(torch.zeros(count, *shape), *inputs).reconstructions

    def build() -> nn.Module:
        model = TOKENIZERS[run.tokenizer.name][0](run.tokenizer)
        return model if run.discrete else ContinuousPass(model)

    frozen = _frozen(run) + _teacher(run.teacher, run.tokenizer)
    return {
        "tokenizer_parameters": size,
        "encoder_parameters": size - _decoder(tokenizer),
        "decoder_parameters": _decoder(tokenizer),
        "latents_per_image": tokenizer.latent_shape[0],
        "cache_bytes_per_image": _latent_bytes(tokenizer) + RECORD,
        **_training(run, tokenizer, size, _discriminator(run), frozen),
        **_activations(run, build, forward, shape),
    }


def _generator_training(run: GeneratorTrainingRun) -> Facts:
    discrete = GENERATORS[run.generator.name][0].kind == "discrete"
    if run.latents.exists() or not discrete:
        m = LatentCache(run.latents).manifest
        check_kind(run.generator.name, m.kind, str(run.latents))
        sizes, source = {name: getattr(m, name) for name in PAPER}, str(run.latents)
    else:
        sizes, source = PAPER, f"{run.latents} is not there yet; counted for the paper's tokens"
    length, width = sizes["latent_shape"]

    def build() -> nn.Module:
        model = build_generator(run.generator, **sizes)
        if not discrete and model.latent_mean is None:
            model.set_latent_statistics([0.0] * width, [1.0] * width, run.generator.latent_multiplier)
        return model

    generator = _meta(build)
    facts = {"generator_parameters": _count(generator.parameters()), "latents": source, "latents_per_image": length}
    facts |= {"codebook_size": sizes["codebook_size"]} if discrete else {"latent_width": width}

    def forward(model: nn.Module, count: int) -> None:
        labels = torch.zeros(count, dtype=torch.long)
        if discrete:
            output = model(torch.zeros(count, length, dtype=torch.long), labels)
            cross_entropy(output)
        else:
            latents = torch.zeros(count, length, width)
            squared_error(model(latents, labels, torch.zeros(count), latents))

    facts |= _training(run, generator, _count(generator.parameters()))
    return facts | _activations(run, build, forward)


def _post_training(run: DecoderTrainingRun | PostTrainRun) -> Facts:
    sources = {"tokenizer": run.tokenizer, "generator": getattr(run, "generator", None)}
    check_given(sources)
    tokenizer = look_at(run.tokenizer, run.out)
    size, shape = _count(tokenizer.parameters()), (3, tokenizer.image_size, tokenizer.image_size)
    released = run.trainable == "authors"

    def build() -> nn.Module:
        model = TOKENIZERS[tokenizer.config.name][0](tokenizer.config)
        if not released:
            return LatentDecoder(model)
        model.encoder.backbone.requires_grad_(False)
        return model

    def forward(model: nn.Module, count: int) -> Tensor:
        if released:
            return model(torch.zeros(count, *shape)).reconstructions
        discrete, (length, width) = tokenizer.kind == "discrete", tokenizer.latent_shape
        return model(torch.zeros(count, length, dtype=torch.long) if discrete else torch.zeros(count, length, width))

    model = _meta(build)
    trained = _count(p for p in model.parameters() if p.requires_grad)
    facts = {"tokenizer_parameters": size, "trained_parameters": trained}
    facts |= _pairs(run, tokenizer) if run.pairs is None else {"pairs": len(LatentCache(run.pairs))}
    given = [source.weights for source in sources.values() if isinstance(source, Pretrained)]
    if given and not any(map(is_remote, given)):  # whose sizes are known once they are fetched
        files = [file for path in given for file in (path, *path.rglob("*")) if file.is_file()]
        facts["converted_bytes"] = sum(file.stat().st_size for file in files)
    # The release decodes with an untouched copy, and has the teacher.
    frozen = _frozen(run) + (size + _teacher(run.teacher, tokenizer.config) if released else 0)
    facts |= _training(run, model, trained, _discriminator(run), frozen)
    return facts | _activations(run, build, forward, shape)


def _pairs(run: PostTrainRun, tokenizer: Tokenizer) -> Facts:
    """What is made before a training: latents where there are none, and pairs, of each sigma that is tried."""
    record, facts = _latent_bytes(tokenizer, run.cache.dtype) + RECORD, {}
    count = run.pairs_used()
    if run.latents is None:
        count = min(count, len(open_images(run.data, tokenizer.image_size, "train")))
        facts["latents_bytes"] = count * record
    records = count
    if run.sigma == "auto":
        steps, tried = run.candidate_steps, len(run.candidates(tokenizer.config.name))
        records = tried * min(count, run.pairs_used(steps)) + (count if steps < run.steps else 0)
    return {"pairs": count, "pairs_bytes": records * record, **facts}


def _training(run: TrainingConfig, model: nn.Module, trained: int, discriminator: int = 0, frozen: int = 0) -> Facts:
    """What the three trainings have in common.

    Args:
        run: its configuration.
        model: without memory.
        trained: how many of its parameters learn.
        discriminator: parameters of the discriminator, all of which learn.
        frozen: parameters of networks that do not.
    """
    processes, size = int(os.environ.get("WORLD_SIZE", "1")), _count(model.parameters())
    sharded = _count(p for block in blocks_of(model) for p in block.parameters()) if run.fsdp else 0
    # The averaged weights are whole in every process.
    memory = 2 * size + 3 * trained - 4 * (sharded - sharded // processes) + 4 * discriminator + frozen
    snapshots = -(-run.steps // run.snapshot_every) if run.snapshot_every else 1
    state = FLOAT * (2 * size + 2 * trained + 3 * discriminator)
    snapshot = FLOAT * (size + discriminator)
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
    }


def _encode(run: EncodeRun) -> Facts:
    tokenizer = load_tokenizer(run.tokenizer)
    images = len(open_images(run.data, tokenizer.image_size, run.split))
    images = min(images, run.count or images)
    return {"images": images, **_cache(tokenizer, images * run.variants, run)}


def _generate(run: GenerateRun) -> Facts:
    facts = _cache(load_generator(run.generator), run.count, run)
    if run.tokenizer is not None:
        facts["images_bytes"] = run.count * 3 * load_tokenizer(run.tokenizer).image_size ** 2  # of uint8 pixels
    return facts


def _make_pairs(run: MakePairsRun) -> Facts:
    available = len(LatentCache(run.latents))
    return _cache(load_generator(run.generator), min(run.count or available, available), run)


def _cache(model: Tokenizer | Generator, records: int, run: EncodeRun | GenerateRun | MakePairsRun) -> Facts:
    size = records * (_latent_bytes(model, run.cache.dtype) + RECORD)
    return {"records": records, "shards": -(-records // run.cache.shard_size), "cache_bytes": size}


def _latent_bytes(model: Tokenizer | Generator, dtype: str = "float32") -> int:
    length, width = model.latent_shape
    if model.kind == "continuous":
        return length * width * getattr(torch, dtype).itemsize
    codes = model.codebook_size if isinstance(model, Generator) else len(model.codebook)
    return length * (2 if codes <= 65536 else 4)


def _classifier(run: TrainClassifierRun) -> Facts:
    classes = len(open_images(run.data, run.image_size, "test").classes)
    size = _count(_meta(lambda: SmallClassifier(run.classifier, classes)).parameters())
    return {"classifier_parameters": size, "steps": run.classifier.steps, "snapshot_bytes": FLOAT * size}


# Verbs that are not listed have nothing to estimate beyond their settings.
ESTIMATES: dict[type[Config], Callable[[Any], Facts]] = {
    TokenizerTrainingRun: _main_training,
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
        return build()


def _count(parameters: Iterable[nn.Parameter]) -> int:
    return sum(parameter.numel() for parameter in parameters)


def _decoder(tokenizer: Tokenizer) -> int:
    return sum(_count(module.parameters()) for module in tokenizer.decoder_modules())


def _discriminator(run: TokenizerTrainingRun | DecoderTrainingRun) -> int:
    if not run.adversarial.weight:
        return 0
    config = run.discriminator
    return _count(_meta(lambda: DISCRIMINATORS[config.name][0](config)).parameters())


def _frozen(run: TokenizerTrainingRun | DecoderTrainingRun) -> int:
    """Parameters of the networks that only judge reconstructions."""
    vgg = VGG_PARAMETERS if run.reconstruction.perceptual == "lpips" and run.reconstruction.perceptual_weight else 0
    dino = run.discriminator.name == "dino" and run.adversarial.weight
    return vgg + (_count(_meta(lambda: DinoBackbone(run.discriminator)).parameters()) if dino else 0)


def _teacher(teacher: TeacherConfig, tokenizer: Config) -> int:
    """Parameters of the semantic teacher; a small classifier's do not matter."""
    if teacher.name != "timm":
        return 0
    size = {"img_size": tokenizer.image_size, "patch_size": tokenizer.patch_size}
    sizes = size if teacher.model.startswith("vit_") else {}
    return _count(_meta(lambda: timm.create_model(teacher.model, num_classes=0, **sizes)).parameters())


def _activations(
    run: TrainingConfig,
    build: Callable[[], nn.Module],
    forward: Callable[[nn.Module, int], Any],
    scored: tuple[int, int, int] | None = None,
) -> Facts:
    """What the backward pass of one process needs; ``judged`` is the shape of images that loss networks see.

    Only the discriminator sees all samples of the process at once, the others a part of them (gradient accumulation).
    """
    device = torch.accelerator.current_accelerator() or torch.device("cpu")
    fast = run.precision == "bf16" or (run.precision == "auto" and has_fast_bf16(device))
    precision = "bf16" if fast else "float32"
    share = run.batch_size // int(os.environ.get("WORLD_SIZE", "1"))
    part = share // run.gradient_accumulation
    model = count_activations(build, forward, precision)
    common = model.fixed

    def see(network: nn.Module, count: int) -> Tensor:
        return network.requires_grad_(False)(torch.zeros(count, *scored).requires_grad_())

    if scored is not None and run.reconstruction.perceptual == "lpips" and run.reconstruction.perceptual_weight:
        check_sides("vgg", scored, LPIPSLoss.REMEDY)
        common += part * count_activations(lambda: vgg16(weights=None).features[:30], see, precision).sample
    if scored is not None and run.adversarial.weight:
        common += share * count_activations(lambda: _judge(run.discriminator), see, precision).sample
    return {
        "samples_at_once": part,
        "activations_bytes": common + part * model.sample,
        "checkpointed_activations_bytes": common + part * model.checkpointed,
        "activation_dtype": precision,
    }


def _judge(config: DiscriminatorConfig) -> nn.Module:
    heads = DISCRIMINATORS[config.name][0](config)
    return nn.Sequential(DinoBackbone(config), heads) if config.name == "dino" else heads
