"""
Starts scripts as processes that need not import torch: a server imports it once and forks.

A forked process does what `python -m dae_diffusers.training.SCRIPT ...` does: the script's file runs as `__main__` in a session of its
own, with its own output and arguments, and ends with Python's own shutdown. Signals reach it by its number. It draws no curves, which take
most of the time of a tiny run.
"""

import gc
import importlib
import json
import os
import runpy
import selectors
import signal
import subprocess
import sys
import threading
from typing import IO

from dae_diffusers.engine import log as runlog

PACKAGE = "dae_diffusers.training"


class ForkServer:
    """
    A context. `start` gives something like a `subprocess.Popen`; one at a time.

    Args:
        scripts: Their names, whose imports are done once.
        env: Of the server, and of what it forks.
    """

    def __init__(self, scripts: list[str], env: dict[str, str]):
        self.process = subprocess.Popen(
            [sys.executable, __file__, *scripts],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**env, "JE_ARROW_MALLOC_CONF": "background_thread:false"},  # pyarrow's only thread
        )

    def __enter__(self) -> "ForkServer":
        return self

    def __exit__(self, *exception) -> None:
        self.process.communicate(timeout=60)

    def start(self, script: str, flags: list[str], output: IO[str]) -> "Forked":
        # The child opens the file by itself: the server has none of our descriptors.
        request = {"script": script, "flags": flags, "output": f"/proc/{os.getpid()}/fd/{output.fileno()}"}
        self.process.stdin.write(json.dumps(request) + "\n")
        self.process.stdin.flush()
        return Forked(int(self.process.stdout.readline()), self.process.stdout)


class Forked:
    """A process that the server has forked, with the part of `Popen`'s surface that is needed."""

    def __init__(self, pid: int, answers: IO[str]):
        self.pid = pid
        self.returncode: int | None = None
        self._answers = answers

    def poll(self) -> int | None:
        return self._wait(0)

    def wait(self, timeout: float | None = None) -> int:
        if self._wait(timeout) is None:
            raise subprocess.TimeoutExpired(str(self.pid), timeout)
        return self.returncode

    def _wait(self, timeout: float | None) -> int | None:
        if self.returncode is None:
            with selectors.DefaultSelector() as selector:
                selector.register(self._answers, selectors.EVENT_READ)
                if selector.select(timeout):
                    self.returncode = int(self._answers.readline())
        return self.returncode


def _serve(scripts: list[str]) -> None:
    """Forks for each line of stdin; writes the number of the process, and at its end the exit code."""
    for script in scripts:
        importlib.import_module(f"{PACKAGE}.{script}")
        del sys.modules[f"{PACKAGE}.{script}"]  # runs again, as `__main__`
    runlog.plot_curves = lambda *args, **kwargs: None
    assert threading.active_count() == 1 and len(os.listdir("/proc/self/task")) == 1, "a fork would lose threads"
    gc.collect()
    gc.freeze()  # else each copy of this process would look through, and so copy, all that torch has made
    for line in sys.stdin:
        process = os.fork()
        if process == 0:
            return _become(**json.loads(line))
        print(process, flush=True)
        print(os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]), flush=True)
    os._exit(0)


def _become(script: str, flags: list[str], output: str) -> None:
    os.setsid()
    descriptor = os.open(output, os.O_WRONLY | os.O_APPEND)
    nothing = os.open(os.devnull, os.O_RDONLY)
    for target, source in ((0, nothing), (1, descriptor), (2, descriptor)):
        os.dup2(source, target)
    os.close(descriptor), os.close(nothing)
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
    sys.orig_argv = [sys.executable, "-m", f"{PACKAGE}.{script}", *flags]
    sys.argv = [f"{script}.py", *flags]
    runpy.run_module(f"{PACKAGE}.{script}", run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    _serve(sys.argv[1:])
