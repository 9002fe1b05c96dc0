"""Loads tables: Parquet, CSV and JSON files that hold or name images, and metadata tables beside images."""

import glob
import io
import json
import logging
import math
import os
import re
import unicodedata
import zipfile
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path, PurePosixPath
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv
import pyarrow.json
import pyarrow.parquet as pq

from dae_diffusers.data.encodings import decode_text
from dae_diffusers.errors import UserError, one_line

logger = logging.getLogger(__name__)

# Suffixes to what `datasets` calls them.
TABLES = {".parquet": "parquet", ".csv": "csv", ".tsv": "csv", ".json": "json", ".jsonl": "json", ".arrow": "arrow"}
_NUMBER = r"^\s*[-+]?([0-9]+\.?[0-9]*|\.[0-9]+)([eE][-+]?[0-9]+)?\s*$"
_NO_NUMBER = ["NA", "N/A", "n/a", "<NA>", "NaN", "nan", "-NaN", "-nan", "NULL", "null", "None"]  # as pandas has them
_WHOLE = r"^\s*-?(0|[1-9][0-9]*)(\.0*)?\s*$"  # a class that is a number
METADATA = ("metadata.csv", "metadata.jsonl", "metadata.parquet")

# Names of folders, and words in the names of files, to splits.
SPLITS = {
    **dict.fromkeys(("train", "training"), "train"),
    **dict.fromkeys(("validation", "valid", "val", "dev"), "validation"),
    **dict.fromkeys(("test", "testing", "eval", "evaluation"), "test"),
}


@dataclass
class Metadata:
    """
    A metadata table: its path in the folder, its bytes, its columns of names (of classes and groups) and of captions, and the absolute
    paths of the folder.
    """

    path: PurePosixPath
    content: bytes
    name_columns: Collection[str] = ()
    caption_columns: Collection[str] = ()
    roots: Collection[PurePosixPath] = ()

    @cached_property
    def table(self) -> pa.Table:
        """The rows. It may raise errors of Arrow, `UnicodeDecodeError`, `ValueError` and `OSError`."""
        suffix = self.path.suffix.lower()
        if not self.content.strip():
            raise ValueError("it is empty")
        file = io.BytesIO(self.content if suffix == ".parquet" else decode_text(self.content).encode())
        if suffix == ".csv":
            return _read_csv(file, self.name_columns, self.caption_columns)
        return _with_strings(pq.read_table(file)) if suffix == ".parquet" else _read_json(file)

    @classmethod
    def of_member(cls, place: PurePosixPath, archive: Path, member) -> "Metadata":
        """Reads a metadata table from a ZIP file."""
        with zipfile.ZipFile(archive) as file:
            return cls(place, file.read(member.name))


def _with_strings(table: pa.Table) -> pa.Table:
    """The table, with all columns of text of one type; pandas writes large strings."""
    others = (pa.large_string(), pa.string_view())
    types = [pa.field(each.name, pa.string()) if each.type in others else each for each in table.schema]
    return table.cast(pa.schema(types))


def _read_csv(file: io.BytesIO, name_columns: Collection[str], caption_columns: Collection[str]) -> pa.Table:
    """The rows of a CSV file, whose columns commas separate, or else `;` or tabs."""
    separator = _separator(file.readline().decode(), "file_name")
    options = {"parse_options": pyarrow.csv.ParseOptions(delimiter=separator, newlines_in_values=True)}
    file.seek(0)
    table = _as_written(pyarrow.csv.read_csv(file, **options), name_columns, caption_columns, file, options)
    names = [name.strip() for name in table.column_names]
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice is not None and "file_name" in names:
        raise ValueError(f"it has several columns called {twice!r}; remove or rename all but one")
    return table.rename_columns(names)


def _separator(header: str, name: str) -> str:
    """What separates the columns of a CSV file: what makes a column of this name, or else what occurs, commas first."""
    found = [each for each in ",;\t" if each in header]
    named = [each for each in found if name in (column.strip(' "\r\n') for column in header.split(each))]
    return (*named, *found, ",")[0]


