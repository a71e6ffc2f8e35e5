"""What settings a configuration class has, for help texts, and what is said of settings that it does not take."""

import difflib
import json
import types
import typing
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, ValidationError

from robustok.errors import shown

LONGEST_KEY = 100  # of which a misspelt key is compared with the known ones


@dataclass(frozen=True)
class Setting:
    """One key that a user can set, for help texts.

    Attributes:
        key: dotted key.
        default: default value as written in a word; None if the key is required.
        description: its meaning and unit.
        variants: names of the variants that have this key with this default; empty if all have it.
    """

    key: str
    default: str | None
    description: str
    variants: tuple[str, ...] = ()


def list_settings(model: type[BaseModel], defaults: BaseModel | None = None, prefix: str = "") -> list[Setting]:
    """All dotted keys of a configuration class in order, the variants of a union side by side.

    Args:
        model: the configuration class.
        defaults: an instance whose values are the defaults; None takes those of the class.
        prefix: of all keys, with its dot.
    """
    found = []
    for name, info in model.model_fields.items():
        required = defaults is None and info.is_required()
        default = None if required else info.get_default() if defaults is None else getattr(defaults, name)
        variants, key = groups_in(info.annotation), prefix + name
        optional = default is None and not required  # such a group is off until one of its keys is set
        if not variants or optional or Path in _types(info.annotation):  # a path is accepted instead of the group
            found.append(Setting(key, None if required else _text(default), info.description or ""))
        if len(variants) > 1:
            names = sorted(map(variant_name, variants))
            about = ": ".join(filter(None, (info.description, f"one of {', '.join(names)}")))
            found.append(Setting(f"{key}.name", getattr(default, "name", None), about))
        merged: dict[tuple[str, str | None, str, tuple[str, ...]], list[str]] = {}
        for variant in variants:
            own = default if isinstance(default, variant) else None
            for s in list_settings(variant, own, f"{key}."):
                if len(variants) == 1 or s.key != f"{key}.name":
                    merged.setdefault((s.key, s.default, s.description, s.variants), []).append(variant_name(variant))
        for (inner, text, about, nested), tags in merged.items():
            found.append(Setting(inner, text, about, nested if len(tags) == len(variants) else tuple(tags)))
    return found


def _text(value: Any) -> str:
    """A value as written after ``key=``."""
    return value if isinstance(value, str) else json.dumps(value, default=str)


def explain(model: type[BaseModel], error: ValidationError, settings: dict[str, Any], source: str) -> str:
    """One line for the first error, with the nearest known key if a key is unknown."""
    errors = error.errors()
    first = next((e for e in errors if e["type"] == "extra_forbidden"), errors[0])
    kind, value = first["type"], first["input"]
    known, key = dict(dotted_keys(model)), _dotted(first["loc"], settings, kind == "missing")
    listed = list_settings(model)
    owners = sorted({variant for s in listed if f"{s.key}.".startswith(f"{key}.") for variant in s.variants})
    if kind == "extra_forbidden" and owners:
        group = key.rpartition(".")[0]
        while group and f"{group}.name" not in known:  # the group whose variants these are
            group = group.rpartition(".")[0]
        return f"{source}: {key!r} belongs to another variant; set {group}.name={' or '.join(owners)}, or drop it"
    if kind == "extra_forbidden":
        near = _nearest(key[:LONGEST_KEY], list(known))
        hint = f"did you mean {near!r}?" if near else f"known: {', '.join(k for k in known if '.' not in k)}"
        return f"{source}: unknown key {shown(key)}; {hint}"
    if kind == "union_tag_not_found":
        key = f"{key}.name"
        return f"{source}: {key!r} is missing; {next(s.description for s in listed if s.key == key)}"
    if kind == "missing":
        about = [s.description for s in listed if s.key == key and {*s.variants} & {*first["loc"]}]  # of this variant
        about = about or [known.get(key) or ""]
        return f"{source}: {key!r} is missing; {about[0] or 'it has no default'}"
    if kind == "union_tag_invalid":
        tag, expected = first["ctx"]["tag"], first["ctx"]["expected_tags"]
        return f"{source}: {key}.name = {shown(tag)}: expected one of {expected}"
    if kind in ("model_type", "model_attributes_type"):
        names = next((s.description.split("one of ")[-1] for s in listed if s.key == f"{key}.name"), "").split(", ")
        example = next((s.key for s in listed if s.key.startswith(f"{key}.")), f"{key}.KEY")
        write = f"{key}.name={value}" if value in names else f"{key}.KEY=VALUE, such as {example}=..."
        return f"{source}: {key} = {shown(value)}: a group of settings; write {write}"
    # All that is accepted, where there are alternatives
    messages = [_said(e["msg"]) for e in errors if _dotted(e["loc"], settings, False) == key]
    message = "; or ".join(dict.fromkeys(messages))
    if kind in ("list_type", "tuple_type") and isinstance(value, str | int | float):
        message += f"; write {key}=[{str(value)[:100]}]"
    if kind == "dict_type":
        message += f"; write {key}.NAME=VALUE"
    if isinstance(value, dict):  # several settings that do not go together
        return f"{source}: {f'{key}: ' if key else ''}{message}"
    empty = "; it is empty, give a value" if value in (None, "") else ""
    return f"{source}: {key} = {shown(value)}: {message}{empty}"


