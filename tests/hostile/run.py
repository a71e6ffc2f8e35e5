"""Hostile tries: valid command lines with one thing wrong, and what must hold whatever is wrong.

    python tests/hostile/run.py --tries 10000 --seed 1     many tries, on two cores
    python tests/hostile/run.py --only 123                 one of them; keeps its folder
    python tests/hostile/run.py --tries 0 --every          all command lines, also alike ones, interrupted

Each try is a process forked from one that has imported everything, in a working folder of its own with copies of the
inputs. It must end in time with exit code 0 or 2, say what is wrong in one line without a trace, write nothing but
``out``, and not be in the way of the valid command. ``interrupted.py`` says what is tried of interrupted commands.
Prints the tries in which this does not hold, grouped by what was wrong; exit code 1 if there are any.
"""

import argparse
import gc
import multiprocessing
import os
import random
import re
import resource
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections import defaultdict
from collections.abc import Callable, Sequence
from contextlib import suppress
from itertools import chain
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
os.environ |= {"ROBUSTOK_PROGRESS": "0", "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}

from hostile import contents, lines, places
from hostile.contents import SCRIPT
from hostile.interrupted import keep_states, wrong_after
from hostile.tries import NotHereError, Try
from hostile.world import OUT, SECRET, Valid, build_world, copy_inputs, digests, listing, measured_values
from robustok.cli import COMMANDS, main

KINDS = {  # of mutations, and how often each is tried
    lines.settings_words: 16,
    lines.yaml_files: 6,
    lines.environment: 5,
    lines.killed: 6,
    lines.full_disk: 5,
    lines.permissions: 4,
    contents.file_bytes: 14,
    contents.headers: 14,
    contents.tensors: 5,
    contents.tensor_headers: 5,
    contents.npz_members: 4,
    contents.parquet: 3,
    contents.pickles: 5,
    contents.pictures: 5,
    contents.other_content: 3,
    places.links: 5,
    places.links_of_out: 6,
    places.special_files: 6,
    places.removed: 3,
    places.swapped: 4,
    places.resumed: 9,
}
MUTATIONS = {kind.__name__ for kind in KINDS}
SECONDS = 30  # after which a try hangs; the valid ones take less than one
MEMORY = 4 << 30  # bytes that a try may allocate
LENGTH = 2000  # characters of an error
CONTROL = re.compile("[\x00-\x08\x0b-\x1f\x7f\u202e]")


def choose(n: int, seed: int, base: Path, valid: list[Valid]) -> Try:
    """Try number ``n``, whose mutations are applied to the inputs in the working folder."""
    rng = random.Random(f"{seed}/{n}")
    commands = [name for name in COMMANDS if name in {one.command for one in valid}]
    command = commands[n % len(commands)]
    line = rng.choice([v for v in valid if v.command == command])
    _copy_world(base, line.words)
    t = Try(line, base, rng, list(line.words))
    _mutate(t)
    if rng.random() < 0.2:  # what is claimed of one mutation may not hold with two
        t.refused, t.equal, t.again, t.changed = False, False, False, ()
        if rng.random() < 0.5:
            t.words.append(t.one(["--dry-run", "--json"]))
        else:
            with suppress(Exception):  # the first may have left nothing that the second can read
                _mutate(t)
        t.refused, t.equal, t.again, t.changed = False, False, False, ()
    return t


def _mutate(t: Try) -> None:
    while True:
        kind = t.rng.choices(list(KINDS), list(KINDS.values()))[0]
        with suppress(NotHereError):
            t.notes.append(kind.__name__)
            return kind(t)


def run_try(n: int, seed: int, base: Path, valid: list[Valid], folder: Path) -> list[str]:
    """Make and run one try in ``folder``; returns what is wrong, each with the words and mutation at the end."""
    work = folder / "work"
    (work / "tmp").mkdir(parents=True)
    os.chdir(work)
    t = choose(n, seed, base, valid)
    out = set() if t.free_out else OUT
    before = listing(work, {"tmp", *out})
    code, text = run(t.words, folder, t)
    problems = [*_wrong_end(t, code, text), *_wrong_writes(t, work, before, out), *_wrong_result(t, code)]
    again = t.signal or t.limits or (t.again and t.rng.random() < 0.4)
    if again and code != 0 and not t.planted and not problems:
        problems += _wrong_afterwards(t, base, folder)
    words, notes = (
        " ".join(part if len(part) < 200 else f"{part[:99]}...({len(part)})" for part in p) for p in (t.words, t.notes)
    )
    about = f"    #{n} {words!r}\n      {notes!r}\n      exit {code}: {text[-700:]!r}"
    return [f"{problem}\n{about}" for problem in problems]


def _copy_world(base: Path, words: Sequence[str]) -> None:
    for name in ("in", "guard"):
        shutil.rmtree(name, ignore_errors=True)
    shutil.copytree(base / "guard", "guard")
    Path("in").mkdir()
    copy_inputs(base, words)


def run(words: list[str], folder: Path, t: Try | None = None) -> tuple[int, str]:
    """Run the command line in a forked process; returns its exit code (of a signal, negative) and what it printed."""
    printed = folder / "printed.txt"
    if t and t.user is not None:
        for path in (folder, *(p for p in folder.rglob("*") if not p.is_symlink())):
            os.chown(path, t.user, t.user)
    printed.unlink(missing_ok=True)
    if not (child := os.fork()):
        _in_child(words, printed, t)
    while not printed.exists():
        time.sleep(0.001)
    started, sent = time.monotonic(), False
    while True:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            break
        passed = time.monotonic() - started
        if t and t.signal and not sent and passed > t.signal[1]:
            os.kill(child, t.signal[0])
            sent = True
        if passed > SECONDS:
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
            return 124, "hangs"
        time.sleep(0.005)
    return os.waitstatus_to_exitcode(status), printed.read_text(errors="backslashreplace")


def _in_child(words: list[str], printed: Path, t: Try | None, at_end: Callable[[], None] = lambda: None) -> None:
    """Run the command line in this process and end it."""
    code = 1
    try:
        os.setsid()
        stream = os.open(printed, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_APPEND)
        os.dup2(stream, 2)
        os.dup2(stream, 1)
        gc.disable()
        os.fsync = lambda _: None  # no power fails here, and waiting for the disk takes a third of the time
        if t:
            _limit(t)
        encoding = t.env.get("PYTHONIOENCODING", "utf-8") if t else "utf-8"
        sys.stdout, sys.stderr = (open(at, "w", encoding=encoding) for at in (1, 2))  # noqa: SIM115
        code = main(words)
        at_end()
    except SystemExit as end:
        code = end.code or 0
    except BaseException:
        traceback.print_exc()
    finally:
        for stream in (sys.stdout, sys.stderr):
            try:
                stream.flush()
            except OSError:
                code = code or 120  # as Python itself
        os._exit(code)


def _limit(t: Try) -> None:
    os.environ.update(t.env)
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + MEMORY, used + MEMORY))
    for limit, value in t.limits.items():
        resource.setrlimit(limit, (value, value))
    if t.closed:
        reading, writing = os.pipe()
        os.close(reading)
        os.dup2(writing, 1)
    if t.user is not None:
        os.setgroups([])
        os.setgid(t.user)
        os.setuid(t.user)


