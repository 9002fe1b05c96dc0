"""Perceptual loss: the distance between a vision model's hidden states for two batches of images."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F


def perceptual_distance(hidden_states: Sequence[torch.Tensor], targets: Sequence[torch.Tensor]) -> torch.Tensor:
    r"""
    Distance between features of unit length. For each layer it is the squared distance of the two feature vectors at
    each position, `2 - 2 cos`, averaged over positions. The result is the mean over layers.

    Args:
        hidden_states, targets (`Sequence[torch.Tensor]` of shape `(B, D, ...)`): One for each layer, features second.

    Returns:
        `torch.Tensor`: Scalar from 0 (equal) to 4, float32.

    Source: Zhang et al., 2018, https://huggingface.co/papers/1801.03924.
    """
    layers = [
        (_unit_length(hidden) - _unit_length(target)).square().sum(dim=1).mean()
        for hidden, target in zip(hidden_states, targets, strict=True)
    ]
    return torch.stack(layers).mean()


def _unit_length(hidden: torch.Tensor) -> torch.Tensor:
    return F.normalize(hidden.float(), dim=1, eps=1e-6)
