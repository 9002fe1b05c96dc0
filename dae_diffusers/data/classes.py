"""The classes of images: their names, their numbers, and the class of each row."""

import logging
import math
import re
import unicodedata
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import datasets

from dae_diffusers.data.columns import TEXT, column_values, feature_of
from dae_diffusers.errors import UserError

logger = logging.getLogger(__name__)


def class_order(names: Iterable[str]) -> list[str]:
    r"""Sorts names of classes, by number if all are numbers."""
    names = sorted(names)
    return sorted(names, key=int) if all(re.fullmatch(r"\d+", name, re.ASCII) for name in names) else names


def class_name(name: str) -> str:
    r"""The name of a class as it is compared: without spaces around it, and with composed letters (NFC)."""
    return unicodedata.normalize("NFC", name).strip()


def class_values(rows: datasets.Dataset, column: str, train: datasets.Features) -> list:
    r"""
    The values of a column of classes; empty text counts as none. The ids of a `ClassLabel` become names, because each split has its
    own ids. Training images whose classes are numbers have no names: then names that are numbers become these, and other ids stay.

    Args:
        rows (`datasets.Dataset`): The rows of a split.
        column (`str`): The column, or a field of one.
        train (`datasets.Features`): Features of the training split.
    """
    return list(map(_class_of, _named_values(rows, column, train)))


def _class_of(value: Any) -> Any:
    if isinstance(value, float) and math.isnan(value):
        return None
    return class_name(value) or None if isinstance(value, str) else value


def _named_values(rows: datasets.Dataset, column: str, train: datasets.Features) -> list:
    """[`class_values`] with the names as the data set writes them."""
    feature, of_train = feature_of(rows.features, column), feature_of(train, column)
    values = column_values(rows, column)
    if not isinstance(feature, datasets.ClassLabel):
        return values
    names: list = feature.names
    if not isinstance(of_train, datasets.ClassLabel) and of_train not in TEXT:
        if not all(re.fullmatch(r"\d+", name, re.ASCII) for name in names):
            return values
        names = list(map(int, names))
    return [names[value] if value is not None and 0 <= value < len(names) else value for value in values]


def without_unlabelled(rows: datasets.Dataset, column: str, split: str, train: datasets.Features) -> datasets.Dataset:
    r"""The rows of a split that have a class: no empty cell and no -1. Logs how many are left out. Arguments as in [`class_values`]."""
    values = class_values(rows, column, train)
    kept = [n for n, value in enumerate(values) if value is not None and not (_is_number(value) and value < 0)]
    if len(kept) == len(values):
        return rows
    logger.warning(
        "left out: %d of %d images of the split %r, which have no class", len(values) - len(kept), len(values), split
    )
    return rows.select(kept)


@dataclass(frozen=True)
class Classes:
    r"""
    The classes in a column.

    Attributes:
        column (`str`): The column, or a field of one.
        id2label (`dict[int, str]`): Their names.
        value2id (`dict` or `None`): The id of each of [`class_values`] that is no id already.
        train (`datasets.Features`): Features of the training split.
    """

    column: str
    id2label: dict[int, str]
    value2id: dict | None
    train: datasets.Features

    @classmethod
    def of(
        cls, train: datasets.Dataset, validation: datasets.Dataset, column: str, *, is_chosen: bool = True
    ) -> "Classes":
        r"""
        The classes of the training images, and those that only the validation images have.

        Args:
            train, validation (`datasets.Dataset`): The rows of both.
            column (`str`): The column, or a field of one.
            is_chosen (`bool`, *optional*): Whether the user named it; another column must look like classes.

        Raises:
            UserError: If the column holds no classes.
        """
        return cls(column, *_names_and_ids(train, validation, column, is_chosen), train.features)

    def ids(self, rows: datasets.Dataset, split: str, *, is_held_out: bool = False) -> list[int]:
        r"""
        The class of each row of a split, or of a part of the training split that is held out.

        Raises:
            UserError: For values that are no labels, such as the -1 of an unlabelled split; the message names the split.
        """
        values, known = class_values(rows, self.column, self.train), self.value2id
        ids = [value if known is None else known.get(value, value) for value in values]
        bad = [value for value in ids if not isinstance(value, int) or not 0 <= value < len(self.id2label)]
        if bad:
            part = "the held-out part of " if is_held_out else ""
            place = f"{len(bad)} of {len(ids)} rows of {part}the split {split!r}"
            problem = f"holds {bad[0]}, but labels must lie in 0..{len(self.id2label) - 1}: {place}."
            if isinstance(bad[0], str):
                problem = f"holds {bad[0]!r}, which is no class of the training images: {place}."
            if bad[0] is None:
                problem = f"must hold integers or strings without gaps, but holds none in {place}."
            if len(bad) == len(ids) and not is_held_out:
                problem += " `validation_split train` holds out a part of the training images instead."
            advice = "Remove the unlabelled rows"
            if bad[0] is None or bad[0] == -1:
                advice = "Leave the unlabelled rows out (`on_missing_label skip`)"
            raise UserError(
                f"`label_column` {self.column!r} {problem} {advice} or train without labels (`label_column none`)."
            )
        return ids


