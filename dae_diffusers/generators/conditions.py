"""What a run's images are drawn from besides a class and a text, as the transformer, the pipeline and the samples need it."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from safetensors.torch import load_file

from dae_diffusers.caching import cached_rows
from dae_diffusers.data import ImageDataset, split_items
from dae_diffusers.data.batches import BatchDataset, ExtendedDataset
from dae_diffusers.data.condition_images import ConditionImages
from dae_diffusers.data.condition_values import ConditionValues
from dae_diffusers.errors import UserError
from dae_diffusers.pipelines.dae_dit import CONDITION_KINDS, columns_of, conditions_as_arguments, on_latents
from dae_diffusers.store import fingerprint_of_json

CHUNK_SIZE = 1024  # condition images in a shard
CONDITION_ARGUMENTS = tuple(CONDITION_KINDS.values())


class Conditions:
    r"""
    Further classes, numbers and condition images of a run's images.

    Args:
        images (pair of [`~dae_diffusers.data.ImageDataset`]): Training and validation images, with `conditions`.
        factor (`int`): Pixels per latent pixel, along a side.
        known (`dict`, *optional*): What a pipeline calls `conditions`; numbers that it has are normalised as there.

    Attributes:
        config (`dict`): As [`DAEDiTPipeline`] has it.
        label_column (`str` or `None`): What the pipeline calls the classes themselves.
        fingerprint (`str`): Of the values of all images.

    Raises:
        UserError: If all training images have the same number.
    """

    def __init__(self, images: Sequence[ImageDataset], factor: int, known: Mapping[str, Any] | None = None):
        self.factor = factor
        self.images, train = tuple(images), images[0].conditions
        self.label_column = train.label_column
        self.config = {name: {"labels": names} for name, names in train.names.items()}
        for name, values in train.numbers.items():
            old = (known or {}).get(name, {})
            self.config[name] = dict(old) if "mean" in old else statistics_of(name, values)
        self.pictures = [each.condition_images for each in images if each.condition_images is not None]
        for each in self.pictures[:1]:
            self.config[train.image_column] = {"channels": each.channels, "value_range": each.value_range}
        columns = [vars(each.conditions) for each in images]
        self.fingerprint = fingerprint_of_json([columns, [each.fingerprint for each in self.pictures]])

    def keep_images(self, accelerator: Accelerator, folder: Path) -> None:
        r"""Keeps the scaled condition images in shards in a folder, and reads them from there. All processes call it."""
        for pictures in self.pictures:
            rows = cached_rows(
                lambda chunk, pictures=pictures: {"pixels": pictures.pixels(chunk)},
                len(pictures),
                accelerator,
                folder=folder,
                of=[
                    "condition images",
                    pictures.fingerprint,
                    pictures.images.fingerprint,
                    pictures.config.size,
                    pictures.channels,
                    *([] if pictures.config.pad is None else [pictures.config.pad]),
                ],
                chunk_size=CHUNK_SIZE,
                description="Keeping condition images",
                load=False,
            )
            pictures.use_kept([load_file(path)["pixels"] for path in rows["pixels"].files.values()])

    def transformer_kwargs(self) -> dict[str, Any]:
        r"""Arguments of the constructor of [`DAEDiTTransformer2DModel`]."""
        classes = [len(self.config[name]["labels"]) for name in columns_of(self.config, "labels")]
        kwargs = {"num_attribute_classes": classes or None, "num_continuous": len(columns_of(self.config, "mean"))}
        return {**kwargs, "condition_channels": sum(each.channels * self.factor**2 + 1 for each in self.pictures[:1])}

    def add_to(self, *data: BatchDataset) -> list["WithConditions"]:
        r"""Training and validation data, images or latents, with the conditions of each."""
        return [
            WithConditions(each, self._rows(images), pictures, self.factor)
            for each, images, pictures in zip(data, self.images, self.pictures or [None] * len(data), strict=True)
        ]

    def example(self) -> dict[str, Any]:
        r"""The conditions of a validation image for the model card, None in the place of an image."""
        row = ConditionValues(self.images[1], [0])[0]
        return {name: None if isinstance(value, torch.Tensor) else value for name, value in row.items()}

    def _rows(self, images: ImageDataset) -> dict[str, torch.Tensor]:
        columns = images.conditions
        rows = {name: torch.tensor(values) for name, values in columns.labels.items()}
        for name, values in columns.numbers.items():
            numbers = torch.tensor([float("nan") if value is None else value for value in values], dtype=torch.float64)
            rows[name] = ((numbers - self.config[name]["mean"]) / self.config[name]["std"]).float()
        return conditions_as_arguments({name: each for name, each in self.config.items() if name in rows}, rows)

    def dropped(
        self, batch: Mapping[str, torch.Tensor], is_dropped: torch.Tensor, share: float
    ) -> dict[str, torch.Tensor]:
        r"""
        The conditions of a batch as arguments of the transformer. All of a sample are unknown where `is_dropped` `(B,)` says so. Of the
        others a share of each column is unknown, so that the model also learns to draw from some of them.
        """
        given = {name: batch[name] for name in CONDITION_ARGUMENTS if name in batch}
        unknown = torch.rand(len(is_dropped), len(self.config), device=is_dropped.device) < share
        unknown, first = unknown | is_dropped[:, None], 0
        for name, value in given.items():
            count = value.shape[1] if value.ndim == 2 else 1
            chosen, first = unknown[:, first : first + count], first + count
            given[name] = torch.where(
                chosen.view(len(value), -1, *(1,) * (value.ndim - 2)), self._unknown(name, value), value
            )
        return given

    def _unknown(self, argument: str, value: torch.Tensor) -> torch.Tensor:
        """What stands for unknown: the number of a column's classes, NaN, or zeros."""
        if argument == CONDITION_KINDS["labels"]:
            counts = self.transformer_kwargs()["num_attribute_classes"]
            return torch.cat([value.new_full((1,), count) for count in counts])  # no copy, which holds a GPU up
        return value.new_full((), math.nan if argument == CONDITION_KINDS["mean"] else 0.0)


