"""The recipes of CONTRIBUTING.md, followed in a copy of the repository: as written, they have to work."""

import ast
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
TEXT = (ROOT / "CONTRIBUTING.md").read_text()
SECTIONS = dict(re.findall(r"^## Add an? (.*?)\n(.*?)(?=^## |\Z)", TEXT, flags=re.MULTILINE | re.DOTALL))


def blocks(section: str, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", SECTIONS[section], flags=re.DOTALL | re.MULTILINE)


def write(root: Path, block: str) -> None:
    """Write the file that the first line of a block names, or add the block to it."""
    name, code = block.split("\n", 1)
    file = root / name.removeprefix("# ")
    text = add(file.read_text(), code) if file.exists() else code
    file.write_text(text)


def add(text: str, code: str) -> str:
    """Add imports, entries of dictionaries, members of unions, and, before these, classes and functions."""
    waiting = []
    for node in ast.parse(code).body:
        found = assignment(text, node.targets[0].id) if isinstance(node, ast.Assign) else None
        if isinstance(node, ast.Import | ast.ImportFrom):
            first = next(n for n in ast.parse(text).body if isinstance(n, ast.Import | ast.ImportFrom))
            text = insert(text, first.lineno, 0, ast.unparse(node) + "\n")
        elif found is None:
            waiting.append(ast.get_source_segment(code, node) + "\n\n\n")
        else:
            value = found.value
            if isinstance(value, ast.Dict):
                last = value.values[-1]
                entries = ", ".join(
                    f"{ast.unparse(k)}: {ast.unparse(v)}"
                    for k, v in zip(node.value.keys, node.value.values, strict=True)
                )
                text = insert(text, last.end_lineno, last.end_col_offset, f", {entries}")
            else:  # Annotated[A | B, ...]
                last, new = value.slice.elts[0], node.value.slice.elts[0].right
                text = insert(text, last.end_lineno, last.end_col_offset, f" | {ast.unparse(new)}")
            text = insert(text, found.lineno, 0, "".join(waiting))
            waiting = []
    return text + "\n\n" + "".join(waiting) if waiting else text


def assignment(text: str, name: str) -> ast.Assign | ast.AnnAssign | None:
    """The statement at the top level that gives this name a value."""
    for node in ast.parse(text).body:
        targets = node.targets if isinstance(node, ast.Assign) else [getattr(node, "target", None)]
        if any(isinstance(target, ast.Name) and target.id == name for target in targets):
            return node
    return None


def insert(text: str, line: int, column: int, addition: str) -> str:
    """Insert at a line, from 1, and a column, from 0, in bytes."""
    lines = text.splitlines(keepends=True)
    row = lines[line - 1].encode()
    lines[line - 1] = (row[:column] + addition.encode() + row[column:]).decode()
    return "".join(lines)


@pytest.mark.parametrize("section", ["tokenizer", "generator", "metric", "data set"])
def test_a_recipe_works_as_written(section, tmp_path):
    for name in ("src", "tests", "configs"):
        shutil.copytree(ROOT / name, tmp_path / name, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    for block in blocks(section, "python"):
        write(tmp_path, block)
    (command,) = blocks(section, "sh")
    done = subprocess.run(
        [sys.executable, "-m", *shlex.split(command)],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(tmp_path / "src")},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
    assert " passed" in done.stdout


def test_every_kind_of_addition_is_described():
    assert SECTIONS.keys() == {"tokenizer", "generator", "metric", "data set"}


def test_the_architecture_names_what_exists():
    rows = re.findall(r"\| `(\S+\.py)` \| `(\w+)` \|$", (ROOT / "docs" / "architecture.md").read_text(), re.MULTILINE)
    assert len(rows) > 25
    for file, name in rows:
        text = (ROOT / "src" / "robustok" / file).read_text()
        assert re.search(rf"^(def|class) {name}\b", text, re.MULTILINE), f"{file} has no {name}"
