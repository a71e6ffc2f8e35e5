"""Post-training: the decoder is fine-tuned on latents that a generator made.

In the paper, latents come from a cache of pairs: real latents mixed with samples of the generator. Each is decoded and
compared with its real image, with the losses and the discriminator of main training. Other objectives, and mixtures of
them, are in ``objectives.py``. Encoder and quantiser are frozen and in eval mode; a digest of their weights before and
after checks it.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from robustok.config import load, plain
from robustok.console import note
from robustok.data.dataset import ImageDataset, open_images
from robustok.data.latent_cache import LatentCache
from robustok.data.latent_checks import check_indices
from robustok.devices import autocast, start_accelerator
from robustok.errors import UserError
from robustok.evaluation.held_out import HeldOutScore
from robustok.files import tensor_digest
from robustok.losses.discriminators import DiscriminatorConfig, carried_config, frozen_features
from robustok.losses.reconstruction import ReconstructionTerms
from robustok.metrics.features import load_extractor
from robustok.model_card import add_licence, licence_fields
from robustok.randomness import seed_step
from robustok.runs import RunFolder
from robustok.snapshots import read_extra, read_header, resolve, write_snapshot
from robustok.tokenizers import encoder_digest, load_tokenizer
from robustok.training.adversary import Adversary, last_layer
from robustok.training.authors import AuthorsStep
from robustok.training.common import average_copy
from robustok.training.decoder_settings import DecoderTrainingRun, adversary_policy
from robustok.training.inputs import input_digests, may_change
from robustok.training.objectives import Examples, Material, Steps, mixture, needed_caches, open_caches
from robustok.training.prepared import PreparedInParts
from robustok.training.state import TrainingState, optimise
from robustok.types import Tokenizer

# Settings of the pairs, or of the samples, that the model card names.
PAIR_SETTINGS = ("strategy", "noise_level", "sampler_steps", "guided_share", "generator", "sampling", "seed")


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


def train_decoder(run: DecoderTrainingRun) -> Path:
    """Post-train a decoder; resume if the run folder holds a state.

    Returns:
        The folder of the best snapshot with ``held_out``, else of the last one.

    Raises:
        UserError: tokenizer, pairs, data, configuration or run folder do not fit; the loss is not finite.
    """
    accelerator = start_accelerator(run.batch_size, run.gradient_accumulation)
    device, rank = accelerator.device, accelerator.process_index
    bare = load_tokenizer(run.tokenizer).to(device)
    before = encoder_digest(bare)
    caches = open_caches({name: getattr(run, name) for name in needed_caches(run.objective)}, before)
    data = _open_images(run, bare, caches)
    reconstruction_terms = ReconstructionTerms(run.reconstruction, device)
    score = _held_out_score(run, bare, data, device) if run.held_out and accelerator.is_main_process else None
    folder = RunFolder(run, accelerator.is_main_process, later=may_change(run))

    authors = run.trainable == "authors"
    bare.latent_space = before if authors else None  # the digest of the latents it decodes, though its weights change
    procedure = AuthorsStep(run, bare, caches["pairs"].manifest.source.get("mode")) if authors else DecoderStep(bare)
    frozen = {name for name, p in bare.named_parameters() if not p.requires_grad}
    original = _digest(bare, frozen)
    average, layer = average_copy(bare), last_layer(bare)
    decoder = PreparedInParts(procedure.model, run, accelerator, layer)
    optimizer = decoder.optimizer()
    seed_step(run.seed, step=0, rank=0)  # the same initial weights of a new discriminator in every process
    adversary = _adversary(run, accelerator)
    untouched = average_copy(average) if "free" in run.objective else average  # copied before a state is loaded
    material = Material(untouched, data, caches, run.noise, run.precision)
    snapshots = Snapshots(run, folder, average, adversary, caches, score)
    state = TrainingState("tokenizer", bare, average, optimizer, adversary, extra=snapshots)
    first = folder.restore(state, input_digests(run, data))
    fresh = first == 0
    if fresh and run.continue_from is not None:
        first, previous = _previous_state(run.continue_from)
        state.load(previous | snapshots.state())
    if _digest(bare, frozen) != original:
        raise UserError(
            f"the state in {run.continue_from if fresh else run.out} is of another tokenizer; give that one"
        )
    batches = _batches(run, material, first, run.steps - first, accelerator)
    folder.start()
    if fresh:
        if first == 0 and adversary is not None and adversary_policy(run) == "reinit_warmup":
            warmup = _batches(run, material, 0, run.adversary_warmup, accelerator)
            folder.log(0, _warm_up(adversary, average, warmup, run))
        snapshots.write(first)
        accelerator.wait_for_everyone()

    for step in folder.steps(range(first, run.steps), state, run.state_every, accelerator):
        batch = next(batches)
        seed_step(run.seed, step, rank)
        decoder.train()

        # 1. Decode the latents; compare the images with their targets.
        output = decoder(*procedure.inputs(batch.latents))
        decoded = procedure.reconstructions(output)  # (N, 3, H, W)
        terms = _compare(decoder, reconstruction_terms, batch, decoded)
        reconstruction_loss = sum(terms.values())
        terms |= procedure.terms(output)

        # 2. One step of the decoder, then one of the discriminator on the same images.
        if adversary is not None and adversary.started(step):
            fake = adversary.features(decoded, step, "fake")
            terms["adversarial"], weight = adversary.term(fake, decoded, reconstruction_loss, layer)
            state.meter.add({"adaptive_weight": weight})
        optimise(decoder, state, [terms], step)
        if adversary is not None and adversary.started(step):
            state.meter.add(adversary.step(batch.real, fake, step, run.out))

        # 3. Log; snapshot with its score.
        done = step + 1
        if run.due(run.log_every, done):
            folder.log(done, state.meter.means(accelerator))
        if run.due(run.snapshot_every, done):
            snapshots.write(done)
            accelerator.wait_for_everyone()
    if any(_digest(model, frozen) != original for model in (bare, average)):
        raise RuntimeError("frozen weights changed during post-training: this is a bug, please report it")
    return snapshots.chosen(folder.last_snapshot(snapshots.write_again, accelerator))


class Snapshots:
    """Writes snapshots of the averaged weights and, given a score, keeps the best one. Only the first process writes.

    Args:
        run: settings.
        folder: run folder.
        average: the averaged weights.
        adversary: its discriminator is saved too.
        caches: of latents, named in the model card.
        score: Fréchet distance of a decoder's images to real ones, in the first process; None: no score.
    """

    def __init__(
        self,
        run: DecoderTrainingRun,
        folder: RunFolder,
        average: Tokenizer,
        adversary: Adversary | None,
        caches: Mapping[str, LatentCache],
        score: Callable[[Callable], float] | None,
    ) -> None:
        self.run, self.folder, self.average, self.adversary = run, folder, average, adversary
        self.caches, self.score = caches, score
        # Step and score of the best snapshot; under "first" those at the start.
        self.best: dict[str, Any] = {"step": 0, "value": float("inf")}

    def write(self, step: int) -> None:
        """Write the snapshot of a step and its score; of step 0, the original decoder, only the score."""
        if not self.folder.main:
            return
        header = self._header(step)
        if step:
            self._write(f"{step:08d}", header)
        if self.score is None:
            return
        value = self.score(self.average.decode)
        self.folder.log(step, {"held_out": value})
        self.best.setdefault("first", {"step": step, "value": value})
        if value < self.best["value"]:
            self.best.update(step=step, value=value)
            self._write_best(header)

    def chosen(self, last: Path) -> Path:
        """The folder of the best snapshot with ``held_out``, else of the last one."""
        best = self.folder.path / "snapshot" / "best"
        if self.run.held_out is None:
            return last
        if not (best / "model.safetensors").exists():
            note(f"{best} was removed and cannot be made again; the last one is {last}", "yellow")
            return last
        if self.folder.main and self.best["step"] == self.best.get("first", {}).get("step"):
            note(
                "no snapshot was better on the held-out samples than the decoder it started from: "
                f"{self.folder.path} keeps that one",
                "yellow",
            )
        return best

    def write_again(self, step: int) -> None:
        """Write the snapshot of the last step, which is removed, and the best one if it is the same."""
        self._write(f"{step:08d}", self._header(step))
        if self.best["step"] == step and "first" in self.best:
            self._write_best(self._header(step))

    def state(self) -> dict[str, Any]:
        """The best score so far."""
        return {"best": self.best}

    def load_state(self, state: Mapping[str, Any]) -> None:
        """Undo :meth:`state`."""
        self.best = state["best"]

    def _header(self, step: int) -> dict[str, Any]:
        """The header of the tokenizer's snapshot, with how its decoder was post-trained."""
        run, policy = self.run, adversary_policy(self.run)
        counts = {name: cache.manifest.count for name, cache in self.caches.items()}
        pairs = self.caches["pairs"].manifest.source if "pairs" in self.caches else {}
        source = next(iter(self.caches.values())).manifest.source
        header = read_header(run.tokenizer)
        if licence := header.get("licence") or self.average.licence:
            header |= licence_fields(licence)
        for cache in self.caches.values():
            add_licence(header, cache.manifest.source.get("licence"), "generator")
        header |= {
            "latent_space": encoder_digest(self.average),
            "post_trained": {
                "steps": step,
                **counts,
                **({"sigma": pairs.get("sigma"), "mode": pairs.get("mode")} if "pairs" in counts else {}),
                **({"objective": dict(run.objective)} if set(run.objective) != {"paired"} else {}),
                **({"trainable": run.trainable} if run.trainable != "decoder" else {}),
            },
            "protocol": {
                "adversary": f"{policy}, {run.adversary_warmup} steps" if policy == "reinit_warmup" else policy,
                "batch_size": run.batch_size,
                "learning_rate": run.learning_rate,
                **{key: source[key] for key in PAIR_SETTINGS if source.get(key) is not None},
            },
        }
        for outdated in ("discriminator", "delta", "held_out"):
            header.pop(outdated, None)
        return header if self.adversary is None else header | {"discriminator": plain(self.adversary.settings)}

    def _write_best(self, header: dict[str, Any]) -> None:
        scores = {"distance": self.best["value"], "at_the_start": self.best["first"]["value"]}
        self._write("best", header | {"held_out": scores})

    def _write(self, name: str, header: dict[str, Any]) -> None:
        extra = {} if self.adversary is None else {"discriminator": self.adversary.network.state_dict()}
        extra |= read_extra(self.run.tokenizer, "released")  # for the export to the pretrained layout
        write_snapshot(self.folder.path / "snapshot" / name, header, self.average.state_dict(), extra)


