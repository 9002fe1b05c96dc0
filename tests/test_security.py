"""Files from strangers: nothing in them is executed, nothing is written outside of the output folder, and a line says so."""

import ast
import contextlib
import io
import json
import os
import pickle
import shutil
import struct
import tarfile
import zipfile
from pathlib import Path

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from models import make_autoencoder, make_vq_model, save_backbone
from PIL import Image
from safetensors.torch import load_file, save_file
from scripts import BARE_DAE, BARE_DIT, in_child, start

import dae_diffusers.pipelines
from dae_diffusers import DAEDiTPipeline, DAEDiTTransformer2DModel
from dae_diffusers.errors import UserError
from dae_diffusers.latents.cache import CachedLatents
from dae_diffusers.store import cache_json
from dae_diffusers.training import cache_latents, evaluate, train_dae, train_dit, train_vqgan_prior
from dae_diffusers.vision import load_vision_model

FLAGS = {
    train_dae: BARE_DAE.replace("_steps 4", "_steps 1"),
    train_dit: BARE_DIT,
    cache_latents: "--resolution 16 --shard_size 7",
    evaluate: "--resolution 16 --num_inference_steps 1 --num_images 2 --validation_fraction 0.5",
    train_vqgan_prior: "--resolution 16 --num_layers 1 --num_attention_heads 2 --attention_head_dim 8 --max_train_steps 1",
}


class Evil:
    """Leaves a file when it is unpickled."""

    def __reduce__(self):
        return Path.touch, (Path("hacked"),)


EVIL = "import pathlib\npathlib.Path('hacked').touch()\n"


@pytest.fixture(scope="module")
def places(tmp_path_factory):
    root = tmp_path_factory.mktemp("places")
    autoencoder = make_autoencoder("none").to_diffusers()
    autoencoder.save_pretrained(root / "vae")
    make_vq_model("vq").to_diffusers().save_pretrained(root / "vq")
    transformer = DAEDiTTransformer2DModel(
        sample_size=8, in_channels=3, num_layers=1, num_attention_heads=2, attention_head_dim=8
    )
    DAEDiTPipeline(transformer, autoencoder, FlowMatchEulerDiscreteScheduler()).save_pretrained(root / "pipeline")
    save_backbone(root / "features", "resnet")
    return root


@pytest.fixture(autouse=True)
def watched_folder(tmp_path, monkeypatch):
    """The working directory, deep enough that `../..` stays inside of `tmp_path`; nothing called `hacked` may appear."""
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache" / "datasets"))
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache" / "datasets")
    folder = tmp_path / "a" / "b" / "c"
    folder.mkdir(parents=True)
    monkeypatch.chdir(folder)
    yield folder
    assert not [path for path in tmp_path.rglob("*hacked*")]


def attempt(script, **options) -> tuple[int, str]:
    """Runs a script; it must end well, or with one line."""
    code, text = in_child(lambda: start(FLAGS[script], script=script, **options))
    errors = [line for line in text.splitlines() if "error:" in line]
    assert (code, len(errors)) in ((0, 0), (1, 1)) and "Traceback" not in text, text
    return code, errors[0] if errors else text


def png(shade: int) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (20, 20), (shade, 0, 0)).save(buffer, "png")
    return buffer.getvalue()


@pytest.mark.parametrize("kind", ["zip", "tar"])
@pytest.mark.parametrize("flag", ["train_data_dir", "dataset_name"])
def test_members_of_an_archive_stay_inside(kind, flag, tmp_path):
    names = ["0.png", "1.png", "../../../hacked.png", f"{tmp_path}/hacked.png", "link/hacked.png"]
    (tmp_path / "images").mkdir()
    archive = tmp_path / "images" / f"images.{kind}"
    if kind == "zip":
        with zipfile.ZipFile(archive, "w") as file:
            for number, name in enumerate(names):
                file.writestr(name, png(number))
    else:
        with tarfile.open(archive, "w") as file:
            link = tarfile.TarInfo("link")
            link.type, link.linkname = tarfile.SYMTYPE, str(tmp_path)
            file.addfile(link)
            for number, name in enumerate(names):
                member = tarfile.TarInfo(name)
                member.size = len(png(number))
                file.addfile(member, io.BytesIO(png(number)))
    attempt(train_dae, **{flag: tmp_path / "images", "output_dir": tmp_path / "run"})
    outside = [path for path in tmp_path.iterdir() if path.name not in ("a", "cache", "images", "run")]
    shutil.rmtree(tmp_path / "cache", ignore_errors=True)  # members may be unpacked there, whatever they are called
    assert not outside


