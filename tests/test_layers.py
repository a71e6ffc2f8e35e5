"""The layers of the design: imports point down, and what belongs in one place stays there."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

SOURCE = Path(__file__).parents[1] / "src"

# From the bottom up. A module may import from its own layer and from those below, and imports make no circle.
LAYERS = (
    {
        "types",
        "errors",
        "config",
        "randomness",
        "files",
        "hub",
        "devices",
        "precision",
        "console",
        "settings",
        "yaml_text",
        "environment",
    },
    {"data", "snapshots", "model_card", "checkpoints", "backbones", "states", "runs"},
    {"metrics", "tokenizers", "generators"},
    {"pretrained", "losses"},
    {"training", "evaluation", "report"},
    {"commands"},
    {"cli", "__init__"},
    {"__main__"},
)
# Packages of one layer that know nothing of each other, with what they may import from a sibling all the same.
APART = {
    "metrics": {"tokenizers.perturbation"},
    "tokenizers": set(),
    "generators": set(),
    "pretrained": set(),
    "losses": set(),
    "evaluation": set(),
    "report": set(),
}
WITH_PROCESSES = {"devices", "commands", "training"}  # may import accelerate
WITHOUT_TORCH = {"report", "cli", "errors", "__init__", "__main__"}
HEAVY = {"torch", "torchvision", "timm", "accelerate"}
OPTIONAL = {
    "lpips",
    "torch_fidelity",
    "diffusers",
    "sklearn",
    "pyarrow",
    "tensorboard",
    "gradio",
}  # imported where they are used


def problems(source: Path) -> list[str]:
    """All violations in the package ``robustok`` beneath ``source``."""
    found, graph = [], {}
    for file in sorted((source / "robustok").rglob("*.py")):
        parts = file.relative_to(source / "robustok").with_suffix("").parts
        tree = ast.parse(file.read_text())
        found += [f"{'/'.join(parts)}: {problem}" for problem in module_problems(parts, tree)]
        module = ".".join(parts).removesuffix(".__init__")
        own = (target for target, _ in imports(tree) if target.startswith("robustok."))
        graph[module] = {target.removeprefix("robustok.") for target in own}
    edges = {
        m: {known for t in targets if (known := longest(t, graph)) not in (None, m)} for m, targets in graph.items()
    }
    return found + [f"{' -> '.join(circle)}: a circle of imports" for circle in circles(edges)]


def module_problems(parts: tuple[str, ...], tree: ast.Module) -> Iterator[str]:
    package = parts[0]
    if not any(package in layer for layer in LAYERS):
        yield "is in no layer; name it in LAYERS"
        return
    for target, top in imports(tree):
        library, *inner = target.split(".")
        if library == "":
            yield "imports relatively; write robustok.MODULE"
        if library == "robustok":
            yield from own_problems(package, target, inner, top)
        if package in WITHOUT_TORCH and library in HEAVY:
            yield f"imports {target}; it has to start without"
        if library == "accelerate" and package not in WITH_PROCESSES | WITHOUT_TORCH:
            yield "imports accelerate; use robustok.devices"
        if library in OPTIONAL and top:
            yield f"imports {target} at the top; import it where it is used"
    for node in ast.walk(tree):
        if isinstance(node, ast.Name) and node.id == "TYPE_CHECKING":
            yield "imports for type checkers only, which hides a circle; move what both need below both"
        if isinstance(node, ast.Call) and ast.unparse(node.func) == "Image.open":
            given = {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords}
            if given.get("formats") != "IMAGE_FORMATS":
                yield "opens images of any format, some by other programs; pass formats=IMAGE_FORMATS"
    if parts != ("data", "pixels"):
        yield from crossings(tree)


def own_problems(package: str, target: str, inner: list[str], top: bool) -> Iterator[str]:
    """What is wrong with importing ``target``, which is of this library."""
    other = inner[0] if inner else "__init__"
    if other == "__init__" or layer_of(other) > layer_of(package):
        yield f"imports {target}, which is of a higher layer"
    elif other != package and other in APART and package in APART and layer_of(other) == layer_of(package):
        if not any(".".join(inner).startswith(allowed) for allowed in APART[package]):
            yield f"imports {target}; {package} and {other} know nothing of each other"
    elif package == "report" and other not in ("report", "errors", "config", "files", "console"):
        yield f"imports {target}; a report reads files"
    if package in ("cli", "__init__") and top:
        yield f"imports {target} at the top; that would make help and `import robustok` slow"
    if any(part.startswith("_") for part in inner):
        yield f"imports the private {target}"


def layer_of(package: str) -> int:
    return next((i for i, layer in enumerate(LAYERS) if package in layer), len(LAYERS))


def imports(tree: ast.Module) -> Iterator[tuple[str, bool]]:
    """Every imported name as (dotted target, whether it is imported with the module)."""
    late = {
        child
        for node in ast.walk(tree)
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
        for child in ast.walk(node)
    }
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((alias.name, node not in late) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            prefix = "." * node.level + (node.module or "")
            # `from robustok import data` imports a module, `from robustok.data.pixels import to_pixels` a name of one.
            yield from ((f"{prefix}.{alias.name}", node not in late) for alias in node.names)


def longest(target: str, modules: dict[str, set[str]]) -> str | None:
    """The module that an imported dotted name belongs to."""
    parts = target.split(".")
    names = (".".join(parts[:end]) for end in range(len(parts), 0, -1))
    return next((name for name in names if name in modules), None)


def circles(edges: dict[str, set[str]]) -> list[list[str]]:
    """One circle of imports from each module that is on one and comes first in it by name."""
    found = []
    for start in sorted(edges):
        paths, seen = [[start]], {start}
        while paths:
            path = paths.pop(0)
            if start in edges[path[-1]] and start == min(path):
                found.append([*path, start])
                break
            for follower in sorted(edges[path[-1]] - seen):
                seen.add(follower)
                paths.append([*path, follower])
    return found


def crossings(tree: ast.Module) -> Iterator[str]:
    """Changes of value range between uint8 pixels and images in [-1, 1], which data/pixels.py alone makes."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and node.value == 127.5:
            yield "computes with 127.5; use data.pixels.to_pixels or from_pixels"
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
            to_uint8 = node.func.attr == "to" and "torch.uint8" in [ast.unparse(a) for a in node.args]
            if to_uint8 or node.func.attr == "byte":
                yield "rounds to torch.uint8; use data.pixels.to_pixels"


