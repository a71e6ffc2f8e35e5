"""Post-training: the decoder is fine-tuned on latents that a generator made.

In the paper, latents come from a cache of pairs: real latents mixed with samples of the generator. Each is decoded and
compared with its real image, with the losses and the discriminator of main training. Other objectives, and mixtures of
them, are in ``objectives.py``. Encoder and quantiser are frozen and in eval mode; a digest of their weights before and
after checks it.
"""

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from robustok.config import load
from robustok.data.buckets import bucket_folder, open_buckets
from robustok.data.dataset import ImageDataset
from robustok.data.latent_cache import LatentCache
from robustok.data.latent_checks import check_indices
from robustok.devices import start_accelerator
from robustok.errors import UserError
from robustok.evaluation.held_out import HeldOutScore, ReconstructionScore, reconstruction_score
from robustok.files import inside, tensor_digest
from robustok.losses.frechet import FrechetTerm
from robustok.losses.reconstruction import ReconstructionTerms
from robustok.precision import cast_weights
from robustok.randomness import seed_step
from robustok.runs import RunFolder
from robustok.tokenizers import encoder_digest, load_tokenizer
from robustok.training.adversary import last_layer
from robustok.training.authors import AuthorsStep
from robustok.training.common import STATISTICS, average_copy, processes_of
from robustok.training.decoder_losses import frechet_term, make_adversary, start_frechet, warm_up
from robustok.training.decoder_settings import DecoderTrainingRun, adversary_policy
from robustok.training.decoder_snapshots import Snapshots
from robustok.training.finite import FiniteCheck
from robustok.training.inputs import input_digests, may_change
from robustok.training.latent_crops import cropping
from robustok.training.objectives import Examples, Material, Steps, mixture, needed_caches, open_caches
from robustok.training.prepared import PreparedInParts, differentiated
from robustok.training.state import TrainingState, optimise
from robustok.training.tracking import check_tracker, start_tracking
from robustok.types import Tokenizer


class LatentDecoder(nn.Module):
    """A tokenizer whose forward is its decoder and whose other weights are frozen, for DDP to wrap."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        super().__init__()
        self.tokenizer = tokenizer.requires_grad_(False)
        for module in tokenizer.decoder_modules():
            module.requires_grad_(True)

    def train(self, mode: bool = True) -> "LatentDecoder":
        """Train mode for the decoder; encoder and quantiser stay in eval mode."""
        super().train(False)
        for module in self.tokenizer.decoder_modules():
            module.train(mode)
        return self

    def forward(self, latents: Tensor) -> Tensor:
        """Latents to images (N, 3, H, W)."""
        return self.tokenizer.decode(latents)


class DecoderStep:
    """The paper's procedure for a training step; the authors' is :class:`robustok.training.authors.AuthorsStep`.

    Attributes:
        model: what is trained.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.model = LatentDecoder(tokenizer)

    def inputs(self, latents: Tensor) -> tuple:
        """Inputs of the model's forward."""
        return (latents,)

    def reconstructions(self, output: Tensor) -> Tensor:
        """The images (N, 3, H, W) of the model's output."""
        return output

    def terms(self, _output: Tensor) -> dict[str, Tensor]:
        """Terms of the loss beside reconstruction and adversary: none."""
        return {}


