"""The tutorial's notebook runs, a few steps of each training, and is stored without outputs."""

import json
from pathlib import Path

import matplotlib
import pytest

NOTEBOOK = json.loads((Path(__file__).parents[1] / "docs" / "tutorial.ipynb").read_text())
CELLS = [("".join(cell["source"]), cell) for cell in NOTEBOOK["cells"] if cell["cell_type"] == "code"]


def test_the_tutorial_runs(tmp_path, monkeypatch, capsys):
    matplotlib.use("agg")
    monkeypatch.chdir(tmp_path)
    names = {"__name__": "__main__"}
    first = CELLS[0][0].replace("SIZE = 1.0", "SIZE = 0.005")
    assert first != CELLS[0][0]
    for i, code in enumerate([first, *(code for code, _ in CELLS[1:])]):
        exec(compile(code, f"docs/tutorial.ipynb, code cell {i}", "exec"), names)
    assert list(names["distances"]) == ["original", "clean", "paired", "free"]
    assert all(value > 0 for value in names["distances"].values())
    printed = capsys.readouterr().out
    assert printed.count(" from original") == 3
    assert printed.count(" from clean") == 2
    assert names["change"].shape == (96, 3, 16, 16)
    assert (names["after"] != names["before"]).any()
    assert {path.name for path in tmp_path.iterdir()} == {"runs"}


@pytest.mark.parametrize(("code", "cell"), CELLS)
def test_no_output_is_stored(code, cell):
    assert cell["outputs"] == []
    assert cell["execution_count"] is None