def _as_written(
    table: pa.Table, name_columns: Collection[str], caption_columns: Collection[str], file: io.BytesIO, options: dict[str, Any]
) -> pa.Table:  # fmt: skip
    """
    The table, with captions as text. Names of classes and groups are text too, unless they are bools or whole numbers without zeros
    before them: 007 is another class than 7, 1e1 is a name, and so is a date.
    """
    columns = {
        number: each
        for number, each in enumerate(table.schema)
        if each.name.strip() in {*name_columns, *caption_columns} and not pa.types.is_string(each.type)
    }
    if not columns:
        return table
    types = {each.name: pa.string() for each in columns.values()}
    convert_options = pyarrow.csv.ConvertOptions(column_types=types, strings_can_be_null=True)
    file.seek(0)
    texts = pyarrow.csv.read_csv(file, convert_options=convert_options, **options)
    for number, each in columns.items():
        keeps = pa.types.is_null(each.type)
        if each.name.strip() not in caption_columns:
            keeps |= pa.types.is_boolean(each.type)
            keeps |= pc.all(pc.match_substring_regex(texts[number], _WHOLE)).as_py() is not False
        if not keeps:
            table = table.set_column(number, each.name, texts[number])
    return table


def _read_json(file: io.BytesIO) -> pa.Table:
    """The rows of a JSON file. Texts that look like dates stay texts."""
    try:
        table = pyarrow.json.read_json(file)
    except pa.ArrowInvalid:
        rows = _rows_of_json(file.getvalue().decode())
        if not rows:
            raise
        return _of_mixed_values(rows)
    texts = [pa.field(each.name, _without_times(each.type)) for each in table.schema]
    texts = [each for each in texts if each.type != table.schema.field(each.name).type]
    if not texts:
        return table
    file.seek(0)
    return pyarrow.json.read_json(file, parse_options=pyarrow.json.ParseOptions(explicit_schema=pa.schema(texts)))


def _rows_of_json(text: str) -> list[dict[str, Any]]:
    """The rows of a JSON file, one a line or all in a list. Raises `ValueError` that names the line."""
    if text.lstrip().startswith("["):
        rows = json.loads(text)
    else:
        rows = []
        for number, line in enumerate(text.split("\n"), 1):
            try:
                rows += [json.loads(line)] if line.strip() else []
            except ValueError as error:
                raise ValueError(
                    f"line {number} is no JSON: {error.msg}. Each line must be one {{...}}, without a comma behind it"
                ) from None
    if not all(isinstance(row, dict) for row in rows):
        raise ValueError("each row must be one {...} with the names of columns")
    return rows


def _of_mixed_values(rows: list[dict[str, Any]]) -> pa.Table:
    """The rows of a JSON file. Columns that hold texts in some rows and lists or numbers in others hold lists in all, or texts."""
    columns = {name: [row.get(name) for row in rows] for name in dict.fromkeys(name for row in rows for name in row)}
    for name, values in columns.items():
        # pandas writes NaN for a missing value.
        values = [None if isinstance(value, float) and not math.isfinite(value) else value for value in values]
        if any(isinstance(value, list) for value in values):
            values = [[value] if isinstance(value, str) else value for value in values]
        elif any(isinstance(value, str) for value in values):
            values = [json.dumps(value) if isinstance(value, int | float) else value for value in values]
        columns[name] = values
    return pa.table(columns)


def _without_times(kind: pa.DataType) -> pa.DataType:
    """The type with text for times, also inside lists and fields."""
    if pa.types.is_timestamp(kind):
        return pa.string()
    if pa.types.is_list(kind):
        return pa.list_(_without_times(kind.value_type))
    if pa.types.is_struct(kind):
        return pa.struct([pa.field(each.name, _without_times(each.type)) for each in kind])
    return kind


@dataclass
class Described:
    """The rows of all metadata tables, the row of each image, by its path, and the image that each row names as its condition."""

    table: pa.Table | None = None
    conditions: list[PurePosixPath | None] | None = None
    rows: dict[PurePosixPath, list[int]] = field(default_factory=dict)


