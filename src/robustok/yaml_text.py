"""YAML in which a plain word stays as it was written, until it is known what it is for.

YAML 1.1 reads ``no`` as false, ``010`` as 8, ``12:30`` as 750 and ``2024-05-01`` as a date; it drops what follows
`` #``, and of two equal keys it keeps the last. Here a word without quotes is a :class:`Plain` text, which
:func:`read_plain` turns into what a setting takes.
"""

import re
from collections import Counter
from collections.abc import Collection
from pathlib import Path
from typing import Any

import yaml

LARGEST, DEEPEST = 100_000, 50  # values in a file, aliases counted in full; lists and groups inside each other
NOTHING = ("", "~", "null", "Null", "NULL")
_DECIMAL = re.compile(r"[-+]?(0|[1-9]\d{0,400})(\.\d*)?", re.ASCII)
_NUMBER = re.compile(_DECIMAL.pattern + r"([eE][-+]?\d+)?|[-+]?\.\d+([eE][-+]?\d+)?", re.ASCII)
_OTHER_BASE = re.compile(r"0x[0-9a-fA-F]{1,400}|0o[0-7]{1,400}")
_TAG = "tag:yaml.org,2002:"
_CONSTANTS = {"true": True, "false": False, ".inf": float("inf"), "-.inf": -float("inf"), ".nan": float("nan")}


class Plain(str):
    """A YAML scalar without quotes, as it was written."""


def _scalar(loader: yaml.Loader, node: yaml.Node) -> str:
    return Plain(node.value) if node.style is None else node.value


class _Loader(yaml.SafeLoader):
    """Lists, mappings and texts."""

    yaml_implicit_resolvers = {"<": [(f"{_TAG}merge", re.compile("<<"))]}  # noqa: RUF012
    yaml_constructors = (
        {tag: yaml.SafeLoader.yaml_constructors[tag] for tag in (f"{_TAG}seq", f"{_TAG}map", None)}
        | {f"{_TAG}{name}": _scalar for name in ("str", "int", "float", "bool", "null")}
    )  # fmt: skip

    def construct_document(self, node: yaml.Node) -> Any:
        _measure(node, {})
        return super().construct_document(node)

    def construct_mapping(self, node: yaml.Node, deep: bool = False) -> dict[Any, Any]:
        content = super().construct_mapping(node, deep)
        return {str(key) if isinstance(key, Plain) else key: value for key, value in content.items()}


def parse(text: str) -> Any:
    """The content of a YAML document: dictionaries, lists, texts and :class:`Plain` texts; None if it is empty.

    Raises:
        yaml.YAMLError: it is no YAML; a key is there twice; it is too deep, or too large once aliases are written out.
    """
    try:
        return yaml.load(text, _Loader)
    except RecursionError:
        raise yaml.YAMLError(f"lists or groups inside each other, more than {DEEPEST} deep") from None
    except (TypeError, ValueError, AttributeError) as error:  # an odd tag, such as !!int on a list
        raise yaml.YAMLError(str(error)) from None


def _measure(node: yaml.Node, known: dict[int, tuple[int, int]]) -> tuple[int, int]:
    """How many values are in a node, with those of its aliases, and how deep it is; refuses keys that repeat."""
    if id(node) not in known:
        known[id(node)] = (LARGEST, 0)  # until it is known: an alias of a list inside this list has no end
        inside = []
        if isinstance(node, yaml.MappingNode):
            inside = [part for pair in node.value for part in pair]
            names = Counter(key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode))
            if twice := next((name for name, count in names.items() if count > 1), None):
                raise yaml.YAMLError(f"the key {twice!r} is there twice, in line {node.start_mark.line + 1}; keep one")
        elif isinstance(node, yaml.SequenceNode):
            inside = node.value
        sizes = [_measure(part, known) for part in inside]
        known[id(node)] = 1 + sum(size for size, _ in sizes), 1 + max((depth for _, depth in sizes), default=0)
        if known[id(node)][0] > LARGEST:
            raise yaml.YAMLError(f"more than {LARGEST:,} values once aliases (*NAME) are written out")
        if known[id(node)][1] > DEEPEST:
            raise yaml.YAMLError(f"lists or groups inside each other, more than {DEEPEST} deep")
    return known[id(node)]


def read_plain(text: Plain, kinds: Collection[Any]) -> Any:
    """What a plain word is, given what is accepted: types such as ``Path``, ``int`` or ``NoneType``, or ``Any``.

    ``010`` is ten, as in YAML 1.2. What may be a text is a number only in decimal notation, so that ``1e5`` and ``007``
    stay names. The words of a boolean are left to pydantic.
    """
    if text == "" or (text in NOTHING and (type(None) in kinds or Any in kinds)):
        return None
    if Any in kinds and text in _CONSTANTS:
        return _CONSTANTS[text]
    texts, numbers = {str, Path} & {*kinds}, {int, float, Any} & {*kinds}
    if numbers and (_DECIMAL if texts else _NUMBER).fullmatch(text):
        return float(text) if set(text) & set(".eE") else int(text)
    return int(text, 0) if numbers and not texts and _OTHER_BASE.fullmatch(text) else str(text)
