"""The power of images over spatial frequency."""

import torch
import torch.nn.functional as F


def log_spectrum(images: torch.Tensor, num_rings: int, *, floor: float = 1e-5) -> torch.Tensor:
    r"""
    The logarithm of images' mean power in rings of spatial frequency, from 0 to half a cycle per pixel; what lies in the corners
    belongs to the last ring.

    Args:
        images (`torch.Tensor` of shape `(B, C, H, W)`): Around [-1, 1].
        num_rings (`int`): Number of rings.
        floor (`float`, *optional*): Added to the power, which is 1 on average for noise of deviation 1.

    Returns:
        `torch.Tensor` of shape `(B, C, num_rings)`: float32.
    """
    power = torch.fft.rfft2(images.float(), norm="ortho").abs().square()
    rows = torch.fft.fftfreq(images.shape[2], device=images.device)
    columns = torch.fft.rfftfreq(images.shape[3], device=images.device)
    rings = ((rows[:, None].square() + columns.square()).sqrt() * 2 * num_rings).long().clamp(max=num_rings - 1)
    members = F.one_hot(rings.flatten(), num_rings).float()
    with torch.autocast(images.device.type, enabled=False):  # the power of a bright image exceeds float16
        mean = power.flatten(2) @ (members / members.sum(dim=0).clamp(min=1))
    return (mean + floor).log()
