"""The factor that balances one loss with others at a layer."""

import torch

from dae_diffusers.losses.processes import mean_over_processes


def adaptive_weight(other_loss: torch.Tensor, loss: torch.Tensor, layer: torch.Tensor, *, cap: float) -> torch.Tensor:
    r"""
    `|d other_loss / d layer| / |d loss / d layer|`: the factor that gives a loss a gradient at a layer as large as the other's.

    The gradients are averaged over all processes, so that all of them use the same factor; under accumulation each
    micro-batch has its own. All processes must call it together.

    Args:
        other_loss, loss (`torch.Tensor`): Scalars; their graphs are retained.
        layer (`torch.Tensor`): A weight that both depend on.
        cap (`float`): Upper bound.

    Returns:
        `torch.Tensor`: Scalar, without gradient.

    Source: Esser et al., 2021, https://huggingface.co/papers/2012.09841.
    """
    norms = []
    for term in (other_loss, loss):
        (gradient,) = torch.autograd.grad(term, layer, retain_graph=True)
        norms.append(mean_over_processes(gradient.float()).norm())
    return (norms[0] / (norms[1] + 1e-6)).clamp(max=cap)
