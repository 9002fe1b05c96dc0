"""Whether samples are of the classes that were asked for, as a linear classifier on a judge's features sees it."""

from collections.abc import Sequence

import torch

from dae_diffusers.latents.diagnostics import linear_probe


def class_agreement(
    features: torch.Tensor, labels: torch.Tensor, images: Sequence[torch.Tensor], asked: Sequence[torch.Tensor]
) -> list[torch.Tensor]:
    r"""
    Whether a linear classifier on a judge's features takes images for the classes that were asked for.

    Args:
        features (`torch.Tensor` of shape `(N, D)`), labels (`torch.Tensor` of shape `(N,)`): Those of the training images that it is
            fitted on.
        images (`list[torch.Tensor]` of shape `(M, D)`): Features of one or more sets of images.
        asked (`list[torch.Tensor]` of shape `(M,)`): The classes that were asked for.

    Returns:
        `list[torch.Tensor]` of shape `(M,)`: Booleans.
    """
    found = linear_probe(features, labels, torch.cat(list(images))).split([len(each) for each in images])
    return [classes == wanted for classes, wanted in zip(found, asked, strict=True)]


def share_by_class(agrees: torch.Tensor, labels: torch.Tensor, num_classes: int) -> list[float | None]:
    r"""The share of each class that agrees; None for a class without images."""
    count = torch.bincount(labels, minlength=num_classes)
    right = torch.bincount(labels[agrees], minlength=num_classes)
    return [None if total == 0 else part / total for part, total in zip(right.tolist(), count.tolist(), strict=True)]
