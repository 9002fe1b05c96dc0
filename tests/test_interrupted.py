"""The latent cache and the evaluation, killed anywhere and run again, end as if nothing had happened, and redo nothing."""

import os
import shutil
import signal
import time
from collections import Counter
from pathlib import Path

import pytest
from models import make_autoencoder
from scripts import in_child, launch, start, succeed

from dae_diffusers import files
from dae_diffusers.checkpointing import FolderLock
from dae_diffusers.latents import cache
from dae_diffusers.training import cache_latents, train_dit

CACHE = "--resolution 16 --batch_size 4 --shard_size 7 --random_flip"


def die_at(module, name: str, is_due) -> None:
    """From now on this process kills itself instead of the first call of `module.name` for which `is_due(*args)`."""
    original = getattr(module, name)

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
    paths = [path for path in folder.rglob("*") if path.is_file() and path.name != ".lock"]
    return {str(path.relative_to(folder)): path.read_bytes() for path in paths}


@pytest.fixture(scope="module")
def vae(tmp_path_factory):
    folder = tmp_path_factory.mktemp("vae")
    autoencoder = make_autoencoder()
    autoencoder.register_to_config(latents_mean=[0.0] * 3, latents_std=[1.0] * 3)
    autoencoder.to_diffusers().save_pretrained(folder)
    return folder


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
        (cache, "save_tensors_atomically", lambda: nth_call(2)),  # between two shards
        (files, "_flush_and_rename", lambda: lambda _, path: path.name == "shard-00002.safetensors"),
        (cache, "gather_object", lambda: nth_call(1)),  # all shards of the first split, no manifest
        (cache, "write_atomically", lambda: nth_call(3)),  # the first split is whole, the second not begun
        (cache, "write_atomically", lambda: nth_call(4)),  # only the last manifest is missing
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
    succeed(launch("cache_latents", CACHE, processes=2, **options))
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
    lock = tmp_path / "lock" / ".lock"
    lock.parent.mkdir()

    def hold():
        FolderLock(lock.parent)
        signal.pause()

    holder = in_child(hold, wait=False)
    while not lock.exists() or not lock.read_text():
        time.sleep(0.01)
    code, text = make_cache(tmp_path / "lock", vae, image_folder)
    os.kill(holder, signal.SIGKILL)
    os.waitpid(holder, 0)
    assert code == 1 and f"in use by another run (process {holder} " in text, text
