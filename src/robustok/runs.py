"""Run folders: configuration, log, states for resume, and a clean stop on SIGTERM."""

import json
import os
import signal
import time
import warnings
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from robustok.config import Config, plain, read_settings, read_yaml, save, validate
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
from robustok.states import read_state, write_state

STOP_EVERY = 5  # steps after which several processes ask each other for SIGTERM, for which they wait for their devices

# Settings with which a run may go on: they change its speed, memory or messages, or where it lies, but no weight.
FREE = {"out", "workers", "log_every", "state_every", "snapshot_every", "picture_every", "gradient_accumulation"}
FREE |= {"tracker", "gradient_checkpointing", "compile", "data.max_broken", "data.download", "data.cache"}
FREE |= {"data.cache_gb"}


class Resumable(Protocol):
    """What a run folder saves and restores."""

    def save(self, keep: bool) -> dict[str, Any]:
        """Everything that resume needs. All processes call this; only those with ``keep`` need the result."""
        ...

    def load(self, state: dict[str, Any]) -> None:
        """Undo :meth:`save`."""
        ...


class Follower(Protocol):
    """What gets a copy of the log, such as a tracker of experiments."""

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """A line of the log."""
        ...

    def picture(self, step: int, name: str, sheet: np.ndarray) -> None:
        """A picture (H, W, 3) uint8."""
        ...

    def finish(self) -> None:
        """The steps are done, or interrupted."""
        ...


class RunFolder:
    """A run folder: config.yaml, log.jsonl, state/ for resume, snapshot/ for users.

    Nothing is written before :meth:`start`, so a run that cannot begin leaves no folder behind.

    Args:
        run: configuration; it must equal the one in the folder, if there is one, but for settings that change no
            weight (``FREE``).
        main: whether this process writes.
        later: settings that may differ here, because :meth:`restore` or the caller compares what they stand for.

    Raises:
        UserError: the folder holds a run of another configuration (the keys that differ are named) or links to other
            places, or another process is writing to it.
    """

    def __init__(self, run: Config, main: bool = True, later: Collection[str] = ()) -> None:
        self.run, self.path, self.main = run, Path(run.out), main
        self.started = time.monotonic()
        self.inputs: dict[str, str] = {}  # digests of what the run reads
        self.changed: dict[str, tuple[Any, Any]] = {}  # of ``later``: the old and the new value
        self.tracker: Follower | None = None  # of the first process, from the start of the steps on
        self._lock: ExitStack | None = None  # released at the end of the steps, or with this object
        file = inside(self.path, but="wandb") / "config.yaml"  # whose links lead to its logs
        if file.exists():
            changed = _changes(run, regular_file(file))
            self.changed = {key: values for key, values in changed.items() if key in later}
            self._refuse({key: values for key, values in changed.items() if key not in later})
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
        if not self.main:
            return
        file = self.path / "config.yaml"
        if self._lock is None:
            with writing(file):
                self.path.mkdir(parents=True, exist_ok=True)
            self._claim()
            if file.exists():
                raise UserError(
                    f"another process has begun this run in {self.path} just now; run the same command again"
                )
            save(self.run, file)
        elif read_yaml(file) != plain(self.run):
            save(self.run, file)

    def _refuse(self, changed: Mapping[str, tuple[Any, Any]]) -> None:
        if changed:
            found = "; ".join(f"{key}: {old} -> {new}" for key, (old, new) in list(changed.items())[:5])
            raise UserError(
                f"{self.path} holds a run of another configuration: {found}; "
                "set the old values to resume it, or choose another out=FOLDER, where it starts from the beginning"
            )

    def _claim(self) -> None:
        """Keep other processes away, and remove what killed ones left half-written."""
        if self.main:
            self._lock = ExitStack()
            self._lock.enter_context(locked(self.path))
            with writing(self.path):
                for part in (".", "state", "snapshot", "samples"):
                    clean(self.path / part)

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Append one line to log.jsonl; the tracker gets it too."""
        if self.tracker is not None:
            self.tracker.log(step, values)
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
        with atomic_folder(self.path / "state" / f"{step:08d}") as folder:
            write_state(folder, step, state, self.inputs)
        for old in sorted((self.path / "state").glob("[0-9]*"))[:-2]:
            remove(old)

    def load_state(self) -> tuple[int, dict[str, Any], dict[str, str] | None] | None:
        """The newest readable state as (step, state, digests of inputs), or None if there is none.

        Raises:
            UserError: there are states, and none can be read.
        """
        folders = sorted((self.path / "state").glob("[0-9]*"), reverse=True)
        for folder in folders:
            try:
                content, state = read_state(folder)
                return content.step, state, content.inputs
            except (OSError, ValueError, KeyError, TypeError, RecursionError, UserError) as error:
                note(f"skipping the state {folder}, which cannot be read: {one_line(error, 200)}", "yellow")
        if folders:
            raise UserError(
                f"{self.path} cannot go on: none of its {len(folders)} states can be read; copy them again, or remove "
                f"{self.path / 'state'} to start again from step 0"
            )
        return None

    def restore(self, state: Resumable, inputs: Mapping[str, str]) -> int:
        """Load the newest state, if there is one. Log lines of later steps are deleted.

        Args:
            state: what it is loaded into.
            inputs: digests of what the run reads, by setting. They must be those of the steps before.

        Returns:
            How many steps the run has done; all of them where only the last snapshot is left of it.

        Raises:
            UserError: other inputs or another schedule than before; a state that does not fit the configuration.
        """
        self.inputs = dict(inputs)
        found = self.load_state()
        if found is None:
            return self._restore_nothing()
        step, saved, before = found
        self._check_inputs(step, before)
        self._check_steps(step)
        try:
            state.load(saved)
        except (KeyError, TypeError, ValueError, AttributeError, IndexError, RuntimeError) as error:
            raise UserError(
                f"the state of step {step} in {self.path} does not fit its config.yaml "
                f"({one_line(error, 200)}); remove it to resume from the one before"
            ) from None
        self._truncate_log(step)
        return step

    def last_snapshot(self, write: Callable[[int], None], accelerator: Accelerator) -> Path:
        """The folder of the last step's snapshot, which ``write(step)`` makes again if it was removed."""
        path = self.path / "snapshot" / f"{self.run.steps:08d}"
        if self.main and not (path / "model.safetensors").exists():
            write(self.run.steps)
        accelerator.wait_for_everyone()
        return path

    def _restore_nothing(self) -> int:
        """Without a state: 0, or all steps if there is their snapshot.

        Raises:
            UserError: the run was finished with fewer steps.
        """
        done = [int(p.parent.name) for p in self.path.glob("snapshot/[0-9]*/model.safetensors")]
        before = self.changed.get("steps", (self.run.steps,))[0]
        if before in done and before != self.run.steps:
            raise UserError(
                f"{self.path} holds a run that is finished after {before} steps, without its state/: it cannot go on "
                f"to {self.run.steps}; set steps={before} to keep it, or choose another out=FOLDER, where it starts "
                "from step 0"
            )
        if before in done:
            self._refuse({key: values for key, values in self.changed.items() if key != "steps"})
            note(f"{self.path} holds a run that is finished, without its state/: nothing is trained")
            return before
        if done or (self.path / "log.jsonl").exists():
            note(f"{self.path} holds no state: the run starts again from step 0")
        self._truncate_log(-1)
        return 0

    def _check_inputs(self, done: int, before: Mapping[str, str] | None) -> None:
        """Refuse inputs other than those of the steps before."""
        paths = {key: values for key, values in self.changed.items() if key != "steps"}
        if before is None:  # a state of an earlier version: only paths can be compared
            self._refuse(paths)
            return
        keys = sorted(before.keys() | self.inputs.keys())
        if other := [key for key in keys if before.get(key) != self.inputs.get(key)]:
            raise UserError(
                f"{self.path} has done {done} steps with another content of {', '.join(other)}; give the same "
                "content, at any path, to resume it, or choose another out=FOLDER, where it starts from step 0"
            )

    def _check_steps(self, done: int) -> None:
        """Refuse another number of steps unless all steps before would have been the same with it."""
        before, steps = self.changed.get("steps", (self.run.steps, self.run.steps))
        schedule, old = self.run.schedule, self.run.model_copy(update={"steps": before}).schedule
        if steps < done:
            reason, remedy = f"but it has done {done}", f"set steps={done} or more"
        elif steps != before and any(schedule(step) != old(step) for step in range(done)):
            reason = f"which changes the schedule, as of the learning rate, of the {done} steps that are done"
            remedy = f"set steps={before} to go on to its end"
        else:
            return
        further = (
            f" (continue_from={self.path} goes on from its state there)" if "continue_from" in vars(self.run) else ""
        )
        raise UserError(
            f"{self.path} holds a run of another configuration: steps: {before} -> {steps}, {reason}; {remedy}, or "
            f"choose another out=FOLDER, where it starts from step 0{further}"
        )

    def steps(self, steps: range, state: Resumable, every: int, accelerator: Accelerator) -> Iterator[int]:
        """Yield each step, with a progress bar; save the state every so many steps, at the end and on SIGTERM.

        One process stops after the step in which SIGTERM came. Several stop together, up to ``STOP_EVERY`` steps later.

        Raises:
            Stopped: SIGTERM came; the state is saved.
        """
        with self._lock or ExitStack() as ends, termination() as terminated:
            if self.tracker is not None:
                ends.callback(self.tracker.finish)
            for step in track(steps, str(self.path), self.main):
                yield step
                done, alone = step + 1, accelerator.num_processes == 1
                due = done % every == 0 or done == steps.stop
                stop = (alone or due or done % STOP_EVERY == 0) and any_process(accelerator, bool(terminated))
                if due or stop:
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


