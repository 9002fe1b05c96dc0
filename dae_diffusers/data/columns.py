"""Finds the columns of a data set that hold the images and the labels, and the names of the classes."""

import ast
import contextlib
import json
import logging
import math
import re
import unicodedata
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import datasets

from dae_diffusers.data.formats import HEIF_SUFFIXES, SUFFIXES
from dae_diffusers.errors import UserError, one_line

logger = logging.getLogger(__name__)

Rows = datasets.Dataset | datasets.IterableDataset

_TEXT = (datasets.Value("string"), datasets.Value("large_string"))
# A text in quotes, and a list of such texts.
_QUOTED = r"""'(?:[^'\\]|\\.)*'|"(?:[^"\\]|\\.)*\""""
_LISTED = re.compile(rf"\[\s*(?:{_QUOTED})(?:[\s,]+(?:{_QUOTED}))*\s*\]")
# Names of columns that hold classes, if no type says so; the second group counts only without one of the first.
_LABELS = (("label", "labels", "class"), ("cls",))
LABELS = (*_LABELS[0], *_LABELS[1])


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
    if isinstance(feature, datasets.Image) or _holds_files(feature) or feature in _TEXT:
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


def class_order(names: Iterable[str]) -> list[str]:
    r"""Sorts names of classes, by number if all are numbers."""
    names = sorted(names)
    return sorted(names, key=int) if all(re.fullmatch(r"\d+", name, re.ASCII) for name in names) else names


def class_name(name: str) -> str:
    r"""The name of a class as it is compared: without spaces around it, and with composed letters (NFC)."""
    return unicodedata.normalize("NFC", name).strip()


def column_values(rows: datasets.Dataset, column: str) -> list:
    r"""The values of a column or of a field of one; empty if the split has none."""
    if column in rows.features:
        return rows[column][:]
    if feature_of(rows.features, column) is None:
        return []
    flat = rows.select_columns([name for name, feature in rows.features.items() if isinstance(feature, dict)]).flatten()
    return flat[column][:] if column in flat.features else []


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
    if not isinstance(of_train, datasets.ClassLabel) and of_train not in _TEXT:
        if not all(re.fullmatch(r"\d+", name, re.ASCII) for name in names):
            return values
        names = list(map(int, names))
    return [names[value] if value is not None and 0 <= value < len(names) else value for value in values]


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
            raise UserError(
                f"`label_column` {self.column!r} {problem} Remove the unlabelled rows or train without labels (`label_column none`)."
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


def _is_whole(value: Any) -> bool:
    return isinstance(value, float) and value.is_integer()


def _distinct(names: Iterable[str]) -> list[str]:
    """Normalised names without repeats, in the order of the raw ones, so that the numbers of classes stay those of earlier versions."""
    return list(dict.fromkeys(map(class_name, names)))


def captions_of(rows: datasets.Dataset, column: str, split: str, *, is_held_out: bool = False) -> list[list[str]]:
    r"""
    The texts of each image, at least one; an image without any has the empty text.

    Args:
        rows (`datasets.Dataset`): The rows of a split.
        column (`str`): A column, or a field of one, of texts or of lists of texts.
        split (`str`): Name of the split, for messages.
        is_held_out (`bool`, *optional*): Whether these are a part of the training split: all of a few may lack a text.

    Raises:
        UserError: If there is no such column, or it holds no texts.
    """
    feature = feature_of(rows.features, column)
    if feature is None:
        texts = [name for name, each in rows.features.items() if _is_text(each)]
        raise UserError(
            f"`caption_column` {column!r} is not among the columns {list(rows.features)} of the split {split!r}; columns with text are "
            f"{texts}. A .txt beside each image is the column `txt`."
        )
    if not _is_text(feature):
        raise UserError(
            f"`caption_column` {column!r} holds {feature}, not texts. Name a column of texts, or of lists of texts."
        )
    captions = [
        [text for text in map(one_line, texts) if text] or [""] for texts in map(_texts, column_values(rows, column))
    ]
    empty = captions.count([""])
    if empty == len(captions) and not is_held_out:
        raise UserError(f"`caption_column` {column!r} holds no text in the split {split!r}. Name another column.")
    if empty:
        part = "the held-out part of " if is_held_out else ""
        logger.warning(
            "%d of %d images of %sthe split %r have no caption: their text is empty.", empty, len(captions), part, split
        )
    return captions


def _texts(value: str | list[str | None] | None) -> list[str]:
    """
    A text, or several; a list in the JSON file of a webdataset's sample arrives as JSON, and one in a CSV file as Python or NumPy show it.
    """
    if isinstance(value, str) and _LISTED.fullmatch(value.strip()):
        try:
            value = json.loads(value)
        except ValueError:
            with contextlib.suppress(ValueError, SyntaxError):
                value = [ast.literal_eval(text) for text in re.findall(_QUOTED, value)]
    return [value] if isinstance(value, str) else [text for text in value or [] if text]


def _is_text(feature: Any) -> bool:
    return getattr(feature, "feature", feature) in _TEXT


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


def _holds_files(feature: Any) -> bool:
    """Whether a column holds bytes, or `{bytes, path}`, that were not declared as images."""
    binary = (datasets.Value("binary"), datasets.Value("large_binary"))
    if isinstance(feature, dict):
        return "bytes" in feature and feature["bytes"] in binary and set(feature) <= {"bytes", "path"}
    return feature in binary


def _columns_of_paths(rows: Rows) -> list[str]:
    """Columns of text whose first value is the file name of a picture."""
    columns = [column for column, feature in rows.features.items() if feature in _TEXT]
    if not columns:
        return []
    first = next(iter(rows.select_columns(columns).take(1)), {})
    suffixes = (*SUFFIXES, *HEIF_SUFFIXES)
    return [column for column in columns if str(first.get(column) or "").lower().endswith(suffixes)]
