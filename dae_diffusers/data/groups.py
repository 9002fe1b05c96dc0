"""Groups of images that are held out together, or not at all: those of one patient, slide, scene or video."""

import logging

import datasets
import numpy as np

from dae_diffusers.data.classes import class_values
from dae_diffusers.data.columns import feature_of
from dae_diffusers.errors import UserError, did_you_mean

logger = logging.getLogger(__name__)

# While more images than these are to be held out, groups are taken in their order. Only then does it matter how the sizes add up.
_MOST_ADDED_UP = 2000


def group_names(rows: datasets.Dataset, column: str, train: datasets.Features) -> list[str | None]:
    r"""
    The group of each image, None where the column is empty.

    Args:
        rows (`datasets.Dataset`): The rows of a split.
        column (`str`): A column, or a field of one, of names or whole numbers.
        train (`datasets.Features`): Features of the training split.

    Raises:
        UserError: For decimal numbers.
    """
    names: list[str | None] = []
    for value in class_values(rows, column, train):
        if isinstance(value, float) and not value.is_integer():
            raise UserError(
                f"`group_column` {column!r} holds {value}, but groups are names or whole numbers. Name another column, or write the groups "
                "as text."
            )
        value = int(value) if isinstance(value, float) else value
        names.append(None if value is None else str(value))
    return names


def read_groups(rows: datasets.Dataset, column: str, split: str, train: datasets.Features) -> list[str | None]:
    r"""
    [`group_names`] of a split, with a warning that counts the empty ones.

    Raises:
        UserError: If there is no such column, or it holds no names or whole numbers.
    """
    feature = feature_of(rows.features, column)
    if feature is None:
        raise UserError(
            f"`group_column` {column!r} is not among the columns {list(rows.features)} of the split {split!r}. Name one that says which "
            f"images belong together, or leave it out.{did_you_mean(column, list(rows.features))}"
        )
    if not isinstance(feature, (datasets.Value, datasets.ClassLabel)):
        raise UserError(
            f"`group_column` {column!r} holds {feature}, not one name or whole number for each image. Name another column."
        )
    names = group_names(rows, column, train)
    if not any(name is not None for name in names):
        raise UserError(
            f"`group_column` {column!r} is empty in the whole split {split!r}. Name another column, or leave it out."
        )
    if None in names:
        logger.warning(
            "column %s is empty in %d of %d rows of the split %r: each of these images is a group of its own",
            column, names.count(None), len(names), split,
        )  # fmt: skip
    return names


def count_groups(names: list[str | None]) -> int:
    r"""The number of groups; each image without a name is one."""
    return len(set(names) - {None}) + names.count(None)


def whole_groups(names: list[str | None], files: np.ndarray) -> np.ndarray:
    r"""
    The number of each row's group, `(N,)` int64, counted from 0 in their order. Groups that share a file are one group.

    Args:
        names (`list`): From [`group_names`].
        files (`np.ndarray` of shape `(N,)`): The number of each row's file.
    """
    known: dict[str | int, int] = {}
    named = np.array([known.setdefault(row if name is None else name, len(known)) for row, name in enumerate(names)])
    groups = named
    while True:  # each round hands the lowest number on, through files and groups
        joined = _lowest_of(named, _lowest_of(files, groups))
        if (joined == groups).all():
            return np.unique(groups, return_inverse=True)[1]
        groups = joined


def _lowest_of(keys: np.ndarray, values: np.ndarray) -> np.ndarray:
    """For each row the lowest value of all rows with its key."""
    lowest = np.full(int(keys.max()) + 1, values.max())
    np.minimum.at(lowest, keys, values)
    return lowest[keys]


def choose_groups(sizes: np.ndarray, wanted: int) -> list[int]:
    r"""
    Chooses at least one group, and not all, that together hold as nearly `wanted` images as whole groups allow. (If more than 2,000 are
    wanted, the first are taken in order, and the rest is chosen like this.) Among equally good choices it is the one that ends first.

    Args:
        sizes (`np.ndarray` of shape `(N,)`): The images of each group, at least two groups, in the order in which they are tried.
        wanted (`int`): Images to choose, from 1 to all.

    Returns:
        `list[int]`: The places of the chosen groups.
    """
    sizes = sizes.tolist()
    chosen, rest = [], []
    for place, size in enumerate(sizes):
        is_taken = wanted - size >= _MOST_ADDED_UP
        wanted -= size if is_taken else 0
        (chosen if is_taken else rest).append(place)
    total = sum(sizes[place] for place in rest)
    limit = min(2 * wanted, total - 1)  # more would be farther away than nothing
    last = np.full(limit + 1, -1)  # of each sum: the group that completes the first choice which has it
    last[0] = len(sizes)
    step = int(np.gcd.reduce([sizes[place] for place in rest]))  # all sums are multiples of it
    nearest = min(max(round(wanted / step), 0 if chosen else 1) * step, limit)
    for place in rest:
        size = sizes[place]
        sums = size + np.flatnonzero((last[: max(0, limit + 1 - size)] >= 0) & (last[size:] < 0))
        last[sums] = place
        if last[nearest] >= 0:
            break
    found = np.flatnonzero(last >= 0)[0 if chosen else 1 :]
    if not len(found):
        return [min(rest, key=sizes.__getitem__)]
    left = int(found[np.argmin(np.abs(found - wanted))])
    while left:
        chosen.append(int(last[left]))
        left -= sizes[chosen[-1]]
    return chosen
