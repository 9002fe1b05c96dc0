"""Lets any number of processes share jobs, whether a launcher started them or a person did."""

import time
from collections.abc import Callable
from pathlib import Path

from dae_diffusers.errors import UserError
from dae_diffusers.locks import FolderLock

_POLL_SECONDS = 0.5


def share(names: list[str], folder: Path, is_done: Callable[[str], bool], work: Callable[[str], None]) -> None:
    r"""
    Does the jobs that are not done and that no other process is doing, one after another, and returns when all are done. The jobs of
    a process that was killed are taken over.

    Args:
        names (`list[str]`): The jobs, in the order in which to begin them.
        folder (`Path`): Of the claims; the same for all processes.
        is_done (`Callable`): Whether a job has left its result.
        work (`Callable`): Does a job; afterwards it must be done.
    """
    while left := [name for name in names if not is_done(name)]:
        if not any(_take(name, folder, is_done, work) for name in left):
            time.sleep(_POLL_SECONDS)


def do_once(name: str, folder: Path, is_done: Callable[[], bool], work: Callable[[], None]) -> None:
    r"""Does a single job, unless it is done, or waits until another process has done it; see [`share`]."""
    share([name], folder, lambda _: is_done(), lambda _: work())


def is_at_work(name: str, folder: Path) -> bool:
    r"""Whether a process is doing a job now."""
    if not (folder / "claims" / name).exists():
        return False
    try:
        FolderLock(folder / "claims" / name).release()
    except UserError:
        return True
    return False


def _take(name: str, folder: Path, is_done: Callable[[str], bool], work: Callable[[str], None]) -> bool:
    """Whether this process got the job."""
    claim = folder / "claims" / name
    claim.mkdir(parents=True, exist_ok=True)
    try:
        lock = FolderLock(claim)
    except UserError:
        return False
    try:
        if not is_done(name):
            work(name)
    finally:
        lock.release()
    return True
