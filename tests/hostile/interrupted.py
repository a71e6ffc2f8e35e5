"""Commands that are killed between any two operations on files, and repeated.

A command that is killed leaves what its operations so far have written. So it runs once, and before each operation a
copy is taken of what it has written. Then the same command runs in each of these copies: it must succeed, with the
result of a command that nobody killed, and leave nothing half-written.
"""

import os
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from hostile.world import Valid, digests, listing, measured_values, remove
from robustok.files import is_temporary

OPERATIONS = {"os.rename", "os.mkdir", "os.remove", "os.rmdir", "os.link", "os.symlink", "os.truncate", "os.chmod"}
WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT
INPUTS = {"in", "guard", "tmp"}


def keep_states(folder: Path) -> Callable[[], None]:
    """From now on, before each operation on files in this process, copy what is written in the working folder.

    Args:
        folder: of the copies, which are called 0000, 0001 and so on. Each differs from those before.

    Returns:
        A function that copies once more, for the end.
    """
    top, seen, busy = Path.cwd(), set(), False

    def copy() -> None:
        nonlocal busy
        if not busy and Path.cwd() == top:
            busy = True  # what the copy itself does is no operation of the command
            content = tuple(sorted(listing(top, INPUTS).items()))
            if content not in seen:
                shutil.copytree(top, folder / f"{len(seen):04d}", symlinks=True, ignore=_inputs)
                seen.add(content)
            busy = False

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        if event in OPERATIONS or (event == "open" and arguments[2] & WRITING):
            copy()

    def _inputs(at: str, names: list[str]) -> set[str]:
        return INPUTS & {*names} if Path(at) == top else set()

    sys.addaudithook(hook)
    return copy


def wrong_after(state: Path, valid: Valid, run: Callable[[], tuple[int, str]]) -> list[str]:
    """What is wrong if the command goes on with what is written in ``state``, which becomes the working folder's.

    Args:
        state: from :func:`keep_states`.
        valid: the command.
        run: runs it, and returns its exit code and what it printed.
    """
    for path in Path().iterdir():
        if path.name not in INPUTS:
            remove(path)
    shutil.copytree(state, ".", symlinks=True, dirs_exist_ok=True)
    kept = [path for path in state.rglob("*") if not any(map(is_temporary, (path, *path.parents)))]
    problems = [f"INTERRUPTED mode of {path.name}" for path in kept if not path.stat().st_mode & 0o044]
    code, text = run()
    if code != 0:
        return [*problems, f"INTERRUPTED exit {code}: {text.strip()[-300:]}"]
    if (digests(Path("out")), measured_values(Path("out"))) != (valid.result, valid.values):
        problems.append("INTERRUPTED another result")
    # A page may be written by several processes at a time, so what one of them left is not removed by another.
    left = [path for path in Path().rglob("*") if path.suffix in (".tmp", ".old") and ".html." not in path.name]
    return problems + [f"INTERRUPTED leftover {path}" for path in left]
