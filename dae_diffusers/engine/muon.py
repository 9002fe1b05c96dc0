"""Muon for the matrices inside a transformer's blocks, AdamW for all other weights, in one optimiser."""

from collections import defaultdict
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from dae_diffusers.engine.precision import multiplies_in_bfloat16

BLOCKS = ("transformer_blocks", "layers")  # what diffusers and transformers call them
# Products that the transformer computes as one: how many matrices lie one above the other. Each is orthogonalised by itself.
FUSED = {"qkv_proj": 3, "kv_proj": 2, "gate_up_proj": 2}
NOT_HIDDEN = ("norm", "embed")  # modulation and embeddings, which some transformers keep inside their blocks
COEFFICIENTS = (3.4445, -4.7750, 2.0315)
NUM_ITERATIONS = 5
MOMENTUM = 0.95


def hidden_matrices(model: nn.Module) -> dict[nn.Parameter, int]:
    r"""
    The weights of a model that Muon trains: those of the linear layers in a transformer's blocks, without modulation and embeddings.

    Args:
        model (`torch.nn.Module`): The model.

    Returns:
        `dict`: Each weight, and of how many matrices it consists. Empty for a model without such blocks.
    """
    lists = [module for name, module in model.named_modules() if name.rpartition(".")[2] in BLOCKS]
    return {
        layer.weight: FUSED.get(name.rpartition(".")[2], 1)
        for blocks in lists
        for name, layer in blocks.named_modules()
        if isinstance(layer, nn.Linear) and layer.weight.requires_grad and not any(part in name for part in NOT_HIDDEN)
    }


def orthogonalized(matrices: torch.Tensor) -> torch.Tensor:
    r"""
    Replaces the singular values of matrices with values near 1, by Newton-Schulz iterations: in bfloat16 where the hardware multiplies in
    it, else in float32.

    Args:
        matrices (`torch.Tensor` of shape `(B, rows, columns)`): Any scale.

    Returns:
        `torch.Tensor`: bfloat16 or float32, of the same shape. A matrix of zeros stays one.

    Source: Jordan et al., 2024, https://kellerjordan.github.io/posts/muon, as in `torch.optim.Muon`.
    """
    a, b, c = COEFFICIENTS
    is_tall = matrices.shape[-2] > matrices.shape[-1]
    result = matrices.to(torch.bfloat16 if multiplies_in_bfloat16(matrices.device) else torch.float32)
    result = result.mT if is_tall else result
    result = result / result.norm(dim=(-2, -1), keepdim=True).clamp(min=1e-7)
    for _ in range(NUM_ITERATIONS):
        gram = result @ result.mT
        polynomial = torch.baddbmm(gram, gram, gram, beta=b, alpha=c)
        result = torch.baddbmm(result, polynomial, result, beta=a)
    return result.mT if is_tall else result


class MuonWithAdamW(torch.optim.AdamW):
    r"""
    Muon for some matrices, AdamW for the other weights.

    Muon's update is scaled to the size of AdamW's (`0.2 * sqrt(max(rows, columns))`), so that both share learning rate and weight decay.
    Matrices of the same shape are orthogonalised together, which saves most of the time on small models.

    Args:
        matrices (`dict`): Weights that Muon trains, and of how many matrices, one above the other, each consists.
        others (`list[torch.nn.Parameter]`): Weights that AdamW trains.
        options: Those of `torch.optim.AdamW`.

    Sources: Jordan et al., 2024, https://kellerjordan.github.io/posts/muon; the scale: Liu et al., 2025,
    https://huggingface.co/papers/2502.16982.
    """

    def __init__(self, matrices: dict[nn.Parameter, int], others: list[nn.Parameter], **options: Any):
        groups = [{"params": list(matrices), "is_muon": True}, {"params": others, "is_muon": False}]
        super().__init__([group for group in groups if group["params"]], **options)
        self._parts = list(matrices.values())
        self._step_supports_amp_scaling = (
            False  # AdamW's fused kernel unscales gradients itself; Muon needs them unscaled
        )

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """Updates all weights."""
        matrices = [weight for group in self.param_groups if group["is_muon"] for weight in group["params"]]
        gradients = [weight.grad for weight in matrices]
        for group in self.param_groups:
            if group["is_muon"]:
                self._step_muon(group)
        for weight in matrices:
            weight.grad = None  # AdamW passes over them
        loss = super().step(closure)
        for weight, gradient in zip(matrices, gradients, strict=True):
            weight.grad = gradient
        return loss

    def _step_muon(self, group: dict[str, Any]) -> None:
        shapes = defaultdict(list)
        for weight, parts in zip(group["params"], self._parts, strict=True):
            if weight.grad is None:
                continue
            state = self.state[weight]
            if not state:
                state |= {"step": torch.zeros(()), "momentum_buffer": torch.zeros_like(weight)}  # AdamW reads `step`
            momentum = state["momentum_buffer"]
            momentum.lerp_(weight.grad, 1 - MOMENTUM)
            update = torch.lerp(weight.grad, momentum, MOMENTUM)
            for target, matrix in zip(weight.chunk(parts), update.chunk(parts), strict=True):
                shapes[matrix.shape].append((target, matrix))
        for shape, pairs in shapes.items():
            targets, matrices = zip(*pairs, strict=True)
            updates = orthogonalized(torch.stack(matrices)).to(targets[0].dtype)
            torch._foreach_mul_(targets, 1 - group["lr"] * group["weight_decay"])
            torch._foreach_add_(targets, updates.unbind(), alpha=-group["lr"] * 0.2 * max(shape) ** 0.5)
