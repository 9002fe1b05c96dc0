"""Tensors that FSDP may have sharded over processes."""

import torch
from torch.distributed.tensor import DTensor


def whole_tensor(value: torch.Tensor) -> torch.Tensor:
    r"""The tensor itself. If FSDP has sharded it, the whole tensor on every process; then all processes must call this."""
    return value.full_tensor() if isinstance(value, DTensor) else value.contiguous()


def local_tensor(value: torch.Tensor) -> torch.Tensor:
    r"""The tensor itself. If FSDP has sharded it, this process's part."""
    return value.to_local() if isinstance(value, DTensor) else value
