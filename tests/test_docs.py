"""The guides say nothing that does not work: flags are parsed, and every block runs, with fewer steps, top to bottom."""

import io
import json
import os
import re
import shlex
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest
from hub_server import HubServer
from models import save_backbone
from scripts import free_port

from dae_diffusers.cli import parse_config
from dae_diffusers.console import find_scripts
from dae_diffusers.training.settings import SCRIPTS, with_flags

ROOT = Path(__file__).resolve().parents[1]
DOCS = ROOT / "docs"
PAGES = sorted([*ROOT.glob("*.md"), *DOCS.glob("*.md"), *ROOT.glob("benchmarks/results/*.md")])
GUIDES = sorted(path.name for path in DOCS.glob("*.md") if "```bash" in path.read_text())
FEWER = {
    r"--config (photos_\w+_dae)": r"--config \1 --resolution 64 --block_out_channels 64 128 128 --stage1_steps 9 --stage2_steps 9 "
    "--train_batch_size 9 --validation_steps 9",
    r"--config (photos_\w+_dit)": r"--config \1 --model DiT-S/2 --resolution 64 --max_train_steps 9 --train_batch_size 9 "
    "--validation_steps 9",
    r"--stage([12])_steps \d+": r"--stage\1_steps 4",
    r"--max_train_steps \d+": "--max_train_steps 4",
    r"--validation_steps \d+": "--validation_steps 4",
    r"--checkpointing_steps \d+": "--checkpointing_steps 6",
    r"--train_batch_size \d+": "--train_batch_size 4",
    r"--codebook_warmup_steps \d+": "--codebook_warmup_steps 2",
    r"--codebook_size \d+": "--codebook_size 16",
    r"--num_images \d+": "--num_images 20",
    r"--metric_steps \d+": "--metric_steps 2 --metric_images 20",
    r" train-classifier ": " train-classifier --train_steps 4 ",
    r"--num_inference_steps \d+": "--num_inference_steps 2",
    r"--resolution 64": "--resolution 32",
    r"--block_out_channels 64 128 128": "--block_out_channels 32 32 32",
    r"DiT-S/2": "DiT-Ti/2",
    r" train-dit ": " train-dit --num_sample_images 4 --sample_steps 2 ",
    r"--pilot_steps \d+": "--pilot_steps 4",
    r"--budget \w+": "--budget 6m",
    r" evaluate ": " evaluate --max_train_samples 40 --max_validation_samples 20 --validation_fraction 0.5 ",
    r"--num_cpu_threads_per_process 2": "--num_cpu_threads_per_process 1",
}


def blocks_of(text: str) -> list[tuple[str, str]]:
    """Language and content of the blocks that are to run."""
    text = re.sub(r"<!-- not run: [^>]*-->\s*```.*?```", "", text, flags=re.DOTALL)
    return re.findall(r"```(bash|python)\n(.*?)```", text, re.DOTALL)


def shorten(text: str) -> str:
    for pattern, replacement in FEWER.items():
        text = re.sub(pattern, replacement, text)
    return text.replace("--multi_gpu", f"--multi_gpu --main_process_port {free_port()}")


@pytest.mark.parametrize("path", [*(f"docs/{name}" for name in GUIDES), "README.md", "benchmarks/results/runs.md"])
def test_every_flag_in_the_text_exists(path):
    text = (ROOT / path).read_text().replace("\\\n", " ")
    names = "|".join(re.escape(name).replace("\\-", "[-_]") for name in find_scripts())
    commands = re.findall(rf"(?:dae-diffusers|accelerate launch|python)\b[^\n`]*?\b({names})(?:\.py)? ([^\n`#]*)", text)
    assert commands
    for name, flags in commands:
        name = name.replace("_", "-")
        argv = shlex.split(flags.replace("$kind", "dropout"))
        argv = [str(ROOT / word) if word.startswith("training/configs") else word for word in argv]
        parse_config(SCRIPTS[name], with_flags(name, argv))


def test_readme_is_short():
    assert len((ROOT / "README.md").read_text().split()) <= 1000


