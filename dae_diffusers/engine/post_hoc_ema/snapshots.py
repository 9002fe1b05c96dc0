"""Snapshots of averaged weights in a run's folder, and the averages of any length that are made of them."""

import logging
import re
from functools import cached_property
from pathlib import Path

import numpy as np
import torch

from dae_diffusers.engine.post_hoc_ema.power_function import combination
from dae_diffusers.engine.post_hoc_ema.settings import MAX_LENGTH
from dae_diffusers.errors import UserError
from dae_diffusers.store import NotCached, cache_tensors, cached_tensors, inputs_of_cached

logger = logging.getLogger(__name__)

# Lengths of the two averages that are stored; those of the paper.
LENGTHS = (0.05, 0.1)
# As in the paper. It rounds a weight by at most 0.05 %, and halves the disk that snapshots need.
STORED_DTYPE = torch.float16
# A profile that is off by more is another average than the one that was asked for.
MAX_ERROR = 0.1

_NAME = re.compile(r"step-(\d{8,})\.safetensors")
_TRIED = np.arange(0.005, MAX_LENGTH, 0.005)  # lengths


def snapshots_folder(run_folder: Path) -> Path:
    r"""Where a training script that has its own files in `run_folder` keeps its snapshots."""
    return run_folder / "post_hoc_ema"


def keep_snapshot(folder: Path, step: int, last_step: int, averages: dict[float, dict[str, torch.Tensor]]) -> None:
    r"""
    Writes the snapshot of a step, whole or not at all.

    Args:
        folder (`Path`): The folder of the snapshots.
        step (`int`), last_step (`int`): Optimiser steps that are done, and those of the whole training.
        averages (`dict`): The weights by name, on the CPU in [`STORED_DTYPE`], for each of [`LENGTHS`].

    Raises:
        OSError: If it cannot be written.
    """
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {_key(length, name): value for length, weights in averages.items() for name, value in weights.items()}
    cache_tensors(folder / f"step-{step:08d}.safetensors", tensors, {"step": step, "last_step": last_step})


def remove_snapshots_after(folder: Path, step: int) -> None:
    r"""Removes the snapshots of steps after `step`, where a run begins: they are no part of it."""
    for later, path in find_snapshots(folder).items():
        if later > step:
            logger.warning("removing %s: the run continued from an earlier step, so it is not part of this run.", path)
            path.unlink()


def find_snapshots(folder: Path) -> dict[int, Path]:
    r"""The files in the folder of the snapshots, by step, in order."""
    found = {int(match[1]): path for path in folder.glob("step-*") if (match := _NAME.fullmatch(path.name))}
    return dict(sorted(found.items()))


class Snapshots:
    r"""
    The snapshots of a training.

    Args:
        folder (`Path`): Their folder.

    Attributes:
        steps (`list[int]`): Their steps, in order. Averages are those at the last one.

    Raises:
        UserError: If there are none.
    """

    def __init__(self, folder: Path):
        self.folder, self._files = folder, find_snapshots(folder)
        self.steps = list(self._files)
        if not self._files:
            raise UserError(
                f"{folder} holds no snapshots of averaged weights. Only a training with `post_hoc_ema` keeps them, from its first step on: "
                "train with it in another `output_dir`."
            )

    @cached_property
    def planned_step(self) -> int:
        r"""The step at which the training was to end, as the last snapshot says."""
        return self._read(self.steps[-1])[1]["last_step"]

    def check(self, length: float) -> None:
        r"""Raises `UserError` if the average of a length cannot be made of the snapshots. Says which can be made."""
        error = self._combination(length)[1]
        if error <= MAX_ERROR:
            return
        possible = [each for each in _TRIED if self._combination(each)[1] <= MAX_ERROR]
        raise UserError(
            f"`length` {length:g} cannot be made of {len(self.steps)} snapshots: the profile of the average would be off by "
            f"{error:.0%}, and at most {MAX_ERROR:.0%} is allowed. They allow lengths from {min(possible):.3f} to "
            f"{max(possible):.3f}; more snapshots (`post_hoc_ema_steps`) allow shorter and longer ones."
        )

    @torch.no_grad()
    def weights(self, length: float, model: torch.nn.Module) -> dict[str, torch.Tensor]:
        r"""
        The average of a length at the last snapshot.

        Args:
            length (`float`): See [`check`].
            model (`nn.Module`): The model whose weights these are.

        Returns:
            `dict[str, torch.Tensor]`: Its parameters by name, float32, on the CPU.

        Raises:
            UserError: If it cannot be made, a snapshot is damaged, or they are those of another model.
        """
        self.check(length)
        shapes = {name: tuple(value.shape) for name, value in model.named_parameters()}
        total = {name: torch.zeros(shape) for name, shape in shapes.items()}
        factors = iter(self._combination(length)[0].tolist())
        for step in self.steps:
            tensors, _ = self._read(step)
            self._check_model(step, tensors, shapes)
            for stored in LENGTHS:
                factor = next(factors)
                for name, value in total.items():
                    value.add_(tensors[_key(stored, name)].float(), alpha=factor)
        return total

    def _combination(self, length: float) -> tuple[np.ndarray, float]:
        steps = np.repeat(np.array(self.steps, dtype=np.float64), len(LENGTHS))
        return combination(np.tile(LENGTHS, len(self.steps)), steps, length, self.steps[-1])

    def _read(self, step: int) -> tuple[dict[str, torch.Tensor], dict[str, int]]:
        path = self._files[step]
        try:
            of = inputs_of_cached(path)
            return cached_tensors(path, of), of
        except NotCached as problem:
            raise UserError(
                f"{path} {problem}. Remove it: averages that are not too short can be made of the other snapshots."
            ) from None

    def _check_model(self, step: int, tensors: dict[str, torch.Tensor], shapes: dict[str, tuple[int, ...]]) -> None:
        found = {key: tuple(value.shape) for key, value in tensors.items()}
        wanted = {_key(length, name): shape for length in LENGTHS for name, shape in shapes.items()}
        if found == wanted:
            return
        name = sorted(key for key in found.keys() | wanted.keys() if found.get(key) != wanted.get(key))[0]
        raise UserError(
            f"{self._files[step]} is a snapshot of another model than the pipeline's: its `{name.partition('/')[2]}` has the shape "
            f"{found.get(name)}, and should have {wanted.get(name)}. Give the folder of one run, with the pipeline that it made."
        )


def _key(length: float, name: str) -> str:
    return f"{length:g}/{name}"
