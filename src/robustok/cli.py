"""The command line: verb -> function. The only reader of argv, and where user errors become one line.

    robustok VERB [CONFIG.yaml ...] [KEY=VALUE ...] [--dry-run] [--json]

Results go to stdout, progress and notes to stderr. Exit codes: 0 done, 2 the user can fix it (one line says how),
1 our fault (a trace). Nothing heavy is imported before a verb runs, so that help comes at once.
"""

import difflib
import importlib
import json
import os
import sys
import time
import traceback
import warnings
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from itertools import takewhile
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperCommand


@dataclass(frozen=True)
class Verb:
    """A verb of the command line.

    Attributes:
        help: one line.
        module: where its function and configuration live.
        function: takes the configuration, returns the result.
        config: class of the configuration.
    """

    help: str
    module: str
    function: str
    config: str

    def load(self) -> tuple[Any, Any]:
        """The function and the configuration class; imports what they need."""
        module = importlib.import_module(self.module)
        return getattr(module, self.function), getattr(module, self.config)


VERBS = {
    "demo": Verb("tell the whole story on handwritten digits, in minutes", "robustok.commands.demo", "demo", "DemoRun"),
    "train-classifier": Verb(
        "train a small classifier, whose features others use",
        "robustok.commands.train_classifier",
        "train_classifier",
        "TrainClassifierRun",
    ),
    "main-train": Verb(
        "train a tokenizer with latent perturbation",
        "robustok.training.tokenizer",
        "train_tokenizer",
        "TokenizerTrainingRun",
    ),
    "encode": Verb("turn images into a cache of latents", "robustok.commands.encode", "encode", "EncodeRun"),
    "train-generator": Verb(
        "train a generator on latents",
        "robustok.training.generator",
        "train_generator",
        "GeneratorTrainingRun",
    ),
    "generate": Verb("sample latents, and images if wanted", "robustok.commands.generate", "generate", "GenerateRun"),
    "make-pairs": Verb(
        "mix real latents with samples, for post-training", "robustok.commands.make_pairs", "make_pairs", "MakePairsRun"
    ),
    "post-train": Verb(
        "fine-tune the decoder on such pairs", "robustok.commands.post_train", "post_train", "PostTrainRun"
    ),
    "make-delta": Verb(
        "keep what post-training changed as a small delta or LoRA",
        "robustok.commands.make_delta",
        "make_delta",
        "MakeDeltaRun",
    ),
    "evaluate": Verb("measure rFID, pFID, gFID and others", "robustok.commands.evaluate", "evaluate", "EvaluateRun"),
    "report": Verb("make one HTML page of run folders", "robustok.commands.report", "report", "ReportRun"),
    "convert": Verb(
        "turn released checkpoints into ours, and back", "robustok.commands.convert", "convert", "ConvertRun"
    ),
}

app = typer.Typer(
    help="Image tokenizers whose decoders expect what generators make.",
    epilog="Every verb lists its settings: robustok VERB --help",
    rich_markup_mode=None,
    add_completion=False,
    no_args_is_help=False,
)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line.

    Args:
        arguments: the words after ``robustok``; None takes those of the process.

    Returns:
        The exit code: 0 done, 2 an error that the user can fix, 1 an error of ours.
    """
    words = list(sys.argv[1:] if arguments is None else arguments) or ["--help"]
    words = ["allow_fewer=true" if word == "--allow-fewer" else word for word in words]  # reads better as an option
    with warnings.catch_warnings():
        warnings.showwarning = _note
        try:
            return typer.main.get_command(app).main(words, prog_name="robustok", standalone_mode=False) or 0
        except Exception as error:
            if hasattr(error, "format_message"):  # a usage error of typer, or of the click beneath it
                return _complain(_usage(error.format_message(), words))
            traceback.print_exc()
            return 1


class VerbCommand(TyperCommand):
    """A command whose help lists every setting of its configuration."""

    def format_epilog(self, ctx: Any, formatter: Any) -> None:
        """Write the settings beneath the options."""
        from robustok.config import list_settings

        rows = []
        for setting in list_settings(VERBS[self.name].load()[1]):
            value = "(required)" if setting.default is None else f"= {setting.default}"
            only = f" [{', '.join(setting.variants)}]" if setting.variants else ""
            rows.append((f"{setting.key} {value}".rstrip(), (setting.description + only).strip()))
        with formatter.section("Settings, in CONFIG.yaml or as KEY=VALUE"):
            formatter.write_dl(rows, col_max=36)


def _add(name: str, verb: Verb) -> None:
    @app.command(name, help=f"{verb.help[0].upper()}{verb.help[1:]}.", short_help=verb.help, cls=VerbCommand)
    def command(
        words: Annotated[
            list[str] | None,
            typer.Argument(metavar="[CONFIG.yaml]... [KEY=VALUE]...", show_default=False, help="the settings"),
        ] = None,
        dry_run: Annotated[
            bool, typer.Option("--dry-run", help="Show the settings and what they need; then stop.")
        ] = False,
        as_json: Annotated[bool, typer.Option("--json", help="Print the result as JSON.")] = False,
    ) -> int:
        return _run(name, verb, words or [], dry_run, as_json)


for _name, _verb in VERBS.items():
    _add(_name, _verb)


def _run(name: str, verb: Verb, words: list[str], dry_run: bool, as_json: bool) -> int:
    """Read the settings, call the function, print the result; returns the exit code."""
    from robustok.config import load
    from robustok.errors import UserError

    files = list(takewhile(lambda word: word.endswith((".yaml", ".yml")) and "=" not in word, words))
    try:
        function, config = verb.load()
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
        return _complain("interrupted; run the same command to go on", code=130)
    if _first_process():
        print(text)
    return 0


def _plain(result: Any) -> Any:
    """A verb's result, ready for JSON."""
    if isinstance(result, Path):
        return {"path": str(result)}
    if isinstance(result, list):
        return {"measurements": [measurement.line() for measurement in result]}
    return {key: str(value) if isinstance(value, Path) else value for key, value in asdict(result).items()}


