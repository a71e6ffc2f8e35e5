import errno
import json
import os
import subprocess
import sys
import types
from pathlib import Path

import pytest
import yaml

import robustok
from conftest import MAIN_TRAIN, PIPELINE, words
from robustok import cli
from robustok.cli import COMMANDS, main
from robustok.commands.train_classifier import TrainClassifierRun
from robustok.config import load
from robustok.errors import UserError


def run(capsys, *arguments):
    """Exit code, stdout and stderr of the command line, called in this process."""
    capsys.readouterr()
    code = main(arguments)
    out, err = capsys.readouterr()
    return code, out, err


def one_line(err):
    assert err.startswith("robustok: ")
    assert err.count("\n") == 1, err
    return err


def python(*arguments, **environment):
    command = [sys.executable, *arguments]
    return subprocess.run(command, capture_output=True, text=True, env={**os.environ, **environment}, timeout=120)


# Help


def test_help_names_every_command_and_imports_nothing_heavy():
    code = "import sys; from robustok.cli import main; main(['--help']); print(*sys.modules, file=sys.stderr)"
    answer = python("-c", code)
    imported = {module.partition(".")[0] for module in answer.stderr.split()}
    assert not imported & {"torch", "torchvision", "numpy", "scipy", "pydantic", "yaml", "PIL", "accelerate", "timm"}
    for command in COMMANDS:
        assert f"  {command} " in answer.stdout


def test_without_arguments_help_is_shown(capsys):
    assert run(capsys) == run(capsys, "--help")


@pytest.mark.parametrize("command", COMMANDS)
def test_help_all_lists_every_setting_with_default_and_description(capsys, command):
    code, out, err = run(capsys, command, "--help-all")
    assert (code, err) == (0, "")
    _, config = COMMANDS[command].load()
    for name, field in config.model_fields.items():
        assert f"\n  {name}" in out
        if field.description:
            assert field.description.split()[0] in out
        if field.is_required() and name != "data":
            assert f"\n  {name} (required)" in out


@pytest.mark.parametrize("command", COMMANDS)
def test_help_has_a_line_for_each_setting_and_group_and_fits_two_screens(capsys, command):
    code, out, err = run(capsys, command, "--help")
    assert (code, err) == (0, "")
    assert out.count("\n") < 80
    assert "--help-all" in out
    _, config = COMMANDS[command].load()
    for name, field in config.model_fields.items():
        assert f"\n  {name}" in out
        if field.is_required() and name != "data":
            assert f"\n  {name} (required)" in out


def test_help_all_shows_the_keys_of_groups_and_variants(capsys):
    _, out, _ = run(capsys, "main-train", "--help-all")
    for line in ("perturbation.strength = 100", "tokenizer.quantizer.size = 4096", "data.name (required)", "[folder]"):
        assert line in out
    _, out, _ = run(capsys, "main-train", "--help")
    for line in ("perturbation.*", "tokenizer.name = robustok", "data.name (required)", "data.path (required)"):
        assert line in out
    assert "perturbation.strength" not in out


@pytest.mark.parametrize("option", ["--help", "--help-all"])
@pytest.mark.parametrize(("columns", "low", "high"), [(80, 70, 80), (100, 90, 100), (200, 110, 120)])
def test_help_is_as_wide_as_the_terminal(capsys, monkeypatch, option, columns, low, high):
    monkeypatch.setenv("COLUMNS", str(columns))
    _, out, _ = run(capsys, "post-train", option)
    settings = out.partition("Settings,")[2].splitlines()[1:]
    assert low <= max(map(len, settings)) <= high


@pytest.mark.parametrize("command", COMMANDS)
def test_every_description_is_there(command):
    from robustok.settings import list_settings

    settings = list_settings(COMMANDS[command].load()[1])
    assert [s.key for s in settings if not s.description and not s.key.endswith("name")] == []


