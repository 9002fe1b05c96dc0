"""The latent cache and the evaluation, killed anywhere and run again, end as if nothing had happened, and redo nothing."""

import json
import os
import shutil
import signal
import time
from argparse import Namespace
from collections import Counter
from functools import wraps
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from diffusers import FlowMatchEulerDiscreteScheduler
from models import make_autoencoder, save_autoencoder, save_backbone
from scripts import in_child, in_two_processes, start

from dae_diffusers import DAEDiTPipeline, DAEDiTTransformer2DModel, store
from dae_diffusers.latents import cache
from dae_diffusers.locks import FolderLock
from dae_diffusers.metrics import evaluation, statistics
from dae_diffusers.metrics.sampling import SampleSettings, generation_inputs
from dae_diffusers.metrics.statistics import FeatureStatistics
from dae_diffusers.store import fingerprint_of_json
from dae_diffusers.training import cache_latents, evaluate, train_dit

CACHE = "--resolution 16 --batch_size 4 --shard_size 7 --random_flip"


def die_at(module, name: str, is_due) -> None:
    """From now on this process kills itself instead of the first call of `module.name` for which `is_due(*args)`."""
    original = getattr(module, name)

    @wraps(original)
    def call_or_die(*args, **kwargs):
        if is_due(*args):
            os.kill(os.getpid(), signal.SIGKILL)
        return original(*args, **kwargs)

    setattr(module, name, call_or_die)


def nth_call(number: int):
    counter = Counter()

    def is_due(*args) -> bool:
        counter["calls"] += 1
        return counter["calls"] == number

    return is_due


def contents(folder: Path) -> dict[str, bytes]:
    """Of every file, by name."""
    return {
        str(path.relative_to(folder)): path.read_bytes().replace(bytes(folder), b"FOLDER")
        for path in folder.rglob("*")
        if path.is_file() and path.name not in (".lock", ".owner")
    }


@pytest.fixture(scope="module")
def vae(tmp_path_factory):
    return save_autoencoder(tmp_path_factory.mktemp("vae"))


@pytest.fixture(scope="module")
def whole_cache(vae, image_folder, tmp_path_factory):
    folder = tmp_path_factory.mktemp("cache")
    make_cache(folder, vae, image_folder)
    return folder


def make_cache(folder: Path, vae: Path, image_folder: Path, before=lambda: None) -> tuple[int, str]:
    def action():
        before()
        start(CACHE, script=cache_latents, vae=vae, train_data_dir=image_folder, output_dir=folder)

    return in_child(action)


@pytest.mark.parametrize(
    ("module", "name", "is_due"),
    [
        (cache, "encode_moments", lambda: nth_call(5)),  # in the middle of a shard
        (cache, "cache_tensors", lambda: nth_call(2)),  # between two shards
        (store, "_flush_and_rename", lambda: lambda _, path: path.name == "shard-00002.safetensors"),
        (cache, "cache_json", lambda: nth_call(2)),  # all shards of the first split, no manifest
        (cache, "cache_json", lambda: nth_call(3)),  # the first split is whole, the second not begun
        (cache, "cache_json", lambda: nth_call(4)),  # only the last manifest is missing
    ],
)
def test_killed_cache_goes_on_and_encodes_nothing_twice(module, name, is_due, whole_cache, vae, image_folder, tmp_path):
    code, text = make_cache(tmp_path, vae, image_folder, lambda: die_at(module, name, is_due()))
    assert code == -signal.SIGKILL, text
    done = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("shard-*.safetensors")}
    code, text = make_cache(tmp_path, vae, image_folder)
    assert code == 0, text
    assert contents(tmp_path) == contents(whole_cache)
    assert done == {path: path.stat().st_mtime_ns for path in done}


def test_finished_cache_is_left_alone(whole_cache, vae, image_folder):
    before = {path: path.stat().st_mtime_ns for path in whole_cache.rglob("shard-*")}
    code, text = make_cache(whole_cache, vae, image_folder, lambda: die_at(cache, "encode_moments", nth_call(1)))
    assert code == 0, text
    assert before and before == {path: path.stat().st_mtime_ns for path in before}


def test_two_processes_make_the_cache_that_one_does(whole_cache, vae, image_folder, tmp_path):
    options = {"vae": vae, "train_data_dir": image_folder, "output_dir": tmp_path}
    for code, text in in_two_processes(lambda: start(CACHE, script=cache_latents, **options)):
        assert code == 0, text
    assert contents(tmp_path) == contents(whole_cache)


def train_on(folder: Path, vae: Path, output: Path) -> tuple[int, str]:
    flags = "--model DiT-Ti/2 --num_layers 1 --max_train_steps 1 --train_batch_size 4 --num_sample_images 1"
    return in_child(lambda: start(flags, script=train_dit, vae=vae, latent_cache=folder, output_dir=output))


