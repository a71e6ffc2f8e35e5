"""The examples and commands of README.md, docs/commands.md and docs/python.md run."""

import re
import shlex
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import save_file

from conftest import words
from robustok.cli import COMMANDS, named
from robustok.config import load
from robustok.settings import list_settings

ROOT = Path(__file__).parents[1]
PAGES = {name: (ROOT / name).read_text() for name in ("README.md", "docs/commands.md", "docs/python.md")}
DATA = {"$D": "data.name=cifar10", "$GUIDE": "reconstruction.perceptual_weights=runs/guide"}


def blocks(page: str, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", PAGES[page], flags=re.DOTALL | re.MULTILINE)


def test_the_python_example_runs(pipeline, tmp_path, monkeypatch):
    def settings(command: str, *without: str) -> dict:
        given = [w for w in words(command, pipeline, "out")[1:] if not w.startswith(without)]
        given = given if command == "post-train" else [*given, "samples.decoders.a=b"]
        merged = load(COMMANDS[command].load()[1], None, given)
        return merged.model_dump(mode="json") | {"out": str(tmp_path / f"runs/{command}")}

    (tmp_path / "runs").mkdir()
    for name in ("tokenizer", "generator"):
        (tmp_path / "runs" / name).symlink_to(pipeline / name)
    (tmp_path / "post.yaml").write_text(yaml.safe_dump(settings("post-train")))
    evaluation = settings("evaluate", "samples.decoders")
    evaluation["samples"]["decoders"] = {}
    (tmp_path / "evaluate.yaml").write_text(yaml.safe_dump(evaluation))
    monkeypatch.chdir(tmp_path)
    example = {}
    exec(compile(blocks("docs/python.md", "python")[0], "docs/python.md", "exec"), example)

    assert example["tokens"].shape == example["samples"].shape == (8, 4)
    assert example["pixels"].shape == (8, 3, 16, 16)
    assert (example["wrong"] != example["tokens"]).sum(1).tolist() == [2] * 8  # half of four tokens
    assert example["better"] == tmp_path / "runs/post-train/snapshot/00000003"
    decoders = [m.details["decoder"] for m in example["found"] if m.metric == "gfid"]
    assert decoders == ["original", "post_trained"]


def test_the_perturbation_example_runs():
    torch.manual_seed(0)
    codebook = torch.nn.functional.normalize(torch.randn(256, 8), dim=1)
    features = torch.nn.functional.normalize(torch.randn(40, 16, 8), dim=2).requires_grad_()
    example = {"torch": torch, "features": features, "codebook": codebook}
    example["tokens"] = tokens = (features @ codebook.T).argmax(-1)
    exec(compile(blocks("docs/python.md", "python")[1], "docs/python.md", "exec"), example)

    images = (example["perturbed"] != tokens).sum(1)
    assert (images > 0).sum() == 4  # a tenth of the images
    torch.testing.assert_close(example["vectors"], codebook[example["perturbed"]])
    example["vectors"].sum().backward()
    assert (features.grad == 1).all()  # straight through


def commands() -> list[list[str]]:
    """The words after ``robustok`` of every command that the pages show."""
    text = "\n".join(block for page in PAGES for block in blocks(page, "sh")).replace("\\\n", " ")
    lines = [line.partition("#")[0] for line in text.splitlines()]
    found = [re.split(r"\brobustok\s", line, maxsplit=1)[1] for line in lines if re.search(r"\brobustok\s", line)]
    for name, value in DATA.items():
        found = [line.replace(name, value) for line in found]
    return [words for words in map(shlex.split, found) if words[0] in COMMANDS or words[0].islower()]


def test_every_command_is_shown():
    assert {command[0] for command in commands()} == COMMANDS.keys() - {"demo"}


@pytest.mark.parametrize("command", commands(), ids=lambda command: command[0])
def test_every_command_has_valid_settings(command):
    name, *rest = command
    rest = named(rest, COMMANDS[name].positional)
    file = rest[0] if rest[0].endswith(".yaml") else None
    load(COMMANDS[name].load()[1], file, rest[1:] if file else rest)


def test_every_setting_that_docs_paper_names_exists():
    known = {s.key for command in COMMANDS for s in list_settings(COMMANDS[command].load()[1])}
    shown = set(re.findall(r"`([a-z_.]+)=[a-z_]+`", (ROOT / "docs/paper.md").read_text()))
    assert len(shown) >= 8
    assert shown <= known


def test_links_between_the_pages_lead_somewhere():
    for page in (ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").rglob("*.md")):
        for target in re.findall(r"\]\((?!https?:)([^)#]+)", page.read_text()):
            assert (page.parent / target).exists(), f"{page.name} links to {target}"


def test_the_lines_that_wrap_an_exported_file_make_what_the_authors_read(tmp_path, monkeypatch):
    """Their loader takes ``model``, else ``ema``."""
    lines = re.findall(
        r"^```python\n(.*?)^```", (ROOT / "docs/imagenet.md").read_text(), flags=re.DOTALL | re.MULTILINE
    )
    monkeypatch.chdir(tmp_path)
    save_file({"decoder.mask_token": torch.ones(2)}, "post-train.safetensors")
    exec(lines[-1])
    found = torch.load("post-train.pt", weights_only=True)
    assert torch.equal(found["model"]["decoder.mask_token"], found["ema"]["decoder.mask_token"])