# Errors


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["mian-train", "out=x"], ["'mian-train'", "'main-train'"]),
        (["frobnicate"], ["'frobnicate'", "main-train", "evaluate"]),
        (["encode", "--foo"], ["--foo", "KEY=VALUE", "robustok encode --help"]),
        (["encode", "--dry-run=3"], ["--dry-run"]),
        (["--foo"], ["--foo"]),
        (["encode"], ["'out' is missing"]),
        (["encode", "none.yaml"], ["none.yaml", "No such file"]),
        (["encode", "out=x", "later.yaml"], ["'later.yaml'", "KEY=VALUE"]),
        (["demo", "seeds=[0,0]"], ["the same seed twice"]),
        (["demo", "data.name=folder"], ["'data.path' is missing; the folder"]),
        (["main-train", "out=x", "steps=1", "batch_size=1", "learning_rate=1", "betas=[0.9,1]"], ["betas.1 = 1"]),
        (["train"], ["'main-train' or 'train-generator'"]),
        (["x" * 5000], ["the commands are"]),
        (["encode", "out", "x"], ["got the word 'out', expected KEY=VALUE as out=..., without spaces"]),
        (["encode", "\u2013-dry-run"], ["two hyphens"]),
        (["encode", "x.yaml", "out=x", "y.yaml"], ["'y.yaml', but files come before KEY=VALUE"]),
        (["encode", "out=x", "data=digits", "data.limit=3"], ["data='digits' and 'data.limit' exclude each other"]),
    ],
)
def test_usage_errors_are_one_line_and_code_2(capsys, tmp_path, monkeypatch, arguments, said):
    monkeypatch.chdir(tmp_path)
    code, out, err = run(capsys, *arguments)
    assert (code, out) == (2, "")
    for part in said:
        assert part in one_line(err)
    assert list(tmp_path.iterdir()) == []


def test_a_later_word_wins_and_the_earlier_one_is_named(capsys, tmp_path):
    """Scripts put their own words after common ones."""
    words = ["data.limit=4", "data.name=digits", "seed=1", "seed=2", f"out={tmp_path}"]
    code, _, err = run(capsys, "train-classifier", *words, "--dry-run", "--json")
    assert (code, err) == (0, "seed=1 was replaced by a later word\n")
    assert load(TrainClassifierRun, None, words).seed == 2
    assert load(TrainClassifierRun, None, words).data.limit == 4  # though the name came later


@pytest.fixture
def command_that(monkeypatch):
    """Let every command call the given function with the configuration of ``report``."""
    from robustok.commands.report import ReportRun

    return lambda function: monkeypatch.setattr(cli.Command, "load", lambda self: (function, ReportRun))


def failing(error):
    def function(_):
        raise error

    return function


def test_a_bug_shows_its_trace_and_is_code_1(capsys, command_that):
    command_that(lambda run: 1 / 0)
    code, out, err = run(capsys, "report")
    assert (code, out) == (1, "")
    assert "Traceback" in err
    assert "ZeroDivisionError" in err


def test_a_user_error_of_many_lines_is_one_line(capsys, command_that):
    command_that(failing(UserError("the first\n  and the second")))
    assert run(capsys, "report") == (2, "", "robustok: the first and the second\n")


def test_an_interruption_is_one_line(capsys, command_that):
    command_that(failing(KeyboardInterrupt()))
    code, out, err = run(capsys, "report")
    assert (code, out) == (130, "")
    assert "interrupted" in one_line(err)


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (PermissionError(errno.EACCES, "", "data"), "cannot use data: Permission denied; let its owner allow it"),
        (OSError(errno.ENAMETOOLONG, "", "x"), "cannot use x: File name too long; let its owner allow it"),
        (OSError(errno.ENOSPC, ""), "No space left on device; free some space"),
    ],
)
def test_what_the_operating_system_refuses_is_one_line(capsys, command_that, error, said):
    command_that(failing(error))
    code, out, err = run(capsys, "report")
    assert (code, out) == (2, "")
    assert said in one_line(err)


def test_a_bug_that_looks_like_a_missing_file_shows_its_trace(capsys, command_that):
    command_that(failing(FileNotFoundError(errno.ENOENT, "", "x")))
    code, _, err = run(capsys, "report")
    assert code == 1
    assert "Traceback" in err


