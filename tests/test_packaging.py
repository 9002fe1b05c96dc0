"""What is installed, and how little `import dae_diffusers` loads."""

import ast
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from setuptools import find_packages

if sys.version_info >= (3, 11):
    import tomllib
else:
    tomllib = pytest.importorskip("tomli")

ROOT = Path(__file__).resolve().parents[1]


def run_python(code: str) -> str:
    result = subprocess.run([sys.executable, "-c", code], cwd="/", capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    return result.stdout


def test_listed_packages_are_those_that_exist():
    listed = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"]
    found = find_packages(str(ROOT), include=["dae_diffusers", "dae_diffusers.*"])
    assert sorted(listed) == sorted([*found, "dae_diffusers.pipelines", "dae_diffusers.training"])


def test_import_is_light():
    loaded = run_python(
        "import dae_diffusers, sys; print(sorted({'torch', 'diffusers', 'transformers'} & set(sys.modules)))"
    )
    assert loaded.strip() == "[]"


def test_public_names_resolve_and_unknown_ones_say_what_exists():
    assert run_python("import dae_diffusers as d; [getattr(d, n) for n in d.__all__]; print('ok')").strip() == "ok"
    import dae_diffusers

    with pytest.raises(AttributeError, match="DAEDiTPipeline"):
        dae_diffusers.Nothing  # noqa: B018


def test_no_top_level_pipelines_training_or_tests_are_installed():
    code = (
        "from importlib.util import find_spec; print([n for n in ('pipelines', 'training', 'tests') if find_spec(n)])"
    )
    assert run_python(code).strip() == "[]"


@pytest.mark.parametrize(
    "file",
    [
        "pipelines/dae_dit.py",
        "pipelines/dae_vqgan.py",
        "dae_diffusers/transformer_dae_dit.py",
        "dae_diffusers/autoencoder_dae_asymmetric.py",
    ],
)
def test_files_that_travel_to_the_hub_import_torch_and_diffusers_only(file):
    tree = ast.parse((ROOT / file).read_text())
    names = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names.add(node.module.split(".")[0])
    assert names - set(sys.stdlib_module_names) <= {"torch", "diffusers", "numpy", "PIL"} | (
        {"transformers"} if "vqgan" in file else set()
    )


def test_pipelines_and_training_never_import_scripts():
    for file in (ROOT / "training").glob("*.py"):
        lines = [line for line in file.read_text().splitlines() if line.startswith(("import", "from"))]
        of_training = [line for line in lines if "dae_diffusers.training" in line]
        assert all(line.startswith("from dae_diffusers.training.settings import ") for line in of_training)  # no script


@pytest.mark.slow
def test_wheel_holds_the_mapped_packages_and_nothing_else(tmp_path):
    subprocess.run(
        [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "-w", str(tmp_path), str(ROOT)],
        check=True,
        capture_output=True,
    )
    names = zipfile.ZipFile(next(tmp_path.glob("*.whl"))).namelist()
    assert {name.split("/")[0] for name in names if ".dist-info" not in name} == {"dae_diffusers"}
    for wanted in ("pipelines/dae_dit.py", "training/train_dae.py", "training/configs/digits_dae.yaml"):
        assert f"dae_diffusers/{wanted}" in names
    for wanted in ("assets/digits_train.parquet", "hub/card_template.md", "hub/space/app.py"):
        assert f"dae_diffusers/{wanted}" in names
