"""Stops a run cleanly after a signal or the death of its launcher; data-loading processes leave both to the run."""

import os
import shlex
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil
import torch
from accelerate import Accelerator
from accelerate.utils import parse_flag_from_env

# SIGHUP: the terminal is closed. Windows has none.
STOPPING = tuple(getattr(signal, name) for name in ("SIGTERM", "SIGINT", "SIGHUP") if hasattr(signal, name))

# A launcher and a terminal may both pass on one Ctrl-C: signals within this many seconds count as one.
SAME_WISH_SECONDS = 1.0

_LAUNCHER_PROGRAMS = ("accelerate", "accelerate-launch", "torchrun", "deepspeed", "dae-diffusers")
_LAUNCHER_MODULES = (
    "accelerate.commands.accelerate_cli",
    "accelerate.commands.launch",
    "torch.distributed.run",
    "torch.distributed.launch",
    "deepspeed.launcher.launch",
    "dae_diffusers.console",
)
_WATCH_SECONDS = 0.5


def launcher_pid() -> int | None:
    r"""
    The process that started this one, if it is a launcher such as `accelerate launch` or `torchrun`. Otherwise None: a run
    that a shell started (`nohup python train_dae.py &`) outlives the shell.
    """
    parent = os.getppid()
    try:
        words = psutil.Process(parent).cmdline()
    except psutil.Error:  # ended already, or belongs to another user
        return None
    return parent if is_launcher(words) else None


def is_launcher(words: list[str]) -> bool:
    r"""Whether a command line (a list of words) starts a launcher, judged by its program, script or module, not by its arguments."""
    names = [Path(word).name.removesuffix(".exe").removesuffix(".py") for word in words]
    if not names or names[0] in _LAUNCHER_PROGRAMS:
        return bool(names)
    if not names[0].lower().startswith("python"):
        return False
    place = 1
    while place < len(words) and words[place].startswith("-") and words[place] not in ("-m", "-c"):
        place += 2 if words[place] in ("-W", "-X") else 1
    if words[place : place + 1] == ["-m"]:
        return words[place + 1 : place + 2] != [] and words[place + 1] in _LAUNCHER_MODULES
    return names[place : place + 1] != [] and names[place] in _LAUNCHER_PROGRAMS


# Read when the run begins to import: a launcher that dies while torch is loaded is noticed too.
_LAUNCHER = (os.getpid(), launcher_pid())


class StopSignal:
    r"""
    Turns SIGTERM, SIGINT and SIGHUP, and the death of the launcher, into a request to stop after the current step. A second
    signal kills as usual. Signals that the caller ignores, such as SIGHUP under `nohup`, stay ignored.

    ```python
    with StopSignal(accelerator) as stop:
        for ...:
            if stop.requested():  # the same answer on every process
                checkpointer.save(step)
                stop.exit()
    ```
    """

    def __init__(self, accelerator: Accelerator):
        self.accelerator = accelerator
        self.signal_number = 0
        self._pid = os.getpid()
        self._received = 0.0
        self._previous: dict[int, Any] = {}
        self._at_once: Callable[[], None] | None = None
        self._launcher = _LAUNCHER[1] if _LAUNCHER[0] == self._pid else launcher_pid()

    def __enter__(self) -> "StopSignal":
        for number in STOPPING:
            if signal.getsignal(number) is not signal.SIG_IGN:
                self._previous[number] = signal.signal(number, self._receive)
        return self

    def __exit__(self, *exception) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def requested(self) -> bool:
        r"""Whether any process has received a signal or lost its launcher. With several processes all must call it at the same step."""
        if not self.signal_number and self._launcher is not None and os.getppid() != self._launcher:
            self.signal_number = int(signal.SIGTERM)
            self._say(f"the launcher (process {self._launcher}) has ended: finishing the step, then saving")
        if self.accelerator.num_processes > 1:
            number = torch.tensor(self.signal_number, device=self.accelerator.device)
            self.signal_number = int(self.accelerator.gather(number).max())
        return self.signal_number != 0

    @contextmanager
    def at_once(self, leave: Callable[[], None]) -> Iterator[None]:
        r"""Inside the `with` block, a signal makes this process call `leave` at once, which ends with [`exit`]."""
        self._at_once = leave
        try:
            yield
        finally:
            self._at_once = None

    def exit(self, *, step: int | None = None, command: str | None = None) -> None:
        r"""
        Ends the process with 128 + the signal's number.

        Args:
            step (`int`, *optional*): The step that was saved, for the last line of output.
            command (`str`, *optional*): The command to continue with, for the same line; see [`resuming_command`].
        """
        if step is not None:
            self._say(f"saved step {step}" + (f"; go on with: {command}" if command else ""))
        raise SystemExit(128 + self.signal_number)

    def _receive(self, number: int, frame) -> None:
        if os.getpid() != self._pid:  # a copy of this process that has not set its own handlers yet
            return
        now = time.monotonic()
        if self.signal_number and now - self._received > SAME_WISH_SECONDS:
            signal.signal(number, self._previous[number])
            signal.raise_signal(number)
            return
        if not self.signal_number:
            self._received = now
            self.signal_number = number
            name = signal.Signals(number).name
            if self._at_once is not None:
                self._say(f"received {name} in a measurement, which is made again when the run goes on")
                self._at_once()
            self._say(f"received {name}: finishing the step, then saving")

    def _say(self, text: str) -> None:
        if self.accelerator.is_main_process:
            try:
                print(f"\n{text}", flush=True)
            except OSError:  # whoever read our output has gone
                pass