def _text(result: Any) -> str:
    """A verb's result for people."""
    if isinstance(result, Path):
        return str(result)
    if isinstance(result, list):
        return _table([measurement.line() for measurement in result])
    return "\n".join(f"{key}: {value}" for key, value in _plain(result).items())


def _table(lines: list[dict[str, Any]]) -> str:
    """Measurements as a table. The single cells of pFID are left to metrics.jsonl, facts that do not vary to nobody."""
    from rich.console import Console
    from rich.table import Table

    lines = [line for line in lines if line["metric"].partition("@")[0] not in ("pfid", "noise_fd_cell")] or lines
    facts = [
        key
        for key in ("seed", "tokenizer", "images", "decoder", "versus", "sigma", "rate", "strength")
        if len({str(line.get(key)) for line in lines}) > 1
    ]
    table = Table(box=None, pad_edge=False)
    table.add_column("metric")
    for heading in ("value", "standard error", "samples"):
        table.add_column(heading, justify="right")
    for heading in (*facts, "features"):
        table.add_column(heading)
    for line in lines:
        numbers = [_number(line["value"]), _number(line["standard_error"]), str(line["samples"])]
        table.add_row(line["metric"], *numbers, *(str(line.get(key, "")) for key in facts), line["extractor"] or "")
    console = Console(width=None if sys.stdout.isatty() else 160, highlight=False)
    with console.capture() as captured:
        console.print(table)
    return "\n".join(row.rstrip() for row in captured.get().splitlines())


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.4g}"


def _usage(message: str, words: list[str]) -> str:
    """A usage error with the remedy: the nearest verb, how settings are written, where help is."""
    verb = next((word for word in words if not word.startswith("-")), None)
    if verb is not None and verb not in VERBS:
        near = difflib.get_close_matches(verb, VERBS, n=1)
        hint = f"did you mean {near[0]!r}?" if near else f"the verbs are {', '.join(VERBS)}"
        return f"no verb {verb!r}; {hint}"
    return f"{message.rstrip('.')}; settings are written KEY=VALUE, see robustok {verb or 'VERB'} --help"


def _complain(message: str, code: int = 2) -> int:
    """Print one line and return the exit code."""
    if not _first_process():
        time.sleep(10)  # most likely the first process says the same, and the launcher ends this one meanwhile
    print(f"robustok: {' '.join(message.split())}", file=sys.stderr)
    return code


def _note(message: Warning | str, category: type[Warning], filename: str, *_: Any) -> None:
    """Print a warning of ours as one line. Those of libraries are for us, not for users: python -W shows them."""
    ours = Path(filename).is_relative_to(Path(__file__).parent)
    if _first_process() and (ours or sys.warnoptions):
        print(f"robustok: note: {' '.join(str(message).split())}", file=sys.stderr)


def _first_process() -> bool:
    """Whether this is the process that speaks, of those that torchrun or accelerate started."""
    return os.environ.get("RANK", "0") == "0"