def train_decoder(run: DecoderTrainingRun, enough: Callable[[int, Path], bool] | None = None) -> Path:
    """Post-train a decoder; resume if the run folder holds a state.

    Args:
        run: settings.
        enough: called after each snapshot with its step and folder, in all processes: whether to stop there.

    Returns:
        The folder of the best snapshot with ``held_out`` or ``max_reconstruction_loss``, else of the last one.

    Raises:
        UserError: tokenizer, pairs, data, configuration or run folder do not fit; the loss is not finite.
    """
    check_tracker(run)
    accelerator = start_accelerator(run.batch_size, run.gradient_accumulation, run.precision)
    device, rank = accelerator.device, accelerator.process_index
    bare = load_tokenizer(run.tokenizer).to(device)
    before = encoder_digest(bare)
    buckets = open_buckets(run.data, bare)
    caches = [_open_caches(run, data, before) for data in buckets]
    reconstruction_terms = ReconstructionTerms(run.reconstruction, device, run.precision)
    frechet = frechet_term(run, device, " ".join(data.fingerprint for data in buckets))
    folder = RunFolder(run, accelerator.is_main_process, later=may_change(run))
    score = _held_out_score(run, bare, buckets, accelerator) if run.held_out else None
    price = _price(run, bare, accelerator)

    authors = run.trainable == "authors"
    bare.latent_space = before if authors else None  # the digest of the latents it decodes, though its weights change
    procedure = AuthorsStep(run, bare, caches[0]["pairs"].manifest.source.get("mode")) if authors else DecoderStep(bare)
    frozen = {name for name, p in bare.named_parameters() if not p.requires_grad}
    original = _digest(bare, frozen)
    average, layer = average_copy(bare), last_layer(bare)
    decoder = PreparedInParts(procedure.model, run, accelerator, layer)
    optimizer = decoder.optimizer()
    seed_step(run.seed, step=0, rank=0)  # the same initial weights of a new discriminator in every process
    adversary = make_adversary(run, accelerator)
    untouched = average
    if "free" in run.objective:  # copied before a state is loaded
        untouched = cast_weights(average_copy(average), run.precision)
    material = [
        Material(untouched, data, own, run.noise, run.precision, cropping(run.crop, bare, data.shape))
        for data, own in zip(buckets, caches, strict=True)
    ]
    snapshots = Snapshots(run, folder, average, adversary, caches, score, price)
    finite, extras = FiniteCheck(run.out, accelerator), [snapshots, *filter(None, [frechet])]
    state = TrainingState("tokenizer", bare, average, optimizer, finite, adversary, extras)
    first = folder.restore(state, input_digests(run, *buckets))
    fresh = first == 0
    if fresh and run.continue_from is not None:
        first, previous = _previous_state(run.continue_from)
        state.load(previous | snapshots.state())
    if _digest(bare, frozen) != original:
        raise UserError(
            f"the state in {run.continue_from if fresh else run.out} is of another tokenizer; give that one"
        )
    batches = _batches(run, material, first, run.steps - first, accelerator)
    if frechet is not None and not frechet.started:
        start_frechet(frechet, run, material, accelerator)
    folder.start()
    start_tracking(folder, first)
    if fresh:
        if first == 0 and adversary is not None and adversary_policy(run) == "reinit_warmup":
            warmup = _batches(run, material, 0, run.adversary_warmup, accelerator)
            folder.log(0, warm_up(adversary, average, warmup, run))
        snapshots.write(first)
        accelerator.wait_for_everyone()

    for step in folder.steps(range(first, run.steps), state, run.state_every, accelerator):
        batch = next(batches)
        seed_step(run.seed, step, rank)
        decoder.train()

        # 1. Decode the latents; compare the images with their targets.
        output = decoder(*procedure.inputs(batch.latents))
        decoded = batch.cut.decoded(procedure.reconstructions(output))  # (N, 3, H, W), or crops
        terms = _compare(decoder, reconstruction_terms, batch, decoded)
        reconstruction_loss = sum(terms.values())
        terms |= procedure.terms(output) | _frechet_terms(frechet, batch, decoded)

        # 2. One step of the decoder, then one of the discriminator on the same images.
        if adversary is not None and adversary.started(step):
            fake = adversary.features(decoded, step, "fake")
            terms["adversarial"], weight = adversary.term(fake, decoded, reconstruction_loss, layer)
            state.meter.add({"adaptive_weight": weight})
        optimise(decoder, state, [terms], step)
        if adversary is not None and adversary.started(step):
            state.meter.add(adversary.step(batch.real, fake, step))

        # 3. Log; snapshot with its score.
        done = step + 1
        if run.due(run.log_every, done):
            folder.log(done, state.means())
        if run.due(run.snapshot_every, done):
            state.settle()
            snapshots.write(done)
            accelerator.wait_for_everyone()
            if enough is not None and enough(done, snapshots.path(done)) and done < run.steps:
                return snapshots.path(done)
    if any(_digest(model, frozen) != original for model in (bare, average)):
        raise RuntimeError("frozen weights changed during post-training: this is a bug, please report it")
    return snapshots.chosen(folder.last_snapshot(snapshots.write_again, accelerator))