def report_of(tmp_path, name=b"run", **how):
    """`robustok report` of a folder with one result, in a process of its own."""
    folder = os.path.join(os.fsencode(tmp_path), name)
    os.mkdir(folder)
    with open(os.path.join(folder, b"metrics.jsonl"), "w") as file:
        file.write('{"metric": "gfid", "value": 1.0}\n')
    command = [sys.executable, "-m", "robustok", "report", b"path=" + folder]
    return subprocess.run(command, stderr=subprocess.PIPE, check=False, timeout=120, **how)


def test_names_of_any_bytes_are_printed_without_steering_the_terminal(tmp_path):
    answer = report_of(tmp_path, b"\xff\x1b]0;title\x07", stdout=subprocess.PIPE)
    assert (answer.returncode, answer.stderr) == (0, b"")
    assert answer.stdout.endswith(rb"/\udcff\x1b]0;title\x07/report.html" + b"\n")
    answer = report_of(tmp_path, "µ".encode(), stdout=subprocess.PIPE, env=os.environ | {"PYTHONIOENCODING": "ascii"})
    assert (answer.returncode, answer.stderr) == (0, b"")
    assert answer.stdout.endswith(rb"/\xb5/report.html" + b"\n")


def test_a_result_that_cannot_be_printed_is_no_trace(tmp_path):
    read, write = os.pipe()
    os.close(read)
    answer = report_of(tmp_path, b"piped", stdout=write)
    os.close(write)
    assert (answer.returncode, answer.stderr) == (0, b"")  # as of `| head -0`
    with open(tmp_path / "read only", "w") as file, open(tmp_path / "read only") as closed:
        file.write("")
        answer = report_of(tmp_path, b"full", stdout=closed)
    assert answer.returncode == 2
    assert answer.stderr.startswith(b"robustok: the work is done, but its result could not be printed: Bad file")
    assert answer.stderr.count(b"\n") == 1
    assert all((tmp_path / name / "report.html").exists() for name in ("piped", "full"))


def test_a_warning_of_ours_is_one_line_on_stderr(capsys, command_that):
    import warnings

    def warn(_):
        warnings.warn_explicit("something\nodd", UserWarning, cli.__file__, 1)
        warnings.warn_explicit("something old", UserWarning, yaml.__file__, 1)
        return Path("done")

    command_that(warn)
    assert run(capsys, "report") == (0, "done\n", "robustok: note: something odd\n")


@pytest.fixture
def group(monkeypatch):
    """The variables of a launcher, for a group of three processes."""
    for name, value in {
        "RANK": "0",
        "LOCAL_RANK": "0",
        "WORLD_SIZE": "3",
        "MASTER_ADDR": "x",
        "MASTER_PORT": "1",
    }.items():
        monkeypatch.setenv(name, value)


def test_only_the_first_process_prints_the_result(capsys, command_that, group, monkeypatch):
    monkeypatch.setenv("RANK", "1")
    command_that(lambda run: Path("done"))
    assert run(capsys, "report") == (0, "", "")


def test_a_process_leaves_its_group_unless_it_fails(capsys, command_that, group):
    from torch import distributed

    def join(_):
        distributed.init_process_group("gloo", store=distributed.HashStore(), rank=0, world_size=1)
        return Path("done")

    command_that(join)
    assert run(capsys, "report") == (0, "done\n", "")
    assert not distributed.is_initialized()
    command_that(lambda run: join(run) / None)
    assert run(capsys, "report")[0] == 1
    assert distributed.is_initialized()
    distributed.destroy_process_group()


def test_one_of_several_processes_prints_the_error(capsys, command_that, group, monkeypatch):
    def fail(_):
        raise UserError("no")

    from torch import distributed

    command_that(fail)
    store = distributed.TCPStore("localhost", 0, is_master=True, wait_for_workers=False)
    monkeypatch.setenv("MASTER_ADDR", "localhost")
    monkeypatch.setenv("MASTER_PORT", str(store.port))
    for rank, printed in (("1", "robustok: no\n"), ("0", ""), ("2", "")):  # the first to fail need not be rank 0
        monkeypatch.setenv("RANK", rank)
        assert run(capsys, "report") == (2, "", printed)
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    assert run(capsys, "report") == (2, "", "robustok: no\n")


