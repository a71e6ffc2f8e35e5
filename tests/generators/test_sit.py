"""SiT and LightningDiT: the velocity by hand, latents and their statistics, mixtures, the authors' layouts."""

import math

import pytest
import torch
import torch.nn.functional as F

from robustok.commands.generate import GenerateRun
from robustok.config import validate
from robustok.errors import UserError
from robustok.generators import GENERATORS, build_generator, check_kind, check_sampling, default_sampling
from robustok.generators.flow import DiffusionSampling, noise_level
from robustok.generators.sampling import Sampling
from robustok.pretrained.export import export_weights
from robustok.pretrained.load import load_pretrained
from robustok.randomness import image_rngs
from robustok.training.generator import squared_error
from robustok.types import Generator, GeneratorOutput
from tiny_models import hold_sigma

L, D, CLASSES = 9, 3, 5
FAMILIES = ["sit", "lightningdit"]
VARIANTS = [
    ("sit", {}),
    ("sit", {"qk_norm": True, "mlp_width": 24, "learn_sigma": True}),
    ("lightningdit", {}),
    ("lightningdit", {"qk_norm": True, "shift": False}),
    ("lightningdit", {"rope": False, "rms_norm": False, "swiglu": False, "qk_norm": True}),
]
STATISTICS = {"latent_mean": [0.5, -1.0, 2.0], "latent_std": [0.2, 1.0, 3.0]}


def build(name, seed=0, **settings):
    """A tiny model in which every parameter is random and matters, those that start at zero included."""
    torch.manual_seed(seed)
    config = validate(GENERATORS[name][1], {"name": name, "width": 16, "depth": 2, "heads": 2} | settings)
    model = build_generator(config, (L, D), CLASSES)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.3)
    return model.eval().requires_grad_(False)


def latents_of(count, seed=0):
    return torch.randn(count, L, D, generator=torch.Generator().manual_seed(seed))


# The velocity


def linear(state, name, x):
    return x @ state[f"{name}.weight"].T + state[f"{name}.bias"]


def norm(x, rms, weight=None, bias=None, epsilon=1e-6):
    centred = x if rms else x - x.mean()
    x = centred / (centred.square().mean() + epsilon).sqrt()
    return x * (1 if weight is None else weight) + (0 if bias is None else bias)


def rotated(x, row, column):
    """Pairs of neighbours rotated: those of the first half by the row, those of the second by the column."""
    pairs, turns = x.view(-1, 2), []
    quarter = len(pairs) // 2
    for i, (a, b) in enumerate(pairs.tolist()):
        angle = (row if i < quarter else column) / 10_000 ** ((i % quarter) / quarter)
        turns += [a * math.cos(angle) - b * math.sin(angle), a * math.sin(angle) + b * math.cos(angle)]
    return torch.tensor(turns, dtype=x.dtype)


