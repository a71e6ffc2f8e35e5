"""Configuration: defaults in pydantic models, then YAML files, then words such as ``tokenizer.width=192``.

A configuration class is beside the code that it configures and inherits from :class:`Config`, which forbids unknown
keys. A variant is a union discriminated by its ``name``. The merged result, written by :func:`save`, repeats a run.
"""

import difflib
import json
import types
import typing
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, TypeVar

import yaml
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError, ValidationInfo, field_validator

from robustok.errors import UserError
from robustok.files import one_line, write_file

# Dotted settings in files of older versions. A key is renamed in a configuration that has the new key and not the old.
RENAMED_KEYS = {
    "preservation": "sigma",
    "batch_size": "cache.batch_size",
    "shard_size": "cache.shard_size",
    "precision": "cache.precision",
    "compile": "cache.compile",
    "latent_dtype": "cache.dtype",
    "mixture.batch_size": "cache.batch_size",
    "mixture.shard_size": "cache.shard_size",
    "mixture.precision": "cache.precision",
    "mixture.compile": "cache.compile",
    "mixture.latent_dtype": "cache.dtype",
    **{name: f"samples.{name}" for name in ("latents", "decoders", "generator", "count", "sets", "sampling")},
    **{name: f"comparison.{name}" for name in ("halves", "distance_dtype", "shuffle")},
    **{name: f"pfid.{name}" for name in ("grid", "noise", "include_self")},
    "perturbation_seeds": "pfid.seeds",
    "lpips_net": "lpips.net",
    "lpips_weights": "lpips.weights",
}
RENAMED_VALUES = {
    ("mixture.mode", "generated"): "direct",
    ("mode", "generated"): "direct",
    ("to", "released"): "export",
    ("trainable", "release"): "authors",
}


class Config(BaseModel):
    """Base of all configuration: unknown keys are errors, values do not change after validation, ``~`` is expanded."""

    model_config = ConfigDict(extra="forbid", frozen=True, protected_namespaces=())

    @field_validator("*")
    @classmethod
    def _expand_home(cls, value: Any) -> Any:
        if isinstance(value, list):
            return [cls._expand_home(item) for item in value]
        if isinstance(value, dict):
            return {key: cls._expand_home(item) for key, item in value.items()}
        try:
            return value.expanduser() if isinstance(value, Path) else value
        except RuntimeError:
            raise ValueError(f"there is no user {value.parts[0].removeprefix('~')} whose home this could be") from None


C = TypeVar("C", bound=Config)


def _divides_width(heads: int, info: ValidationInfo) -> int:
    width = info.data.get("width")  # None where it is not valid itself
    if width is not None and width % heads:
        raise ValueError(f"heads {heads} do not divide width {width}; choose a divisor")
    return heads


Heads = Annotated[
    int,
    Field(gt=0, description="attention heads; must divide width", validate_default=True),
    AfterValidator(_divides_width),
]
"""Setting of a transformer whose ``width`` is declared before it."""


def load(
    model: type[C],
    files: str | Path | Sequence[str | Path] | None = None,
    words: Sequence[str] = (),
    command: str | None = None,
) -> C:
    """Merge defaults, YAML files and dotted words into a validated configuration; later ones win.

    Args:
        model: the configuration class.
        files: YAML files with what differs from the defaults, or names of recipes such as ``digits/tokenizer.yaml``.
        words: ``dotted.key=value`` strings; values are read as YAML (``seeds=[0,1]``, ``steps=200``).
        command: whose settings are read from a preset, a file with ``settings: {COMMAND: {...}}`` for several commands.

    Raises:
        UserError: the file is missing or no mapping; a word has no ``=``; a key is unknown (the nearest known one is
            named); a value has the wrong type or range.
    """
    files = [files] if isinstance(files, str | Path) else list(files or ())
    settings: dict[str, Any] = {}
    for file in files:
        _merge(settings, read_settings(model, file, command))
    for word in words:
        key, separator, text = word.partition("=")
        if not separator or not key:
            raise UserError(f"got the word {word!r}, expected KEY=VALUE such as steps=200 (lists: seeds=[0,1])")
        try:
            value = yaml.safe_load(text)
        except yaml.YAMLError:
            value = text
        _set(settings, key.split("."), value)
    return validate(model, settings, source=" + ".join(map(str, files)) or "the settings")


def validate(model: type[C], settings: dict[str, Any], source: str = "the settings") -> C:
    """Validate a nested dictionary; the first error becomes one line.

    Raises:
        UserError: names the key, what was found and what is accepted.
    """
    settings = _tagged(model, settings)
    try:
        return model.model_validate(settings)
    except ValidationError as error:
        raise UserError(_explain(model, error, settings, source)) from None