def test_readme_and_guide_have_the_same_recipe():
    """The first commands of the README for one's own images are those of the guide."""
    readme, guide = (
        " ".join(path.read_text().replace("\\\n", " ").split()) for path in (ROOT / "README.md", DOCS / "own_images.md")
    )
    for script in ("train-dae", "train-dit"):
        command = re.search(rf"dae-diffusers {script} [^#`]*", readme)[0].strip()
        assert "--train_data_dir my_images" in command and command in guide


QUESTIONS = {
    "docs/own_images.md": ("is-this-for-you", "the-folder", "see-what-training-will-see", "train"),
    "docs/planning.md": (
        "how-many-images-steps-hours-and-gib",
        "on-a-cpu",
        "is-the-autoencoder-good-enough",
        "what-do-the-grids-of-samples-show",
        "samples-are-blobs",
        "overfitting",
        "when-memory-runs-out",
    ),
    "docs/recipes.md": ("256-pixels", "only-the-generator-on-a-published-autoencoder"),
}


def test_every_question_is_answered_in_two_clicks():
    first = links_of("README.md")
    second = {link for page in first if page.endswith(".md") for link in links_of(page)}
    for page, anchors in QUESTIONS.items():
        assert {f"{page}#{anchor}" for anchor in anchors} <= first | second
        assert set(anchors) <= anchors_of((ROOT / page).read_text())


def links_of(page: str) -> set[str]:
    """Where a page's links lead, from the root of the repository; for a link to a heading also its page."""
    found = set()
    for link in re.findall(r"\]\(([^)\s]+)\)", (ROOT / page).read_text()):
        target, _, anchor = link.partition("#")
        if not target.startswith("http"):
            path = os.path.relpath((ROOT / page).parent / target if target else ROOT / page, ROOT)
            found |= {path, f"{path}#{anchor}"}
    return found


@pytest.mark.parametrize("path", [str(path.relative_to(ROOT)) for path in PAGES])
def test_every_link_leads_somewhere(path):
    text = re.sub(r"```.*?```", "", (ROOT / path).read_text(), flags=re.DOTALL)
    links = re.findall(r"\]\(([^)\s]+)\)", text) + re.findall(r'src="([^"]+)"', text)
    for link in links:
        target, _, anchor = link.partition("#")
        if target.startswith("http"):
            continue
        file = (ROOT / path).parent / target if target else ROOT / path
        assert file.exists(), f"{link} leads nowhere"
        assert not anchor or anchor in anchors_of(file.read_text()), f"{link} leads to no heading"


