"""Finds the columns of a data set that hold the images and the labels."""

import logging
from typing import Any

import datasets

from dae_diffusers.data.formats import HEIF_SUFFIXES, SUFFIXES
from dae_diffusers.errors import UserError

logger = logging.getLogger(__name__)

Rows = datasets.Dataset | datasets.IterableDataset

TEXT = (datasets.Value("string"), datasets.Value("large_string"))
# Names of columns that hold classes, if no type says so; the second group counts only without one of the first.
_LABELS = (("label", "labels", "class"), ("cls",))
LABELS = (*_LABELS[0], *_LABELS[1])


def is_word_for_nothing(text: str) -> bool:
    r"""Whether a text is what programs write for a missing one."""
    return text.strip().lower() in ("nan", "none", "null", "n/a", "<na>")


def feature_of(features: datasets.Features, column: str) -> Any:
    r"""The feature of a column, or of a field `json.label` of one; None if there is none."""
    if column in features:
        return features[column]
    name, _, rest = column.partition(".")
    while rest:
        if isinstance(features.get(name), dict):
            return feature_of(features[name], rest)
        word, _, rest = rest.partition(".")
        name = f"{name}.{word}"
    return None


def value_of(row: dict[str, Any], column: str) -> Any:
    r"""The value of a column, or of a field `json.label` of one."""
    if column in row:
        return row[column]
    name, _, rest = column.partition(".")
    while rest and name not in row:
        word, _, rest = rest.partition(".")
        name = f"{name}.{word}"
    return value_of(row[name], rest) if rest and isinstance(row.get(name), dict) else None


def with_image_column(rows: Rows, name: str | None, flag: str = "image_column") -> tuple[Rows, str]:
    r"""
    Finds the column of the images, and casts it to files that are not decoded (`{"bytes", "path"}`), or arrays.

    Args:
        rows (`datasets.Dataset` or `IterableDataset`): The rows of a split.
        name (`str` or `None`): The column that the user named.
        flag (`str`, *optional*): The setting that named it.

    Returns:
        The rows and the column's name.

    Raises:
        UserError: If there is no such column, or several and none of them is called `image`.
    """
    column = find_image_column(rows, name, flag)
    if column not in rows.features and isinstance(rows, datasets.Dataset):
        rows = rows.flatten()
    feature = rows.features[column]
    if isinstance(feature, datasets.Image) or _holds_files(feature) or feature in TEXT:
        if feature == datasets.Value("large_string"):
            rows = rows.cast_column(column, datasets.Value("string"))
        return rows.cast_column(column, datasets.Image(decode=False)), column
    return rows, column


def find_image_column(rows: Rows, name: str | None, flag: str = "image_column") -> str:
    r"""The column of the images; arguments and errors as in [`with_image_column`]."""
    features = rows.features
    kinds = (datasets.Image, datasets.Array2D, datasets.Array3D)
    found = [column for column, feature in features.items() if isinstance(feature, kinds)]
    found = found or [column for column, feature in features.items() if _holds_files(feature)]
    found = found or _columns_of_paths(rows)
    if name is None and found:
        if len(found) == 1 or "image" in found:
            return "image" if "image" in found else found[0]
        raise UserError(f"several columns hold images: {found}. Choose one with `image_column`.")
    if name is not None and name not in features and "image" in found and f".{name}" in SUFFIXES:
        return "image"  # the picture of a webdataset's sample, whatever its suffix
    feature = None if name is None else feature_of(features, name)
    if feature is None or (name not in features and isinstance(rows, datasets.IterableDataset)):
        lists = [column for column, each in features.items() if isinstance(each, (datasets.List, datasets.LargeList))]
        hint = f" Lists of pixels are read if you name their column; those of lists are {lists}." if lists else ""
        raise UserError(
            f"`{flag}` is {name!r}, but the columns are {list(features)}; columns with images are {found}.{hint}"
        )
    if isinstance(getattr(feature, "feature", None), datasets.Image):
        raise UserError(f"`{flag}` {name!r} holds lists of images. Give each image a row of its own.")
    if (
        isinstance(feature, (*kinds, datasets.List, datasets.LargeList))
        or _holds_files(feature)
        or (name in features and name in _columns_of_paths(rows))
    ):
        return name
    raise UserError(f"`{flag}` {name!r} holds {feature}, not images; columns with images are {found}.")


def find_label_column(rows: Rows, name: str | None, image_column: str, group_column: str | None = None) -> str | None:
    features = rows.features
    if name == "none":
        return None
    if name is None:
        features = {column: feature for column, feature in features.items() if column != group_column}
        columns = [column for column, feature in features.items() if isinstance(feature, datasets.ClassLabel)]
        for names in _LABELS:
            if names == _LABELS[0] or not columns:
                columns += [column for column in names if isinstance(features.get(column), datasets.Value)]
        if len(columns) > 1:
            raise UserError(f"several columns hold labels: {columns}. Choose one with `label_column`, or `none`.")
        if not columns:
            _warn_of_unused(features)
        return columns[0] if columns else None
    if feature_of(features, name) is None or name == image_column:
        raise UserError(f"`label_column` {name!r} is not among the columns {list(features)}; `none`: no labels.")
    return name


def _warn_of_unused(features: datasets.Features) -> None:
    """Warns about a column that is called like labels, but is not used as such."""
    for column, feature in features.items():
        if column.strip().lower() in _LABELS[0]:
            logger.warning(
                "no classes: the column %r, which holds %s, is not used. Labels are one value for each image, in a column called %s. Pass "
                "`--label_column` with the name of such a column, or `--label_column none`.",
                column, feature, " or ".join(map(repr, _LABELS[0])),
            )  # fmt: skip


def column_values(rows: datasets.Dataset, column: str) -> list:
    r"""The values of a column or of a field of one; empty if the split has none."""
    if column in rows.features:
        return rows[column][:]
    if feature_of(rows.features, column) is None:
        return []
    flat = rows.select_columns([name for name, feature in rows.features.items() if isinstance(feature, dict)]).flatten()
    return flat[column][:] if column in flat.features else []


def _holds_files(feature: Any) -> bool:
    """Whether a column holds bytes, or `{bytes, path}`, that were not declared as images."""
    binary = (datasets.Value("binary"), datasets.Value("large_binary"))
    if isinstance(feature, dict):
        return "bytes" in feature and feature["bytes"] in binary and set(feature) <= {"bytes", "path"}
    return feature in binary


def _columns_of_paths(rows: Rows) -> list[str]:
    """Columns of text whose first value is the file name of a picture."""
    columns = [column for column, feature in rows.features.items() if feature in TEXT]
    if not columns:
        return []
    first = next(iter(rows.select_columns(columns).take(1)), {})
    suffixes = (*SUFFIXES, *HEIF_SUFFIXES)
    return [column for column in columns if str(first.get(column) or "").lower().endswith(suffixes)]
