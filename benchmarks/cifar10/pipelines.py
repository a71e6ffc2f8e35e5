"""Post-training of a small Stable Diffusion that ``train_pipeline.py`` trained, beside its controls.

The sampler is that of the pipeline: DDIM with a few steps and guidance, prompts from the labels.
"""

from collections.abc import Iterator

from jobs import Job
from setting import Setting

from post_training import Pair

STEPS, BATCH = 30, 32
SETS, SAMPLES = (1, 2), 250  # seeds of the reported samples, and how many in a set
IMAGES, TESTS = 3_000, 500  # training images, for pairs and as the reference of gFD; test images to reconstruct
SIGMAS = (0.9, 0.7)  # the first one's job also reads the pipeline and encodes images; "clean" is sigma = 1
SAMPLING = ("name=pipeline", "steps=10", "guidance_scale=2")
PAIR = Pair("pipeline", "", "", SIGMAS)
FIRST = f"pipeline/post-paired-{SIGMAS[0]:g}"
PARTS = {name: f"{FIRST}/{name}" for name in ("tokenizer", "generator", "latents")}


def jobs(setting: Setting, pipeline: str) -> Iterator[Job]:
    """Everything: the pipeline's folder to decoders, their samples and reconstructions."""
    data = (*setting.data, f"data.limit={IMAGES}")
    path = {name: setting.path(part) for name, part in PARTS.items()}
    losses = (*setting.losses(), f"steps={STEPS}", f"batch_size={BATCH}", "adversarial.weight=0.1")
    losses += ("adversary_warmup=20", "learning_rate=3e-4", "warmup_steps=3", "ema_decay=0.9")  # a few strong steps
    recipe = ("post-train", "cifar10/post.yaml", *data, *losses)
    yield setting.classifier()
    sampling = [f"mixture.sampling.{word}" for word in SAMPLING]
    whole = (f"pipeline={pipeline}", 'generator.config.prompt="a photo of a {label}"', f"sigma={SIGMAS[0]:g}")
    yield setting.job(FIRST, (), *recipe, *whole, *sampling, "cache.batch_size=100")
    own = (f"generator={path['generator']}", "cache.batch_size=100", *(f"sampling.{word}" for word in SAMPLING))
    for seed in SETS:
        name, words = f"pipeline/samples-{seed}", (f"count={SAMPLES}", f"seed={seed}")
        yield setting.job(name, (FIRST,), "generate", *own, *words)
    yield setting.job("pipeline/free", (FIRST,), "generate", *own, f"count={STEPS * BATCH}", "seed=987654321")
    learned = {"clean": ("latents",), "noise": ("latents",), "free": ("samples",)}
    free = {"latents": path["latents"], "samples": setting.path("pipeline/free")}
    for name, caches in learned.items():
        words = [f"objective={name}", *(f"{cache}={free[cache]}" for cache in caches)]
        yield _post_trained(setting, recipe, path, name, ("pipeline/free",) if "samples" in caches else (), words)
    for sigma in SIGMAS[1:]:
        pairs = f"pipeline/pairs-{sigma:g}"
        words = (f"latents={path['latents']}", f"sigma={sigma:g}", f"count={STEPS * BATCH}")
        yield setting.job(pairs, (FIRST,), "make-pairs", *own, *words)
        yield _post_trained(setting, recipe, path, f"paired-{sigma:g}", (pairs,), [f"pairs={setting.path(pairs)}"])
    yield from _measured(setting, data, path)


def names() -> list[str]:
    """The decoders that are compared, besides the untouched one."""
    return ["clean", "noise", *(f"paired-{sigma:g}" for sigma in SIGMAS), "free"]


def _post_trained(
    setting: Setting, recipe: tuple[str, ...], path: dict[str, str], name: str, needs: tuple[str, ...], words: list[str]
) -> Job:
    return setting.job(f"pipeline/post-{name}", (FIRST, *needs), *recipe, f"tokenizer={path['tokenizer']}", *words)


def _measured(setting: Setting, data: tuple[str, ...], path: dict[str, str]) -> Iterator[Job]:
    """Distances of all decoders' images of the same samples; reconstructions of test images."""
    posts = {name: f"pipeline/post-{name}" for name in names()}
    decoders = {"before": path["tokenizer"]} | {name: setting.path(job) for name, job in posts.items()}
    samples = [f"pipeline/samples-{seed}" for seed in SETS]
    yield setting.job(
        "pipeline/gfid",
        (*samples, "small", *posts.values()),
        "evaluate",
        *data,
        *setting.extractors(second=False),
        f"samples.latents=[{', '.join(map(setting.path, samples))}]",
        f"samples.decoders={{{', '.join(f'{name}: {folder}' for name, folder in decoders.items())}}}",
        "metrics=[gfid,kid]",
    )
    for name, folder in decoders.items():
        words = (f"tokenizer={folder}", "metrics=[rfid,psnr]", *setting.data, f"data.limit={TESTS}")
        needs = (posts.get(name, FIRST), "small")
        yield setting.job(f"pipeline/reconstructions-{name}", needs, "evaluate", *words, *setting.extractors(False))
