"""Post-training on CIFAR-10: four pairs of tokenizer and generator, every objective beside its controls.

Also: whether a decoder that was post-trained for one generator serves another one, for which generators, weak to
strong, it pays, and after how many steps gFD turns.
"""

from collections.abc import Iterator
from dataclasses import dataclass

from jobs import Job
from setting import GUIDES, Setting

TOKENIZER_STEPS, GENERATOR_STEPS = 800, 1000
STEPS, BATCH = 150, 32
SETS, CHOOSING = (1, 2, 3, 4), 11  # seeds of the reported samples, and of those that choose sigma
SAMPLES = 1_000  # in a set
SEEDS = (1, 2)  # of further post-trainings
LONG, EVERY = 600, 100  # steps of a longer post-training, and of its measurements
LONG_PAIRS = ("gpt", "lightningdit")


@dataclass(frozen=True)
class Pair:
    """A tokenizer and its generator.

    Attributes:
        name: of its folder.
        tokenizer: recipe.
        generator: recipe.
        sigmas: of the paired objective.
        words: further settings of the tokenizer.
    """

    name: str
    tokenizer: str
    generator: str
    sigmas: tuple[float, ...]
    words: tuple[str, ...] = ()


PAIRS = (
    Pair("gpt", "vq.yaml", "gpt.yaml", (0.9, 0.8), ("perturbation.proportion=0", "tokenizer.quantizer.size=1024")),
    Pair("lightningdit", "kl.yaml", "lightningdit.yaml", (0.7, 0.5)),
    Pair("rar", "tokenizer.yaml", "generator.yaml", (0.9, 0.8), ("tokenizer.quantizer.size=1024",)),
    Pair("sit", "vit.yaml", "sit.yaml", (0.8, 0.6)),
)
OTHERS = {  # generators of the first pair's tokens that its decoders were not trained for
    "gpt-seed1": ("gpt.yaml", "seed=1"),
    "gpt-small": ("gpt.yaml", "generator.width=64", "generator.depth=2"),
    "rar-vq": ("generator.yaml",),
}


@dataclass(frozen=True)
class Post:
    """A post-training.

    Attributes:
        objective: ``clean``, ``noise``, ``paired``, ``free``, ``free+clean``.
        sigma: of paired.
        reencoded: whether mixtures are decoded and encoded again (the paper).
        frechet: whether the Frechet term is added.
        seed: of the training.
        step: of the generator; None is the last.
        steps: of the post-training.
    """

    objective: str
    sigma: float | None = None
    reencoded: bool = False
    frechet: bool = False
    seed: int = 0
    step: int | None = None
    steps: int = STEPS

    @property
    def name(self) -> str:
        """Such as ``paired-0.8-reencoded``."""
        parts = [self.objective, *([f"{self.sigma:g}"] if self.sigma is not None else [])]
        parts += ["reencoded"] * self.reencoded + ["frechet"] * self.frechet
        parts += [f"seed{self.seed}"] * bool(self.seed) + ([f"step{self.step}"] if self.step else [])
        parts += [f"{self.steps}steps"] * (self.steps != STEPS)
        return "-".join(parts)


def objectives(pair: Pair) -> list[Post]:
    """What is compared, but re-encoded pairs, whose sigma is chosen first."""
    paired = [Post("paired", sigma) for sigma in pair.sigmas]
    return [Post("clean"), Post("noise"), *paired, Post("free"), Post("free", frechet=True), Post("free+clean")]


def jobs(setting: Setting) -> Iterator[Job]:
    """Everything whose settings no result decides."""
    yield setting.classifier()
    for pair in PAIRS:
        yield from trained(setting, pair)
        yield from caches(setting, pair)
        for post in objectives(pair):
            yield from post_trained(setting, pair, post)
        names = [post.name for post in objectives(pair) if post.objective == "paired"]
        yield evaluated(setting, pair, "sigma", names, ("choosing",))