def _wrong_end(t: Try, code: int, text: str) -> list[str]:
    """What is wrong with the exit code and the printed text."""
    if code == 124:
        return ["HANG"]
    if "Traceback (most recent call last)" in text:
        frames = re.findall(r'File ".*?/(src/robustok/\S+)", line (\d+), in (\S+)', text)
        where = " ".join(frames[-1]) if frames else "?"
        return [f"TRACE {text.strip().splitlines()[-1][:150]} at {where}"]
    if t.signal and code == -t.signal[0]:
        return []
    allowed = {0, 2} | ({130} if t.signal and t.signal[0] == signal.SIGINT else set())
    problems = [] if code in allowed else [f"EXIT CODE {code}"]
    complaints = [
        line for line in text.splitlines() if line.startswith("robustok: ") and "robustok: note: " not in line
    ]
    others = [line for line in text.splitlines() if not line.startswith("robustok: ")]  # such as what data was found
    if code == 2 and not t.limits and len(complaints) != 1:  # with them, the text may be cut off
        problems.append(f"{len(complaints)} LINES of error")
    if code == 2 and len(others) > 5 and not t.limits:
        problems.append(f"OTHER OUTPUT {others[0][:80]}")
    if long := [line for line in text.splitlines() if len(line) > LENGTH and line.startswith("robustok: ")]:
        problems.append(f"LONG error, {len(long[0])} characters")
    if CONTROL.search(text):
        problems.append("CONTROL characters are printed")
    if t.refused and code == 0:
        problems.append(f"ACCEPTED {t.notes[0]}")
    return problems


