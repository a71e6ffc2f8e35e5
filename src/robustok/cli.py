"""The command line: command -> function. The only reader of argv, and where user errors become one line.

    robustok COMMAND [CONFIG.yaml ...] [KEY=VALUE ...] [--dry-run] [--json]

Results go to stdout, progress and notes to stderr. Exit codes: 0 done, 2 the user can fix it (one line says how),
1 a bug (a trace). Nothing heavy is imported before a command runs, so help is fast.
"""

import difflib
import errno
import importlib
import json
import os
import re
import sys
import traceback
import warnings
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from functools import partial
from itertools import groupby, takewhile
from pathlib import Path
from textwrap import shorten
from typing import Annotated, Any

import typer
from typer.core import TyperCommand

# Errors of the operating system that are no bug of ours, wherever they come up.
ORDINARY = {errno.EACCES, errno.EPERM, errno.EROFS, errno.ELOOP, errno.ENAMETOOLONG, errno.ENOSPC, errno.EDQUOT}
ORDINARY |= {errno.EFBIG, errno.EIO, errno.ESTALE, errno.EMFILE, errno.ENFILE, errno.EPIPE}


@dataclass(frozen=True)
class Command:
    """A command of the command line.

    Attributes:
        help: one line.
        source: module and function, ``module:function``.
        config: class of the configuration, in the same module.
        positional: settings that may be given as the first words, without their names.
    """

    help: str
    source: str
    config: str
    positional: tuple[str, ...] = ()

    def load(self) -> tuple[Any, Any]:
        """The function, which takes the configuration and returns the result, and the configuration class."""
        name, function = self.source.split(":")
        module = importlib.import_module(f"robustok.{name}")
        return getattr(module, function), getattr(module, self.config)


COMMANDS = {
    "demo": Command("run the whole method on handwritten digits, in minutes", "commands.demo:demo", "DemoRun"),
    "train-classifier": Command(
        "train a small classifier, a feature space",
        "commands.train_classifier:train_classifier",
        "TrainClassifierRun",
    ),
    "main-train": Command(
        "train a tokenizer with latent perturbation", "training.tokenizer:train_tokenizer", "TokenizerTrainingRun"
    ),
    "encode": Command("turn images into a cache of latents", "commands.encode:encode", "EncodeRun"),
    "train-generator": Command(
        "train a generator on latents", "training.generator:train_generator", "GeneratorTrainingRun"
    ),
    "generate": Command("sample latents, and images if wanted", "commands.generate:generate", "GenerateRun"),
    "make-pairs": Command(
        "mix real latents with samples, for post-training", "commands.make_pairs:make_pairs", "MakePairsRun"
    ),
    "post-train": Command("fine-tune the decoder on such pairs", "commands.post_train:post_train", "PostTrainRun"),
    "make-delta": Command(
        "save what post-training changed as a small delta or LoRA", "commands.make_delta:make_delta", "MakeDeltaRun"
    ),
    "evaluate": Command("measure rFID, pFID, gFID and others", "commands.evaluate:evaluate", "EvaluateRun"),
    "push": Command("upload a snapshot to the Hugging Face Hub", "commands.push:push", "PushRun", ("path", "to")),
    "report": Command("make one HTML page of run folders", "commands.report:report", "ReportRun"),
    "app": Command("look at decoders before and after, in a browser", "commands.app:app", "AppRun", ("path",)),
    "convert": Command("convert pretrained weights to our layout, and back", "commands.convert:convert", "ConvertRun"),
    "convert-latents": Command(
        "convert latents of other projects, and back", "commands.convert_latents:convert_latents", "ConvertLatentsRun"
    ),
}

# Settings that read better as an option.
FLAGS = {"--allow-fewer": "allow_fewer", "--full": "full", "--open": "open", "--watch": "watch"}
WIDTH, KEY_WIDTH = 120, 36  # columns of help texts at the most, and of the names of settings
SCREEN = 1500  # characters of an error
INTERRUPTED = "interrupted; run the same command to resume"

