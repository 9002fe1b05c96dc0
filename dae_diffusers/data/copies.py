"""Finds images that are copies of others by their content."""

import logging
from collections.abc import Sequence

import datasets
import numpy as np
from tqdm.auto import tqdm

from dae_diffusers.data.contents import Root, content_hash
from dae_diffusers.data.dataset import encoded_sizes, files_by_name, name_in

logger = logging.getLogger(__name__)

_UNREADABLE = content_hash(None)


def files_and_contents(
    parts: Sequence[datasets.Dataset], column: str, root: Root | None = None
) -> tuple[np.ndarray, np.ndarray]:
    r"""
    The file of each row's image, and the first file with the same content. A row whose two numbers differ is a copy; several rows of one
    file, as with one caption a row, are none. Only files of the same size are read. What cannot be read is no copy.

    Args:
        parts (`Sequence[datasets.Dataset]`): Rows, part after part. A file of a later part is another one, whatever its name.
        column (`str`): The column of their images.
        root ([`~dae_diffusers.data.contents.Root`], *optional*): Folder in which the files that rows name must lie.

    Returns:
        Two `np.ndarray` of shape `(N,)`: int64, counted from 0 in the order of the rows of all parts.
    """
    parts = [rows.select_columns(column) for rows in parts]
    files, rows_of = np.empty(0, np.int64), []
    for rows in parts:
        numbers = files_by_name(rows, column, root)
        firsts = np.unique(numbers, return_index=True)[1]
        files = np.concatenate((files, numbers + len(rows_of)))
        rows_of += [(rows, int(index)) for index in firsts]
    sizes = _sizes(parts, column, root)[np.unique(files, return_index=True)[1]]
    _, group, counts = np.unique(sizes, return_inverse=True, return_counts=True)
    same, known = np.arange(len(rows_of)), {}
    for number in tqdm(
        np.flatnonzero(counts[group] > 1).tolist(), desc="Comparing files of the same size", leave=False
    ):
        rows, index = rows_of[number]
        content = content_hash(rows[index][column], root)
        if content != _UNREADABLE:
            same[number] = known.setdefault(content, number)
    return files, same[files]


def without_copies(
    train: datasets.Dataset, validation: datasets.Dataset | None, column: str, root: Root | None
) -> datasets.Dataset:
    r"""
    The training rows without copies: of files with the same content the first stays, or none if it is among the rows for validation.

    Args:
        train, validation (`datasets.Dataset`): Rows of both splits; no `validation` if a part of `train` will be held out.
        column, root: As in [`files_and_contents`].
    """
    parts = [train] if validation is None else [validation, train]
    start = sum(map(len, parts)) - len(train)
    files, contents = (numbers[start:] for numbers in files_and_contents(parts, column, root))
    copies = np.flatnonzero(files != contents)
    if not len(copies):
        return train
    logger.info(
        "left out %d of %d training images, because they are copies of others, such as %s",
        len(copies), len(train), name_in(train, column, int(copies[0])),
    )  # fmt: skip
    return train.select(np.flatnonzero(files == contents))


def _sizes(parts: Sequence[datasets.Dataset], column: str, root: Root | None) -> np.ndarray:
    """The size of each encoded image, `(N,)`. Of arrays 0, as if all had the same."""
    sizes = [encoded_sizes(rows, column, root) for rows in parts]
    return np.concatenate(
        [
            each if len(each) == len(rows) else np.zeros(len(rows), np.int64)
            for each, rows in zip(sizes, parts, strict=True)
        ]
    )
