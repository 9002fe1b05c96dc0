"""The first steps of a run, to say what the whole of it would take."""

import math
import tempfile
import time
from collections.abc import Callable, Generator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import fmean
from typing import Any

import psutil
import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list

from dae_diffusers.duration import duration, pace
from dae_diffusers.engine.checkpointing import find_checkpoints
from dae_diffusers.engine.precision import computing_in_other_precision, faster_precision, other_precision

_NAMES = {"no": "float32", "bf16": "bfloat16"}  # of precisions
_MUCH = 0.9  # of memory or disk


@dataclass(frozen=True)
class Phase:
    r"""
    Steps of a loop that are timed, all in one way or alternately in two.

    Attributes:
        name (`str`): Of its row in the report.
        num_steps (`int`): How many steps are taken.
        num_first (`int`): How many of them, the first, do not count.
        way (callable): Makes the context of a step, from the loop and the number of the step in the phase.
        verdict (callable, *optional*): What the report says, from seconds of a step of the run as earlier phases know it, seconds of each
            step here, and the number of steps of the loop. The first phase has none: there is nothing to compare.
        is_of_run (`bool`): Whether the run goes like this, so that this phase knows better than earlier ones what it takes.
    """

    name: str
    num_steps: int
    num_first: int
    way: Callable[[Any, int], AbstractContextManager] = lambda loop, number: nullcontext()
    verdict: Callable[[float, list[float], int], str] | None = None
    is_of_run: bool = True

    def within(self, steps: int) -> "Phase":
        r"""The phase itself, or one of as few steps as there are."""
        taken = min(self.num_steps, steps)
        return replace(self, num_steps=taken, num_first=min(self.num_first, taken - 1))

    def measure(self, loop: Any) -> Generator[None, None, list[float]]:
        r"""Yields for each step. Returns the seconds of each."""
        times = []
        for number in range(self.num_steps):
            with self.way(loop, number):
                before = time.monotonic()
                yield
                times.append(time.monotonic() - before)
        return times


def phases_of(compiles: bool, other: str | None) -> list[Phase]:
    r"""
    The phases of each loop.

    Args:
        compiles (`bool`): Whether the run compiles its networks. Then their time without comes first.
        other (`str`, *optional*): The `mixed_precision` to compare with the run's; see [`~dae_diffusers.engine.precision.other_precision`].
    """
    warm_up = 2 if compiles else 1  # the second step compiles again: it sees what has changed since the first
    if compiles:
        plain = Phase("plain", 4, 1, way=lambda loop, number: torch.compiler.set_stance("force_eager"))
        phases = [plain, Phase("compiled", 5, warm_up, verdict=_verdict_on_compiling)]
    else:
        phases = [Phase("plain", 4, warm_up)]
    if other is not None:

        def way(loop: Any, number: int) -> AbstractContextManager:
            is_other = number % 2 == 0  # by turns: other programs on the machine slow both
            return computing_in_other_precision(loop.accelerator, loop.accumulated) if is_other else nullcontext()

        def verdict(seconds: float, times: list[float], steps: int) -> str:
            return gain_of_precision(other, times[2 * warm_up + 1 :: 2], times[2 * warm_up :: 2])

        phases.append(Phase(_NAMES[other], 2 * (warm_up + 3), 2 * warm_up, way, verdict, is_of_run=False))
    return phases


