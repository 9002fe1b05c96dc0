"""Checkpoints that a kill at any instant leaves whole, a folder for one run only, and signals that end a run in order."""

import errno
import fcntl
import json
import logging
import os
import pickle
import shutil
import signal
import socket
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list, gather_object
from diffusers.training_utils import EMAModel
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.optim.lr_scheduler import LambdaLR

from dae_diffusers.cli import storage_problem
from dae_diffusers.errors import UserError, one_line
from dae_diffusers.store import sha256_of

logger = logging.getLogger(__name__)

_PREFIX = "checkpoint-"
_MANIFEST = "checkpoint.json"
_EMA = "ema.safetensors"
_TEMPORARY = "tmp-"


class Checkpointer:
    r"""
    Saves and restores everything that an [`~accelerate.Accelerator`] has prepared or registered.

    A checkpoint is written to a temporary folder, flushed to disk and renamed to `checkpoint-<step>`; its
    `checkpoint.json`, written last, lists every file with its size and hash. What is not listed or does not match is
    not loaded.

    Args:
        accelerator ([`~accelerate.Accelerator`]): Its prepared and registered objects are what is saved.
        folder (`Path`): Where the checkpoints lie.
        total_limit (`int`, *optional*): Keep only the newest this many.
    """

    def __init__(self, accelerator: Accelerator, folder: Path, total_limit: int | None = None):
        self.accelerator = accelerator
        self.folder = folder
        self.total_limit = total_limit

    def save(self, step: int, *, ema: EMAModel | None = None, **state: Any) -> None:
        r"""
        Saves. All processes call it.

        Args:
            step (`int`): Optimiser steps done.
            ema (`EMAModel`, *optional*): Moving averages to save beside.
            state: Anything JSON can hold that the run needs besides; [`newest`] gives it back.

        Raises:
            UserError: If the disk is full or the folder cannot be written; earlier checkpoints stay as they are.
        """
        try:
            self._save(step, ema, state)
        except Exception as error:
            problem = storage_problem(error) or (str(error) if isinstance(error, OSError) else None)
            if problem is None:
                raise
            shutil.rmtree(self.folder / f"{_TEMPORARY}{_PREFIX}{step:08d}", ignore_errors=True)
            raise UserError(
                f"the checkpoint of step {step} cannot be written to {self.folder}: {problem}. "
                "Earlier checkpoints are whole. Make room and continue with `--resume_from_checkpoint latest`."
            ) from None

    def _save(self, step: int, ema: EMAModel | None, state: dict[str, Any]) -> None:
        final = self.folder / f"{_PREFIX}{step:08d}"
        temporary = self.folder / f"{_TEMPORARY}{final.name}"
        if self.accelerator.is_main_process:
            shutil.rmtree(temporary, ignore_errors=True)
            temporary.mkdir(parents=True)
        self.accelerator.wait_for_everyone()
        self.accelerator.save_state(str(temporary))
        shadow = {} if ema is None else {str(n): whole_tensor(value) for n, value in enumerate(ema.shadow_params)}
        self.accelerator.wait_for_everyone()
        if self.accelerator.is_main_process:
            if ema is not None:
                # As safetensors: what accelerate registers for checkpointing, it reads back with pickle.
                save_file(shadow, temporary / _EMA)
            manifest = {
                "step": step,
                "state": state,
                "ema_steps": None if ema is None else ema.optimization_step,
                "num_processes": self.accelerator.num_processes,
                "files": {
                    str(path.relative_to(temporary)): {"size": path.stat().st_size, "sha256": sha256_of(path)}
                    for path in sorted(temporary.rglob("*"))
                    if path.is_file()
                },
            }
            (temporary / _MANIFEST).write_text(json.dumps(manifest, indent=2))
            _flush(temporary)
            if final.exists():
                self._discard(final)
            temporary.rename(final)
            _flush_folder(self.folder)
            self._rotate(final)
        self.accelerator.wait_for_everyone()

    def newest(self, path: str = "latest") -> tuple[Path, dict[str, Any]] | None:
        r"""
        The checkpoint to go on from. All processes call it; the main one chooses and verifies.

        Args:
            path (`str`): `latest`, or the folder of one checkpoint.

        Returns:
            Its folder and manifest (`step`, `state`, `num_processes`), or None if `latest` finds none. A damaged
            checkpoint is reported and the one before it is used.

        Raises:
            UserError: On every process, if a named checkpoint does not exist or is damaged, if all that exist are damaged, or
                if a process does not see the one that was chosen.
        """
        found, problem = None, None
        if self.accelerator.is_main_process:
            try:
                found = self._find(path)
            except UserError as error:
                problem = str(error)
        found, problem = broadcast_object_list([found, problem])
        if problem is not None:
            raise UserError(problem)
        if found is not None and not all(gather_object([(found[0] / _MANIFEST).exists()])):
            raise UserError(
                f"{found[0]} is not there for all processes. Choose an `--output_dir` that all machines share."
            )
        return found

    def _find(self, path: str) -> tuple[Path, dict[str, Any]] | None:
        """What [`newest`] describes, as this process sees it."""
        if path != "latest":
            problem, manifest = _verify(Path(path))
            if problem:
                raise UserError(f"`--resume_from_checkpoint` {path} cannot be used: {problem}. Try `latest`.")
            return Path(path), manifest
        candidates = sorted(self.folder.glob(f"{_PREFIX}*"), reverse=True)
        for candidate in candidates:
            problem, manifest = _verify(candidate)
            if not problem:
                return candidate, manifest
            logger.warning("%s is damaged (%s); trying the one before.", candidate, problem)
        if candidates:
            raise UserError(f"every checkpoint in {self.folder} is damaged. Remove the folder to start anew.")
        return None

    def load(self, path: Path, *, ema: EMAModel | None = None) -> None:
        r"""
        Restores the prepared objects and the averages. All processes call it, after preparing the same objects.

        The optimisers keep the settings that they were made with, such as the learning rate, and take only their moments
        from the checkpoint.

        Raises:
            UserError: If the checkpoint is of other objects, such as a model of another size, or holds pickled code, which
                is not run.
        """
        try:
            self._load(path, ema)
        except (OSError, RuntimeError, ValueError, LookupError, pickle.UnpicklingError, SafetensorError) as error:
            raise UserError(
                f"{path} does not fit this run ({one_line(error, 300)}). Resume with the flags of the run that "
                "saved it, or train in another `--output_dir`."
            ) from None

    def _load(self, path: Path, ema: EMAModel | None) -> None:
        optimizers, schedulers = self.accelerator._optimizers, [each.scheduler for each in self.accelerator._schedulers]
        settings = [
            [{name: value for name, value in group.items() if name != "params"} for group in optimizer.param_groups]
            for optimizer in optimizers
        ]
        base_lrs = [list(scheduler.base_lrs) for scheduler in schedulers]
        self.accelerator.load_state(str(path))
        for optimizer, of_groups in zip(optimizers, settings, strict=True):
            for group, of_group in zip(optimizer.param_groups, of_groups, strict=True):
                group.update(of_group)
        for scheduler, of_scheduler in zip(schedulers, base_lrs, strict=True):
            _set_base_lrs(scheduler, of_scheduler)
        if ema is not None:
            shadow = load_file(path / _EMA)
            for n, value in enumerate(ema.shadow_params):
                whole = shadow[str(n)].to(value.device)
                if isinstance(value, DTensor):
                    whole = distribute_tensor(whole, value.device_mesh, value.placements)
                value.copy_(whole)
            ema.optimization_step = json.loads((path / _MANIFEST).read_text())["ema_steps"]

    def _rotate(self, newest: Path) -> None:
        checkpoints = sorted(self.folder.glob(f"{_PREFIX}*"))
        position = checkpoints.index(newest)
        for ahead in checkpoints[position + 1 :]:
            logger.warning("removing %s: the run went on from an earlier step, without it.", ahead)
            self._discard(ahead)
        if self.total_limit is not None:
            for old in checkpoints[: max(0, position + 1 - self.total_limit)]:
                self._discard(old)
        for leftover in self.folder.glob(f"{_TEMPORARY}*"):  # of a save or removal that a kill cut short
            shutil.rmtree(leftover, ignore_errors=True)

    def _discard(self, checkpoint: Path) -> None:
        # Renamed first: a kill while deleting must not leave something that looks like a checkpoint.
        doomed = checkpoint.with_name(f"{_TEMPORARY}old-{checkpoint.name}")
        shutil.rmtree(doomed, ignore_errors=True)
        checkpoint.rename(doomed)
        shutil.rmtree(doomed, ignore_errors=True)