@pytest.mark.parametrize("target", ["/etc/passwd", "/dev/zero", "nowhere", "loop.png", "."])
def test_links_in_an_image_folder_are_images_or_named(target, tmp_path):
    (tmp_path / "images").mkdir()
    for number in range(3):
        (tmp_path / "images" / f"{number}.png").write_bytes(png(number))
    (tmp_path / "images" / "loop.png").symlink_to(target)
    code, text = attempt(train_dae, train_data_dir=tmp_path / "images", output_dir=tmp_path / "run")
    assert "root:" not in text


def safetensors_file(header: bytes, data: bytes = b"", length: int | None = None) -> bytes:
    return struct.pack("<Q", len(header) if length is None else length) + header + data


ENTRY = {"dtype": "F32", "shape": [4], "data_offsets": [0, 16]}
MALICIOUS = {
    "endless header": safetensors_file(b"{}", length=2**63),
    "long header": safetensors_file(b"{}", length=10**9),
    "nested header": safetensors_file(b'{"a":' * 100000 + b"1" + b"}" * 100000),
    "huge shape": safetensors_file(json.dumps({"a": {**ENTRY, "shape": [2**62, 2**62]}}).encode(), bytes(16)),
    "negative shape": safetensors_file(json.dumps({"a": {**ENTRY, "shape": [-4]}}).encode(), bytes(16)),
    "offsets outside": safetensors_file(json.dumps({"a": {**ENTRY, "data_offsets": [0, 2**40]}}).encode(), bytes(16)),
    "offsets reversed": safetensors_file(json.dumps({"a": {**ENTRY, "data_offsets": [16, 0]}}).encode(), bytes(16)),
    "overlap": safetensors_file(json.dumps({"a": ENTRY, "b": ENTRY}).encode(), bytes(16)),
    "name of a path": safetensors_file(json.dumps({"../../hacked": ENTRY}).encode(), bytes(16)),
    "other dtype": safetensors_file(json.dumps({"a": {**ENTRY, "dtype": "OBJ"}}).encode(), bytes(16)),
    "pickle": pickle.dumps({"a": 1}),
}


def test_no_other_program_reads_a_picture(tmp_path, monkeypatch):
    """Pillow hands PostScript to Ghostscript, whatever the file is called."""
    called = tmp_path / "called"
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "gs").write_text(f"#!/bin/sh\ntouch {called}\n")
    (tmp_path / "bin" / "gs").chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path / "bin"), prepend=os.pathsep)
    monkeypatch.setattr("PIL.EpsImagePlugin.gs_binary", None)  # looks for it again
    content = io.BytesIO()
    Image.new("RGB", (20, 20)).save(content, "eps")
    with contextlib.suppress(OSError, ValueError):
        Image.open(content).load()
    assert called.exists()
    called.unlink()
    (tmp_path / "images").mkdir()
    for number in range(3):
        (tmp_path / "images" / f"{number}.png").write_bytes(content.getvalue())
    code, line = attempt(train_dae, train_data_dir=tmp_path / "images", output_dir=tmp_path / "run")
    assert code == 1 and "it is not a picture in a supported format" in line and not called.exists()