app = typer.Typer(
    help="Image tokenizers whose decoders expect what generators make.",
    epilog="The settings of a command: robustok COMMAND --help, or --help-all",
    rich_markup_mode=None,
    add_completion=False,
    no_args_is_help=False,
    context_settings={"help_option_names": ["--help", "-h"], "max_content_width": WIDTH},
)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line.

    Args:
        arguments: the words after ``robustok``; None takes those of the process.

    Returns:
        The exit code: 0 done, 2 an error that the user can fix, 1 a bug.
    """
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")  # what a terminal of another encoding cannot show
    words = list(sys.argv[1:] if arguments is None else arguments) or ["--help"]
    words = [f"{FLAGS[word]}=true" if word in FLAGS else word for word in words]
    with warnings.catch_warnings():
        warnings.showwarning = _note
        try:
            return typer.main.get_command(app).main(words, prog_name="robustok", standalone_mode=False) or 0
        except typer.Abort:
            return _complain(INTERRUPTED, code=130)
        except Exception as error:
            if hasattr(error, "format_message"):  # a usage error of typer, or of the click beneath it
                return _complain(_usage(error.format_message(), words))
            if getattr(error, "errno", None) in ORDINARY:
                return _failed(error)
            if _out_of_memory(error):
                found = str(error).partition("\n")[0][:200] or type(error).__name__
                about = "lower batch_size or the sizes of the model or images, or close other programs"
                return _complain(f"not enough memory ({found}); {about}")
            _say(traceback.format_exc(), error=True)
            return 1


class SettingsCommand(TyperCommand):
    """A command whose help lists its settings: with ``--help`` a line each, a group in one line; else in full."""

    def format_epilog(self, ctx: Any, formatter: Any) -> None:
        """Write the settings beneath the options."""
        from robustok.settings import list_settings

        settings, title = list_settings(COMMANDS[self.name].load()[1]), "Settings, in CONFIG.yaml or as KEY=VALUE"
        if "all settings" in ctx.meta:
            rows = [_row(setting) for setting in settings]
        else:
            rows = list(_short(settings, formatter.width - KEY_WIDTH - 4))  # 2 before the name, 2 behind it
            title += "; --help-all: in full"
        with formatter.section(title):
            formatter.write_dl(rows, col_max=KEY_WIDTH)


def _row(setting: Any) -> tuple[str, str]:
    value = "(required)" if setting.default is None else f"= {setting.default}"
    only = f" [{', '.join(setting.variants)}]" if setting.variants else ""
    return f"{setting.key} {value}".rstrip(), (setting.description + only).strip()


def _short(settings: list[Any], width: int) -> Iterator[tuple[str, str]]:
    """A line for each top-level setting, variant and required setting, and one for the rest of each group."""
    fit = partial(shorten, width=width, placeholder=" ...")
    for group, members in groupby(settings, key=lambda setting: setting.key.partition(".")[0]):
        inside, optional = [], False
        for setting in members:
            optional |= setting.key == group
            required = setting.default is None and not optional and setting.key.count(".") == 1
            if setting.key in (group, f"{group}.name") or required:
                key, about = _row(setting)
                yield key, fit(about)
            else:
                inside.append(setting.key.split(".")[1])
        if inside:
            yield f"{group}.*", fit(f"{len(inside)} settings: {', '.join(dict.fromkeys(inside))}")


def _help_all(ctx: typer.Context, wanted: bool) -> None:
    if wanted:
        ctx.meta["all settings"] = True  # for format_epilog
        _say(ctx.get_help())
        raise typer.Exit


def _add(name: str, command: Command) -> None:
    about = f"{command.help[0].upper()}{command.help[1:]}."

    @app.command(name, help=about, short_help=command.help, cls=SettingsCommand)
    def run_command(
        words: Annotated[
            list[str] | None,
            typer.Argument(metavar="[CONFIG.yaml]... [KEY=VALUE]...", show_default=False, help="the settings"),
        ] = None,
        dry_run: Annotated[
            bool, typer.Option("--dry-run", help="Show the settings and what they need; then stop.")
        ] = False,
        as_json: Annotated[bool, typer.Option("--json", help="Print the result as JSON.")] = False,
        _all: Annotated[
            bool, typer.Option("--help-all", is_eager=True, callback=_help_all, help="Show every setting and exit.")
        ] = False,
    ) -> int:
        return _run(name, words or [], dry_run, as_json)


for _name, _command in COMMANDS.items():
    _add(_name, _command)


def _run(name: str, words: list[str], dry_run: bool, as_json: bool) -> int:
    """Read the settings, call the function, print the result; returns the exit code."""
    from robustok.config import load, repeated
    from robustok.environment import ignore_leftovers
    from robustok.errors import UserError

    words = named(words, COMMANDS[name].positional)
    files = list(takewhile(_is_file, words))
    try:
        ignore_leftovers()
        function, config = COMMANDS[name].load()
        replaced = repeated(config, words[len(files) :])
        run = load(config, files, words[len(files) :], command=name)
        if dry_run:
            from robustok.commands.dry_run import estimate, show

            text = show(run, estimate(run), as_json)
        else:
            result = function(run)
            if "RANK" in os.environ:
                from robustok.devices import leave_processes

                leave_processes()
            text = json.dumps(_plain(result), indent=2) if as_json else _text(result)
    except UserError as error:
        return _complain(str(error))
    except KeyboardInterrupt:
        return _complain(INTERRUPTED, code=130)
    if not _first_process():
        return 0
    for word in replaced:  # not before the work: a line of error is then alone
        _say(f"{word} was replaced by a later word", error=True)
    try:
        _say(text)
    except OSError as error:
        return _failed(error, "the work is done, but its result could not be printed: ")
    return 0


def named(words: list[str], settings: tuple[str, ...]) -> list[str]:
    """Words with the names of the settings that the first ones are, as in ``push runs/post ORG/NAME``."""
    first = list(takewhile(lambda word: "=" not in word, words[: len(settings)]))
    return [f"{key}={word}" for key, word in zip(settings, first, strict=False)] + words[len(first) :]


def _is_file(word: str) -> bool:
    """Whether a word is a YAML file, perhaps with = in its path."""
    return word.endswith((".yaml", ".yml")) and ("=" not in word or os.path.exists(word))


def _say(text: str, error: bool = False) -> None:
    """Print to stdout or stderr, without commands to the terminal."""
    from robustok.errors import printable

    print(printable(text), file=sys.stderr if error else sys.stdout, flush=True)


def _failed(error: OSError, what: str = "") -> int:
    """Say what the operating system refused; returns the exit code. A closed pipe, as of ``| head``, is no error."""
    if error.filename is None:
        with suppress(OSError, ValueError):  # or Python complains about stdout once more when it ends
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        remedy = "free some space, or write elsewhere"
    else:
        what, remedy = f"cannot use {error.filename}: ", "let its owner allow it, or choose another path"
    return 0 if error.errno == errno.EPIPE else _complain(f"{what}{os.strerror(error.errno)}; {remedy}")


def _out_of_memory(error: Exception) -> bool:
    """Whether more memory is asked for than a CPU or GPU has. Of the libraries' errors only the texts tell."""
    said = (
        "can't allocate memory|not enough memory|out of memory|overflowed with sizes|too big|unpacking long|too large"
    )
    return isinstance(error, MemoryError) or re.search(said, str(error)) is not None