def _wrong_writes(t: Try, work: Path, before: dict, out: set[str]) -> list[str]:
    """What is written outside of ``out``, or copied into it from a file that is no input."""
    after = listing(work, {"tmp", *out})
    problems = [f"CHANGED {Path(p).relative_to(work)}" for p, value in before.items() if after.get(p) != value]
    new = [Path(p).relative_to(work) for p in after.keys() - before.keys()]
    new = [p for p in new if not (t.free_out and len(p.parts) >= 1 and p.parts[0] not in ("in", "guard"))]
    new = [p for p in new if not (t.signal and re.search(r"\.out.*\.(tmp|old)$", p.parts[0]))]
    problems += [f"NEW {p}" for p in new]
    written = [work / name for name in out if not (work / name).is_symlink()]
    pages = [p for path in written for p in (path, *path.rglob("*")) if p.is_file() and not p.is_symlink()]
    problems += [f"SECRET in {p.name}" for p in pages if SECRET.encode() in p.read_bytes()]
    return problems


def _wrong_result(t: Try, code: int) -> list[str]:
    """What is wrong in ``out``: unchanged numbers, another result, rights, leftovers, foreign scripts."""
    out, problems = Path("out"), []
    values = measured_values(out)
    if code == 0:
        same = [key for key, value in values.items() if value == t.valid.values.get(key)]
        problems += [f"UNCHANGED {key}" for key in same if key.split()[0] in t.changed]
        if t.equal and digests(out) != t.valid.result:
            problems.append(f"ANOTHER result: {t.notes[0]}")
        if t.equal and t.valid.values and not t.valid.values.items() <= values.items():
            problems.append(f"ANOTHER value: {t.notes[0]}")
    made = [p for p in (*map(Path, OUT), *out.rglob("*")) if p.exists()]
    made = [p for p in made if not p.is_symlink()]
    left = [p.name for p in made if p.suffix in (".tmp", ".old") or p.name == ".lock"]
    whole = [p for p in made if not {*p.parts} & {*left}]  # what is in a temporary folder has no mode yet
    if any(not p.stat().st_mode & 0o044 for p in whole) and t.user is None:
        problems.append("MODE: others cannot read what is written")
    if left and not t.signal and not t.planted:
        problems.append(f"LEFTOVER {left[0]}")
    if Path("out.html").is_file() and SCRIPT in Path("out.html").read_text(errors="replace"):
        problems.append("SCRIPT on the page")
    return problems


def _wrong_afterwards(t: Try, base: Path, folder: Path) -> list[str]:
    """Whether the valid command, with the inputs as they were, fails or makes another result than alone."""
    if not t.signal and not t.limits and Path("out/config.yaml").exists():
        return []  # a run with other settings has begun
    os.chmod(".", 0o755)
    _copy_world(base, t.valid.words)
    code, text = run(list(t.valid.words), folder)
    if code == 2 and "out holds other latents" in text and MUTATIONS & {*t.notes} - {"killed"}:
        return []  # the killed command had other inputs, and had begun
    if code != 0:
        return [f"AFTERWARDS exit {code}: {text.strip()[-300:]}"]
    different = digests(Path("out")) != t.valid.result
    return ["AFTERWARDS another result"] if different else []