def last_jobs(setting: Setting, best: dict[str, float]) -> Iterator[Job]:
    """What needs the best sigma of each pair: re-encoded pairs, other seeds, the figures, transfer, weak generators."""
    for pair in PAIRS:
        sigma = best[pair.name]
        again = Post("paired", sigma, reencoded=True)
        yield from post_trained(setting, pair, again)
        posts = [*objectives(pair), again]
        yield evaluated(setting, pair, "gfid", [p.name for p in posts], sets())
        for post in [None, *posts]:
            yield reconstructed(setting, pair, post)
    yield from transfer(setting, best)
    for pair in PAIRS:
        yield from weak_generators(setting, pair)
        if pair.name in LONG_PAIRS:
            yield from how_long(setting, pair)
    for seed in SEEDS:
        for pair in PAIRS:
            posts = [Post("clean", seed=seed), Post("free", seed=seed)]
            for post in posts:
                yield from post_trained(setting, pair, post)
            yield evaluated(setting, pair, f"gfid-seed{seed}", [p.name for p in posts], sets())


def sets() -> tuple[str, ...]:
    """Names of the reported samples."""
    return tuple(f"samples-{seed}" for seed in SETS)


def trained(setting: Setting, pair: Pair) -> Iterator[Job]:
    """Tokenizer, latents and generator."""
    words = (f"steps={TOKENIZER_STEPS}", "state_every=400", "adversarial.start=550", *pair.words)
    settings = (f"cifar10/{pair.tokenizer}", *setting.data, *setting.losses(), *words)
    yield setting.job(f"{pair.name}/tokenizer", (), "main-train", *settings)
    yield setting.encoded(pair.name)
    yield setting.generator(pair.name, pair.generator, GENERATOR_STEPS)


def caches(setting: Setting, pair: Pair) -> Iterator[Job]:
    """Samples to report, to choose with and to learn from, and pairs."""
    source = f"{pair.name}/generator"
    for seed in SETS:
        yield setting.samples(source, f"{pair.name}/samples-{seed}", SAMPLES, seed)
    yield setting.samples(source, f"{pair.name}/choosing", 2 * SAMPLES, CHOOSING)
    yield setting.samples(source, f"{pair.name}/free", STEPS * BATCH, 987654321)
    for sigma in pair.sigmas:
        yield mixed(setting, pair, Post("paired", sigma))


def mixed(setting: Setting, pair: Pair, post: Post) -> Job:
    """Pairs."""
    words = [f"generator={setting.path(pair.name, 'generator')}", f"latents={setting.path(pair.name, 'latents')}"]
    words += [f"sigma={post.sigma}", f"count={STEPS * BATCH}", "cache.batch_size=500"]
    if post.reencoded:
        words += ["mode=reencoded", f"tokenizer={setting.path(pair.name, 'tokenizer')}"]
    needs = (f"{pair.name}/generator", f"{pair.name}/latents")
    return setting.job(cache_of(pair, post), needs, "make-pairs", *words)


def cache_of(pair: Pair, post: Post) -> str:
    """Job of the pairs or samples that it learns from."""
    if post.objective == "paired":
        return f"{pair.name}/pairs-{post.sigma:g}{'-reencoded' * post.reencoded}"
    return f"{pair.name}/free{f'-{post.step}' if post.step else ''}"


def post_trained(setting: Setting, pair: Pair, post: Post) -> Iterator[Job]:
    """The post-training, and re-encoded pairs before it."""
    if post.reencoded:
        yield mixed(setting, pair, post)
    words = [f"tokenizer={setting.path(pair.name, 'tokenizer')}", f"seed={post.seed}", f"steps={post.steps}"]
    words += [f"snapshot_every={EVERY}"] if post.steps != STEPS else []
    words.append("objective={free: 1, clean: 1}" if post.objective == "free+clean" else f"objective={post.objective}")
    needs = [f"{pair.name}/tokenizer"]
    if "clean" in post.objective or post.objective == "noise":
        needs.append(f"{pair.name}/latents")
        words.append(f"latents={setting.path(pair.name, 'latents')}")
    if post.objective == "paired" or "free" in post.objective:
        needs.append(cache_of(pair, post))
        words.append(f"{'pairs' if post.objective == 'paired' else 'samples'}={setting.path(cache_of(pair, post))}")
    if post.frechet:
        spaces = ", ".join(f"{{name: cifar-resnet, path: {setting.weights(depth)}}}" for depth in GUIDES)
        words += ["frechet.weight=1", f"frechet.extractors=[{spaces}]"]
    yield setting.job(
        f"{pair.name}/post-{post.name}",
        needs,
        *(
            "post-train",
            "cifar10/post.yaml",
            *setting.data,
            *setting.losses(),
            f"batch_size={BATCH}",
            "adversarial.weight=0.1",
            *words,
        ),
    )