def test_processes_that_have_not_met_let_the_first_one_print(capsys, command_that, group, monkeypatch):
    def fail(_):
        raise UserError("no")

    command_that(fail)
    for rank, printed in (("1", ""), ("0", "robustok: no\n")):
        monkeypatch.setenv("RANK", rank)
        assert run(capsys, "report") == (2, "", printed)


def test_processes_of_a_launcher_print_one_error(tmp_path):
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "robustok"]
    answer = python(*launch, *["main-train", *MAIN_TRAIN, f"out={tmp_path / 'run'}", "batch_size=500"])
    assert answer.returncode != 0
    assert answer.stderr.count("robustok: the global batch is 500") == 1


def test_a_rank_that_a_launcher_left_silences_nothing(capsys, command_that, monkeypatch):
    for name in ("WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("RANK", "3")
    command_that(lambda run: Path("done"))
    code, out, err = run(capsys, "report")
    assert (code, out) == (0, "done\n")
    assert one_line(err).startswith("robustok: note: RANK")


# Output that cannot be written


def output(stdout, *arguments, **environment):
    """Exit code and stderr of the module with this stdout."""
    command = [sys.executable, "-m", "robustok", *arguments]
    answer = subprocess.run(
        command, stdout=stdout, stderr=subprocess.PIPE, text=True, env={**os.environ, **environment}, timeout=120
    )
    return answer.returncode, answer.stderr


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="a device of Linux")
@pytest.mark.parametrize("arguments", [["--help"], ["report", "--help"], ["report", "--dry-run", "path=x"]])
def test_a_full_stdout_is_one_line(arguments):
    with open("/dev/full", "w") as full:
        code, err = output(full, *arguments)
    assert code == 2
    assert "No space left on device; free some space" in one_line(err)


@pytest.mark.parametrize("arguments", [["--help"], ["report", "--dry-run", "path=x"]])
def test_a_reader_that_has_read_enough_is_no_error(arguments):
    reading, writing = os.pipe()
    os.close(reading)
    with os.fdopen(writing, "w") as pipe:
        code, err = output(pipe, *arguments)
    assert err == ""
    assert code in (0, 1)  # 1 from the library that prints help


def test_a_stdout_of_another_encoding_shows_what_it_can(tmp_path):
    with open(tmp_path / "out", "w") as file:
        assert output(file, "report", "--dry-run", "--json", "path=ü", PYTHONIOENCODING="ascii") == (0, "")
    assert "path" in (tmp_path / "out").read_text()


def test_names_that_stdout_cannot_show(capsys, command_that, monkeypatch):
    import io

    bytes_out = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(bytes_out, encoding="ascii"))
    command_that(lambda run: Path("ü\udcff"))
    assert main(["report"]) == 0
    assert bytes_out.getvalue() == rb"\xfc\udcff" + b"\n"


def test_too_little_memory_is_one_line(capsys, command_that):
    import numpy as np
    import torch

    for allocate in (lambda run: torch.empty(2**60), lambda run: np.empty(2**60), lambda run: torch.empty(2**62, 4)):
        command_that(allocate)
        code, out, err = run(capsys, "report")
        assert (code, out) == (2, "")
        assert "not enough memory" in one_line(err)
        assert "lower batch_size" in err


def test_an_error_fits_a_screen(capsys, command_that):
    def fail(_):
        raise UserError(f"got {'x' * 10**6}; choose another")

    command_that(fail)
    _, _, err = run(capsys, "report")
    assert len(one_line(err)) < 24 * 80
    assert err.endswith("; choose another\n")


# The commands


def test_results_go_to_stdout_and_nothing_else_does(capsys, pipeline, tmp_path):
    out = tmp_path / "tokenizer"
    code, printed, err = run(capsys, *words("main-train", pipeline, str(out)))
    assert (code, printed, err) == (0, f"{out / 'snapshot' / '00000003'}\n", "")
    assert (out / "snapshot" / "00000003" / "model.safetensors").exists()


