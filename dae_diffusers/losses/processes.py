"""Communication between the processes of a run that losses need."""

import torch
import torch.distributed as dist


def mean_over_processes(values: torch.Tensor) -> torch.Tensor:
    r"""The mean of a tensor over all processes, without gradient. All processes must call it together."""
    values = values.detach()
    if not (dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1):
        return values
    values = values.clone()
    dist.all_reduce(values)
    return values / dist.get_world_size()