@pytest.mark.parametrize("damage", ["a byte", "truncated", "missing"])
def test_damaged_shard_is_named_and_made_anew(damage, whole_cache, vae, image_folder, tmp_path):
    shutil.copytree(whole_cache, tmp_path / "cache")
    shard = tmp_path / "cache" / "train" / "shard-00001.safetensors"
    content = bytearray(shard.read_bytes())
    content[-100] ^= 1
    shard.unlink()
    if damage != "missing":
        shard.write_bytes(content if damage == "a byte" else content[:-5])
    code, text = train_on(tmp_path / "cache", vae, tmp_path / "run")
    errors = [line for line in text.splitlines() if "error:" in line]
    assert code == 1 and len(errors) == 1 and "Traceback" not in text, text
    assert str(shard) in errors[0] and "Run the command that made the cache again" in errors[0]
    kept = tmp_path / "cache" / "train" / "shard-00000.safetensors"
    before = kept.stat().st_mtime_ns
    code, text = make_cache(tmp_path / "cache", vae, image_folder)
    assert code == 0, text
    assert contents(tmp_path / "cache") == contents(whole_cache) and kept.stat().st_mtime_ns == before
    code, text = train_on(tmp_path / "cache", vae, tmp_path / "run")
    assert code == 0, text


def test_second_cache_in_the_same_folder_is_refused(vae, image_folder, tmp_path):
    owner = tmp_path / "lock" / ".owner"
    owner.parent.mkdir()

    def hold():
        FolderLock(owner.parent)
        signal.pause()

    holder = in_child(hold, wait=False)
    while not owner.exists() or not owner.read_text():
        time.sleep(0.01)
    code, text = make_cache(tmp_path / "lock", vae, image_folder)
    os.kill(holder, signal.SIGKILL)
    os.waitpid(holder, 0)
    assert code == 1 and f"in use by another run (process {holder} " in text, text


EVALUATE = (
    "--dataset_name digits --image_channels 1 --resolution 16 --num_images 300 --max_train_samples 300 "
    "--guidance_scales 1 2 --num_inference_steps 1 --set_defaults"
)


@pytest.fixture(scope="module")
def to_evaluate(tmp_path_factory):
    """A pipeline for digits and a network for features."""
    folder = tmp_path_factory.mktemp("to_evaluate")
    torch.manual_seed(0)
    transformer = DAEDiTTransformer2DModel(
        sample_size=8, in_channels=3, num_layers=1, num_attention_heads=2, attention_head_dim=8, num_classes=10
    )
    for parameter in transformer.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    vae = make_autoencoder("none", in_channels=1, out_channels=1).to_diffusers()
    labels = {number: str(number) for number in range(10)}
    DAEDiTPipeline(transformer, vae, FlowMatchEulerDiscreteScheduler(), labels).save_pretrained(folder / "pipeline")
    return {"pipeline": folder / "pipeline", "features": save_backbone(folder / "extractor", "classifier")}


def run_evaluation(folder: Path, to_evaluate: dict, before=lambda: None) -> tuple[int, str]:
    def action():
        before()
        statistics.SAVE_SECONDS = 0
        start(EVALUATE, script=evaluate, output_dir=folder, more_features="pixels", **to_evaluate)

    return in_child(action)


@pytest.fixture(scope="module")
def whole_evaluation(to_evaluate, tmp_path_factory):
    folder = tmp_path_factory.mktemp("evaluation")
    code, text = run_evaluation(folder, to_evaluate)
    assert code == 0, text
    return folder


def test_the_pipeline_draws_as_it_was_measured_best(to_evaluate, whole_evaluation):
    rows = json.loads((whole_evaluation / "metrics.json").read_text())["generation"]
    distance = next(name for name in rows[0] if name.startswith("gfd"))  # that of `--features`
    best = min(rows, key=lambda row: row[distance])["guidance_scale"]
    config = DAEDiTPipeline.from_pretrained(to_evaluate["pipeline"]).config
    assert (config.default_guidance_scale, config.default_num_inference_steps) == (best, 1)


def kept_files(folder: Path) -> dict[Path, int]:
    """What was finished, and when. Statistics on the way are replaced by those of all images."""
    paths = [*folder.glob("samples/*/*.safetensors"), *folder.glob("parts/**/*.*"), *folder.glob("reference/*")]
    return {path: path.stat().st_mtime_ns for path in paths if path.suffix != ".tmp" and "-of-" not in path.name}


