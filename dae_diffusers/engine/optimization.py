"""Makes the optimiser, the learning rate schedule and the averaged weights from the settings."""

import logging
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType
from diffusers.optimization import get_scheduler
from diffusers.training_utils import EMAModel
from transformers import get_wsd_schedule

from dae_diffusers.engine.muon import MuonWithAdamW, hidden_matrices
from dae_diffusers.engine.settings import OptimizationConfig
from dae_diffusers.errors import ConfigError

logger = logging.getLogger(__name__)


def trainable(*models: torch.nn.Module) -> list[torch.nn.Parameter]:
    r"""The trainable parameters of the models, in order."""
    return [parameter for model in models for parameter in model.parameters() if parameter.requires_grad]


def make_optimizer(
    config: OptimizationConfig, models: list[torch.nn.Module], device: torch.device, **instead: Any
) -> torch.optim.AdamW:
    r"""
    Makes AdamW in its fused form, which is several times faster on a CPU than PyTorch's default, or Muon with AdamW.

    Args:
        config ([`~dae_diffusers.engine.settings.OptimizationConfig`]): The optimiser, its learning rate, decays and epsilon.
        models (`list[torch.nn.Module]`): The models to train; frozen parameters are left out.
        device (`torch.device`): Their device.
        instead: `lr`, `betas` or `weight_decay` to use instead of the config's.

    Raises:
        ConfigError: If Muon is asked for and the first model has no blocks of a transformer.
    """
    options = {
        "lr": config.learning_rate,
        "betas": (config.adam_beta1, config.adam_beta2),
        "eps": config.adam_epsilon,
        "weight_decay": config.adam_weight_decay,
        **instead,
    }
    options["fused"] = device.type in ("cpu", "cuda", "mps", "xpu")
    if config.optimizer == "adamw":
        return torch.optim.AdamW(trainable(*models), **options)
    matrices = hidden_matrices(models[0])
    if not matrices:
        raise ConfigError(
            f"`optimizer muon` trains the matrices of a transformer's blocks, and {type(models[0]).__name__} has none: leave it out."
        )
    return MuonWithAdamW(matrices, [each for each in trainable(*models) if each not in matrices], **options)


def make_lr_scheduler(
    config: OptimizationConfig, optimizer: torch.optim.Optimizer, num_steps: int
) -> torch.optim.lr_scheduler.LRScheduler:
    r"""Makes the schedule that the config names, over a number of steps. The warm-up is at most as long, which is said."""
    if config.lr_scheduler != "constant" and config.lr_warmup_steps >= num_steps:
        logger.warning(
            "`--lr_warmup_steps` %d does not end within %d steps: the learning rate only rises. Give fewer.",
            config.lr_warmup_steps, num_steps,
        )  # fmt: skip
    steps = {"num_warmup_steps": min(config.lr_warmup_steps, num_steps), "num_training_steps": num_steps}
    if config.lr_scheduler == "warmup_stable_decay":
        num_decay_steps = min(round(config.lr_decay_share * num_steps), num_steps - steps["num_warmup_steps"])
        return get_wsd_schedule(optimizer, num_decay_steps=max(1, num_decay_steps), decay_type="linear", **steps)
    return get_scheduler(config.lr_scheduler, optimizer, **steps)


def has_fast_averages(accelerator: Accelerator) -> bool:
    r"""Whether moving averages can follow all parameters at once (`foreach`): the spread tensors of FSDP lack these functions."""
    return accelerator.distributed_type != DistributedType.FSDP


def make_ema(
    config: OptimizationConfig, parameters: list[torch.nn.Parameter], accelerator: Accelerator
) -> EMAModel | None:
    r"""Makes the moving averages of prepared parameters; None without `use_ema`."""
    if not config.use_ema:
        return None
    return EMAModel(parameters, decay=config.ema_decay, foreach=has_fast_averages(accelerator))


@contextmanager
def ema_weights(ema: EMAModel | None, parameters: Iterable[torch.nn.Parameter]) -> Iterator[None]:
    r"""Gives the parameters their moving averages inside the `with` block, and their own values after it."""
    parameters = list(parameters)
    if ema is None:
        yield
        return
    ema.store(parameters)
    ema.copy_to(parameters)
    try:
        yield
    finally:
        ema.restore(parameters)
