"""Resizes images, latents and features for the losses."""

import torch
import torch.nn.functional as F


def resize(values: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
    r"""
    Resizes bilinearly with antialiasing, in float32 even under autocast: not every device has the kernel for bfloat16.

    Args:
        values (`torch.Tensor` of shape `(B, C, h, w)`): Images, latents or features.
        size (`tuple[int, int]`): Rows and columns of the result.

    Returns:
        `torch.Tensor` of shape `(B, C, *size)`, float32.
    """
    values = values.float()
    if values.shape[2:] == size:
        return values
    return F.interpolate(values, size=size, mode="bilinear", antialias=True, align_corners=False)
