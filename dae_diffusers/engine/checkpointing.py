"""Checkpoints that stay whole if the process is killed at any instant."""

import json
import logging
import pickle
import re
import shutil
import time
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from accelerate.utils import DynamoBackend, broadcast_object_list, gather_object
from diffusers.training_utils import EMAModel
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.optim.lr_scheduler import LambdaLR

from dae_diffusers.engine.guard import raise_if_not_finite_weights
from dae_diffusers.engine.sharding import whole_tensor
from dae_diffusers.errors import REMOVED, ConfigError, UserError, one_line, storage_problem
from dae_diffusers.locks import OWNER
from dae_diffusers.store import flush, flush_entries, sha256_of, write_atomically

logger = logging.getLogger(__name__)

_PREFIX = "checkpoint-"
MANIFEST = "checkpoint.json"
_TEMPORARY = "tmp-"
_ABANDONED = "abandoned-"  # before the name of a checkpoint ahead of the one that the run went on from
_BESIDE = (OWNER, "config.yaml", "log.jsonl")  # what a run has in its folder, beside that of the checkpoints
_NAME = re.compile(rf"{_PREFIX}(\d{{8,}})")
_LEFTOVER = re.compile(rf"{_TEMPORARY}(old-)?{_PREFIX}\d{{8,}}")


def find_checkpoints(folder: Path) -> list[Path]:
    r"""
    Finds the folders in `folder` whose names a run has written, such as `checkpoint-00001000`, oldest step first. Others, such
    as `checkpoint-best`, belong to the user.
    """
    paths = [path for path in folder.glob(f"{_PREFIX}*") if path.is_dir() and not path.is_symlink()]
    return sorted((path for path in paths if _step_of(path) is not None), key=_step_of)


def _step_of(path: Path) -> int | None:
    match = _NAME.fullmatch(path.name)
    return int(match[1]) if match and path.name == _name_of(int(match[1])) else None


def _name_of(step: int) -> str:
    return f"{_PREFIX}{step:08d}"


