"""What may import what: imports point down, losses are pure functions, one module loads vision networks."""

import ast
import sys
from collections.abc import Iterator
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "dae_diffusers"
MAPPED = (ROOT / "training", ROOT / "pipelines")  # installed as parts of the package
LOSSES = sorted(PACKAGE.glob("losses/*.py"))
READERS_OF_FLAGS = ("comparison", "search")  # they check flags of the scripts that they start


def imports_of(path: Path) -> Iterator[str]:
    """`module.name` of everything that a file imports, anywhere in it."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def parts_with_imports() -> Iterator[tuple[str, set[str]]]:
    """Each file's part of the package, such as `losses`, and `part.module.name` of all that it imports from other parts."""
    for root in (PACKAGE, *MAPPED):
        for path in root.rglob("*.py"):
            part = root.name if root in MAPPED else path.relative_to(root).parts[0].removesuffix(".py")
            names = {name.partition(".")[2] for name in imports_of(path) if name.startswith("dae_diffusers.")}
            yield part, {name for name in names if name.split(".")[0] != part}


def test_no_two_parts_of_the_library_want_each_other():
    wanted: dict[str, set[str]] = {}
    for part, names in parts_with_imports():
        others = {name.split(".")[0] for name in names} - ({"training"} if part in READERS_OF_FLAGS else set())
        wanted.setdefault(part, set()).update(others)
    assert {"losses", "pipelines", "training"} <= wanted.keys()
    list(TopologicalSorter(wanted).static_order())  # raises CycleError with the parts of a circle


def test_nothing_imports_a_script_or_the_command():
    imports = [(part, *name.split(".")) for part, names in parts_with_imports() for name in names]
    above = {(part, *name[:2]) for part, *name in imports if name[0] in ("training", "console")}
    assert above == {(part, "training", "settings") for part in ("console", *READERS_OF_FLAGS)}


def test_pipelines_import_nothing_of_ours_but_each_other():
    assert not any(names for part, names in parts_with_imports() if part == "pipelines")


@pytest.mark.parametrize("path", LOSSES, ids=lambda path: path.stem)
def test_losses_are_functions_of_tensors(path):
    parts = {".".join(name.split(".")[:2]) for name in imports_of(path)}
    foreign = {part for part in parts if part.split(".")[0] not in {"torch", *sys.stdlib_module_names}}
    assert foreign <= {"dae_diffusers.losses", "diffusers.models", "diffusers.training_utils"}
    bases = [
        ast.unparse(base)
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.ClassDef)
        for base in node.bases
    ]
    assert not bases  # no module with weights


def test_one_module_loads_vision_networks():
    loaders = ("transformers.Auto", "lpips", "torch_fidelity")
    loading = {
        path.relative_to(PACKAGE).as_posix()
        for path in PACKAGE.rglob("*.py")
        if any(name.startswith(loaders) for name in imports_of(path))
    }
    assert loading == {"vision.py"}
