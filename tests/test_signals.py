"""Signals, launchers that die and data-loading processes, with real processes: the run saves, and nothing is left over."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
from scripts import BARE_DAE, checkpoints, free_port, in_child, start

from dae_diffusers.locks import FolderLock

ACCELERATE = [sys.executable, "-m", "accelerate.commands.launch", "--cpu"]
WORKERS = " --stage1_steps 100000 --checkpointing_steps 100000 --dataloader_num_workers 2"


def begin(command: list[str], image_folder: Path, folder: Path, **options) -> subprocess.Popen:
    """Starts a long run and waits for its first update, in a session of its own."""
    flags = (BARE_DAE + WORKERS).split() + ["--train_data_dir", str(image_folder), "--output_dir", str(folder / "run")]
    with (folder / "output").open("w") as output:
        process = subprocess.Popen(
            [*command, "-m", "dae_diffusers.training.train_dae", *flags],
            cwd="/",
            env={**os.environ, "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true", "PYTHONUNBUFFERED": "1"},
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            **options,
        )
    log = folder / "run" / "train_dae" / "log.jsonl"
    wait_for(lambda: (log.exists() and log.read_text()) or process.poll() is not None)
    assert process.poll() is None, text_of(folder)
    return process


def begin_copy(image_folder: Path, folder: Path) -> psutil.Process:
    """The same in a copy of this process, which imports nothing anew."""

    def action():
        os.setsid()
        signal.signal(signal.SIGINT, signal.default_int_handler)  # where the tests run in the background it is ignored
        start(BARE_DAE + WORKERS, train_data_dir=image_folder, output_dir=folder / "run")

    process = psutil.Process(in_child(action, wait=False))
    log = folder / "run" / "train_dae" / "log.jsonl"
    wait_for(lambda: log.exists() and log.read_text())
    return process


def text_of(folder: Path) -> str:
    return (folder / "output").read_text()


def wait_for(condition, seconds: float = 120) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def assert_all_end(processes: list[psutil.Process], seconds: float = 60) -> None:
    _, alive = psutil.wait_procs(processes, timeout=seconds)
    for process in alive:
        process.kill()
    assert not alive


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_signal_to_a_run_and_all_its_workers_saves_and_leaves_no_process(number, image_folder, tmp_path):
    process = begin_copy(image_folder, tmp_path)
    workers = process.children(recursive=True)
    assert len(workers) >= 2
    os.killpg(process.pid, number)
    assert os.waitstatus_to_exitcode(os.waitpid(process.pid, 0)[1]) == 128 + number
    assert len(checkpoints(tmp_path / "run")) == 1
    assert_all_end(workers)


def test_workers_end_with_a_run_that_is_killed_and_its_folder_is_free_at_once(image_folder, tmp_path):
    process = begin_copy(image_folder, tmp_path)
    workers = process.children(recursive=True)
    for worker in workers:
        worker.suspend()  # the lock is not theirs, whether they have noticed or not
    process.kill()
    os.waitpid(process.pid, 0)
    code, text = in_child(lambda: FolderLock(tmp_path / "run" / "train_dae"))
    for worker in workers:
        worker.resume()
    assert code == 0, text
    assert_all_end(workers, 10)


@pytest.mark.parametrize("number", [signal.SIGTERM, pytest.param(signal.SIGKILL, marks=pytest.mark.slow)])
def test_run_whose_launcher_ends_notices_it_saves_and_ends(number, image_folder, tmp_path):
    launcher = begin([*ACCELERATE, "--num_processes", "1"], image_folder, tmp_path)
    below = psutil.Process(launcher.pid).children(recursive=True)
    launcher.send_signal(number)
    launcher.wait()
    assert_all_end(below)
    text = text_of(tmp_path)
    assert f"the launcher (process {launcher.pid}) has ended: finishing the step, then saving" in text
    assert len(checkpoints(tmp_path / "run")) == 1, text


@pytest.mark.slow
def test_run_that_a_shell_started_outlives_it(image_folder, tmp_path):
    shell = ["sh", "-c", 'trap "" HUP; "$@" & wait', "sh", sys.executable]
    process = begin(shell, image_folder, tmp_path)
    (trainer,) = psutil.Process(process.pid).children()
    process.kill()
    process.wait()
    log = tmp_path / "run" / "train_dae" / "log.jsonl"
    before = log.stat().st_size
    wait_for(lambda: log.stat().st_size > before + 1000)
    os.killpg(process.pid, signal.SIGHUP)  # the user logs out
    before = log.stat().st_size
    wait_for(lambda: log.stat().st_size > before + 1000)
    below = [trainer, *trainer.children(recursive=True)]
    trainer.terminate()
    assert_all_end(below)
    assert len(checkpoints(tmp_path / "run")) == 1, text_of(tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGKILL])
def test_two_processes_save_when_their_launcher_is_ended(number, image_folder, tmp_path):
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--master_port", free_port()]
    launcher = begin(torchrun, image_folder, tmp_path)
    below = psutil.Process(launcher.pid).children(recursive=True)
    launcher.send_signal(number)
    launcher.wait()
    assert_all_end(below)
    assert len(checkpoints(tmp_path / "run")) == 1, text_of(tmp_path)
