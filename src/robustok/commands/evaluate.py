"""The `evaluate` command."""

from pathlib import Path

from robustok.commands.generate import GenerateRun, SampleCacheSettings, generate
from robustok.devices import start_accelerator
from robustok.evaluation.comparison import COMPARED
from robustok.evaluation.evaluator import Evaluator
from robustok.evaluation.reconstructions import reconstructions
from robustok.evaluation.samples import decoded_samples, image_set
from robustok.evaluation.settings import EvaluateRun
from robustok.files import append_line, writing
from robustok.types import Measurement


def evaluate(run: EvaluateRun) -> list[Measurement]:
    """Measure everything that was asked for and applies; append the lines to metrics.jsonl.

    Raises:
        UserError: tokenizers, latents, images or data are missing or do not belong together; a published protocol is
            asked for with fewer images than it has, without ``allow_fewer``.
    """
    accelerator = start_accelerator()
    evaluator = Evaluator(accelerator, run)
    found: list[Measurement] = []
    if run.tokenizer is not None and run.data is not None:  # without data it decodes the generator's samples only
        found += reconstructions(evaluator, run.tokenizer)
    latents = list(run.latents)
    if run.generator is not None:
        evaluator.check_counts(COMPARED, run.count)
        latents += [_sample(run, number) for number in range(run.sets)]
    if latents:
        decoders = run.decoders or {"original": run.tokenizer}
        found += decoded_samples(evaluator, latents, decoders)
    for name, path in run.images.items():
        found += image_set(evaluator, name, path)
    if accelerator.is_main_process:
        with writing(run.out):
            run.out.mkdir(parents=True, exist_ok=True)
        for measurement in found:
            append_line(run.out / "metrics.jsonl", measurement.line())
    return found


def _sample(run: EvaluateRun, number: int) -> Path:
    """One set of samples of the generator, in a folder that another evaluation finds complete."""
    out = run.out / "samples" / f"{run.seed + number:06d}"
    return generate(
        GenerateRun(
            out=out,
            generator=run.generator,
            count=run.count,
            sampling=run.sampling,
            seed=run.seed + number,
            cache=SampleCacheSettings(batch_size=run.batch_size),
        )
    )