@pytest.mark.parametrize("content", MALICIOUS.values(), ids=MALICIOUS)
def test_malicious_safetensors_are_refused_wherever_they_are_read(content, places, image_folder, tmp_path):
    options = {"train_data_dir": image_folder, "output_dir": tmp_path / "run"}
    shutil.copytree(places / "vae", tmp_path / "vae")
    (tmp_path / "vae" / "diffusion_pytorch_model.safetensors").write_bytes(content)
    code, line = attempt(train_dit, vae=tmp_path / "vae", **options)
    assert code == 1 and "is not an autoencoder that can be loaded" in line

    shutil.copytree(places / "pipeline", tmp_path / "pipeline")
    (tmp_path / "pipeline" / "transformer" / "diffusion_pytorch_model.safetensors").write_bytes(content)
    code, line = attempt(evaluate, pipeline=tmp_path / "pipeline", features=places / "features", **options)
    assert code == 1 and "cannot be loaded" in line

    (tmp_path / "codes").mkdir()
    (tmp_path / "codes" / "train.safetensors").write_bytes(content)
    code, line = attempt(train_vqgan_prior, vae=places / "vq", code_cache=tmp_path / "codes", **options)
    assert code == 1 and "is not a file of codes, or is damaged" in line

    shutil.copytree(places / "features", tmp_path / "features")
    (tmp_path / "features" / "model.safetensors").write_bytes(content)
    code, line = attempt(evaluate, vae=places / "vae", features=tmp_path / "features", **options)
    assert code == 1 and "cannot be loaded" in line or "lacks weights" in line

    code, line = attempt(cache_latents, vae=places / "vae", **{**options, "output_dir": tmp_path / "latents"})
    assert code == 0, line
    shard = tmp_path / "latents" / "train" / "shard-00001.safetensors"
    shard.write_bytes(content)
    code, line = attempt(train_dit, vae=places / "vae", latent_cache=tmp_path / "latents", output_dir=tmp_path / "dit")
    assert code == 1 and str(shard) in line


@pytest.mark.parametrize("name", ["../../hacked.safetensors", "/hacked.safetensors", "shard-00001.safetensors/../x"])
def test_manifest_cannot_lead_out_of_its_folder(name, places, image_folder, tmp_path):
    options = {"train_data_dir": image_folder, "output_dir": tmp_path / "latents"}
    attempt(cache_latents, vae=places / "vae", **options)
    path = tmp_path / "latents" / "train" / "manifest.json"
    kept = json.loads(path.read_text())
    more = {"latent_cache": tmp_path / "latents", "output_dir": tmp_path / "run"}
    path.write_text(json.dumps({**kept, "values": {**kept["values"], "shards": {name: {}}}}))
    code, line = attempt(train_dit, vae=places / "vae", **more)
    assert code == 1 and "manifest.json is damaged" in line
    code, text = attempt(cache_latents, vae=places / "vae", **options)
    assert code == 0 and "manifest.json is damaged" in text and json.loads(path.read_text()) == kept
    cache_json(
        path, {**kept["values"], "shards": {name: {}}}, kept["of"]
    )  # with a right checksum: no name in it is read
    CachedLatents(path.parent)
    for values in ({"shard_size": 10**12}, {"latent_shape": [2**40] * 3}):
        cache_json(path, {**kept["values"], **values}, kept["of"])
        with pytest.raises(UserError, match="shard-00000.safetensors"):
            CachedLatents(path.parent)


def test_links_in_a_cache_are_not_written_through(places, image_folder, tmp_path):
    folder = tmp_path / "latents" / "train"
    folder.mkdir(parents=True)
    outside = tmp_path / "outside"
    outside.write_text("mine")
    for name in ("manifest.json.tmp", "shard-00000.safetensors.there-1.tmp", "shard-00001.safetensors"):
        (folder / name).symlink_to(outside)
    options = {"train_data_dir": image_folder, "output_dir": tmp_path / "latents"}
    code, text = attempt(cache_latents, vae=places / "vae", **options)
    assert code == 0, text
    assert outside.read_text() == "mine" and not (folder / "shard-00001.safetensors").is_symlink()


