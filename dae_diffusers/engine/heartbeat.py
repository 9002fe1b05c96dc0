"""Reports which process a run of several processes waits for."""

import json
import logging
import os
import socket
import sys
import threading
import time
from pathlib import Path

from accelerate import Accelerator

from dae_diffusers.engine.guard import NonFiniteGuard
from dae_diffusers.signals import StopSignal
from dae_diffusers.store import write_atomically

logger = logging.getLogger(__name__)

# Seconds without a step after which a line says which process the others wait for; later lines come at growing intervals.
PATIENCE_SECONDS = 300.0

# What waiting processes do: they exchange tensors, or wait for those of the backward pass.
# On a GPU they do not wait before they read a number back, as the questions to the guard and to the stop signal do.
_QUESTIONS = (StopSignal.requested.__name__, NonFiniteGuard.allows.__name__)
_WAITING = ("distributed_c10d.py", "_engine_run_backward", Accelerator.wait_for_everyone.__name__, *_QUESTIONS)


class Heartbeat:
    r"""
    Every few seconds, each process writes what it is doing into a small file in the run's folder. If no step ends for some minutes,
    the first process that waits says which one it waits for, what that one does, and whether it still answers.

    ```python
    with Heartbeat(accelerator, run.folder) as heartbeat:
        while step < last_step:
            ...
            heartbeat.beat(step)
    ```

    With one process it does nothing.

    Args:
        accelerator ([`~accelerate.Accelerator`]): The run's accelerator.
        folder (`Path`): An existing folder that all processes see.
        patience (`float`, *optional*): Seconds; defaults to `PATIENCE_SECONDS`.
    """

    def __init__(self, accelerator: Accelerator, folder: Path, patience: float | None = None):
        self.patience = PATIENCE_SECONDS if patience is None else patience
        self._rank, self._num_processes = accelerator.process_index, accelerator.num_processes
        self._folder = folder
        self._main_thread = threading.get_ident()
        self._step = -1
        self._since = self._started = time.time()
        self._next_line = self.patience
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> "Heartbeat":
        if self._num_processes > 1:
            self._note(time.time())
            self._thread.start()
        return self

    def __exit__(self, *exception) -> None:
        self._ended.set()
        if self._thread.is_alive():
            self._thread.join()
            self._path(self._rank).unlink(missing_ok=True)

    def beat(self, step: int) -> None:
        r"""Notes that a step has ended."""
        self._step, self._since = step, time.time()

    def _watch(self) -> None:
        while not self._ended.wait(min(10.0, self.patience / 4)):
            now = time.time()
            if now - self._since < self.patience:
                self._next_line = self.patience
            self._note(now)
            if now - self._since >= self._next_line:
                self._say(now)

    def _note(self, now: float) -> None:
        place, waits = self._place()
        note = {"process": f"{os.getpid()} on {socket.gethostname()}", "time": now, "place": place, "waits": waits}
        try:
            write_atomically(self._path(self._rank), json.dumps({"step": self._step, **note}))
        except OSError:  # a full or vanished disk is for the run itself to report
            pass

    def _say(self, now: float) -> None:
        notes = {rank: self._read(rank) for rank in range(self._num_processes)}
        silent = {rank: now - note["time"] for rank, note in notes.items() if now - note["time"] > self.patience / 2}
        answering = [rank for rank in notes if rank not in silent]
        waiting = [rank for rank in answering if notes[rank]["waits"]]
        if (waiting or answering)[:1] != [self._rank]:
            return
        late = []
        for rank, note in notes.items():
            who = f"process {rank} ({note['process']})" if note["process"] else f"process {rank}"
            if rank in silent:
                late.append(f"{who}, which has not answered for {silent[rank]:.0f} s: it is stopped, dead or cut off")
            elif waiting and not note["waits"]:
                late.append(f"{who}, which is in {note['place']}")
        if late:
            logger.error(  # a warning of another process than the main one would not be shown
                "no step has ended for %.0f s (last one: %d). The others wait for %s.",
                now - self._since,
                self._step,
                "; and for ".join(late),
            )
            self._next_line = 2 * max(self._next_line, now - self._since)

    def _place(self) -> tuple[str, bool]:
        """The line of code that the training thread is in, and whether it waits there for other processes."""
        frame = sys._current_frames().get(self._main_thread)
        place, waits = "", False
        while frame is not None:
            name, function = Path(frame.f_code.co_filename).name, frame.f_code.co_name
            place = place or f"{name}:{frame.f_lineno} ({function})"
            waits = waits or name in _WAITING or function in _WAITING
            frame = frame.f_back
        return place, waits

    def _read(self, rank: int) -> dict:
        try:
            note = json.loads(self._path(rank).read_text())
            if note["time"] >= self._started - self.patience:  # not of a run that was killed before
                return note
        except (OSError, ValueError, KeyError, TypeError):
            pass
        return {"process": "", "time": self._started, "place": "", "waits": False}

    def _path(self, rank: int) -> Path:
        return self._folder / f".process-{rank}"