def save(config: Config, path: str | Path) -> None:
    """Write the whole configuration as YAML; that file alone repeats the run.

    Raises:
        UserError: the disk is full, or the file cannot be written.
    """
    write_file(path, yaml.safe_dump(plain(config), sort_keys=False))


def plain(config: Config) -> dict[str, Any]:
    """The configuration as JSON-ready dictionaries (paths become strings)."""
    return config.model_dump(mode="json")


def differences(old: dict[str, Any], new: dict[str, Any], prefix: str = "") -> list[str]:
    """Dotted keys in which two plain configurations differ, as ``key: old -> new``."""
    found = []
    for key in sorted(old.keys() | new.keys()):
        a, b = old.get(key), new.get(key)
        if isinstance(a, dict) and isinstance(b, dict):
            found += differences(a, b, f"{prefix}{key}.")
        elif a != b:
            found.append(f"{prefix}{key}: {a} -> {b}")
    return found


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


def list_settings(model: type[Config], defaults: Config | None = None, prefix: str = "") -> list[Setting]:
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
        variants, key = _models(info.annotation), prefix + name
        optional = default is None and not required  # such a group is off until one of its keys is set
        if not variants or optional or Path in _types(info.annotation):  # a path is accepted instead of the group
            found.append(Setting(key, None if required else _text(default), info.description or ""))
        if len(variants) > 1:
            names = sorted(map(_tag, variants))
            about = ": ".join(filter(None, (info.description, f"one of {', '.join(names)}")))
            found.append(Setting(f"{key}.name", getattr(default, "name", None), about))
        merged: dict[tuple[str, str | None, str, tuple[str, ...]], list[str]] = {}
        for variant in variants:
            own = default if isinstance(default, variant) else None
            for s in list_settings(variant, own, f"{key}."):
                if len(variants) == 1 or s.key != f"{key}.name":
                    merged.setdefault((s.key, s.default, s.description, s.variants), []).append(_tag(variant))
        for (inner, text, about, nested), tags in merged.items():
            found.append(Setting(inner, text, about, nested if len(tags) == len(variants) else tuple(tags)))
    return found


def _text(value: Any) -> str:
    """A value as written after ``key=``."""
    return value if isinstance(value, str) else json.dumps(value, default=str)


def read_settings(model: type[Config], file: str | Path, command: str | None = None) -> dict[str, Any]:
    """The settings in a recipe or in the config.yaml of a run folder; old names are replaced, with a warning.

    Args:
        model: the configuration class.
        file: path of a YAML file, or name of a recipe.
        command: whose settings are read from a preset.

    Raises:
        UserError: the file is missing, is not YAML, holds no mapping, or no settings of the command.
    """
    settings = read_yaml(recipe(file))
    if list(settings) == ["settings"]:
        presets = settings["settings"]
        if command not in presets:
            raise UserError(f"{file} holds settings for {', '.join(presets)}, not for {command}; leave it out")
        settings = presets[command] or {}
    known, notes = dict(_keys(model)), []
    for key, group, last in list(_items(settings)):
        new, value = RENAMED_KEYS.get(key), group[last]
        if new in known and key not in known:
            _set(settings, new.split("."), group.pop(last))
            notes.append(f"{key} is now {new}")
        elif key in known and isinstance(value, str) and (key, value) in RENAMED_VALUES:
            group[last] = RENAMED_VALUES[key, value]
            notes.append(f"{key}={value} is now {key}={group[last]}")
    if notes:
        warnings.warn(f"{file} was written by an older version: {', '.join(notes)}", stacklevel=2)
    return settings


def _items(settings: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, dict[str, Any], str]]:
    """Dotted keys of nested settings, each with the dictionary that holds it and its key there."""
    for key, value in settings.items():
        yield f"{prefix}{key}", settings, key
        if isinstance(value, dict):
            yield from _items(value, f"{prefix}{key}.")


def read_yaml(path: str | Path) -> dict[str, Any]:
    """Read a YAML mapping.

    Raises:
        UserError: the file is missing, is not YAML or holds no mapping.
    """
    try:
        content = yaml.safe_load(Path(path).read_text())
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "not a text file"
        raise UserError(f"cannot read the configuration {path}: {reason}; give the path of a YAML file") from None
    except yaml.YAMLError as error:
        raise UserError(f"{path} is not valid YAML: {one_line(error)}") from None
    if content is None:
        return {}
    if not isinstance(content, dict):
        raise UserError(f"{path} holds a {type(content).__name__}, expected a mapping of settings such as 'steps: 200'")
    return content