class Checkpointer:
    r"""
    Saves and restores everything that an [`~accelerate.Accelerator`] has prepared or registered.

    A checkpoint is written to a temporary folder, flushed to disk and renamed to `checkpoint-<step>`. Its
    `checkpoint.json`, written last, lists every file with its size and hash. Files that are not listed or do not match are
    not loaded. It also names the run, which keeps its name over interruptions: only checkpoints of this run are ever removed.

    Args:
        accelerator ([`~accelerate.Accelerator`]): Its prepared and registered objects are saved.
        folder (`Path`): The folder of the checkpoints.
        total_limit (`int`, *optional*): How many of the newest checkpoints to keep; default: all.

    Raises:
        ConfigError: If accelerate is set to compile whole models, whose checkpoints would not fit uncompiled models.
    """

    def __init__(self, accelerator: Accelerator, folder: Path, total_limit: int | None = None):
        backend = accelerator.state.dynamo_plugin.backend
        if backend != DynamoBackend.NO:
            raise ConfigError(
                f"accelerate's `dynamo_backend` is {backend.value.lower()}, but must be no: its checkpoints would fit only models that "
                "are compiled as a whole. Use `compile`, which compiles the networks block by block."
            )
        self.accelerator = accelerator
        self.folder = folder
        self.total_limit = total_limit
        self._has_run = self._is_beside_a_run()
        # None: a run that began before checkpoints named their run.
        self._run: str | None = uuid.uuid4().hex

    def save(self, step: int, *, averages: dict[str, EMAModel] | None = None, **state: Any) -> Path:
        r"""
        Saves a checkpoint. All processes call it.

        Args:
            step (`int`): Optimiser steps done.
            averages (`dict[str, EMAModel]`, *optional*): Moving averages to save too, by the names of their files, after equally
                many steps.
            state: Other state of the run, as JSON can hold it; [`newest`] returns it.

        Returns:
            `Path`: Its folder.

        Raises:
            UserError: If a weight or an average is not finite, the disk is full or the folder cannot be written; earlier
                checkpoints stay as they are.
        """
        averages = averages or {}
        self._raise_if_not_finite(step, averages)
        self._write(step, lambda: self._save(step, averages, state))
        return self.folder / _name_of(step)

    def update(self, step: int, **state: Any) -> None:
        r"""
        Replaces the state in the checkpoint that this process has saved of a step, whose weights have not changed since. All processes
        call it. Arguments and errors are those of [`save`].
        """

        def replace() -> None:
            path = self.folder / _name_of(step) / MANIFEST
            manifest = json.loads(path.read_text()) | {"state": state, "saved": time.time()}
            write_atomically(path, json.dumps(manifest, indent=2))

        if self.accelerator.is_main_process:
            self._raise_if_removed()
            self._write(step, replace)
        self.accelerator.wait_for_everyone()

    def _write(self, step: int, write: Callable[[], None]) -> None:
        """Calls something that writes a checkpoint; an error says what to do."""
        try:
            write()
        except UserError:
            shutil.rmtree(self.folder / f"{_TEMPORARY}{_name_of(step)}", ignore_errors=True)
            raise
        except Exception as error:
            problem = storage_problem(error) or (str(error) if isinstance(error, OSError) else None)
            if problem is None:
                raise
            shutil.rmtree(self.folder / f"{_TEMPORARY}{_name_of(step)}", ignore_errors=True)
            raise UserError(
                f"the checkpoint of step {step} cannot be written to {self.folder}: {problem}. "
                "Earlier checkpoints are whole. Make room and continue with `resume_from_checkpoint latest`."
            ) from None

    def _raise_if_not_finite(self, step: int, averages: dict[str, EMAModel]) -> None:
        weights = [pair for model in self.accelerator._models for pair in model.state_dict().items()]
        for average in averages.values():
            weights += [(f"average {n}", value) for n, value in enumerate(average.shadow_params)]
        raise_if_not_finite_weights(weights, f"the checkpoint of step {step}", self.accelerator)

    def _save(self, step: int, averages: dict[str, EMAModel], state: dict[str, Any]) -> None:
        final = self.folder / _name_of(step)
        temporary = self.folder / f"{_TEMPORARY}{final.name}"
        if self.accelerator.is_main_process:
            self._raise_if_removed()
            shutil.rmtree(temporary, ignore_errors=True)
            temporary.mkdir(parents=True)
        self.accelerator.wait_for_everyone()
        self.accelerator.save_state(str(temporary))
        for name, average in averages.items():
            shadow = {str(n): whole_tensor(value) for n, value in enumerate(average.shadow_params)}
            if self.accelerator.is_main_process:
                # As safetensors: what accelerate registers for checkpointing, it reads back with pickle.
                save_file(shadow, _file_of(temporary, name))
        self.accelerator.wait_for_everyone()
        if self.accelerator.is_main_process:
            manifest = {
                "step": step,
                "run": self._run,
                "state": state,
                "ema_steps": next((average.optimization_step for average in averages.values()), None),
                "num_processes": self.accelerator.num_processes,
                "saved": time.time(),  # seconds since 1970
                "files": {
                    str(path.relative_to(temporary)): {"size": path.stat().st_size, "sha256": sha256_of(path)}
                    for path in sorted(temporary.rglob("*"))
                    if path.is_file()
                },
            }
            (temporary / MANIFEST).write_text(json.dumps(manifest, indent=2))
            flush(temporary)
            self._raise_if_removed()  # accelerate makes folders that are missing
            replaced = self._make_room(final) if final.exists() else None
            temporary.rename(final)
            flush_entries(self.folder)
            if replaced is not None:
                shutil.rmtree(replaced, ignore_errors=True)
            self._rotate(final)
        self.accelerator.wait_for_everyone()

    def _raise_if_removed(self) -> None:
        """A run whose folder was removed, and made again by a save, would have neither its lock nor its log."""
        if self._has_run and not self._is_beside_a_run():
            raise UserError(REMOVED.format(self.folder.parent))
        self._has_run = self._is_beside_a_run()

    def _is_beside_a_run(self) -> bool:
        # Not by the folder's number: file systems in the network may give it another one.
        return any((self.folder.parent / name).exists() for name in _BESIDE)

    def newest(self, path: str = "latest") -> tuple[Path, dict[str, Any]] | None:
        r"""
        Finds the checkpoint to continue from. All processes call it; the main one chooses and verifies.

        Args:
            path (`str`): `latest`, or the folder of one checkpoint.

        Returns:
            Its folder and manifest (`step`, `state`, `num_processes`), or None if `latest` finds none. A damaged
            checkpoint is reported, and the one before it is used.

        Raises:
            UserError: On every process, if a named checkpoint does not exist or is damaged, if all checkpoints are damaged, or
                if a process does not see the chosen one.
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
        if found is not None:
            self._run = found[1].pop("run")
        if found is not None and not all(gather_object([(found[0] / MANIFEST).exists()])):
            raise UserError(
                f"{found[0]} is not visible to all processes. Choose an `output_dir` that all machines share."
            )
        return found

    def _find(self, path: str) -> tuple[Path, dict[str, Any]] | None:
        """The result of [`newest`] as this process sees it."""
        if path != "latest":
            problem, manifest = verify(Path(path))
            if problem:
                raise UserError(f"`resume_from_checkpoint` {path} cannot be used: {problem}. Try `latest`.")
            return Path(path), manifest
        candidates = self._candidates()
        for candidate in candidates:
            problem, manifest = verify(candidate)
            if not problem and manifest["step"] != _step_of(candidate):
                problem = f"it holds step {manifest['step']}; name it if you want to go on from it"
            if not problem:
                return candidate, manifest
            logger.warning("%s is damaged (%s); trying the checkpoint before it.", candidate, problem)
        if candidates:
            raise UserError(f"every checkpoint in {self.folder} is damaged. Remove the folder to start again.")
        return None

    def _candidates(self) -> list[Path]:
        """
        What `latest` may mean, best first. Of several runs, such as where one was copied into the folder of another, those of
        the run that saved last come first.
        """
        manifests = {path: read_manifest(path) for path in find_checkpoints(self.folder)}
        # A damaged manifest, or one of another step, does not name its run. It is tried, and reported, in the order of steps.
        known = {path: facts for path, facts in manifests.items() if facts and facts["step"] == _step_of(path)}
        last = max(known, key=lambda path: known[path].get("saved", 0), default=None)
        run = known[last].get("run") if last is not None else None
        return sorted(
            manifests,
            key=lambda path: (path not in known or known[path].get("run") == run, _step_of(path)),
            reverse=True,
        )

    def newest_manifest(self) -> dict[str, Any] | None:
        r"""The manifest of the checkpoint that `latest` means, if its files are whole; None if there is none."""
        return next(filter(None, map(read_manifest, self._candidates())), None)

    def adopt(self, checkpoint: Path) -> None:
        r"""Moves a whole checkpoint from elsewhere on the same disk to those of the run."""
        final = self.folder / checkpoint.name
        self.folder.mkdir(exist_ok=True)
        if final.exists():
            self._make_room(final)
        flush(checkpoint)
        checkpoint.rename(final)
        flush_entries(self.folder)

    def set_aside_after(self, step: int) -> None:
        r"""
        Renames this run's checkpoints of later steps, so that `latest` never returns to them; the next save removes them. All processes
        call it when a run begins, once it has loaded its own.
        """
        if self.accelerator.is_main_process:
            for ahead in find_checkpoints(self.folder):
                if _step_of(ahead) > step and self._is_ours(ahead):
                    aside = ahead.with_name(f"{_ABANDONED}{ahead.name}")
                    logger.warning(
                        "%s is renamed to %s: the run continues from step %d, so it is not part of this run. The next save removes it.",
                        ahead,
                        aside.name,
                        step,
                    )
                    shutil.rmtree(aside, ignore_errors=True)
                    ahead.rename(aside)
        self.accelerator.wait_for_everyone()

    def load(self, path: Path, *, averages: dict[str, EMAModel] | None = None) -> None:
        r"""
        Restores the prepared objects and the averages. All processes call it, after preparing the same objects.

        The optimisers keep the settings that they were made with, such as the learning rate, and take only their moments
        from the checkpoint.

        Raises:
            UserError: If the checkpoint holds other objects, such as a model of another size, or pickled code, which
                is not run.
        """
        try:
            self._load(path, averages or {})
        except (OSError, RuntimeError, ValueError, LookupError, pickle.UnpicklingError, SafetensorError) as error:
            raise UserError(
                f"{path} does not fit this run ({one_line(error, 300)}). Resume with the flags of the run that "
                "saved it, or train in another `output_dir`."
            ) from None

    def _load(self, path: Path, averages: dict[str, EMAModel]) -> None:
        optimizers, schedulers = self.accelerator._optimizers, [each.scheduler for each in self.accelerator._schedulers]
        settings = [
            [{name: value for name, value in group.items() if name != "params"} for group in optimizer.param_groups]
            for optimizer in optimizers
        ]
        base_lrs = [list(scheduler.base_lrs) for scheduler in schedulers]
        self.accelerator.load_state(str(path))
        # It counts micro-batches. A checkpoint lies between steps, whose number of micro-batches may be another now.
        self.accelerator.step = 0
        for optimizer, of_groups in zip(optimizers, settings, strict=True):
            for group, of_group in zip(optimizer.param_groups, of_groups, strict=True):
                group.update(of_group)
        for scheduler, of_scheduler in zip(schedulers, base_lrs, strict=True):
            _set_base_lrs(scheduler, of_scheduler)
        ema_steps = json.loads((path / MANIFEST).read_text())["ema_steps"]
        for name, average in averages.items():
            shadow = load_file(_file_of(path, name))
            for n, value in enumerate(average.shadow_params):
                whole = shadow[str(n)].to(value.device)
                if isinstance(value, DTensor):
                    whole = distribute_tensor(whole, value.device_mesh, value.placements)
                value.copy_(whole)
            average.optimization_step = ema_steps

    def _rotate(self, newest: Path) -> None:
        checkpoints = [path for path in find_checkpoints(self.folder) if path == newest or self._is_ours(path)]
        position = checkpoints.index(newest)
        for ahead in checkpoints[position + 1 :]:
            logger.warning("removing %s: the run continued from an earlier step, so it is not part of this run.", ahead)
            self._discard(ahead)
        for aside in self.folder.glob(f"{_ABANDONED}{_PREFIX}*"):
            if (read_manifest(aside) or {}).get("run") == self._run:
                shutil.rmtree(aside, ignore_errors=True)
        if self.total_limit is not None:
            for old in checkpoints[: max(0, position + 1 - self.total_limit)]:
                self._discard(old)
        for leftover in self.folder.glob(f"{_TEMPORARY}*"):  # of a save or removal that a kill cut short
            if _LEFTOVER.fullmatch(leftover.name):
                shutil.rmtree(leftover, ignore_errors=True)

    def _is_ours(self, checkpoint: Path) -> bool:
        """Whether this run has saved the checkpoint under this name. A damaged one that does not name its run is left alone."""
        manifest = read_manifest(checkpoint)
        return manifest is not None and manifest.get("run") == self._run and manifest["step"] == _step_of(checkpoint)

    def _make_room(self, path: Path) -> Path | None:
        """Renames an existing checkpoint of the same step. Returns where it is, if it is to be removed."""
        if self._is_ours(path) or read_manifest(path) is None:
            return self._doom(path)
        number = 1
        while (aside := path.with_name(f"{path.name}-other-run-{number}")).exists():
            number += 1
        logger.warning("%s does not belong to this run: renamed to %s.", path, aside.name)
        path.rename(aside)
        return None

    def _discard(self, checkpoint: Path) -> None:
        # Renamed first: a kill while deleting must not leave something that looks like a checkpoint.
        shutil.rmtree(self._doom(checkpoint), ignore_errors=True)

    def _doom(self, checkpoint: Path) -> Path:
        """Renames a checkpoint to what is no checkpoint."""
        doomed = checkpoint.with_name(f"{_TEMPORARY}old-{checkpoint.name}")
        shutil.rmtree(doomed, ignore_errors=True)
        checkpoint.rename(doomed)
        return doomed


def _file_of(checkpoint: Path, average: str) -> Path:
    return checkpoint / f"{average}.safetensors"


def _set_base_lrs(scheduler: LambdaLR, base_lrs: list[float]) -> None:
    """Sets new base learning rates, and lets the schedule continue from its step."""
    scheduler.base_lrs = base_lrs
    scheduler._last_lr = [
        base_lr * factor(scheduler.last_epoch) for base_lr, factor in zip(base_lrs, scheduler.lr_lambdas, strict=True)
    ]
    for group, lr in zip(scheduler.optimizer.param_groups, scheduler._last_lr, strict=True):
        group["lr"] = lr


def read_manifest(folder: Path) -> dict[str, Any] | None:
    r"""The manifest in a checkpoint's folder, or None if it is none."""
    try:
        manifest = json.loads((folder / MANIFEST).read_text())
    except (OSError, ValueError, RecursionError):
        return None
    has_step = isinstance(manifest, dict) and type(manifest.get("step")) is int
    return manifest if has_step and isinstance(manifest.get("saved", 0), (int, float)) else None


def verify(folder: Path) -> tuple[str | None, dict[str, Any]]:
    r"""The problem of a checkpoint (or None), and its manifest."""
    if not folder.is_dir():
        return "it does not exist", {}
    try:
        manifest = json.loads((folder / MANIFEST).read_text())
        listed = manifest["files"]
        for name, facts in listed.items():
            path = folder / name
            if not path.is_file():
                return f"{name} is missing", {}
            if path.stat().st_size != facts["size"] or sha256_of(path) != facts["sha256"]:
                return f"{name} has other content than when it was saved", {}
        kinds = {"step": int, "state": dict, "num_processes": int}
        if not all(isinstance(manifest[key], kind) for key, kind in kinds.items()):
            return f"its {MANIFEST} cannot be read", {}
        return None, {key: manifest[key] for key in kinds} | {"run": manifest.get("run")}
    except FileNotFoundError:
        return f"it has no {MANIFEST}", {}
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return f"its {MANIFEST} cannot be read", {}