def run_interrupted(valid: Valid, base: Path, folder: Path) -> list[str]:
    """Kill a valid command at every operation on files, and run it again; returns what is wrong."""
    work, states = folder / "work", folder / "states"
    (work / "tmp").mkdir(parents=True)
    states.mkdir()
    os.chdir(work)
    _copy_world(base, valid.words)
    words, problems = list(valid.words), []
    if not (child := os.fork()):
        copy = keep_states(states)
        _in_child(words, folder / "printed.txt", None, copy)
    os.waitpid(child, 0)
    kept = sorted(states.iterdir())
    assert digests(kept[-1] / "out") == valid.result
    for state in kept:
        found = sorted(str(path.relative_to(state)) for path in state.rglob("*"))
        about = f"    {' '.join(words)!r}\n      {state.name}: {' '.join(found)[:700]}"
        problems += [f"{problem}\n{about}" for problem in wrong_after(state, valid, lambda: run(words, folder))]
    return problems


def _worker(arguments: tuple[Callable[..., list[str]], tuple, Path, bool]) -> list[str]:
    function, rest, folder, keep = arguments
    try:
        problems = function(*rest, folder)
    except Exception:
        problems = [f"TEST {traceback.format_exc()}"]
    os.chdir(folder.parent)
    if not keep:
        shutil.rmtree(folder, ignore_errors=True)
    return problems


def _one_each(valid: list[Valid]) -> list[Valid]:
    """Of the command lines that write files of the same names, such as trainings on several kinds of data, the first.

    A run of main-train writes what one of train-generator does, and takes longer.
    """
    kinds, found = ("to=", "family=", "layout=", "images="), {}
    for one in valid:
        if one.command != "main-train":
            found.setdefault((one.command, *(word for word in one.words if word.startswith(kinds))), one)
    return list(found.values())


def hostile(tries: list[int], seed: int, workers: int, keep: bool, every: bool) -> dict[str, list[str]]:
    """Run these tries; returns those in which something is wrong, grouped by what it is.

    Args:
        tries: their numbers.
        seed: of what is chosen.
        workers: processes.
        keep: whether their folders stay, and nothing else is tried.
        every: whether all valid command lines are interrupted, or one of those alike.
    """
    top, found = Path(tempfile.mkdtemp(prefix="hostile-")), defaultdict(list)
    top.chmod(0o755)
    base = top / "base"
    base.mkdir()
    os.chdir(base)
    with open(os.devnull, "w") as quiet:
        kept, sys.stdout = sys.stdout, quiet
        valid = build_world(base)
        sys.stdout = kept
    print(f"{len(valid)} valid command lines, slowest {max(v.seconds for v in valid):.1f} s", flush=True)
    gc.collect()
    gc.freeze()  # the forked processes share the memory of what is imported
    jobs = [(run_try, (n, seed, base, valid), top / str(n), keep) for n in tries]
    lines = [] if keep else sorted(valid if every else _one_each(valid), key=lambda one: -one.seconds)
    long = [(run_interrupted, (line, base), top / f"interrupted-{i}", keep) for i, line in enumerate(lines)]
    with multiprocessing.get_context("fork").Pool(workers) as pool:
        for problems in chain(*(pool.imap_unordered(_worker, *group) for group in ((long, 1), (jobs, 4)))):
            for problem in problems:
                what, _, about = problem.partition("\n")
                found[what].append(about)
                print(f"{what}\n{about}" if len(found[what]) <= 3 else what, flush=True)
    gc.unfreeze()
    print(f"folder: {top}") if keep else shutil.rmtree(top, ignore_errors=True)
    return found


def _main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tries", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--only", type=int)
    parser.add_argument("--every", action="store_true")
    wanted = parser.parse_args()
    tries = list(range(wanted.tries)) if wanted.only is None else [wanted.only]
    start = time.monotonic()
    found = hostile(tries, wanted.seed, wanted.workers, wanted.only is not None, wanted.every)
    for what, cases in sorted(found.items(), key=lambda item: -len(item[1])):
        print(f"{len(cases)} x {what}")
    print(f"{len(tries)} tries in {time.monotonic() - start:.0f} s: {len(found)} things are wrong")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(_main())