def read_metadata(
    tables: list[Metadata],
    folder: Path,
    images: Collection[PurePosixPath],
    names: Mapping[PurePosixPath, PurePosixPath | None],
    *,
    required: bool,
    condition_column: str | None = None,
) -> Described | None:
    r"""
    Reads tables whose column `file_name` names images, relative to the table's folder.

    Args:
        tables (`list[Metadata]`): The tables in the folder.
        folder (`Path`): The folder, for messages.
        images (`Collection[PurePosixPath]`): The images that exist.
        names (`Mapping[PurePosixPath, PurePosixPath | None]`): The file that each name means; None if several have it.
        required (`bool`): Refuse tables without that column; otherwise they are left out with a warning.
        condition_column (`str`, *optional*): Another column that names images in the same way.

    Returns:
        [`Described`], or None if rows name several images (`left_file_name`, `file_names`); then `datasets` reads them.

    Raises:
        UserError: If a table cannot be read, is not a metadata table, or gives a name that several files have.
    """
    parts, described, missing, found, count = [], Described(), [], [], 0
    tables_of: dict[PurePosixPath, dict[PurePosixPath, None]] = {}
    for metadata in tables:
        table = _read(metadata, folder)
        if "file_name" not in table.column_names:
            if any(re.search("(^|_)file_names?$", name) for name in table.column_names):
                return None
            text = (
                f"{folder / metadata.path} has no column `file_name` that names images, but {table.column_names[:10]}"
            )
            if required:
                raise UserError(f"{text}. Add it, rename the file, or train without labels: `label_column none`.")
            logger.warning("left out: %s.", text)
            continue
        for number, name in enumerate(table.column("file_name").to_pylist()):
            file = _file_of(PurePosixPath(os.path.normpath(metadata.path.parent / str(name))), names, metadata)
            if file in images:
                described.rows.setdefault(file, []).append(count + number)
                tables_of.setdefault(file, {})[metadata.path] = None
            else:
                missing.append(file)
        count += len(table)
        places = _places(table, condition_column, metadata) or [None] * len(table)
        found += [place and _file_of(place, names, metadata) for place in places]
        parts.append(table.drop_columns("file_name"))
    _warn_of_rows(missing, tables_of, folder, images)
    if not any(part.num_columns for part in parts):
        return described
    try:
        described.table = pa.concat_tables(_alike(parts), promote_options="permissive").combine_chunks()
    except pa.ArrowException as error:
        raise UserError(f"the tables of metadata in {folder} differ: {one_line(error, 300)}.") from None
    if any(found):
        described.conditions = found
        described.table = described.table.drop_columns(condition_column)
        described.table = described.table if described.table.num_columns else None
    if len(described.rows) < len(images):
        example = next(place for place in images if place not in described.rows)
        logger.warning(
            "%d of %d images in %s have no row of metadata, such as %s; their columns are empty",
            len(images) - len(described.rows),
            len(images),
            folder,
            example,
        )
    return described


def _read(metadata: Metadata, folder: Path) -> pa.Table:
    try:
        return metadata.table
    except (pa.ArrowException, UnicodeDecodeError, ValueError, OSError) as error:
        raise UserError(f"{folder / metadata.path} cannot be read ({one_line(error, 300)}).") from None


def _warn_of_rows(
    missing: list[PurePosixPath],
    tables_of: dict[PurePosixPath, dict[PurePosixPath, None]],
    folder: Path,
    images: Collection[PurePosixPath],
) -> None:
    """Warns of rows that name no image, and of images that several tables have rows for."""
    for several in sorted({tuple(each) for each in tables_of.values() if len(each) > 1}):
        logger.warning(
            "%s in %s have rows for the same images, which count several times. Remove all of these tables but one, or join them.",
            " and ".join(map(str, several)), folder,
        )  # fmt: skip
    if missing:
        logger.warning(
            "%d rows of metadata in %s name files that are not among the images, such as %s%s",
            len(missing), folder, missing[0], _hint_for(missing[0], images),
        )  # fmt: skip


def _alike(tables: list[pa.Table]) -> Iterator[pa.Table]:
    """The tables, with integers as text in columns that are text in another table."""
    texts = {each.name for table in tables for each in table.schema if pa.types.is_string(each.type)}
    for table in tables:
        for index, each in enumerate(table.schema):
            if each.name in texts and pa.types.is_integer(each.type):
                table = table.set_column(index, each.name, table.column(index).cast(pa.string()))
        yield table


def _hint_for(missing: PurePosixPath, images: Collection[PurePosixPath]) -> str:
    if "\\" in str(missing):
        return ". Write / between folders, not \\"
    alike = next((image for image in images if str(image).casefold() == str(missing).casefold()), None)
    return f". There is {alike}: write capitals as the file has them" if alike else ""