def recipe(name: str | Path) -> Path:
    """The path itself where it exists, else the recipe of that name that comes with robustok."""
    path = Path(name)
    if path.exists():
        return path
    here = Path(__file__).resolve().parent
    for folder in (here / "configs", here.parents[1] / "configs"):  # in a wheel; in a checkout
        if (folder / path).is_file():
            return folder / path
    return path


def _merge(settings: dict[str, Any], later: dict[str, Any]) -> None:
    """Update the settings with later ones. Choosing another variant drops the settings of the one before."""
    for key, value in later.items():
        old = settings.get(key)
        if isinstance(value, dict) and isinstance(old, dict) and value.get("name", old.get("name")) == old.get("name"):
            _merge(old, value)
        else:
            settings[key] = value


def _set(settings: dict[str, Any], keys: list[str], value: Any) -> None:
    """Set a nested value. Choosing another variant (``data.name=folder``) drops the settings of the one before."""
    *parents, last = keys
    for key in parents:
        if not isinstance(settings.get(key), dict):
            settings[key] = {}
        settings = settings[key]
    if last == "name" and settings.get("name") not in (None, value):
        settings.clear()
    settings[last] = value


def _tagged(model: type[Config], settings: dict[str, Any]) -> dict[str, Any]:
    """The settings with the name of the default variant in every union that names none."""
    filled = dict(settings)
    for key, info in model.model_fields.items():
        variants = _models(info.annotation)
        if not variants or not isinstance(filled.get(key), dict):
            continue
        default = getattr(info.default, "name", None) if len(variants) > 1 else None
        inner = ({"name": default} if default else {}) | filled[key]
        chosen = next((v for v in variants if len(variants) == 1 or _tag(v) == inner.get("name")), None)
        filled[key] = _tagged(chosen, inner) if chosen else inner
    return filled


def _explain(model: type[Config], error: ValidationError, settings: dict[str, Any], source: str) -> str:
    """One line for the first error, with the nearest known key if a key is unknown."""
    errors = error.errors()
    first = next((e for e in errors if e["type"] == "extra_forbidden"), errors[0])
    known, key = dict(_keys(model)), _dotted(first["loc"], settings, first["type"] == "missing")
    listed = list_settings(model)
    owners = sorted({variant for s in listed if f"{s.key}.".startswith(f"{key}.") for variant in s.variants})
    if first["type"] == "extra_forbidden" and owners:
        group = key.rpartition(".")[0]
        while group and f"{group}.name" not in known:  # the group whose variants these are
            group = group.rpartition(".")[0]
        return f"{source}: {key!r} belongs to another variant; set {group}.name={' or '.join(owners)}, or drop it"
    if first["type"] == "extra_forbidden":
        renamed = RENAMED_KEYS.get(key)
        near = renamed if renamed in known else _nearest(key, list(known))
        hint = f"did you mean {near!r}?" if near else f"known: {', '.join(k for k in known if '.' not in k)}"
        return f"{source}: unknown key {key!r}; {hint}"
    if first["type"] == "union_tag_not_found":
        key = f"{key}.name"
        return f"{source}: {key!r} is missing; {next(s.description for s in listed if s.key == key)}"
    if first["type"] == "missing":
        return f"{source}: {key!r} is missing; {known.get(key) or 'it has no default'}"
    if first["type"] == "union_tag_invalid":
        return f"{source}: {key}.name = {first['ctx']['tag']!r}: expected one of {first['ctx']['expected_tags']}"
    message = first["msg"].removeprefix("Value error, ")
    if isinstance(first["input"], dict):  # several settings that do not go together
        return f"{source}: {f'{key}: ' if key else ''}{message}"
    return f"{source}: {key} = {first['input']!r}: {message}"


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


def _models(annotation: Any) -> list[type[Config]]:
    """All configuration classes inside a type annotation."""
    return [t for t in _types(annotation) if issubclass(t, Config)]


def _types(annotation: Any) -> list[type]:
    """All classes inside a type annotation."""
    if isinstance(annotation, types.UnionType) or typing.get_origin(annotation) is not None:
        return [found for part in typing.get_args(annotation) for found in _types(part)]
    return [annotation] if isinstance(annotation, type) else []


def _tag(model: type[Config]) -> str:
    """The ``name`` of this variant of a union; empty for a class that is no variant."""
    return model.model_fields["name"].default if "name" in model.model_fields else ""


def _keys(model: type[Config], prefix: str = "") -> Iterator[tuple[str, str]]:
    """All dotted keys of a configuration class with their descriptions."""
    for name, info in model.model_fields.items():
        yield prefix + name, info.description or ""
        for inner in _models(info.annotation):
            yield from _keys(inner, f"{prefix}{name}.")
