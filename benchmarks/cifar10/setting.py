"""What the studies share: data, public classifiers, and the words of commands."""

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from jobs import Job

EVALUATOR, SECOND, GUIDES = 56, 44, (20, 32)  # depths of the public classifiers: they evaluate, and guide


@dataclass(frozen=True)
class Setting:
    """Where things are.

    Attributes:
        data: words that name the images, such as ``data.name=parquet data.path=cifar10-jpeg``.
        classifiers: folder with resnet20, 32, 44 and 56.safetensors.
        out: folder of all jobs.
    """

    data: tuple[str, ...]
    classifiers: Path
    out: Path

    def weights(self, depth: int) -> str:
        """The file of a public classifier."""
        return str(self.classifiers / f"resnet{depth}.safetensors")

    def losses(self) -> tuple[str, ...]:
        """ResNet-20 is the perceptual network and the discriminator's backbone."""
        weights = self.weights(GUIDES[0])
        return (
            f"reconstruction={{perceptual: cifar-resnet, perceptual_weights: {weights}, perceptual_weight: 0.1}}",
            f"discriminator={{name: cifar-resnet, weights: {weights}}}",
        )

    def extractors(self, second: bool = True) -> tuple[str, ...]:
        """ResNet-56 evaluates. A small classifier, of another architecture and trainer, and ResNet-44 are asked too."""
        more = [f"{{name: classifier, path: {self.out / 'small'}}}"]
        more += [f"{{name: cifar-resnet, path: {self.weights(SECOND)}}}"] * second
        first = ("extractor.name=cifar-resnet", f"extractor.path={self.weights(EVALUATOR)}")
        return (*first, f"more_extractors=[{', '.join(more)}]", f"cache={self.out / 'statistics'}")

    def path(self, *names: str) -> str:
        """The folder of a job."""
        return str(self.out.joinpath(*names))

    def job(self, name: str, needs: Iterable[str], *words: str) -> Job:
        """A job."""
        return Job(name, tuple(needs), words)

    def classifier(self) -> Job:
        """The small classifier: the third opinion, and the semantic teacher."""
        words = ("classifier.steps=600", "classifier.precision=float32")
        return self.job("small", (), "train-classifier", "cifar10/classifier.yaml", *self.data, *words)

    def samples(self, generator: str, name: str, count: int, seed: int, *words: str) -> Job:
        """Free samples of the generator of a job, or of one of its snapshots: ``NAME/generator/snapshot/00000250``."""
        made_by = generator.partition("/snapshot/")[0]
        settings = (f"generator={self.path(generator)}", f"count={count}", f"seed={seed}", "cache.batch_size=500")
        return self.job(name, (made_by,), "generate", *settings, *words)

    def encoded(self, name: str) -> Job:
        """The latents of all training images."""
        tokenizer = f"{name}/tokenizer"
        return self.job(f"{name}/latents", (tokenizer,), "encode", *self.data, f"tokenizer={self.path(tokenizer)}")

    def generator(self, name: str, recipe: str, steps: int, latents: str = "", *words: str) -> Job:
        """A generator of the latents of ``name``, or of another pair, with snapshots at each quarter of its steps."""
        latents = f"{latents or name}/latents"
        given = (f"latents={self.path(latents)}", f"steps={steps}", f"snapshot_every={steps // 4}", "state_every=500")
        return self.job(f"{name}/generator", (latents,), "train-generator", f"cifar10/{recipe}", *given, *words)