class DryRun:
    r"""
    Takes the place of training: a few real steps of each loop, in a temporary folder. They are taken in phases, see [`phases_of`].

    Args:
        accelerator ([`~accelerate.Accelerator`]): Of the run. All processes make one together.
        compiles (`bool`, *optional*, defaults to `False`): Whether the run compiles its networks.

    Attributes:
        folder (`Path`): What takes the place of the output folder. [`close`] removes it.
    """

    def __init__(self, accelerator: Accelerator, compiles: bool = False):
        self._kept = tempfile.TemporaryDirectory(prefix="dry-run-") if accelerator.is_main_process else None
        shared = [self._kept and self._kept.name, other_precision(accelerator)]
        broadcast_object_list(shared)
        self.folder, other = Path(shared[0]), shared[1]
        self._phases = phases_of(compiles, other)
        self._loops: dict[str, tuple[int, float]] = {}  # steps, and seconds of one
        self._verdicts: dict[str, dict[str, str]] = {}  # of the phases of each loop
        self._used = 0  # bytes of memory
        self._has_compared = False  # the precisions

    def begin(self, loop: Any) -> None:
        r"""Starts the clock, before the first step of a [`~dae_diffusers.engine.loop.Loop`]."""
        self._steps = self._measure(loop)
        next(self._steps)

    def has_seen_step(self) -> bool:
        r"""Notes the time after a step of the loop. Returns whether these steps suffice."""
        return next(self._steps, "over") == "over"

    def _measure(self, loop: Any) -> Generator[None, None, None]:
        name, device, steps = loop.description, loop.accelerator.device, loop.last_step - loop.first_step
        phases = [self._phases[0].within(steps), *self._phases[1:]]
        left, seconds, used, verdicts = steps, math.nan, 0, self._verdicts.setdefault(name, {})
        for phase in phases:
            if phase.num_steps > left:
                verdicts[phase.name] = "not measured: the run is too short"
                continue
            left -= phase.num_steps
            if device.type == "cuda":
                torch.cuda.reset_peak_memory_stats(device)
            times = yield from phase.measure(loop)
            if phase.verdict is not None:
                verdicts[phase.name] = phase.verdict(seconds, times, steps)
            if phase.is_of_run:
                seconds, used = fmean(times[phase.num_first :]), _used_memory(device)
            else:
                self._has_compared = True
        self._loops[name] = steps, seconds
        self._used = max(self._used, used)

    def report(self, run: Any) -> None:
        r"""
        Prints what the run would take.

        Args:
            run ([`~dae_diffusers.engine.run.TrainingRun`]): The run, which has saved a checkpoint of each loop.
        """
        rows = [("parameters", f"{run.counts['parameters'] / 1e6:,.2f} M")]
        for name, (steps, seconds) in self._loops.items():
            rows.append((name, f"{steps:,} steps: {pace(steps, seconds, run.images_per_step, run.num_images)}"))
            rows += self._verdicts[name].items()
        if len(self._loops) > 1:
            rows.append(("all stages", duration(sum(steps * seconds for steps, seconds in self._loops.values()))))
        if not self._has_compared and (advice := faster_precision(run.accelerator)):
            rows.append(("faster", advice))
        rows += [("memory", _memory(self._used, run.accelerator.device)), ("disk", self._disk(run))]
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


def _used_memory(device: torch.device) -> int:
    """Bytes: on a GPU the most since the last reset."""
    return torch.cuda.max_memory_allocated(device) if device.type == "cuda" else psutil.Process().memory_info().rss


def _memory(used: int, device: torch.device) -> str:
    is_gpu = device.type == "cuda"
    whole = torch.cuda.get_device_properties(device).total_memory if is_gpu else psutil.virtual_memory().total
    much = ". WARNING: validation may need more; use a smaller batch" if used > _MUCH * whole else ""
    return f"{gib(used)} of {gib(whole)} for each process{much}"


def _verdict_on_compiling(plain: float, times: list[float], steps: int) -> str:
    compiled = fmean(times[2:])
    return gain_of_compiling(plain, compiled, max(0.0, sum(times[:2]) - 2 * compiled), steps)


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


def gain_of_precision(other: str, of_run: list[float], measured: list[float]) -> str:
    r"""
    What another precision gains, in words. It is faster if each of its steps is faster than each of the run's.

    Args:
        other (`str`): As in `mixed_precision`: "no" or "bf16".
        of_run, measured (`list[float]`): Seconds of steps in the run's precision, and in the other.
    """
    text = f"{fmean(measured):.2g} instead of {fmean(of_run):.2g} seconds a step"
    if max(measured) < min(of_run):
        return f"{text}: `--mixed_precision {other}` is faster"
    unclear = "" if max(of_run) < min(measured) else "no clear difference, "
    return f"{text}: {unclear}stay in {_NAMES['no' if other == 'bf16' else 'bf16']}"


def gib(number: float) -> str:
    r"""Bytes in words: "1.50 GiB", "12.0 MiB"."""
    return f"{number / 2**30:,.2f} GiB" if number >= 2**28 else f"{number / 2**20:,.1f} MiB"