def _plain(result: Any) -> Any:
    """A command's result, ready for JSON."""
    if isinstance(result, Path):
        return {"path": str(result)}
    if isinstance(result, list):
        return {"measurements": [measurement.line() for measurement in result]}
    return {key: str(value) if isinstance(value, Path) else value for key, value in asdict(result).items()}


def _text(result: Any) -> str:
    """A command's result as text."""
    if isinstance(result, Path):
        return str(result)
    if isinstance(result, list):
        return _table([measurement.line() for measurement in result])
    return "\n".join(f"{key}: {value}" for key, value in _plain(result).items())


def _table(lines: list[dict[str, Any]]) -> str:
    """Measurements as a table, without single cells of pFID and without columns of equal values."""
    from rich.console import Console
    from rich.table import Table

    lines = [line for line in lines if line["metric"].partition("@")[0] not in ("pfid", "noise_fd_cell")] or lines
    varying = [
        key
        for key in ("seed", "tokenizer", "images", "decoder", "versus", "sigma", "rate", "strength")
        if len({str(line.get(key)) for line in lines}) > 1
    ]
    table = Table(box=None, pad_edge=False)
    table.add_column("metric")
    for heading in ("value", "standard error", "samples"):
        table.add_column(heading, justify="right")
    for heading in (*varying, "features"):
        table.add_column(heading)
    for line in lines:
        numbers = ["" if line[key] is None else f"{line[key]:.4g}" for key in ("value", "standard_error")]
        details = (str(line.get(key, "")) for key in varying)
        table.add_row(line["metric"], *numbers, str(line["samples"]), *details, line["extractor"] or "")
    console = Console(width=None if sys.stdout.isatty() else 160, highlight=False)
    with console.capture() as captured:
        console.print(table)
    return "\n".join(row.rstrip() for row in captured.get().splitlines())


def _usage(message: str, words: list[str]) -> str:
    """A usage error with the remedy: the nearest command, how settings are written, where help is."""
    name = next((word for word in words if not word.startswith("-")), None)
    if name is not None and name not in COMMANDS:
        near = [known for known in COMMANDS if name in known] or difflib.get_close_matches(name[:50], COMMANDS, n=1)
        hint = (
            f"did you mean {' or '.join(map(repr, near))}?"
            if name and near
            else f"the commands are {', '.join(COMMANDS)}"
        )
        return f"no command {name[:200]!r}; {hint}; robustok --help says more"
    return f"{message.rstrip('.')}; settings are KEY=VALUE, without hyphens, see robustok {name or 'COMMAND'} --help"


def _complain(message: str, code: int = 2) -> int:
    """Print one line, unless another process has printed its own; returns the exit code."""
    first = True
    if "RANK" in os.environ:
        from robustok.devices import first_to_fail

        first = first_to_fail()
    if first and sys.stderr is not None:
        line = " ".join(message.split())
        if len(line) > SCREEN:
            line = f"{line[: 2 * SCREEN // 3]} ... {line[-SCREEN // 3 :]}"
        with suppress(OSError):
            _say(f"robustok: {line}", error=True)
    return code


def _note(message: Warning | str, category: type[Warning], filename: str, *_: Any) -> None:
    """Print a warning of ours as one line. Those of libraries are hidden, unless python -W asks for them."""
    ours = Path(filename).is_relative_to(Path(__file__).parent)
    if _first_process() and (ours or sys.warnoptions):
        with suppress(OSError):
            _say(f"robustok: note: {' '.join(str(message).split())}", error=True)


def _first_process() -> bool:
    """Whether this is the first of the processes that torchrun or accelerate started: the one that prints."""
    return os.environ.get("RANK", "0") == "0"
