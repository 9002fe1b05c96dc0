"""
Does a long run need more memory than a short one? The resident size of real runs, from numbered and from streamed images.

    python benchmarks/memory.py --output_dir runs/memory --steps 10000

Makes shards of random JPEGs, trains the tiniest autoencoder on them, once mapped from the disk and once with `--streaming`, each
with a worker process, and looks every second at the memory that all processes of the run hold. Writes
`memory.md` and `memory.png`; exits with 1 if the second half of a run holds over 5 % more than the first.
"""

import argparse
import io
import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path

import datasets
import numpy as np
import psutil
from matplotlib.figure import Figure
from PIL import Image

FLAGS = (
    "--resolution 16 --block_out_channels 8 8 --norm_num_groups 4 --latent_channels 3 --train_batch_size 4 --stage 1 "
    "--max_validation_samples 8 --logging_steps 50 --validation_steps 1000000 --checkpointing_steps 1000 "
    "--dataloader_num_workers 1 --random_crop"  # with random crops no decoded image is kept
)
RUNS = {"mapped from the disk": "", "streamed": " --streaming --shuffle_buffer_size 500"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output_dir", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=10_000, help="optimiser steps of each run")
    parser.add_argument("--num_images", type=int, default=5000, help="random 64x64 JPEGs in 10 shards")
    arguments = parser.parse_args()
    shards = arguments.output_dir / "shards"
    if not shards.exists():
        write_shards(shards, arguments.num_images)
    sizes = {name: watch(name, flags, shards, arguments) for name, flags in RUNS.items()}

    lines = ["| run | MiB after start | first half | second half | growth |", "|---|---|---|---|---|"]
    growths = {}
    figure = Figure(figsize=(7, 3.5), layout="constrained")
    axis = figure.subplots()
    for name, points in sizes.items():
        steps, values = zip(*points, strict=True)
        halves = [
            statistics.median([v for s, v in points if low <= s < high])
            for low, high in (
                (arguments.steps // 10, arguments.steps // 2),
                (arguments.steps // 2, arguments.steps + 1),
            )
        ]
        growths[name] = halves[1] / halves[0] - 1
        lines.append(f"| {name} | {values[0]:.0f} | {halves[0]:.0f} | {halves[1]:.0f} | {growths[name]:+.1%} |")
        axis.plot(steps, values, label=name)
    axis.set_xlabel("optimiser step")
    axis.set_ylabel("memory of all processes (MiB)")
    axis.set_ylim(bottom=0)
    axis.legend(frameon=False)
    figure.savefig(arguments.output_dir / "memory.png", dpi=120)
    (arguments.output_dir / "memory.md").write_text("\n".join(lines) + "\n")
    print("\n".join(lines))
    sys.exit(any(growth > 0.05 for growth in growths.values()))


def write_shards(folder: Path, num_images: int) -> None:
    random = np.random.default_rng(0)
    folder.mkdir(parents=True)
    features = datasets.Features({"image": datasets.Image()})
    for shard, numbers in enumerate(np.array_split(np.arange(num_images), 10)):
        rows = []
        for number in numbers:
            buffer = io.BytesIO()
            Image.fromarray(random.integers(0, 256, (64, 64, 3), dtype=np.uint8)).save(buffer, "jpeg")
            rows.append({"image": {"bytes": buffer.getvalue(), "path": f"{number}.jpg"}})
        datasets.Dataset.from_list(rows, features=features).to_parquet(folder / f"train-{shard:05d}.parquet")


def watch(name: str, flags: str, shards: Path, arguments: argparse.Namespace) -> list[tuple[int, float]]:
    """`(step, MiB)` of a run from its first logged step on."""
    folder = arguments.output_dir / name.replace(" ", "-")
    argv = [*FLAGS.split(), *flags.split(), "--dataset_name", str(shards), "--output_dir", str(folder)]
    print(f"{name}: {arguments.steps} steps", flush=True)
    with (arguments.output_dir / "output.txt").open("w+") as output:
        process = subprocess.Popen(
            [sys.executable, "-m", "dae_diffusers.training.train_dae", *argv, "--stage1_steps", str(arguments.steps)],
            env={**os.environ, "ACCELERATE_USE_CPU": "true"},
            stdout=output,
            stderr=subprocess.STDOUT,
        )
        points, log = [], folder / "train_dae" / "log.jsonl"
        while process.poll() is None:
            time.sleep(1)
            step = last_step(log)
            if step:
                points.append((step, held_memory(process.pid) / 2**20))
        if process.returncode != 0:
            output.seek(0)
            sys.exit(f"the run ended with {process.returncode}:\n{output.read()[-2000:]}")
    return [point for point in points if point[1] > 0]


def held_memory(pid: int) -> int:
    """Bytes that a process and its children hold; pages that they share count once."""
    try:
        process = psutil.Process(pid)
        return sum(part.memory_full_info().pss for part in (process, *process.children(recursive=True)))
    except psutil.Error:  # one of them has just ended
        return 0


def last_step(log: Path) -> int:
    try:
        lines = log.read_text().splitlines()
        return json.loads(lines[-1])["step"] if lines else 0
    except (OSError, ValueError):
        return 0


if __name__ == "__main__":
    main()
