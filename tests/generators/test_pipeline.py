"""Pipelines of diffusers as generators: every family, built tiny from the classes of the library."""

import inspect
import json
from fnmatch import fnmatch
from itertools import pairwise
from types import SimpleNamespace
from unittest.mock import Mock

import pytest
import torch
from safetensors.torch import load_file, save_file

from robustok.config import validate
from robustok.errors import UserError
from robustok.generators.pipeline import PipelineConfig, PipelineGenerator, PipelineSampling, prompts_in
from robustok.generators.pipeline_families import FAMILIES, family_of, licence_of, parts_of
from robustok.pretrained.load import load_pretrained
from robustok.randomness import image_rngs

diffusers = pytest.importorskip("diffusers")

import tiny_pipelines as tiny  # noqa: E402, needs diffusers

STEPS = PipelineSampling(steps=4)
LABELS = torch.tensor([0, 1])


@pytest.fixture(scope="module", params=tiny.MIXING)
def family(request, tmp_path_factory):
    """Name, folder, generator, tokenizer and latents of two images."""
    folder = tiny.saved(request.param, tmp_path_factory.mktemp("pipeline") / "given")
    generator = tiny.generator(request.param, folder, "a", "b")
    tokenizer = load_pretrained("diffusers", folder, {"image_size": tiny.SIZE})
    images = torch.rand(2, 3, tiny.SIZE, tiny.SIZE, generator=torch.Generator().manual_seed(1)) * 2 - 1
    with torch.no_grad():
        return SimpleNamespace(
            name=request.param,
            folder=folder,
            generator=generator,
            tokenizer=tokenizer,
            latents=tokenizer.encode(images),
        )


def own_pixels(family, kind, **arguments):
    """Images of the pipeline itself with its autoencoder, whose posterior is at its mode; (N, 3, H, W) in [0, 1]."""
    known = FAMILIES[family.name]
    loader = getattr(diffusers, getattr(known, kind))
    accepted = inspect.signature(loader.__init__).parameters
    absent = [k for k in accepted if k.startswith(("text_encoder", "tokenizer", "safety", "feature_", "image_encoder"))]
    options = {"requires_safety_checker": False} if "requires_safety_checker" in accepted else {}
    pipe = loader.from_pretrained(family.folder, **dict.fromkeys(absent), **options)
    pipe.set_progress_bar_config(disable=True)
    latents = family.latents if family.latents.ndim == 4 else family.latents.unflatten(1, (16, 16))
    grids = latents.permute(0, 3, 1, 2).contiguous()
    grids = iter((grids.unsqueeze(2) if known.video else grids).split(1))
    pipe.vae.encode = lambda image: SimpleNamespace(latents=next(grids))
    size = {"height": 2 * latents.shape[1], "width": 2 * latents.shape[2]}
    given = family.generator._condition(LABELS, guided=True) | size | arguments
    accepted = inspect.signature(pipe.__call__).parameters
    given = {key: value for key, value in given.items() if key in accepted}
    return pipe(**given, num_inference_steps=4, generator=image_rngs(0, [0, 1]), output_type="pt").images


def test_decoding_its_latents_gives_the_pixels_of_the_pipeline_itself(family):
    generator, tokenizer = family.generator, family.tokenizer
    assert tokenizer.latent_shape == generator.latent_shape == tuple(family.latents.shape[1:])
    for sigma in (0.5, 0.0):
        latents = generator.generate(LABELS, STEPS, image_rngs(0, [0, 1]), family.latents, sigma)
        with torch.no_grad():
            ours = (tokenizer.decode(latents) / 2 + 0.5).clamp(0, 1)
        arguments = {"image": torch.zeros(2, 3, tiny.SIZE, tiny.SIZE), "strength": 1 - sigma} if sigma else {}
        theirs = own_pixels(family, "image" if sigma else "text", **arguments)
        assert ours.std() > 0.02
        assert torch.equal(ours, theirs), (ours - theirs).abs().max()


