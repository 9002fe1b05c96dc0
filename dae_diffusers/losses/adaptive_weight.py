"""The factor that balances one loss with others at a layer."""

import torch

from dae_diffusers.losses.processes import mean_over_processes


def adaptive_weight(
    other_loss: torch.Tensor, loss: torch.Tensor, layer: torch.Tensor, *, cap: float, scale: float = 1.0
) -> torch.Tensor:
    r"""
    `|d other_loss / d layer| / |d loss / d layer|`: the factor that gives a loss a gradient at a layer as large as the other's.

    The gradients are averaged over all processes, so that all of them use the same factor; under accumulation each
    micro-batch has its own. All processes must call it together.

    Args:
        other_loss, loss (`torch.Tensor`): Scalars; their graphs are retained.
        layer (`torch.Tensor`): A weight that both depend on.
        cap (`float`): Upper bound; 0: the factor is 1.
        scale (`float`, *optional*): What both losses are multiplied by before their gradients are taken, so that float16 can hold
            these; less where they overflow. The result is that of the losses themselves.

    Returns:
        `torch.Tensor`: Scalar, without gradient.

    Source: Esser et al., 2021, https://huggingface.co/papers/2012.09841.
    """
    if cap == 0:
        return torch.ones((), device=loss.device)
    other_norm, norm = (_gradient_norm(term, layer, scale) for term in (other_loss, loss))
    return (other_norm / (norm + 1e-6)).clamp(max=cap)


def _gradient_norm(loss: torch.Tensor, layer: torch.Tensor, scale: float) -> torch.Tensor:
    while True:
        (gradient,) = torch.autograd.grad(scale * loss, layer, retain_graph=True)
        norm = mean_over_processes(gradient.float()).norm() / scale  # the same on all of them, which try as often
        if scale <= 1 or norm.isfinite():
            return norm
        scale /= 16