def _file_of(
    place: PurePosixPath, names: Mapping[PurePosixPath, PurePosixPath | None], metadata: Metadata
) -> PurePosixPath:
    """The file that a table means by a name; the name itself if there is none. Absolute paths may lead into the folder."""
    root = next((each for each in metadata.roots if place.is_relative_to(each)), None)
    place = place if root is None else place.relative_to(root)
    file = names.get(place, place)
    if place not in names:  # letters with accents can be written in two ways, and file systems differ in it
        forms = (PurePosixPath(unicodedata.normalize(form, str(place))) for form in ("NFC", "NFD"))
        file = next((names[form] for form in forms if form in names), place)
    if file is None:
        raise UserError(
            f"the table {metadata.path} names {place}, which several archives hold. Put a table into each archive, or name the "
            f"archive too, as in `NAME.zip/{place.name}`."
        )
    return file


def named_files(tables: list[Metadata], names: Mapping[PurePosixPath, PurePosixPath | None]) -> set[PurePosixPath]:
    r"""
    The files, of those that `names` mean, that metadata tables name in other columns than `file_name`, such as masks, and that have no
    row of their own. A name is relative to the table's folder.
    """
    # No table names what is not UTF-8.
    known = pa.array({place.name.encode(errors="ignore").decode() for place in names}, pa.string())
    named, with_rows = set(), []
    for metadata in tables:
        try:
            table = metadata.table
        except (pa.ArrowException, UnicodeDecodeError, ValueError, OSError):  # whoever reads the rows names it
            continue
        if "file_name" not in table.column_names:
            continue
        with_rows.append(metadata)
        for column in set(table.column_names) - {"file_name"}:
            if pa.types.is_string(table.schema.field(column).type):  # of millions of captions few end like a file
                is_like_image = pc.is_in(pc.replace_substring_regex(table[column], "^.*/", ""), known)
                named.update(map(names.get, _places(table.filter(is_like_image), column, metadata)))
    named.discard(None)  # neither a file nor one of several
    if not named:
        return named
    return named.difference(*(map(names.get, _places(each.table, "file_name", each)) for each in with_rows))


def _places(table: pa.Table, column: str | None, metadata: Metadata) -> list[PurePosixPath | None]:
    """The files that a column of a table names, None where it names none; empty if there is no column of text with this name."""
    if column not in table.column_names or not pa.types.is_string(table.schema.field(column).type):
        return []
    places: list[PurePosixPath | None] = []
    for name in table.column(column).to_pylist():
        is_file = name and len(name) < 1024 and PurePosixPath(name).suffix
        places.append(PurePosixPath(os.path.normpath(metadata.path.parent / name)) if is_file else None)
    return places


def load_tables(
    folder: Path, tables: list[PurePosixPath], *, streaming: bool, name_columns: Collection[str] = ()
) -> dict[str, datasets.Dataset | datasets.IterableDataset]:
    r"""
    Loads a folder of tables of one kind. A word in their names gives the split, or else one in their nearest folder that has one.

    Args:
        folder (`Path`): The folder.
        tables (`list[PurePosixPath]`): Its tables.
        streaming (`bool`): Whether to read them while training.
        name_columns (`Collection[str]`, *optional*): Columns of classes and groups. In CSV files that are not streamed, names such as
            `007` stay as they are written.

    Raises:
        UserError: If there are tables of several kinds, or one whose name has the words of several splits.
    """
    kinds = sorted({TABLES[path.suffix.lower()] for path in tables})
    if "parquet" in kinds:  # a `stats.json` beside shards is no data
        kinds = ["parquet"]
    if len(kinds) > 1:
        raise UserError(
            f"{folder} holds tables of several kinds: {', '.join(map(str, tables[:5]))}. Move all but one kind to other folders."
        )
    tables = [path for path in tables if TABLES[path.suffix.lower()] == kinds[0]]
    splits = _splits_of(tables, folder)
    if "train" not in splits and len(set(splits)) == 1:
        splits = ["train"] * len(tables)
    data_files: dict[str, list[str]] = {}
    for split, path in zip(splits, tables, strict=True):
        data_files.setdefault(split, []).append(glob.escape(str(folder.absolute() / path)))
    options = {}
    if kinds == ["csv"]:
        with open(folder / tables[0], encoding="utf-8", errors="replace") as file:
            options = {"sep": _separator(file.readline(), "image")}
        options |= {"keep_default_na": False, "na_values": [""]}  # "None" and "NA" are texts
        options["converters"] = {} if streaming else dict.fromkeys(name_columns, str)
    loaded = {  # each by itself: a split may lack the labels
        split: datasets.load_dataset(kinds[0], data_files={split: paths}, split=split, streaming=streaming, **options)
        for split, paths in data_files.items()
    }
    if kinds == ["csv"] and not streaming:
        loaded = {split: _with_numbers(rows, name_columns) for split, rows in loaded.items()}
    return loaded


