"""Snapshots of post-training, with scores on held-out samples by which the best one is chosen."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from robustok.config import plain
from robustok.console import note
from robustok.data.latent_cache import LatentCache, caches_in
from robustok.data.pixels import sheet_of
from robustok.losses.guides import guide_names
from robustok.model_card import add_licence, licence_fields, price_fields
from robustok.runs import RunFolder
from robustok.snapshots import read_extra, read_header, write_snapshot
from robustok.tokenizers import encoder_digest
from robustok.training.adversary import Adversary
from robustok.training.decoder_settings import DecoderTrainingRun, adversary_policy
from robustok.types import Tokenizer

# Settings of the pairs, or of the samples, that the model card names.
PAIR_SETTINGS = ("strategy", "strength", "noise_level", "sampler_steps", "guided_share", "scheduler", "generator")
PAIR_SETTINGS += ("sampling", "seed")


class Snapshots:
    """Writes snapshots of the averaged weights and, given a score, keeps the best one. Only the first process writes.

    Args:
        run: settings.
        folder: run folder.
        average: the averaged weights.
        adversary: its discriminator is saved too.
        caches: of latents, of each bucket by their settings, named in the model card.
        score: Fréchet distance of a decoder's images to real ones, computed by all processes; None: no score.
        reconstructions: of a decoder, on held-out real images, by all processes; None: not measured.
    """

    def __init__(
        self,
        run: DecoderTrainingRun,
        folder: RunFolder,
        average: Tokenizer,
        adversary: Adversary | None,
        caches: Sequence[Mapping[str, LatentCache]],
        score: Callable[[Callable], float] | None,
        reconstructions: Callable[[Callable], dict[str, float]] | None = None,
    ) -> None:
        self.run, self.folder, self.average, self.adversary = run, folder, average, adversary
        self.caches, self.score, self.reconstructions = caches, score, reconstructions
        settings = None if adversary is None else adversary.settings
        self.guides = guide_names(run.reconstruction, settings, run.frechet.extractors if run.frechet.weight else ())
        # Step, score and reconstructions of the best snapshot; under "first" those at the start.
        self.best: dict[str, Any] = {"step": 0, "value": float("inf")}
        # For the pictures of a tracker: latents (n, ...), and their images (n, 3, H, W) before post-training.
        self._shown = _first_latents(run, caches[0]) if run.tracker and folder.main else None
        self._before = None if self._shown is None else _decoded(average, self._shown)

    def path(self, step: int) -> Path:
        """The folder of the snapshot of a step."""
        return self.folder.path / "snapshot" / f"{step:08d}"

    def write(self, step: int) -> None:
        """Write the snapshot of a step and its score; of step 0, the original decoder, only the score.

        All processes call this.
        """
        header = self._header(step) if self.folder.main else {}
        if step and self.folder.main:
            self._write(f"{step:08d}", header)
        if self.folder.tracker is not None:
            grid = torch.stack([self._before, _decoded(self.average, self._shown)])  # (2, n, 3, H, W)
            self.folder.tracker.picture(step, "before_after", sheet_of(grid))
        if self.score is None and self.reconstructions is None:
            return
        price = {} if self.reconstructions is None else self.reconstructions(self.average.decode)
        value = -float(step) if self.score is None else self.score(self.average.decode)  # without score the last one
        if not self.folder.main:
            return
        scored = {} if self.score is None else {"held_out": value}
        self.folder.log(step, scored | {f"reconstruction_{name}": number for name, number in price.items()})
        first = self.best.setdefault("first", {"step": step, "value": value, "price": price})
        limit = self.run.max_reconstruction_loss
        if limit is not None and price["psnr"] < first["price"]["psnr"] - limit:
            note(
                f"the decoder of step {step} is refused: PSNR of its reconstructions is {price['psnr']:.4g} dB, at the "
                f"start {first['price']['psnr']:.4g} (max_reconstruction_loss={limit:g})",
                "yellow",
            )
        elif value < self.best["value"]:
            self.best.update(step=step, value=value, price=price)
            self._write_best(header)

    def chosen(self, last: Path) -> Path:
        """The folder of the best snapshot with ``held_out`` or a limit, else of the last one."""
        best = self.folder.path / "snapshot" / "best"
        if self.run.held_out is None and self.run.max_reconstruction_loss is None:
            return last
        if not (best / "model.safetensors").exists():
            note(f"{best} was removed and cannot be made again; the last one is {last}", "yellow")
            return last
        if self.folder.main and self.best["step"] == self.best.get("first", {}).get("step"):
            note(
                "no snapshot was "
                + ("within the limit" if self.score is None else "better on the held-out samples than the start")
                + f": {self.folder.path} keeps the decoder it started from",
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
        counts = {name: sum(own[name].manifest.count for own in self.caches) for name in self.caches[0]}
        pairs = self.caches[0]["pairs"].manifest.source if "pairs" in self.caches[0] else {}
        sources = [next(iter(own.values())).manifest.source for own in self.caches]
        header = read_header(run.tokenizer)
        if licence := header.get("licence") or self.average.licence:
            header |= licence_fields(licence)
        for cache in self.caches[0].values():
            add_licence(header, cache.manifest.source.get("licence"), "generator")
        header |= {
            "latent_space": encoder_digest(self.average),
            "post_trained": {
                "steps": step,
                **counts,
                **({"sigma": pairs.get("sigma"), "mode": pairs.get("mode")} if "pairs" in counts else {}),
                **({"objective": dict(run.objective)} if set(run.objective) != {"paired"} else {}),
                **({"frechet": run.frechet.weight} if run.frechet.weight else {}),
                **({"trainable": run.trainable} if run.trainable != "decoder" else {}),
            },
            "protocol": {
                "adversary": f"{policy}, {run.adversary_warmup} steps" if policy == "reinit_warmup" else policy,
                "batch_size": run.batch_size,
                "learning_rate": run.learning_rate,
                **({"buckets": ", ".join(self._sizes())} if len(self.caches) > 1 else {}),
                **_pair_settings(sources),
            },
        }
        if guides := sorted({*header.get("guides", ()), *self.guides}):
            header["guides"] = guides
        for outdated in ("discriminator", "delta", "held_out", "price"):
            header.pop(outdated, None)
        return header if self.adversary is None else header | {"discriminator": plain(self.adversary.settings)}

    def _sizes(self) -> list[str]:
        """Height x width of each bucket, which names the folder of its caches."""
        return [next(iter(own.values())).path.name for own in self.caches]

    def _write_best(self, header: dict[str, Any]) -> None:
        first = self.best["first"]
        scores = {"distance": self.best["value"], "at_the_start": first["value"]}
        header = header if self.score is None else header | {"held_out": scores}
        self._write("best", header | price_fields(self.best["price"], first["price"]))

    def _write(self, name: str, header: dict[str, Any]) -> None:
        extra = {} if self.adversary is None else {"discriminator": self.adversary.network.state_dict()}
        extra |= read_extra(self.run.tokenizer, "released")  # for the export to the pretrained layout
        write_snapshot(self.folder.path / "snapshot" / name, header, self.average.state_dict(), extra)


def _pair_settings(sources: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """What the model card says of the pairs of all buckets, of which the noise level may differ."""
    found: dict[str, Any] = {}
    for key in PAIR_SETTINGS:
        values = [source[key] for source in sources if source.get(key) is not None]
        if key == "sampling":  # without the size, which is the bucket's
            values = [{k: v for k, v in value.items() if k not in ("height", "width")} for value in values]
        elif isinstance(values[0] if values else None, float) and min(values) < max(values):
            values = [f"{min(values):.6g} to {max(values):.6g} by bucket"]
        if values:
            found[key] = values[0]
    return found


def _first_latents(run: DecoderTrainingRun, caches: Mapping[str, LatentCache]) -> Tensor:
    """The first few latents, of free samples if there are any; of one size."""
    held_out = caches_in(run.held_out.latents)[0] if run.held_out and run.held_out.latents else None
    cache = caches.get("samples") or (LatentCache(held_out) if held_out else next(iter(caches.values())))
    return cache.read(slice(0, 8)).latents


@torch.no_grad()
def _decoded(tokenizer: Tokenizer, latents: Tensor) -> Tensor:
    """Images (n, 3, H, W) of latents."""
    device = next(tokenizer.parameters()).device
    return tokenizer.decode(latents.to(device)).float()
