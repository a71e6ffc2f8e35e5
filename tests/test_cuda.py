"""The library computes on a GPU what it computes on the CPU, up to rounding (``pytest -m cuda``).

``ROBUSTOK_CUDA_TESTS=cpu pytest -m cuda`` runs the same tests on the CPU, to test them where no GPU is.
"""

import copy
import importlib
import json
import math
import os
from dataclasses import astuple

import numpy as np
import pytest
import torch
from torchvision.models.vgg import cfgs, make_layers

import tiny
from conftest import words
from robustok.cli import main
from robustok.commands.encode import encode
from robustok.config import load
from robustok.data.dataset import open_images
from robustok.data.latent_cache import LatentCache, Manifest, create_cache, write_shard
from robustok.data.sources import Digits
from robustok.generators.flow import draw_noise_levels
from robustok.generators.pipeline import PipelineConfig, PipelineGenerator, PipelineSampling
from robustok.generators.pipeline_families import FAMILIES as PIPELINES
from robustok.generators.rar import draw_orders
from robustok.generators.sampling import Sampling
from robustok.losses.discriminators import DISCRIMINATORS, augment, augmentation_draw
from robustok.losses.discriminators.resnet import CHANNELS
from robustok.losses.perceptual import LPIPSLoss
from robustok.metrics.features.inception import InceptionExtractor
from robustok.metrics.frechet import GaussianStatistics, frechet_distance
from robustok.metrics.kernel import kernel_distance
from robustok.metrics.manifold import precision_recall
from robustok.precision import exact_float32, use_precision
from robustok.randomness import image_rngs, seed_step
from robustok.runs import RunFolder
from robustok.tokenizers import load_tokenizer
from robustok.tokenizers.perturbation import (
    PerturbationConfig,
    apply_draw,
    draw_perturbation,
    nearest_codes,
    perturb_latents,
)
from robustok.tokenizers.quantizer import QuantizerConfig, VectorQuantizer
from robustok.tokenizers.quantizers import FSQConfig, LFQConfig, build_quantizer
from robustok.training import decoder as decoder_training
from robustok.training import generator as generator_training
from robustok.training import tokenizer as tokenizer_training
from robustok.training.decoder import train_decoder
from robustok.training.generator import train_generator
from robustok.training.tokenizer import TokenizerTrainingRun, train_tokenizer
from tiny_models import (
    CLASSES,
    LATENT_SHAPE,
    TINY_GENERATORS,
    TINY_TOKENIZERS,
    save_resnet20,
    tiny_generator,
    tiny_tokenizer,
)
from tiny_tokens import GUIDED, MODELS, batch, build, forced_logits, full_logits

DEVICE = torch.device(os.environ.get("ROBUSTOK_CUDA_TESTS", "cuda"))
GPU = DEVICE.type == "cuda"
pytestmark = [
    pytest.mark.cuda,
    pytest.mark.skipif(GPU and not torch.cuda.is_available(), reason="needs a GPU with CUDA"),
]
CONTINUOUS = [name for name in TINY_GENERATORS if name not in ("rar", "gpt")]


@pytest.fixture(autouse=True)
def exact():
    """No TF32, so that the rounding is that of float32."""
    with exact_float32(DEVICE):
        yield


def on_waits(mode):
    """What happens when the host waits for the device: "error", or "default", which is nothing."""
    if GPU:
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode(mode)


def rng(seed=0):
    return torch.Generator().manual_seed(seed)


def randn(*shape, seed=0):
    return torch.randn(*shape, generator=rng(seed))


def on_device(model):
    return copy.deepcopy(model).to(DEVICE)


def assert_close(found, expected, tolerance=1e-4):
    """The largest error is at most this share of the largest value. ``found`` is on the device, ``expected`` not."""
    assert found.device.type == DEVICE.type
    assert found.dtype == expected.dtype
    error = (found.detach().cpu() - expected.detach()).abs().max()
    assert error <= tolerance * expected.detach().abs().max().clamp(min=1e-6)


# Models


@pytest.mark.parametrize("name", TINY_TOKENIZERS)
def test_tokenizers(name):
    model = tiny_tokenizer(name)
    other, images = on_device(model), randn(4, 3, 8, 8).clamp(-1, 1)
    latents = model.encode(images)
    found = other.encode(images.to(DEVICE))
    if model.kind == "discrete":
        assert torch.equal(found.cpu(), latents)
    else:
        assert_close(found, latents)
    assert_close(other.decode(latents.to(DEVICE)), model.decode(latents))


