"""Run folders: configuration, log, states for resume, and a clean stop on SIGTERM."""

import json
import signal
import time
import warnings
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager, nullcontext
from pathlib import Path
from typing import Any, Protocol

from safetensors.torch import save_file
from torch import Tensor

from robustok.config import Config, differences, plain, read_settings, save, validate
from robustok.console import note, track
from robustok.devices import Accelerator, any_process
from robustok.errors import UserError
from robustok.files import (
    append_line,
    atomic_folder,
    clean,
    inside,
    is_temporary,
    json_lines,
    locked,
    one_line,
    regular_file,
    remove,
    write_file,
    writing,
)
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


class Resumable(Protocol):
    """What a run folder saves and restores."""

    def save(self, keep: bool) -> dict[str, Any]:
        """Everything that resume needs. All processes call this; only those with ``keep`` need the result."""
        ...

    def load(self, state: dict[str, Any]) -> None:
        """Undo :meth:`save`."""
        ...


class RunFolder:
    """A run folder: config.yaml, log.jsonl, state/ for resume, snapshot/ for users.

    Nothing is written before :meth:`start`, so a run that cannot begin leaves no folder behind.

    Args:
        run: configuration; it must equal the one in the folder, if there is one.
        main: whether this process writes.

    Raises:
        UserError: the folder holds a run of another configuration (the keys that differ are named) or links to other
            places, or another process is writing to it.
    """

    def __init__(self, run: Config, main: bool = True) -> None:
        self.run, self.path, self.main = run, Path(run.out), main
        self.started = time.monotonic()
        self._lock: ExitStack | None = None  # released at the end of the steps, or with this object
        file = inside(self.path) / "config.yaml"
        if file.exists():
            found = differences(_settings(run, regular_file(file)) | {"out": None}, plain(run) | {"out": None})
            if found:  # folders may move, so ``out`` is not compared
                raise UserError(
                    f"{self.path} holds a run of another configuration: {'; '.join(found[:5])}; "
                    "set the old values to resume it, or choose another out=FOLDER"
                )
            self._claim()
        elif self.path.exists() and not self.path.is_dir():
            raise UserError(f"{self.path} is a file, a run needs a folder; choose another out=FOLDER")
        elif self.path.exists() and not all(map(is_temporary, self.path.iterdir())):
            raise UserError(f"{self.path} is not empty and holds no run (no config.yaml); choose another out=FOLDER")

    def start(self) -> None:
        """Make the folder and write config.yaml. Call it once everything that the run needs is loaded.

        Raises:
            UserError: the folder cannot be written, or another process is writing to it.
        """
        if not self.main or self._lock is not None:
            return
        file = self.path / "config.yaml"
        with writing(file):
            self.path.mkdir(parents=True, exist_ok=True)
        self._claim()
        if file.exists():
            raise UserError(f"another process has begun this run in {self.path} just now; run the same command again")
        save(self.run, file)

    def _claim(self) -> None:
        """Keep other processes away, and remove what killed ones left half-written."""
        if self.main:
            self._lock = ExitStack()
            self._lock.enter_context(locked(self.path))
            with writing(self.path):
                for part in (".", "state", "snapshot", "samples"):
                    clean(self.path / part)

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Append one line to log.jsonl."""
        if self.main:
            append_line(
                self.path / "log.jsonl", {"step": step, **values, "seconds": round(time.monotonic() - self.started, 2)}
            )

    def save_state(self, step: int, state: dict[str, Any]) -> None:
        """Write the state for resume, atomically, and delete all but the two newest.

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
                "lower learning_rate, set clip_norm, or precision=float32, in a new run folder"
            )
        with atomic_folder(self.path / "state" / f"{step:08d}") as folder:
            save_file(tensors, folder / "state.safetensors")
            (folder / "state.json").write_text(json.dumps({"step": step, "state": skeleton}))
        for old in sorted((self.path / "state").glob("[0-9]*"))[:-2]:
            remove(old)

    def load_state(self) -> tuple[int, dict[str, Any]] | None:
        """The newest readable state as (step, state), or None. Log lines of later steps are deleted."""
        for folder in sorted((self.path / "state").glob("[0-9]*"), reverse=True):
            try:
                content = json.loads(regular_file(folder / "state.json").read_text())
                state = unpack(content["state"], read_weights(regular_file(folder / "state.safetensors")))
            except (OSError, ValueError, KeyError, UserError) as error:
                note(f"skipping the state {folder}, which cannot be read: {one_line(error)}", "yellow")
                continue
            self._truncate_log(content["step"])
            return content["step"], state
        self._truncate_log(-1)
        return None

    def restore(self, state: Resumable) -> int:
        """Load the newest state, if there is one.

        Returns:
            How many steps the run has done.
        """
        found = self.load_state()
        if found is None:
            return 0
        state.load(found[1])
        return found[0]

    def steps(self, steps: range, state: Resumable, every: int, accelerator: Accelerator) -> Iterator[int]:
        """Yield each step, with a progress bar; save the state every so many steps, at the end and on SIGTERM.

        Raises:
            Stopped: SIGTERM came; the state is saved.
        """
        with self._lock or nullcontext(), termination() as terminated:
            for step in track(steps, str(self.path), self.main):
                yield step
                done = step + 1
                stop = any_process(accelerator, bool(terminated))
                if done % every == 0 or done == steps.stop or stop:
                    self.save_state(done, state.save(keep=self.main))
                if stop and done < steps.stop:
                    raise Stopped(done)

    def _truncate_log(self, step: int) -> None:
        file = self.path / "log.jsonl"
        if not (self.main and file.exists()):
            return
        with writing(file):
            records, broken = json_lines(regular_file(file).read_text(errors="replace"))
        if broken:
            warnings.warn(f"{file}: {len(broken)} lines were cut off, as by a killed process; removed", stacklevel=2)
        kept = [record for record in records if isinstance(record.get("step"), int) and record["step"] <= step]
        write_file(file, "".join(json.dumps(record) + "\n" for record in kept))


def _settings(run: Config, file: Path) -> dict[str, Any]:
    """The settings in a run's config.yaml; settings added since it was written have their defaults."""
    settings = read_settings(type(run), file)
    try:
        return plain(validate(type(run), settings))
    except UserError:  # perhaps of another command; the differences will say so
        return settings


class Stopped(SystemExit):
    """Raised after SIGTERM once the state is saved. Exits with code 0; the same command resumes."""

    def __init__(self, step: int) -> None:
        super().__init__(0)
        note(f"stopped by SIGTERM after step {step}; the state is saved, run the same command to resume")


@contextmanager
def termination() -> Iterator[list[bool]]:
    """Catch SIGTERM: yields a list that is non-empty once the signal has been received."""
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
