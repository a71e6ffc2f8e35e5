"""Configuration: defaults in pydantic models, then YAML files, then words such as ``tokenizer.width=192``.

A configuration class is beside the code that it configures and inherits from :class:`Config`, which forbids unknown
keys. A variant is a union discriminated by its ``name``. The merged result, written by :func:`save`, repeats a run.
"""

import typing
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, TypeVar

import yaml
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError, ValidationInfo, field_validator

from robustok.errors import UserError, shown
from robustok.files import one_line, regular_file, write_file
from robustok.settings import alternatives, explain, is_group, variant_name
from robustok.yaml_text import Plain, parse, read_plain


class Config(BaseModel):
    """Base of all configuration: unknown keys are errors, values do not change after validation.

    Numbers are finite and below 2^64, the largest seed of torch; ``~`` in paths is expanded.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, protected_namespaces=(), allow_inf_nan=False)

    @field_validator("*")
    @classmethod
    def _usable(cls, value: Any) -> Any:
        return _usable(value)


def _usable(value: Any) -> Any:
    """A validated value, or values in lists and dictionaries, that the file system and torch can take."""
    if isinstance(value, list | tuple):
        return type(value)(map(_usable, value))
    if isinstance(value, dict):
        return {key: _usable(inner) for key, inner in value.items()}
    if isinstance(value, int) and abs(value) >= 2**64:
        raise ValueError("the number is too large; the largest is 2^64 - 1")
    if not isinstance(value, Path):
        return value
    if "\0" in str(value):
        raise ValueError("a path cannot hold a zero byte")
    try:
        return value.expanduser()
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
        words: ``dotted.key=value`` strings; values are YAML (``seeds=[0,1]``), paths and texts are as they are written.
        command: whose settings are read from a preset, a file with ``settings: {COMMAND: {...}}`` for several commands.

    Raises:
        UserError: the file is missing or no mapping; a word has no ``=``; a key is unknown (the nearest known one is
            named); a value has the wrong type or range.
    """
    files = [files] if isinstance(files, str | Path) else list(files or ())
    settings: dict[str, Any] = {}
    for file in files:
        _merge(settings, read_settings(model, file, command))
    for key, text in _in_order(model, words):
        _set(settings, key.split("."), _word(text, _accepted(model, key.split("."))))
    sources = [*map(str, files), *(["the words after"] if files and words else [])]
    return validate(model, settings, source=" + ".join(sources) or "the settings")


def repeated(model: type[Config], words: Sequence[str]) -> list[str]:
    """The words that a later one replaces, in a command that somebody typed.

    Raises:
        UserError: a word is no ``KEY=VALUE``, or belongs to a group to which an earlier word gives a plain value.
    """
    given: dict[str, str] = {}
    replaced = []
    for key, text in _split(model, words):
        if given.get(key, text) != text:
            replaced.append(f"{key}={given[key]}")
        parents = (key.rsplit(".", i)[0] for i in range(1, key.count(".") + 1))
        if group := next((p for p in parents if p in given and not given[p].startswith("{")), None):
            raise UserError(f"{group}={shown(given[group])} and {shown(key)} exclude each other; drop one")
        given[key] = text
    return replaced


def _in_order(model: type[Config], words: Sequence[str]) -> list[tuple[str, str]]:
    """Keys and texts of words, the name of a variant before its settings, which another name drops."""
    found: list[tuple[str, str]] = []
    for key, text in _split(model, words):
        group = key.removesuffix("name") if key.endswith(".name") else None
        settings = [i for i, (other, _) in enumerate(found) if group and other.startswith(group) and other != key]
        found.insert(settings[0] if settings else len(found), (key, text))
    return found


def _no_setting(model: type[Config], word: str) -> str:
    """What is said of a word without ``=``."""
    name = word.lstrip("-\u2010\u2011\u2012\u2013\u2014\u2015\u2212")  # hyphens and dashes
    if name != word or name in ("dry-run", "json", "help"):
        return f"got the word {shown(word)}; options are written with two hyphens: --dry-run, --json or --help"
    if word.endswith((".yaml", ".yml")):
        return f"got the word {shown(word)}, but files come before KEY=VALUE; put it first"
    example = f"as {word}=..." if word.split(".")[0] in model.model_fields else "such as steps=200 (lists: seeds=[0,1])"
    return f"got the word {shown(word)}, expected KEY=VALUE {example}, without spaces around the ="


def _split(model: type[Config], words: Sequence[str]) -> list[tuple[str, str]]:
    """Keys and texts of words, all of them before anything else is said of one."""
    parts = [word.partition("=") for word in words]
    for word, (key, separator, _) in zip(words, parts, strict=True):
        if not separator or not key or key.count(".") > 20:
            raise UserError(_no_setting(model, word))
    return [(key, text) for key, _, text in parts]