def _open_images(run: DecoderTrainingRun, tokenizer: Tokenizer, caches: Mapping[str, LatentCache]) -> ImageDataset:
    data = open_images(run.data, tokenizer.image_size, split="train")
    for name, cache in caches.items():
        if name == "samples":
            continue
        if cache.manifest.data != data.fingerprint:
            raise UserError(
                f"{cache.path} pairs latents with other images than {data.describe()}; give the data they were encoded "
                "from"
            )
        check_indices(cache, len(data))
    return data


def _batches(
    run: DecoderTrainingRun, material: Material, first: int, count: int, accelerator: Any
) -> Iterator[Examples]:
    """What this process learns from in ``count`` steps from ``first`` on."""
    steps = Steps(run.batch_size, run.seed, first, count, accelerator.process_index, accelerator.num_processes)
    return mixture(material, run.objective, run.consistency, steps, run.gradient_accumulation)


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


def _digest(tokenizer: nn.Module, names: set[str]) -> str:
    return tensor_digest({name: p for name, p in tokenizer.named_parameters() if name in names})


def _held_out_score(
    run: DecoderTrainingRun, tokenizer: Tokenizer, data: ImageDataset, device: torch.device
) -> Callable[[Callable], float]:
    """Function of a decoder: Fréchet distance of its images of the held-out samples to the real images."""
    score = HeldOutScore(run.held_out, tokenizer, data, device)
    return lambda decode: score(decode)[0]


