"""The `evaluate` command."""

from pathlib import Path

from robustok.commands.generate import GenerateRun, SampleCacheSettings, generate
from robustok.devices import start_accelerator
from robustok.evaluation.adm import write_adm_reference
from robustok.evaluation.evaluator import Evaluator
from robustok.evaluation.reconstructions import reconstructions
from robustok.evaluation.samples import decoded_samples, finished_images
from robustok.evaluation.settings import EvaluateRun
from robustok.files import append_line, check_appendable, inside, writing
from robustok.training.common import processes_of
from robustok.types import Measurement


def evaluate(run: EvaluateRun) -> list[Measurement]:
    """Measure everything that was asked for and applies; append the lines to metrics.jsonl.

    Raises:
        UserError: tokenizers, latents, images or data are missing or do not belong together; a metric has a published
            protocol of more images than there are, without ``allow_fewer``.
    """
    accelerator = start_accelerator()
    file = inside(run.out, "metrics.jsonl")
    check_appendable(file)
    evaluator = Evaluator(run, accelerator.device, processes_of(accelerator))
    decoders = [run.tokenizer, *(run.samples.decoders.values() if run.samples is not None else ())]
    for path in dict.fromkeys(path for path in decoders if path is not None):
        evaluator.note_guides(path)
    found: list[Measurement] = []
    if run.tokenizer is not None and run.data is not None:  # without data it decodes samples only
        found += reconstructions(evaluator, run.tokenizer, _samples(evaluator) if run.pfid.calibrated else ())
    if run.samples is not None:
        decoders = run.samples.decoders or {"original": run.tokenizer}
        found += decoded_samples(evaluator, _samples(evaluator), decoders)
    for name, path in run.images.items():
        found += finished_images(evaluator, name, path)
    for name, path in run.paired_images.items():
        found += finished_images(evaluator, name, path, paired=True)
    if run.adm_reference is not None:
        write_adm_reference(evaluator, run.adm_reference, inside(run.out, "reference.npz"))
    if accelerator.is_main_process and found:
        with writing(run.out):
            run.out.mkdir(parents=True, exist_ok=True)
        for measurement in found:
            append_line(file, measurement.line())
    return found


def _samples(evaluator: Evaluator) -> list[Path]:
    """The caches of samples; those of the generator are made first, if they are not there yet."""
    run = evaluator.run
    if run.samples.generator is None:
        return run.samples.latents
    evaluator.check_count("samples", run.samples.count)
    return [*run.samples.latents, *(_sample(run, number) for number in range(run.samples.sets))]


def _sample(run: EvaluateRun, number: int) -> Path:
    """One set of samples of the generator, in a folder that another evaluation finds complete."""
    seed = run.seed + number
    return generate(
        GenerateRun(
            out=inside(run.out, "samples", f"{seed:06d}"),
            generator=run.samples.generator,
            count=run.samples.count,
            sampling=run.samples.sampling,
            seed=seed,
            cache=SampleCacheSettings(batch_size=run.batch_size, precision=run.precision),
        )
    )
