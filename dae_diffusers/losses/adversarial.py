"""Adversarial losses on the logits of a discriminator, and the augmentation of its images."""

from typing import Literal

import torch
import torch.nn.functional as F

AdversarialLossType = Literal["hinge", "non_saturating"]


def discriminator_loss(
    logits_real: torch.Tensor, logits_fake: torch.Tensor, loss_type: AdversarialLossType = "hinge"
) -> torch.Tensor:
    r"""
    The loss of the discriminator: the mean over all logits of half the term for real and half the term for fake images.

    `hinge`: `relu(1 - real)` and `relu(1 + fake)`; `non_saturating`: `softplus(-real)` and `softplus(fake)`.
    """
    if loss_type == "hinge":
        return 0.5 * (F.relu(1 - logits_real.float()).mean() + F.relu(1 + logits_fake.float()).mean())
    return 0.5 * (F.softplus(-logits_real.float()).mean() + F.softplus(logits_fake.float()).mean())


def generator_loss(logits_fake: torch.Tensor, loss_type: AdversarialLossType = "hinge") -> torch.Tensor:
    r"""The adversarial loss of the decoder: `-fake` for `hinge`, `softplus(-fake)` for `non_saturating`; mean over all logits."""
    return -logits_fake.float().mean() if loss_type == "hinge" else F.softplus(-logits_fake.float()).mean()


def augment(images: torch.Tensor) -> torch.Tensor:
    r"""
    DiffAug: random brightness, saturation, contrast, translation (by up to 1/8) and a cut-out square (half the side), drawn for
    each image and differentiable. Apply it to real and generated images.

    Args:
        images (`torch.Tensor` of shape `(B, C, H, W)`): In [-1, 1].

    Returns:
        `torch.Tensor` of the same shape.

    Source: Zhao et al., 2020, https://huggingface.co/papers/2006.10738.
    """
    batch, _, height, width = images.shape
    brightness, saturation, contrast = torch.rand(3, batch, 1, 1, 1, device=images.device)
    images = images + (brightness - 0.5)
    gray = images.mean(dim=1, keepdim=True)
    images = (images - gray) * (2 * saturation) + gray
    mean = images.mean(dim=(1, 2, 3), keepdim=True)
    images = (images - mean) * (contrast + 0.5) + mean

    rows, columns = (torch.arange(side, device=images.device) for side in (height, width))
    from_y, inside_y = _shift(rows, batch, height // 8)
    from_x, inside_x = _shift(columns, batch, width // 8)
    samples = torch.arange(batch, device=images.device)[:, None, None]
    moved = images[samples, :, from_y[:, :, None], from_x[:, None, :]]  # (B, H, W, C)
    inside = inside_y[:, :, None] & inside_x[:, None, :]
    cut = _interval(rows, batch)[:, :, None] & _interval(columns, batch)[:, None, :]
    return moved.permute(0, 3, 1, 2) * (inside & ~cut)[:, None]


def _shift(positions: torch.Tensor, batch: int, reach: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Where each position of a randomly moved side comes from, `(batch, N)`, and whether that lies in the image."""
    source = positions + torch.randint(-reach, reach + 1, (batch, 1), device=positions.device)
    return source.clamp(0, len(positions) - 1), (source >= 0) & (source < len(positions))


def _interval(positions: torch.Tensor, batch: int) -> torch.Tensor:
    """A random interval of half the length, `(batch, N)`."""
    length = len(positions) // 2
    start = torch.randint(0, len(positions) - length + 1, (batch, 1), device=positions.device)
    return (positions >= start) & (positions < start + length)
