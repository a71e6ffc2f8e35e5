"""For `make docs`: files that lie beside docs/ and the tutorial's notebook become pages of the site."""

import json
import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

BESIDE = {"README.md": "index.md", "CONTRIBUTING.md": "contributing.md", "CHANGELOG.md": "changelog.md"}
BESIDE |= {name: name for name in ("LICENSE", "CITATION.cff", "Dockerfile")}
LINK = re.compile(r"(?<=\]\()(?:\.\./|docs/)([^)#\s]+)|(?<=\]\()(" + "|".join(map(re.escape, BESIDE)) + ")")


def on_files(files: Files, config: Any) -> Files:
    """Add these pages."""
    docs = Path(config.docs_dir)
    for name, target in BESIDE.items():
        files.append(File.generated(config, target, abs_src_path=str(docs.parent / name)))
    cells = json.loads((docs / "tutorial.ipynb").read_text())["cells"]
    texts = [("".join(cell["source"]), cell["cell_type"] == "code") for cell in cells]
    page = "\n\n".join(f"```python\n{text}\n```" if code else text for text, code in texts)
    page += "\n\nThis page is [a notebook](tutorial.ipynb)."
    files.append(File.generated(config, "tutorial.md", content=page))
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Turn links between files of the repository into links between pages of the site."""

    def target(found: re.Match) -> str:
        path = found[1] or found[2]
        return "results/README.md" if path == "results" else BESIDE.get(path, path)

    return LINK.sub(target, markdown) if "/" not in page.file.src_uri else markdown