def resuming_command(argv: list[str] | None = None) -> str:
    r"""
    The command that the user typed, with `--resume_from_checkpoint latest` and what the environment tells accelerate about CPUs.

    Args:
        argv (`list[str]`, *optional*): The command; defaults to that of `dae-diffusers`, of the launcher or of Python.
    """
    if argv is None:
        argv = shlex.split(os.environ.get("DAE_DIFFUSERS_COMMAND", "")) or _typed_command()
    kept, words = [], iter(argv)
    for word in words:
        if word == "--resume_from_checkpoint":
            next(words, None)
        elif not word.startswith("--resume_from_checkpoint="):
            kept.append(word)
    is_on_cpus = parse_flag_from_env("ACCELERATE_USE_CPU") and "--cpu" not in kept
    start = "ACCELERATE_USE_CPU=true " if is_on_cpus else ""
    return start + shlex.join([*kept, "--resume_from_checkpoint", "latest"])


def _typed_command() -> list[str]:
    if _LAUNCHER[1] is not None and os.getppid() == _LAUNCHER[1]:
        try:
            words = psutil.Process(_LAUNCHER[1]).cmdline()
            # `python /path/bin/accelerate launch ...` was typed as `accelerate launch ...`
            if Path(words[1]).name in _LAUNCHER_PROGRAMS:
                words = words[1:]
            return [Path(words[0]).name, *words[1:]]
        except (psutil.Error, IndexError):
            pass
    return [Path(sys.orig_argv[0]).name, *sys.orig_argv[1:]]


def protect_worker() -> None:
    r"""
    Makes a data-loading process ignore signals that are sent to all processes of a run, because the run needs it to
    finish the step. The run itself can still end it, and it ends within a second of the run.

    Call it in the process, in its main thread.
    """
    parent = os.getppid()
    can_wait = hasattr(signal, "sigtimedwait")
    if can_wait:  # the watching thread takes the signals, and sees who sent them
        signal.pthread_sigmask(signal.SIG_BLOCK, STOPPING)
    else:
        for number in STOPPING:
            signal.signal(number, signal.SIG_IGN)

    def watch() -> None:
        while os.getppid() == parent:
            received = signal.sigtimedwait(STOPPING, _WATCH_SECONDS) if can_wait else time.sleep(_WATCH_SECONDS)
            if received is not None and received.si_pid == parent:
                break
        os._exit(0)

    if hasattr(os, "fork"):  # Windows keeps the number of a parent that has ended; torch watches its handle there
        threading.Thread(target=watch, daemon=True).start()