@pytest.mark.parametrize("name", ["robustok", "llamagen", "maskgit", "gigatok"])
def test_a_training_pass_and_its_gradients(name):
    """With perturbed tokens, all drawn on the CPU. Strength 1, because the order of more neighbours is undefined."""
    model = tiny_tokenizer(name).requires_grad_(True)
    other, images = on_device(model), randn(4, 3, 8, 8).clamp(-1, 1)
    config, draw = PerturbationConfig(strength=1), draw_perturbation(4, LATENT_SHAPE[0], 0.5, 1.0, rng())
    outputs = []
    for m, x in ((model, images), (other, images.to(DEVICE))):
        output = m(x, config, draw, 1)
        (output.reconstructions.square().mean() + output.codebook_loss + output.commitment_loss).backward()
        outputs.append(output)
    expected, found = outputs
    assert torch.equal(found.tokens.cpu(), expected.tokens)
    for part in ("reconstructions", "codebook_loss", "commitment_loss"):
        assert_close(getattr(found, part), getattr(expected, part))
    gradients = [{n: p.grad for n, p in m.named_parameters() if p.grad is not None} for m in (other, model)]
    assert gradients[0].keys() == gradients[1].keys()
    largest = max(gradient.abs().max() for gradient in gradients[1].values())
    for name, gradient in gradients[1].items():
        assert (gradients[0][name].cpu() - gradient).abs().max() <= 1e-4 * largest, name


def test_quantizer():
    torch.manual_seed(0)
    quantizer = VectorQuantizer(QuantizerConfig(size=4096, dim=64))
    features = randn(64, 256, 64)
    expected, found = quantizer(features), on_device(quantizer)(features.to(DEVICE))
    assert (found.tokens.cpu() == expected.tokens).float().mean() > 0.9999  # two codes may be equally near
    assert_close(found.codebook_loss, expected.codebook_loss)
    assert_close(found.commitment_loss, expected.commitment_loss)
    with torch.autocast(DEVICE.type, torch.bfloat16):  # the search stays in float32
        assert torch.equal(on_device(quantizer)(features.to(DEVICE)).tokens, found.tokens)


def test_perturbation():
    codebook = torch.nn.functional.normalize(randn(512, 16), dim=-1)
    tokens = torch.randint(512, (8, 64), generator=rng())
    near, found = nearest_codes(codebook, 20), nearest_codes(codebook.to(DEVICE), 20)
    assert (found.cpu() == near).float().mean() > 0.999
    draw = draw_perturbation(8, 64, 0.5, 0.5, rng())
    assert torch.equal(apply_draw(tokens.to(DEVICE), near.to(DEVICE), draw).cpu(), apply_draw(tokens, near, draw))

    config = PerturbationConfig(include_self=False)
    inputs = (codebook[tokens].to(DEVICE), tokens.to(DEVICE), codebook.to(DEVICE), draw, 20, config)
    vectors, perturbed = perturb_latents(*inputs)
    changed = (perturbed.cpu() != tokens)[draw.mask]
    assert torch.equal(perturbed.cpu()[~draw.mask], tokens[~draw.mask])
    assert changed.all()
    assert (found.cpu()[tokens[draw.mask]] == perturbed.cpu()[draw.mask][:, None]).any(1).all()  # by a neighbour
    assert torch.equal(perturb_latents(*inputs)[1], perturbed)
    assert_close(vectors, codebook[perturbed.cpu()])


