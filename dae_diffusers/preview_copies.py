"""What a preview says about copies among the images."""

import csv
import io
from collections import Counter
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image

from dae_diffusers.data import ImageDataset
from dae_diffusers.data.copies import files_and_contents
from dae_diffusers.data.dataset import choose_indices
from dae_diffusers.data.near_copies import first_alike, thumbnail
from dae_diffusers.errors import UserError
from dae_diffusers.plots import image_grid

_MOST_SHOWN, _COLUMNS = 24, 4  # pairs in the picture


class Place(NamedTuple):
    r"""
    An image of the training images, or of those that validate.

    Attributes:
        images ([`~dae_diffusers.data.ImageDataset`]): The images of its side.
        index (`int`): Its number there.
        validates (`bool`): Whether it is no training image.
    """

    images: ImageDataset
    index: int
    validates: bool

    @property
    def name(self) -> str:
        r"""Its file's name, where it has one, else its row."""
        return self.images.name_of(self.index)

    @property
    def label(self) -> int | None:
        r"""Its class."""
        return None if self.images.labels is None else self.images.labels[self.index]


class Pair(NamedTuple):
    r"""
    A copy.

    Attributes:
        copy, first ([`Place`]): It, and the first image that it is a copy of.
        is_exact (`bool`): Whether both have the same content, and do not only look alike.
    """

    copy: Place
    first: Place
    is_exact: bool


@dataclass
class Copies:
    r"""
    Attributes:
        pairs (`list[Pair]`): All copies of training images, those that only look alike first.
        num_compared (`tuple[int, int]`): How many training images and images that validate were compared.
        num_training (`int`): How many training images there are.
        unreadable (`list[str]`): Why images could not be read.
    """

    pairs: list[Pair]
    num_compared: tuple[int, int]
    num_training: int
    unreadable: list[str]


def find_copies(train: ImageDataset, validation: ImageDataset, limit: int) -> Copies:
    r"""
    Finds exact and near copies among the training images, and of training images among those that validate.

    Args:
        train, validation ([`~dae_diffusers.data.ImageDataset`]): The images.
        limit (`int`): How many of each are compared at most, a fixed random choice.
    """
    sides = train.in_one_shape(), validation
    chosen = [choose_indices(len(images), limit).tolist() for images in sides]
    both = list(zip(sides, chosen, strict=True))
    places = [Place(images, index, images is validation) for images, indices in both for index in indices]
    files, contents = files_and_contents(
        [images.rows.select(of) for images, of in both], train.image_column, train.root
    )
    looks = [
        look
        for images, indices in both
        for look in images.of_each(lambda index, images=images: _look(images, index), "Looking for copies", indices)
    ]
    of_files = np.unique(files, return_index=True)[1].tolist()  # the first row of each
    is_read = [isinstance(look, np.ndarray) for look in looks]
    alike = _first_alike(looks, [number for number in of_files if is_read[number]])
    exact, near = [], []
    for number, place in enumerate(places):
        same, like = of_files[contents[number]], alike.get(number, number)
        if files[number] != contents[number] and is_read[number] and not places[same].validates:
            exact.append(Pair(place, places[same], True))
        elif like != number and not places[like].validates:
            near.append(Pair(place, places[like], False))
    unreadable = [look for look in looks if isinstance(look, str)]
    return Copies(near + exact, tuple(map(len, chosen)), len(train), unreadable)


def _first_alike(looks: list[np.ndarray | str], numbers: list[int]) -> dict[int, int]:
    """For some numbers, the lowest of them whose image looks alike."""
    if not numbers:
        return {}
    firsts = first_alike(np.stack([looks[number] for number in numbers]))
    return {number: numbers[first] for number, first in zip(numbers, firsts, strict=True)}


def _look(images: ImageDataset, index: int) -> np.ndarray | str:
    """The thumbnail of an image as training sees it, or why it cannot be read."""
    try:
        return thumbnail(images[index]["pixel_values"])
    except UserError as error:
        return str(error)


def describe_copies(copies: Copies) -> str:
    r"""Markdown for a preview: how many there are, what they do, and what to do."""
    num_train, num_validation = copies.num_compared
    text = "\n"
    if copies.unreadable:
        total = num_train + num_validation
        text += (
            f"Images that cannot be read: {len(copies.unreadable)} of {total}. The first: {copies.unreadable[0]}\n\n"
        )
    if num_train < copies.num_training:
        text += (
            f"Compared are {num_train} of {copies.num_training} training images; `--num_compared` compares more.\n\n"
        )
    if not copies.pairs:
        return f"{text}No copies among {num_train} training images and {num_validation} for validation.\n"
    counted = Counter((pair.copy.validates, pair.is_exact) for pair in copies.pairs)
    text += "| copies | the same content | looks alike |\n|---|---|---|\n"
    for validates, name in ((False, f"of {num_train} training images"), (True, f"of {num_validation} for validation")):
        text += f"| {name} | {counted[validates, True]} | {counted[validates, False]} |\n"
    text += (
        "\nThese are copies of training images. `copies.csv` names all, and `copies.png` shows the first of them beside what they "
        "are copies of. A model memorises images that it sees often, and copies for validation make the validation too good. "
        "Look at them: `--drop_copies` leaves out those of the same content, the others you must remove. Mirrored, cropped "
        "and recoloured copies are not found.\n"
    )
    num_others = sum(pair.copy.label != pair.first.label for pair in copies.pairs)
    if num_others:
        text += f"\nCopies of an image of another class: {num_others}. One of the two classes is wrong, or the image has both.\n"
    return text


def draw_copies(pairs: list[Pair]) -> Image.Image:
    r"""The first 24 pairs as training sees them: each first image and, on its right, its copy."""
    tiles = []
    for pair in pairs[:_MOST_SHOWN]:
        sides = [place.images[place.index]["pixel_values"] for place in (pair.first, pair.copy)]
        channels, height, width = sides[0].shape
        tiles.append(torch.cat((*sides, torch.ones(channels, height, max(1, width // 8))), dim=2))
    return image_grid(torch.stack(tiles), columns=min(len(tiles), _COLUMNS))


def table_of_copies(pairs: list[Pair]) -> str:
    r"""A CSV table of all pairs, in the order of the picture."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(("copy", "of", "kind", "side"))
    for pair in pairs:
        kind, side = "exact" if pair.is_exact else "near", "validation" if pair.copy.validates else "training"
        writer.writerow((pair.copy.name, pair.first.name, kind, side))
    return text.getvalue()
