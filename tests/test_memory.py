"""A long run needs no more memory than a short one: the size of all processes of real runs, from numbered and streamed images."""

import os
import statistics
import subprocess
import sys
import time
from pathlib import Path

import datasets
import numpy as np
import psutil
import pytest
from pictures import encoded
from PIL import Image
from scripts import log_of

STEPS = 3000
FLAGS = (
    "--resolution 16 --block_out_channels 8 8 --norm_num_groups 4 --latent_channels 3 --train_batch_size 4 --stage 1 "
    f"--max_validation_samples 8 --logging_steps 50 --validation_steps 1000000 --checkpointing_steps 500 "
    f"--stage1_steps {STEPS} --dataloader_num_workers 1 --random_crop"  # with random crops no decoded image is kept
)


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    """2,000 random JPEGs of 64x64 pixels in 10 Parquet files."""
    folder, random = tmp_path_factory.mktemp("shards"), np.random.default_rng(0)
    features = datasets.Features({"image": datasets.Image()})
    for shard in range(10):
        pictures = [Image.fromarray(random.integers(0, 256, (64, 64, 3), dtype=np.uint8)) for _ in range(200)]
        rows = [
            {"image": {"bytes": encoded(picture, "jpeg"), "path": f"{n}.jpg"}} for n, picture in enumerate(pictures)
        ]
        datasets.Dataset.from_list(rows, features=features).to_parquet(folder / f"train-{shard:05d}.parquet")
    return folder


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("more", ["", "--streaming --shuffle_buffer_size 500"], ids=["mapped", "streamed"])
def test_memory_does_not_grow_with_the_steps(more, shards, tmp_path):
    sizes = sizes_of_run([*FLAGS.split(), *more.split(), "--dataset_name", str(shards)], tmp_path)
    first = [size for step, size in sizes if STEPS // 10 <= step < STEPS // 2]
    second = [size for step, size in sizes if step >= STEPS // 2]
    assert len(first) >= 5 and len(second) >= 5
    # The C library takes memory from the system in steps of some percent; one image kept for each step would be 20 %.
    assert statistics.median(second) < 1.1 * statistics.median(first), sizes[:: len(sizes) // 20 + 1]


def sizes_of_run(argv: list[str], folder: Path) -> list[tuple[int, float]]:
    """`(step, MiB)` each half second from the first logged step on."""
    with (folder / "output.txt").open("w") as output:
        process = subprocess.Popen(
            [sys.executable, "-m", "dae_diffusers.training.train_dae", *argv, "--output_dir", str(folder / "run")],
            env={**os.environ, "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"},
            stdout=output,
            stderr=subprocess.STDOUT,
        )
        sizes = []
        while process.poll() is None:
            time.sleep(0.5)
            sizes.append((last_step(folder / "run"), held_memory(process.pid) / 2**20))
    assert process.returncode == 0, (folder / "output.txt").read_text()[-2000:]
    return [(step, size) for step, size in sizes if step and size]


def held_memory(pid: int) -> int:
    """Bytes that a process and its children hold; pages that they share count once."""
    try:
        process = psutil.Process(pid)
        return sum(part.memory_full_info().pss for part in (process, *process.children(recursive=True)))
    except psutil.Error:  # one of them has just ended
        return 0


def last_step(folder: Path) -> int:
    try:
        return log_of(folder)[-1]["step"]
    except (OSError, ValueError, IndexError):  # not begun, or a line is being written
        return 0
