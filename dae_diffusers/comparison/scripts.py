"""Runs the scripts of `training/` in processes of their own. One server imports torch once and forks them."""

import importlib
import multiprocessing
import os
import signal
import sys
import threading
import time
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

from dae_diffusers.cli import parse_config
from dae_diffusers.errors import ConfigError, UserError, one_line
from dae_diffusers.script import run_script
from dae_diffusers.training.settings import SCRIPTS

_PACKAGE = "dae_diffusers.training"
_IMPORTED = ("train_dae", "cache_latents", "train_dit")
# What a launcher tells the processes of one run.
_OF_LAUNCHER = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "GROUP_RANK")
_IN_USE, _PATIENCE = "is in use by another run", 60  # seconds
_STOPPED = {128 + signal.SIGINT, 128 + signal.SIGTERM, -signal.SIGINT, -signal.SIGTERM}
_QUIET = {"validation_steps": 10**9, "checkpointing_steps": 10**9, "logging_steps": 100}


class ScriptError(UserError):
    r"""A script failed. `reason` is its last line."""

    def __init__(self, name: str, reason: str, log: Path):
        super().__init__(f"{name.replace('_', '-')} failed: {reason} (its output: {log})")
        self.reason = reason


def work_alone() -> bool:
    r"""
    Lets this process, which a launcher may have started beside others, work for itself, on a GPU of its own. Call it before
    anything asks for a device.

    Returns:
        `bool`: Whether it is the first of these processes.
    """
    is_first, rank = os.environ.get("RANK", "0") == "0", os.environ.get("LOCAL_RANK")
    if rank is not None and os.environ.get("WORLD_SIZE", "1") != "1":
        visible = os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",")
        hides_all = "CUDA_VISIBLE_DEVICES" in os.environ and visible[0] in ("", "-1")
        if "CUDA_VISIBLE_DEVICES" not in os.environ:
            os.environ["CUDA_VISIBLE_DEVICES"] = rank
        elif not hides_all:
            if int(rank) >= len(visible):
                raise ConfigError(
                    f"more processes were started than `CUDA_VISIBLE_DEVICES` {','.join(visible)} has GPUs: each works on one of its own."
                )
            os.environ["CUDA_VISIBLE_DEVICES"] = visible[int(rank)]
    for variable in _OF_LAUNCHER:
        os.environ.pop(variable, None)
    return is_first


def launch_script(name: str, flags: dict[str, Any]) -> dict[str, float]:
    r"""
    Runs a script in a process of its own, whose output goes to `<output_dir>/<name>.txt`. It ends with this process, and a signal
    that ends this process lets it save first.

    Args:
        name (`str`): The script, such as `train_dae`.
        flags (`dict`): Its flags, among them `output_dir`; None is left out.

    Returns:
        `dict`: `cpu_seconds`, the processor time that it took, without the imports, which all scripts share; after an interruption,
            that since then.

    Raises:
        ScriptError: If it fails.
        SystemExit: If a signal stopped it.
    """
    log = Path(flags["output_dir"]) / f"{name}.txt"
    log.parent.mkdir(parents=True, exist_ok=True)
    deadline = time.monotonic() + _PATIENCE
    while True:
        try:
            return {"cpu_seconds": _launch(name, words_of(flags), log)}
        except ScriptError as error:  # the script of a process that was killed may still be saving
            if _IN_USE not in error.reason or time.monotonic() > deadline:
                raise
            time.sleep(1)


def shared_flags(output_dir: Path, seed: int) -> dict[str, Any]:
    """The flags that the training scripts share: a run in this folder that goes on if it was interrupted."""
    return {"output_dir": str(output_dir), "seed": seed, "resume_from_checkpoint": "latest", **_QUIET}


def words_of(flags: dict[str, Any]) -> list[str]:
    """Flags as a command line has them."""
    words = []
    for name, value in flags.items():
        if value is not None:
            words += [f"--{name}", *map(str, value if isinstance(value, list) else [value])]
    return words


def _launch(name: str, words: list[str], log: Path) -> float:
    context = _context()
    answer, theirs = context.Pipe(duplex=False)
    process = context.Process(target=_run, args=(name, words, str(log), theirs), daemon=False)
    process.start()
    theirs.close()
    try:
        process.join()
    finally:  # a signal, or an error such as Ctrl-C
        if process.is_alive():
            process.terminate()
            process.join()
    if process.exitcode in _STOPPED:
        raise SystemExit(abs(process.exitcode) if process.exitcode > 0 else 128 - process.exitcode)
    if process.exitcode != 0:
        raise ScriptError(name, _reason(log, process.exitcode), log)
    return answer.recv()


def _context():
    if "forkserver" not in multiprocessing.get_all_start_methods():  # Windows
        return multiprocessing.get_context("spawn")
    os.environ.setdefault("JE_ARROW_MALLOC_CONF", "background_thread:false")  # a server that forks has no threads
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__, *(f"{_PACKAGE}.{name}" for name in _IMPORTED)])
    return context


def _run(name: str, words: list[str], log: str, answer: Connection) -> None:
    script = importlib.import_module(f"{_PACKAGE}.{name}")
    before = time.process_time()
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
    for number in (1, 2):
        os.dup2(descriptor, number)
    sys.argv = [name, *words]
    _end_with_parent()
    run_script(script.main, parse_config(SCRIPTS[name.replace("_", "-")], words))
    times = os.times()
    answer.send(time.process_time() - before + times.children_user + times.children_system)


def _end_with_parent() -> None:
    """Asks this process to stop once the one that started it has ended, however it ended."""
    parent = multiprocessing.parent_process()

    def watch() -> None:
        wait([parent.sentinel])
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=watch, daemon=True).start()


def _reason(log: Path, code: int) -> str:
    """The last line that a failed script wrote."""
    if code < 0:
        return f"signal {signal.Signals(-code).name} ended it; perhaps memory ran out"
    lines = [line for line in log.read_text(errors="replace").splitlines() if line.strip()]
    said = [line for line in lines if "error: " in line]
    last = (said or lines or ["it wrote nothing"])[-1]
    return one_line(last.rpartition("error: ")[2] if said else last, 300)