class FolderLock:
    r"""
    Keeps a second run out of a folder. The system drops the lock when the process ends, however it ends.

    A lock of the process (`fcntl.lockf`), not of the open file: data-loading processes, which may outlive a killed run
    for some seconds, do not inherit it.

    Args:
        folder (`Path`): Exists.

    Raises:
        UserError: If another process has it.
    """

    _held: dict[Path, int] = {}  # closing any descriptor of a file gives up the lock, so each is opened once

    def __init__(self, folder: Path):
        self._path = (folder / ".lock").resolve()
        if self._path in self._held:
            return
        descriptor = os.open(self._path, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            owner = os.read(descriptor, 200).decode(errors="replace").strip()
            os.close(descriptor)
            if error.errno in (errno.EACCES, errno.EAGAIN):
                raise UserError(
                    f"{folder} is in use by another run ({owner or 'unknown process'}). Wait for its end, or choose another "
                    "`--output_dir`."
                ) from None
            logger.warning("%s cannot be locked (%s): do not start a second run there.", folder, error.strerror)
            return
        os.truncate(descriptor, 0)
        os.write(descriptor, f"process {os.getpid()} on {socket.gethostname()}\n".encode())
        self._held[self._path] = descriptor

    def release(self) -> None:
        r"""Gives the folder back."""
        descriptor = self._held.pop(self._path, None)
        if descriptor is not None:
            os.close(descriptor)


def take_folder(folder: Path, accelerator: Accelerator) -> FolderLock | None:
    r"""
    Makes a folder, sees whether it can be written, and locks it. All processes call it; the main one holds the lock.

    Raises:
        UserError: On every process, if the folder cannot be written or another run has it.
    """
    problem, lock = [None], None
    if accelerator.is_main_process:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            probe = folder / f".writable-{os.getpid()}"
            probe.touch()
            probe.unlink()
            lock = FolderLock(folder)
        except OSError as error:
            problem = [f"`--output_dir`: {folder} cannot be written: {error.strerror}."]
        except UserError as error:
            problem = [str(error)]
    broadcast_object_list(problem)
    if problem[0]:
        raise UserError(problem[0])
    return lock


class StopSignal:
    r"""
    Turns SIGTERM and SIGINT into a wish to stop after the current step; the second one kills as usual.

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

    def __enter__(self) -> "StopSignal":
        self._previous = {number: signal.signal(number, self._receive) for number in (signal.SIGTERM, signal.SIGINT)}
        return self

    def __exit__(self, *exception) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def requested(self) -> bool:
        r"""Whether any process has received a signal. With several processes all must call it at the same step."""
        if self.accelerator.num_processes > 1:
            number = torch.tensor(self.signal_number, device=self.accelerator.device)
            self.signal_number = int(self.accelerator.gather(number).max())
        return self.signal_number != 0

    def exit(self) -> None:
        r"""Ends the process with 128 + the signal's number."""
        raise SystemExit(128 + self.signal_number)

    def _receive(self, number: int, frame) -> None:
        self.signal_number = number
        signal.signal(number, self._previous[number])
        if self.accelerator.is_main_process:
            print(f"\nreceived {signal.Signals(number).name}: finishing the step, then saving", flush=True)


def whole_tensor(value: torch.Tensor) -> torch.Tensor:
    r"""The tensor itself, or, where FSDP has spread it, all of it on every process; then all processes call it."""
    return value.full_tensor() if isinstance(value, DTensor) else value.contiguous()


def _set_base_lrs(scheduler: LambdaLR, base_lrs: list[float]) -> None:
    """Lets a schedule go on from where it is, around other learning rates."""
    scheduler.base_lrs = base_lrs
    scheduler._last_lr = [
        base_lr * factor(scheduler.last_epoch) for base_lr, factor in zip(base_lrs, scheduler.lr_lambdas, strict=True)
    ]
    for group, lr in zip(scheduler.optimizer.param_groups, scheduler._last_lr, strict=True):
        group["lr"] = lr


def _verify(folder: Path) -> tuple[str | None, dict[str, Any]]:
    """What is wrong with a checkpoint, or None; and its manifest."""
    if not folder.is_dir():
        return "it does not exist", {}
    try:
        manifest = json.loads((folder / _MANIFEST).read_text())
        listed = manifest["files"]
        for name, facts in listed.items():
            path = folder / name
            if not path.is_file():
                return f"{name} is missing", {}
            if path.stat().st_size != facts["size"] or sha256_of(path) != facts["sha256"]:
                return f"{name} has other content than when it was saved", {}
        kinds = {"step": int, "state": dict, "num_processes": int}
        if not all(isinstance(manifest[key], kind) for key, kind in kinds.items()):
            return f"its {_MANIFEST} cannot be read", {}
        return None, {key: manifest[key] for key in kinds}
    except FileNotFoundError:
        return f"it has no {_MANIFEST}", {}
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return f"its {_MANIFEST} cannot be read", {}


def _flush(folder: Path) -> None:
    for path in folder.rglob("*"):
        if path.is_file():
            with path.open("rb") as file:
                os.fsync(file.fileno())
    _flush_folder(folder)


def _flush_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
