"""The conditions of images in their own units, as pipelines take them and grids show them."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from dae_diffusers.data import ImageDataset
from dae_diffusers.store import fingerprint_of_json


class ConditionValues(Sequence):
    r"""
    The conditions of some images in their own units, each as the argument `conditions` of [`DAEDiTPipeline`].

    Args:
        images ([`~dae_diffusers.data.ImageDataset`]): Images with `conditions`.
        indices (sequence of `int`): Their numbers.

    Attributes:
        fingerprint (`str`): Of all values.
    """

    def __init__(self, images: ImageDataset, indices: Sequence[int]):
        self.columns = images.conditions.select(indices)
        self.indices = list(indices)
        self.pictures = images.condition_images
        of_pictures = [] if self.pictures is None else [self.pictures.fingerprint, self.indices]
        self.fingerprint = fingerprint_of_json([vars(self.columns), *of_pictures])

    @property
    def labels(self) -> dict[str, list[str]]:
        r"""The names of the classes of each class column."""
        return self.columns.names

    @property
    def names(self) -> list[str]:
        r"""What a row has."""
        return [*self.columns.labels, *self.columns.numbers, *filter(None, [self.columns.image_column])]

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, index: int) -> dict[str, Any]:
        columns = self.columns
        labels = {name: columns.names[name][values[index]] for name, values in columns.labels.items()}
        row = labels | {name: values[index] for name, values in columns.numbers.items()}
        if self.pictures is not None:
            row[columns.image_column] = self.pictures[self.indices[index]]["pixel_values"] / 2 + 0.5
        return row

    def __iter__(self) -> Iterator[dict[str, Any]]:
        return (self[index] for index in range(len(self)))


def as_call(rows: Sequence[Mapping[str, Any]]) -> dict[str, list]:
    r"""Conditions of several images as the one argument `conditions` of a call."""
    return {name: [row[name] for row in rows] for name in rows[0]}


def in_words(row: Mapping[str, Any]) -> str:
    r"""The conditions of an image for a grid: `angle 30, color red`."""
    known = {name: value for name, value in row.items() if isinstance(value, str | float)}
    return ", ".join(f"{name} {value if isinstance(value, str) else f'{value:.4g}'}" for name, value in known.items())