def decoders(setting: Setting, pair: Pair, names: list[str]) -> list[str]:
    """Words that name decoders, the untouched one first; ``free-600steps/100`` is a snapshot."""
    paths = {"before": (pair.name, "tokenizer")}
    for name in names:
        run, _, step = name.partition("/")
        paths[name] = (pair.name, f"post-{run}", *(["snapshot", f"{int(step):08d}"] if step else []))
    return [f"samples.decoders={{{', '.join(f'{name}: {setting.path(*path)}' for name, path in paths.items())}}}"]


def evaluated(setting: Setting, pair: Pair, out: str, names: list[str], samples: tuple[str, ...]) -> Job:
    """Distances of all decoders' images of the same samples, those of this or of another generator."""
    samples = tuple(name if "/" in name else f"{pair.name}/{name}" for name in samples)
    needs = (*samples, "small", *dict.fromkeys(f"{pair.name}/post-{name.partition('/')[0]}" for name in names))
    words = [
        f"samples.latents=[{', '.join(setting.path(name) for name in samples)}]",
        *decoders(setting, pair, names),
        "metrics=[gfid,gfid_validation,kid,gap]",
    ]
    return setting.job(f"{pair.name}/{out}", needs, "evaluate", *setting.data, *setting.extractors(), *words)


def reconstructed(setting: Setting, pair: Pair, post: Post | None) -> Job:
    """The price: distance and fidelity of reconstructions of 2,000 test images."""
    decoder = (pair.name, f"post-{post.name}") if post else (pair.name, "tokenizer")
    words = (f"tokenizer={setting.path(*decoder)}", "metrics=[rfid,psnr]", "data.limit=2000")
    needs = ("/".join(decoder), "small")
    name = f"{pair.name}/reconstructions-{post.name if post else 'before'}"
    return setting.job(name, needs, "evaluate", *setting.data, *setting.extractors(), *words)


def transfer(setting: Setting, best: dict[str, float]) -> Iterator[Job]:
    """The decoders of the first pair on samples of other generators of the same tokens."""
    pair = PAIRS[0]
    for name, (recipe, *words) in OTHERS.items():
        yield setting.generator(name, recipe, GENERATOR_STEPS, pair.name, *words)
        yield setting.samples(f"{name}/generator", f"{name}/samples-1", 2 * SAMPLES, 1)
        compared = [Post("clean"), Post("paired", best[pair.name]), Post("free"), Post("free+clean")]
        yield evaluated(setting, pair, f"transfer-{name}", [p.name for p in compared], (f"{name}/samples-1",))


def weak_steps() -> tuple[int, ...]:
    """Steps of the generators that are not trained to the end."""
    return GENERATOR_STEPS // 4, GENERATOR_STEPS // 2


def weak_generators(setting: Setting, pair: Pair) -> Iterator[Job]:
    """Snapshots of the generator: a decoder for each, beside the control, on its samples."""
    for step in weak_steps():
        source, post = f"{pair.name}/generator/snapshot/{step:08d}", Post("free", step=step)
        yield setting.samples(source, f"{pair.name}/reported-{step}", 2 * SAMPLES, 1)
        yield setting.samples(source, cache_of(pair, post), STEPS * BATCH, 987654321)
        yield from post_trained(setting, pair, post)
        yield evaluated(setting, pair, f"gfid-{step}", ["clean", post.name], (f"reported-{step}",))


def how_long(setting: Setting, pair: Pair) -> Iterator[Job]:
    """Measure gFD over the steps of longer post-trainings, on half of the reported samples."""
    posts = [Post("clean", steps=LONG), Post("free", steps=LONG)]
    for post in posts:
        yield from post_trained(setting, pair, post)
    names = [f"{post.name}/{step}" for post in posts for step in range(EVERY, LONG + 1, EVERY)]
    yield evaluated(setting, pair, "gfid-long", names, sets()[:2])