def _with_numbers(rows: datasets.Dataset, name_columns: Collection[str]) -> datasets.Dataset:
    """The rows of a CSV file, with columns of text as numbers where some cells hold a word for no number, and names as they are meant."""
    for name in [name for name, feature in rows.features.items() if str(feature.dtype).endswith("string")]:
        texts = rows.data.column(name)
        values = _names(texts) if name in name_columns else _numbers(texts)
        if values is not None:
            rows = rows.remove_columns(name).add_column(name, values.to_pylist(), feature=_value_of(values.type))
    return rows


def _value_of(kind: pa.DataType) -> datasets.Value:
    return datasets.Value("string" if kind == pa.large_string() else str(kind).replace("double", "float64"))


def _numbers(texts: pa.ChunkedArray) -> pa.ChunkedArray | None:
    """The numbers in a column of texts, None for cells that are empty or hold a word for no number; None if there are other texts."""
    is_number = pc.fill_null(pc.match_substring_regex(texts, _NUMBER), False)
    is_missing = pc.or_(pc.is_null(texts), pc.is_in(texts, value_set=pa.array(_NO_NUMBER, texts.type)))
    if not (pc.any(is_number).as_py() and pc.all(pc.or_(is_number, is_missing)).as_py()):
        return None
    return pc.if_else(is_number, pc.utf8_trim_whitespace(texts), None).cast(pa.float64())


def _names(texts: pa.ChunkedArray) -> pa.ChunkedArray:
    """The names of classes or groups in a column of texts, None for empty cells. They stay texts as [`_as_written`] says."""
    texts = pc.if_else(pc.equal(pc.utf8_trim_whitespace(texts), ""), None, texts)
    numbers, lower = _numbers(texts), pc.utf8_lower(texts)
    if numbers is not None:
        written = pc.filter(texts, pc.is_valid(numbers))
        if pc.all(pc.match_substring_regex(written, _WHOLE)).as_py():
            return numbers if numbers.null_count else numbers.cast(pa.int64())
    elif pc.all(pc.is_in(lower, value_set=pa.array(["true", "false"], texts.type))).as_py():
        return pc.equal(lower, "true")
    return texts


def _splits_of(tables: list[PurePosixPath], folder: Path) -> list[str]:
    """The split of each table; folders that all tables share say nothing."""
    shared = PurePosixPath(os.path.commonpath([path.parent for path in tables]))
    shards = [re.fullmatch(r"(.+)-\d{5}-of-\d{5}", path.stem) for path in tables]
    splits, unsaid = [], []
    for path, shard in zip(tables, shards, strict=True):
        found = splits_in(path.stem)
        if all(shards) and (found or path.parent == shared):
            splits.append(shard[1].replace("-", "_"))
            continue
        for name in reversed(path.parent.relative_to(shared).parts):
            found = found or splits_in(name)
        if len(found) > 1 and len(tables) > 1:
            raise UserError(
                f"the path of the table {folder / path} names several splits ({', '.join(sorted(found))}). Rename the file, so that its "
                "name has the word of one split, or move it elsewhere."
            )
        if len(found) != 1:
            unsaid.append(path)
        splits.append(found.pop() if len(found) == 1 else "train")
    if unsaid and len(unsaid) < len(tables):
        logger.warning(
            "the names of %d of %d tables in %s say no split, such as %s: they hold training images",
            len(unsaid), len(tables), folder, unsaid[0],
        )  # fmt: skip
    return splits


def splits_in(name: str) -> set[str]:
    r"""The splits whose words are in a name: `val2017`, `birds-train-0001`."""
    return {SPLITS[word] for word in re.findall("[a-z]+", name.lower()) if word in SPLITS}
