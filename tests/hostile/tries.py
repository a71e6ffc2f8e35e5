"""One hostile try: a command line, its working folder, and what must come of it."""

import random
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

from hostile.world import Valid

T = TypeVar("T")


class NotHereError(Exception):
    """The command has no input of this kind."""


@dataclass
class Try:
    """One hostile try. Mutations change its words, environment, limits or files, and note what they did.

    Attributes:
        valid: what it is made from.
        base: folder of the world, whose inputs are right.
        rng: of all its choices.
        words: the command line.
        notes: what was changed.
        env: variables of the environment.
        limits: of resources, for ``setrlimit``.
        signal: sent after so many seconds.
        user: its user id; None is that of the tests.
        closed: whether stdout is a pipe that nobody reads.
        planted: whether there is something in the place of ``out`` before.
        free_out: whether ``out`` is another path, so that new names at the top of the working folder are right.
        refused: whether exit code 0 would be wrong.
        changed: metrics that must have another value than with the valid inputs, if they are measured.
        equal: whether exit code 0 means the result of the valid command.
        again: whether the valid command must succeed afterwards, with the right result.
    """

    valid: Valid
    base: Path
    rng: random.Random
    words: list[str]
    notes: list[str] = field(default_factory=list)
    env: dict[str, str] = field(default_factory=dict)
    limits: dict[int, int] = field(default_factory=dict)
    signal: tuple[int, float] | None = None
    user: int | None = None
    closed: bool = False
    planted: bool = False
    free_out: bool = False
    refused: bool = False
    changed: tuple[str, ...] = ()
    equal: bool = False
    again: bool = False

    def one(self, choices: Sequence[T]) -> T:
        """One of these, or of the words of a text, at random.

        Raises:
            NotHereError: there is none.
        """
        if not choices:
            raise NotHereError
        chosen = self.rng.choice(choices.split() if isinstance(choices, str) else choices)
        self.notes.append(repr(chosen)[:150])
        return chosen

    def file(self, *patterns: str) -> Path:
        """A random file among those that the command reads, of these names.

        Raises:
            NotHereError: there is none.
        """
        return self.one([path for path in self.inputs(*patterns) if path.is_file()])

    def inputs(self, *patterns: str) -> list[Path]:
        """All files and folders that the words name, and what is in them, of these names."""
        named = " ".join(word.partition("=")[2] for word in self.words)
        named = named.translate(str.maketrans("[]{},@", "      ")).split()
        roots = [path for path in sorted(Path("in").iterdir()) if f"in/{path.name}" in named]
        found = {path for root in roots for path in (root, *root.rglob("*"))}
        return sorted(path for path in found if any(path.match(pattern) for pattern in patterns or "*"))

    @property
    def out(self) -> Path:
        """Where the result is written."""
        return Path(next(word for word in self.words if word.startswith("out=")).removeprefix("out="))