@pytest.mark.parametrize(("height", "width"), [(24, 40), (48, 32)])
def test_images_need_not_be_square(family, height, width):
    generator, tokenizer = family.generator, family.tokenizer
    sampling = STEPS.model_copy(update={"height": height, "width": width})
    images = torch.rand(2, 3, height, width, generator=torch.Generator().manual_seed(2)) * 2 - 1
    with torch.no_grad():
        given = SimpleNamespace(**vars(family) | {"latents": tokenizer.encode_grid(images)})
    assert given.latents.shape == (2, height // 2, width // 2, tokenizer.width)
    for sigma in (0.5, 0.0):
        latents = generator.generate(LABELS, sampling, image_rngs(0, [0, 1]), given.latents, sigma)
        assert latents.shape == given.latents.shape
        with torch.no_grad():
            ours = (tokenizer.decode(latents) / 2 + 0.5).clamp(0, 1)
        arguments = {"image": torch.zeros(2, 3, height, width), "strength": 1 - sigma} if sigma else {}
        theirs = own_pixels(given, "image" if sigma else "text", **arguments)
        assert theirs.shape == (2, 3, height, width)
        assert torch.equal(ours, theirs), (ours - theirs).abs().max()
    assert torch.equal(generator.generate(LABELS, sampling, image_rngs(0, [0, 1]), given.latents, 1.0), given.latents)
    alone = generator.generate(LABELS[1:], sampling, image_rngs(0, [1]))
    torch.testing.assert_close(latents[1:], alone, rtol=1e-4, atol=1e-4 * alone.std().item())
    with pytest.raises(UserError, match="the reference has shape"):
        generator.generate(LABELS, STEPS, image_rngs(0, [0, 1]), given.latents, 0.5)


def test_a_square_may_be_given_as_a_size(family):
    sampling = STEPS.model_copy(update={"height": tiny.SIZE, "width": tiny.SIZE})
    for sigma in (0.5, 0.0):
        one = family.generator.generate(LABELS, STEPS, image_rngs(0, [0, 1]), family.latents, sigma)
        grids = family.latents.unflatten(1, (16, 16))
        other = family.generator.generate(LABELS, sampling, image_rngs(0, [0, 1]), grids, sigma)
        assert torch.equal(one.unflatten(1, (16, 16)), other)
        with torch.no_grad():
            assert torch.equal(family.tokenizer.decode(one), family.tokenizer.decode(other))


def test_the_noise_of_a_dynamic_shift_depends_on_the_size(tmp_path):
    made = {name: tiny.generator(name, tiny.saved(name, tmp_path / name), "a") for name in ("Flux", "Stable Diffusion")}

    def level(name, height, width):
        return made[name].mixture_details(PipelineSampling(steps=8, height=height, width=width), 0.5)["noise_level"]

    assert level("Flux", 32, 48) == level("Flux", 48, 32) < level("Flux", 64, 128)
    assert level("Stable Diffusion", 32, 48) == level("Stable Diffusion", 64, 128)


def test_sizes_that_do_not_fit_are_refused(tmp_path):
    made = tiny.generator("Flux", tiny.saved("Flux", tmp_path / "given"), "a")
    with pytest.raises(UserError, match=r"sampling\.width 34 is not divisible by 4"):
        made.generate(LABELS[:1], PipelineSampling(height=32, width=34), image_rngs(0, [0]))
    with pytest.raises(UserError, match="height and width go together"):
        validate(PipelineSampling, {"height": 32})


def test_sigma_is_the_share_that_is_kept(family):
    make = lambda sigma: family.generator.generate(LABELS, STEPS, image_rngs(0, [0, 1]), family.latents, sigma)  # noqa: E731
    assert torch.equal(make(1.0), family.latents)
    assert torch.equal(make(0.0), family.generator.generate(LABELS, STEPS, image_rngs(0, [0, 1])))
    distances = [(make(sigma) - family.latents).square().mean().item() for sigma in (0.99, 0.5, 0.2)]
    assert all(a < b for a, b in pairwise(distances)), distances  # 0.99 makes a single step
    assert distances[0] > 0


def test_an_image_is_the_same_in_a_batch_and_alone(family):
    generator = family.generator
    both = generator.generate(LABELS, STEPS, image_rngs(0, [0, 1]), family.latents, 0.6)
    again = generator.generate(LABELS, STEPS, image_rngs(0, [0, 1]), family.latents, 0.6)
    alone = generator.generate(LABELS[1:], STEPS, image_rngs(0, [1]), family.latents[1:], 0.6)
    assert torch.equal(both, again)
    torch.testing.assert_close(both[1:], alone, rtol=1e-4, atol=1e-4 * both.std().item())
    other = generator.generate(1 - LABELS, STEPS, image_rngs(0, [0, 1]), family.latents, 0.6)
    assert not torch.allclose(both, other, atol=1e-5)  # prompts are looked at


def test_sigma_by_level_is_the_noise_where_the_pipeline_starts(family):
    generator, sampling = family.generator, PipelineSampling(steps=20, sigma_by="level")
    found = [generator.plan(sampling, sigma) for sigma in (0.9, 0.7, 0.5, 0.3)]
    levels = [start.level for start in found]
    assert levels == pytest.approx([0.1, 0.3, 0.5, 0.7], abs=0.09)  # the nearest of twenty steps
    if not FAMILIES[family.name].skips:  # an LCM has steps in between
        every = [generator.plan(PipelineSampling(steps=20), 1 - k / 20).level for k in range(1, 20)]
        assert levels == [min(every, key=lambda other: abs(other - wanted)) for wanted in (0.1, 0.3, 0.5, 0.7)]
    details = generator.mixture_details(sampling, 0.7)
    assert details["noise_level"] == found[1].level
    assert details["sampler_steps"] == found[1].steps
    assert generator.mixture_details(sampling, 1.0)["noise_level"] == 0


def test_a_pipeline_computes_where_its_generator_is(family):
    moved = PipelineGenerator(family.generator.config, ["a"]).to(torch.device("meta"))
    assert moved.pipe._execution_device.type == "meta"
    assert moved.twin._execution_device.type == "meta"
    assert family.generator.pipe._execution_device.type == "cpu"


def test_half_precision_changes_latents_by_little(family):
    half = PipelineGenerator(family.generator.config.model_copy(update={"precision": "bf16"}), ["a", "b"])
    half.conditions = family.generator.conditions
    exact, found = (g.generate(LABELS, STEPS, image_rngs(0, [0, 1])) for g in (family.generator, half))
    assert (exact.dtype, found.dtype) == (torch.float32, torch.float32)
    assert 0 < (found - exact).std() < 0.05 * exact.std()


@pytest.mark.parametrize("name", [name for name in FAMILIES if name not in tiny.MIXING])
def test_a_pipeline_without_image_to_image_makes_free_samples(tmp_path, name):
    folder = tiny.saved(name, tmp_path / "given")
    generator = tiny.generator(name, folder, "a", "b")
    tokenizer = load_pretrained("diffusers", folder, {"image_size": tiny.SIZE})
    both = generator.generate(LABELS, STEPS, image_rngs(0, [0, 1]))
    assert both.shape == (2, *tokenizer.latent_shape)
    alone = generator.generate(LABELS[1:], STEPS, image_rngs(0, [1]))
    torch.testing.assert_close(both[1:], alone, rtol=1e-4, atol=1e-4 * both.std().item())
    family = SimpleNamespace(name=name, folder=folder, generator=generator, latents=torch.zeros(2, 256, 4))
    theirs = own_pixels(family, "text", use_resolution_binning=False)
    with torch.no_grad():
        ours = (tokenizer.decode(both) / 2 + 0.5).clamp(0, 1)
    assert torch.equal(ours, theirs)
    assert torch.equal(generator.generate(LABELS, STEPS, image_rngs(0, [0, 1]), both, 1.0), both)
    with pytest.raises(UserError, match=r"image-to-image in diffusers.*objective=free"):
        generator.generate(LABELS, STEPS, image_rngs(0, [0, 1]), both, 0.5)
    wide = generator.generate(LABELS, STEPS.model_copy(update={"height": 32, "width": 64}), image_rngs(0, [0, 1]))
    family.latents = torch.zeros(2, 16, 32, 4)
    with torch.no_grad():
        ours = (tokenizer.decode(wide) / 2 + 0.5).clamp(0, 1)
    assert torch.equal(ours, own_pixels(family, "text", use_resolution_binning=False))


def test_a_batch_reads_each_encoded_prompt_of_a_cache_once(tmp_path, monkeypatch):
    made = tiny.generator("Stable Diffusion", tiny.saved("Stable Diffusion", tmp_path / "given"), "a", "b")
    labels, rngs = torch.tensor([0, 1, 0]), lambda: image_rngs(0, range(3))
    expected = made.generate(labels, STEPS, rngs())
    for key, condition in made.conditions.items():
        save_file(condition, tmp_path / f"{key}.safetensors")
    read = Mock(side_effect=load_file)
    monkeypatch.setattr("robustok.generators.pipeline.load_tensors", read)
    keys, made.conditions, made.cache = sorted(made.conditions), {}, tmp_path
    assert torch.equal(made.generate(labels, STEPS, rngs()), expected)
    assert sorted(call.args[0].stem for call in read.call_args_list) == keys


@pytest.mark.parametrize("name", ["Stable Diffusion", "Flux"])
def test_offloaded_parts_make_the_same(tmp_path, name):
    folder = tiny.saved(name, tmp_path / "given")
    found = []
    for offload in (False, True):
        config = PipelineConfig(folder=folder, image_size=tiny.SIZE, offload=offload)
        made = PipelineGenerator(config, ["a", "b"])
        made.conditions = tiny.conditions(name, "a", "b")
        reference = torch.zeros(2, *made.latent_shape)
        rngs = lambda: image_rngs(0, [0, 1])  # noqa: E731
        mixed = made.generate(LABELS, STEPS, rngs(), reference, 0.5)
        free = made.generate(LABELS, STEPS, rngs())
        found.append((mixed, free, made.generate(LABELS, STEPS, rngs(), reference, 0.5)))
        assert hasattr(getattr(made.pipe, made.family.denoiser), "_hf_hook") is offload
    for one, other in zip(*found, strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize(
    ("name", "size", "kept"),
    [
        ("Stable Diffusion", 32, (0.958, 0.789)),
        ("Stable Diffusion 3", 32, (0.783, 0.452)),
        ("Flux", 256, (0.740, 0.425)),  # as many latents as 1024 pixels of the published one have
    ],
)
def test_the_signal_left_is_that_of_the_published_schedules(tmp_path, name, size, kept):
    config = PipelineConfig(folder=tiny.saved(name, tmp_path / "given"), image_size=size)
    generator, sampling = PipelineGenerator(config), PipelineSampling(steps=50)
    found = [generator.plan(sampling, sigma) for sigma in (0.9, 0.7)]
    assert [start.steps for start in found] == [5, 15]
    assert [start.signal for start in found] == pytest.approx(kept, abs=5e-4)
    assert generator.plan(sampling, 0.999).steps == 1


def test_guidance_is_that_of_the_pipeline_and_none_without_prompts(tmp_path):
    folder = tiny.saved("Stable Diffusion", tmp_path / "given")
    made = tiny.generator("Stable Diffusion", folder, "a", "b")
    reference = torch.randn(2, *made.latent_shape, generator=torch.Generator().manual_seed(0))

    def make(generator, **settings):
        sampling = PipelineSampling(steps=4, **settings)
        return generator.generate(LABELS, sampling, image_rngs(0, [0, 1]), reference, 0.5)

    assert torch.equal(make(made), make(made, guidance_scale=7.5))
    assert not torch.allclose(make(made), make(made, guidance_scale=1.0), atol=1e-4)
    assert not torch.allclose(make(made), make(made, scheduler="EulerDiscreteScheduler"), atol=1e-4)
    assert torch.equal(make(made), make(made, scheduler="DDIMScheduler"))
    assert not torch.allclose(make(made), make(made, scheduler="DDIMScheduler", arguments={"eta": 1.0}), atol=1e-4)
    empty = tiny.generator("Stable Diffusion", folder, "", "")
    assert torch.equal(make(empty), make(empty, guidance_scale=1.0))
    for settings, said in (
        ({"scheduler": "Nothing"}, "no such scheduler"),
        ({"arguments": {"etta": 1.0}}, "has no argument etta"),
    ):
        with pytest.raises(UserError, match=said):
            make(made, **settings)
    with pytest.raises(UserError, match="negative_prompt is set by robustok"):
        validate(PipelineSampling, {"arguments": {"negative_prompt": "secret"}})
    made.identity = made.identity  # the identity holds prompts and weights
    assert prompts_in(made.identity) == ["a", "b"]
    assert not torch.equal(PipelineGenerator(made.config, ["a", "c"]).identity, made.identity)


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("Flux2Pipeline", "conditions on reference images and has no strength"),
        ("FluxKontextPipeline", "conditions on reference images"),
        ("QwenImageEditPipeline", "conditions on reference images"),
        ("DiTPipeline", "pairs/dit.yaml"),
        ("StableDiffusionInpaintPipeline", "more than an image and a prompt"),
        ("WanPipeline", "does not make images"),
        ("AnotherPipeline", "of no known family"),
    ],
)
def test_other_pipelines_are_refused_with_the_reason(tmp_path, name, said):
    folder = tmp_path / "given"
    folder.mkdir()
    (folder / "model_index.json").write_text("{}")
    with pytest.raises(UserError, match=said):
        family_of(tiny.set_class(folder, name))


