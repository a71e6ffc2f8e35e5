"""The script that measures a GPU runs from end to end on the CPU, at toy sizes."""

import ast
import importlib
import importlib.util
import json
import time
from pathlib import Path

import pytest
import torch

SCRIPT = Path(__file__).parents[1] / "benchmarks" / "gpu.py"
CASES = (  # of every part; together they run most of the code
    "ceilings",
    "waits/gpt",
    "waits/sampler",
    "training/tokenizer/eager",
    "training/rar-b",
    "training/authors",
    "training/kl/eager",
    "convolutions/vq/bf16-NHWC",
    "sampler/rar-b/float32@2",
    "sampler/rar-b/bf16-weights-compiled@2",
    "encoding/float32",
    "encoding/bf16-compiled",
    "inception/bf16-NHWC",
    "lpips/bf16-4-compiled",
    "fid/decode-and-features@2",
    "fid/distance",
    "fid/kid-and-precision-recall",
    "loader",
    "tests",
    "demo",
)


@pytest.fixture(scope="module")
def script():
    for package in ("lpips", "torch_fidelity", "diffusers"):
        pytest.importorskip(package)
    spec = importlib.util.spec_from_file_location("gpu_benchmark", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_every_part_runs(script, tmp_path, capsys):
    words = ["--tiny", "--device", "cpu", "--only", ",".join(CASES), "--out", str(tmp_path / "report.json")]
    report = script.main(words)
    assert report["errors"] == {}
    assert json.loads((tmp_path / "report.json").read_text())["rows"] == report["rows"]
    cases = {row["case"] for row in report["rows"]}
    assert {case.split("/")[0] for case in cases} == set(script.PARTS)
    assert all(any(case.startswith(given) for case in cases) for given in CASES)
    assert all(row["MFU"] > 0 for row in report["rows"] if row["case"].startswith("training/"))
    assert "sampler/rar-b/float32@2" in capsys.readouterr().out


def test_a_failing_case_does_not_lose_the_others(script, capsys, monkeypatch):
    def broken(bench):
        yield "first", lambda: 1 / 0
        yield "second", lambda: {"value": 2.0}

    monkeypatch.setattr(script, "PARTS", {"broken": broken})
    report = script.main(["--tiny", "--device", "cpu"])
    assert report["errors"] == {"broken/first": "ZeroDivisionError: division by zero"}
    assert [row["case"] for row in report["rows"]] == ["broken/second"]
    assert "ZeroDivisionError" in capsys.readouterr().err
    late = script.main(["--tiny", "--device", "cpu", "--limit", "-1"])
    assert late["left_out"] == ["broken/first", "broken/second"]
    for selection in (["--only", "broken/second"], ["--without", "broken/first"]):
        selected = script.main([*selection, "--device", "cpu"])
        assert [row["case"] for row in selected["rows"]] == ["broken/second"]


@pytest.mark.parametrize("file", sorted(SCRIPT.parent.glob("*.py")), ids=lambda file: file.stem)
def test_every_benchmark_takes_a_device(file):
    if file.stem in ("timing", "compilation"):  # the latter counts graphs, and times nothing
        return
    calls = [node for node in ast.walk(ast.parse(file.read_text())) if isinstance(node, ast.Call)]
    words = {ast.unparse(call.func) for call in calls}
    assert "arguments" in words or any("'--device'" in ast.unparse(call) for call in calls)


def test_costs_of_a_benchmark(monkeypatch):
    monkeypatch.syspath_prepend(SCRIPT.parent)
    timing = importlib.import_module("timing")
    assert timing.arguments("a\nb").parse_args(["--device", "cpu"]).device == "cpu"
    assert timing.arguments("a\nb").parse_args([]).device == ("cuda" if torch.cuda.is_available() else "cpu")
    times = iter([3.0, 1.0, 2.0, 9.0])
    found = timing.median(lambda: next(times), 3, "cpu")
    assert found.device == "cpu"
    assert 0 <= found.seconds == found.cpu
    assert found.peak > 0.01
    result, slow = timing.measure(lambda: time.sleep(0.05) or 7, "cpu")
    assert (result, slow.cpu < 0.05 <= slow.wall) == (7, True)
    with timing.trainings_on("cpu"):
        assert not torch.accelerator.is_available()
