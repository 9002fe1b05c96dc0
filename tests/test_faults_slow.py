"""
A run that is interrupted again and again, at random instants, ends with the results of one that was left alone.

    python -m pytest tests/test_faults_slow.py -m slow -s --kills 500

Every script runs on the embedded digits with tiny models: both kinds of autoencoder, the transformer, the prior, the latent
cache and the evaluation; the first also with data-loading processes and under `accelerate launch`. SIGKILL comes for all
processes or for one, the other signals for one or all, or the launcher ends. The same command goes on after each. Every
result and every logged value is compared bit by bit, and nothing may be left running. `--kills` is for all cases together.
"""

import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path

import psutil
import pytest
from models import save_backbone
from safetensors.torch import load_file

DATA = "--dataset_name digits --image_channels 1 --max_train_samples 256 --max_validation_samples 32"
TIMES = "--train_batch_size 16 --logging_steps 5 --checkpointing_steps 4 --validation_steps 25"
DAE = f"{DATA} {TIMES} --block_out_channels 8 16 --norm_num_groups 4 --stage1_steps 30 --stage2_steps 30"
# {root} holds the results of uninterrupted runs and the network for features.
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
NEEDS = {"transformer": "autoencoder", "prior": "codebook", "latents": "autoencoder", "evaluation": "transformer"}
WORKERS, LAUNCHER = "autoencoder, data-loading processes", "autoencoder, accelerate launch"
CASES = [*COMMANDS, WORKERS, LAUNCHER]
RESULTS = ("*/log.jsonl", "stage1/*", "vae/*", "pipeline/**/*", "codes/*", "train/*", "validation/*", "metrics.json")
SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)


@dataclass
class Outcome:
    """Of all runs of one case."""

    kills: dict[str, int] = field(default_factory=dict)  # by how
    while_saving: int = 0
    runs: int = 0


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("faults")
    save_backbone(folder / "features", "resnet")
    return folder


@pytest.mark.slow
@pytest.mark.timeout(0)
@pytest.mark.parametrize("case", CASES)
def test_interrupted_again_and_again_ends_with_the_same_results(case, root, request):
    kills = len(range(CASES.index(case), request.config.getoption("--kills"), len(CASES)))
    instants = random.Random(f"{case} 0")
    command = case if case in COMMANDS else "autoencoder"
    seconds = run_whole(command, root)
    outcome, done = Outcome(), 0
    while done < kills or outcome.runs == 0:
        folder = root / f"{case} {outcome.runs}"
        while True:
            # Several kills a run on average, none of them bound to a place in the loop.
            delay = instants.uniform(0, 2 * seconds / 6) if done < kills else None
            how = run(case, folder, root, kill_after=delay, instants=instants)
            if how is None:
                break
            done += 1
            outcome.kills[how] = outcome.kills.get(how, 0) + 1
            outcome.while_saving += any(folder.glob("*/checkpoints/tmp-*")) or any(folder.rglob("*.tmp"))
        outcome.runs += 1
        assert results_of(folder) == results_of(root / command), folder
    print(
        f"\n{case}: {done} kills ({outcome.kills}), {outcome.while_saving} while saving, {outcome.runs} runs, all equal"
    )


def run_whole(command: str, root: Path) -> float:
    """Seconds of an uninterrupted run; it is done once, after those whose results it needs."""
    folder = root / command
    took = root / f"{command}.seconds"
    if not took.exists():
        if command in NEEDS:
            run_whole(NEEDS[command], root)
        started = time.monotonic()
        assert run(command, folder, root) is None
        took.write_text(str(time.monotonic() - started))
    return float(took.read_text())


def run(
    case: str, folder: Path, root: Path, *, kill_after: float | None = None, instants: random.Random | None = None
) -> str | None:
    """How a run was ended, counted from the moment that it took its folder; None: it came to its end."""
    script, *flags = COMMANDS.get(case, COMMANDS["autoencoder"]).format(root=root).split()
    launch = [sys.executable, "-m"]
    if case == LAUNCHER:
        launch += ["accelerate.commands.launch", "--cpu", "--num_processes", "1", "-m"]
    if case in (WORKERS, LAUNCHER):
        flags += ["--dataloader_num_workers", "2"]
    flags += ["--output_dir", str(folder)]
    taken = folder / ".owner"
    if script.startswith("train_"):
        flags += ["--resume_from_checkpoint", "latest"]
        taken = folder / script / ".owner"
    with tempfile.TemporaryFile("w+") as output:
        process = subprocess.Popen(
            [*launch, f"dae_diffusers.training.{script}", *flags],
            env={**os.environ, "ACCELERATE_USE_CPU": "true", "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"},
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        before = taken.read_text() if taken.exists() else None
        while process.poll() is None and not (taken.exists() and taken.read_text() != before):
            time.sleep(0.01)
        try:
            process.wait(kill_after)
        except subprocess.TimeoutExpired:
            return end(process, case, instants, output)
        output.seek(0)
        assert process.returncode == 0, output.read()
        return None


def end(process: subprocess.Popen, case: str, instants: random.Random, output) -> str:
    """Ends a run in one of the ways that happen, and waits until nothing of it is left."""
    everything = [psutil.Process(process.pid), *psutil.Process(process.pid).children(recursive=True)]
    number = instants.choice((signal.SIGKILL, signal.SIGKILL, *SIGNALS))
    to_all = instants.random() < 0.5
    (os.killpg if to_all else os.kill)(process.pid, number)
    process.wait(120)
    _, alive = psutil.wait_procs(everything, timeout=120)
    output.seek(0)
    text = output.read()
    for left in alive:
        left.kill()
    assert not alive, f"{alive} outlived {number.name}:\n{text}"
    assert "Traceback" not in text or case == LAUNCHER or not case.startswith("autoencoder"), text
    return f"{number.name} to {'all' if to_all else 'the launcher' if case == LAUNCHER else 'one'}"


def results_of(folder: Path) -> dict[str, bytes]:
    """Every weight, latent, code, statistic, measurement and logged value, bit by bit."""
    found = {}
    for path in (path for pattern in RESULTS for path in folder.glob(pattern) if path.is_file()):
        name = str(path.relative_to(folder))
        if path.suffix == ".safetensors":
            found |= {f"{name} {key}": value.numpy().tobytes() for key, value in load_file(path).items()}
        else:
            found[name] = path.read_bytes().replace(bytes(folder), b"")
    assert found
    return found