def _names_and_ids(
    train: datasets.Dataset, validation: datasets.Dataset, column: str, is_chosen: bool
) -> tuple[dict[int, str], dict | None]:
    feature = feature_of(train.features, column)
    of_validation = _named_values(validation, column, train.features)
    if isinstance(feature, datasets.ClassLabel):
        more = {value for value in of_validation if isinstance(value, str)}.difference(feature.names)
        names = _distinct([*feature.names, *class_order(more)])
        return dict(enumerate(names)), {name: number for number, name in enumerate(names)}
    if isinstance(feature, (datasets.List, datasets.LargeList, dict, datasets.Image)):
        raise UserError(f"`label_column` {column!r} holds {feature}, not one class for each image; `none`: no labels.")
    of_train = column_values(train, column)
    values = {value for value in (*of_train, *of_validation) if _class_of(value) is not None}
    if not values:
        raise UserError(f"`label_column` {column!r} holds no values; `none`: no labels.")
    if not is_chosen and len(set(of_train)) > max(100, len(of_train) // 2):
        raise UserError(
            f"the column {column!r} holds {len(set(of_train))} different values for {len(of_train)} images. If those are classes, "
            f"pass `label_column {column}`; if not, `label_column none`."
        )
    value2id = None
    if all(isinstance(value, bool) for value in values):
        return {0: "False", 1: "True"}, {False: 0, True: 1}
    if all(map(_is_whole, values)):
        value2id = {value: int(value) for value in values}
        values = set(value2id.values())
    if all(isinstance(value, int) and not isinstance(value, bool) for value in values):
        if max(values) >= max(10_000, 100 * len(values)):
            raise UserError(
                f"`label_column` {column!r} holds {len(values)} different integers, up to {max(values)}; labels are numbers from "
                "0 without large gaps. Number the classes from 0, or train without labels (`label_column none`)."
            )
        return {index: str(index) for index in range(max(values) + 1)}, value2id
    if all(isinstance(value, str) for value in values):
        names = _distinct(class_order(values))
        return dict(enumerate(names)), {value: index for index, value in enumerate(names)}
    words = {int: "integers", float: "decimal numbers", bool: "truth values", str: "texts"}
    kinds = [
        sorted({words.get(type(value), "other values") for value in map(_class_of, some) if value is not None})
        for some in (of_train, of_validation)
    ]
    if kinds[1] and kinds[0] != kinds[1]:
        raise UserError(
            f"`label_column` {column!r} holds {' and '.join(kinds[0])} for the training images, but {' and '.join(kinds[1])} for those of "
            "validation. Write the classes alike in both; `none`: no labels."
        )
    odd = next((value for value in values if not isinstance(value, (int, str)) and not _is_whole(value)), None)
    raise UserError(
        f"`label_column` {column!r} must hold integers or strings without gaps, but holds {feature}, such as {odd!r}; `none`: no labels."
    )


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _is_whole(value: Any) -> bool:
    return isinstance(value, float) and value.is_integer()


def _distinct(names: Iterable[str]) -> list[str]:
    """Normalised names without repeats, in the order of the raw ones, so that the numbers of classes stay those of earlier versions."""
    return list(dict.fromkeys(map(class_name, names)))


def describe_classes(labels: list[int] | None, id2label: dict[int, str]) -> str:
    r"""`3 classes: cat 120, dog 98, owl 7`, shortened where there are many."""
    counts = Counter(labels or [])
    parts = [f"{name} {counts[number]}" if labels is not None else name for number, name in id2label.items()]
    if len(parts) > 12:
        parts[8:-2] = ["..."]
    text = f"{len(id2label)} classes: {', '.join(parts)}"
    empty = [name for number, name in id2label.items() if not counts[number]] if labels is not None else []
    if empty:
        text += f"; without training images: {', '.join(empty[:8])}{', ...' if len(empty) > 8 else ''}"
    differ = [number for number, name in id2label.items() if re.fullmatch(r"-?\d+", name) and int(name) != number]
    if differ:
        number = differ[0]
        text += (
            f". Names and numbers differ: class {number} is called {id2label[number]!r}; where a class is asked for, an integer is "
            "the number and a string the name"
        )
    return text
