"""The site of `make docs` has no broken link, the reference lists all public names, and shown commands are valid."""

import re
import shlex
import shutil
from pathlib import Path

import pytest

import robustok
from robustok.cli import COMMANDS
from robustok.config import load

ROOT = Path(__file__).parents[1]


def build(site: Path, **settings) -> None:
    """Build the site; raises ``mkdocs.exceptions.Abort`` where there is any warning."""
    from mkdocs.commands.build import build
    from mkdocs.config import load_config

    config = load_config(str(ROOT / "mkdocs.yml"), site_dir=str(site), strict=True, **settings)
    config.plugins.on_startup(command="build", dirty=False)
    build(config)


def test_the_site_is_built_without_a_warning(tmp_path):
    pytest.importorskip("mkdocs", reason="needs the extra docs")
    build(tmp_path)
    reference = (tmp_path / "reference" / "index.html").read_text()
    assert 'id="robustok.commands.post_train.post_train"' in reference
    assert "train_tokenizer" in (tmp_path / "tutorial" / "index.html").read_text()
    pages = "".join(path.read_text() for path in tmp_path.rglob("*.html"))
    assert not re.findall(r'<(?:script|img|link)[^>]*(?:src|href)="(?:https?:)?//', pages)  # nothing from other servers


@pytest.mark.parametrize("link", ["nowhere.md", "commands.md#nowhere", "../NOWHERE.md"])
def test_a_broken_link_is_an_error(link, tmp_path, caplog):
    exceptions = pytest.importorskip("mkdocs.exceptions", reason="needs the extra docs")
    for name in ("docs", "README.md", "CONTRIBUTING.md", "CHANGELOG.md", "LICENSE", "CITATION.cff", "Dockerfile"):
        copy = shutil.copytree if name == "docs" else shutil.copy
        copy(ROOT / name, tmp_path / name)
    with (tmp_path / "docs" / "faq.md").open("a") as file:
        file.write(f"[broken]({link})\n")
    with pytest.raises(exceptions.Abort):
        build(tmp_path / "site", docs_dir=str(tmp_path / "docs"), plugins=[])
    warnings = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    assert len(warnings) == 1
    assert Path(link).name in warnings[0]


def test_the_reference_has_every_public_name():
    listed = re.findall(r"^::: robustok\.([\w.]+)$", (ROOT / "docs" / "reference.md").read_text(), re.MULTILINE)
    public = [getattr(robustok, name) for name in robustok.__all__ if name != "__version__"]
    shown = [name.rpartition(".") for name in listed]
    found = [getattr(__import__(f"robustok.{module}", fromlist=[name]), name) for module, _, name in shown]
    assert [thing for thing in public if not any(thing is other for other in found)] == []
    assert len(found) == len(public) + 3  # and three protocols


def commands() -> list[str]:
    """What recipes.md and faq.md show, with settings."""
    text = "".join((ROOT / "docs" / name).read_text() for name in ("recipes.md", "faq.md")).replace("\\\n", " ")
    blocks = "\n".join(re.findall(r"^```sh\n(.*?)^```", text, flags=re.DOTALL | re.MULTILINE)).splitlines()
    return [line for line in [*blocks, *re.findall(r"`(robustok [^`\n]*)`", text)] if "=" in line]


@pytest.mark.parametrize("line", commands())
def test_every_command_has_valid_settings(line):
    _, command, *words = shlex.split(line.replace("$D", "data.name=folder data.path=photos"))
    files = [word for word in words if word.endswith(".yaml")]
    load(COMMANDS[command].load()[1], files, words[len(files) :], command=command)


def test_there_are_commands():
    assert len(commands()) > 15