def anchors_of(text: str) -> set[str]:
    """Those that GitHub makes of a page's headings."""
    headings = re.findall(r"^#+ (.*)$", text, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.fixture
def environment(tmp_path):
    """Variables under which the commands of the guides are found, with a Hub on 127.0.0.1 where `user` is logged in."""
    commands = {
        "dae-diffusers": '-c "from dae_diffusers.console import main; main()"',
        "hf": "-m huggingface_hub.cli.hf",
        "python": "",
    }
    (tmp_path / "bin").mkdir()
    for name, arguments in commands.items():
        path = tmp_path / "bin" / name
        path.write_text(f'#!/bin/sh\nexec {sys.executable} {arguments} "$@"\n')
        path.chmod(0o755)
    with HubServer() as hub:
        hub.tokens["hf_user"] = "user"
        yield {
            **os.environ,
            **hub.environment(tmp_path / "home", token="hf_user"),
            "PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}",
            "OMP_NUM_THREADS": "1",
            "ACCELERATE_USE_CPU": "true",  # two processes, as the guide says, also without a GPU
        }


@pytest.fixture
def folder(tmp_path, image_folder):
    """Where the guides are followed: with images, and a tiny network in the place of the one that they name."""
    work = tmp_path / "work"
    work.mkdir()
    (work / "my_images").symlink_to(image_folder)
    (work / "my_shards").mkdir()
    with tarfile.open(work / "my_shards" / "train.tar", "w") as tar:
        for number, path in enumerate(sorted(image_folder.glob("*/*.png"))):
            tar.add(path, f"{number:03d}.png")
            label = tarfile.TarInfo(f"{number:03d}.cls")
            label.size = 1
            tar.addfile(label, io.BytesIO(b"01"[number % 2 :][:1]))
    save_backbone(work / "facebook" / "dinov2-small", "classifier")
    return work


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("name", GUIDES)
def test_guide_runs_from_top_to_bottom(name, environment, folder):
    for language, block in blocks_of((DOCS / name).read_text()):
        command = ["bash", "-e", "-c", shorten(block)] if language == "bash" else [sys.executable, "-c", block]
        result = subprocess.run(command, env=environment, cwd=folder, capture_output=True, text=True)
        assert result.returncode == 0, f"{block}\n{result.stdout[-1000:]}\n{result.stderr[-3000:]}"


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of the notebook's client
def test_notebook_runs_from_top_to_bottom(environment, folder, monkeypatch):
    monkeypatch.syspath_prepend(DOCS)
    reason = 'needs nbclient and ipykernel: pip install -e ".[docs]"'
    for package in ("nbclient", "ipykernel"):
        pytest.importorskip(package, reason=reason)
    import nbformat
    import run_notebook  # of docs/

    for variable, value in environment.items():
        monkeypatch.setenv(variable, value)
    notebook = nbformat.read(DOCS / "digits.ipynb", as_version=4)
    for cell in notebook.cells:
        cell.source = shorten(cell.source)
    notebook = run_notebook.run(notebook, folder, timeout=600)
    printed = "".join(output.get("text", "") for cell in notebook.cells for output in cell.get("outputs", []))
    assert "error:" not in printed and "%|" not in printed and "\r" not in printed
    assert "saved runs/digits/pipeline" in printed
    assert (folder / "look-first" / "model_index.json").exists()


def test_notebook_shows_its_pictures_where_it_is_hosted():
    text = (DOCS / "digits.ipynb").read_text()
    cells = [cell for cell in json.loads(text)["cells"] if cell["cell_type"] == "code"]
    assert [cell["execution_count"] for cell in cells] == list(range(1, len(cells) + 1))  # run once, from top to bottom
    drawing = [cell for cell in cells if re.search(r"display\(|make_image_grid|image_grid\(", "".join(cell["source"]))]
    assert len(drawing) == 4
    assert all(any("image/png" in output.get("data", {}) for output in cell["outputs"]) for cell in drawing)
    assert len(text) < 2**20 and not re.search(r"/tmp/|/home/|/root/|/work/|\\r|%\|", text)


def test_notebook_needs_no_edit_outside_of_a_checkout(tmp_path):
    """In Colab it lies alone: its first cell takes a wheel or an archive beside it, or asks for one."""
    cell = json.loads((DOCS / "digits.ipynb").read_text())["cells"][1]
    code = "".join(cell["source"]).replace("%pip install -q {found[0]}", "print(found[0])")
    code = code.replace('find_spec("dae_diffusers")', 'find_spec("not_installed")')
    uploads = "import sys, types; files = types.SimpleNamespace(upload=lambda: {'repository.zip': b''}); "
    uploads += "sys.modules['google.colab'] = types.SimpleNamespace(files=files); sys.modules['google'] = types.ModuleType('google')\n"
    (tmp_path / "docs").mkdir()
    for beside, wanted in (
        (None, "repository.zip"),
        ("dae_diffusers-0.1.0.whl", "dae_diffusers-0.1.0.whl"),
        ("../pyproject.toml", ".."),
    ):
        if beside is not None:
            (tmp_path / "docs" / beside).touch()
        command = [sys.executable, "-c", uploads + code]
        found = subprocess.run(command, cwd=tmp_path / "docs", capture_output=True, text=True, check=True).stdout
        assert found.strip() == wanted


@pytest.mark.slow
def test_reference_holds_every_public_class(tmp_path):
    pytest.importorskip("pdoc", reason='needs pdoc: pip install -e ".[docs]"')
    subprocess.run([sys.executable, DOCS / "reference.py", tmp_path], check=True, capture_output=True)
    page = (tmp_path / "dae_diffusers" / "autoencoders" / "autoencoder_kl.html").read_text()
    assert "DAEAutoencoderKL" in page and "auxiliary_dropout" in page
    assert "DAEDiTPipeline" in (tmp_path / "dae_diffusers.html").read_text()
    for name in ("pipelines/dae_dit", "training/push", "hub/card", "metrics/distances"):
        assert (tmp_path / "dae_diffusers" / f"{name}.html").exists()
