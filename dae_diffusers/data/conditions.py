"""What images are drawn from besides their class and a text: further class columns, numbers, and the name of a column of images."""

import logging
import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import datasets

from dae_diffusers.data.classes import Classes
from dae_diffusers.data.columns import column_values, feature_of
from dae_diffusers.data.configuration import DataConfig
from dae_diffusers.errors import UserError, did_you_mean

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class ConditionColumns:
    r"""
    The values of a split's images, column by column.

    Attributes:
        labels (`dict[str, list[int]]`): The class of each image, by the name of a class column after the first.
        names (`dict[str, list[str]]`): The names of the classes of each of these columns.
        numbers (`dict[str, list[float | None]]`): A number of each image, by the name of its column; None where it is unknown.
        image_column (`str`, *optional*): Column of the condition images, which are read by
            [`~dae_diffusers.data.condition_images.ConditionImages`].
        label_column (`str`, *optional*): The column of the classes themselves.
    """

    labels: dict[str, list[int]] = field(default_factory=dict)
    names: dict[str, list[str]] = field(default_factory=dict)
    numbers: dict[str, list[float | None]] = field(default_factory=dict)
    image_column: str | None = None
    label_column: str | None = None

    def select(self, indices: Sequence[int]) -> "ConditionColumns":
        r"""The values of some images."""
        labels, numbers = (
            {name: [values[index] for index in indices] for name, values in columns.items()}
            for columns in (self.labels, self.numbers)
        )
        return replace(self, labels=labels, numbers=numbers)


def conditions_of(
    config: DataConfig, splits: Sequence[tuple[str, datasets.Dataset]], image_column: str, label_column: str | None
) -> list[ConditionColumns] | list[None]:
    r"""
    Reads the columns that the settings name from each split; None for each if they name none.

    Args:
        config ([`DataConfig`]): `label_column` (all but the first), `continuous_columns`, `condition_column`.
        splits (sequence of pairs): Name of the split and its rows, of the training and the validation images.
        image_column, label_column (`str`): Columns of the images themselves and of their classes.

    Raises:
        UserError: If a split lacks a column, or it holds something else.
    """
    others, condition = config.label_columns[1:], config.condition_column
    columns = [*others, *config.continuous_columns, *([] if condition is None else [condition])]
    if not columns:
        return [None] * len(splits)
    for split, rows in splits:
        for column in columns:
            if feature_of(rows.features, column) is None:
                raise UserError(
                    f"{_flag(column, config)} {column!r} is not among the columns {list(rows.features)} of the split {split!r}."
                    f"{did_you_mean(column, list(rows.features))}"
                )
    if condition == image_column:
        raise UserError(f"`condition_column` {condition!r} is the column of the images: name another one.")
    labels, names = [{} for _ in splits], {}
    for column in others:
        train, validation = (rows for _, rows in splits)
        classes = Classes.of(train, validation, column)
        names[column] = list(classes.id2label.values())
        for found, (split, rows) in zip(labels, splits, strict=True):
            is_held_out = rows is validation and split == splits[0][0]
            found[column] = classes.ids(rows, split, is_held_out=is_held_out)
    return [
        ConditionColumns(
            found,
            names,
            {column: numbers_of(rows, column, split) for column in config.continuous_columns},
            condition,
            label_column,
        )
        for found, (split, rows) in zip(labels, splits, strict=True)
    ]


def numbers_of(rows: datasets.Dataset, column: str, split: str) -> list[float | None]:
    r"""
    The numbers of a column, None where a row has none.

    Raises:
        UserError: If it holds no numbers, or NaN or infinite ones.
    """
    feature = feature_of(rows.features, column)
    kind = str(getattr(feature, "dtype", ""))
    if not isinstance(feature, datasets.Value) or not kind.startswith(("int", "uint", "float", "decimal")):
        raise UserError(
            f"`continuous_columns` {column!r} holds {feature}, not numbers. Name a column of numbers; classes belong to `label_column`."
        )
    values = [None if value is None else float(value) for value in column_values(rows, column)]
    bad = [value for value in values if value is not None and not math.isfinite(value)]
    if bad:
        raise UserError(
            f"`continuous_columns` {column!r} holds {bad[0]} in {len(bad)} of {len(values)} rows of the split {split!r}. Leave such values "
            "empty, so that they count as unknown, or remove these rows."
        )
    if values.count(None):
        logger.warning(
            "column %s is empty in %d of %d rows of the split %r: unknown",
            column,
            values.count(None),
            len(values),
            split,
        )
    return values


def _flag(column: str, config: DataConfig) -> str:
    """The setting that names a column."""
    if column in config.continuous_columns:
        return "`continuous_columns`"
    return "`condition_column`" if column == config.condition_column else "`label_column`"
