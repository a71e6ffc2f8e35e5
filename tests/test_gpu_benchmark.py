"""The script that measures a GPU runs from end to end on the CPU, at toy sizes."""

import importlib.util
import json
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[1] / "benchmarks" / "gpu.py"
TWICE = (  # what goes through the same code as another case
    "training/rar-l",
    "training/released",
    "training/rar-b/compiled",
    "training/post/compiled",
    "training/tokenizer/compiled",
    "training/tokenizer/in-2-parts",
    "sampler/rar-l",
    "sampler/rar-b/bf16-autocast",
    "inception/tf32",
    "inception/bf16-NCHW",
    "inception/float32-NHWC",
    "lpips/bf16-channels",
    "lpips/tf32",
    "lpips/float32",
    "fid/moments",
    "fid/decode-and-describe@64",
)


@pytest.fixture(scope="module")
def script():
    for package in ("lpips", "torch_fidelity"):
        pytest.importorskip(package)
    spec = importlib.util.spec_from_file_location("gpu_benchmark", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_every_part_runs(script, tmp_path, capsys):
    words = ["--tiny", "--device", "cpu", "--without", ",".join(TWICE), "--out", str(tmp_path / "report.json")]
    report = script.main(words)
    assert report["errors"] == {}
    assert json.loads((tmp_path / "report.json").read_text())["rows"] == report["rows"]
    assert {row["case"].split("/")[0] for row in report["rows"]} == set(script.PARTS)
    assert all(row["MFU"] > 0 for row in report["rows"] if row["case"].startswith("training/"))
    assert "sampler/rar-b/float32@2" in capsys.readouterr().out


def test_a_failing_case_does_not_lose_the_others(script, tmp_path, capsys, monkeypatch):
    def broken(bench):
        yield "first", lambda: 1 / 0
        yield "second", lambda: {"value": 2.0}

    monkeypatch.setattr(script, "PARTS", {"broken": broken})
    report = script.main(["--tiny", "--device", "cpu"])
    assert report["errors"] == {"broken/first": "ZeroDivisionError: division by zero"}
    assert [row["case"] for row in report["rows"]] == ["broken/second"]
    assert "ZeroDivisionError" in capsys.readouterr().err
    assert script.main(["--tiny", "--device", "cpu", "--limit", "-1"])["left_out"] == ["broken/first", "broken/second"]
    assert [row["case"] for row in script.main(["--only", "broken/second", "--device", "cpu"])["rows"]] == [
        "broken/second"
    ]
