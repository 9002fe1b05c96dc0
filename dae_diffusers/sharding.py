"""Tensors that FSDP may have spread over processes."""

import torch
from torch.distributed.tensor import DTensor


def whole_tensor(value: torch.Tensor) -> torch.Tensor:
    r"""The tensor itself, or, where FSDP has spread it, all of it on every process; then all processes call it."""
    return value.full_tensor() if isinstance(value, DTensor) else value.contiguous()


def local_tensor(value: torch.Tensor) -> torch.Tensor:
    r"""The tensor itself, or, where FSDP has spread it, this process's part."""
    return value.to_local() if isinstance(value, DTensor) else value
