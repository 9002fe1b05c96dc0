"""
Does a run that is killed again and again end with the results of one that was left alone?

    python benchmarks/faults.py --kills 50

Runs every script on the embedded digits without interruption, with tiny models: both kinds of autoencoder, the transformer,
the prior, the latent cache and the evaluation. Then does each again, with SIGKILL at random instants and the same command
after each, and compares every result and every logged value bit by bit. Prints a table, and exits with 1 if anything
differs.
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
from transformers import ResNetConfig, ResNetModel

DATA = "--dataset_name digits --image_channels 1 --max_train_samples 256 --max_validation_samples 32"
TIMES = "--train_batch_size 16 --logging_steps 5 --checkpointing_steps 4 --validation_steps 25"
DAE = f"{DATA} {TIMES} --block_out_channels 8 16 --norm_num_groups 4 --stage1_steps 30 --stage2_steps 30"
# The command of each case, in this order; {root} holds the results of the cases before it and the network for features.
COMMANDS = {
    "autoencoder": f"train_dae {DAE}",
    "codebook": f"train_dae {DAE} --autoencoder vq --codebook_size 64 --codebook_warmup_steps 10",
    "transformer": f"train_dit {DATA} {TIMES} --vae {{root}}/autoencoder/vae --model DiT-Ti/2 --num_layers 2 "
    "--max_train_steps 60 --num_sample_images 10 --sample_steps 2",
    "prior": f"train_vqgan_prior {DATA} {TIMES} --vae {{root}}/codebook/vae --num_layers 2 --num_attention_heads 2 "
    "--attention_head_dim 16 --max_train_steps 60 --num_sample_images 10",
    "latents": f"cache_latents {DATA} --vae {{root}}/autoencoder/vae --batch_size 8 --shard_size 8 --random_flip",
    "evaluation": f"evaluate {DATA} --pipeline {{root}}/transformer/pipeline --features {{root}}/features --num_images 600 "
    "--guidance_scales 1 2 4 --num_inference_steps 4 --batch_size 16",
}
RESULTS = ("*/log.jsonl", "stage1/*", "vae/*", "pipeline/**/*", "codes/*", "train/*", "validation/*", "metrics.json")


@dataclass
class Outcome:
    """Of all runs of one case."""

    kills: int = 0
    kills_while_saving: int = 0
    runs: int = 0
    differences: int = 0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=50, help="over all cases")
    parser.add_argument("--seed", type=int, default=0, help="of the instants, as far as the machine's speed allows")
    arguments = parser.parse_args()
    instants = random.Random(arguments.seed)
    outcomes = {}
    with tempfile.TemporaryDirectory() as name:
        root = Path(name)
        save_feature_extractor(root / "features")
        for number, case in enumerate(COMMANDS):
            print(f"{case}: uninterrupted", flush=True)
            seconds = run(case, root / case, root)
            kills = len(range(number, arguments.kills, len(COMMANDS)))
            outcomes[case] = interrupt(case, root, kills, seconds, instants)
    print(
        "\n| case | kills | of them while saving | runs finished | results or logs that differ |\n|---|---|---|---|---|"
    )
    for case, outcome in outcomes.items():
        print(f"| {case} | {outcome.kills} | {outcome.kills_while_saving} | {outcome.runs} | {outcome.differences} |")
    sys.exit(any(outcome.differences for outcome in outcomes.values()))


def save_feature_extractor(folder: Path) -> None:
    """An untrained network: all that counts is whether its numbers are the same again."""
    torch.manual_seed(0)
    config = ResNetConfig(embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], layer_type="basic")
    ResNetModel(config).save_pretrained(folder)
    size = {"height": 32, "width": 32}
    processor = {
        "image_processor_type": "ViTImageProcessor",
        "size": size,
        "image_mean": [0.5] * 3,
        "image_std": [0.5] * 3,
    }
    (folder / "preprocessor_config.json").write_text(json.dumps(processor))


def interrupt(case: str, root: Path, kills: int, seconds: float, instants: random.Random) -> Outcome:
    """Runs until there were `kills` kills, and the last run to its end. `seconds`: how long an uninterrupted one takes."""
    outcome = Outcome()
    while outcome.kills < kills or outcome.runs == 0:
        folder = root / f"{case}-{outcome.runs}"
        while True:
            # Several kills a run on average, none of them bound to a place in the loop.
            delay = instants.uniform(0, 2 * seconds / 6) if outcome.kills < kills else None
            if run(case, folder, root, kill_after=delay) is not None:
                break
            outcome.kills += 1
            outcome.kills_while_saving += any(folder.glob("*/checkpoints/tmp-*")) or any(folder.rglob("*.tmp"))
            print(f"{case}: kill {outcome.kills} after {delay:.2f} s, {state_of(folder)}", flush=True)
        outcome.runs += 1
        outcome.differences += results_of(folder) != results_of(root / case)
    return outcome


def run(case: str, folder: Path, root: Path, *, kill_after: float | None = None) -> float | None:
    """Seconds from the moment that the run took its folder to its end; None when it was killed before."""
    script, *flags = COMMANDS[case].format(root=root).split()
    flags += ["--output_dir", str(folder)]
    lock = folder / ".lock"
    if script.startswith("train_"):
        flags += ["--resume_from_checkpoint", "latest"]
        lock = folder / script / ".lock"
    with tempfile.TemporaryFile("w+") as output:
        process = subprocess.Popen(
            [sys.executable, "-m", f"dae_diffusers.training.{script}", *flags],
            env={**os.environ, "ACCELERATE_USE_CPU": "true", "CUDA_VISIBLE_DEVICES": ""},
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
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
            sys.exit(f"{case} ended with {process.returncode}:\n{output.read()}")
        return time.monotonic() - started


def state_of(folder: Path) -> str:
    """Where a killed run stood."""
    if steps := sorted(int(path.name.split("-")[1]) for path in folder.glob("*/checkpoints/checkpoint-*")):
        return f"checkpoints of steps {steps}"
    return f"{len(list(folder.rglob('*.safetensors')))} files of tensors"


def results_of(folder: Path) -> dict[str, bytes]:
    """Every weight, latent, code, statistic, measurement and logged value, bit by bit."""
    found = {}
    for path in (path for pattern in RESULTS for path in folder.glob(pattern) if path.is_file()):
        name = str(path.relative_to(folder))
        if path.suffix == ".safetensors":
            found |= {f"{name} {key}": value.numpy().tobytes() for key, value in load_file(path).items()}
        else:
            found[name] = path.read_bytes().replace(bytes(folder), b"")
    return found


if __name__ == "__main__":
    main()
