"""Publishing and loading again, end to end: the real Hub client against a Hub on 127.0.0.1."""

import json
import logging
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tarfile
import threading
import time
import venv
from contextlib import nullcontext
from pathlib import Path

import huggingface_hub
import pytest
import torch
import yaml
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from diffusers import DiffusionPipeline
from hub_server import HubServer
from huggingface_hub import EvalResult, HfApi, ModelCard
from models import make_autoencoder, make_prior, make_prior_pipeline, make_vq_model, save_autoencoder, save_run
from PIL import Image
from safetensors.torch import load, load_file, save_file
from scripts import TINY_DAE, TINY_DIT, TRANSFORMER, assert_same_weights, log_of, run, weights

from dae_diffusers import DAEDiTPipeline, DAEVQGANPipeline
from dae_diffusers.cli import parse_config
from dae_diffusers.data import DataConfig, load_images
from dae_diffusers.engine.checkpointing import Checkpointer
from dae_diffusers.engine.hub_checkpoints import HubCheckpoints
from dae_diffusers.errors import ConfigError, UserError
from dae_diffusers.hub import upload
from dae_diffusers.hub.card import _data_description, make_card, measurements, repository_files
from dae_diffusers.hub.publisher import Publisher
from dae_diffusers.hub.results import Script, read_result, remove_leftovers
from dae_diffusers.hub.settings import HubConfig, PushConfig
from dae_diffusers.hub.upload import (
    BackgroundUpload,
    check_hub_access,
    push_folder,
    shows_public_images,
    stale_files,
    stale_weights,
)
from dae_diffusers.training import push, train_dae, train_dit
from dae_diffusers.training.settings import TrainDAEConfig, TrainDiTConfig, with_flags
from dae_diffusers.weights import weights_fingerprint_of

REPO = "writer/animals"
pytestmark = [
    pytest.mark.filterwarnings("ignore:.*larger than the data set"),
    pytest.mark.filterwarnings("ignore:Use 'content=<...>':DeprecationWarning"),  # within huggingface_hub
]


@pytest.fixture(autouse=True)
def fresh_accelerator_state():
    AcceleratorState._reset_state(reset_partial_state=True)
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


@pytest.fixture(scope="module")
def hub():
    with HubServer() as server:
        yield server


@pytest.fixture(scope="module")
def trained(tmp_path_factory, image_folder):
    """A finished run with an evaluation's numbers beside it."""
    AcceleratorState._reset_state(reset_partial_state=True)
    folder = tmp_path_factory.mktemp("hub") / "animals"
    run(train_dae, TINY_DAE, curves=True, train_data_dir=image_folder, output_dir=folder)
    run(train_dit, TINY_DIT, curves=True, train_data_dir=image_folder, output_dir=folder, vae=folder / "vae")
    evaluation = {
        "reconstruction": {"psnr": 21.5, "rfd_tiny": 3.25},
        "latent_space": {"num_images": 5, "effective_rank": 2.5, "mean": [0.0, 1.0]},
        "generation": [{"num_images": 50, "guidance_scale": 2.0, "num_inference_steps": 4, "seed": 0, "gfd_tiny": 7.0}],
        "setting": {"validation_images": {"number": 5}, "config": {"features": str(folder / "tiny")}},
    }
    (folder / "evaluation").mkdir()
    (folder / "evaluation" / "metrics.json").write_text(json.dumps(evaluation))
    return folder


@pytest.fixture
def client(hub, tmp_path, monkeypatch):
    """The Hub's client in this process, as the account `writer`, without its waits between attempts."""
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", hub.url)
    template = hub.url + "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr(huggingface_hub.constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
    monkeypatch.setattr(huggingface_hub.hf_api.api, "endpoint", hub.url)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(huggingface_hub.utils._http.time, "sleep", lambda seconds: None)
    monkeypatch.setenv("HF_TOKEN", "hf_writer")
    huggingface_hub.close_session()  # one made while offline stays offline
    yield hub
    hub.faults.clear()
    huggingface_hub.close_session()


@pytest.fixture(scope="module")
def bare_python(tmp_path_factory):
    """A Python that has diffusers but not this package: editable installs do not reach into another environment."""
    folder = tmp_path_factory.mktemp("bare")
    venv.create(folder, symlinks=True)
    (site,) = folder.glob("lib/*/site-packages")
    (site / "others.pth").write_text("\n".join(path for path in sys.path if path.endswith("-packages")))
    python = folder / "bin" / "python"
    code = "from importlib.util import find_spec; print([find_spec(n) is None for n in ('diffusers', 'dae_diffusers')])"
    found = subprocess.run([python, "-c", code], capture_output=True, text=True, cwd=folder)
    if found.stdout.strip() != "[False, True]":
        pytest.skip("this package is not an editable install, so no environment can be made without it")
    return python


