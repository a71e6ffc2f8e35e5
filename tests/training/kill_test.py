"""Kill each of the three trainings five times at random moments; the end must equal an uninterrupted run, bit for bit.

Not collected by pytest, because it takes minutes: ``python tests/training/kill_test.py [SEED]``.
"""

import json
import os
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch

os.environ["ROBUSTOK_PROGRESS"] = "0"
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import tiny
from robustok.config import Config

KILLS = 5
TRAINING = ("steps=150", "log_every=4", "state_every=3", "snapshot_every=7")


def world(home: Path) -> dict[str, Callable[[Path], Config]]:
    """Make what the trainings need; return for each command its configuration as a function of the run folder."""
    main = tiny.main_run(
        home / "tokenizer", "steps=60", "batch_size=32", "tokenizer.quantizer.revive_every=5", *tiny.ADVERSARY
    )
    tokenizer = tiny.train_tokenizer(main)
    latents = tiny.encode(tiny.tokens_run(home / "latents", tokenizer))
    generator = tiny.train_generator(tiny.generator_run(home / "generator", latents))
    pairs = tiny.make_pairs(tiny.pairs_run(home / "pairs", generator, latents))
    everything = (
        *tiny.ADVERSARY,
        "adversarial.start=20",
        "tokenizer.quantizer.revive_every=4",
        "tokenizer.decoder.drop_path=0.1",
    )
    return {
        "main-train": lambda out: tiny.main_run(out, *TRAINING, *everything),
        "train-generator": lambda out: tiny.generator_run(out, latents, *TRAINING, "generator.dropout=0.2"),
        "post-train": lambda out: tiny.post_run(
            out, tokenizer, pairs, *TRAINING, *tiny.ADVERSARY[:2], "adversarial.start=20"
        ),
    }


def start(command: str, run: Config, file: Path) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, tiny.__file__, *tiny.command(command, run, file)], stderr=subprocess.DEVNULL
    )


def newest(out: Path) -> int:
    return max((int(p.name) for p in out.glob("state/[0-9]*")), default=0)


def kill_at_random(command: str, run: Config, file: Path, rng: random.Random, span: float) -> str:
    """Start the command and kill it: mostly while it trains, now and then while it still loads.

    Returns:
        The steps between which it was killed; empty if it was done before.
    """
    before, process = newest(run.out), start(command, run, file)
    if rng.random() < 0.9:
        while newest(run.out) == before and process.poll() is None:
            time.sleep(0.001)
    try:
        process.wait(timeout=rng.uniform(0, span))
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
        leftovers = [p.name for p in run.out.glob("*/.*.tmp")]
        return f"{before}-{newest(run.out)}{' (while writing ' + leftovers[0] + ')' if leftovers else ''}"
    return ""


def same(folder: Path, other: Path) -> bool:
    found, expected = dict(tiny.saved(folder)), dict(tiny.saved(other))
    equal = [torch.equal(found[n], v) if isinstance(v, torch.Tensor) else found[n] == v for n, v in expected.items()]
    return found.keys() == expected.keys() and all(equal)


def main(seed: int) -> bool:
    rng, good = random.Random(seed), True
    with tempfile.TemporaryDirectory() as folder:
        home = Path(folder)
        runs = world(home)
        print(f"{'training':<16} {'kills':>5}  same bits  steps at the kills (resumed from - last state)", flush=True)
        for command, run in runs.items():
            whole, killed, file = home / f"whole-{command}", home / f"killed-{command}", home / "run.yaml"
            tiny.COMMANDS[command][0](run(whole))
            span, kills = time_of(whole) / (KILLS + 2), []
            while len(kills) < KILLS:
                moment = kill_at_random(command, run(killed), file, rng, span)
                if not moment:
                    raise SystemExit(f"{command} was done after {len(kills)} kills; raise its steps")
                kills.append(moment)
            if start(command, run(killed), file).wait() != 0:
                raise SystemExit(f"{command} did not finish")
            equal = same(killed, whole)
            good &= equal
            print(f"{command:<16} {len(kills):>5}  {'yes' if equal else 'NO':<9}  {', '.join(kills)}", flush=True)
    return good


def time_of(folder: Path) -> float:
    """Seconds that the uninterrupted training took, without imports."""
    return json.loads((folder / "log.jsonl").read_text().splitlines()[-1])["seconds"]


if __name__ == "__main__":
    raise SystemExit(0 if main(int(sys.argv[1]) if len(sys.argv) > 1 else 0) else 1)