@pytest.mark.parametrize("config", [FSQConfig(levels=(8, 5, 5)), LFQConfig(bits=18)], ids=lambda config: config.name)
def test_codes_on_a_grid(config):
    quantizer, features = build_quantizer(config), randn(8, 64, config.dim)
    expected, found = quantizer(features), on_device(quantizer)(features.to(DEVICE))
    assert (found.tokens.cpu() == expected.tokens).float().mean() > 0.999
    assert_close(found.features, expected.features)
    near = nearest_codes(quantizer.codebook, config.size // 50, levels=config.levels)
    draw = draw_perturbation(8, 64, 0.5, 0.5, rng())
    there = apply_draw(expected.tokens.to(DEVICE), near, draw)
    assert torch.equal(there.cpu(), apply_draw(expected.tokens, near, draw))


@pytest.mark.parametrize("name", MODELS)
@torch.no_grad()
def test_logits_and_tokens_of_token_generators(name):
    model = build(name)
    other = on_device(model)
    tokens, labels, _ = batch(4)
    there = tokens.to(DEVICE), labels.to(DEVICE)
    full = full_logits(model, tokens, labels, Sampling())
    assert_close(full_logits(other, *there, Sampling()), full)
    assert_close(forced_logits(other, *there, Sampling()), full)
    assert (forced_logits(other.double(), *there, GUIDED) - full_logits(other, *there, GUIDED)).abs().max() < 1e-11
    expected = model.generate(labels, GUIDED, image_rngs(0, range(4)))
    found = on_device(model).generate(labels, GUIDED, image_rngs(0, range(4)))
    assert torch.equal(found.cpu(), expected)
    if name == "rar":
        orders = draw_orders(4, tokens.shape[1], 1.0, rng())
        there = (x.to(DEVICE) for x in (tokens, labels, orders))
        assert_close(on_device(model).logits(*there), model.logits(tokens, labels, orders))


@pytest.mark.parametrize("name", ["rar", "llamagen"])
@torch.no_grad()
def test_a_compiled_step_gives_the_same_tokens(name):
    """With guidance and without, with other weights loaded, and for another number of images; at four cache lengths."""
    model, other = build(name, length=25).to(DEVICE), build(name, seed=1, length=25).to(DEVICE)
    labels = batch(4)[1]
    sample = lambda m, s, n=4: m.generate(labels[:n], s, image_rngs(0, range(n)))  # noqa: E731
    guided, plain, before = sample(model, GUIDED), sample(model, Sampling()), copy.deepcopy(model)
    model.compile_sampling()
    for _ in range(3):  # compiles, records a CUDA graph, replays it
        assert torch.equal(sample(model, GUIDED), guided)
    assert torch.equal(sample(model, Sampling()), plain)
    model.load_state_dict(other.state_dict())
    assert torch.equal(sample(model, GUIDED), sample(other, GUIDED))
    assert torch.equal(sample(model, GUIDED, 3), sample(other, GUIDED, 3))
    for parameter, old in zip(model.parameters(), before.parameters(), strict=True):
        parameter.data = old.data  # elsewhere: the graph that was recorded must not be used
    assert torch.equal(sample(model, GUIDED), guided)


@pytest.mark.parametrize("compiling", [False, True], ids=["eager", "compiled"])
@pytest.mark.parametrize("name", ["rar", "gigatok_adaln"])
def test_sampling_does_not_wait(name, compiling):
    """Not for a token, nor for a whole mixture, whose random numbers come from the CPU."""
    model, (reference, labels, _) = build(name).to(DEVICE), batch(4)
    sample = lambda: model.generate(labels, GUIDED, image_rngs(0, range(4)), reference, 0.5)  # noqa: E731
    if compiling:
        model.compile_sampling()
    *_, expected = (sample() for _ in range(3))  # compiles, records a CUDA graph
    on_waits("error")
    try:
        found = sample()
    finally:
        on_waits("default")
    assert torch.equal(found, expected)


@pytest.mark.parametrize("name", ["rar", "llamagen"])
@torch.no_grad()
def test_sampling_in_bf16_casts_the_weights_once(name):
    model = build(name).to(DEVICE)
    tokens, labels, _ = batch(4)
    there = tokens.to(DEVICE), labels.to(DEVICE)
    with torch.autocast(DEVICE.type, torch.bfloat16):
        found, expected = forced_logits(model, *there, GUIDED), full_logits(model, *there, GUIDED)
    assert (found - expected).std() < 0.05 * expected.std()
    assert all(p.dtype == torch.float32 for p in model.parameters())


@pytest.mark.parametrize("name", CONTINUOUS)
@torch.no_grad()
def test_predictions_and_samples_of_continuous_generators(name):
    model = tiny_generator(name)
    other, latents, noise = on_device(model), randn(4, *LATENT_SHAPE), randn(4, *LATENT_SHAPE, seed=1)
    labels, levels = torch.arange(4) % CLASSES, draw_noise_levels(4, model.config.noise_levels, rng())
    inputs = (latents, labels, levels, noise)
    expected, found = model(*inputs), other(*(x.to(DEVICE) for x in inputs))
    assert_close(found.prediction, expected.prediction)
    assert_close(found.targets, expected.targets)
    samples = [
        m.generate(labels, model.sampling.model_copy(update={"steps": 5}), image_rngs(0, range(4)))
        for m in (model, other)
    ]
    assert_close(samples[1], samples[0], tolerance=1e-2)


@pytest.mark.parametrize("name", PIPELINES)
@torch.no_grad()
def test_latents_of_pipelines(tmp_path, name):
    """In float32 as on the CPU; with parts that are on the device only while they run, the same bit for bit."""
    pytest.importorskip("diffusers")
    tiny_pipelines = importlib.import_module("tiny_pipelines")  # which imports diffusers
    folder, labels = tiny_pipelines.saved(name, tmp_path / "given"), torch.tensor([0, 1])
    sampling = PipelineSampling(steps=4)
    found = []
    for device, offload in (("cpu", False), (DEVICE, False), (DEVICE, True)):
        size, image_to_image = tiny_pipelines.SIZE, name in tiny_pipelines.MIXING
        config = PipelineConfig(folder=folder, image_size=size, precision="float32", offload=offload)
        made = PipelineGenerator(config, ["a", "b"]).to(device)
        made.conditions = tiny_pipelines.conditions(name, "a", "b")
        reference = randn(2, *made.latent_shape).to(device)
        found.append([made.generate(labels, sampling, image_rngs(0, [0, 1]))])
        if image_to_image:
            found[-1].append(made.generate(labels, sampling, image_rngs(0, [0, 1]), reference, 0.5))
    for expected, here, offloaded in zip(*found, strict=True):
        assert_close(here, expected, 1e-3)
        assert torch.equal(here, offloaded)


@pytest.mark.parametrize("name", DISCRIMINATORS)
def test_discriminators_and_augmentation(tmp_path, name):
    network, config = DISCRIMINATORS[name]
    small = {"dino": {"width": 16, "heads": 2}, "patch": {"width": 8, "depth": 1}}
    small["cifar-resnet"] = {"weights": save_resnet20(tmp_path / "resnet20.safetensors")}
    torch.manual_seed(0)
    model = network(config(**small[name])).eval()
    images = randn(2, 3, 16, 16)
    inputs = {"dino": randn(5, 2, 16, 196), "patch": images, "cifar-resnet": randn(2, sum(CHANNELS), 4, 4)}[name]
    assert_close(on_device(model)(inputs.to(DEVICE)), model(inputs))
    draw = augmentation_draw(2, rng())
    assert_close(augment(images.to(DEVICE), draw.to(DEVICE)), augment(images, draw))
    assert_close(augment(images.to(DEVICE), draw), augment(images, draw))  # as in training


def test_lpips(tmp_path):
    pytest.importorskip("lpips")
    torch.manual_seed(0)
    weights = {f"features.{name}": value for name, value in make_layers(cfgs["D"]).state_dict().items()}
    torch.save(weights, tmp_path / "vgg16.pth")
    model = LPIPSLoss(f"{tmp_path / 'vgg16.pth'}")
    images, reconstructions = (randn(2, 3, 32, 32, seed=seed).clamp(-1, 1) for seed in (0, 1))
    found = []
    for network, device in ((model, "cpu"), (on_device(model), DEVICE)):
        x = reconstructions.to(device, copy=True).requires_grad_()
        loss = network(images.to(device), x)
        loss.backward()
        found.append((loss, x.grad))
    for expected, value in zip(*found, strict=True):
        assert_close(value, expected, tolerance=1e-3)


# Metrics


def test_inception(tmp_path):
    pytest.importorskip("torch_fidelity")
    from torchvision.models import inception_v3

    network = inception_v3(weights=None, num_classes=1008, aux_logits=False, init_weights=False)
    with torch.no_grad():
        for parameter in network.parameters():
            if parameter.ndim == 4:  # with the default weights the features vanish
                parameter.normal_(0, (2 / parameter[0].numel()) ** 0.5, generator=rng())
    torch.save(network.state_dict(), tmp_path / "random.pth")
    pixels = torch.randint(0, 256, (3, 3, 20, 24), dtype=torch.uint8, generator=rng())
    expected = InceptionExtractor(tmp_path / "random.pth").features(pixels)
    found = InceptionExtractor(tmp_path / "random.pth", DEVICE).features(pixels)  # pixels may come from the CPU
    for part in ("pool", "logits", "spatial"):
        assert_close(getattr(found, part), getattr(expected, part))


@pytest.mark.parametrize("count", [40, 500])  # fewer images than features, and more
def test_frechet_distance(count):
    a, b = randn(count, 64), 1.5 * randn(count, 64, seed=1) + 0.1
    expected = frechet_distance(GaussianStatistics.of(a), GaussianStatistics.of(b))
    one, other = (GaussianStatistics.of(x.to(DEVICE)) for x in (a, b))
    assert one.mean.device.type == DEVICE.type
    assert frechet_distance(one, other) == pytest.approx(expected, rel=1e-9)
    assert frechet_distance(one, GaussianStatistics.of(b)) == pytest.approx(expected, rel=1e-9)
    assert frechet_distance(one, one) == pytest.approx(0, abs=1e-9)


def test_kernel_distance_and_manifolds():
    real, fake = randn(300, 64), 1.2 * randn(400, 64, seed=1)
    expected, found = (kernel_distance(fake.to(device), real.to(device)) for device in ("cpu", DEVICE))
    assert found.value == pytest.approx(expected.value, rel=1e-9)
    assert found.standard_error == pytest.approx(expected.standard_error, rel=1e-9)
    manifolds = [precision_recall(real=real.to(device), fake=fake.to(device)) for device in ("cpu", DEVICE)]
    assert astuple(manifolds[1]) == pytest.approx(astuple(manifolds[0]))


# Training


@pytest.fixture(scope="module")
def continuous_latents(tmp_path_factory):
    """A cache of continuous latents."""
    path, count, random = tmp_path_factory.mktemp("continuous") / "cache", 64, np.random.default_rng(0)
    create_cache(path, Manifest("continuous", (4, 3), None, 3, count, count, tokenizer="t", data="d"))
    numbers, zeros = np.arange(count), np.zeros(count, dtype=np.int64)
    latents = random.standard_normal((count, 4, 3)).astype(np.float32)
    write_shard(path, 0, {"latents": latents, "labels": numbers % 3, "indices": numbers, "seeds": zeros})
    return path


@pytest.fixture
def trainings(tokenizer, latents, pairs, classifier, continuous_latents):
    """Name to (training, settings in a folder), with every term of each training."""

    def discrete(out, *words):
        return tiny.main_run(out, *tiny.every_term(classifier), *words)

    def continuous(out, *words):
        sides = {"width": 8, "multipliers": [1, 2], "blocks": 1, "groups": 4}
        settings = {"name": "kl", "image_size": 16, "encoder": sides, "decoder": sides, "z_channels": 8, "dim": 4}
        terms = ("reconstruction.perceptual=none", "latent_noise=0.5", *tiny.ADVERSARY)
        given = (f"tokenizer={json.dumps(settings)}", *tiny.DATA, *tiny.TRAINING, *terms, *words)
        return load(TokenizerTrainingRun, None, (f"out={out}", *given))

    def tokens(name):
        return lambda out, *words: tiny.generator_run(out, latents, f"generator.name={name}", *words)

    def vectors(name):
        return lambda out, *words: tiny.generator_run(out, continuous_latents, f"generator.name={name}", *words)

    def post(out, *words):
        perceptual = ("reconstruction.perceptual=classifier", f"reconstruction.perceptual_weights={classifier}")
        return tiny.post_run(out, tokenizer, pairs, *perceptual, *tiny.ADVERSARY[:2], "clip_norm=1.0", *words)

    def authors(out, *words):
        teacher = ("teacher.name=classifier", f"teacher.path={classifier}")
        return post(out, "trainable=authors", *teacher, *words)

    return {
        "tokenizer": (train_tokenizer, discrete),
        "continuous": (train_tokenizer, continuous),
        "rar": (train_generator, tokens("rar")),
        "gpt": (train_generator, tokens("gpt")),
        "sit": (train_generator, vectors("sit")),
        "lightningdit": (train_generator, vectors("lightningdit")),
        "post": (train_decoder, post),
        "authors": (train_decoder, authors),
    }


def saved(folder):
    """All weights of the last snapshot in one vector, and the log."""
    tensors = {name: x for name, x in tiny.saved(folder) if isinstance(x, torch.Tensor) and "state" not in name}
    return torch.cat([x.flatten().double() for x in tensors.values()]), tiny.log(folder)


FOUR = ("steps=4", "state_every=2", "log_every=1")
HOW = {
    "float32": (),
    "bf16": ("precision=bf16",),
    "parts": ("gradient_accumulation=2", "gradient_checkpointing=true"),
    "compiled": ("compile=true",),
    "tf32": ("precision=tf32",),
    "8bit": ("optimizer=adamw8bit",),
}
TRAININGS = ["tokenizer", "continuous", "rar", "gpt", "sit", "lightningdit", "post", "authors"]
FEWER = {  # the rest is the same code
    "parts": ["tokenizer", "rar", "post"],
    "compiled": ["tokenizer", "continuous", "rar", "post"],
    "tf32": ["tokenizer", "continuous", "post"],
    "8bit": ["rar", "post"],
}


@pytest.mark.parametrize(("name", "how"), [(name, how) for how in HOW for name in FEWER.get(how, TRAININGS)])
def test_four_steps(tmp_path, trainings, name, how):
    if how == "8bit":
        pytest.importorskip("bitsandbytes")
    train, settings = trainings[name]
    if GPU:
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
    train(settings(tmp_path / "run", *FOUR, *HOW[how]))
    assert not GPU or torch.cuda.max_memory_allocated() > before
    weights, log = saved(tmp_path / "run")
    assert weights.isfinite().all()
    assert [line["step"] for line in log if "total" in line] == [1, 2, 3, 4]
    assert all(math.isfinite(value) for line in log for value in line.values())


@pytest.mark.parametrize("name", TRAININGS)
def test_resume(tmp_path, trainings, name):
    """Two steps and two more after a resume equal four, but for sums that a GPU adds in any order."""
    train, settings = trainings[name]
    train(settings(tmp_path / "whole", *FOUR))

    with tiny.interrupted(2):
        train(settings(tmp_path / "stopped", *FOUR))
    torch.manual_seed(1)  # the global random numbers must not matter
    train(settings(tmp_path / "stopped", *FOUR))
    (found, log), (expected, whole_log) = saved(tmp_path / "stopped"), saved(tmp_path / "whole")
    assert (found - expected).norm() <= 1e-3 * expected.norm()
    assert len(log) == len(whole_log)
    for line, other in zip(log, whole_log, strict=True):
        value = "total" if "total" in line else "step"
        assert line[value] == pytest.approx(other[value], rel=1e-3)


@pytest.mark.parametrize("name", TRAININGS)
def test_no_step_waits(tmp_path, trainings, name, monkeypatch):
    """Between lines of the log nothing synchronises, once the batch is there. ``test_waits.py`` holds it on a CPU."""
    (train, settings), steps, watched = trainings[name], RunFolder.steps, []

    def seed(number, step, rank):
        seed_step(number, step, rank)
        if 0 < step < 3:  # not the first one, which allocates, nor the last one, which is logged
            on_waits("error")
            watched.append(step)

    def ended(*args):
        for step in steps(*args):
            yield step
            on_waits("default")

    monkeypatch.setattr(RunFolder, "steps", ended)
    for module in (tokenizer_training, generator_training, decoder_training):
        monkeypatch.setattr(module, "seed_step", seed)
    try:
        train(settings(tmp_path / "run", "steps=4", "state_every=4", "log_every=4"))
    finally:
        on_waits("default")
    assert watched == [1, 2]


# Commands


def test_commands(tmp_path, pipeline):
    """The fixture has trained, encoded, sampled and post-trained through the command line on the device."""
    assert main(words("evaluate", pipeline, str(tmp_path / "evaluation"))) == 0


def test_encoding_finds_nearest_codes(tmp_path, tokenizer):
    """Without TF32, PyTorch's default in convolutions; of two codes that are equally near either may be found."""
    use_precision("tf32")
    found = LatentCache(encode(tiny.tokens_run(tmp_path / "tokens", tokenizer, "cache.batch_size=7"))).read(slice(None))
    assert torch.backends.cudnn.conv.fp32_precision == "ieee"
    images, model = open_images(Digits(limit=128), 16).read(found.indices).images, load_tokenizer(tokenizer).double()
    with torch.no_grad():
        features, codebook = model.quantizer.normalize(model.features(images.double())), model.codebook
    distances = torch.cdist(features, codebook).square()  # (N, L, K)
    excess = distances.gather(2, found.latents[..., None])[..., 0] - distances.min(2).values
    assert excess.max() < 1e-5