def test_the_same_command_again_is_done_at_once(capsys, pipeline):
    for name, command in PIPELINE.items():
        before = {file: file.stat().st_mtime_ns for file in (pipeline / name).rglob("*.safetensors")}
        code, _, err = run(capsys, *words(command, pipeline, str(pipeline / name)))
        assert (code, err) == (0, "")
        assert {file: file.stat().st_mtime_ns for file in (pipeline / name).rglob("*.safetensors")} == before, command


def test_evaluate_prints_a_table_or_json(capsys, pipeline, tmp_path):
    arguments = words("evaluate", pipeline, str(tmp_path / "e"))
    code, table, err = run(capsys, *arguments)
    assert (code, err) == (0, "")
    assert table.splitlines()[0].split()[:2] == ["metric", "value"]
    for metric in ("rfid", "pfid_mean", "gfid", "gfid_difference"):
        assert f"\n{metric} " in table
    code, text, err = run(capsys, *arguments, "--json")
    assert (code, err) == (0, "")
    found = json.loads(text)["measurements"]
    lines = [json.loads(line) for line in (tmp_path / "e" / "metrics.jsonl").read_text().splitlines()]
    assert found == lines[len(found) :]
    assert {"metric", "value", "standard_error", "samples", "seed", "extractor", "reference"} <= found[0].keys()
    assert next(m for m in found if m["metric"] == "rfid")["extractor"].startswith("classifier-")


def test_train_classifier_prints_its_accuracy(capsys, pipeline, tmp_path):
    arguments = [
        w for w in words("train-classifier", pipeline, str(tmp_path / "c")) if "limit" not in w and "steps" not in w
    ]
    code, text, err = run(capsys, *arguments, "classifier.steps=60", "--json")
    assert (code, err) == (0, "")
    found = json.loads(text)
    assert found["samples"] == 449
    assert found["accuracy"] > 0.5
    assert found["path"] == str(tmp_path / "c" / "snapshot" / "00000060")


def test_report_makes_a_page(capsys, pipeline, tmp_path):
    page = tmp_path / "page.html"
    code, printed, err = run(capsys, "report", f"path={pipeline}", f"out={page}")
    assert (code, printed, err) == (0, f"{page}\n", "")
    assert "<html" in page.read_text()


def test_settings_from_a_file_and_from_words_are_the_same(capsys, tmp_path):
    _, text, _ = run(capsys, "main-train", *MAIN_TRAIN, f"out={tmp_path / 'x'}", "--dry-run")
    (tmp_path / "run.yaml").write_text(text)  # the estimates are comments, so the output is a configuration
    code, again, _ = run(capsys, "main-train", str(tmp_path / "run.yaml"), "--dry-run")
    assert (code, again) == (0, text)
    assert yaml.safe_load(text)["tokenizer"]["encoder"]["width"] == 16


# Estimates


@pytest.mark.parametrize("command", [*PIPELINE.values(), "evaluate"])
def test_a_dry_run_writes_nothing(capsys, pipeline, tmp_path, command):
    code, text, err = run(capsys, *words(command, pipeline, str(tmp_path / "out")), "--dry-run", "--json")
    assert (code, err) == (0, "")
    assert json.loads(text)["config"]["out"] == str(tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("name", "command"), [(n, v) for n, v in PIPELINE.items() if v in ("main-train", "train-generator", "post-train")]
)
def test_parameters_and_disk_are_estimated_well(capsys, pipeline, name, command):
    from safetensors.torch import load_file

    _, text, _ = run(capsys, *words(command, pipeline, "x"), "--dry-run", "--json")
    facts = json.loads(text)["facts"]
    snapshot = pipeline / name / "snapshot" / "00000003"
    stored = load_file(snapshot / "model.safetensors")
    kind = "generator" if command == "train-generator" else "tokenizer"
    assert facts[f"{kind}_parameters"] == sum(tensor.numel() for tensor in stored.values())
    assert facts["steps"] == 3
    assert facts["samples_seen"] == 24
    for fact, folder in (("snapshot_bytes", snapshot), ("state_bytes", pipeline / name / "state" / "00000003")):
        tensors = [t for file in folder.glob("*.safetensors") for t in load_file(file).values()]
        assert facts[fact] == pytest.approx(sum(t.numel() * t.element_size() for t in tensors), rel=0.05), fact