def position(name, i, width):
    """Fixed position embedding of latent i."""
    if name == "sit":
        waves = [i / 10_000 ** (2 * k / width) for k in range(width // 2)]
        return torch.tensor([f(wave) for wave in waves for f in (math.sin, math.cos)], dtype=torch.float64)
    side, found = round(L**0.5), []
    for coordinate in (i % side, i // side):
        waves = [coordinate / 10_000 ** (k / (width // 4)) for k in range(width // 4)]
        found += [math.sin(w) for w in waves] + [math.cos(w) for w in waves]
    return torch.tensor(found, dtype=torch.float64)


def velocity_by_hand(model, latents, time, label):
    """The transformer written out for one image: every latent, head and pair of latents in a loop of its own."""
    state, c = model.state_dict(), model.config
    name, rms = c.name, getattr(c, "rms_norm", False)
    side, head_width = round(L**0.5), c.width // c.heads
    waves = [time * math.exp(-math.log(10_000) * k / 128) for k in range(128)]
    wave = torch.tensor([math.cos(w) for w in waves] + [math.sin(w) for w in waves], dtype=torch.float64)
    condition = linear(state, "t_embedder.mlp.2", F.silu(linear(state, "t_embedder.mlp.0", wave)))
    condition = F.silu(condition + state["y_embedder.embedding_table.weight"][label])
    xs = [linear(state, "x_embedder", latents[i]) + position(name, i, c.width) for i in range(L)]
    for b in range(c.depth):
        block = {k.removeprefix(f"blocks.{b}."): v for k, v in state.items() if k.startswith(f"blocks.{b}.")}
        parts = list(linear(block, "adaLN_modulation.1", condition).view(-1, c.width))
        if len(parts) == 4:
            parts = [0 * parts[0], *parts[:2], 0 * parts[0], *parts[2:]]

        def normed(x, which, block=block, parts=parts):
            shift, scale = parts[3 * which : 3 * which + 2]
            return norm(x, rms, block.get(f"norm{which + 1}.weight")) * (1 + scale) + shift

        def place_head(h, which, i, block=block):
            if c.qk_norm:
                bias = block.get(f"attn.{which}_norm.bias")
                h = norm(h, rms, block[f"attn.{which}_norm.weight"], bias, 1e-6 if rms else 1e-5)
            return rotated(h, i // side, i % side) if getattr(c, "rope", False) else h

        qkv = [linear(block, "attn.qkv", normed(x, 0)).view(3, c.heads, head_width) for x in xs]
        queries = [[place_head(h, "q", i) for h in qkv[i][0]] for i in range(L)]
        keys = [[place_head(h, "k", i) for h in qkv[i][1]] for i in range(L)]
        for i in range(L):
            heads = []
            for h in range(c.heads):
                scores = torch.stack([queries[i][h] @ keys[j][h] for j in range(L)]) / head_width**0.5
                heads.append(sum(w * qkv[j][2][h] for j, w in enumerate(scores.softmax(0))))
            xs[i] = xs[i] + parts[2] * linear(block, "attn.proj", torch.cat(heads))
        for i in range(L):
            x = normed(xs[i], 1)
            if "mlp.w12.weight" in block:
                gate, value = linear(block, "mlp.w12", x).chunk(2)
                x = linear(block, "mlp.w3", F.silu(gate) * value)
            else:
                x = linear(block, "mlp.fc1", x)
                x = 0.5 * x * (1 + torch.tanh((2 / math.pi) ** 0.5 * (x + 0.044715 * x**3)))
                x = linear(block, "mlp.fc2", x)
            xs[i] = xs[i] + parts[5] * x
    shift, scale = linear(state, "final_layer.adaLN_modulation.1", condition).view(2, c.width)
    last = [norm(x, rms, state.get("final_layer.norm_final.weight")) * (1 + scale) + shift for x in xs]
    return torch.stack([linear(state, "final_layer.linear", x)[:D] for x in last])


@pytest.mark.parametrize(("name", "settings"), VARIANTS, ids=lambda v: v if isinstance(v, str) else "-".join(v) or "-")
def test_the_velocity_by_hand(name, settings):
    model = build(name, **settings).double()
    latents, times, labels = latents_of(2).double(), torch.tensor([0.0, 0.7]).double(), torch.tensor([1, CLASSES])
    found = model.velocity(latents, times, labels)
    expected = torch.stack([velocity_by_hand(model, *row) for row in zip(latents, times.tolist(), labels, strict=True)])
    torch.testing.assert_close(found, expected, atol=1e-6, rtol=1e-6)  # fixed tables are float32


@pytest.mark.parametrize("name", FAMILIES)
def test_a_time_keeps_the_precision_of_the_model(name):
    """A plain number in float64 as much as a tensor."""
    model, latents, labels = build(name).double(), latents_of(2).double(), torch.tensor([0, 3])
    found = model.velocity(latents, 0.3, labels)
    assert torch.equal(found, model.velocity(latents, torch.tensor([0.3, 0.3], dtype=torch.float64), labels))


def test_the_grid_is_internal():
    """LightningDiT answers in the layout in which it is asked."""
    model, latents, labels = build("lightningdit"), latents_of(2), torch.tensor([0, 3])
    sequence = model.velocity(latents, 0.3, labels)
    grid = model.velocity(latents.transpose(1, 2).reshape(2, D, 3, 3), 0.3, labels)
    assert torch.equal(grid, sequence.transpose(1, 2).reshape(2, D, 3, 3))
    for wrong in (torch.zeros(2, D, 1, 9), torch.zeros(2, 9, D + 1)):
        with pytest.raises(UserError, match="got"):
            model.velocity(wrong, 0.3, labels)
    with pytest.raises(UserError, match="got latents of shape"):
        build("sit").velocity(torch.zeros(2, D, 3, 3), 0.3, labels)


def test_shapes_that_no_model_has():
    config = GENERATORS["lightningdit"][1](width=16, depth=1, heads=2)
    with pytest.raises(UserError, match="square grid, got 8 latents"):
        build_generator(config, (8, D), CLASSES)
    with pytest.raises(UserError, match="no multiple of 4"):
        build_generator(config.model_copy(update={"heads": 8}), (L, D), CLASSES)
    with pytest.raises(UserError, match="heads 3 do not divide width 16"):
        build("sit", heads=3)


# Latents and their statistics


@pytest.mark.parametrize("name", FAMILIES)
def test_latents_are_normalised_at_the_edge(name):
    """A model with statistics returns for raw latents what one without returns for normalised ones."""
    raw, plain = build(name, **STATISTICS, latent_multiplier=0.5), build(name, latent_mean=0.0, latent_std=1.0)
    mean, std = (torch.tensor(STATISTICS[key]) for key in ("latent_mean", "latent_std"))
    latents, labels = latents_of(2) * std + mean, torch.tensor([0, 1])
    normalised = 0.5 * (latents - mean) / std
    torch.testing.assert_close(raw.normalise(latents).float(), normalised)
    torch.testing.assert_close(raw.denormalise(raw.normalise(latents)).float(), latents)
    sampling = DiffusionSampling(steps=4)
    make = lambda model, reference: model.generate(labels, sampling, image_rngs(0, range(2)), reference, 0.5)  # noqa: E731
    torch.testing.assert_close(make(raw, latents), make(plain, normalised) / 0.5 * std + mean)
    levels, noise = torch.tensor([0.2, 0.9]), latents_of(2, seed=1)
    torch.testing.assert_close(
        raw(latents, labels, levels, noise).targets, plain(normalised, labels, levels, noise).targets
    )


def test_statistics_that_cannot_be():
    model = build("sit")
    with pytest.raises(UserError, match="has no latent statistics"):
        model.generate(torch.tensor([0]), DiffusionSampling(steps=1), image_rngs(0, [0]))
    with pytest.raises(UserError, match="latent_std is missing"):
        build("sit", latent_mean=0.0)
    for std, message in (([1.0, 2.0], "has 2 values"), ([1.0, 0.0, 1.0], "positive ones"), (math.nan, "finite")):
        with pytest.raises(UserError, match=message):
            model.set_latent_statistics(0.0, std)
    model.set_latent_statistics(torch.zeros(1, D, 1, 1), torch.full((1, D, 1, 1), 2.0))  # as VA-VAE stores them
    assert (model.config.latent_mean, model.config.latent_std) == ([0.0] * D, [2.0] * D)


def test_check_says_what_is_wrong_with_them():
    latents = latents_of(64) * 0.03 + 0.01
    sentence = lambda mean, std, given=latents: build("sit", latent_mean=mean, latent_std=std).check(given)  # noqa: E731
    assert sentence(0.01, 0.03) == sentence(0.01, 0.03, None) == []
    assert "defaults 0 and 1" in sentence(0.0, 1.0, None)[0]
    assert "looks inverted" in sentence(0.01, 1 / 0.03)[0]
    assert "looks inverted" in sentence(0.01, 1 / 0.03, None)[0]
    assert "another tokenizer" in sentence(0.01, 0.3)[0]
    assert "another tokenizer" in sentence(1.0, 0.03)[0]
    assert "No latent statistics" in build("sit").check()[0]
    assert "do not fit" in sentence(0.01, 0.03, torch.zeros(2, D, L))[0]


# Sampling and mixtures


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("sampler", ["euler", "heun", "euler_maruyama"])
def test_an_image_is_the_same_in_any_batch(name, sampler):
    model = build(name, **STATISTICS)
    sampling = DiffusionSampling(sampler=sampler, steps=3, guidance_scale=2.0, guidance_interval=(0.2, 0.8))
    labels, reference = torch.tensor([0, 1, 2, CLASSES]), latents_of(4)
    for sigma in (None, 0.4):
        whole = model.generate(labels, sampling, image_rngs(7, range(4)), reference, sigma)
        part = model.generate(labels[2:3], sampling, image_rngs(7, [2]), reference[2:3], sigma)
        torch.testing.assert_close(part, whole[2:3], atol=1e-5, rtol=1e-5)
        other = model.generate(labels, sampling, image_rngs(8, range(4)), reference, sigma)
        assert (whole - other).abs().amax(dim=(1, 2)).min() > 0.01
    assert isinstance(model, Generator)


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("strategy", ["sdedit", "sdedit_snr", "linear_mix", "noise_only", "token_mix"])
def test_sigma_in_each_familys_time(name, strategy):
    sampling = DiffusionSampling(steps=10, strategy=strategy, guidance_scale=1.5)
    hold_sigma(build(name, **STATISTICS), sampling, latents_of(20, seed=3))


def test_facts_of_a_mixture():
    model = build("lightningdit")
    sampling = DiffusionSampling(steps=10, timestep_shift=0.3, guidance_scale=2.0, guidance_interval=(0.5, 1.0))
    details = model.mixture_details(sampling, 0.8)
    time = 0.3 * 0.8 / (1 - 0.7 * 0.8)  # of the eighth step, 0 is noise
    assert details == {
        "strategy": "sdedit",
        "noise_level": pytest.approx(1 - time),
        "sampler_steps": 2,
        "guided_share": 1.0,
    }


def test_what_cannot_be_sampled():
    model = build("sit", **STATISTICS)
    rngs, sampling = image_rngs(0, [0]), DiffusionSampling(steps=1)
    with pytest.raises(UserError, match=r"sit samples by diffusion; got sampling\.name=tokens"):
        model.generate(torch.tensor([0]), Sampling(), rngs)
    with pytest.raises(UserError, match="labels range from 6 to 6"):
        model.generate(torch.tensor([6]), sampling, rngs)
    with pytest.raises(UserError, match="the reference has shape"):
        model.generate(torch.tensor([0]), sampling, rngs, torch.zeros(1, D, L), 0.5)


# Training


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("path", ["linear", "cosine"])
def test_the_target_is_where_latents_go(name, path):
    """The forward pass noises by the level and aims at the difference quotient by the family's own time."""
    model = build(name, latent_mean=0.0, latent_std=1.0, path=path).double()
    latents, noise, labels = latents_of(2).double(), latents_of(2, seed=1).double(), torch.tensor([0, 1])
    levels = torch.tensor([0.2, 0.7]).double()
    output = model(latents, labels, levels, noise)

    def at(level):
        angle = level[:, None, None] * math.pi / 2
        if path == "cosine":
            return angle.cos() * latents + angle.sin() * noise
        return latents + level[:, None, None] * (noise - latents)

    times = noise_level(levels, model.noise_time)
    torch.testing.assert_close(output.prediction, model.velocity(at(levels), times, labels))
    h = 1e-6
    quotient = (at(noise_level(times + h, model.noise_time)) - at(noise_level(times - h, model.noise_time))) / (2 * h)
    torch.testing.assert_close(output.targets, quotient, atol=1e-7, rtol=1e-7)


@pytest.mark.parametrize("name", FAMILIES)
def test_overfit_one_batch(name):
    """It learns to turn its noise into the latents of the one image of each class."""
    torch.manual_seed(0)
    config = GENERATORS[name][1](width=32, depth=2, heads=2, latent_mean=0.0, latent_std=1.0, noise_levels="uniform")
    model = build_generator(config, (L, D), CLASSES)
    latents, labels = latents_of(CLASSES), torch.arange(CLASSES)
    optimizer = torch.optim.Adam(model.parameters(), lr=5e-3)
    rng = torch.Generator().manual_seed(0)
    losses = []
    for _ in range(150):
        repeats = (4 * latents.shape[0], L, D)
        output = model(
            latents.repeat(4, 1, 1),
            labels.repeat(4),
            torch.rand(repeats[0], generator=rng),
            torch.randn(repeats, generator=rng),
        )
        loss = squared_error(output)["flow_matching"]
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[0] == pytest.approx(2, abs=0.3)  # it starts at 0, where the target has the variance of both
    assert sum(losses[-20:]) / 20 < 0.35
    samples = model.generate(labels, DiffusionSampling(steps=20), torch.Generator().manual_seed(1))
    assert (samples - latents).square().mean() < 0.15
    wrong = (samples - latents.roll(1, 0)).square().mean()
    assert wrong > 1


def test_flow_matching_by_hand():
    output = GeneratorOutput(torch.tensor([[[1.0, 2.0]]]), torch.tensor([[[0.0, 4.0]]]))
    assert squared_error(output)["flow_matching"].item() == 2.5


# Settings


def test_sampling_settings_without_a_name_are_of_tokens():
    read = lambda sampling: validate(GenerateRun, {"out": "a", "generator": "b", "sampling": sampling}).sampling  # noqa: E731
    assert read({"top_k": 3}) == Sampling(top_k=3)
    assert read({"name": "tokens", "top_k": 3}) == Sampling(top_k=3)
    assert read({"name": "diffusion", "steps": 3}) == DiffusionSampling(steps=3)
    assert read(None) is None
    with pytest.raises(
        UserError, match=r"'sampling\.steps' belongs to another variant; set sampling\.name=ddpm or diffusion"
    ):
        read({"steps": 3})
    with pytest.raises(UserError, match=r"sampling\.step"):
        read({"name": "diffusion", "step": 3})


def test_generators_and_what_does_not_fit_them():
    for name, (family, _) in GENERATORS.items():
        continuous = getattr(family, "kind", "discrete") == "continuous"
        assert continuous == (name in (*FAMILIES, "dit"))
        check_sampling(name, default_sampling(name))
        with pytest.raises(UserError, match=f"generator {name} takes sampling.name="):
            check_sampling(name, Sampling() if continuous else DiffusionSampling())
    with pytest.raises(UserError, match=r"holds tokens, generator sit models continuous latents.*one of rar"):
        check_kind("sit", "discrete", "the cache")
    with pytest.raises(UserError, match="generator rar models tokens"):
        build_generator(GENERATORS["rar"][1](width=16, depth=1, heads=2), (L, D), CLASSES)


# Pretrained checkpoints


def authors_weights(name, **settings):
    model = build(name, **settings)
    return model, export_weights(model)


def config_of(name):
    """As a release writes it: nested, with keys that do not matter here."""
    if name == "sit":
        arguments = {"path_type": "linear", "input_size": L, "patch_size": 1, "in_channels": D, "hidden_size": 16}
        arguments |= {"decoder_hidden_size": 16, "depth": 2, "num_heads": 2, "mlp_ratio": 4.0, "num_classes": CLASSES}
        arguments |= {"class_dropout_prob": 0.1, "use_cfg": True, "vae_1d": True, "fused_attn": False, "qk_norm": False}
    else:
        arguments = {"input_size": 3, "patch_size": 1, "in_channels": D, "hidden_size": 16, "depth": 2, "num_heads": 2}
        arguments |= {"mlp_ratio": 4.0, "class_dropout_prob": 0.1, "num_classes": CLASSES, "learn_sigma": False}
        arguments |= {"use_qknorm": False, "use_swiglu": True, "use_rope": True, "use_rmsnorm": True, "wo_shift": False}
    return {"class": name, "args": arguments, "derived": {"null_class": CLASSES, "norm_eps": 1e-6}}


@pytest.mark.parametrize(("name", "settings"), VARIANTS, ids=lambda v: v if isinstance(v, str) else "-".join(v) or "-")
def test_there_and_back(name, settings):
    model, weights = authors_weights(name, **settings)
    assert ("x_embedder.proj.weight" in weights) == (name == "lightningdit")
    loaded = load_pretrained(name, {"ema": weights}, {"num_heads": 2})
    found = export_weights(loaded)
    assert found.keys() == weights.keys()
    assert all(torch.equal(found[key], value) for key, value in weights.items())
    latents, labels = latents_of(2), torch.tensor([0, CLASSES])
    assert torch.equal(loaded.velocity(latents, 0.4, labels), model.velocity(latents, 0.4, labels))
    assert (loaded.latent_shape, loaded.classes, loaded.null_label) == ((L, D), CLASSES, CLASSES)
    assert loaded.latent_space is None
    assert loaded.licence


@pytest.mark.parametrize("name", FAMILIES)
def test_published_configurations_and_statistics(name):
    _, weights = authors_weights(name)
    model = load_pretrained(name, weights, config_of(name))
    assert model.check() == ["No latent statistics are known (latent_mean, latent_std); sampling needs them."]
    given = {"sit": {"vq_mean": 0.1, "vq_std": 0.5}, "lightningdit": {"latents_stats": {"std": torch.ones(1, D, 1, 1)}}}
    if name == "lightningdit":
        given[name]["latents_stats"]["mean"] = torch.full((1, D, 1, 1), 0.1)
    model = load_pretrained(name, weights, config_of(name) | given[name])
    assert model.latent_mean.unique().tolist() == [0.1 if name == "sit" else pytest.approx(0.1)]
    assert model.check() == []


@pytest.mark.parametrize("name", FAMILIES)
def test_checkpoints_of_something_else(name):
    _, weights = authors_weights(name)
    config = config_of(name)

    def refused(message, weights=weights, **words):
        with pytest.raises(UserError, match=message):
            load_pretrained(name, weights, config | words)

    refused("pos_embed has other values", weights | {"pos_embed": weights["pos_embed"].flip(1)})
    refused("missing blocks.1.attn.proj.bias", {k: v for k, v in weights.items() if k != "blocks.1.attn.proj.bias"})
    refused("unexpected extra", weights | {"extra": torch.zeros(1)})
    refused("final_layer.linear.bias is", weights | {"final_layer.linear.bias": torch.zeros(D + 1)})
    refused("config gives num_classes = 7, the weights have 5", num_classes=7)
    refused("did you mean 'num_classes'", num_clases=5)
    refused("config gives norm_eps", norm_eps=1e-5)
    other = {"sit": "lightningdit", "lightningdit": "sit"}[name]
    refused("is missing; is this a checkpoint of another family", authors_weights(other)[1])
    if name == "sit":
        with pytest.raises(UserError, match="config lacks num_heads"):
            load_pretrained(name, weights)
    else:
        refused("config gives num_heads = 4, the weights have 2", num_heads=4)
        patches = weights | {"x_embedder.proj.weight": torch.zeros(16, D, 2, 2)}
        refused("patches of 1 only", patches)
        refused("feat_rope.freqs_cos has", weights | {"feat_rope.freqs_cos": torch.ones(L, 8)})