class WithConditions(ExtendedDataset):
    r"""
    Images or latents together with the conditions of each, drawn by the same index and draw.

    Args:
        data ([`BatchDataset`]): The images or latents.
        rows (`dict[str, torch.Tensor]`): Arguments of the transformer, a row for each image.
        pictures ([`~dae_diffusers.data.condition_images.ConditionImages`], *optional*): The condition images.
        factor (`int`): Pixels per latent pixel, along a side.
    """

    def __init__(
        self, data: BatchDataset, rows: dict[str, torch.Tensor], pictures: ConditionImages | None, factor: int
    ):
        super().__init__(data)
        self.rows = rows
        self.pictures = pictures
        self.factor = factor

    def __getitems__(self, items: list[int | tuple[int, int]]) -> dict[str, torch.Tensor]:
        indices, _ = split_items(items)
        batch = {**self.data.__getitems__(items), **{name: value[indices] for name, value in self.rows.items()}}
        if self.pictures is not None:
            pixels = self.pictures.__getitems__(items)["pixel_values"]
            batch[CONDITION_KINDS["channels"]] = on_latents(pixels, self.factor)
        return batch


def statistics_of(name: str, values: Sequence[float | None]) -> dict[str, float]:
    r"""
    `mean`, `std`, `low` and `high` of the known numbers of a column.

    Raises:
        UserError: If there are none, or all are the same.
    """
    known = np.array([value for value in values if value is not None])
    if len(np.unique(known)) < 2:
        what = f"the same number, {known[0]:g}," if len(known) else "no number"
        raise UserError(
            f"`continuous_columns` {name!r} holds {what} for all training images: there is nothing to learn. Leave it out."
        )
    statistics = {"mean": known.mean(), "std": known.std(), "low": known.min(), "high": known.max()}
    return {name: float(value) for name, value in statistics.items()}
