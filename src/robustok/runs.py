"""Run folders: configuration, log, states for resume, and a clean end on SIGTERM."""

import json
import shutil
import signal
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import Tensor

from robustok.config import Config, differences, plain, read_settings, save, validate
from robustok.console import console
from robustok.errors import UserError
from robustok.files import append_line, atomic_folder, write_file
from robustok.snapshots import read_weights


def pack(tree: Any, name: str, tensors: dict[str, Tensor]) -> Any:
    """Move the tensors of a tree of dicts, lists and scalars into ``tensors``; return the rest, ready for JSON."""
    if isinstance(tree, Tensor):
        # a clone: safetensors refuses tensors that share memory, as tied or sliced weights do
        tensors[name] = tree.detach().cpu().contiguous().clone()
        return {"__tensor__": name}
    if isinstance(tree, Mapping):
        return {"__dict__": [[key, pack(value, f"{name}/{key}", tensors)] for key, value in tree.items()]}
    if isinstance(tree, list | tuple):
        return [pack(value, f"{name}/{i}", tensors) for i, value in enumerate(tree)]
    return tree


def unpack(tree: Any, tensors: Mapping[str, Tensor]) -> Any:
    """Undo :func:`pack`."""
    if isinstance(tree, list):
        return [unpack(value, tensors) for value in tree]
    if isinstance(tree, dict) and "__tensor__" in tree:
        return tensors[tree["__tensor__"]]
    if isinstance(tree, dict) and "__dict__" in tree:
        return {key: unpack(value, tensors) for key, value in tree["__dict__"]}
    return tree


class RunFolder:
    """A run folder: config.yaml, log.jsonl, state/ for resume, snapshot/ for users.

    Nothing is written before :meth:`start`, so that a run that cannot begin leaves no folder behind.

    Args:
        run: configuration, compared with the one that is there.
        main: whether this process writes.

    Raises:
        UserError: the folder holds a run of another configuration (the keys that differ are named).
    """

    def __init__(self, run: Config, main: bool = True) -> None:
        self.run, self.path, self.main = run, Path(run.out), main
        self.started = time.monotonic()
        file = self.path / "config.yaml"
        if file.exists():
            found = differences(_settings(run, file) | {"out": None}, plain(run) | {"out": None})  # folders may move
            if found:
                raise UserError(
                    f"{self.path} holds a run of another configuration: {'; '.join(found[:5])}; "
                    "choose another out=FOLDER"
                )
        elif self.path.exists() and not self.path.is_dir():
            raise UserError(f"{self.path} is a file, a run needs a folder; choose another out=FOLDER")
        elif self.path.exists() and any(self.path.iterdir()):
            raise UserError(f"{self.path} is not empty and holds no run (no config.yaml); choose another out=FOLDER")

    def start(self) -> None:
        """Make the folder and write config.yaml, once everything that the run needs is at hand.

        Raises:
            UserError: the folder cannot be written.
        """
        file = self.path / "config.yaml"
        if not self.main or file.exists():
            return
        save(self.run, file)

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Append one line to log.jsonl."""
        if self.main:
            append_line(
                self.path / "log.jsonl", {"step": step, **values, "seconds": round(time.monotonic() - self.started, 2)}
            )

    def save_state(self, step: int, state: dict[str, Any]) -> None:
        """Write the state for resume, whole or not at all; the two newest are kept.

        Raises:
            UserError: no space, or weights that are not finite, with which nothing could be resumed.
        """
        if not self.main:
            return
        tensors: dict[str, Tensor] = {}
        skeleton = pack(state, "", tensors)
        broken = [name for name, value in tensors.items() if value.is_floating_point() and not value.isfinite().all()]
        if broken:
            raise UserError(
                f"{broken[0].strip('/')} is not finite after step {step}; the state before is kept: "
                f"lower learning_rate, "
                "set clip_norm, or precision=float32, in a new run folder"
            )
        with atomic_folder(self.path / "state" / f"{step:08d}") as folder:
            save_file(tensors, folder / "state.safetensors")
            (folder / "state.json").write_text(json.dumps({"step": step, "state": skeleton}))
        for old in sorted((self.path / "state").glob("[0-9]*"))[:-2]:
            shutil.rmtree(old)

    def load_state(self) -> tuple[int, dict[str, Any]] | None:
        """The newest state that reads well, as (step, state); None at the start. Later log lines are dropped."""
        for folder in sorted((self.path / "state").glob("[0-9]*"), reverse=True):
            try:
                content = json.loads((folder / "state.json").read_text())
                state = unpack(content["state"], read_weights(folder / "state.safetensors"))
            except (OSError, ValueError, KeyError, UserError) as error:
                console.print(f"[yellow]skipping the state {folder}, which cannot be read: {error}[/]", soft_wrap=True)
                continue
            self._truncate_log(content["step"])
            return content["step"], state
        self._truncate_log(-1)
        return None

    def _truncate_log(self, step: int) -> None:
        file = self.path / "log.jsonl"
        if not (self.main and file.exists()):
            return
        kept = []
        for line in file.read_text().splitlines():
            try:
                if json.loads(line)["step"] <= step:
                    kept.append(line)
            except (ValueError, KeyError):
                continue  # half a line, written when the process was killed
        write_file(file, "".join(line + "\n" for line in kept))


def _settings(run: Config, file: Path) -> dict[str, Any]:
    """The settings in a run's config.yaml; those that were not known when it was written have their defaults."""
    settings = read_settings(type(run), file)
    try:
        return plain(validate(type(run), settings))
    except UserError:  # of another verb, perhaps: the keys that differ say so
        return settings


class Stopped(SystemExit):
    """Raised after SIGTERM, once the state is saved: a clean exit, the same command goes on."""

    def __init__(self, step: int) -> None:
        super().__init__(0)
        console.print(
            f"stopped by SIGTERM after step {step}; the state is saved, run the same command to go on", soft_wrap=True
        )


@contextmanager
def termination() -> Iterator[list[bool]]:
    """Note SIGTERM instead of dying from it: yields a list that is non-empty once the signal has come."""
    received: list[bool] = []
    try:
        previous = signal.signal(signal.SIGTERM, lambda *_: received.append(True))
    except ValueError:  # not the main thread, as in some notebooks
        yield received
        return
    try:
        yield received
    finally:
        signal.signal(signal.SIGTERM, previous)