def run_fresh(python, code: str, environment: dict[str, str], folder: Path) -> str:
    environment = {**os.environ, **environment, "OMP_NUM_THREADS": "1"}
    result = subprocess.run([python, "-c", code], env=environment, cwd=folder, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr[-3000:]
    return result.stdout


def push_script(*words: str):
    push.main(parse_config(PushConfig, with_flags("push", [str(word) for word in words])))


@pytest.fixture(scope="module")
def published(hub, trained, tmp_path_factory):
    """Pushed as a user does it, in a process of its own."""
    folder = tmp_path_factory.mktemp("pushing")
    command = [sys.executable, "-m", "dae_diffusers.training.push", trained, REPO, "--license", "cc-by-4.0", "--fp16"]
    command.append("--data_pictures")
    environment = {**os.environ, **hub.environment(folder / "home")}
    result = subprocess.run(command, env=environment, cwd=folder, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr[-3000:]
    assert f"pushed to {hub.url}/{REPO}" in result.stderr
    assert "hf_writer" not in result.stdout + result.stderr
    assert "will show everybody" in result.stderr and "reconstructions.png" in result.stderr
    assert "HTTP Request" not in result.stdout + result.stderr
    return hub.files(REPO)


def sample(pipe) -> torch.Tensor:
    pipe.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(0)
    return pipe("dog", generator=generator, num_inference_steps=2, output_type="pt").images


def test_repository_holds_what_is_promised(published, trained):
    weights = {
        f"{part}/diffusion_pytorch_model{v}.safetensors" for part in ("vae", "transformer") for v in ("", ".fp16")
    }
    assert weights <= published.keys()
    assert published.keys() - weights == {
        *("README.md", "model_index.json", "pipeline.py", "metrics.json"),
        *("dae_dit_img2img.py", "dae_dit_inpaint.py", "dae_dit_interpolate.py"),
        *("vae/config.json", "scheduler/scheduler_config.json"),
        *("transformer/config.json", "transformer/dae_diffusers.transformer_dae_dit.py"),
        *("images/samples.png", "images/reconstructions.png"),
        *("images/train_dae_curves.png", "images/train_dit_curves.png"),
        *("training/train_dae.yaml", "training/train_dae.json", "training/train_dit.yaml", "training/train_dit.json"),
    }
    captions = dict(re.findall(r"^!\[(.*)\]\((images/.*)\)$", published["README.md"].decode(), re.MULTILINE)[::-1])
    captions = {path: caption for caption, path in captions.items()}
    assert captions.keys() == {name for name in published if name.startswith("images/")}
    assert captions["images/train_dit_curves.png"] == "Training of the generator"
    for name in ("vae", "transformer"):
        path = f"{name}/diffusion_pytorch_model.safetensors"
        assert published[path] == (trained / "pipeline" / path).read_bytes()


def test_nothing_published_tells_of_the_machine_or_the_token(published, trained):
    for name, content in published.items():
        assert b"hf_writer" not in content
        if not name.endswith((".safetensors", ".png")):
            assert str(trained.parent).encode() not in content and os.path.expanduser("~").encode() not in content, name
    config = yaml.safe_load(published["training/train_dit.yaml"])
    assert config["max_train_steps"] == 6 and config["vae"] == "vae"
    assert not any(name.startswith(("hub_", "push_")) for name in config)


def test_card_has_metadata_that_the_hub_reads(published):
    data = ModelCard(published["README.md"].decode()).data
    assert (data.license, data.library_name, data.pipeline_tag) == (
        "cc-by-4.0",
        "diffusers",
        "unconditional-image-generation",
    )
    assert {"dit", "class-conditional", "decoupled-autoencoder"} <= set(data.tags)
    values = {result.metric_type: result for result in data.eval_results}
    assert all(isinstance(result, EvalResult) for result in data.eval_results)
    assert values["psnr"].metric_value == 21.5 and values["psnr"].metric_args == {"num_images": 5}
    assert values["gfd_tiny"].metric_name == "gFD (tiny)" and values["gfd_tiny"].metric_args["guidance_scale"] == 2.0
    assert "mean" not in values and "num_images" not in values


def test_card_says_how_it_was_made(published, trained):
    text = published["README.md"].decode()
    record = json.loads(published["training/train_dae.json"])
    assert record["seconds"] > 0 and record["counts"]["training_images"] == 23
    assert record["versions"]["torch"] == torch.__version__ and record["local_data"] is True
    command = re.search(r"```bash\n(accelerate launch .*train_dae .*)\n```", text)[1]
    flags = command.split("train_dae ")[1].split()
    config = parse_config(TrainDAEConfig, flags)
    assert config.stages.stage1_steps == 4 and config.autoencoder.block_out_channels == [8, 8]
    assert config.data.resolution == 16
    assert "becomes 8x8x3 latents (factor 2 on each side)" in text
    assert json.loads(published["training/train_dit.json"])["weights"] == fingerprints_of(trained)
    assert "23 training images" in text and "2 classes: cat, dog" in text
    for picture in re.findall(r"\]\((images/[^)]+)\)", text):
        assert published[picture][:4] == b"\x89PNG"
    assert "dae-diffusers" in record["versions"] and not re.search(r"\{\{|\{%|None", text)


def test_card_names_classes_as_they_are_called_whatever_they_hold(trained):
    result = read_result(trained)
    names = ["a|b", "*star* [x](http://bad)", "<img src=x>", "two\nlines # no heading", "`code` ``` & $1$"]
    result.index["id2label"] = {str(key): name for key, name in enumerate(names)}
    card = make_card(result, REPO)
    (line,) = [line for line in card.content.splitlines() if "5 classes: " in line]
    assert r"a\|b, \*star\* \[x\](http://bad), &lt;img src=x&gt;, two lines \# no heading" in line
    assert r"\`code\` \`\`\` &amp; \$1\$" in line
    snippet = re.search(r"```python\n(.*?)```\n", card.content, re.DOTALL)[1]
    compile(snippet, "card", "exec")
    assert "<img" not in card.content and "\n# no heading" not in card.content


def test_card_is_short_and_says_how_far_training_went(trained):
    result = read_result(trained)
    row = result.metrics["evaluation"]["generation"][0]
    rows = [{**row, "guidance_scale": float(scale), "gfd_tiny": 20.0 - scale} for scale in range(9)]
    result.metrics["evaluation"]["generation"] = rows
    card = make_card(result, REPO, space_id="writer/space")
    distances = [each for each in card.data.eval_results if each.metric_type == "gfd_tiny"]
    assert [each.metric_value for each in distances] == [12.0] and distances[0].metric_args["guidance_scale"] == 8.0
    assert card.content.count("| gFD (tiny) |") == 1 and "the other 8 settings" in card.content
    assert len(card.content.split("---")[1].splitlines()) < 100
    assert "early model: its generator was trained for 6 steps" in card.content
    assert "https://huggingface.co/spaces/writer/space" in card.content
    assert not re.search(r"trained[^.]*trained", card.content.split("## ")[0].split("---")[2].splitlines()[4])
    script = result.scripts["train_dit"]
    script.config["max_train_steps"] = 200_000  # `num_train_epochs` may say otherwise
    assert "early model: its generator was trained for 6 steps" in make_card(result, REPO).content
    script.record["steps"], script.validation["step"] = {"max_train_steps": 200_000}, 800  # it stopped early
    assert "early model: its generator was trained for 800 steps" in make_card(result, REPO).content
    script.validation["step"] = 200_000
    assert "early model" not in make_card(result, REPO).content


def test_commands_of_the_card_run_one_after_the_other(trained):
    text = make_card(read_result(trained), REPO).content
    first, second = (command.split() for command in re.findall(r"```bash\n(accelerate launch .*)\n```", text))
    for script, words in ((TrainDAEConfig, first), (TrainDiTConfig, second)):
        config = parse_config(script, words[4:])
        assert config.run.output_dir == "runs/animals" and config.data.train_data_dir == "path/to/images"
    assert config.transformer.vae == "runs/animals/vae"


@pytest.mark.parametrize(
    ("words", "answer", "is_shown"),
    [([], None, False), ([], "", False), ([], "y", True), (["--data_pictures"], None, True)],
)
def test_images_of_the_author_are_published_only_if_he_says_so(
    client, trained, monkeypatch, caplog, words, answer, is_shown
):
    repo_id = f"writer/shown-{is_shown}-{answer is None}-{len(words)}".lower()
    (trained / "evaluation" / "nearest-guidance-2-steps-4.png").write_bytes(b"\x89PNG")
    monkeypatch.setattr(push.sys.stdin, "isatty", lambda: answer is not None, raising=False)
    monkeypatch.setattr("builtins.input", lambda question: answer)
    with caplog.at_level(logging.INFO):
        push_script(trained, repo_id, "--license", "mit", *words)
    (trained / "evaluation" / "nearest-guidance-2-steps-4.png").unlink()
    files = client.files(repo_id)
    shown = {"images/reconstructions.png", "images/nearest.png"}
    assert shown & files.keys() == (shown if is_shown else set())
    assert ("left out because they show your data set" in caplog.text) == (not is_shown)
    text = files["README.md"].decode()
    assert ("reconstructions.png" in text) == is_shown and "not been checked for copies" not in text
    if is_shown:  # and taken back later
        push_script(trained, repo_id, "--license", "mit", "--no_data_pictures")
        assert not shown & client.files(repo_id).keys()


def save_measured_run(folder: Path, *, generator: dict | None = None, evaluation: dict | None = None, **autoencoder):
    """A tiny run whose scripts read the images of these settings, with pictures of them. No `generator`: only an autoencoder."""
    save_run(folder, None)
    (folder / "metrics.json").unlink()
    for name, flags in (("train_dae", autoencoder), ("train_dit", generator)):
        if flags is not None:
            (folder / name / "grids").mkdir(parents=True)
            (folder / name / "config.yaml").write_text(yaml.safe_dump(flags))
    if generator is None:
        shutil.move(folder / "pipeline" / "vae", folder / "vae")
        shutil.rmtree(folder / "pipeline")
    (folder / "train_dae" / "grids" / "reconstruction-stage2-00000001.png").write_bytes(b"\x89PNG")
    (folder / "evaluation").mkdir()
    if evaluation is not None:
        save_evaluation(folder, {"config": evaluation})
    return folder


def save_evaluation(folder: Path, setting: dict, psnr: float = 21.5) -> None:
    """Numbers and pictures as `evaluate` leaves them in a run."""
    rows = [{"guidance_scale": scale, "num_inference_steps": 4, "gfd_tiny": 6.0 + scale} for scale in (1.0, 2.0)]
    results = {"reconstruction": {"psnr": psnr}, "generation": rows, "floor": {"generation": {"real": {}}}}
    (folder / "evaluation" / "metrics.json").write_text(json.dumps({**results, "setting": setting}))
    for name in ("nearest-guidance-1-steps-4.png", "nearest-guidance-2-steps-4.png", "sweep.png"):
        (folder / "evaluation" / name).write_bytes(b"\x89PNG")


PUBLIC, PRIVATE = {"dataset_name": "user/faces"}, {"train_data_dir": "patients"}


@pytest.mark.parametrize(
    ("autoencoder", "generator", "evaluation", "is_public"),
    [
        (PUBLIC, {"dataset_name": "digits"}, None, True),
        (PUBLIC, PUBLIC, PUBLIC, True),
        (PUBLIC, None, None, True),
        (PUBLIC, PRIVATE, None, False),
        (PRIVATE, PUBLIC, None, False),
        (PUBLIC, PUBLIC, PRIVATE, False),
        (PUBLIC, PUBLIC, {}, False),  # nobody knows
        (PUBLIC, {"latent_cache": "latents"}, None, False),
        ({"dataset_name": "./faces"}, None, None, False),
        ({"dataset_name": "/data/faces"}, None, None, False),
        ({"dataset_name": "data/faces"}, None, None, False),  # a folder where training was started
    ],
)
def test_pictures_of_the_data_are_published_only_if_all_images_are_public(
    tmp_path, autoencoder, generator, evaluation, is_public
):
    (tmp_path / "data" / "faces").mkdir(parents=True)
    folder = tmp_path / "runs" / "mine"
    result = read_result(save_measured_run(folder, generator=generator, evaluation=evaluation, **autoencoder))
    shown = {"images/reconstructions.png", *(["images/nearest.png"] if evaluation is not None else [])}
    assert shown & repository_files(result, REPO).keys() == (shown if is_public else set())
    assert shown <= repository_files(result, REPO, data_pictures=True).keys()


@pytest.mark.parametrize("part", ["train_dae", "evaluation"])
def test_run_that_was_moved_away_from_its_images_keeps_them_private(tmp_path, part):
    name = {"dataset_name": "data/faces"}  # no longer there
    folder = save_measured_run(tmp_path / "run", evaluation=name, **name)
    assert not read_result(folder).has_private_data
    if part == "evaluation":
        save_evaluation(folder, {"config": name, "local_data": True})
    else:
        (folder / "train_dae" / "run.json").write_text('{"local_data": true}')
    assert read_result(folder).has_private_data


def test_data_sets_that_not_everybody_may_read_are_private(client, tmp_path):
    mine = {"dataset_name": "writer/faces"}
    result = read_result(save_measured_run(tmp_path / "run", generator=mine, **mine))
    assert not shows_public_images(result)  # there is no such data set
    HfApi().create_repo("writer/faces", repo_type="dataset", private=True)
    assert not shows_public_images(result)
    client.repositories["dataset", "writer/faces"].private = False
    assert shows_public_images(result)


def test_nearest_images_of_an_interrupted_evaluation_are_private(tmp_path):
    folder = save_measured_run(tmp_path / "run", generator=PUBLIC, **PUBLIC)
    (folder / "evaluation" / "nearest-guidance-1-steps-4.png").write_bytes(b"\x89PNG")
    assert "images/nearest.png" not in repository_files(read_result(folder), REPO)


def test_card_names_all_images(tmp_path):
    generator = {"dataset_name": "user/cats", "resolution": 16}
    folder = save_measured_run(
        tmp_path / "run", generator=generator, evaluation={"dataset_name": "user/dogs"}, **PUBLIC
    )
    card = make_card(read_result(folder), REPO)
    assert card.data.datasets == ["user/cats", "user/faces"]
    first = card.content.split("---")[2].splitlines()[4]
    assert "trained on user/cats at 16x16 pixels. The autoencoder was trained on user/faces." in first
    assert "Training images: user/cats, at 16x16 pixels. Those of the autoencoder: user/faces." in card.content
    assert {each.dataset_name for each in card.data.eval_results} == {"user/dogs"}
    assert "were compared with user/dogs." in card.content
    same = save_measured_run(tmp_path / "same", generator=PUBLIC, evaluation=PUBLIC, **PUBLIC)
    text = make_card(read_result(same), REPO).content
    assert "The autoencoder was trained on" not in text and "were compared with" not in text


@pytest.mark.parametrize(
    ("flags", "stage1", "sentence", "is_decoupled"),
    [
        ({"auxiliary_decoder": "dropout"}, "linear", "with a weak auxiliary decoder (`linear`)", True),
        ({"auxiliary_decoder": "dropout", "stage": "2"}, "narrow", "with a weak auxiliary decoder (`narrow`)", True),
        ({"auxiliary_decoder": "same"}, "same", "with a decoder like the one in `vae/`", False),
        ({"auxiliary_decoder": "none"}, None, "Encoder and decoder were trained together", False),
        (
            {
                "auxiliary_decoder": "dropout",
                "stage": "2",
                "pretrained_model_name_or_path": "stabilityai/sd-vae-ft-mse",
            },
            None,
            "are those of `stabilityai/sd-vae-ft-mse`. Only the decoder in `vae/` was fine-tuned",
            False,
        ),
    ],
)
def test_card_says_how_the_autoencoder_was_trained(trained, tmp_path, flags, stage1, sentence, is_decoupled):
    result = read_result(trained)
    result.folder = tmp_path
    if stage1 is not None:
        (tmp_path / "stage1").mkdir()
        (tmp_path / "stage1" / "config.json").write_text(json.dumps({"auxiliary_decoder_type": stage1}))
    result.scripts["train_dae"].config |= flags
    card = make_card(result, REPO)
    assert sentence in card.content
    assert ("decoupled-autoencoder" in card.data.tags) == is_decoupled == ("Complexity Matters" in card.content)
    assert ("a decoupled autoencoder" in card.content) == is_decoupled


def test_card_names_sizes_that_are_no_squares(trained):
    result = read_result(trained)
    result.data_script.config["resolution"] = [96, 64]
    assert make_card(result, REPO).content.count("at 96x64 pixels") == 2


@pytest.mark.parametrize(
    ("names", "name"),
    [
        (["dog", "tabby, cat"], "tabby"),
        (["Smith, Anna", "Smith, John"], "Smith, John"),
        (["Smith", "Smith, John"], "Smith, John"),
        (["a, tabby", "tabby , cat"], "tabby , cat"),
    ],
)
def test_card_names_a_class_that_the_pipeline_knows(trained, names, name):
    result = read_result(trained)
    result.index["id2label"] = dict(enumerate(names))
    assert f'class_labels="{name}", ' in make_card(result, REPO).content
    pipeline = DAEDiTPipeline.from_pretrained(trained / "pipeline", id2label=result.index["id2label"])
    assert pipeline.get_label_ids(name) == [1]


def test_card_leaves_out_what_is_unknown_of_its_example(trained):
    result = read_result(trained)
    result.index["conditions"] = {"age": {"mean": 1.5, "low": 0, "high": 3}, "color": {"labels": ["red", "blue"]}}
    result.scripts["train_dit"].record["conditions"] = {"age": None, "color": "blue"}
    assert 'conditions={"color": "blue"}, ' in make_card(result, REPO, data_pictures=True).content


def test_card_of_a_stock_pipeline_loads_it_with_diffusers_and_has_no_space(tmp_path):
    folder = save_run(tmp_path / "run", {0: "cat", 1: "dog"})
    (folder / "pipeline" / "pipeline.py").unlink()
    index = json.loads((folder / "pipeline" / "model_index.json").read_text())
    (folder / "pipeline" / "model_index.json").write_text(json.dumps({**index, "_class_name": "DiTPipeline"}))
    text = make_card(read_result(folder), REPO).content
    snippet = re.findall(r"```python\n(.*?)```", text, re.DOTALL)[0]
    assert snippet == f'from diffusers import DiTPipeline\n\npipe = DiTPipeline.from_pretrained("{REPO}")\n'
    assert "custom_pipeline" not in text and "The code in this repository" not in text
    with pytest.raises(
        UserError, match="is a DiTPipeline, but the app of the Space draws only with DAEDiTPipeline and"
    ):
        push_script(folder, REPO, "--space", "--export_dir", tmp_path / "out")


def test_images_that_are_no_pictures_are_drawn_as_arrays_and_have_no_space(tmp_path):
    folder = save_run(tmp_path / "run", None)
    assert "output_type" not in make_card(read_result(folder), REPO).content
    path = folder / "pipeline" / "vae" / "config.json"
    for channels, option in ((4, ""), (5, ', output_type="np"')):
        path.write_text(json.dumps(json.loads(path.read_text()) | {"in_channels": channels, "out_channels": channels}))
        call = f"pipe(num_images_per_label=1, num_inference_steps=25{option}).images[0]"
        assert make_card(read_result(folder), REPO).content.count(call) == 2
        with pytest.raises(
            UserError, match=f"have {channels} channels, but the app of the Space shows pictures of 1 or 3"
        ):
            push_script(folder, REPO, "--space", "--export_dir", tmp_path / "out")


def test_card_draws_as_the_pipeline_does_by_default(trained):
    result = read_result(trained)
    assert '"dog", guidance_scale=2.0, num_inference_steps=2' in make_card(result, REPO).content
    result.index["default_guidance_scale"] = 1.25
    assert '"dog", guidance_scale=1.25, num_inference_steps=2' in make_card(result, REPO).content


@pytest.mark.parametrize(("class_dropout_prob", "guidance_scale"), [(0.0, "1.0"), (0.1, "2.0")])
def test_card_of_an_older_pipeline_shows_guidance_only_where_it_was_learnt(trained, class_dropout_prob, guidance_scale):
    result = read_result(trained)
    del result.index["default_guidance_scale"], result.index["default_num_inference_steps"]
    result.scripts["train_dit"].config["class_dropout_prob"] = class_dropout_prob
    assert f'"dog", guidance_scale={guidance_scale}, num_inference_steps=25' in make_card(result, REPO).content


def test_card_snippets_load_in_all_three_ways(hub, published, trained, bare_python, tmp_path):
    with_package, without, autoencoder = re.findall(r"```python\n(.*?)```", published["README.md"].decode(), re.DOTALL)
    expected = sample(DAEDiTPipeline.from_pretrained(trained / "pipeline"))
    draw = """
pipe.set_progress_bar_config(disable=True)
import sys, torch
image.verify()
generator = torch.Generator().manual_seed(0)
images = pipe("dog", generator=generator, num_inference_steps=2, output_type="pt").images
torch.save(images, sys.argv[1] if len(sys.argv) > 1 else "images.pt")
print(type(pipe.transformer).__module__.split(".")[0])
"""
    homes = [tmp_path / name for name in ("first", "second", "third")]
    for home in homes:
        home.mkdir()
    assert run_fresh(sys.executable, with_package + draw, hub.environment(homes[0]), homes[0]) == "dae_diffusers\n"
    assert run_fresh(bare_python, without + draw, hub.environment(homes[1]), homes[1]) == "diffusers_modules\n"
    for home in homes[:2]:
        assert torch.equal(torch.load(home / "images.pt"), expected)

    check = "\nimport torch\nprint(type(vae).__name__, vae.decode(torch.zeros(1, 3, 8, 8)).sample.shape[-1])"
    environment = hub.environment(homes[2], token=None)
    assert run_fresh(bare_python, autoencoder + check, environment, homes[2]) == "AutoencoderKL 16\n"

    # The same with no Hub to reach: with the package from the cache, without it from a folder, as the card says.
    offline = {"HF_ENDPOINT": "http://127.0.0.1:9", "HF_HUB_OFFLINE": "1"}
    snapshot = subprocess.run(
        [sys.executable, "-m", "huggingface_hub.cli.hf", "download", REPO, "--local-dir", "animals"],
        env={**os.environ, **hub.environment(homes[1])},
        cwd=homes[1],
        capture_output=True,
        text=True,
    )
    assert snapshot.returncode == 0, snapshot.stderr
    for home, python, code in (
        (homes[0], sys.executable, with_package),
        (homes[1], bare_python, without.replace(REPO, "animals")),
    ):
        (home / "images.pt").unlink()
        run_fresh(python, code + draw, {**hub.environment(home), **offline}, home)
        assert torch.equal(torch.load(home / "images.pt"), expected)


@pytest.mark.parametrize("kind", ["dit", "vqgan", "alone"])
def test_card_snippets_load_a_larger_decoder_with_and_without_the_package(client, bare_python, tmp_path, kind):
    vae = (make_vq_model("vq") if kind == "vqgan" else make_autoencoder()).with_decoder(decoder_layers_per_block=2)
    model = vae = vae.to_diffusers()
    if kind == "dit":
        model = DAEDiTPipeline.from_pretrained(save_run(tmp_path / "run", {0: "cat", 1: "dog"}) / "pipeline", vae=vae)
    if kind == "vqgan":
        model = DAEVQGANPipeline(make_prior(vae, num_classes=2), vae, {0: "cat", 1: "dog"})
    model.save_pretrained(tmp_path / "larger" / "model")
    push_script(tmp_path / "larger" / "model", f"writer/larger-{kind}")
    card = client.files(f"writer/larger-{kind}")["README.md"].decode()
    assert ("over codes in the latent space of a vector-quantised autoencoder" in card) == (kind == "vqgan")
    blocks = re.findall(r"```python\n(.*?)```", card, re.DOTALL)
    own, without = blocks if kind == "alone" else (blocks[2], blocks[1] + "\nvae = pipe.vae")
    latents = torch.linspace(-1, 1, 192).view(1, 3, 8, 8)
    expected = vae.decode(latents).sample.double().sum().item()
    check = """
import torch
image = vae.eval().decode(torch.linspace(-1, 1, 192).view(1, 3, 8, 8)).sample
print(type(vae).__module__.split(".")[0], image.double().sum().item())
"""
    for python, code, module in (
        (sys.executable, own, "dae_diffusers"),
        (bare_python, without, "diffusers_modules"),
    ):
        home = tmp_path / module
        home.mkdir()
        assert run_fresh(python, code + check, client.environment(home), home) == f"{module} {expected}\n"


def test_options_of_from_pretrained_hold_without_the_package(hub, published, bare_python, tmp_path):
    code = f"""
import torch
from diffusers import DiffusionPipeline

repo = "{REPO}"
try:
    DiffusionPipeline.from_pretrained(repo, custom_pipeline=repo)
except ValueError as error:
    assert "trust_remote_code" in str(error), error
else:
    raise SystemExit("loaded untrusted code")
pipe = DiffusionPipeline.from_pretrained(repo, custom_pipeline="dae_dit_inpaint", trust_remote_code=True)
images = torch.zeros(1, 3, pipe.transformer.config.sample_size * pipe.vae_scale_factor, 8)
assert torch.equal(pipe.prepare_images(images, *images.shape[2:]), images)
pipe = DiffusionPipeline.from_pretrained(
    repo, custom_pipeline=repo, trust_remote_code=True, variant="fp16", torch_dtype=torch.float16, revision="main"
)
assert pipe.transformer.dtype == pipe.vae.dtype == torch.float16
try:
    DiffusionPipeline.from_pretrained(repo, custom_pipeline=repo, trust_remote_code=True, revision="no-such-branch")
except OSError as error:
    assert type(error.__cause__).__name__ == "RevisionNotFoundError", error
else:
    raise SystemExit("loaded a revision that is not there")
"""
    run_fresh(bare_python, code, hub.environment(tmp_path), tmp_path)
    asked = {path for _, path, _ in hub.requests if "/resolve/" in path}
    assert any("fp16.safetensors" in path for path in asked)


def test_options_of_from_pretrained_hold_with_the_package(client, published, trained, tmp_path):
    api = HfApi()
    first = api.model_info(REPO).sha
    api.create_tag(REPO, tag="v1")
    push_folder(trained, REPO, revision="next", data_pictures=True)
    files = client.files(REPO, revision="next")
    assert files.keys() == published.keys()
    loads = re.findall(r"from_pretrained\(.*|hf download.*", files["README.md"].decode())
    assert len(loads) > 3 and all(re.search(r'[ ,-]revision[= ]"next"', each) for each in loads)
    assert "revision" not in "".join(re.findall(r"```python.*?```", published["README.md"].decode(), re.DOTALL))
    assert ' custom_revision="next"' in files["README.md"].decode()
    assert api.model_info(REPO, revision="v1").sha == first
    pipe = DAEDiTPipeline.from_pretrained(REPO, revision="v1", variant="fp16", dtype=torch.float16)
    assert pipe.transformer.dtype == pipe.vae.dtype == torch.float16
    expected = load_file(trained / "vae" / "diffusion_pytorch_model.safetensors")
    for name, value in pipe.vae.state_dict().items():
        assert torch.equal(value, expected[name].half())


def test_training_starts_from_a_pipeline_of_the_hub(client, published, trained, image_folder, tmp_path):
    flags = "--resolution 16 --max_train_steps 1 --learning_rate 1e-30 --num_sample_images 2 --sample_steps 1"
    data = {"train_data_dir": image_folder, "vae": trained / "vae", "output_dir": tmp_path}
    with pytest.raises(UserError, match="writer/nothing cannot be loaded: .*") as error:
        run(train_dit, flags, pretrained_model_name_or_path="writer/nothing", **data)
    assert "\n" not in str(error.value)
    run(train_dit, flags, pretrained_model_name_or_path=REPO, **data)
    old, new = (load_file(folder / TRANSFORMER) for folder in (trained, tmp_path))
    assert old.keys() == new.keys() and all(torch.equal(old[name], new[name]) for name in old)
    assert f"started from the weights of `{REPO}`." in make_card(read_result(tmp_path), "writer/more").content


def test_pushing_other_weights_leaves_no_old_ones_beside_them(client, published, trained, tmp_path):
    shutil.copytree(trained, tmp_path / "run")
    path = tmp_path / "run" / "vae" / "diffusion_pytorch_model.safetensors"
    save_file({name: value + 1 for name, value in load_file(path).items()}, path, metadata={"format": "pt"})
    shutil.copy(path, tmp_path / "run" / "pipeline" / "vae" / path.name)
    push_folder(tmp_path / "run", REPO, revision="moved", data_pictures=True)  # without `fp16`
    missing = published.keys() - client.files(REPO, revision="moved").keys()
    assert missing == {"images/samples.png"}  # of the old decoder
    halved = load(client.files(REPO, revision="moved")["vae/diffusion_pytorch_model.fp16.safetensors"])
    for name, value in load_file(path).items():
        assert torch.equal(halved[name], value.half())


def test_pipeline_keeps_its_encoder_when_an_autoencoder_alone_is_pushed(client, tmp_path, caplog):
    folder = save_measured_run(tmp_path / "run", generator=PUBLIC, **PUBLIC)
    save_evaluation(folder, {"weights": fingerprints_of(folder)})
    push_folder(folder, "writer/whole")
    shutil.copytree(folder / "pipeline" / "vae", tmp_path / "vae")
    change_weights(tmp_path / "vae", "decoder")
    (tmp_path / "train_dae").mkdir()
    (tmp_path / "train_dae" / "config.yaml").write_text(yaml.safe_dump(PUBLIC))
    (tmp_path / "train_dae" / "log.jsonl").write_text('{"step": 1, "validation/psnr": 20.0}\n')
    whole = client.files("writer/whole")
    push_folder(tmp_path / "vae", "writer/whole")  # a better decoder of the same latents
    before = client.files("writer/whole")
    assert {name for name in whole if whole[name] != before.get(name)} == {"vae/diffusion_pytorch_model.safetensors"}
    assert "its card and metrics.json stay" in caplog.text
    change_weights(tmp_path / "vae", "encoder")
    with pytest.raises(UserError, match="writer/whole holds a pipeline with another encoder"):
        push_folder(tmp_path / "vae", "writer/whole")
    assert client.files("writer/whole") == before and "model_index.json" in before
    push_folder(tmp_path / "vae", "writer/other")
    shutil.rmtree(tmp_path / "vae")
    config = json.loads((shutil.copytree(folder / "pipeline" / "vae", tmp_path / "vae") / "config.json").read_text())
    for factor, message in ((1.00001, None), (1.1, "has other `scaling_factor` than .* `dae-diffusers assemble`")):
        config["scaling_factor"] *= factor
        (tmp_path / "vae" / "config.json").write_text(json.dumps(config))
        with nullcontext() if message is None else pytest.raises(UserError, match=message):
            push_folder(tmp_path / "vae", "writer/whole")


@pytest.mark.parametrize("name", ["diffusion_pytorch_model.bin", "diffusion_pytorch_model.fp16.safetensors"])
def test_weights_that_nobody_would_load_are_refused(tmp_path, name):
    folder = save_run(tmp_path / "run", None)
    vae = folder / "pipeline" / "vae"
    shutil.copy(vae / "diffusion_pytorch_model.safetensors", vae / name)
    assert read_result(folder).pipeline  # beside those that are loaded
    (vae / "diffusion_pytorch_model.safetensors").unlink()
    for place in (folder, vae):
        with pytest.raises(UserError, match=f"vae has its weights in {name}, but must have them in safetensors files"):
            read_result(place)


def test_weights_of_another_form_are_stale():
    published = ["README.md", "vae/a.safetensors", "vae/a.fp16.safetensors", "vae/config.json", "other/b.safetensors"]
    shards = ["vae/a-1-of-2.safetensors", "vae/a-2-of-2.safetensors", "vae/a.safetensors.index.json", "README.md"]
    assert stale_weights(published, shards) == ["vae/a.safetensors", "vae/a.fp16.safetensors"]
    assert stale_weights(shards, published) == shards[:3]
    assert stale_weights(published, published) == []


def test_what_an_earlier_pipeline_leaves_is_stale():
    pipeline = ["model_index.json", "vae/config.json", "training/train_dit.yaml"]
    earlier = [
        "text_encoder/model.safetensors",
        "tokenizer/vocab.json",
        "training/train_vqgan_prior.json",
        "metrics.json",
    ]
    own = ["training/notes.yaml", "training/notes.json", "notes/metrics.json"]
    assert set(stale_files([*pipeline, *earlier, *own], pipeline)) == set(earlier)
    assert (
        stale_files([*pipeline, *earlier, *own, "images/nearest.png"], ["vae/config.json"]) == []
    )  # the pipeline stays


def test_pushing_again_keeps_the_license_and_makes_no_empty_commit(client, published, trained):
    before = HfApi().model_info(REPO).sha
    push_folder(trained, REPO, data_pictures=True)
    assert HfApi().model_info(REPO).sha == before
    assert ModelCard(client.files(REPO)["README.md"].decode()).data.license == "cc-by-4.0"


def test_hand_written_card_can_be_kept(client, published, trained):
    HfApi().upload_file(repo_id=REPO, path_in_repo="README.md", path_or_fileobj=b"---\nlicense: mit\n---\nMine.\n")
    push_script(trained, REPO, "--keep_card")
    assert client.files(REPO)["README.md"].endswith(b"Mine.\n")


def test_card_of_others_stays(client, published, trained, caplog):
    HfApi().upload_file(repo_id=REPO, path_in_repo="README.md", path_or_fileobj=b"---\nlicense: mit\n---\nMine.\n")
    push_script(trained, REPO, "--license", "cc-by-4.0")
    assert client.files(REPO)["README.md"].endswith(b"Mine.\n")
    assert f"the README.md of {REPO} was not written by dae_diffusers and stays" in caplog.text
    HfApi().upload_file(repo_id=REPO, path_in_repo="README.md", path_or_fileobj=b"---\nlicense: mit\n---\n")
    push_script(trained, REPO)  # a card without words, as the Hub makes it with a new repository
    assert b"# Animals" in client.files(REPO)["README.md"] or b"## Use it" in client.files(REPO)["README.md"]


def test_pull_request_leaves_the_branch_as_it_is(client, published, trained, caplog):
    before = HfApi().model_info(REPO).sha
    with caplog.at_level(logging.INFO):
        push_script(trained, REPO, "--license", "apache-2.0", "--create_pr")
    assert f"{REPO}/discussions/1" in caplog.text
    assert HfApi().model_info(REPO).sha == before
    assert b"license: apache-2.0" in client.files(REPO, revision="refs/pr/1")["README.md"]


@pytest.mark.parametrize(("answer", "license"), [("mit", "mit"), ("", None)])
def test_license_is_asked_for_at_a_terminal(client, trained, monkeypatch, caplog, answer, license):
    monkeypatch.setattr(push.sys.stdin, "isatty", lambda: True, raising=False)
    monkeypatch.setattr("builtins.input", lambda question: answer)
    push_script(trained / "vae", f"writer/asked-{answer or 'nothing'}")
    text = client.files(f"writer/asked-{answer or 'nothing'}")["README.md"].decode()
    assert ModelCard(text).data.license == license
    assert ("no license is given" in caplog.text) == (license is None)


def test_stage_one_goes_to_a_branch(client, trained):
    push_script(trained, "writer/stages", "--stage1", "--data_pictures")
    # A branch begins as a copy of `main`, whose pictures may be taken back.
    assert all(name.startswith("stage1/") for name in client.files("writer/stages", revision="stage1"))
    assert "stage1/config.json" in client.files("writer/stages", revision="stage1")
    assert not any(name.startswith("stage1") for name in client.files("writer/stages"))


def test_stage1_alone_is_pushed_by_its_run(client, trained, tmp_path):
    shutil.copytree(trained / "stage1", tmp_path / "run" / "stage1")
    with pytest.raises(UserError, match=f"a DAE.*alone.*`dae-diffusers push {tmp_path}/run USER/NAME --stage1`"):
        push_script(tmp_path / "run" / "stage1", "writer/alone")
    command = upload.push_command(tmp_path / "run" / "stage1", "writer/alone").split()
    push_script(*command[2:])
    assert client.files("writer/alone") == {}
    assert "stage1/config.json" in client.files("writer/alone", revision="stage1")


def test_other_models_and_models_without_weights_are_refused(trained, tmp_path):
    with pytest.raises(UserError, match="a DAEDiTTransformer2DModel, which cannot be published alone"):
        read_result(trained / "pipeline" / "transformer")
    shutil.copytree(trained / "pipeline", tmp_path / "pipeline")
    (tmp_path / "pipeline" / "vae" / "diffusion_pytorch_model.safetensors").unlink()
    with pytest.raises(UserError, match="vae lacks its weights"):
        read_result(tmp_path)
    index = {"weight_map": {"a": "diffusion_pytorch_model-00001-of-00002.safetensors"}}
    (tmp_path / "pipeline" / "vae" / "diffusion_pytorch_model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(
        UserError, match="lacks its weights, such as diffusion_pytorch_model-00001-of-00002.safetensors"
    ):
        read_result(tmp_path)


def test_other_files_in_a_pipeline_stay_at_home(trained, tmp_path):
    shutil.copytree(trained / "pipeline", tmp_path / "pipeline")
    for name in ("my_photo.png", "vae/optimizer.pt", "transformer/notes.md"):
        (tmp_path / "pipeline" / name).touch()
    files = repository_files(read_result(tmp_path), "user/model")
    assert {"model_index.json", "vae/config.json"} < files.keys()
    assert not {"my_photo.png", "vae/optimizer.pt", "transformer/notes.md"} & files.keys()


def test_stage_one_does_not_say_where_its_weights_lay(tmp_path):
    (tmp_path / "stage1").mkdir()
    (tmp_path / "stage1" / "config.json").write_text('{"_name_or_path": "/home/me/secret", "latent_channels": 4}')
    assert json.loads(upload.stage1_files(tmp_path)["stage1/config.json"]) == {"latent_channels": 4}


def test_autoencoder_alone_is_published(client, trained, tmp_path):
    push_script(trained / "vae", "vae-alone")
    files = client.files("writer/vae-alone")
    assert "vae/config.json" in files and "model_index.json" not in files and "images/samples.png" not in files
    text = files["README.md"].decode()
    assert "DAEDiTPipeline" not in text and 'subfolder="vae"' in text
    assert "The author has stated no license" in text and ModelCard(text).data.license is None


def test_export_writes_the_same_without_a_hub(published, trained, tmp_path, monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", "http://127.0.0.1:9")
    words = ["--license", "cc-by-4.0", "--fp16", "--stage1", "--data_pictures", "--export_dir", tmp_path / "out"]
    push_script(trained, REPO, *words)
    files = {path.relative_to(tmp_path / "out").as_posix() for path in (tmp_path / "out").rglob("*") if path.is_file()}
    assert files == published.keys() | {f"stage1/{path.name}" for path in (trained / "stage1").iterdir()}
    for name in published:
        assert (tmp_path / "out" / name).read_bytes() == published[name], name
    images = sample(
        DiffusionPipeline.from_pretrained(
            tmp_path / "out", custom_pipeline=str(tmp_path / "out"), trust_remote_code=True
        )
    )
    assert torch.equal(images, sample(DAEDiTPipeline.from_pretrained(trained / "pipeline")))


def fingerprints_of(folder: Path) -> dict[str, str]:
    """As `evaluate` records those of a pipeline."""
    return {part: weights_fingerprint_of(folder / "pipeline" / part) for part in ("transformer", "vae")}


def change_weights(folder: Path, part: str = "") -> None:
    path = folder / "diffusion_pytorch_model.safetensors"
    changed = {name: value + name.startswith(part) for name, value in load_file(path).items()}
    save_file(changed, path, metadata={"format": "pt"})


@pytest.mark.parametrize(
    ("part", "left_out"),
    [("transformer", {"generation"}), ("vae", {"generation", "reconstruction"}), (None, set())],
)
def test_numbers_and_pictures_are_published_only_with_the_weights_that_they_are_of(tmp_path, caplog, part, left_out):
    folder, out = save_measured_run(tmp_path / "run", generator=PUBLIC, **PUBLIC), tmp_path / "out"
    save_evaluation(folder, {"config": {**PUBLIC, "features": "inception"}, "weights": fingerprints_of(folder)})
    path = folder / "evaluation" / "metrics.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "classes": [{"class": "cat", "class_agreement": 0.5}]}))
    push_script(folder, REPO, "--export_dir", out, "--data_pictures")
    assert caplog.text == ""
    pictures = {"images/nearest.png", "images/sweep.png"}
    assert all((out / name).exists() for name in pictures)
    if part is not None:  # trained further, or another decoder
        change_weights(folder / "pipeline" / part)
    push_script(folder, REPO, "--export_dir", out, "--fp16", "--data_pictures")
    evaluation = json.loads((out / "metrics.json").read_text())["evaluation"] if part != "vae" else {}
    assert {"generation", "reconstruction"} - evaluation.keys() == left_out
    assert ("classes" in evaluation) == ("generation" in evaluation)
    assert "generation" not in evaluation.get("floor", {}) or not left_out
    results = {each.metric_type for each in ModelCard.load(out / "README.md").data.eval_results or []}
    assert results == {"psnr", "gfd_tiny"} - {
        {"generation": "gfd_tiny", "reconstruction": "psnr"}[name] for name in left_out
    }
    assert {name for name in pictures if (out / name).exists()} == (set() if left_out else pictures)
    assert (out / "metrics.json").exists() == (part != "vae")
    assert len(caplog.messages) == bool(left_out)
    assert (
        f"again with `dae-diffusers evaluate --pipeline {folder / 'pipeline'} --dataset_name user/faces --features inception "
        f"--guidance_scales" not in caplog.text
    )
    assert (
        f"with `dae-diffusers evaluate --pipeline {folder}/pipeline --dataset_name user/faces" in caplog.text
    ) == bool(left_out)


def test_numbers_of_a_training_that_went_on_are_not_published(tmp_path):
    """It was finished, went on, and was killed: the result is of the weights before."""
    folder = save_measured_run(tmp_path / "run", generator=PUBLIC, **PUBLIC)
    (folder / "train_dit" / "log.jsonl").write_text(json.dumps({"step": 1500, "validation/gfd_tiny": 9.5}) + "\n")
    (folder / "train_dit" / "grids" / "samples-00001500.png").write_bytes(b"\x89PNG")
    for record, is_published in (({"steps": {}}, True), ({"steps": {}, "unfinished": True}, False)):
        (folder / "train_dit" / "run.json").write_text(json.dumps(record))
        result = read_result(folder)
        assert ("train_dit" in result.metrics) == ("samples.png" in result.pictures) == is_published
        assert any("went on and has not ended" in text for text in result.doubts) != is_published


def test_numbers_of_another_model_are_not_published(tmp_path, caplog):
    """`evaluate --vae` of another model, into the run's folder."""
    folder = save_measured_run(tmp_path / "run", **PUBLIC)
    setting = {"config": {"vae": "stabilityai/sd-vae-ft-mse"}, "weights": {"vae": "0123456789abcdef"}}
    save_evaluation(folder, setting)
    push_script(folder, REPO, "--export_dir", tmp_path / "out")
    assert not (tmp_path / "out" / "metrics.json").exists()
    assert "Nothing was measured" in (tmp_path / "out" / "README.md").read_text()
    (message,) = caplog.messages
    assert f"measured with other weights than those in {folder / 'vae'}" in message and "reconstruction" in message
    assert f"evaluate --vae {folder / 'vae'} --dataset_name user/faces --output_dir {folder / 'evaluation'}`" in message
    save_evaluation(folder, {**setting, "weights": {"vae": weights_fingerprint_of(folder / "vae")}})
    assert "evaluation" in read_result(folder).metrics  # the same weights, from elsewhere


@pytest.mark.parametrize(
    ("measured", "is_published"),
    [
        ("run/vae", True),
        ("/home/me/run/vae", True),
        (None, True),
        ("stabilityai/sd-vae-ft-mse", False),
        ("other/vae", False),
    ],
)
def test_numbers_of_unknown_weights_are_published_if_they_may_be_of_the_run(tmp_path, caplog, measured, is_published):
    folder = save_measured_run(tmp_path / "run", evaluation={"vae": measured}, **PUBLIC)
    result = read_result(folder)
    assert ("evaluation" in result.metrics) == is_published
    assert [("does not tell" in each, "with other weights" in each) for each in result.doubts] == [
        (is_published, not is_published)
    ]


def test_numbers_with_another_guidance_are_not_published(tmp_path):
    """The same transformer, with a weaker one beside it that is no longer there, or was not yet."""
    folder = save_measured_run(tmp_path / "run", generator=PUBLIC, **PUBLIC)
    index = json.loads((folder / "pipeline" / "model_index.json").read_text())
    (folder / "pipeline" / "model_index.json").write_text(json.dumps({**index, "guidance_transformer": [None, None]}))
    save_evaluation(folder, {"weights": fingerprints_of(folder)})
    assert "generation" in read_result(folder).metrics["evaluation"]
    save_evaluation(folder, {"weights": fingerprints_of(folder) | {"guidance_transformer": "0123456789abcdef"}})
    assert "generation" not in read_result(folder).metrics["evaluation"]
    shutil.copytree(folder / "pipeline" / "transformer", folder / "pipeline" / "guidance_transformer")
    guided = {**index, "guidance_transformer": index["transformer"]}
    (folder / "pipeline" / "model_index.json").write_text(json.dumps(guided))
    save_evaluation(folder, {"weights": fingerprints_of(folder)})
    assert "generation" not in read_result(folder).metrics["evaluation"]


def test_numbers_of_a_generator_do_not_go_with_its_autoencoder_alone(tmp_path):
    folder = save_measured_run(tmp_path / "run", generator=PUBLIC, **PUBLIC)
    shutil.copytree(folder / "pipeline" / "vae", folder / "vae")
    save_evaluation(folder, {"weights": fingerprints_of(folder)})
    result = read_result(folder / "vae")
    assert {each.metric for each in measurements(result)} == {"psnr"} and result.doubts == []


def test_samples_and_numbers_of_a_check_are_of_the_weights(tmp_path):
    folder = save_measured_run(tmp_path / "run", generator=PUBLIC, **PUBLIC)
    check = {"class_agreement": 0.5, "weights": fingerprints_of(folder)}
    (folder / "metrics.json").write_text(json.dumps(check))
    result = read_result(folder)
    assert result.metrics["check"] == check and "samples.png" in result.pictures and result.doubts == []
    change_weights(folder / "pipeline" / "transformer")
    result = read_result(folder)
    assert "check" not in result.metrics and "samples.png" not in result.pictures
    assert "Run the script that wrote it again" in result.doubts[0]


@pytest.mark.parametrize("part", ["vae", "transformer"])
def test_what_training_logged_is_published_with_the_weights_that_it_is_of(tmp_path, part):
    """Another decoder or generator that came later was not measured; the best weights are older than the end of the log."""
    folder = save_measured_run(tmp_path / "run", generator={**PUBLIC, "metric_features": "tiny"}, **PUBLIC)
    shutil.copytree(folder / "pipeline" / "vae", folder / "vae")
    (folder / "train_dae" / "log.jsonl").write_text('{"step": 1, "validation/psnr": 20.0}\n')
    rows = [{"step": step, "validation/gfd_tiny": float(step)} for step in (2, 4, 6)]
    (folder / "train_dit" / "log.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    record = {"exported_step": 4, "weights": fingerprints_of(folder)}
    (folder / "train_dit" / "run.json").write_text(json.dumps(record))
    grids = [folder / "train_dit" / "grids" / f"samples-{step:08d}.png" for step in (2, 4, 6)]
    for grid in grids:
        shutil.copy(folder / "samples.png", grid)
    (folder / "samples.png").unlink()
    result = read_result(folder)
    assert {each.metric: each.value for each in measurements(result)} == {"psnr": 20.0, "gfd_tiny": 4.0}
    assert "reconstructions.png" in result.pictures and result.pictures["samples.png"][0] == grids[1]
    assert "those of step 4, whose samples came closest" in make_card(result, REPO).content and result.doubts == []
    del result.scripts["train_dit"].config["metric_features"]
    assert "those of step 4, whose validation loss was lowest" in make_card(result, REPO).content
    grids[1].unlink()
    assert "samples.png" not in read_result(folder).pictures
    shutil.copy(grids[0], grids[1])
    shutil.copy(grids[0], folder / "samples.png")  # as `find-latents` does
    change_weights(folder / "pipeline" / part, "decoder" if part == "vae" else "")
    result = read_result(folder)
    assert [each.metric for each in measurements(result)] == ([] if part == "vae" else ["psnr"])
    assert ("reconstructions.png" in result.pictures) == (part != "vae") and "samples.png" not in result.pictures
    assert "The weights are those of step" not in make_card(result, REPO).content
    (doubt,) = result.doubts
    assert "of other weights" in doubt
    assert f"evaluate --pipeline {folder / 'pipeline'} --dataset_name user/faces" in doubt
    del record["weights"]  # runs of before do not say of which weights their numbers are
    (folder / "train_dit" / "run.json").write_text(json.dumps(record))
    assert "gfd_tiny" in {each.metric for each in measurements(read_result(folder))}


def test_best_validation_of_an_autoencoder_is_published_with_its_weights(tmp_path):
    folder = save_measured_run(tmp_path / "run", **PUBLIC)
    rows = [{"step": step, "validation/psnr": 20.0, "validation/rfd_tiny": float(step)} for step in (1, 3)]
    (folder / "train_dae" / "log.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    (folder / "train_dae" / "run.json").write_text('{"exported_step": 1}')
    grids = folder / "train_dae" / "grids"
    shutil.copy(grids / "reconstruction-stage2-00000001.png", grids / "reconstruction-stage2-00000003.png")
    result = read_result(folder)
    assert {each.metric: each.value for each in measurements(result)} == {"psnr": 20.0, "rfd_tiny": 1.0}
    assert result.pictures["reconstructions.png"][0] == grids / "reconstruction-stage2-00000001.png"
    assert "those of step 1, which reconstructed held-out images best" in make_card(result, REPO).content


def test_autoencoder_that_was_trained_again_does_not_describe_an_older_pipeline(tmp_path):
    folder = save_measured_run(tmp_path / "run", generator=PUBLIC, **PUBLIC)
    shutil.copytree(folder / "pipeline" / "vae", folder / "vae")
    change_weights(folder / "vae", "decoder")
    assert read_result(folder).scripts.keys() == {"train_dae", "train_dit"} and read_result(folder).doubts == []
    change_weights(folder / "vae", "encoder")
    result = read_result(folder)
    assert result.scripts.keys() == {"train_dit"} and "reconstructions.png" not in result.pictures
    assert "train_dae is not published: it trained another encoder" in result.doubts[0]
    assert "train_dae" in read_result(folder / "vae").scripts


def test_second_export_leaves_nothing_of_the_first_that_is_no_longer_published(tmp_path):
    """Private pictures, half-precision weights, stage 1, and the transformer after a prior; but no file of somebody else."""
    folder, out = (
        save_measured_run(tmp_path / "run", generator=PRIVATE, evaluation=PRIVATE, **PRIVATE),
        tmp_path / "out",
    )
    save_autoencoder(folder / "stage1")
    push_script(folder, REPO, "--export_dir", out, "--data_pictures", "--fp16", "--stage1")
    first = {path.relative_to(out).as_posix() for path in out.rglob("*") if path.is_file()}
    strangers = {"images/mine.jpg", "vae/lora.safetensors", "transformer/notes.txt", "stage1/notes.txt", "README.txt"}
    for name in strangers:
        (out / name).touch()
    make_prior_pipeline().save_pretrained(tmp_path / "prior")
    push_script(tmp_path / "prior", REPO, "--export_dir", out, "--no_data_pictures")
    left = {path.relative_to(out).as_posix() for path in out.rglob("*") if path.is_file()}
    push_script(tmp_path / "prior", REPO, "--export_dir", tmp_path / "fresh", "--no_data_pictures")
    fresh = {
        path.relative_to(tmp_path / "fresh").as_posix() for path in (tmp_path / "fresh").rglob("*") if path.is_file()
    }
    harmless = {name for name in first if "/" not in name} - {"metrics.json"}
    assert left == fresh | strangers | harmless
    gone = {"images/reconstructions.png", "images/nearest.png", "stage1/config.json", "training/train_dit.yaml"}
    assert gone <= first - left
    assert {f"{part}/diffusion_pytorch_model.fp16.safetensors" for part in ("vae", "transformer")} <= first - left


def test_component_that_is_a_link_is_published_with_its_files(tmp_path):
    pipeline = save_run(tmp_path / "run", None) / "pipeline"
    before = repository_files(read_result(pipeline), REPO).keys()
    shutil.move(pipeline / "vae", tmp_path / "elsewhere")
    (pipeline / "vae").symlink_to(tmp_path / "elsewhere")
    assert repository_files(read_result(pipeline), REPO).keys() == before
    (tmp_path / "elsewhere").rename(tmp_path / "gone")
    with pytest.raises(UserError, match="has no files in vae, which its model_index.json names"):
        repository_files(read_result(pipeline), REPO)


@pytest.mark.parametrize("flags", [["--revision", "next"], ["--create_pr"]])
@pytest.mark.parametrize("other", [["--export_dir", "out"], ["--stage1"]])
def test_what_is_for_the_main_branch_or_no_branch_is_refused_with_another(tmp_path, flags, other, capsys):
    with pytest.raises(SystemExit):
        push_script(tmp_path, REPO, *other, *flags)
    assert "does not go with `--revision` or `--create_pr`" in capsys.readouterr().err


def test_half_precision_weights_of_a_vqgan_are_those_of_all_its_components(tmp_path):
    make_prior_pipeline().save_pretrained(tmp_path / "pipeline")
    push_script(tmp_path / "pipeline", "user/codes", "--fp16", "--export_dir", tmp_path / "out")
    for name in ("vae/diffusion_pytorch_model", "prior/model"):
        halved, whole = (load_file(tmp_path / "out" / f"{name}{variant}.safetensors") for variant in (".fp16", ""))
        assert halved.keys() == whole.keys() and all(torch.equal(halved[key], whole[key].half()) for key in whole)
    for dtype in (torch.float16, torch.float32):
        pipe = DAEVQGANPipeline.from_pretrained(tmp_path / "out", variant="fp16", dtype=dtype)
        assert pipe.prior.dtype == pipe.vae.dtype == dtype


@pytest.mark.parametrize("part", ["pipeline", "vae"])
def test_what_stands_beside_a_model_is_published_only_if_a_run_left_it(trained, tmp_path, part):
    shutil.copytree(trained / part, tmp_path / part)
    for name, content in {
        "app/config.yaml": "password: hunter2",
        "list/config.yaml": "- hunter2",
        "train_dit/config.yaml": "- hunter2",
        "metrics.json": '{"psnr": 1.0}',
        "evaluation/metrics.json": '{"reconstruction": {"psnr": 2.0}}',
        "samples.png": "not ours",
    }.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(content)
    result = read_result(tmp_path / part)
    assert (result.scripts, result.metrics, result.pictures) == ({}, {}, {})

    shutil.copytree(trained / "train_dae", tmp_path / "train_dae")  # now it is a run, with strangers in it
    result = read_result(tmp_path / part)
    assert result.scripts.keys() == {"train_dae"} and result.metrics["check"] == {"psnr": 1.0}


def card_of(folder: Path, **flags) -> ModelCard:
    """That of an autoencoder trained with these flags and measured meanwhile."""
    save_autoencoder(folder / "vae")
    (folder / "train_dae").mkdir()
    (folder / "train_dae" / "config.yaml").write_text(yaml.safe_dump(flags))
    (folder / "train_dae" / "log.jsonl").write_text('{"step": 1, "validation/psnr": 20.0}\n')
    return make_card(read_result(folder), "user/name")


@pytest.mark.parametrize(
    ("name", "is_id"),
    [
        ("faces", True),
        ("user/faces", True),
        ("/data/private/faces", False),
        ("/data/digits", False),
        ("./faces", False),
    ],
)
def test_only_an_id_on_the_hub_is_named_as_one(tmp_path, name, is_id):
    card = card_of(tmp_path, dataset_name=name)
    assert card.data.datasets == ([name] if is_id else None)
    assert card.data.eval_results[0].dataset_type == (name if is_id else "imagefolder")
    assert "/data" not in str(card) and "UCI" not in str(card)


@pytest.mark.parametrize("split", ["val", None])
def test_split_is_stated_only_if_the_run_recorded_it(tmp_path, split):
    card = card_of(tmp_path, dataset_name="user/faces", train_split="train", validation_split=split)
    assert ModelCard(str(card)).data.eval_results[0].dataset_split == split


def test_split_of_an_evaluation_is_its_own(tmp_path):
    evaluation = {
        "reconstruction": {"psnr": 21.0},
        "generation": [{"gfd_tiny": 7.0}],
        "setting": {"config": {"train_split": "all", "validation_split": "test"}},
    }
    (tmp_path / "evaluation").mkdir()
    (tmp_path / "evaluation" / "metrics.json").write_text(json.dumps(evaluation))
    card = card_of(tmp_path, dataset_name="user/faces", train_split="train", validation_split="val")
    splits = {each.metric_type: each.dataset_split for each in card.data.eval_results}
    assert splits == {"psnr": "test", "gfd_tiny": "all"}


def test_other_pipelines_get_a_card_too(trained, tmp_path):
    folder = tmp_path / "pipeline"
    (folder / "vae").mkdir(parents=True)
    index = {
        "_class_name": "SomeNewPipeline",
        "vae": ["diffusers", "VQModel"],
        "prior": ["some_package.prior", "Prior"],
    }
    (folder / "model_index.json").write_text(json.dumps(index))
    config = {"_class_name": "VQModel", "latent_channels": 4, "num_vq_embeddings": 64, "block_out_channels": [8, 8]}
    (folder / "vae" / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match="prior/some_package.prior.py and pipeline.py"):
        read_result(folder)
    (folder / "prior").mkdir()
    (folder / "prior" / "some_package.prior.py").touch()
    (folder / "pipeline.py").touch()
    with pytest.raises(UserError, match="vae lacks its weights, such as model.safetensors"):
        read_result(folder)
    for name in ("vae", "prior"):
        save_file({"weight": torch.zeros(1)}, folder / name / "model.safetensors")
    text = str(make_card(read_result(folder), "user/codes"))
    assert 'SomeNewPipeline.from_pretrained("user/codes")' in text and "VQModel.from_pretrained" in text
    assert "64 codes" in text and "Nothing was measured" in text


def test_evaluation_comes_before_what_training_logged(trained):
    found = {each.metric: each for each in measurements(read_result(trained))}
    assert found["psnr"].value == 21.5 and "logged_by" not in found["psnr"].setting


@pytest.mark.parametrize(
    ("token", "repo_id", "license", "message"),
    [
        ("", "writer/x", None, "LocalTokenNotFoundError.*hf auth login"),
        ("hf_wrong", "writer/x", None, "Invalid user token"),
        ("hf_writer", "other/x", None, "403"),
        ("hf_writer", "a b", None, "Repo id"),
        ("hf_writer", "writer/x", "my-own", "does not know the license 'my-own'"),
    ],
)
def test_what_the_hub_will_refuse_is_said_before_training(client, monkeypatch, token, repo_id, license, message):
    monkeypatch.setenv("HF_TOKEN", token)
    monkeypatch.setattr(huggingface_hub.constants, "HF_TOKEN_PATH", "no-such-file")
    monkeypatch.setattr(huggingface_hub.constants, "HF_STORED_TOKENS_PATH", "no-such-file")
    with pytest.raises(UserError, match=message):
        check_hub_access(repo_id, license=license)


@pytest.mark.parametrize("status", [429, 500, 503, None])
def test_hub_that_does_not_answer_lets_training_start(client, caplog, status):
    with client.failing("GET", "whoami", status):
        assert check_hub_access("writer/later") == "writer/later"
    assert "does not answer now" in caplog.text


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [("PUT", "/lfs/", None), ("PUT", "/lfs/", 500), ("POST", "/preupload/", 429), ("POST", "objects/batch", 503)],
)
def test_upload_survives_a_fault_that_passes(client, trained, method, path, status):
    repo_id = f"writer/fault-{method}-{status}".lower()
    client.contents.clear()
    with client.failing(method, path, status, times=2):
        push_folder(trained, repo_id)
        assert client.faults[0].times == 0
    pipe = DAEDiTPipeline.from_pretrained(repo_id)
    assert torch.equal(sample(pipe), sample(DAEDiTPipeline.from_pretrained(trained / "pipeline")))


def test_download_that_is_cut_goes_on(client, trained):
    push_folder(trained, "writer/cut")
    with client.failing("GET", "/lfs/", None, times=3):
        pipe = DAEDiTPipeline.from_pretrained("writer/cut")
        assert client.faults[0].times == 0
    assert torch.equal(sample(pipe), sample(DAEDiTPipeline.from_pretrained(trained / "pipeline")))


def test_private_repository_is_there_for_its_owner_alone(client, trained, monkeypatch, tmp_path):
    push_folder(trained / "vae", "writer/secret", private=True)
    assert client.repositories["model", "writer/secret"].private
    for token in ("hf_other", ""):
        monkeypatch.setenv("HF_TOKEN", token)
        with pytest.raises(OSError, match="writer/secret"):
            DAEDiTPipeline.from_pretrained("writer/secret", cache_dir=tmp_path / f"cache{token}")


def test_new_repository_is_as_private_as_its_owner_wants_without_a_flag(client, trained, monkeypatch, caplog):
    monkeypatch.setattr(client, "private_by_default", {"writer"})
    with caplog.at_level(logging.INFO):
        push_script(trained / "vae", "writer/company", "--license", "mit")
    assert client.repositories["model", "writer/company"].private
    assert "will show everybody with access to the repository:" in caplog.text


def test_nothing_goes_to_a_public_repository_that_must_be_private(client, trained):
    HfApi().create_repo("writer/open")
    with pytest.raises(UserError, match="writer/open exists and is public.* Make it private"):
        push_script(trained / "vae", "writer/open", "--license", "mit", "--private")
    with pytest.raises(UserError, match="is public"):
        push_folder(trained / "vae", "writer/open", private=True)
    assert client.files("writer/open") == {}
    client.repositories["model", "writer/open"].private = True
    push_script(trained / "vae", "writer/open", "--license", "mit", "--private")


def test_space_with_another_app_stays(client, tmp_path):
    folder, api = save_run(tmp_path / "run", None), HfApi()
    restart = ("POST", "/api/spaces/writer/own/restart", 200)
    push_script(folder, "writer/own", "--license", "mit", "--space")
    assert restart not in client.requests
    push_script(folder, "writer/own", "--license", "mit", "--space", "--space_id", "own")  # of an earlier push
    assert restart in client.requests
    push_script(folder, "writer/own")
    assert b"[writer/own](https://huggingface.co/spaces/writer/own)" in client.files("writer/own")["README.md"]
    for number, other in enumerate(("app.py", "Dockerfile")):
        theirs = {"repo_id": f"writer/theirs-{number}", "repo_type": "space"}
        api.create_repo(**theirs, space_sdk="gradio")
        api.upload_file(**theirs, path_in_repo=other, path_or_fileobj=b"print(1)")
        with pytest.raises(UserError, match=f"writer/theirs-{number} exists and has another app.*`--space_id`"):
            push_script(folder, f"writer/theirs-{number}", "--license", "mit", "--space")
        assert "README.md" not in api.list_repo_files(**theirs)
        assert "model_index.json" not in api.list_repo_files(f"writer/theirs-{number}")  # said before


def test_space_of_a_private_model_is_private_without_a_flag(client, trained, caplog):
    HfApi().create_repo("writer/hidden", private=True)
    with caplog.at_level(logging.INFO):
        push_script(trained, "writer/hidden", "--license", "mit", "--space")
    assert client.repositories["space", "writer/hidden"].private
    assert "will show everybody with access" in caplog.text and "give the Space a secret HF_TOKEN" in caplog.text
    client.repositories["space", "writer/hidden"].private = False
    with pytest.raises(UserError, match="Space writer/hidden exists and is public, but the model is private"):
        push_script(trained, "writer/hidden", "--license", "mit", "--space")


@pytest.mark.parametrize("status", [500, 403, 413, None])
def test_failed_push_is_one_line_and_can_be_repeated(client, trained, status):
    repo_id = f"writer/repeat-{status}".lower()
    with client.failing("POST", "/commit/", status):
        with pytest.raises(UserError, match="Nothing is lost"):
            push_script(trained, repo_id)
    push_script(trained, repo_id)
    assert "model_index.json" in client.files(repo_id)


def test_hub_that_accepts_and_never_answers_blocks_nothing(client, trained, monkeypatch, caplog, tmp_path):
    monkeypatch.setattr(upload, "CHECK_SECONDS", 0.2)
    monkeypatch.setattr(upload, "UPLOAD_SECONDS", 0.2)
    with socket.create_server(("127.0.0.1", 0)) as deaf:  # connections are made, and nobody reads them
        address = f"http://127.0.0.1:{deaf.getsockname()[1]}"
        monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", address)
        monkeypatch.setattr(huggingface_hub.hf_api.api, "endpoint", address)
        start = time.monotonic()
        assert check_hub_access("writer/deaf") == "writer/deaf"
        assert "does not answer now" in caplog.text
        with pytest.raises(UserError, match="upload to writer/deaf failed .*Nothing is lost"):
            push_script(trained / "vae", "writer/deaf", "--license", "mit")
        background = BackgroundUpload(tmp_path / "hub")
        background.start(3, save=lambda folder: shutil.copytree(trained / "vae", folder), push=upload_to_deaf)
        background.wait()
        assert len(background.failures) == 1 and "step 3" in background.failures[0]
        assert time.monotonic() - start < 20  # of some 3; without limits, never


def upload_to_deaf(folder: Path):
    push_folder(folder, "writer/deaf", license="mit")


@pytest.mark.parametrize(
    ("repo_id", "message"),
    [
        ("https://huggingface.co/writer/animals", "web address .*Pass writer/animals"),
        ("huggingface.co/writer/animals/tree/main", "web address .*Pass writer/animals"),
        ("writer/my animals", "must be `user/name`"),
        ("writer/animals/v2", "must be `user/name`"),
        ("runs/digits/pipeline", "must be `user/name`"),
        ("writer/animals.git", "must be `user/name`"),
        ("-x", "must be `user/name`"),
        ("", "is empty"),
    ],
)
def test_name_that_is_none_is_said_in_one_line(trained, repo_id, message):
    for words in ({"repo_id": repo_id}, {"repo_id": REPO, "space_id": repo_id}):
        with pytest.raises(ConfigError, match=message) as error:
            push.PushConfig(folder=str(trained), **words)
        assert "\n" not in str(error.value)


@pytest.mark.parametrize("words", [{"revision": "v2"}, {"create_pr": True}])
def test_space_is_of_the_model_on_main(trained, words):
    with pytest.raises(ConfigError, match="does not go with `revision` or `create_pr`"):
        push.PushConfig(folder=str(trained), repo_id=REPO, space=True, **words)


def test_result_is_not_exported_into_itself(trained, tmp_path):
    for folder in (trained, trained / "pipeline", trained / "pipeline" / "out", trained / "vae"):
        before = {path: path.stat().st_mtime_ns for path in trained.rglob("*")}
        for source in (trained, trained / "pipeline"):
            with pytest.raises(UserError, match="which contains the result itself"):
                push_script(source, REPO, "--export_dir", folder)
        assert before == {path: path.stat().st_mtime_ns for path in trained.rglob("*")}
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="which is a file"):
        push_script(trained, REPO, "--export_dir", tmp_path / "file")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "README.md").write_text("# My project")
    with pytest.raises(UserError, match="holds README.md, which no export has written"):
        push_script(trained, REPO, "--export_dir", tmp_path / "mine")
    assert [path.name for path in (tmp_path / "mine").iterdir()] == ["README.md"]


def test_nothing_half_written_and_no_part_of_another_pipeline_is_published(client, tmp_path):
    """One folder, first of a diffusion transformer, then of a prior: on disk, and on the Hub."""
    folder = tmp_path / "run"
    save_run(folder, None)
    push_folder(folder, "writer/mixed")
    assert "transformer/config.json" in client.files("writer/mixed")
    make_prior_pipeline().save_pretrained(folder / "pipeline")
    leftovers = [
        "pipeline/prior/.tmpAb12Cd",
        "pipeline/vae/diffusion_pytorch_model.safetensors.tmp",
        "train_dit/checkpoints/tmp-old-checkpoint-00000002/model.safetensors",
        "stage1/.tmpxYz789",
    ]
    for name in leftovers:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).touch()
    (folder / "stage1" / "config.json").write_text("{}")
    push_folder(folder, "writer/mixed")
    files = client.files("writer/mixed")
    parts = {name.split("/")[0] for name in files}
    assert {"model_index.json", "pipeline.py", "prior", "vae", "README.md"} <= parts
    assert not parts & {"transformer", "scheduler"}
    assert not any("tmp" in name for name in files)
    assert upload.stage1_files(folder).keys() == {"stage1/config.json"}
    (folder / "notes.tmpl").touch()
    (folder / ".tmp-mine").mkdir()
    assert len(remove_leftovers(folder)) == 4  # a checkpoint's folder is one
    assert not any((folder / name).exists() for name in leftovers)
    assert (folder / "notes.tmpl").exists() and (folder / ".tmp-mine").exists() and (folder / "stage1").exists()


def test_training_pushes_at_every_save_and_at_the_end(client, trained, image_folder, tmp_path):
    run(
        train_dae,
        TINY_DAE + " --push_to_hub --hub_strategy every_save --hub_license mit",
        train_data_dir=image_folder,
        output_dir=tmp_path / "saves",
    )
    repository = client.repositories["model", "writer/saves"]
    assert list(repository.messages.values()) == ["initial commit", "Step 6", "Upload autoencoder"]
    first, last = (repository.commits[sha] for sha in list(repository.commits)[1:])
    assert "this is step 6" in client.contents[first["README.md"]].decode()
    configs = [json.loads(client.contents[files["vae/config.json"]]) for files in (first, last)]
    assert configs[0]["scaling_factor"] == 1 and "latents_mean" in configs[1]  # no scale that nobody has measured
    run(
        train_dit,
        TINY_DIT + " --push_to_hub --hub_strategy every_save --hub_license mit",
        train_data_dir=image_folder,
        output_dir=tmp_path / "saves",
        vae=tmp_path / "saves" / "vae",
    )
    assert list(repository.messages.values())[-2:] == ["Step 3", "Upload DAEDiTPipeline"]
    assert not (tmp_path / "saves" / "train_dit" / "hub").exists()
    expected = sample(DAEDiTPipeline.from_pretrained(tmp_path / "saves" / "pipeline"))
    assert torch.equal(sample(DAEDiTPipeline.from_pretrained("writer/saves")), expected)
    # Uploading has changed nothing of what is trained.
    for part in ("vae", "pipeline/transformer"):
        saved, plain = (
            load_file(f / part / "diffusion_pytorch_model.safetensors") for f in (tmp_path / "saves", trained)
        )
        assert all(torch.equal(saved[name], plain[name]) for name in plain)


def test_training_ends_well_when_the_hub_fails(client, image_folder, tmp_path, caplog):
    with client.failing("POST", "/commit/", 500):
        run(
            train_dae,
            TINY_DAE + " --push_to_hub --hub_model_id writer/lost --hub_strategy every_save --hub_license mit",
            train_data_dir=image_folder,
            output_dir=tmp_path / "run",
        )
    assert (tmp_path / "run" / "vae" / "config.json").exists()
    assert "an upload while training failed (step 6" in caplog.text
    command = re.search(r"dae-diffusers push (.*)", caplog.text)[1]
    push_script(*command.split())
    assert "vae/config.json" in client.files("writer/lost")


def stop_after(step: int, monkeypatch) -> None:
    """Once the checkpoint of a step is saved, this process gets the signal that precedes the end of a spot instance."""
    save = Checkpointer.save

    def save_and_stop(self, now, **state):
        found = save(self, now, **state)
        if now == step:
            signal.raise_signal(signal.SIGTERM)
        return found

    monkeypatch.setattr(Checkpointer, "save", save_and_stop)


def run_until(step: int, script, flags: str, **more) -> None:
    with pytest.MonkeyPatch.context() as patch, pytest.raises(SystemExit, match="143"):
        stop_after(step, patch)
        run(script, flags, **more)
    AcceleratorState._reset_state(reset_partial_state=True)


def test_run_goes_on_elsewhere_from_its_checkpoint_on_the_hub(client, trained, image_folder, tmp_path, caplog):
    flags = TINY_DAE + " --push_to_hub --hub_model_id writer/moved --hub_strategy checkpoint --hub_license mit"
    flags += " --resume_from_checkpoint latest"
    here, there = tmp_path / "here", tmp_path / "there"
    run_until(3, train_dae, flags, train_data_dir=image_folder, output_dir=here)
    run_until(6, train_dae, flags, train_data_dir=image_folder, output_dir=there)
    shutil.rmtree(there)
    with caplog.at_level(logging.INFO):  # the first machine has an older checkpoint of the run
        run(train_dae, flags, train_data_dir=image_folder, output_dir=here)
    assert "downloading the checkpoint of step 6 from writer/moved (branch checkpoint-train_dae)" in caplog.text
    for name in ("stage1", "vae"):
        assert_same_weights(weights(trained / name), weights(here / name))
    assert log_of(here) == log_of(trained)
    assert not (here / "train_dae" / "hub").exists() and not list(here.rglob(".cache"))
    # The last checkpoint is there too, and nothing else is; the model stands on `main`.
    names = client.files("writer/moved", revision="checkpoint-train_dae").keys() - {".gitattributes"}
    assert {Path(name).parts[0] for name in names} == {"train_dae", "stage1"}
    found = {Path(name).parts[2] for name in names if "checkpoints" in name}
    assert found == {"checkpoint-00000008"} and not any(name.endswith(".png") for name in names)
    repository = client.repositories["model", "writer/moved"]
    assert repository.history("checkpoint-train_dae") == ["Checkpoint of step 8"]
    assert repository.history("main") == ["Upload autoencoder", "initial commit"]


def test_all_that_a_generator_needs_goes_along_and_tells_nothing_of_the_machine(
    client, trained, image_folder, tmp_path, caplog
):
    flags = (
        TINY_DIT + " --export best --autoguidance_steps 2 --post_hoc_ema --post_hoc_ema_steps 2 --validation_steps 2"
    )
    more = {"train_data_dir": image_folder, "vae": trained / "vae"}
    for name in ("plain", "here", "there"):  # the same pipeline lies elsewhere on each machine
        shutil.copytree(trained / "pipeline", tmp_path / name / "start")
    run(
        train_dit,
        flags,
        output_dir=tmp_path / "plain/run",
        pretrained_model_name_or_path=tmp_path / "plain/start",
        **more,
    )
    flags += " --push_to_hub --hub_model_id writer/generator --hub_strategy checkpoint --hub_license mit"
    flags += " --resume_from_checkpoint latest"
    for name, step in (("here", 3), ("there", None)):
        places = {"output_dir": tmp_path / name / "run", "pretrained_model_name_or_path": tmp_path / name / "start"}
        if step is None:
            run(train_dit, flags, **places, **more)
        else:
            run_until(step, train_dit, flags, **places, **more)
    published = client.files("writer/generator", revision="checkpoint-train_dit")
    kinds = {Path(name).parts[1] for name in published if name != ".gitattributes"}
    assert kinds == {"best", "checkpoints", "guidance_transformer", "log.jsonl", "post_hoc_ema", "run.json"}
    secrets = [str(tmp_path), str(trained.parent), str(image_folder.parent), os.path.expanduser("~") + "/", "hf_writer"]
    for name, content in published.items():
        assert not [secret for secret in secrets if secret.encode() in content], name
    plain, moved = (tmp_path / name / "run" for name in ("plain", "there"))
    assert log_of(moved, "train_dit") == log_of(plain, "train_dit")
    assert "begins again" not in caplog.text
    for name in ("pipeline", "train_dit/post_hoc_ema"):
        files = sorted(path.relative_to(plain) for path in (plain / name).rglob("*.safetensors"))
        assert len(files) == 3
        assert all(
            torch.equal(value, load_file(moved / path)[key])
            for path in files
            for key, value in load_file(plain / path).items()
        )


def checkpoints_on_hub(folder: Path, repo_id: str) -> HubCheckpoints:
    """Of a run that trains nothing."""
    publisher = Publisher(HubConfig(push_to_hub=True, hub_model_id=repo_id), folder, folder / "train_dit")
    return HubCheckpoints(publisher, Checkpointer(Accelerator(cpu=True), folder / "train_dit" / "checkpoints"))


def save(folder: Path, on_hub: HubCheckpoints, step: int) -> Path:
    (folder / "train_dit").mkdir(parents=True, exist_ok=True)
    with (folder / "train_dit" / "log.jsonl").open("a") as file:
        file.write(f'{{"step": {step}}}\n')
    return on_hub.checkpointer.save(step)


def test_upload_of_a_checkpoint_that_fails_is_said_once_and_made_up_for(client, tmp_path, caplog):
    on_hub = checkpoints_on_hub(tmp_path, "writer/failing")
    on_hub.fetch(None)
    with client.failing("POST", "/commit/checkpoint-train_dit", 500):
        for step in (1, 2):
            on_hub.push(save(tmp_path, on_hub, step), step)
            on_hub.publisher.background.wait()
    assert caplog.text.count("an upload while training failed (step 1: ") == caplog.text.count("failed") == 1
    last = save(tmp_path, on_hub, 3)
    with client.lock:  # the Hub is slow
        on_hub.push(last, 3)
        (tmp_path / "train_dit" / "log.jsonl").write_text(
            ""
        )  # a run goes on, and its checkpoints give way to newer ones
        shutil.rmtree(last)
        on_hub.push(save(tmp_path, on_hub, 4), 4)  # not piled up
    on_hub.publisher.background.wait()
    assert client.files("writer/failing", revision="checkpoint-train_dit")["train_dit/log.jsonl"].count(b"step") == 3
    on_hub.finish()
    with client.failing("POST", "/super-squash/", 500):
        on_hub.push(save(tmp_path, on_hub, 5), 5)
        on_hub.finish()
    assert client.repositories["model", "writer/failing"].history("checkpoint-train_dit") == [
        "Checkpoint of step 5",
        "Checkpoint of step 4",
    ]
    assert not (tmp_path / "train_dit" / "hub").exists() and not client.files("writer/failing")
    with client.failing("POST", "/commit/checkpoint-train_dit", 500):
        on_hub.push(save(tmp_path, on_hub, 6), 6)
        on_hub.finish()
    assert "the checkpoint of step 6 is not in writer/failing (branch checkpoint-train_dit) (step 6: " in caplog.text


def test_checkpoint_on_the_hub_is_neither_replaced_by_another_run_nor_used_if_damaged(client, tmp_path, caplog):
    caplog.set_level(logging.INFO)
    first, other = (checkpoints_on_hub(tmp_path / name, "writer/kept") for name in ("first", "other"))
    other.fetch("latest")
    assert "writer/kept (branch checkpoint-train_dit) has no checkpoint" in caplog.text
    first.push(save(tmp_path / "first", first, 3), 3)
    first.finish()
    files = client.files("writer/kept", revision="checkpoint-train_dit")
    with pytest.raises(
        UserError, match=r"has the checkpoint of step 3, which this run would replace.*`resume_from_checkpoint latest`"
    ):
        other.fetch(None)
    with (
        client.failing("GET", "/revision/checkpoint-", 503),
        pytest.raises(UserError, match="cannot be read .*Give the same command again"),
    ):
        other.fetch("latest")
    with (
        client.failing("GET", "/resolve/.*random", 503),
        pytest.raises(UserError, match="cannot be downloaded .*Give the same command again"),
    ):
        other.fetch("latest")
    checkpoint = save(tmp_path / "other", other, 1)
    with pytest.raises(
        UserError, match=r"has a checkpoint of another run, of step 3.*hf repos branch delete writer/kept"
    ):
        other.fetch(str(checkpoint))
    other.push(checkpoint, 1)  # the Hub could not be read at the start
    other.publisher.background.wait()
    assert "has a checkpoint of another run" in other.publisher.background.failures[0]
    assert client.files("writer/kept", revision="checkpoint-train_dit") == files
    with client.failing(
        "GET", "/revision/checkpoint-", 503
    ):  # a run that goes on from its own folder does not depend on the Hub
        other.fetch("latest")
    assert "cannot be read now" in caplog.text
    last = tmp_path / "last"
    (last / "train_dit").mkdir(parents=True)
    name = "train_dit/checkpoints/checkpoint-00000003/"
    for damage, problem in (("random_states_0.pkl", "is missing"), ("checkpoint.json", "cannot be read")):
        HfApi().upload_file(
            path_or_fileobj=b"[", path_in_repo=name + damage, repo_id="writer/kept", revision="checkpoint-train_dit"
        )
        if problem == "is missing":
            HfApi().delete_file(name + damage, "writer/kept", revision="checkpoint-train_dit")
        with pytest.raises(UserError, match=f"is damaged: .*{problem}.*hf repos branch delete"):
            checkpoints_on_hub(last, "writer/kept").fetch("latest")
    assert not list(last.rglob("*.jsonl")) and not list(last.rglob("*.json"))


def test_upload_in_the_background_never_makes_training_wait(tmp_path):
    upload, released, pushed = BackgroundUpload(tmp_path / "hub"), threading.Event(), []

    def slow_push(folder):
        released.wait(30)
        pushed.append((folder / "step").read_text())

    for step in (1, 2, 3):
        upload.start(
            step,
            save=lambda folder, step=step: (folder.mkdir(), (folder / "step").write_text(str(step))),
            push=slow_push,
        )
    assert pushed == []
    released.set()
    upload.wait()
    assert pushed == ["1"] and upload.failures == []

    upload.start(4, save=lambda folder: folder.mkdir(), push=lambda folder: 1 / 0)
    upload.wait()
    assert upload.failures == ["step 4: ZeroDivisionError: division by zero"]


def test_webdataset_of_the_hub_is_read_whatever_the_suffixes_of_its_pictures(client, tmp_path, monkeypatch):
    """`datasets` would make a column of each suffix, and leave half of the rows empty."""
    for shard, suffix in enumerate(("png", "jpg")):
        with tarfile.open(tmp_path / f"{shard}.tar", "w") as archive:
            for number in range(3):
                Image.new("L", (8, 8), 40 * number).save(tmp_path / f"v1.{number}.{suffix}")
                archive.add(tmp_path / f"v1.{number}.{suffix}", f"v1.{number}.{suffix}")
    huggingface_hub.create_repo("writer/shards", repo_type="dataset")
    huggingface_hub.upload_folder(
        repo_id="writer/shards", repo_type="dataset", folder_path=tmp_path, allow_patterns="*.tar"
    )
    monkeypatch.setattr("datasets.config.HF_ENDPOINT", client.url)
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", False)
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "datasets")
    train, validation = load_images(DataConfig(dataset_name="writer/shards", resolution=8, image_channels=1))
    values = [images[n]["pixel_values"][0, 0, 0] for images in (train, validation) for n in range(len(images))]
    assert sorted(round(float(value * 127.5 + 127.5)) for value in values) == [0, 0, 40, 40, 80, 80]


@pytest.mark.parametrize(
    ("folder", "shown"), [("../private/cats", "cats"), ("cats", "cats"), ("cats/", "cats"), (".", ".")]
)
def test_card_names_a_folder_without_its_path(folder, shown):
    script = Script(Path("train_dae"), {"train_data_dir": folder, "resolution": 32}, {}, {})
    assert _data_description(script)["name"] == f"images of the author ({shown})"


def test_card_says_how_to_train_the_model_further(trained):
    text = str(make_card(read_result(trained), "user/model", fp16=True))
    assert "train-dit --pretrained_model_name_or_path user/model --vae user/model" in text
    assert "train-dae --stage 2 --pretrained_model_name_or_path user/model" in text and 'variant="fp16"' in text
    text = str(make_card(read_result(trained / "vae"), "user/model"))
    assert "train-dae --stage 2" in text and "train-dit --pretrained" not in text and 'variant="fp16"' not in text