def test_imports_point_down():
    assert problems(SOURCE) == []


CLEAN = {
    "__init__.py": "def __getattr__(name):\n    from robustok.errors import UserError\n    return UserError",
    "__main__.py": "from robustok.cli import main",
    "cli.py": "import typer\ndef run():\n    from robustok.commands.evaluate import evaluate",
    "config.py": "from robustok.errors import UserError",
    "errors.py": "",
    "types.py": "import torch\nfrom robustok.config import Config",
    "commands/evaluate.py": "import accelerate\nfrom robustok.training.common import learning_rate",
    "training/common.py": "import accelerate\nfrom robustok.tokenizers import load_tokenizer",
    "tokenizers/__init__.py": "from robustok.tokenizers.vq import VQ",
    "tokenizers/vq.py": "from robustok.errors import UserError",
    "metrics/pfid.py": "from robustok.tokenizers.perturbation import perturb",
    "report/page.py": "from robustok.errors import UserError\nfrom robustok.report.figures import curve",
    "report/figures.py": "",
    "data/pixels.py": "def from_pixels(pixels):\n    return pixels.float() / 127.5 - 1",
}


def build(folder: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        file = folder / "robustok" / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)
    return folder


def test_a_clean_tree_passes(tmp_path):
    assert problems(build(tmp_path, CLEAN)) == []


@pytest.mark.parametrize(
    ("file", "text", "message"),
    [
        ("tokenizers/vit.py", "from robustok.training.common import learning_rate", "higher layer"),
        ("tokenizers/vit.py", "def f():\n    from robustok.training.common import learning_rate", "higher layer"),
        ("tokenizers/vit.py", "from robustok.pretrained.load import load_pretrained", "higher layer"),
        ("tokenizers/vit.py", "import robustok.generators.rar", "know nothing of each other"),
        ("randomness.py", "from robustok.data.pixels import from_pixels", "higher layer"),
        ("training/loop.py", "from robustok.commands.evaluate import evaluate", "higher layer"),
        ("training/loop.py", "import robustok.cli", "higher layer"),
        ("commands/encode.py", "from robustok import load_tokenizer", "higher layer"),
        ("metrics/gap.py", "from robustok.tokenizers import load_tokenizer", "know nothing of each other"),
        ("metrics/gap.py", "import robustok.generators.rar", "know nothing of each other"),
        ("metrics/gap.py", "from accelerate import Accelerator", "accelerate"),
        ("data/loader.py", "import accelerate", "accelerate"),
        ("losses/terms.py", "from robustok.pretrained.load import load", "know nothing of each other"),
        ("report/curves.py", "import torch.nn", "imports torch.nn"),
        ("report/curves.py", "from robustok.data.pixels import to_pixels", "reads files"),
        ("cli.py", "from robustok.errors import UserError", "at the top"),
        ("cli.py", "def f():\n    import torch", "imports torch"),
        ("__init__.py", "from robustok.tokenizers import load_tokenizer", "at the top"),
        ("losses/terms.py", "import lpips", "where it is used"),
        ("losses/terms.py", "from .pixels import to_pixels", "relatively"),
        ("losses/terms.py", "from robustok.data.pixels import _round", "private"),
        ("losses/terms.py", "def f(x):\n    return x.to(torch.uint8)", "to_pixels"),
        ("losses/terms.py", "def f(x):\n    return x.byte()", "to_pixels"),
        ("losses/terms.py", "def f(x):\n    return x / 127.5 - 1", "from_pixels"),
        ("losses/terms.py", "from typing import Any\nif TYPE_CHECKING:\n    pass", "hides a circle"),
        ("data/folders.py", "from PIL import Image\nImage.open(file)", "IMAGE_FORMATS"),
        ("report/curves.py", "from PIL import Image\nImage.open(file, formats=None)", "IMAGE_FORMATS"),
        ("tokenizers/vq.py", "from robustok.tokenizers import load_tokenizer", "a circle of imports"),
        ("helpers.py", "", "in no layer"),
    ],
)
def test_a_planted_violation_is_found(tmp_path, file, text, message):
    found = problems(build(tmp_path, CLEAN | {file: text}))
    assert len(found) == 1, found
    assert message in found[0]