def test_autoencoder_that_lacks_a_weight_is_refused(places, image_folder, tmp_path):
    shutil.copytree(places / "vae", tmp_path / "vae")
    path = tmp_path / "vae" / "diffusion_pytorch_model.safetensors"
    tensors = load_file(path)
    del tensors["decoder.conv_out.bias"]
    save_file(tensors, path)
    options = {"train_data_dir": image_folder, "output_dir": tmp_path / "run"}
    code, line = attempt(evaluate, vae=tmp_path / "vae", **options)
    assert code == 1 and "1 weights of its AutoencoderKL are missing, such as decoder.conv_out.bias" in line


def test_code_in_a_pipelines_folder_is_not_run(places, image_folder, tmp_path):
    options = {"train_data_dir": image_folder, "features": places / "features"}
    for number, entry in enumerate((["evil", "DAEDiTTransformer2DModel"], ["os", "system"], ["transformer", "Evil"])):
        folder = tmp_path / f"pipeline{number}"
        shutil.copytree(places / "pipeline", folder)
        for path in (
            folder / "pipeline.py",
            folder / "evil.py",
            *(folder / "transformer" / f"{name}.py" for name in entry),
        ):
            path.write_text(EVIL)
        index = json.loads((folder / "model_index.json").read_text())
        index["transformer"] = entry
        index["_class_name"] = ["pipeline", "Evil"] if number == 2 else "DAEDiTPipeline"
        (folder / "model_index.json").write_text(json.dumps(index))
        attempt(evaluate, pipeline=folder, output_dir=tmp_path / f"run{number}", **options)


@pytest.mark.parametrize("name", ["config.json", "preprocessor_config.json"])
def test_code_of_a_feature_extractor_is_not_run(name, places, image_folder, tmp_path):
    shutil.copytree(places / "features", tmp_path / "features")
    config = json.loads((tmp_path / "features" / name).read_text())
    classes = ("AutoConfig", "AutoModel", "AutoImageProcessor", "AutoModelForImageClassification")
    config |= {"auto_map": {class_name: "evil.Evil" for class_name in classes}, "model_type": "evil"}
    (tmp_path / "features" / name).write_text(json.dumps(config))
    (tmp_path / "features" / "evil.py").write_text(EVIL)
    options = {"train_data_dir": image_folder, "vae": places / "vae", "output_dir": tmp_path / "run"}
    attempt(evaluate, features=tmp_path / "features", **options)


def test_pickled_weights_of_a_vision_model_are_tensors_or_refused(places, image_folder, tmp_path):
    shutil.copytree(places / "features", tmp_path / "features")
    weights, pickled = tmp_path / "features" / "model.safetensors", tmp_path / "features" / "pytorch_model.bin"
    tensors = load_file(weights)
    weights.unlink()
    torch.save(tensors, pickled)
    state = load_vision_model(str(tmp_path / "features"))[0].state_dict()
    assert all(torch.equal(state[name], value) for name, value in tensors.items())
    os.truncate(pickled, 1000)
    with pytest.raises(UserError, match="cannot be loaded: PytorchStreamReader failed"):
        load_vision_model(str(tmp_path / "features"))
    torch.save({**tensors, "code": Evil()}, pickled)
    options = {"train_data_dir": image_folder, "vae": places / "vae", "output_dir": tmp_path / "run"}
    code, line = attempt(evaluate, features=tmp_path / "features", **options)
    assert code == 1 and "its weights are a pickle with more in it than tensors" in line


def test_remote_code_is_asked_for_nowhere_but_in_the_space():
    """A Space loads the repository that it was made for, with the code that was uploaded with it."""
    package = Path(dae_diffusers.__file__).parent
    asking = []
    for folder in (package, Path(train_dae.__file__).parent, Path(dae_diffusers.pipelines.__path__[0])):
        for path in folder.rglob("*.py"):
            for node in ast.walk(ast.parse(path.read_text())):
                is_flag = isinstance(node, ast.keyword) and node.arg == "trust_remote_code"
                if is_flag and not (isinstance(node.value, ast.Constant) and node.value.value is False):
                    asking.append(str(path.relative_to(package)))
    assert set(asking) == {os.path.join("hub", "space", "app.py")}
