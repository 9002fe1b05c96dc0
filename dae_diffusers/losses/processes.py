"""Communication between the processes of a run that losses need."""

import torch
import torch.distributed as dist


def num_processes() -> int:
    r"""The processes of the run; 1 where none were launched together."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def sum_over_processes(values: torch.Tensor) -> torch.Tensor:
    r"""The sum of a tensor without gradient over all processes, in its own memory. All processes must call it together."""
    if num_processes() > 1:
        dist.all_reduce(values)
    return values


def mean_over_processes(values: torch.Tensor) -> torch.Tensor:
    r"""The mean of a tensor over all processes, without gradient. All processes must call it together."""
    values = values.detach()
    return sum_over_processes(values.clone()) / num_processes() if num_processes() > 1 else values
