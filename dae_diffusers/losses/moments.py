"""How far the first two moments of features are from those that they should have."""

import torch


def moment_distance(mean: torch.Tensor, second: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    r"""
    `|mean|^2 + |second - diag(target)|^2 / 4`: near 0 the Fréchet distance to features with mean 0 and variances `target`
    around 1, without a matrix root.

    Args:
        mean (`torch.Tensor` of shape `(D,)`): Of the features.
        second (`torch.Tensor` of shape `(D, D)`): Mean outer product of the features, not centred.
        target (`torch.Tensor` of shape `(D,)`): Variances that the features should have.

    Returns:
        `torch.Tensor`: Scalar, 0 or more.
    """
    return mean.square().sum() + (second - target.diag()).square().sum() / 4


def moment_surrogate(
    features: torch.Tensor, mean: torch.Tensor, second: torch.Tensor, target: torch.Tensor
) -> torch.Tensor:
    r"""
    A scalar whose gradient is that of [`moment_distance`] at the given moments with respect to a batch's share in them: its
    features move the moments, which many other batches have made too.

    Args:
        features (`torch.Tensor` of shape `(B, D)`): Of the batch, with their graph.
        mean, second, target (`torch.Tensor`): As in [`moment_distance`]; no gradient flows into them.

    Returns:
        `torch.Tensor`: Scalar. Only its gradient means something.
    """
    towards = (second - target.diag()).detach() / 2
    return 2 * features.mean(dim=0) @ mean.detach() + ((features @ towards) * features).sum(dim=1).mean()
