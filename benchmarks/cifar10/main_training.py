"""Main training on CIFAR-10: what perturbation does to tokenizers, and which number predicts a generator's gFD.

Tokenizers differ in perturbation (share of perturbed images, annealing), codebook size, family and semantic teacher,
and in nothing else. There is no adversarial term, which would double the time. The same GPT with the same budget learns
the tokens of each. gFD is measured at a quarter, half and all of its steps.
"""

from collections.abc import Iterator
from dataclasses import dataclass

from jobs import Job
from setting import Setting

STEPS, GENERATOR_STEPS = 500, 400
STRENGTHS = {256: 6, 1024: 26, 4096: 102}  # nearest codes, 2.5 % of the codebook as in the paper
GUIDANCE = (1.0, 1.75)
SAMPLES = 1_000
RATES, SHARES = "[0.9,0.8,0.7,0.6,0.5]", "[0.0122,0.0171,0.022]"  # the published grid's, as shares of its 4,096 codes


@dataclass(frozen=True)
class Main:
    """A tokenizer of the study.

    Attributes:
        family: recipe, ``vq`` (VQGAN) or ``tokenizer`` (the paper's ViT).
        size: codes.
        beta: share of the images that is perturbed in training.
        end: rate and strength at the end, as a share of the start: 1 is no annealing.
        teacher: whether there is a semantic teacher.
        seed: of the tokenizer's and the generator's training.
    """

    family: str
    size: int
    beta: float
    end: float = 0.5
    teacher: bool = False
    seed: int = 0

    @property
    def name(self) -> str:
        """Such as ``vq1024-b0.3``."""
        family = "vit" if self.family == "tokenizer" else "vq"
        end = {1.0: "-none", 0.5: "", 0.0: "-zero"}[self.end]
        more = "-teacher" * self.teacher + (f"-seed{self.seed}" if self.seed else "")
        return f"{family}{self.size}-b{self.beta:g}{end}{more}"


TOKENIZERS = (
    Main("vq", 1024, 0),
    Main("vq", 1024, 0.3),
    Main("vq", 256, 0),
    Main("vq", 256, 0.3),
    Main("vq", 4096, 0),
    Main("vq", 4096, 0.3),
    Main("tokenizer", 1024, 0),
    Main("tokenizer", 1024, 0.3),
    Main("vq", 1024, 0.1),
    Main("vq", 1024, 0.5),
    Main("tokenizer", 1024, 0, teacher=True),
    Main("tokenizer", 1024, 0.3, teacher=True),
    Main("vq", 1024, 0.3, end=1.0),
    Main("vq", 1024, 0.3, end=0.0),
    *(Main("vq", size, beta, seed=seed) for seed in (1, 2) for size in (1024, 256, 4096) for beta in (0, 0.3)),
)


def jobs(setting: Setting) -> Iterator[Job]:
    """Everything, tokenizer by tokenizer."""
    yield setting.classifier()
    for main in TOKENIZERS:
        yield tokenizer(setting, main)
        yield setting.encoded(main.name)
        seed = (f"seed={main.seed}",) if main.seed else ()
        yield setting.generator(main.name, "gpt.yaml", GENERATOR_STEPS, "", *seed)
        yield from figures(setting, main.name)


def steps() -> tuple[int, ...]:
    """Steps of the generator at which gFD is measured."""
    return GENERATOR_STEPS // 4, GENERATOR_STEPS // 2, GENERATOR_STEPS


def tokenizer(setting: Setting, main: Main) -> Job:
    """Main training."""
    words = [f"tokenizer.quantizer.size={main.size}", f"perturbation.proportion={main.beta}", f"steps={STEPS}"]
    if main.beta:
        words += ["perturbation.rate=1", f"perturbation.strength={STRENGTHS[main.size]}"]
        words += [f"perturbation.anneal_end={STEPS}", f"perturbation.end_ratio={main.end}"] if main.end < 1 else []
    if main.teacher:
        words += ["teacher.name=classifier", f"teacher.path={setting.path('small')}", "tokenizer.teacher_width=64"]
    needs = ("small",) if main.teacher else ()
    recipe = f"cifar10/{main.family}.yaml"
    words += ["adversarial.weight=0", "state_every=250", *([f"seed={main.seed}"] if main.seed else [])]
    return setting.job(f"{main.name}/tokenizer", needs, "main-train", recipe, *setting.data, *setting.losses(), *words)


def figures(setting: Setting, name: str) -> Iterator[Job]:
    """Reconstructions, pFD, and gFD over the generator's steps with and without guidance."""
    tokenizer = (f"tokenizer={setting.path(name, 'tokenizer')}", *setting.data, *setting.extractors(second=False))
    needs = (f"{name}/tokenizer", "small")
    found = "metrics=[rfid,psnr,codebook,ifid]"
    yield setting.job(f"{name}/figures", needs, "evaluate", *tokenizer, found, "data.limit=2000")
    grid = ("pfid.grid.name=published-fast", "allow_fewer=true", "metrics=[pfid]", "data.limit=500")
    yield setting.job(f"{name}/pfid", needs, "evaluate", *tokenizer, *grid)
    for step in steps():
        for guidance in GUIDANCE:
            out = f"{name}/samples-{step}-{guidance:g}"
            how = ("sampling.name=tokens", f"sampling.guidance_scale={guidance}", "sampling.guidance_power=0")
            yield setting.samples(f"{name}/generator/snapshot/{step:08d}", out, SAMPLES, 1, *how)
            latents = f"samples.latents=[{setting.path(out)}]"
            tags = (f"tags.step={step}", f"tags.guidance={guidance}")
            yield setting.job(
                f"{name}/gfid-{step}-{guidance:g}",
                (out, "small"),
                "evaluate",
                *tokenizer,
                latents,
                "metrics=[gfid]",
                *tags,
            )
