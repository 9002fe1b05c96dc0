"""
Does a run that is killed again and again end with the weights of one that was left alone?

    python benchmarks/faults.py --kills 50

Trains a tiny autoencoder, then a tiny DiT, on the embedded digits without interruption. Then does both again, with SIGKILL
at random instants and `--resume_from_checkpoint latest` after each, and compares every result and every logged value bit by
bit. Prints a table, and exits with 1 if anything differs.
"""

import argparse
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file

DATA = (
    "--dataset_name digits --image_channels 1 --max_train_samples 256 --max_validation_samples 32 --train_batch_size 16"
)
TIMES = "--logging_steps 5 --checkpointing_steps 4 --validation_steps 40"
FLAGS = {
    "train_dae": f"{DATA} {TIMES} --block_out_channels 8 16 --norm_num_groups 4 --stage1_steps 60 --stage2_steps 60",
    "train_dit": f"{DATA} {TIMES} --model DiT-Ti/2 --num_layers 2 --max_train_steps 100 --num_sample_images 10 --sample_steps 2",
}
RESULTS = {"train_dae": ("stage1", "vae"), "train_dit": ("pipeline/transformer",)}


@dataclass
class Outcome:
    """Of all runs of one script."""

    kills: int = 0
    kills_while_saving: int = 0
    runs: int = 0
    differences: int = 0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=50, help="over both scripts")
    parser.add_argument("--seed", type=int, default=0, help="of the instants, as far as the machine's speed allows")
    arguments = parser.parse_args()
    instants = random.Random(arguments.seed)
    outcomes = {}
    with tempfile.TemporaryDirectory() as root:
        whole = Path(root, "whole")
        for number, script in enumerate(FLAGS):
            kills = arguments.kills // 2 + (arguments.kills % 2 if number == 0 else 0)
            print(f"{script}: uninterrupted", flush=True)
            seconds = train(script, whole, whole)
            outcomes[script] = interrupt(script, whole, Path(root), kills, seconds, instants)
    print(
        "\n| script | kills | of them while saving | runs finished | results or logs that differ |\n|---|---|---|---|---|"
    )
    for script, outcome in outcomes.items():
        print(f"| {script} | {outcome.kills} | {outcome.kills_while_saving} | {outcome.runs} | {outcome.differences} |")
    sys.exit(any(outcome.differences for outcome in outcomes.values()))


def interrupt(script: str, whole: Path, root: Path, kills: int, seconds: float, instants: random.Random) -> Outcome:
    """Runs until there were `kills` kills, and the last run to its end. `seconds`: how long training takes."""
    outcome = Outcome()
    while outcome.kills < kills or outcome.runs == 0:
        folder = root / f"{script}-{outcome.runs}"
        while True:
            # Several kills a run on average, none of them bound to a place in the loop.
            delay = instants.uniform(0, 2 * seconds / 6) if outcome.kills < kills else None
            if train(script, folder, whole, kill_after=delay) is not None:
                break
            outcome.kills += 1
            outcome.kills_while_saving += any(folder.glob(f"{script}/checkpoints/tmp-*"))
            print(f"{script}: kill {outcome.kills} after {delay:.2f} s, {state_of(folder / script)}", flush=True)
        outcome.runs += 1
        outcome.differences += not is_equal(script, whole, folder)
    return outcome


def train(script: str, folder: Path, whole: Path, *, kill_after: float | None = None) -> float | None:
    """Seconds from the moment that the run took its folder to its end; None when it was killed before."""
    flags = [*FLAGS[script].split(), "--output_dir", str(folder), "--resume_from_checkpoint", "latest"]
    if script == "train_dit":
        flags += ["--vae", str(whole / "vae")]
    with tempfile.TemporaryFile("w+") as output:
        process = subprocess.Popen(
            [sys.executable, "-m", f"dae_diffusers.training.{script}", *flags],
            env={**os.environ, "ACCELERATE_USE_CPU": "true", "CUDA_VISIBLE_DEVICES": ""},
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        lock = folder / script / ".lock"
        while process.poll() is None and not (lock.exists() and f"process {process.pid} " in lock.read_text()):
            time.sleep(0.01)
        started = time.monotonic()
        try:
            process.wait(kill_after)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            return None
        if process.returncode != 0:
            output.seek(0)
            sys.exit(f"{script} ended with {process.returncode}:\n{output.read()}")
        return time.monotonic() - started


def state_of(folder: Path) -> str:
    """Where a killed run stood."""
    steps = sorted(int(path.name.split("-")[1]) for path in folder.glob("checkpoints/checkpoint-*"))
    return f"checkpoints of steps {steps}"


def is_equal(script: str, whole: Path, folder: Path) -> bool:
    """Weights and logs, bit by bit."""
    equal = (whole / script / "log.jsonl").read_bytes() == (folder / script / "log.jsonl").read_bytes()
    for result in RESULTS[script]:
        paths = [path / result for path in (whole, folder)]
        first, second = (load_file(path / "diffusion_pytorch_model.safetensors") for path in paths)
        equal &= first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)
    if script == "train_dae":
        statistics = [json.loads((path / "vae" / "config.json").read_text()) for path in (whole, folder)]
        equal &= all(statistics[0][name] == statistics[1][name] for name in ("latents_mean", "latents_std"))
    return equal


if __name__ == "__main__":
    main()
