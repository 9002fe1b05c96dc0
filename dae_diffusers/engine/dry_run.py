"""The first steps of a run, to say what the whole of it would take."""

import math
import tempfile
import time
from pathlib import Path
from typing import Any

import psutil
import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list

from dae_diffusers.duration import duration, pace
from dae_diffusers.engine.checkpointing import find_checkpoints
from dae_diffusers.engine.precision import faster_precision

_STEPS = 4  # the first warms up
_COMPILED_STEPS = 5  # the first two compile: the second sees what has changed since the first
_MUCH = 0.9  # of memory or disk


class DryRun:
    r"""
    Takes the place of training: a few real steps of each loop, in a temporary folder. Of a run that compiles its networks, the same
    number of steps as they are comes first, so that it can say when compiling pays.

    Args:
        accelerator ([`~accelerate.Accelerator`]): Of the run. All processes make one together.
        compiles (`bool`, *optional*, defaults to `False`): Whether the run compiles its networks.

    Attributes:
        folder (`Path`): What takes the place of the output folder. [`close`] removes it.
    """

    def __init__(self, accelerator: Accelerator, compiles: bool = False):
        self._kept = tempfile.TemporaryDirectory(prefix="dry-run-") if accelerator.is_main_process else None
        name = [self._kept and self._kept.name]
        broadcast_object_list(name)
        self.folder = Path(name[0])
        self._compiles = compiles
        self._loops: dict[str, tuple[int, float]] = {}  # steps, and seconds of one
        self._compiled: dict[str, str] = {}  # what compiling gains
        self._times: list[float] = []
        self._seconds: float | None = None  # of a step that is not compiled

    def begin(self) -> None:
        r"""Starts the clock, before the first step of a loop."""
        self._times, self._seconds = [time.monotonic()], None
        if self._compiles:
            torch.compiler.set_stance("force_eager")

    def has_seen(self, loop: Any) -> bool:
        r"""Notes the time after a step of a [`~dae_diffusers.engine.loop.Loop`]. Returns whether these steps of the loop suffice."""
        self._times.append(time.monotonic())
        steps = loop.last_step - loop.first_step
        taken = len(self._times) - 1
        if self._seconds is None:
            if taken < min(_STEPS, steps):
                return False
            first = min(1, taken - 1)  # the step that warms up is left out, if there is another
            self._seconds = (self._times[-1] - self._times[first]) / (taken - first)
            self._loops[loop.description] = steps, self._seconds
            if not self._compiles:
                return True
            torch.compiler.set_stance("default")
            if torch.cuda.is_available():
                torch.cuda.reset_peak_memory_stats()  # the run itself is compiled
            self._times = self._times[-1:]
            if steps < _STEPS + _COMPILED_STEPS:
                self._compiled[loop.description] = "not measured: the run is too short"
                return True
        elif taken == _COMPILED_STEPS:
            seconds = (self._times[-1] - self._times[2]) / (taken - 2)
            compiling = max(0.0, self._times[2] - self._times[0] - 2 * seconds)
            self._loops[loop.description] = steps, seconds
            self._compiled[loop.description] = gain_of_compiling(self._seconds, seconds, compiling, steps)
            return True
        return False

    def report(self, run: Any) -> None:
        r"""
        Prints what the run would take.

        Args:
            run ([`~dae_diffusers.engine.run.TrainingRun`]): The run, which has saved a checkpoint of each loop.
        """
        rows = [("parameters", f"{run.counts['parameters'] / 1e6:,.2f} M")]
        for name, (steps, seconds) in self._loops.items():
            rows.append((name, f"{steps:,} steps: {pace(steps, seconds, run.images_per_step, run.num_images)}"))
            if name in self._compiled:
                rows.append(("compiled", self._compiled[name]))
        if len(self._loops) > 1:
            rows.append(("all stages", duration(sum(steps * seconds for steps, seconds in self._loops.values()))))
        if advice := faster_precision(run.accelerator):
            rows.append(("faster", advice))
        rows += [("memory", _memory(run.accelerator.device)), ("disk", self._disk(run))]
        print("The whole run would take, without validation and caches (a dry run: nothing is kept):")
        for name, text in rows:
            print(f"  {name:12}{text}")

    def close(self) -> None:
        r"""Removes the folder."""
        if self._kept is not None:
            self._kept.cleanup()

    def _disk(self, run: Any) -> str:
        settings, steps = run.config.run, sum(steps for steps, _ in self._loops.values())
        size = max(map(_size_of, find_checkpoints(run.checkpointer.folder)))
        saved = -(-steps // settings.checkpointing_steps)
        kept = min(saved, settings.checkpoints_total_limit or saved)
        output_dir = Path(settings.output_dir).absolute()
        room = next(folder for folder in (output_dir, *output_dir.parents) if folder.exists())
        free, needed = psutil.disk_usage(str(room)).free, size * (kept + 1)  # one is written before another goes
        short = (
            ". WARNING: that is not enough; keep fewer (`--checkpoints_total_limit`)" if needed > _MUCH * free else ""
        )
        return f"checkpoints of {gib(size)}, {kept} kept: up to {gib(needed)}; {gib(free)} are free{short}"


def _size_of(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def _memory(device: torch.device) -> str:
    if device.type == "cuda":
        used, whole = torch.cuda.max_memory_allocated(device), torch.cuda.get_device_properties(device).total_memory
    else:
        used, whole = psutil.Process().memory_info().rss, psutil.virtual_memory().total
    much = ". WARNING: validation may need more; use a smaller batch" if used > _MUCH * whole else ""
    return f"{gib(used)} of {gib(whole)} for each process{much}"


def gain_of_compiling(plain: float, compiled: float, compiling: float, steps: int) -> str:
    r"""
    What compiling gains, in words.

    Args:
        plain, compiled (`float`): Seconds of a step.
        compiling (`float`): Seconds that compiling takes.
        steps (`int`): Of the run.
    """
    text = f"{compiled:.2g} instead of {plain:.2g} seconds a step, after {duration(compiling)} of compiling"
    if compiled >= plain:
        return f"{text}: leave out `--compile`"
    needed = math.ceil(compiling / (plain - compiled))
    return f"{text}: pays after {needed:,} steps" + ("" if needed <= steps else "; leave out `--compile`")


def gib(number: float) -> str:
    r"""Bytes in words: "1.50 GiB", "12.0 MiB"."""
    return f"{number / 2**30:,.2f} GiB" if number >= 2**28 else f"{number / 2**20:,.1f} MiB"
