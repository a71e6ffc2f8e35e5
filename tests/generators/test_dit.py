"""DiT through its folder: built from diffusers' own classes with random weights, nothing is downloaded."""

import json
from types import SimpleNamespace

import pytest
import torch

from robustok.errors import UserError
from robustok.generators import build_generator
from robustok.generators.ddpm import DDPMSampling
from robustok.generators.dit import DiTConfig
from robustok.generators.flow import DiffusionSampling
from robustok.pretrained.export import export_folder
from robustok.pretrained.families.dit import PUBLISHED, from_folder
from robustok.randomness import image_rngs
from robustok.training.generator import squared_error
from robustok.types import Generator
from tiny_models import hold_sigma

diffusers = pytest.importorskip("diffusers")

L, D, CLASSES = 16, 4, 5
SIZES = {"num_layers": 2, "num_attention_heads": 2, "attention_head_dim": 8}
SETTINGS = SIZES | {"in_channels": D, "sample_size": 4, "num_embeds_ada_norm": CLASSES}
STRATEGIES = ["sdedit", "sdedit_snr", "linear_mix", "noise_only", "token_mix"]
LABELS = torch.tensor([0, 4, CLASSES])


def make(path, scheduler=None, **settings):
    """A transformer in the folder of a pipeline, in which every parameter matters."""
    torch.manual_seed(0)
    network = diffusers.DiTTransformer2DModel(**SETTINGS | settings).eval()
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.normal_(std=0.1)
    network.save_pretrained(path / "transformer")
    diffusers.DDIMScheduler(**{"clip_sample": False} | (scheduler or {})).save_pretrained(path / "scheduler")
    return network


def load(path, **settings):
    make(path, **settings)
    model = from_folder(path)
    model.set_latent_statistics(0.1, 0.5)
    return model


def latents_of(count, seed=0):
    return torch.randn(count, L, D, generator=torch.Generator().manual_seed(seed))


# The network


def test_same_numbers_as_the_library(tmp_path):
    network, model = make(tmp_path, out_channels=2 * D), from_folder(tmp_path)
    assert isinstance(model, Generator)
    assert (model.latent_shape, model.classes, model.null_label, model.kind) == ((L, D), CLASSES, CLASSES, "continuous")
    assert model.learned_variance
    latents = latents_of(3)
    with torch.no_grad():
        grid = latents.transpose(1, 2).reshape(3, D, 4, 4)
        expected = network(grid, torch.tensor([700] * 3), LABELS).sample  # (3, 2 D, 4, 4)
        found = model.predict(latents, 700, LABELS)
    assert torch.equal(found[1, 4 * 2 + 3], expected[1, :, 2, 3])  # row by row
    assert torch.equal(found.transpose(1, 2).unflatten(2, (4, 4)), expected)
    with pytest.raises(UserError, match="got latents of shape"):
        model.predict(latents[:, :9], 700, LABELS)