@pytest.mark.parametrize(
    ("name", "command"), [(n, v) for n, v in PIPELINE.items() if v in ("encode", "generate", "make-pairs")]
)
def test_the_size_of_a_cache_is_estimated_well(capsys, pipeline, name, command):
    from safetensors.numpy import load_file

    _, text, _ = run(capsys, *words(command, pipeline, "x"), "--dry-run", "--json")
    facts = json.loads(text)["facts"]
    shards = [load_file(file) for file in (pipeline / name).glob("*.safetensors")]
    assert facts["shards"] == len(shards)
    assert facts["records"] == sum(len(shard["labels"]) for shard in shards)
    size = sum(array.nbytes for shard in shards for array in shard.values())
    assert size <= facts["cache_bytes"] <= size + facts["records"]  # a cache without mirrored images stores no flips


def test_the_papers_tokenizer_is_counted_without_building_it(capsys, monkeypatch):
    from torch.nn import Module

    devices, register = set(), Module.register_parameter

    def record(self, name, parameter):
        devices.add(None if parameter is None else parameter.device.type)
        register(self, name, parameter)

    monkeypatch.setattr(Module, "register_parameter", record)
    _, text, _ = run(capsys, "main-train", "data.name=digits", "out=x", "--dry-run", "--json")
    facts = json.loads(text)["facts"]
    # 172,288,064 with the LayerScale of DINOv2, which the default, without pretrained weights, does not have.
    assert facts["tokenizer_parameters"] == 172_288_064 - 2 * 12 * 2 * 768
    assert devices - {None} == {"meta"}


def test_files_before_the_words_are_merged_in_order(capsys, tmp_path):
    (tmp_path / "a.yaml").write_text("out: x\nsteps: 5\nbatch_size: 4\n")
    (tmp_path / "b.yaml").write_text("settings: {main-train: {steps: 7}, post-train: {steps: 9}}\n")
    files = [str(tmp_path / name) for name in ("a.yaml", "b.yaml")]
    code, text, _ = run(capsys, "main-train", *files, *MAIN_TRAIN[:2], "seed=3", "--dry-run")
    found = yaml.safe_load(text)
    assert (code, found["steps"], found["batch_size"], found["seed"]) == (0, 7, 4, 3)


# The package


def test_the_module_is_the_command():
    answer = python("-m", "robustok", "encode", "bogus=1", "out=x")
    assert answer.returncode == 2
    assert answer.stdout == ""
    assert "'bogus'" in one_line(answer.stderr)


def test_importing_the_package_imports_nothing_heavy():
    code = "import sys, robustok; print([m for m in ('torch', 'numpy', 'pydantic', 'typer') if m in sys.modules])"
    assert python("-c", code).stdout.strip() == "[]"


def test_every_public_name_is_there():
    assert len(robustok.__all__) == len(set(robustok.__all__))
    for name in robustok.__all__:
        value = getattr(robustok, name)
        assert not isinstance(value, types.ModuleType), name
        assert name in dir(robustok)
    with pytest.raises(AttributeError, match="nothing"):
        robustok.nothing  # noqa: B018


def test_perceptual_losses_of_the_smallest_images_are_estimated(capsys, tmp_path):
    """VGG's last pooling, which LPIPS does not use, has nothing left to pool at 16 pixels."""
    small = [*MAIN_TRAIN, f"out={tmp_path / 'x'}", "reconstruction.perceptual=lpips", "tokenizer.image_size=16"]
    code, text, _ = run(capsys, "main-train", *small, "--dry-run")
    assert code == 0
    assert "activations" in text


def test_perceptual_losses_of_images_too_small_for_them(capsys, tmp_path):
    small = [*MAIN_TRAIN, f"out={tmp_path / 'x'}", "reconstruction.perceptual=lpips", "tokenizer.image_size=8"]
    code, _, err = run(capsys, "main-train", *small, "tokenizer.patch_size=4", "--dry-run")
    assert code == 2
    assert "8x8 pixels, lpips_vgg needs 16 a side; set reconstruction.perceptual=classifier or none" in err
