"""The examples and commands of the README run."""

import re
import shlex
from pathlib import Path

import pytest
import torch
import yaml

from conftest import words
from robustok.cli import VERBS
from robustok.config import load

README = (Path(__file__).parents[1] / "README.md").read_text()


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", README, flags=re.DOTALL | re.MULTILINE)


def test_the_python_example_runs(pipeline, tmp_path, monkeypatch):
    def settings(verb: str, *without: str) -> dict:
        given = [w for w in words(verb, pipeline, "out")[1:] if not w.startswith(without)]
        merged = load(VERBS[verb].load()[1], None, given if verb == "post-train" else [*given, "decoders.a=b"])
        return merged.model_dump(mode="json") | {"out": str(tmp_path / f"runs/{verb}")}

    (tmp_path / "runs").mkdir()
    for name in ("tokenizer", "generator"):
        (tmp_path / "runs" / name).symlink_to(pipeline / name)
    (tmp_path / "post.yaml").write_text(yaml.safe_dump(settings("post-train")))
    (tmp_path / "evaluate.yaml").write_text(yaml.safe_dump(settings("evaluate", "decoders") | {"decoders": {}}))
    monkeypatch.chdir(tmp_path)
    example, _ = blocks("python")
    namespace = {}
    exec(compile(example, "README.md", "exec"), namespace)

    assert namespace["tokens"].shape == namespace["samples"].shape == (8, 4)
    assert namespace["pixels"].shape == (8, 3, 16, 16)
    assert (namespace["wrong"] != namespace["tokens"]).sum(1).tolist() == [2] * 8  # half of four tokens
    assert namespace["better"] == tmp_path / "runs/post-train/snapshot/00000003"
    decoders = [m.details["decoder"] for m in namespace["found"] if m.metric == "gfid"]
    assert decoders == ["original", "post_trained"]


def test_the_perturbation_example_runs():
    torch.manual_seed(0)
    codebook = torch.nn.functional.normalize(torch.randn(256, 8), dim=1)
    features = torch.nn.functional.normalize(torch.randn(40, 16, 8), dim=2).requires_grad_()
    namespace = {"torch": torch, "features": features, "codebook": codebook}
    namespace["tokens"] = tokens = (features @ codebook.T).argmax(-1)
    exec(compile(blocks("python")[1], "README.md", "exec"), namespace)

    changed = (namespace["perturbed"] != tokens).sum(1)
    assert sorted(changed.tolist()) == [0] * 36 + [16] * 4  # a tenth of the images, every token of them
    torch.testing.assert_close(namespace["vectors"], codebook[namespace["perturbed"]])
    namespace["vectors"].sum().backward()
    assert (features.grad == 1).all()  # straight through


def commands() -> list[list[str]]:
    """The words after ``robustok`` of every command that the README shows."""
    text = "\n".join(blocks("sh")).replace("\\\n", " ")
    lines = [line.partition("#")[0] for line in text.splitlines()]
    found = [re.split(r"\brobustok\s", line, maxsplit=1)[1] for line in lines if re.search(r"\brobustok\s", line)]
    variables = {"$D": "data.name=cifar10", "$GUIDE": re.search(r'GUIDE="(.*)"', text)[1]}
    for name, value in variables.items():
        found = [line.replace(name, value) for line in found]
    return [shlex.split(line) for line in found]


def test_every_command_is_shown():
    assert {command[0] for command in commands()} == VERBS.keys() - {"demo"}


@pytest.mark.parametrize("command", commands(), ids=lambda command: command[0])
def test_every_command_has_valid_settings(command):
    verb, *rest = command
    file = rest[0] if rest[0].endswith(".yaml") else None
    load(VERBS[verb].load()[1], file, rest[1:] if file else rest)


def test_every_switch_of_the_tables_exists():
    from robustok.config import list_settings

    known = {s.key for verb in VERBS for s in list_settings(VERBS[verb].load()[1])}
    shown = re.findall(r"`(?:make-pairs )?([a-z_.]+)=[a-z_]+`", README.partition("## Where the paper")[2])
    assert len(shown) == 7
    assert set(shown) <= known


def test_the_readme_begins_with_the_two_commands():
    assert blocks("sh")[0].split()[:2] == ["make", "demo"]
    assert "\nmake test" in blocks("sh")[0]
    assert README.index("```sh") < 30