@pytest.mark.parametrize(
    ("module", "name", "is_due", "num_kept"),
    [
        (evaluation, "encode_moments", lambda: nth_call(5), 1),  # in the second chunk of the held-out images
        (evaluation, "interpolate_to_neighbors", lambda: nth_call(1), 4),  # both splits are encoded
        (DAEDiTPipeline, "__call__", lambda: nth_call(3), 5),  # in the middle of a chunk of samples
        (DAEDiTPipeline, "__call__", lambda: nth_call(5), 6),
        (evaluation, "kernel_distance", lambda: nth_call(1), 9),  # features of the samples, no distance yet
        (evaluation, "kernel_distance", lambda: nth_call(2), 14),  # in the second setting
        (statistics, "pad_batch", lambda: nth_call(3), 22),  # in the middle of the reference images of the second judge
        (
            store,
            "_flush_and_rename",
            lambda: lambda _, path: path.name == "metrics.json",
            27,
        ),  # and its features of samples
    ],
)
def test_killed_evaluation_goes_on_and_computes_nothing_twice(
    module, name, is_due, num_kept, whole_evaluation, to_evaluate, tmp_path
):
    code, text = run_evaluation(tmp_path, to_evaluate, lambda: die_at(module, name, is_due()))
    assert code == -signal.SIGKILL, text
    kept = kept_files(tmp_path)
    assert len(kept) == num_kept
    assert module is not statistics or list(tmp_path.glob("reference/*.0-of-1.safetensors"))
    code, text = run_evaluation(tmp_path, to_evaluate)
    assert code == 0, text
    assert contents(tmp_path) == contents(whole_evaluation)
    after = kept_files(tmp_path)
    assert {path: after[path] for path in kept} == kept


def test_reference_statistics_go_on_from_where_they_were_saved(whole_evaluation, to_evaluate, tmp_path):
    run_evaluation(tmp_path, to_evaluate, lambda: die_at(statistics, "pad_batch", nth_call(3)))
    (partial,) = tmp_path.glob("reference/*")
    done, _ = FeatureStatistics.load(partial)
    assert 0 < done.count < 300
    marked = FeatureStatistics(done.count, done.mean + 1, done.scatter)
    _, metadata = FeatureStatistics.load(partial)
    marked.save(partial, metadata)
    code, text = run_evaluation(tmp_path, to_evaluate)
    assert code == 0, text
    (path,) = tmp_path.glob("reference/*")
    shift = (
        FeatureStatistics.load(path)[0].mean
        - FeatureStatistics.load(whole_evaluation / "reference" / path.name)[0].mean
    )
    torch.testing.assert_close(shift, torch.full_like(shift, done.count / 300))


def test_finished_evaluation_computes_nothing_again(whole_evaluation, to_evaluate):
    before = contents(whole_evaluation)

    def refuse():
        for module, name in (
            (evaluation, "encode_moments"), (evaluation, "linear_probe_accuracy"), (evaluation, "kernel_distance"),
            (DAEDiTPipeline, "__call__"), (statistics, "pad_batch"),
        ):  # fmt: skip
            die_at(module, name, nth_call(1))

    code, text = run_evaluation(whole_evaluation, to_evaluate, refuse)
    assert code == 0, text
    assert contents(whole_evaluation) == before


def test_samples_of_another_setting_or_model_have_another_name(to_evaluate):
    settings = (SampleSettings(3, 1.0, 1), SampleSettings(3, 1.0, 1, seed=1), SampleSettings(3, 2.0, 1))
    pipeline = DAEDiTPipeline.from_pretrained(to_evaluate["pipeline"])
    accelerators = (Accelerator(), Namespace(mixed_precision="bf16"))
    inputs = [generation_inputs(pipeline, setting, accelerators[0]) for setting in settings]
    inputs += [generation_inputs(pipeline, settings[0], accelerators[1])]
    for part in ("transformer", "vae"):
        with torch.no_grad():
            next(getattr(pipeline, part).parameters()).view(-1)[0] += 1
        inputs += [generation_inputs(pipeline, settings[0], accelerators[0])]
    assert len({fingerprint_of_json(each) for each in inputs}) == len(inputs)


@pytest.mark.parametrize("damage", [b"", b"{", b"[]", b"null"])
def test_damaged_parts_are_computed_anew(damage, whole_evaluation, to_evaluate, tmp_path):
    shutil.copytree(whole_evaluation, tmp_path / "run")
    for path in (
        *tmp_path.glob("run/parts/*.json"),
        *tmp_path.glob("run/parts/*/*"),
        *tmp_path.glob("run/samples/*/*"),
    ):
        path.write_bytes(damage)
    code, text = run_evaluation(tmp_path / "run", to_evaluate)
    assert code == 0, text
    assert contents(tmp_path / "run") == contents(whole_evaluation)
