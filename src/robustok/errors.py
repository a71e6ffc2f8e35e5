"""The error for problems that the user can fix, and text of other people that is safe to show."""

import re

# Control characters (but not tab and line feed), marks that reorder text, and halves of characters, which stand for
# the bytes of a file name that is not UTF-8.
_UNSAFE = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u200e\u200f\u202a-\u202e\u2066-\u2069\ud800-\udfff]")


def printable(text: object) -> str:
    r"""The text with ``\x1b`` and its like written out, so that no file name can steer a terminal."""
    return _UNSAFE.sub(lambda found: found[0].encode("unicode_escape").decode(), str(text))


def shown(value: object, limit: int = 200) -> str:
    """What somebody wrote, for a message: texts in quotes, cut to ``limit`` characters."""
    text = repr(str(value)) if isinstance(value, str) else repr(value)
    return text if len(text) <= limit else f"{text[:limit]}... ({len(text):,} characters)"


class UserError(Exception):
    """Something the user can fix. The command line prints it as one line and exits with code 2.

    The message gives what was found, what is accepted and what to do.
    """

    def __str__(self) -> str:
        return printable(super().__str__())


class FileError(UserError, OSError):
    """A file that cannot be used. Also an OSError, so that those who skip unreadable files skip it."""