def _open_caches(run: DecoderTrainingRun, data: ImageDataset, digest: str) -> dict[str, LatentCache]:
    """The caches of latents of these images; ``digest`` is of the latent space."""
    paths = {name: bucket_folder(getattr(run, name), run.data, data) for name in needed_caches(run.objective)}
    caches = open_caches(paths, digest)
    for name, cache in caches.items():
        if name == "samples":
            continue
        if cache.manifest.data != data.fingerprint:
            raise UserError(
                f"{cache.path} pairs latents with other images than {data.describe()}; give the data they were encoded "
                "from"
            )
        check_indices(cache, len(data))
    return caches


def _batches(
    run: DecoderTrainingRun, material: Sequence[Material], first: int, count: int, accelerator: Any
) -> Iterator[Examples]:
    """What this process learns from in ``count`` steps from ``first`` on."""
    steps = Steps(run.batch_size, run.seed, first, count, accelerator.process_index, accelerator.num_processes)
    return mixture(material, run.objective, run.consistency, steps, run.gradient_accumulation, run.workers)


def _compare(
    decoder: PreparedInParts, terms: ReconstructionTerms, batch: Examples, decoded: Tensor
) -> dict[str, Tensor]:
    """Terms between decoded images (N, 3, H, W) and their targets: of each objective, if there are several."""
    found = {}
    for part in batch.parts:
        prefix = f"{part.name}_" if len(batch.parts) > 1 else ""
        means = decoder.means(terms, batch.targets[part.rows], decoded[part.rows])
        found |= {prefix + name: part.weight * value for name, value in means.items()}
    return found


def _frechet_terms(frechet: FrechetTerm | None, batch: Examples, decoded: Tensor) -> dict[str, Tensor]:
    """Terms between the decoded free samples among the images (N, 3, H, W) and real images, if there are any."""
    if frechet is None:
        return {}
    images = decoded[next(part.rows for part in batch.parts if part.name == "free")]
    return {name: differentiated(term, images) for name, term in frechet(images).items()}


def _digest(tokenizer: nn.Module, names: set[str]) -> str:
    return tensor_digest({name: p for name, p in tokenizer.named_parameters() if name in names})


def _held_out_score(
    run: DecoderTrainingRun, tokenizer: Tokenizer, buckets: Sequence[ImageDataset], accelerator: Any
) -> Callable[[Callable], float]:
    """Function of a decoder: Fréchet distance of its images of the held-out samples to the real images.

    All processes make it, and call it.
    """
    processes, cache = processes_of(accelerator), run.held_out.cache or inside(run.out, STATISTICS)
    score = HeldOutScore(run.held_out, tokenizer, buckets, accelerator.device, 1, run.workers, processes, cache)
    return lambda decode: score(decode)[0]


def _price(run: DecoderTrainingRun, tokenizer: Tokenizer, accelerator: Any) -> ReconstructionScore | None:
    """The score of reconstructions of held-out real images, where decoders are compared. All processes make it."""
    limited = run.max_reconstruction_loss is not None
    if run.held_out is None and not limited:
        return None
    extractor, processes = None if run.held_out is None else run.held_out.extractor, processes_of(accelerator)
    return reconstruction_score(run.data, tokenizer, extractor, limited, workers=run.workers, processes=processes)


def _previous_state(path: Path) -> tuple[int, dict[str, Any]]:
    """The newest state of another post-training run.

    Raises:
        UserError: there is no such run, or it has none.
    """
    found = RunFolder(load(DecoderTrainingRun, path / "config.yaml", [f"out={path}"]), main=False).load_state()
    if found is None:
        raise UserError(f"{path} holds no state to continue from; give the folder of a post-training run")
    return found[:2]
