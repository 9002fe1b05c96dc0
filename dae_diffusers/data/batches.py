"""The base class of the data sets here, which make whole batches."""

from collections.abc import Sequence
from typing import Any

import torch
from torch.utils.data import Dataset

from dae_diffusers.data.buckets import Buckets


class BatchDataset(Dataset):
    r"""A data set whose `__getitems__` makes a whole batch at once, which is faster than one item after the other."""

    def __getitem__(self, item: Any) -> dict[str, torch.Tensor]:
        return {name: value[0] for name, value in self.__getitems__([item]).items()}

    def __getitems__(self, items: list[Any]) -> dict[str, torch.Tensor]:
        raise NotImplementedError

    @property
    def buckets(self) -> Buckets | None:
        r"""The shapes of the images or latents, each batch of which has one; None if all have the same."""
        return None

    @staticmethod
    def collate_fn(batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        r"""For `DataLoader`: returns the batch, which is already made."""
        return batch


class ExtendedDataset(BatchDataset):
    r"""
    Another data set whose batches get more tensors, drawn by the same index and draw.

    Args:
        data ([`BatchDataset`]): Images or latents.
    """

    def __init__(self, data: BatchDataset):
        self.data = data

    def __len__(self) -> int:
        return len(self.data)

    @property
    def buckets(self) -> Buckets | None:
        return self.data.buckets

    @property
    def labels(self) -> Sequence[int] | None:
        return self.data.labels