def check_networks(run: DecoderTrainingRun) -> None:
    """Load the networks of the losses and the held-out score once: errors come before the hours that pairs take.

    Raises:
        UserError: perceptual networks, discriminators or extractors are missing or unusable; names all of them, since
            without a network all their files have to be brought.
    """
    device = torch.device("cpu")
    needed: list[Callable[[], Any]] = [lambda: ReconstructionTerms(run.reconstruction, device)]
    if adversary_policy(run) != "none":
        needed.append(lambda: frozen_features(_discriminator(run)[0], device))
    if run.held_out is not None:
        needed.append(lambda: load_extractor(run.held_out.extractor, device))
    problems = []
    for load_network in needed:
        try:
            load_network()
        except UserError as error:
            problems.append(str(error))
    if problems:
        raise UserError("; and ".join(problems))


def _adversary(run: DecoderTrainingRun, accelerator: Any) -> Adversary | None:
    """The discriminator of the tokenizer's snapshot, or a new one, or none."""
    if adversary_policy(run) == "none":
        return None
    config, weights = _discriminator(run)
    return Adversary(run, run.adversarial, config, accelerator, weights)


def _discriminator(run: DecoderTrainingRun) -> tuple[DiscriminatorConfig, Path | None]:
    """Its settings, and the file of its weights if it is carried over."""
    if adversary_policy(run) != "carried":
        return run.discriminator, None
    folder, header = resolve(run.tokenizer), read_header(run.tokenizer)
    if "discriminator" not in header:
        raise UserError(f"{folder} holds no discriminator to carry over; set adversary=fresh, or adversarial.weight=0")
    config = carried_config(header["discriminator"], run.discriminator, source=str(folder))
    return config, folder / "discriminator.safetensors"


def _warm_up(
    adversary: Adversary, original: Tokenizer, batches: Iterable[Examples], run: DecoderTrainingRun
) -> dict[str, float]:
    """Train a new discriminator on the original decoder's images: untrained it would damage the decoder.

    Returns:
        Values for the log: the discriminator's terms at the last step.
    """
    device = adversary.accelerator.device
    for step, batch in enumerate(batches, start=-run.adversary_warmup):
        with torch.no_grad(), autocast(device, run.precision):
            decoded = original.decode(batch.latents)
        last = adversary.step(batch.real, adversary.features(decoded, step, "fake"), step, run.out)
    return {"adversary_warmup": run.adversary_warmup} | {name: value.item() for name, value in last.items()}


def _previous_state(path: Path) -> tuple[int, dict[str, Any]]:
    """The newest state of another post-training run.

    Raises:
        UserError: there is no such run, or it has none.
    """
    found = RunFolder(load(DecoderTrainingRun, path / "config.yaml", [f"out={path}"]), main=False).load_state()
    if found is None:
        raise UserError(f"{path} holds no state to continue from; give the folder of a post-training run")
    return found[:2]