def _said(message: str) -> str:
    """What pydantic says, without its own names of types."""
    return message.removeprefix("Value error, ").removesuffix(" for <class 'pathlib.Path'>")


def _dotted(location: Sequence[str | int], settings: Any, missing: bool) -> str:
    """The dotted key of an error; its location also has the names of variants, which are no keys of the settings."""
    key = []
    for i, part in enumerate(location):
        try:
            settings = settings[part]
        except (KeyError, IndexError, TypeError):
            if not missing or i < len(location) - 1:
                continue
        key.append(str(part))
    return ".".join(key)


def _nearest(key: str, known: Sequence[str]) -> str | None:
    """The known key most like a misspelt one: its last part must be alike, then the whole decides."""

    def likeness(other: str) -> tuple[float, float]:
        pairs = ((key.rpartition(".")[2], other.rpartition(".")[2]), (key, other))
        last, whole = (difflib.SequenceMatcher(None, *pair).ratio() for pair in pairs)
        return last, whole

    best = max(known, key=likeness, default=None)
    return best if best is not None and likeness(best)[0] >= 0.6 else None


def groups_in(annotation: Any) -> list[type[BaseModel]]:
    """All configuration classes inside a type annotation."""
    return [t for t in _types(annotation) if issubclass(t, BaseModel)]


def _types(annotation: Any) -> list[type]:
    """All classes inside a type annotation."""
    if isinstance(annotation, types.UnionType) or typing.get_origin(annotation) is not None:
        return [found for part in typing.get_args(annotation) for found in _types(part)]
    return [annotation] if isinstance(annotation, type) else []


def alternatives(*annotations: Any) -> list[Any]:
    """The alternatives that type annotations allow, such as ``list[int]`` and ``NoneType``."""
    found = []
    for annotation in annotations:
        origin = typing.get_origin(annotation)
        if origin in (typing.Union, types.UnionType):
            found += alternatives(*typing.get_args(annotation))
        elif origin is Annotated:
            found += alternatives(typing.get_args(annotation)[0])
        else:
            found.append(annotation)
    return found


def is_group(annotation: Any) -> bool:
    """Whether a type annotation is a configuration class."""
    return isinstance(annotation, type) and issubclass(annotation, BaseModel)


def variant_name(model: type[BaseModel]) -> str:
    """The ``name`` of this variant of a union; empty for a class that is no variant."""
    return model.model_fields["name"].default if "name" in model.model_fields else ""


def dotted_keys(model: type[BaseModel], prefix: str = "") -> Iterator[tuple[str, str]]:
    """All dotted keys of a configuration class with their descriptions."""
    for name, info in model.model_fields.items():
        yield prefix + name, info.description or ""
        for inner in groups_in(info.annotation):
            yield from dotted_keys(inner, f"{prefix}{name}.")