def test_incomplete_pipelines_are_refused(tmp_path):
    folder = tiny.saved("Stable Diffusion", tmp_path / "given")
    with pytest.raises(UserError, match="has no text encoder"):
        PipelineGenerator(PipelineConfig(folder=folder, image_size=32)).embed(torch.tensor([0]))
    with pytest.raises(UserError, match="not divisible by 4"):
        PipelineGenerator(PipelineConfig(folder=folder, image_size=30))
    (folder / "README.md").write_text("---\nlicense: mit\n---\n# A pipeline")
    assert licence_of(folder) == "mit"
    (folder / "unet").rename(folder / "moved")
    with pytest.raises(UserError, match="lacks the folder unet"):
        family_of(folder)
    with pytest.raises(UserError, match=r"has no model_index\.json"):
        family_of(folder / "vae")
    with pytest.raises(UserError, match="is no folder"):
        family_of(folder / "nothing")


def test_latents_that_are_not_finite_name_the_remedy(tmp_path):
    made = tiny.generator("Stable Diffusion", tiny.saved("Stable Diffusion", tmp_path / "given"), "a", "b")
    made.pipe.unet.conv_out.bias.data.fill_(torch.nan)
    with pytest.raises(UserError, match=r"are not finite in torch\.float32; set precision .* to bf16 or float32"):
        made.generate(LABELS, STEPS, image_rngs(0, [0, 1]))


