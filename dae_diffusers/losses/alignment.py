"""Losses that align latents (VF loss) or hidden states (REPA) with the features of a vision model."""

import torch
import torch.nn.functional as F


def marginal_cosine_loss(projected: torch.Tensor, features: torch.Tensor, margin: float = 0.5) -> torch.Tensor:
    r"""
    `mean(relu(1 - margin - cos(projected, features)))` over positions: 0 where the angle is small enough.

    Args:
        projected, features (`torch.Tensor` of shape `(B, D, h, w)`): Latents projected to the width of the features, and features.
        margin (`float`): In [0, 2).

    Returns:
        `torch.Tensor`: Scalar in [0, 2 - margin].

    Source: VA-VAE, Yao et al., 2025, https://huggingface.co/papers/2501.01423.
    """
    return F.relu(1 - margin - F.cosine_similarity(projected.float(), features.float(), dim=1)).mean()


def marginal_distance_matrix_loss(
    projected: torch.Tensor, features: torch.Tensor, margin: float = 0.25
) -> torch.Tensor:
    r"""
    `mean(relu(|cos(z_i, z_j) - cos(f_i, f_j)| - margin))` over all pairs of positions `i, j` of an image: positions that are
    similar for the vision model should be similar in the latents. The two widths may differ.

    Costs `2 N^2 (D + D')` floating-point operations per image of `N` positions, and `4 N^2 D` for the gradient.

    Args:
        projected, features (`torch.Tensor` of shapes `(B, D, h, w)` and `(B, D', h, w)`): As in [`marginal_cosine_loss`].
        margin (`float`): In [0, 2).

    Returns:
        `torch.Tensor`: Scalar in [0, 2 - margin].

    Source: VA-VAE, Yao et al., 2025, https://huggingface.co/papers/2501.01423.
    """
    return F.relu((_similarities(projected) - _similarities(features)).abs() - margin).mean()


def representation_alignment_loss(projected: torch.Tensor, features: torch.Tensor) -> torch.Tensor:
    r"""
    `-mean(cos(projected, features))` over positions: from -1 (aligned) to 1.

    Args:
        projected, features (`torch.Tensor` of shape `(B, D, h, w)`): Hidden states projected to the width of the features, and
            features.

    Source: REPA, Yu et al., 2024, https://huggingface.co/papers/2410.06940.
    """
    return -F.cosine_similarity(projected.float(), features.float(), dim=1).mean()


def _similarities(features: torch.Tensor) -> torch.Tensor:
    """Cosines between all positions of an image, `(B, N, N)`."""
    unit = F.normalize(features.float().flatten(2), dim=1)
    return unit.transpose(1, 2) @ unit
