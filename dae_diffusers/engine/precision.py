"""Which numbers the hardware of a run multiplies fast, and the scale that fp16 needs."""

import torch
from accelerate import Accelerator


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
    return None
