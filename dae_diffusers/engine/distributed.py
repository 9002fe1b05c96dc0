"""Settings for several processes, FSDP and DeepSpeed, and a description of the hardware."""

import os
import platform
from datetime import timedelta
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType, InitProcessGroupKwargs
from torch.distributed.fsdp import FSDPModule, StateDictType
from transformers import PreTrainedModel

from dae_diffusers.engine.precision import use_tf32
from dae_diffusers.engine.sharding import whole_tensor
from dae_diffusers.errors import ConfigError
from dae_diffusers.script import show_messages
from dae_diffusers.settings import flat

# The others wait while the main process prepares a data set or measures something: NCCL would give up after ten minutes.
PROCESS_GROUP = InitProcessGroupKwargs(timeout=timedelta(hours=6))


def measuring_accelerator(mixed_precision: str | None = None) -> Accelerator:
    r"""An accelerator for a script that is no [`~dae_diffusers.engine.run.TrainingRun`]: products in full float32, and messages of the main
    process only."""
    use_tf32(False)
    accelerator = Accelerator(mixed_precision=mixed_precision, kwargs_handlers=[PROCESS_GROUP])
    show_messages(accelerator.is_main_process)
    return accelerator


def settle_backend(name: str, config: Any, accelerator: Accelerator, one_model: bool) -> None:
    r"""
    Configures FSDP or DeepSpeed, if one of them is in use, with the script's settings.

    Args:
        name (`str`): Name of the script.
        config: Settings with the parts `optimization` and `hub`.
        accelerator ([`~accelerate.Accelerator`]): The run's accelerator.
        one_model (`bool`): Whether the script trains only one model, which both of them require.

    Raises:
        ConfigError: If the script does not run with it.
    """
    is_spread = accelerator.distributed_type in (DistributedType.FSDP, DistributedType.DEEPSPEED)
    if is_spread and config.optimization.optimizer != "adamw":
        raise ConfigError("`optimizer muon` needs whole matrices, which FSDP and DeepSpeed divide; use DDP or `adamw`.")
    if is_spread and flat(config).get("distill_guidance_scale") is not None:
        raise ConfigError("`distill_guidance_scale` does not run under FSDP and DeepSpeed; use DDP.")
    if accelerator.distributed_type == DistributedType.FSDP:
        check_fsdp(name, config, accelerator, one_model)
    if accelerator.distributed_type == DistributedType.DEEPSPEED:
        settle_deepspeed(name, config, accelerator, one_model)


def check_fsdp(name: str, config: Any, accelerator: Accelerator, one_model: bool) -> None:
    r"""Raises `ConfigError` for a script or a configuration of FSDP that does not work."""
    if not one_model:
        raise ConfigError(f"{name} does not run under FSDP; use training/configs/accelerate/ddp.yaml.")
    plugin = accelerator.state.fsdp_plugin
    if plugin.fsdp_version != 2 or plugin.state_dict_type != StateDictType.FULL_STATE_DICT:
        raise ConfigError(
            "under FSDP the script needs `fsdp_version: 2` and `fsdp_state_dict_type: FULL_STATE_DICT`, as in "
            "training/configs/accelerate/fsdp2.yaml."
        )
    if config.hub.push_to_hub and config.hub.hub_strategy == "every_save":
        raise ConfigError("`hub_strategy every_save` does not go with FSDP; use `end`.")


def settle_deepspeed(name: str, config: Any, accelerator: Accelerator, one_model: bool) -> None:
    r"""
    Gives DeepSpeed the script's settings. Under bfloat16 the weights stay in float32, as everywhere else.

    Raises:
        ConfigError: If the script does not run with DeepSpeed or these settings.
    """
    if not one_model:
        raise ConfigError(f"{name} does not run under DeepSpeed; use training/configs/accelerate/ddp.yaml.")
    plugin = accelerator.state.deepspeed_plugin
    if plugin.zero_stage == 3:
        raise ConfigError(
            "the script does not run with `zero_stage: 3`; use 2, or training/configs/accelerate/fsdp2.yaml."
        )
    if accelerator.mixed_precision == "fp16":
        raise ConfigError("fp16 does not go with DeepSpeed here; use `mixed_precision bf16`.")
    if config.run.skip_nonfinite:
        raise ConfigError(
            "`skip_nonfinite` does not go with DeepSpeed, which updates within the backward pass. Leave it out, or use "
            "training/configs/accelerate/ddp.yaml."
        )
    settings, optimization = plugin.deepspeed_config, config.optimization
    settings["train_micro_batch_size_per_gpu"] = optimization.train_batch_size  # it is prepared without a loader
    settings["gradient_accumulation_steps"] = optimization.gradient_accumulation_steps
    settings["gradient_clipping"] = optimization.max_grad_norm
    if accelerator.mixed_precision == "bf16":
        settings["bf16"] = {"enabled": False}
        settings["torch_autocast"] = {"enabled": True, "dtype": "bfloat16"}


def whole_model(model: torch.nn.Module, accelerator: Accelerator) -> torch.nn.Module:
    r"""
    Unwraps a prepared model. All processes call it.

    If FSDP has sharded the weights, the result is a copy with all of them, which later updates do not change.
    """
    if accelerator.distributed_type != DistributedType.FSDP:
        return accelerator.unwrap_model(model)
    model_class = next(c for c in type(model).__mro__ if not issubclass(c, FSDPModule))
    make = model_class if isinstance(model, PreTrainedModel) else model_class.from_config
    whole = make(model.config)
    whole.load_state_dict({name: whole_tensor(value.detach()) for name, value in model.state_dict().items()})
    return whole.to(accelerator.device)


def describe_hardware(accelerator: Accelerator) -> str:
    r"""Describes the hardware of the run, such as `2 x NVIDIA A100-SXM4-80GB` or `1 process on a CPU with 8 cores`."""
    count = accelerator.num_processes
    if accelerator.device.type == "cuda":
        return f"{count} x {torch.cuda.get_device_name(accelerator.device)}"
    if accelerator.device.type == "cpu":
        return f"{count} process{'es' if count > 1 else ''} on a CPU with {os.cpu_count()} cores ({platform.machine()})"
    return f"{count} x {accelerator.device.type}"
