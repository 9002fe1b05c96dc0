"""What losses ask the other processes of a run for."""

import torch
import torch.distributed as dist


def mean_over_processes(values: torch.Tensor) -> torch.Tensor:
    r"""The mean of the same tensor of all processes, without gradient. All processes must call it together."""
    values = values.detach()
    if not (dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1):
        return values
    values = values.clone()
    dist.all_reduce(values)
    return values / dist.get_world_size()
