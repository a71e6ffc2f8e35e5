"""Trackers of experiments, such as Weights & Biases, TensorBoard and Trackio, through accelerate.

A tracker gets what ``log.jsonl`` gets, when it gets it, so no step waits for a device on its account. Whatever fails in
a tracker ends the tracking with one warning, and never the training.
"""

import json
import os
import secrets
import sys
import time
import warnings
from collections.abc import Callable, Mapping
from contextlib import redirect_stdout
from pathlib import Path

import numpy as np
from accelerate.tracking import LOGGER_TYPE_TO_CLASS, GeneralTracker, get_available_trackers

from robustok.config import plain
from robustok.errors import UserError
from robustok.files import one_line, read_json, write_file
from robustok.runs import RunFolder, flat
from robustok.training.common import TrainingConfig, adversary_learning_rate

PACKAGES = {"comet_ml": "comet-ml"}  # where pip knows them by another name


def check_tracker(run: TrainingConfig) -> None:
    """Refuse a tracker whose package is not installed, before any work.

    Raises:
        UserError: says what to install.
    """
    if run.tracker is None or run.tracker in map(str, get_available_trackers()):
        return
    package = PACKAGES.get(run.tracker, run.tracker)
    raise UserError(
        f"tracker={run.tracker} needs the package {package}, which is not installed; pip install {package}, or leave "
        "tracker out"
    )


def start_tracking(folder: RunFolder, first: int) -> None:
    """Give a run folder the tracker of its settings: what it logs from now on goes there too.

    Args:
        folder: of a training; it exists.
        first: steps that are done; a run that is in the tracker already goes on after them.
    """
    if folder.main and folder.run.tracker and first < folder.run.steps:
        folder.tracker = Tracker(folder.run, first)


class Tracker:
    """Sends the log, pictures and settings of a training to a tracker. Nothing that fails in it raises an error here.

    Args:
        run: settings, among them the tracker's name.
        first: steps that are done.
    """

    def __init__(self, run: TrainingConfig, first: int) -> None:
        self.run = run
        self._last = first, time.monotonic()  # step and time of the last line of the log
        self._tracker: GeneralTracker | None = None  # also once it has failed
        self._safely(lambda: self._start(first))

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Send a line of the log, with images per second since the last one of training and all learning rates."""
        if self._tracker is None:
            return
        found = dict(values)
        if "lr" in values:
            (done, since), self._last = self._last, (step, time.monotonic())
            found["images_per_second"] = (step - done) * self.run.batch_size / max(self._last[1] - since, 1e-9)
            adversarial = getattr(self.run, "adversarial", None)
            if "d_hinge" in values and adversarial is not None:
                found["d_lr"] = adversary_learning_rate(self.run, adversarial, step - 1)
        self._safely(lambda: self._tracker.log(found, step=step))

    def picture(self, step: int, name: str, sheet: np.ndarray) -> None:
        """Send a picture (H, W, 3) uint8, to a tracker that shows pictures."""
        if self._tracker is not None:
            self._safely(lambda: self._picture(step, name, sheet))

    def finish(self) -> None:
        """End the run in the tracker; nothing is sent afterwards."""
        if self._tracker is not None:
            self._safely(self._finish)
        self._tracker = None

    def _start(self, first: int) -> None:
        out, name = self.run.out, self.run.tracker
        known = _known(out)
        new = name not in known
        identity = known.setdefault(name, secrets.token_hex(16))
        title = "/".join(Path(os.path.abspath(out)).parts[-2:])
        own = {
            "wandb": {"id": identity, "resume": "allow", "name": title, "dir": str(out)},
            "trackio": {"name": f"{title.replace('/', '-')} {identity[:6]}", "resume": "allow"},
            "swanlab": {"id": identity[:21], "resume": "allow", "experiment_name": title, "logdir": str(out / name)},
            "comet_ml": {"experiment_key": identity},
            "tensorboard": {"logging_dir": str(out), "purge_step": first + 1},
        }[name]
        # In TensorBoard a run is a folder; elsewhere it belongs to a project.
        project = name if name == "tensorboard" else os.environ.get(f"{name.upper()}_PROJECT") or "robustok"
        tracker = LOGGER_TYPE_TO_CLASS[name](project, **own)
        tracker.start()
        if new:
            write_file(out / "tracker.json", json.dumps(known))
            settings = flat(plain(self.run)).items()
            tracker.store_init_configuration({k: v if _scalar(v) else json.dumps(v) for k, v in settings})
        self._tracker = tracker

    def _finish(self) -> None:
        if self.run.tracker == "trackio":  # which would otherwise finish it again, and print, when Python ends
            import trackio

            trackio.finish()
        else:
            self._tracker.finish()

    def _picture(self, step: int, name: str, sheet: np.ndarray) -> None:
        if self.run.tracker == "trackio":
            import trackio

            self._tracker.log({name: trackio.Image(sheet)}, step=step)
        elif self.run.tracker == "tensorboard":
            self._tracker.log_images({name: sheet[None]}, step=step, dataformats="NHWC")
        elif hasattr(self._tracker, "log_images"):
            self._tracker.log_images({name: [sheet]}, step=step)

    def _safely(self, call: Callable[[], None]) -> None:
        try:
            with redirect_stdout(sys.stderr):  # where only the result of a command goes
                call()
        except Exception as error:  # of any library, its network or its disk
            self._tracker = None
            warnings.warn(
                f"tracker={self.run.tracker} failed and gets nothing more; the training goes on, and log.jsonl has "
                f"everything ({type(error).__name__}: {one_line(error, 200)})",
                stacklevel=2,
            )


def _scalar(value: object) -> bool:
    return isinstance(value, bool | int | float | str)


def _known(out: Path) -> dict[str, str]:
    """What this run is called in each tracker that it was in: drawn once, so that a resumed run goes on."""
    file = out / "tracker.json"
    known = read_json(file) if file.exists() else {}
    return {name: identity for name, identity in known.items() if isinstance(identity, str)}
