"""Which numbers the hardware of a run multiplies fast, and the scale that fp16 needs."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType, convert_outputs_to_fp32


def multiplies_in_bfloat16(device: torch.device) -> bool:
    r"""Whether a device has instructions for products of bfloat16 matrices. Without them they take up to 28 times as long as in float32."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    if device.type == "cpu" and torch.backends.mkldnn.is_available():
        return torch.ops.mkldnn._is_mkldnn_bf16_supported()
    return device.type != "cpu"


def use_tf32(allowed: bool) -> None:
    r"""Whether float32 products on a GPU may be computed in TF32, convolutions too. By default torch allows that for convolutions."""
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = allowed


def loss_scale(accelerator: Accelerator) -> float:
    r"""What fp16 multiplies losses by before their backward pass, so that gradients do not vanish; 1 for other precisions."""
    return 1.0 if accelerator.scaler is None else accelerator.scaler.get_scale()


def faster_precision(accelerator: Accelerator) -> str | None:
    r"""Says which precision is faster, if the run's hardware multiplies matrices in another one than the run does; else None."""
    device, precision = accelerator.device, accelerator.mixed_precision
    has_bf16 = multiplies_in_bfloat16(device)
    if precision == "bf16" and not has_bf16:
        name, where = ("fp16", "GPU") if device.type == "cuda" else ("no", "processor")
        return f"`--mixed_precision {name}` is much faster on this {where}, which cannot multiply in bfloat16."
    if precision == "no" and device.type == "cuda" and has_bf16:
        return "`--mixed_precision bf16` is usually much faster on this GPU."
    if precision == "no" and device.type == "cpu" and torch.cpu._is_amx_tile_supported():
        return "`--mixed_precision bf16` is usually much faster on this processor."
    if precision == "no" and device.type == "cpu" and torch.cpu._is_avx512_bf16_supported():
        return "`--mixed_precision bf16` can be twice as fast on this processor: try it."
    return None


def other_precision(accelerator: Accelerator) -> str | None:
    r"""
    The `mixed_precision` that a run can be compared with by [`computing_in_other_precision`]: "bf16" for float32 on hardware that
    multiplies in bfloat16, "no" for bfloat16 on a processor; else None. On a GPU float32 may need more memory than there is.
    """
    device, precision = accelerator.device, accelerator.mixed_precision
    if accelerator.distributed_type in (DistributedType.FSDP, DistributedType.DEEPSPEED):
        return None  # they prepare models for one precision
    if precision == "no" and device.type in ("cpu", "cuda") and multiplies_in_bfloat16(device):
        return "bf16"
    return "no" if precision == "bf16" and device.type == "cpu" else None


@contextmanager
def computing_in_other_precision(accelerator: Accelerator, models: Iterable[torch.nn.Module]) -> Iterator[None]:
    r"""
    Makes a float32 accelerator and the models that it has prepared compute as one for bfloat16 does, or the other way round. Weights
    and outputs of the models are float32 in both.
    """
    device, models = accelerator.device.type, [accelerator.unwrap_model(model) for model in models]
    forwards, dtype = [model.forward for model in models], torch.get_autocast_dtype(device)
    accelerator.native_amp = not accelerator.native_amp
    # For `accelerator.autocast`, whose `mixed_precision` still is "no".
    torch.set_autocast_dtype(device, torch.bfloat16)
    for model in models:
        if accelerator.native_amp:
            model.forward = convert_outputs_to_fp32(accelerator.autocast()(model.forward))
        else:
            model.forward = model._original_forward  # where accelerate keeps it
    try:
        yield
    finally:
        accelerator.native_amp = not accelerator.native_amp
        torch.set_autocast_dtype(device, dtype)
        for model, forward in zip(models, forwards, strict=True):
            model.forward = forward
