"""
A run that is interrupted again and again, at random instants, ends with the results of one that was left alone.

    python -m pytest tests/test_faults_slow.py -m slow -s --kills 500

Every script runs on the embedded digits with tiny models: both kinds of autoencoder, the transformer, the prior, the latent
cache and the evaluation; the first also with data-loading processes and under `accelerate launch`. SIGKILL comes for all
processes or for one, the other signals for one or all, or the launcher ends. The same command goes on after each. Every
result and every logged value is compared bit by bit, and nothing may be left running. `--kills` is for all cases together.

Half of the kills come at any instant, half a few milliseconds after a run has begun to write a file. Most runs are forked from a
server that has imported torch (`fork_server.py`); each case also starts processes of its own, and a launcher always does.
"""

import contextlib
import math
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO

import psutil
import pytest
from fork_server import Forked, ForkServer
from models import save_backbone
from safetensors.torch import load_file

DATA = "--dataset_name digits --image_channels 1 --max_train_samples 256 --max_validation_samples 32"
TIMES = (
    "--train_batch_size 16 --logging_steps 1 --checkpointing_steps 2 --checkpoints_total_limit 3 --validation_steps 8"
)
DAE = f"{DATA} {TIMES} --block_out_channels 8 16 --norm_num_groups 4 --stage1_steps 16 --stage2_steps 16"
# {root} holds the results of uninterrupted runs and the network for features.
COMMANDS = {
    "autoencoder": f"train_dae {DAE}",
    "codebook": f"train_dae {DAE} --autoencoder vq --codebook_size 64 --codebook_warmup_steps 6",
    "transformer": f"train_dit {DATA} {TIMES} --vae {{root}}/autoencoder/vae --model DiT-Ti/2 --num_layers 2 "
    "--max_train_steps 32 --num_sample_images 10 --sample_steps 2",
    "prior": f"train_vqgan_prior {DATA} {TIMES} --vae {{root}}/codebook/vae --num_layers 2 --num_attention_heads 2 "
    "--attention_head_dim 16 --max_train_steps 32 --num_sample_images 10",
    "latents": f"cache_latents {DATA} --vae {{root}}/autoencoder/vae --batch_size 2 --shard_size 4 --random_flip",
    "evaluation": f"evaluate {DATA} --pipeline {{root}}/transformer/pipeline --features {{root}}/features --num_images 520 "
    "--guidance_scales 1 3 --num_inference_steps 4 --batch_size 16",
}
NEEDS = {"transformer": "autoencoder", "prior": "codebook", "latents": "autoencoder", "evaluation": "transformer"}
WORKERS, LAUNCHER = "autoencoder, data-loading processes", "autoencoder, accelerate launch"
CASES = [*COMMANDS, WORKERS, LAUNCHER]
RESULTS = ("*/log.jsonl", "stage1/*", "vae/*", "pipeline/**/*", "codes/*", "train/*", "validation/*", "metrics.json")
SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
ENVIRONMENT = {"ACCELERATE_USE_CPU": "true", "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
REAL_STARTS = 16  # one start of so many is a process of its own
SAVING_SECONDS = (1e-4, 0.03)  # after the first sign of a file that is being written, most often soon; or at once


@dataclass
class Outcome:
    """Of all runs of one case."""

    kills: dict[str, int] = field(default_factory=dict)  # by how
    while_saving: int = 0  # a file was being written when the signal was sent
    left: int = 0  # of these, half a file or checkpoint was left
    real: int = 0  # of processes that were not forked
    starts: int = 0
    runs: int = 0

    def add(self, end: "End", is_forked: bool) -> None:
        self.kills[end.how] = self.kills.get(end.how, 0) + 1
        self.while_saving += end.while_saving
        self.left += end.left
        self.real += not is_forked


@dataclass(frozen=True)
class End:
    """Of a run: how it was ended (empty: it came to its end), seconds since it took its folder then, and in the middle of what."""

    how: str
    seconds: float = 0.0
    while_saving: bool = False
    left: bool = False


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("faults")
    save_backbone(folder / "features", "resnet")
    return folder


@pytest.fixture(scope="module")
def server():
    for number in (signal.SIGINT, signal.SIGHUP):  # ignored in a shell's background job, and so in the runs
        if signal.getsignal(number) is signal.SIG_IGN:
            signal.signal(number, signal.SIG_DFL)
    scripts = sorted({command.split()[0] for command in COMMANDS.values()})
    with ForkServer(scripts, {**os.environ, **ENVIRONMENT}) as started:
        yield started


@pytest.mark.slow
@pytest.mark.timeout(0)
@pytest.mark.parametrize("case", CASES)
def test_interrupted_again_and_again_ends_with_the_same_results(case, root, server, request):
    kills = len(range(CASES.index(case), request.config.getoption("--kills"), len(CASES)))
    instants = random.Random(f"{case} 0")
    command = case if case in COMMANDS else "autoencoder"
    seconds = run_whole(command, root, server)
    outcome, done = Outcome(), 0
    while done < kills or outcome.runs == 0:
        folder = root / f"{case} {outcome.runs}"
        while True:
            is_forked = case != LAUNCHER and outcome.starts % REAL_STARTS > 0
            outcome.starts += 1
            # Several kills a run on average, none of them bound to a place in the loop.
            delay = instants.uniform(0, 2 * seconds / 6) if done < kills else None
            end = run(case, folder, root, server if is_forked else None, kill_after=delay, instants=instants)
            if not end.how:
                break
            done += 1
            outcome.add(end, is_forked)
        outcome.runs += 1
        assert results_of(folder) == results_of(root / command), folder
        shutil.rmtree(folder)
        print(
            f"\n{case}: {done} kills ({outcome.kills}), {outcome.while_saving} while a file was written ({outcome.left} left "
            f"half of it), {outcome.real} of processes that were not forked, {outcome.runs} runs, all equal",
            flush=True,
        )


def run_whole(command: str, root: Path, server: ForkServer) -> float:
    """Seconds of an uninterrupted run; it is done once, after those whose results it needs."""
    folder = root / command
    took = root / f"{command}.seconds"
    if not took.exists():
        if command in NEEDS:
            run_whole(NEEDS[command], root, server)
        run(command, folder, root, None)  # what all others are compared with was not forked
        again = run(command, root / f"{command} again", root, server)
        assert results_of(root / f"{command} again") == results_of(folder)
        took.write_text(str(again.seconds))
    return float(took.read_text())


def run(
    case: str,
    folder: Path,
    root: Path,
    server: ForkServer | None,
    *,
    kill_after: float | None = None,
    instants: random.Random | None = None,
) -> End:
    """Starts a script, forked if there is a server, and ends it so many seconds after it took its folder."""
    script, *flags = COMMANDS.get(case, COMMANDS["autoencoder"]).format(root=root).split()
    if case in (WORKERS, LAUNCHER):
        flags += ["--dataloader_num_workers", "2"]
    flags += ["--output_dir", str(folder)]
    taken = folder / ".owner"
    if script.startswith("train_"):
        flags += ["--resume_from_checkpoint", "latest"]
        taken = folder / script / ".owner"
    before = taken.read_text() if taken.exists() else None
    with tempfile.TemporaryFile("w+") as output:
        process = start(case, script, flags, output) if server is None else server.start(script, flags, output)
        while process.poll() is None and not (taken.exists() and taken.read_text() != before):
            time.sleep(0.005)
        started = time.monotonic()
        if kill_after is not None:
            while_saving = wait_for_the_instant(process, folder, kill_after, instants)
            if process.poll() is None:
                return end(process, case, folder, instants, output, while_saving)
        process.wait()
        output.seek(0)
        assert process.returncode == 0, output.read()
        return End("", time.monotonic() - started)


def start(case: str, script: str, flags: list[str], output: IO[str]) -> subprocess.Popen:
    launch = [sys.executable, "-m"]
    if case == LAUNCHER:
        launch += ["accelerate.commands.launch", "--cpu", "--num_processes", "1", "-m"]
    return subprocess.Popen(
        [*launch, f"dae_diffusers.training.{script}", *flags],
        env={**os.environ, **ENVIRONMENT},
        stdout=output,
        stderr=subprocess.STDOUT,
        start_new_session=True,
    )


def wait_for_the_instant(
    process: subprocess.Popen | Forked, folder: Path, kill_after: float, instants: random.Random
) -> bool:
    """Half of the times it is the next one at which a file is being written. Whether one is, then."""
    wants_write, at_once = instants.random() < 0.5, instants.random() < 0.5
    moment = math.exp(instants.uniform(*map(math.log, SAVING_SECONDS)))
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(kill_after)
    while wants_write and process.poll() is None:
        if is_writing(folder):
            if at_once:
                return True
            time.sleep(moment)
            break
        time.sleep(0.0002)
    return is_writing(folder)


def is_writing(folder: Path) -> bool:
    """Whether a file or checkpoint is there that has not got its name yet."""
    pending = [folder]
    while pending:
        try:
            entries = list(os.scandir(pending.pop()))
        except OSError:  # just renamed or removed
            continue
        if any(entry.name.startswith("tmp-") or entry.name.endswith(".tmp") for entry in entries):
            return True
        pending += [entry.path for entry in entries if not entry.name.startswith("checkpoint-") and entry.is_dir()]
    return False


def end(
    process: subprocess.Popen | Forked,
    case: str,
    folder: Path,
    instants: random.Random,
    output: IO[str],
    while_saving: bool,
) -> End:
    """Ends a run in one of the ways that happen, and waits until nothing of it is left."""
    number = instants.choice((signal.SIGKILL, signal.SIGKILL, *SIGNALS))
    to_all = instants.random() < 0.5
    (os.killpg if to_all else os.kill)(process.pid, number)
    process.wait(120)
    deadline = time.monotonic() + 120
    while (alive := session_of(process.pid)) and time.monotonic() < deadline:
        time.sleep(0.02)
    output.seek(0)
    text = output.read()
    for each in alive:
        each.kill()
    assert not alive, f"{alive} outlived {number.name}:\n{text}"
    if case != LAUNCHER:
        assert process.returncode in (0, -number, 128 + number), text  # 0: it came too late
        assert "Traceback" not in text, text
    how = f"{number.name} to {'all' if to_all else 'the launcher' if case == LAUNCHER else 'one'}"
    return End(how, while_saving=while_saving, left=is_writing(folder))


def session_of(pid: int) -> list[psutil.Process]:
    """What still runs of all that a process has started, which is the leader of its session."""
    found = []
    for process in psutil.process_iter():
        with contextlib.suppress(OSError, psutil.Error):
            if os.getsid(process.pid) == pid and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process)
    return found


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
