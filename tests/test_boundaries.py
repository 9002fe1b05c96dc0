"""What may import what: imports point down, losses are pure functions, one module loads vision networks."""

import ast
import sys
from collections.abc import Iterator
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parents[1] / "dae_diffusers"
LOSSES = sorted(PACKAGE.glob("losses/*.py"))


def imports_of(path: Path) -> Iterator[str]:
    """`module.name` of everything that a file imports, anywhere in it."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def test_no_two_parts_of_the_library_want_each_other():
    wanted: dict[str, set[str]] = {}
    for path in PACKAGE.rglob("*.py"):
        part = path.relative_to(PACKAGE).parts[0].removesuffix(".py")
        names = [name.split(".")[1] for name in imports_of(path) if name.startswith("dae_diffusers.")]
        wanted.setdefault(part, set()).update(name for name in names if name != part)
    assert "losses" in list(TopologicalSorter(wanted).static_order())  # raises CycleError with the parts of a circle


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
