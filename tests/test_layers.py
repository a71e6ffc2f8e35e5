"""The plan of the house, enforced: imports point down, and what belongs in one place stays there."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

SOURCE = Path(__file__).parents[1] / "src"

# From the bottom up; a module may import from its own floor and from those beneath it.
FLOORS = (
    {"types"},
    {"config"},
    {"images", "sources", "latents", "snapshots", "checkpoints", "classifier", "discriminators", "losses", "semantics"}
    | {"backbones", "released", "diffusers_folders", "model_card"}
    | {"tokenizers", "generators", "metrics", "arrays", "crops"},  # the nouns
    {"training"},
    {"encode", "generate", "evaluate", "judging", "report", "train_classifier", "convert", "pictures", "side_by_side"}
    | {"image_files", "make_delta", "post_train", "choose_sigma", "from_release"},  # verbs
    {"demo", "estimate"},  # what uses all verbs
    {"cli", "__init__"},
    {"__main__"},
)
OPTIONAL = {"lpips", "torch_fidelity", "diffusers", "sklearn", "pyarrow", "tensorboard"}  # imported where they are used


def problems(source: Path) -> list[str]:
    """All violations in the package ``robustok`` beneath ``source``."""
    found = []
    for file in sorted((source / "robustok").rglob("*.py")):
        parts = file.relative_to(source / "robustok").with_suffix("").parts
        tree = ast.parse(file.read_text())
        found += [f"{'/'.join(parts)}: {problem}" for problem in module_problems(parts, tree)]
    return found


def module_problems(parts: tuple[str, ...], tree: ast.Module) -> Iterator[str]:
    room = parts[0]
    if not any(room in floor for floor in FLOORS):
        yield "stands on no floor; give it one in FLOORS"
        return
    floor = floor_of(room)
    for target, top in imports(tree):
        library, *inner = target.split(".")
        if library == "":
            yield "imports relatively; write robustok.MODULE"
        if library == "robustok":
            inner_room = inner[0] if inner else "__init__"
            if not (inner_room != "__init__" and floor_of(inner_room) <= floor):
                yield f"imports {target}, which stands on a higher floor"
            if room == "metrics" and inner_room in ("tokenizers", "generators") and inner[1:2] != ["perturbation"]:
                yield f"imports {target}; a metric knows no model"
            if room == "report" and inner_room not in ("report", "types", "config"):
                yield f"imports {target}; a report reads files"
            if room in ("cli", "__init__") and top:
                yield f"imports {target} at the top; that would make help and `import robustok` slow"
            if any(part.startswith("_") for part in inner):
                yield f"imports the private {target}"
        if room in ("report", "cli", "__init__", "__main__") and library in (
            "torch",
            "torchvision",
            "timm",
            "accelerate",
        ):
            yield f"imports {target}"
        if library == "accelerate" and floor < floor_of("training"):
            yield "imports accelerate; only verbs and training know of processes"
        if library in OPTIONAL and top:
            yield f"imports {target} at the top; import it where it is used"
    if room != "images":
        yield from crossings(tree)


def floor_of(room: str) -> int:
    return next((i for i, floor in enumerate(FLOORS) if room in floor), len(FLOORS))


def imports(tree: ast.Module) -> Iterator[tuple[str, bool]]:
    """Every imported name as (dotted target, whether it is imported with the module). Type checkers' do not count."""
    ignored = {
        child
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)
        for child in ast.walk(node)
    }
    late = {
        child
        for node in ast.walk(tree)
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
        for child in ast.walk(node)
    }
    for node in ast.walk(tree):
        if node in ignored:
            continue
        if isinstance(node, ast.Import):
            yield from ((alias.name, node not in late) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            prefix = "." * node.level + (node.module or "")
            # `from robustok import images` imports a module, `from robustok.images import to_pixels` a name of one.
            names = [f"{prefix}.{alias.name}" for alias in node.names]
            yield from ((name, node not in late) for name in names)


def crossings(tree: ast.Module) -> Iterator[str]:
    """Changes of value range between uint8 pixels and images in [-1, 1], which are the business of images.py."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and node.value == 127.5:
            yield "computes with 127.5; use images.to_pixels or from_pixels"
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
            to_uint8 = node.func.attr == "to" and "torch.uint8" in [ast.unparse(a) for a in node.args]
            if to_uint8 or node.func.attr == "byte":
                yield "rounds to torch.uint8; use images.to_pixels"


def test_the_house_stands():
    assert problems(SOURCE) == []


CLEAN = {
    "__init__.py": "def __getattr__(name):\n    from robustok.types import UserError\n    return UserError",
    "__main__.py": "from robustok.cli import main",
    "cli.py": "import typer\ndef run():\n    from robustok.evaluate import evaluate",
    "demo.py": "from robustok.evaluate import evaluate",
    "evaluate.py": "import accelerate\nfrom robustok.training.loop import track",
    "training/loop.py": "import accelerate\nfrom robustok.tokenizers import load_tokenizer",
    "tokenizers/__init__.py": "from robustok.types import UserError",
    "metrics/perturbed.py": "from robustok.tokenizers.perturbation import perturb",
    "report/page.py": "from robustok.types import UserError\nfrom robustok.report.plot import curve",
    "images.py": "def from_pixels(pixels):\n    return pixels.float() / 127.5 - 1",
    "types.py": "import torch\nif TYPE_CHECKING:\n    from robustok.generators.sampling import Sampling",
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
    ("file", "text", "said"),
    [
        ("tokenizers/vit.py", "from robustok.training.loop import track", "higher floor"),
        ("tokenizers/vit.py", "def f():\n    from robustok.training.main_training import main_train", "higher floor"),
        ("types.py", "from robustok.config import Config", "higher floor"),
        ("training/loop.py", "from robustok.evaluate import evaluate", "higher floor"),
        ("training/loop.py", "import robustok.cli", "higher floor"),
        ("evaluate.py", "from robustok import load_tokenizer", "higher floor"),
        ("evaluate.py", "from robustok.demo import demo", "higher floor"),
        ("metrics/gap.py", "from robustok.tokenizers import load_tokenizer", "knows no model"),
        ("metrics/gap.py", "import robustok.generators.rar", "knows no model"),
        ("metrics/gap.py", "from accelerate import Accelerator", "accelerate"),
        ("latents.py", "import accelerate", "accelerate"),
        ("report/plot.py", "import torch.nn", "imports torch.nn"),
        ("report/plot.py", "from robustok.images import to_pixels", "reads files"),
        ("cli.py", "from robustok.types import UserError", "at the top"),
        ("cli.py", "def f():\n    import torch", "imports torch"),
        ("__init__.py", "from robustok.tokenizers import load_tokenizer", "at the top"),
        ("losses.py", "import lpips", "where it is used"),
        ("losses.py", "from .images import to_pixels", "relatively"),
        ("losses.py", "from robustok.images import _shuffle", "private"),
        ("losses.py", "def f(x):\n    return x.to(torch.uint8)", "to_pixels"),
        ("losses.py", "def f(x):\n    return x.byte()", "to_pixels"),
        ("losses.py", "def f(x):\n    return x / 127.5 - 1", "from_pixels"),
        ("kitchen.py", "", "no floor"),
    ],
)
def test_a_planted_violation_is_found(tmp_path, file, text, said):
    found = problems(build(tmp_path, CLEAN | {file: text}))
    assert len(found) == 1, found
    assert found[0].startswith(file.removesuffix(".py"))
    assert said in found[0]
