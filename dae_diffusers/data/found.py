"""What the settings name in a source of images: two splits and their columns."""

import logging
from dataclasses import dataclass

import datasets

from dae_diffusers.data.columns import TEXT, Rows, column_values, feature_of, find_label_column, with_image_column
from dae_diffusers.data.configuration import DataConfig
from dae_diffusers.data.contents import Root
from dae_diffusers.data.sources import load_splits
from dae_diffusers.data.tables import SPLITS
from dae_diffusers.errors import UserError

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Found:
    r"""
    Both splits with the same columns, before anything is held out.

    Attributes:
        config ([`DataConfig`]): The settings.
        source (`str`): What the source is called in messages.
        root ([`~dae_diffusers.data.contents.Root`] or `None`): Folder in which the files that rows name must lie.
        train, validation (`Rows`): Their images are files or arrays. No `validation` if a part of `train` will be held out.
        validation_name (`str`): The split that the images for validation are from.
        image_column (`str`), label_column (`str` or `None`): The columns of the images and of their classes.
        value_range (`list[float]` or `None`): What is mapped to -1 and 1, if the settings or a trained model say it.
    """

    config: DataConfig
    source: str
    root: Root | None
    train: Rows
    validation: Rows | None
    validation_name: str
    image_column: str
    label_column: str | None
    value_range: list[float] | None

    @classmethod
    def of(cls, config: DataConfig, value_range: list[float] | None) -> "Found":
        r"""
        Loads the source.

        Raises:
            UserError: For a data set, split or column that does not exist.
        """
        splits, root, source = load_splits(config)
        validation_name = _validation_split(config, splits)
        train = splits.pop(config.train_split)
        validation = splits.pop(validation_name, None)
        if splits:
            logger.info("splits that are not used: %s", ", ".join(sorted(splits)))
        if train.features is None:
            raise UserError(
                "the stream does not say what its columns hold; use Parquet or webdataset shards, or leave `streaming` out."
            )
        train, image_column = with_image_column(train, config.image_column)
        label_column = _label_column(config, train, image_column)
        if config.group_column == image_column:
            raise UserError(f"`group_column` {image_column!r} is the column of the images: name another one.")
        if validation is None:
            _warn_of_split_column(config, train)
        else:
            validation = with_image_column(validation, image_column)[0]
            _require_labels(validation, label_column, validation_name)
        return cls(config, source, root, train, validation, validation_name, image_column, label_column, value_range)


def _warn_of_split_column(config: DataConfig, rows: Rows) -> None:
    """Warns about a column that says which rows are for training and which are not: nothing reads it."""
    used = {*config.label_columns, config.group_column}
    for column in rows.features if isinstance(rows, datasets.Dataset) else ():
        if column.strip().lower() != "split" or column in used or rows.features[column] not in TEXT:
            continue
        values = {each for each in column_values(rows, column) if each}
        if len(values) > 1 and all(each.strip().lower() in SPLITS for each in values):
            logger.warning(
                "the column %r, which holds %s, is not used: all these rows are trained on, but for those held out at random. Put the "
                "files into folders of these names, or leave the others out.",
                column, ", ".join(sorted(values)),
            )  # fmt: skip


def _validation_split(config: DataConfig, splits: dict[str, Rows]) -> str:
    """The split asked for, or one with a usual name, or else that of the training images, of which a part is held out."""
    if config.train_split not in splits:
        raise UserError(f"`train_split` {config.train_split!r} does not exist; the splits are {list(splits)}.")
    if config.validation_split is not None:
        if config.validation_split not in splits:
            raise UserError(
                f"`validation_split` {config.validation_split!r} does not exist; the splits are {list(splits)}."
            )
        return config.validation_split
    usual = [name for name, kind in SPLITS.items() if kind != "train"]  # those of validation come before those of test
    return next((name for name in usual if name in splits and name != config.train_split), config.train_split)


def _label_column(config: DataConfig, rows: Rows, image_column: str) -> str | None:
    column = find_label_column(rows, config.first_label_column, image_column, config.group_column)
    if config.streaming and column == "cls" and config.label_column is None and config.num_classes is None:
        logger.warning(
            "the labels in the column `cls` are not used: a stream cannot count its classes. To use them give `--label_column cls` and "
            "`--num_classes`."
        )
        return None
    return column


def _require_labels(validation: Rows, column: str | None, split: str) -> None:
    if column is not None and feature_of(validation.features, column) is None:
        raise UserError(
            f"the split {split!r} has no column {column!r} of labels, but {list(validation.features)}. Pass "
            "`validation_split train` to hold out a part of the training images instead, or `label_column none`."
        )
