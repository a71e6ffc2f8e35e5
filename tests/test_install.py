"""What users install: the sdist and the wheel made from it, without a checkout, and the types that they see."""

import ast
import os
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

import robustok

REPOSITORY = Path(__file__).parents[1]
CONFIGS = {str(file.relative_to(REPOSITORY)) for file in (REPOSITORY / "configs").rglob("*.yaml")}


def run(*words, cwd, **variables):
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"} | variables
    done = subprocess.run([sys.executable, *map(str, words)], cwd=cwd, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """The folder with the sdist and the wheel."""
    for package in ("build", "hatchling"):
        pytest.importorskip(package)
    out = tmp_path_factory.mktemp("dist")
    run("-m", "build", "--no-isolation", "--outdir", out, REPOSITORY, cwd=out)
    return out


@pytest.fixture(scope="module")
def installed(built, tmp_path_factory):
    """A function that runs the installed command in an empty folder; nothing is taken from a package index."""
    target, here = tmp_path_factory.mktemp("site"), tmp_path_factory.mktemp("here")
    (wheel,) = built.glob("*.whl")
    run("-m", "pip", "install", "--quiet", "--no-deps", "--no-index", "--target", target, wheel, cwd=here)

    def call(*words):
        return run("-m", "robustok", *words, cwd=here, PYTHONPATH=str(target))

    call.folder, call.site = here, target
    return call


def test_sdist_and_wheel_hold_what_they_need_and_nothing_else(built):
    (wheel,), (sdist,) = built.glob("*.whl"), built.glob("*.tar.gz")
    with zipfile.ZipFile(wheel) as file:
        names = {name for name in file.namelist() if ".dist-info/" not in name}
        licence = [name for name in file.namelist() if name.endswith("/LICENSE")]
    assert all(name.startswith("robustok/") for name in names)
    assert {f"robustok/{name}" for name in CONFIGS} <= names
    assert {"robustok/py.typed", "robustok/__init__.pyi", "robustok/report/templates/page.html"} <= names
    assert licence
    with tarfile.open(sdist) as file:
        inside = {name.partition("/")[2] for name in file.getnames()}
    assert CONFIGS | {"src/robustok/cli.py", "tests/test_install.py", "README.md", "LICENSE"} <= inside
    assert not [name for name in inside if name.startswith(("runs/", ".venv")) or name.endswith(".safetensors")]


def test_the_installed_command_finds_its_recipes_and_runs(installed):
    code = "import robustok; print(robustok.__file__)"
    assert run("-c", code, cwd=installed.folder, PYTHONPATH=str(installed.site)).startswith(str(installed.site))
    assert "robustok demo --full" in " ".join(installed("demo", "--help-all").split())
    words = ("data.name=digits", "data.limit=64", "classifier.steps=2", "out=one")
    assert "accuracy: " in installed("train-classifier", "demo/classifier.yaml", *words)
    with (installed.folder / "one" / "metrics.jsonl").open("w") as file:
        file.write('{"metric": "rfid", "value": 1.5}\n')
    assert installed("report", "path=one").strip() == "one/report.html"
    assert "1.500" in (installed.folder / "one" / "report.html").read_text()


def test_type_checkers_see_all_public_names():
    stub = ast.parse((REPOSITORY / "src" / "robustok" / "__init__.pyi").read_text())
    found, listed = {}, set()
    for node in stub.body:
        if isinstance(node, ast.ImportFrom):
            found |= {name.asname or name.name: f"{node.module}:{name.name}" for name in node.names}
        if isinstance(node, ast.Assign):
            listed = set(ast.literal_eval(node.value))
    sources = robustok._SOURCES.items()
    assert found == {name: source if ":" in source else f"{source}:{name}" for name, source in sources}
    assert listed == set(robustok.__all__)
