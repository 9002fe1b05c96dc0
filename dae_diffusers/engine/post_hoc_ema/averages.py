"""The averages that a training keeps for post-hoc EMA, and when it stores them."""

import logging

import psutil
import torch
from diffusers.training_utils import EMAModel

from dae_diffusers.engine.dry_run import gib
from dae_diffusers.engine.guard import raise_if_not_finite_weights
from dae_diffusers.engine.optimization import has_fast_averages
from dae_diffusers.engine.post_hoc_ema.power_function import decay_at, exponent_of
from dae_diffusers.engine.post_hoc_ema.settings import PostHocEMAConfig
from dae_diffusers.engine.post_hoc_ema.snapshots import (
    LENGTHS,
    STORED_DTYPE,
    keep_snapshot,
    remove_snapshots_after,
    snapshots_folder,
)
from dae_diffusers.engine.run import TrainingRun
from dae_diffusers.engine.sharding import whole_tensor

logger = logging.getLogger(__name__)


class PowerFunctionEMA(EMAModel):
    r"""
    A moving average whose profile is a power function of the step; see
    [`power_function`][dae_diffusers.engine.post_hoc_ema.power_function].

    Args:
        parameters (`list[nn.Parameter]`): What is averaged.
        length (`float`): Its length.
        foreach (`bool`, *optional*): As in diffusers.
    """

    def __init__(self, parameters: list[torch.nn.Parameter], length: float, *, foreach: bool = False):
        super().__init__(parameters, foreach=foreach)
        self.exponent = exponent_of(length)

    def get_decay(self, optimization_step: int) -> float:
        return decay_at(self.exponent, optimization_step)


class PostHocAverages:
    r"""
    Follows the weights with an average of each of [`LENGTHS`], and stores both in `<folder>/post_hoc_ema/step-<N>.safetensors` as often as
    the settings say, and at the end.

    Args:
        run ([`~dae_diffusers.engine.run.TrainingRun`]): The run.
        config ([`~dae_diffusers.engine.post_hoc_ema.settings.PostHocEMAConfig`]): With `post_hoc_ema`.
        model (`nn.Module`): The prepared model.
        steps (`int`): Steps of the training.

    Attributes:
        by_name (`dict[str, PowerFunctionEMA]`): The averages, for the checkpoints.
    """

    def __init__(self, run: TrainingRun, config: PostHocEMAConfig, model: torch.nn.Module, steps: int):
        self.run, self.every = run, config.steps_between(steps)
        self.folder = snapshots_folder(run.folder)
        named = run.accelerator.unwrap_model(model).named_parameters()
        trained = {name: value for name, value in named if value.requires_grad}
        self.names, self.parameters = list(trained), list(trained.values())
        foreach = has_fast_averages(run.accelerator)
        self.averages = {each: PowerFunctionEMA(self.parameters, each, foreach=foreach) for each in LENGTHS}
        self.by_name = {f"ema_{length:g}": average for length, average in self.averages.items()}
        if run.accelerator.is_main_process:
            self._say_size(steps)

    def begin(self, step: int) -> None:
        r"""Removes snapshots of an earlier try after `step`. Call it before the first step, on all processes."""
        if self.run.accelerator.is_main_process:
            remove_snapshots_after(self.folder, step)

    def step(self) -> None:
        r"""Follows the weights. Call it after each update."""
        for average in self.averages.values():
            average.step(self.parameters)

    def keep(self, step: int, last_step: int) -> None:
        r"""Stores the averages if it is time. Call it after each step, on all processes, before the checkpoint of the step."""
        if self.run.dry_run is not None or (step % self.every and step != last_step):
            return
        is_main, kept = self.run.accelerator.is_main_process, {}
        for length, average in self.averages.items():
            halves = [value.to(STORED_DTYPE) for value in average.shadow_params]
            raise_if_not_finite_weights(
                zip(self.names, halves, strict=True),
                f"the snapshot of step {step} in half precision",
                self.run.accelerator,
            )
            whole = ((name, whole_tensor(value)) for name, value in zip(self.names, halves, strict=True))
            kept[length] = {name: value.cpu() for name, value in whole if is_main}
        if is_main:
            keep_snapshot(self.folder, step, last_step, kept)
        self.run.accelerator.wait_for_everyone()

    def _say_size(self, steps: int) -> None:
        size = len(LENGTHS) * STORED_DTYPE.itemsize * sum(value.numel() for value in self.parameters)
        number = -(-steps // self.every)
        free = psutil.disk_usage(str(self.run.output_dir)).free
        logger.info(
            "post-hoc EMA: a snapshot of two averages every %d steps, %d of %s, %s of disk in all",
            self.every,
            number,
            gib(size),
            gib(number * size),
        )
        if number * size > free:
            logger.warning(
                "only %s are free: make room, or keep fewer snapshots with a larger `--post_hoc_ema_steps`.", gib(free)
            )
