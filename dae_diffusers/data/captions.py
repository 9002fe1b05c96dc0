"""The captions of images."""

import ast
import contextlib
import json
import logging
import re
from collections.abc import Sequence
from typing import Any

import datasets

from dae_diffusers.data.columns import TEXT, column_values, feature_of, is_word_for_nothing
from dae_diffusers.errors import UserError, one_line

logger = logging.getLogger(__name__)

# A text in quotes, and a list of such texts.
_QUOTED = r"""'(?:[^'\\]|\\.)*'|"(?:[^"\\]|\\.)*\""""
_ENTRY = rf"(?:{_QUOTED}|null|None|nan|NaN)"
_LISTED = re.compile(rf"\[\s*(?:{_ENTRY}(?:[\s,]+{_ENTRY})*\s*)?\]")


def captions_of(
    rows: datasets.Dataset, columns: Sequence[str], split: str, *, is_held_out: bool = False
) -> list[list[str]]:
    r"""
    The texts of each image, at least one; an image without any has the empty text.

    Args:
        rows (`datasets.Dataset`): The rows of a split.
        columns (sequence of `str`): Columns, or fields of columns, of texts or of lists of texts; also a field of the mappings that a
            column holds a list of, as `sentences.raw` of COCO's captions.
        split (`str`): Name of the split, for messages.
        is_held_out (`bool`, *optional*): Whether these are a part of the training split: all of a few may lack a text.

    Raises:
        UserError: If there is no such column, or it holds no texts.
    """
    of_columns = [_captions_of(rows, column, split, is_held_out) for column in columns]
    captions = [[text for texts in of_image for text in texts] or [""] for of_image in zip(*of_columns, strict=True)]
    empty, part = captions.count([""]), "the held-out part of " if is_held_out else ""
    if empty:
        logger.warning(
            "%d of %d images of %sthe split %r have no caption: their text is empty.", empty, len(captions), part, split
        )
    missing = [text for texts in captions for text in texts if is_word_for_nothing(text)]
    if missing:
        logger.warning(
            "%d captions of %sthe split %r are %r, as programs write a missing text. Training takes them for texts: leave them empty.",
            len(missing), part, split, missing[0],
        )  # fmt: skip
    return captions


def _captions_of(rows: datasets.Dataset, column: str, split: str, is_held_out: bool) -> list[list[str]]:
    """The texts of each image in a column, perhaps none."""
    values, feature = column_values(rows, column), feature_of(rows.features, column)
    if feature is None:
        values, feature = _in_mappings(rows, column)
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
    captions = [[text for text in map(one_line, texts) if text] for texts in map(_texts, values)]
    if not any(captions) and not is_held_out:
        raise UserError(
            f"`caption_column` {column!r} holds no text in the split {split!r}. Name another column, or if only this split lacks texts, "
            "hold out a part of the training images instead: `validation_split train`."
        )
    return captions


def _in_mappings(rows: datasets.Dataset, column: str) -> tuple[list[list], Any]:
    """The values and the feature of a field of the mappings that a column holds a list of; None if it is no such field."""
    outer, _, field = column.rpartition(".")
    inner = getattr(feature_of(rows.features, outer), "feature", None) if outer else None
    if not isinstance(inner, dict) or field not in inner:
        return [], None
    return [[each and each[field] for each in value or []] for value in column_values(rows, outer)], inner[field]


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
    return [value] if isinstance(value, str) else [text for text in value or [] if isinstance(text, str) and text]


def _is_text(feature: Any) -> bool:
    return getattr(feature, "feature", feature) in TEXT
