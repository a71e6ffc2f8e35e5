"""Pretrained models, compared with their reference outputs; one function per family; see ``check.py``."""

from functools import partial

import torch
from table import EXACT, Golden, Run, Tolerance
from torch import Tensor, nn

from robustok import load_pretrained
from robustok.generators.diffusion_sampling import guided_model
from robustok.generators.flow import DiffusionSampling, FlowProcess, sampling_times
from robustok.generators.sampling import Sampling, guidance_scales
from robustok.generators.sit import SiT, SiTConfig
from robustok.randomness import image_rngs
from robustok.tokenizers.conv import to_grid, to_row
from robustok.training.generator import accuracy, cross_entropy

# Tokenizers


def robustok_tokenizer(golden: Golden) -> None:
    """The paper's tokenizer; the outputs are float32, except for the margins, which were computed in float64."""
    model = load_pretrained("robustok", golden.path)
    images, tokens = golden["input.images"], golden["input.tokens"]
    latents = golden["output.latents"]
    quantized = model.quantizer(model.features(images))
    grid = tuple(latents.shape[2:])
    golden.row("latents", to_grid(model.features(images), grid), latents, Tolerance(5e-5))
    golden.row("tokens", model.encode(images), golden["output.tokens"], EXACT)
    golden.row("quantized", to_grid(quantized.vectors, grid), golden["output.quantized"], Tolerance(1e-5))
    clamped = model.decode(model.encode(images)).clamp(-1, 1)
    golden.row("reconstruction", clamped, golden["output.reconstruction"], Tolerance(5e-5))
    golden.row("decoded", model.decode(tokens), golden["output.decoded"], Tolerance(5e-5))

    model = model.double()
    quantized = model.quantizer(model.features(images.double()))
    squares = torch.cdist(quantized.features.flatten(0, 1), model.codebook).square()  # (N * L, K)
    best = squares.topk(2, largest=False).values
    margins = (best[:, 1] - best[:, 0]).view_as(quantized.tokens)
    golden.row("token_margin", margins, golden["output.token_margin"], Tolerance(1e-5))