def test_samples_are_those_of_the_pipeline(tmp_path, monkeypatch):
    """All channels guided, DDIM, the variance dropped: what ``DiTPipeline`` makes of the same noise."""
    from diffusers.pipelines.dit import pipeline_dit

    network = make(tmp_path, out_channels=2 * D, num_embeds_ada_norm=1000)  # whose null class it takes for granted
    model = from_folder(tmp_path)
    model.set_latent_statistics(0.0, 1.0, 0.5)
    rngs, decoded = image_rngs(0, [0]), []
    torch.rand(L, generator=rngs[0])  # which latents are kept is drawn first
    noise = torch.randn(L, D, generator=rngs[0])
    monkeypatch.setattr(pipeline_dit, "randn_tensor", lambda *_, **__: noise.T.unflatten(1, (4, 4))[None])
    vae = diffusers.AutoencoderKL(latent_channels=D, norm_num_groups=4, block_out_channels=(8,), scaling_factor=0.5)
    vae.decode = lambda latents: decoded.append(latents) or SimpleNamespace(sample=latents[:, :3])
    pipeline = diffusers.DiTPipeline(network, vae, diffusers.DDIMScheduler(clip_sample=False))
    pipeline.set_progress_bar_config(disable=True)
    pipeline([3], guidance_scale=4.0, num_inference_steps=20, output_type="np")
    sampling = DDPMSampling(steps=20, guidance_scale=4.0)
    found = model.generate(torch.tensor([3]), sampling, image_rngs(0, [0]))
    torch.testing.assert_close(found, decoded[0].flatten(2).transpose(1, 2), atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize("channels", [None, 3, 9])
def test_guidance_by_hand(tmp_path, channels):
    """The formula, on the first channels, of the one step that starts at the noisiest timestep."""
    model = load(tmp_path, out_channels=2 * D)
    sampling = DDPMSampling(steps=1, spacing="linspace", guidance_scale=1.5, guided_channels=channels)
    labels, rngs = torch.tensor([2]), image_rngs(0, [0])
    torch.rand(L, generator=rngs[0])
    noise = torch.randn(L, D, generator=rngs[0])[None]
    with torch.no_grad():
        given, none = (model.predict(noise, 999, torch.tensor([label]))[..., :D] for label in (2, CLASSES))
    guided = none + 1.5 * (given - none)
    if channels == 3:
        guided[..., 3:] = given[..., 3:]
    bar = model.bars[999]
    clean = (noise - (1 - bar).sqrt() * guided) / bar.sqrt()
    found = model.generate(labels, sampling, image_rngs(0, [0]))
    torch.testing.assert_close(found, (0.1 + 0.5 * clean).float(), atol=1e-3, rtol=1e-4)


# Sampling and mixtures


@pytest.mark.parametrize("sampler", ["ddim", "ancestral"])
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_sigma(tmp_path, strategy, sampler):
    model = load(tmp_path, out_channels=2 * D)
    sampling = DDPMSampling(steps=20, strategy=strategy, sampler=sampler, guidance_scale=1.5)
    hold_sigma(model, sampling, latents_of(20, seed=3))
    assert model.mixture_details(sampling, 0.9)["strategy"] == strategy


def test_an_image_is_the_same_in_any_batch(tmp_path):
    model, reference = load(tmp_path), latents_of(3)
    sampling = DDPMSampling(sampler="ancestral", steps=5, guidance_scale=2.0)
    for sigma in (None, 0.4):
        whole = model.generate(LABELS, sampling, image_rngs(7, range(3)), reference, sigma)
        part = model.generate(LABELS[1:2], sampling, image_rngs(7, [1]), reference[1:2], sigma)
        torch.testing.assert_close(part, whole[1:2], atol=1e-4, rtol=1e-4)


def test_what_cannot_be_sampled(tmp_path):
    model, rngs = load(tmp_path), image_rngs(0, [0])
    for sampling, said in (
        (DiffusionSampling(), r"dit samples by ddpm; got sampling\.name=diffusion"),
        (DDPMSampling(variance="learned", sampler="ancestral"), "this dit predicts no variance"),
        (DDPMSampling(steps=1001), "has 1000 timesteps"),
    ):
        with pytest.raises(UserError, match=said):
            model.generate(torch.tensor([0]), sampling, rngs)
    with pytest.raises(UserError, match="has no latent statistics"):
        from_folder(tmp_path).generate(torch.tensor([0]), DDPMSampling(steps=1), rngs)


# Training


def test_the_noise_is_what_it_learns(tmp_path):
    model = load(tmp_path, out_channels=2 * D).double()
    latents, noise = latents_of(3).double(), latents_of(3, seed=1).double()
    output = model(latents, LABELS, torch.tensor([0.0, 0.5, 1.0]), noise)
    assert torch.equal(output.targets, noise)
    for i, time in enumerate((0, 500, 999)):
        bar = model.bars[time]
        noised = bar.sqrt() * (latents[i] - 0.1) / 0.5 + (1 - bar).sqrt() * noise[i]
        expected = model.predict(noised[None], time, LABELS[i : i + 1])[0, :, :D]
        torch.testing.assert_close(output.prediction[i], expected)
    train = model.train()(latents, LABELS, torch.tensor([0.0, 0.5, 1.0]), noise)
    assert torch.equal(train.prediction, output.prediction)  # no label is dropped behind our back
    assert squared_error(output, "noise_prediction").keys() == {"noise_prediction"}


def test_overfit_one_batch():
    """A fresh one starts at zero noise; it learns to turn its noise into the latents of the one image of each class."""
    torch.manual_seed(0)
    config = DiTConfig(
        settings={"num_layers": 2, "num_attention_heads": 2, "attention_head_dim": 16},
        latent_mean=0.0,
        latent_std=1.0,
        clip=4.0,
    )
    model, rng = build_generator(config, (L, D), CLASSES), torch.Generator().manual_seed(0)
    latents, labels, losses = latents_of(CLASSES), torch.arange(CLASSES), []
    optimizer = torch.optim.Adam(model.parameters(), lr=5e-3)
    for _ in range(150):
        noise = torch.randn(4 * CLASSES, L, D, generator=rng)
        levels = torch.rand(len(noise), generator=rng)
        loss = squared_error(model(latents.repeat(4, 1, 1), labels.repeat(4), levels, noise))["flow_matching"]
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[0] == pytest.approx(1, abs=0.1)
    assert sum(losses[-20:]) / 20 < 0.35
    samples = model.generate(labels, DDPMSampling(steps=50), torch.Generator().manual_seed(1))
    assert (samples - latents).square().mean() < 0.5 * (samples - latents.roll(1, 0)).square().mean()


# Folders


def test_there_and_back(tmp_path):
    network = make(tmp_path)
    model = from_folder(tmp_path)
    again = diffusers.DiTTransformer2DModel.from_pretrained(export_folder(model, tmp_path / "back"))
    assert all(torch.equal(value, network.state_dict()[name]) for name, value in again.state_dict().items())
    alone = from_folder(tmp_path / "back")  # without a scheduler: DiT's
    assert torch.equal(alone.bars, model.bars)
    export_folder(model, tmp_path / "back")  # once more, as after a kill
    (tmp_path / "back" / "notes.txt").write_text("mine")
    with pytest.raises(UserError, match="exists and holds something else"):
        export_folder(model, tmp_path / "back")


def test_the_class_of_the_release(tmp_path):
    """Its folder was written before the transformer had a class of its own, and names a more general one."""
    torch.manual_seed(0)
    general = SETTINGS | {"norm_type": "ada_norm_zero", "activation_fn": "gelu-approximate", "attention_bias": True}
    network = diffusers.Transformer2DModel(**general, patch_size=2, norm_elementwise_affine=False, out_channels=2 * D)
    network.eval().save_pretrained(tmp_path / "transformer")
    model = from_folder(tmp_path / "transformer")
    latents = latents_of(3)
    grid = latents.transpose(1, 2).unflatten(2, (4, 4))
    with torch.no_grad():
        expected = network(grid, timestep=torch.tensor([700] * 3), class_labels=LABELS).sample
        found = model.predict(latents, 700, LABELS)
    torch.testing.assert_close(found.transpose(1, 2).unflatten(2, (4, 4)), expected)
    network = diffusers.Transformer2DModel(**SETTINGS, patch_size=2, norm_type="ada_norm")
    network.save_pretrained(tmp_path / "other")
    with pytest.raises(UserError, match="holds Transformer2DModel, expected DiTTransformer2DModel"):
        from_folder(tmp_path / "other")


def test_the_scheduler_beside_it_counts(tmp_path):
    chain = {"num_train_timesteps": 100, "beta_start": 0.001, "beta_end": 0.03, "beta_schedule": "scaled_linear"}
    make(tmp_path, chain | {"clip_sample": True, "clip_sample_range": 2.0, "timestep_spacing": "trailing"})
    for path in (tmp_path, tmp_path / "transformer"):
        model = from_folder(path)
        expected = diffusers.DDPMScheduler(**chain).alphas_cumprod.double()
        torch.testing.assert_close(model.bars[:-1], expected, atol=1e-6, rtol=1e-5)
        assert (model.config.clip, model.sampling) == (2.0, DDPMSampling(spacing="trailing"))


def test_the_published_size_brings_its_sampling():
    assert PUBLISHED.model_dump(exclude_defaults=True) == {
        "sampler": "ancestral",
        "steps": 250,
        "spacing": "linspace",
        "variance": "learned",
        "guidance_scale": 1.5,
        "guided_channels": 3,
    }


def test_bad_folders_are_one_sentence(tmp_path):
    def changed(name, file, **change):
        make(tmp_path / name)
        path = tmp_path / name / file
        path.write_text(json.dumps(json.loads(path.read_text()) | change))

    changed("class", "transformer/config.json", _class_name="SiT")
    changed("width", "transformer/config.json", attention_head_dim=16)
    changed("norm", "transformer/config.json", norm_type="ada_norm")
    changed("variance", "transformer/config.json", out_channels=3)
    changed("patch", "transformer/config.json", patch_size=3)
    changed("text", "transformer/config.json", sample_size="big")
    scheduler = "scheduler/scheduler_config.json"
    changed("velocity", scheduler, prediction_type="v_prediction")
    changed("cosine", scheduler, beta_schedule="squaredcos_cap_v2")
    changed("negative", scheduler, beta_start=-1)
    changed("none", scheduler)
    (tmp_path / "none" / scheduler).unlink()
    changed("json", scheduler)
    (tmp_path / "json" / scheduler).write_text("[]")
    for name, words in {
        "nothing": r"no config\.json",
        "class": "holds SiT, expected DiTTransformer2DModel",
        "width": "cannot be loaded",
        "norm": "diffusers makes no DiTTransformer2DModel",
        "variance": "out_channels is 3; accepted is 4, or 8 with a variance",
        "patch": "side 4 does not divide into patches of 3",
        "text": "'big'",
        "velocity": "prediction_type = 'v_prediction'; accepted is 'epsilon'",
        "cosine": "beta_schedule = 'squaredcos_cap_v2'; accepted is 'linear' or 'scaled_linear'",
        "negative": "beta_start",
        "none": r"scheduler_config\.json is missing",
        "json": "no JSON object",
    }.items():
        with pytest.raises(UserError, match=words) as found:
            from_folder(tmp_path / name)
        assert "\n" not in str(found.value)


def test_sizes_follow_from_the_latents():
    with pytest.raises(UserError, match="square grid, got 8 latents"):
        build_generator(DiTConfig(settings=SIZES), (8, D), CLASSES)
    with pytest.raises(UserError, match=r"settings\.in_channels is 3, but latents and classes make 4"):
        build_generator(DiTConfig(settings=SIZES | {"in_channels": 3}), (L, D), CLASSES)