def paths_in(config: Config, prefix: str = "") -> dict[str, Path]:
    """All files and folders in a configuration, by their dotted keys."""
    found = {}
    for name, value in config:
        if isinstance(value, Path):
            found[prefix + name] = value
        members = {name: value} if not isinstance(value, list) else {f"{name}.{i}": one for i, one in enumerate(value)}
        for key, member in members.items():
            if isinstance(member, Config):
                found |= paths_in(member, f"{prefix}{key}.")
    return found


def _changes(run: Config, file: Path) -> dict[str, tuple[Any, Any]]:
    """Settings that are not those in a run's config.yaml and make another run: dotted key -> (old, new).

    Settings added since it was written have their defaults there.
    """
    old = read_settings(type(run), file)
    with suppress(UserError):  # perhaps of another command; the differences will say so
        old = plain(validate(type(run), old))
    old, new, paths = flat(old), flat(plain(run)), paths_in(run)
    changed = {key: (old.get(key), new.get(key)) for key in sorted(old.keys() | new.keys()) if key not in FREE}
    same_place = lambda key, values: key in paths and len({os.path.abspath(str(value)) for value in values}) == 1  # noqa: E731
    return {key: values for key, values in changed.items() if values[0] != values[1] and not same_place(key, values)}


def flat(settings: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested settings by their dotted keys."""
    found = {}
    for key, value in settings.items():
        if isinstance(value, list) and any(isinstance(member, dict) for member in value):
            value = dict(enumerate(value))
        found |= flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return found


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
