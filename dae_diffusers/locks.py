"""Locks a folder for one run."""

import logging
import os
import socket
from pathlib import Path

from accelerate import Accelerator
from accelerate.utils import broadcast_object_list
from filelock import FileLock, Timeout

from dae_diffusers.errors import ConfigError, UserError

logger = logging.getLogger(__name__)

OWNER = ".owner"  # in the output folder of each run: who holds its lock


class FolderLock:
    r"""
    Keeps a second run out of a folder. The operating system drops the lock when the process ends, however it ends.

    Processes that a run forks, such as data-loading ones, do not hold the lock: they may outlive a killed run for a moment.

    Args:
        folder (`Path`): The folder, which exists.

    Raises:
        UserError: If another process holds the lock.
    """

    # The key holds the process id: a forked process inherits the entry, but does not hold the lock.
    _held: dict[tuple[int, Path], FileLock] = {}
    _descriptors: dict[Path, int] = {}

    def __init__(self, folder: Path):
        self._key = (os.getpid(), (folder / ".lock").resolve())
        if self._key in self._held:
            return
        owner = folder / OWNER  # a separate file, because on Windows other processes cannot read a locked one
        lock = _make_lock(self._key[1])
        try:
            lock.acquire(blocking=False)
        except Timeout:
            raise UserError(
                f"{folder} is in use by another run ({_read_owner(owner)}). Wait until it ends, or choose another "
                "`output_dir`."
            ) from None
        except (PermissionError, IsADirectoryError):
            raise
        except (OSError, NotImplementedError) as error:
            logger.warning("%s cannot be locked (%s): do not start a second run there.", folder, error)
            return
        self._held[self._key] = lock
        if hasattr(os, "fork"):
            self._descriptors[self._key[1]] = _descriptor_of(self._key[1])
        owner.write_text(f"process {os.getpid()} on {socket.gethostname()}\n")

    def release(self) -> None:
        r"""Gives the folder back."""
        lock = self._held.pop(self._key, None)
        if lock is not None:
            self._descriptors.pop(self._key[1], None)
            lock.release()

    @classmethod
    def _leave_to_parent(cls) -> None:
        """In a forked process: the lock belongs to the open file, and would live as long as this process has it open."""
        for path, descriptor in cls._descriptors.items():
            if _is_open_as(path, descriptor):  # `filelock` may have closed it
                os.close(descriptor)
        cls._descriptors.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=FolderLock._leave_to_parent)


def _make_lock(path: Path) -> FileLock:
    options = {"mode": 0o644, "thread_local": False}
    try:  # a marker file, instead of a lock of the system, would outlive a killed run
        return FileLock(path, **options, fallback_to_soft=False)
    except TypeError:  # `filelock` 3 has no such marker
        return FileLock(path, **options)


def _descriptor_of(path: Path) -> int:
    """The newest descriptor of a file that this process has open."""
    number = os.open(os.devnull, os.O_RDONLY)  # they are given out from below
    os.close(number)
    while number >= 0 and not _is_open_as(path, number):
        number -= 1
    return number


def _is_open_as(path: Path, descriptor: int) -> bool:
    try:
        return os.path.samestat(os.fstat(descriptor), os.stat(path))
    except OSError:
        return False


def _read_owner(path: Path) -> str:
    try:
        return path.read_text(errors="replace")[:200].strip() or "unknown process"
    except OSError:
        return "unknown process"


class TakenFolder:
    r"""A folder that [`take_folder`] has taken, on every process; the main one has its lock."""

    def __init__(self, lock: FolderLock | None):
        self._lock = lock

    def release(self) -> None:
        r"""Gives the folder back. It may be called on any process."""
        if self._lock is not None:
            self._lock.release()


def make_writable(folder: Path) -> None:
    r"""
    Makes a folder for results and checks that it can be written.

    Raises:
        UserError: If it cannot.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe = folder / f".writable-{os.getpid()}"
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise UserError(f"`output_dir`: {folder} cannot be written: {error.strerror or error}.") from None


def mark_folder(folder: Path) -> None:
    r"""
    As [`make_writable`], for results that need no lock. Pictures in the folder are not trained on, wherever it lies.

    Raises:
        UserError: If it cannot be written.
    """
    make_writable(folder)
    if not (folder / OWNER).exists():
        (folder / OWNER).touch()


def take_folder(folder: Path, accelerator: Accelerator) -> TakenFolder:
    r"""
    Makes a folder, checks that it can be written, and locks it. All processes call it; the main one holds the lock.

    Raises:
        ConfigError: If several processes were started and each would work alone, or fp16 was asked for on a CPU.
        UserError: On every process, if the folder cannot be written or another run has it.
    """
    check_launch(accelerator)
    problem, lock = [None], None
    if accelerator.is_main_process:
        try:
            make_writable(folder)
            lock = FolderLock(folder)
        except UserError as error:
            problem = [str(error)]
    broadcast_object_list(problem)
    if problem[0]:
        raise UserError(problem[0])
    return TakenFolder(lock)


def check_launch(accelerator: Accelerator) -> None:
    r"""
    Checks that accelerate does what it was asked for. Without a GPU it silently lets each of several processes work alone, and
    computes in float32 instead of fp16.

    Raises:
        ConfigError: If it does not.
    """
    if accelerator.mixed_precision == "fp16" and accelerator.device.type == "cpu":
        raise ConfigError("`mixed_precision` is fp16, which needs a GPU. On a CPU use bf16 or no.")
    started = os.environ.get("WORLD_SIZE", "1")
    if accelerator.num_processes == 1 and started.isdigit() and int(started) > 1:
        raise ConfigError(
            f"{started} processes were started, but accelerate found no GPU for each, so each would train alone. On CPUs "
            "set `ACCELERATE_USE_CPU=true` in the environment; otherwise start one process."
        )