def llamagen_tokenizer(golden: Golden) -> None:
    """Square and rectangular grids."""
    for run in golden.precisions("llamagen_tokenizer", 3e-5, 1e-9):
        model, images = run.model, run.input("images")
        grid = tuple(size // model.config.patch_size for size in images.shape[2:])
        features = model.features(images)
        quantized = model.quantizer(features)
        run.row("pre_quant", to_grid(features, grid))
        run.row("quant", to_grid(quantized.vectors, grid))
        run.row("indices", model.encode(images).flatten())
        run.row("recon", model.decode_vectors(quantized.vectors, grid))
        for name in ("codes", "codes_rect"):
            count, _, *shape = run.input(f"{name}_shape").tolist()
            tokens = run.input(name).view(count, -1)
            run.row(name.replace("codes", "codebook_entry"), to_grid(model.embed(tokens), tuple(shape)))
            run.row(f"decoded_{name}", model.decode(tokens, tuple(shape)))


def _alignment_features(model: nn.Module, tokens: Tensor) -> Tensor:
    """Tokens (N, L) to the features that GigaTok's training aligned with DINOv2, (N, h w, F)."""
    states = model.row_to_grid.states(model.from_latent(model.embed(tokens)), model.config.alignment.depth)
    return model.alignment(states)


def gigatok_tokenizer(golden: Golden) -> None:
    """Rows of tokens, stored as (N, D, 1, L)."""
    for run in golden.precisions("gigatok_tokenizer", 3e-5, 1e-9):
        model, images, tokens = run.model, run.input("images"), run.input("codes")
        row = tuple(run.input("codes_shape").tolist()[2:])
        features = model.features(images)
        quantized = model.quantizer(features)
        run.row("pre_quant", to_grid(features, row))
        if run.dtype == torch.float64 and golden.notes["config"]["args"]["rot"]:
            reason = "the authors' rotation trick adds up to 5e-6 to the codes; ours is the codebook row itself"
            golden.not_ours("fp64.quant", reason)
        else:
            run.row("quant", to_grid(quantized.vectors, row))
        run.row("indices", model.encode(images))
        run.row("recon", model.decode_vectors(quantized.vectors), single=5e-5)
        run.row("codebook_entry", to_grid(model.embed(tokens), row))
        run.row("decoded_codes", model.decode(tokens))
        run.row("decoder_2d_features", model.row_to_grid(model.from_latent(model.embed(tokens))))
        if model.alignment is not None:
            run.row("distill_features", _alignment_features(model, tokens))


def maskgit_vqgan(golden: Golden) -> None:
    """The file has images in [0, 1]."""
    for run in golden.precisions("maskgit_vqgan", 3e-5, 1e-9):
        model, images, tokens = run.model, 2 * run.input("images") - 1, run.input("codes")
        grid = tuple(size // model.config.patch_size for size in images.shape[2:])
        found = model.encode(images)
        decoded = (model.decode(tokens) + 1) / 2
        run.row("pre_quant", to_grid(model.features(images), grid))
        run.row("indices", found)
        run.row("quant", to_grid(model.embed(found), grid))
        run.row("codebook_entry", to_grid(model.embed(tokens)))
        run.row("decoded_codes_unclamped", decoded)
        run.row("decoded_codes", decoded.clamp(0, 1))
        run.row("recon", ((model.decode(found, grid) + 1) / 2).clamp(0, 1))


def maetok_tokenizer(golden: Golden) -> None:
    """Latents and images, with both kinds of position embeddings."""
    for run in golden.precisions("maetok_tokenizer", 1e-5, 1e-9):
        model, latents = run.model, run.input("latents")
        found = model.encode(run.input("images"))
        run.row("latents", found)
        run.row("recon", model.decode(found))
        run.row("decoded", model.decode(latents))
        run.row("latents_normalised", model.normalise(found))
        run.row("decoded_from_normalised", model.decode(model.denormalise(latents)))


def vavae(golden: Golden) -> None:
    """Latents are normalised by the diffusion model, here one of the smallest size."""
    statistics = {"latent_mean": golden["input.latent_mean"], "latent_std": golden["input.latent_std"]}
    statistics = {name: tensor.double().flatten().tolist() for name, tensor in statistics.items()}
    multiplier = golden.notes["config"].get("derived", {}).get("latent_multiplier", 1.0)
    for run in golden.precisions("vavae", 3e-5, 1e-9):
        model, images, latents = run.model, run.input("images"), run.input("latents")
        size = SiTConfig(width=2, depth=1, heads=1, latent_multiplier=multiplier, **statistics)
        generator = SiT(size, (1, latents.shape[1]), classes=1)
        grid = tuple(size // model.config.patch_size for size in images.shape[2:])
        show = partial(to_grid, grid=grid)
        posterior = model.posterior(images)
        sample = posterior.mean + posterior.std * to_row(run.input("posterior_noise"))
        run.row("moments", model.to_latent(model.encoder(images)))
        run.row("mean", show(model.encode(images)))
        run.row("logvar", show(posterior.logvar))
        run.row("std", show(posterior.std))
        run.row("sample", show(sample))
        run.row("sample_normalised", show(generator.normalise(sample)))
        shape = tuple(latents.shape[2:])
        run.row("decoded", model.decode(to_row(latents), shape))
        run.row("recon_mode", model.decode(posterior.mean, grid), single=5e-5)
        raw = generator.denormalise(to_row(latents)).to(run.dtype)
        run.row("decoded_from_normalised", model.decode(raw, shape))


# Generators of tokens


def rar_generator(golden: Golden) -> None:
    """Teacher-forced logits in two orders, and cached sampling with three guidances."""
    notes, model = golden.notes, load_pretrained("rar", golden.path)
    tokens, labels, forced = golden["input.tokens"], golden["input.labels"], golden["input.forced_tokens"]
    outputs = [model(tokens, labels, orders) for orders in golden["input.orders"]]
    logits = torch.stack([model.logits(tokens, labels, orders) for orders in golden["input.orders"]])
    golden.row("logits", logits, golden["output.logits"], Tolerance(1e-4))
    golden.row("labels", torch.stack([output.targets for output in outputs]), golden["output.labels"], EXACT)
    losses = torch.stack([cross_entropy(output)["cross_entropy"] for output in outputs])
    golden.row("cross_entropy", losses, golden["output.cross_entropy"], Tolerance(1e-5))
    hits = torch.stack([accuracy(output) for output in outputs])
    golden.row("token_accuracy", hits, golden["output.token_accuracy"], Tolerance(1e-5))

    for suffix, tolerance in (("", 1e-3), ("_2", 5e-4)):
        scale, power = notes[f"guidance_scale{suffix}"], notes[f"guidance_scale_pow{suffix}"]
        sampling = Sampling(guidance_scale=scale, guidance_power=power, temperature=notes["temperature_of_forced_runs"])
        name = f"guidance_scale_per_step{suffix}"
        golden.row(name, guidance_scales(model.length, sampling), golden[f"output.{name}"], Tolerance(relative=1e-5))
        found = model.cached_logits(forced, labels, sampling)
        golden.row(f"guided_logits{suffix}", found, golden[f"output.guided_logits{suffix}"], Tolerance(tolerance))
    found = model.cached_logits(forced, labels, Sampling(guidance_scale=0))
    golden.row("unguided_logits", found, golden["output.unguided_logits"], Tolerance(1e-4))

    cold = {"temperature": notes["temperature_of_greedy_runs"]}
    guided = Sampling(guidance_scale=notes["guidance_scale"], guidance_power=notes["guidance_scale_pow"], **cold)
    rngs = image_rngs(0, range(len(labels)))
    for name, sampling in (("greedy_tokens", guided), ("greedy_tokens_unguided", Sampling(guidance_scale=0, **cold))):
        golden.row(name, model.generate(labels, sampling, rngs), golden[f"output.{name}"], EXACT)


def rar_generator_grad(golden: Golden) -> None:
    """Gradients for the second order of the inputs; rows of tables that the file leaves out are zero."""
    inputs = golden.companion("weights_and_inputs")
    model = load_pretrained("rar", inputs.path).requires_grad_(True)
    output = model(inputs["input.tokens"], inputs["input.labels"], inputs["input.orders"][1])
    loss = cross_entropy(output)["cross_entropy"]
    loss.backward()
    golden.row("loss", loss.double(), torch.tensor(golden.notes["loss"], dtype=torch.float64), Tolerance(1e-5))
    found = {name: parameter.grad for name, parameter in model.named_parameters()}
    expected = golden.under("grad.")
    for name in sorted(found.keys() | expected.keys()):
        if found.get(name) is None or name not in expected:
            golden.fail(f"grad.{name}", "a gradient on one side only")
            continue
        reference = expected[name]
        if f"grad.{name}" in golden.notes["truncated_tables"]["keys"]:
            whole = torch.zeros_like(found[name])
            whole[:, : reference.shape[1]] = reference
            reference = whole
        golden.row(f"grad.{name}", found[name], reference, Tolerance(1e-7, of_largest=1e-4))


def llamagen_gpt(golden: Golden) -> None:
    """Constant guidance, and guidance that ends early."""
    settings = golden.notes["sampling"]
    for run in golden.precisions("llamagen_gpt", 5e-5, 1e-6):
        model, scale = run.model, {"guidance_scale": settings["cfg_scale"], "guidance_power": 0}
        until = min(1.0, (settings["cfg_interval"] + 1) / (model.length - 1))
        _teacher_forced(run)
        for name, sampling in (
            ("no_cfg", Sampling()),
            ("cfg", Sampling(**scale)),
            ("cfg_interval", Sampling(**scale, guidance_until=until)),
        ):
            run.row(f"logits_step_{name}", model.cached_logits(run.input("tokens"), run.input("labels"), sampling))


def gigatok_gpt(golden: Golden) -> None:
    """Constant guidance, and the step schedule."""
    settings = golden.notes["sampling"]
    for run in golden.precisions("gigatok_gpt", 5e-5, 1e-9):
        constant = Sampling(guidance_scale=settings["cfg_scale"], guidance_power=0)
        step = constant.model_copy(update={"guidance_from": settings["window_start"]})
        _teacher_forced(run)
        for name, sampling in (("constant", constant), ("step", step)):
            found = run.model.cached_logits(run.input("tokens"), run.input("labels"), sampling)
            run.row(f"logits_step_cfg_{name}", found)
    scales = guidance_scales(run.model.length, step)
    golden.row("step_scales", scales, golden["input.step_scales"], Tolerance(5e-5))


def _teacher_forced(run: Run) -> None:
    tokens, labels, model = run.input("tokens"), run.input("labels"), run.model
    run.row("logits_teacher_forced", model.logits(tokens, labels))
    run.row("logits_teacher_forced_null", model.logits(tokens, torch.full_like(labels, model.null_label)))


# Generators of continuous latents


def sit(golden: Golden) -> None:
    """ODE and SDE along given noise."""
    settings = golden.notes["sampling"]
    interval = settings["guidance_low"], settings["guidance_high"]
    scale = {"guidance_scale": settings["cfg_scale"], "guidance_interval": interval}
    steps = {"steps": settings["ode_num_steps"]}
    ode, unguided = DiffusionSampling(**steps, **scale), DiffusionSampling(**steps)
    steps = {"steps": settings["sde_num_steps"], "last_step": settings["sde_last_time"]}
    sde = DiffusionSampling(sampler="euler_maruyama", **steps, **scale)
    for run in golden.precisions("sit", 1e-5, 1e-7):
        run.row("velocity", run.model.velocity(run.input("x"), run.input("t"), run.input("y")))
        for name, sampling in (("ode_euler", ode), ("sde", sde)):
            states = _sit_states(run, sampling, run.model.config.path)
            run.row(f"{name}_times", sampling_times(sampling, run.model.noise_time))
            run.row(f"{name}_states", states)
            run.row(f"{name}_final", states[-1])
        run.row("ode_euler_final_unguided", _sit_states(run, unguided, run.model.config.path)[-1])
        run.row("sde_final_cosine", _sit_states(run, sde, "cosine")[-1])


def _sit_states(run: Run, sampling: DiffusionSampling, path: str) -> Tensor:
    """All states (steps + 1, N, L, D), including the start; the SDE takes the noise of the file."""
    model, noise, labels = run.model, run.input("noise"), run.input("labels")
    velocity = guided_model(model.velocity, labels, model.null_label, sampling)
    times, draw = sampling_times(sampling, model.noise_time), partial(next, iter(run.input("sde_noise")))
    states = FlowProcess(sampling, model.noise_time, path).solve(velocity, noise, times, draw)
    return torch.stack([noise.double(), *states])


def lightningdit(golden: Golden) -> None:
    """The authors' code steps a doubled batch; the second half is computed here only for the comparison."""
    settings = golden.notes["sampling"]
    first_guided = settings["cfg_interval_start"]
    scale = {
        "guidance_scale": settings["cfg_scale"],
        "guidance_interval": (first_guided, 1.0),
        "guided_channels": settings["guided_channels"],
    }
    steps = {"steps": settings["num_steps"] - 1}  # the setting counts points in time
    shift = {"timestep_shift": settings["timestep_shift"]}
    guided, even = DiffusionSampling(**steps, **shift, **scale), DiffusionSampling(**steps, **scale)
    for run in golden.precisions("lightningdit", 1e-5, 1e-7):
        model, count = run.model, len(run.input("labels"))
        run.row("velocity", model.velocity(run.input("x"), run.input("t"), run.input("y")))
        noise = to_row(run.input("noise")).repeat(2, 1, 1)  # (2 N, L, D)
        run.row("velocity_cfg", to_grid(_doubled_velocity(noise, 0.5, run, guided)), single=3e-5)
        run.row("velocity_cfg_below_start", to_grid(_doubled_velocity(noise, 0.9 * first_guided, run, guided)))
        for name, sampling in (("ode_euler", guided), ("ode_euler_noshift", even)):
            states = _doubled_states(run, sampling)
            run.row(f"{name}_times", sampling_times(sampling, model.noise_time))
            run.row(f"{name}_states", states, single=3e-5, double=1e-6)
            run.row(f"{name}_final", states[-1, :count], single=3e-5, double=1e-6)
        final = _doubled_states(run, DiffusionSampling(**steps, **shift))[-1, :count]
        run.row("ode_euler_final_unguided", final, double=1e-6)


def _doubled_velocity(x: Tensor, time: float, run: Run, sampling: DiffusionSampling) -> Tensor:
    """Velocity (2 N, L, D): in the first half ours, in the second its guided channels and the others unconditional."""
    model, labels, channels = run.model, run.input("labels"), run.golden.notes["sampling"]["guided_channels"]
    half = x[: len(labels)]  # the other half is not used
    own = guided_model(model.velocity, labels, model.null_label, sampling)(half, time)
    null = model.velocity(half, time, torch.full_like(labels, model.null_label)).double()
    return torch.cat([own, torch.cat([own[..., :channels], null[..., channels:]], dim=-1)])


def _doubled_states(run: Run, sampling: DiffusionSampling) -> Tensor:
    """All states (steps + 1, 2 N, D, H, W), including the start."""
    start, times = to_row(run.input("noise")).repeat(2, 1, 1).double(), sampling_times(sampling, run.model.noise_time)
    velocity = partial(_doubled_velocity, run=run, sampling=sampling)
    states = FlowProcess(sampling, run.model.noise_time).solve(velocity, start, times)
    return torch.stack([to_grid(state) for state in (start, *states)])