def test_a_safety_checker_is_never_asked_for(tmp_path):
    folder = tiny.saved("Stable Diffusion", tmp_path / "given")
    index = json.loads((folder / "model_index.json").read_text())
    index["safety_checker"] = ["stable_diffusion", "StableDiffusionSafetyChecker"]
    index["feature_extractor"] = ["transformers", "CLIPImageProcessor"]
    (folder / "model_index.json").write_text(json.dumps(index))
    made = tiny.generator("Stable Diffusion", folder, "a", "b")  # although their folders are not there
    assert made.generate(LABELS, STEPS, image_rngs(0, [0, 1])).isfinite().all()
    assert made.pipe.safety_checker is None


def test_a_remote_pipeline_is_downloaded_without_what_is_not_used(tmp_path, monkeypatch):
    import huggingface_hub

    folder = tiny.saved_with_text(tmp_path / "given")
    for name in (
        "unet/diffusion_pytorch_model.fp16.safetensors",
        "unet/diffusion_pytorch_model.bin",
        "whole.safetensors",
    ):
        (folder / name).write_bytes(b"unused")
    files = [str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()]
    asked = []

    def download(_repository, allow_patterns, **_options):
        asked.extend(name for name in files if any(fnmatch(name, pattern) for pattern in allow_patterns))
        return str(folder)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", lambda _repository, name, **_options: str(folder / name))
    generator = PipelineGenerator(PipelineConfig(folder="hf://org/tiny", image_size=32))
    assert generator.folder == folder
    generator.embed(torch.tensor([0]))
    assert not [name for name in asked if "fp16" in name or name.endswith(".bin") or name == "whole.safetensors"]
    assert {name.split("/")[0] for name in asked} == {
        "model_index.json", "README.md", "vae", "unet", "scheduler", "text_encoder", "tokenizer"
    }  # fmt: skip


def test_paths_in_an_index_lead_nowhere():
    index = {"vae": ["diffusers", "AutoencoderKL"], "../other": ["diffusers", "X"], "_private": ["diffusers", "X"]}
    assert parts_of(index) == ["vae"]