def _word(text: str, accepted: list[Any]) -> Any:
    """What is written after ``KEY=``: YAML, but a path or text is taken as it is, unless it is in quotes."""
    try:
        value = parse(text)
    except yaml.YAMLError:
        return Plain(text)
    quoted = text[:1] in ("'", '"') and text[-1] == text[0] and not isinstance(value, Plain)
    group = any(typing.get_origin(a) in (list, tuple, dict) or is_group(a) for a in accepted)
    texts = Path in accepted or str in accepted
    if value is None or not (quoted or not texts or (group and isinstance(value, dict | list))):
        return Plain(text)
    return value


def validate(model: type[C], settings: dict[str, Any], source: str = "the settings") -> C:
    """Validate a nested dictionary; the first error becomes one line.

    Raises:
        UserError: names the key, what was found and what is accepted.
    """
    settings = _filled(model, settings)
    try:
        return model.model_validate(settings)
    except ValidationError as error:
        raise UserError(explain(model, error, settings, source)) from None


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


def read_settings(model: type[Config], file: str | Path, command: str | None = None) -> dict[str, Any]:
    """The settings in a recipe or in the config.yaml of a run folder.

    Args:
        model: the configuration class.
        file: path of a YAML file, or name of a recipe.
        command: whose settings are read from a preset.

    Raises:
        UserError: the file is missing, is not YAML, holds no mapping, or no settings of the command.
    """
    settings = _read_plain_yaml(recipe(file))
    if list(settings) == ["settings"]:
        presets = settings["settings"]
        if not isinstance(presets, dict) or not all(isinstance(p, dict) or p == "" for p in presets.values()):
            raise UserError(f"{file}: 'settings' must hold the settings of commands, such as encode: {{seed: 1}}")
        if command not in presets:
            raise UserError(f"{file} holds settings for {', '.join(presets)}, not for {command}; leave it out")
        settings = presets[command] or {}
    return settings


def read_yaml(path: str | Path) -> dict[str, Any]:
    """Read a YAML mapping.

    Raises:
        UserError: the file is missing, is not YAML or holds no mapping.
    """
    settings: dict[str, Any] = _typed([Any], _read_plain_yaml(path))
    return settings


def _read_plain_yaml(path: str | Path) -> dict[str, Any]:
    """Read a YAML mapping, with plain words as they are written."""
    try:
        content = parse(regular_file(path).read_text(encoding="utf-8"))
    except UnicodeDecodeError:
        raise UserError(f"cannot read the configuration {path}: not a text file in UTF-8; give a YAML file") from None
    except yaml.YAMLError as error:
        raise UserError(f"{path} is not valid YAML: {one_line(error, 300)}") from None
    if content is None:
        return {}
    if not isinstance(content, dict):
        kind = "list" if isinstance(content, list) else "text"
        raise UserError(f"{path} holds a {kind}, expected a mapping of settings such as 'steps: 200'")
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


def _filled(model: type[Config], settings: dict[str, Any]) -> dict[str, Any]:
    """The settings with the default variant named where none is, and every plain word as its field takes it."""
    fields = {key: info for key, info in model.model_fields.items() if key in settings}
    filled = {
        key: _typed(alternatives(info.annotation), settings[key], getattr(info.default, "name", None))
        for key, info in fields.items()
    }
    return settings | filled


def _typed(accepted: list[Any], value: Any, default: str | None = None) -> Any:
    """A value with every plain word in it as one of the accepted types."""
    if isinstance(value, Plain):
        return read_plain(value, accepted)
    if value == "" and Path in accepted:
        return None  # the path "" would be the current folder
    if isinstance(value, list):
        return [_typed(_inside(accepted, list, tuple), inner) for inner in value]
    variants = [a for a in accepted if is_group(a)]
    if not isinstance(value, dict) or not (variants or accepted):
        return value
    if not variants:
        return {key: _typed(_inside(accepted, dict), inner) for key, inner in value.items()}
    if default and len(variants) > 1:
        value = {"name": default} | value
    for variant in [v for v in variants if len(variants) == 1 or variant_name(v) == value.get("name")] or variants:
        value = _filled(variant, value)
    return value


def _inside(accepted: list[Any], *containers: type) -> list[Any]:
    """The types that are accepted as values of these containers."""
    found = [a for part in accepted if typing.get_origin(part) in containers for a in typing.get_args(part)]
    return alternatives(*(found[1:] if dict in containers else found)) or [Any]


def _accepted(model: type[Config], keys: Sequence[str]) -> list[Any]:
    """The types that are accepted at a dotted key, in any variant."""
    accepted: list[Any] = [model]
    for key in keys:
        groups = [a.model_fields[key].annotation for a in accepted if is_group(a) and key in a.model_fields]
        accepted = alternatives(*groups) if groups else _inside(accepted, dict)
    return accepted
