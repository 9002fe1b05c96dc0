"""Where the images are: a folder of files or archives, tables, a saved data set, one on the Hub, or the digits."""

import logging
import os
from collections.abc import Iterator
from importlib.resources import files
from pathlib import Path, PurePosixPath
from typing import NamedTuple

import datasets
import pyarrow.parquet as pq

from dae_diffusers.data.columns import LABELS, Rows, find_image_column
from dae_diffusers.data.configuration import EMBEDDED, DataConfig
from dae_diffusers.data.contents import Root
from dae_diffusers.data.folders import Survey, contents_of, load_folder, load_shards, survey
from dae_diffusers.data.tables import load_tables
from dae_diffusers.errors import UserError, did_you_mean, in_full, one_line

logger = logging.getLogger(__name__)

_READ_BY_US = (None, "imagefolder", "generator", "webdataset")


class Loaded(NamedTuple):
    r"""
    What a source of images holds.

    Attributes:
        splits (`dict[str, Rows]`): All splits, by name.
        root ([`~dae_diffusers.data.contents.Root`] or `None`): The folder in which the files that rows name must lie.
        source (`str`): What it is called in messages.
    """

    splits: dict[str, Rows]
    root: Root | None
    source: str


def load_splits(config: DataConfig) -> Loaded:
    r"""
    Loads all splits of the source that the settings name.

    Raises:
        UserError: If it does not exist or cannot be loaded, with the reason.
    """
    source = config.train_data_dir or config.dataset_name
    try:
        return _read_source(config)
    except UserError:
        raise
    except Exception as error:  # a data set can fail to load in any way; the user gets the reason, not the stack
        flag = "train_data_dir" if config.train_data_dir else "dataset_name"
        cache = os.path.realpath(datasets.config.HF_DATASETS_CACHE)
        file = next((cause.filename for cause in _causes(error) if isinstance(cause, OSError) and cause.filename), None)
        place = None if file is None else os.path.realpath(os.fspath(file))
        if place is not None and (cache.startswith(place) or place.startswith(cache)):
            hint = (
                f". If the cache {cache} cannot be written, set the environment variable HF_HOME to a folder that can"
            )
        elif Path(source).is_dir():
            hint = f". The folder holds {contents_of(Path(source))}"
        else:
            hint = "" if source in EMBEDDED else did_you_mean(source, sorted(EMBEDDED))
        raise UserError(f"`{flag}` {source} cannot be loaded: {_reasons(error)}{hint}") from error


def _read_source(config: DataConfig) -> Loaded:
    options = {
        "streaming": config.streaming,
        "with_labels": config.label_column != "none",
        "name_columns": _name_columns(config),
        "caption_columns": config.caption_columns,
        "condition_column": config.condition_column,
    }
    if config.train_data_dir is not None:
        folder = Path(config.train_data_dir)
        if not folder.is_dir():
            raise UserError(f"`train_data_dir` {folder} is not a folder. Give a folder of images{in_full(folder)}.")
        if _is_saved(folder):
            return _load_saved(folder, config)
        splits = load_folder(folder, **options)
        return Loaded(splits, _root_of(splits, folder, None), str(folder))
    if config.dataset_name in EMBEDDED:
        assets = files("dae_diffusers") / "assets"
        # In memory: `datasets` would want to write a copy.
        splits = {
            split: datasets.Dataset(pq.read_table(str(assets / f"{config.dataset_name}_{split}.parquet")))
            for split in ("train", "test")
        }
        return Loaded(splits, None, config.dataset_name)
    folder = Path(config.dataset_name)
    if folder.is_dir():
        if _is_saved(folder):
            return _load_saved(folder, config)
        found = survey(folder)
        has_card = _has_card(folder) or config.dataset_config_name is not None
        if found.tables and not has_card and (splits := _tables_with_images(folder, found, config)):
            return Loaded(splits, _root_of(splits, folder, found.tables), str(folder))
        if not has_card:
            splits = load_folder(folder, **options, flag="dataset_name")
            return Loaded(splits, None, str(folder))
        splits = _load_dataset(str(folder.absolute()), config)
        return Loaded(splits, _root_of(splits, folder, found.tables), str(folder))
    if folder.exists():
        raise UserError(f"`dataset_name` {folder} is a file; give the folder that holds it, or a Hub id.")
    splits = _load_dataset(config.dataset_name, config)
    name = f"hf://datasets/{config.dataset_name}"
    return Loaded(splits, None if _is_read_by_us(splits) else Root(name, name), config.dataset_name)


def _name_columns(config: DataConfig) -> set[str]:
    """The columns whose values are names: of classes, or what usually holds them, and of groups."""
    return {*(config.label_columns or LABELS), *filter(None, [config.group_column])}


def _tables_with_images(folder: Path, found: Survey, config: DataConfig) -> dict[str, Rows] | None:
    """Loads the tables of a folder; None if they hold no images but lie beside images, as a `stats.json` may."""
    if not found.pictures + found.arrays + found.archives:
        return load_tables(folder, found.tables, streaming=config.streaming, name_columns=_name_columns(config))
    try:
        splits = load_tables(folder, found.tables, streaming=config.streaming, name_columns=_name_columns(config))
        find_image_column(next(iter(splits.values())), config.image_column)
        return splits
    except Exception as error:  # of any file that happens to be called so
        logger.warning("the tables in %s are left out: %s", folder, _reasons(error))
        return None


def _load_dataset(name: str, config: DataConfig) -> dict[str, Rows]:
    shards = _shards_of(name, config)
    if shards is not None:
        return load_shards(shards, streaming=config.streaming)
    return datasets.load_dataset(name, config.dataset_config_name, streaming=config.streaming)


def _shards_of(name: str, config: DataConfig) -> dict[str, list[Path]] | None:
    """
    Files of a webdataset that are here, or that are fetched since all of them are needed; None of anything else. `datasets` takes
    each suffix for a column of its own, and a dot in a name for the end of it.
    """
    if config.streaming and not Path(name).is_dir():
        return None
    builder = datasets.load_dataset_builder(name, config.dataset_config_name)
    if builder.info.builder_name != "webdataset" or not builder.config.data_files:
        return None
    files = {str(split): list(map(str, paths)) for split, paths in builder.config.data_files.items()}
    every = [path for paths in files.values() for path in paths]
    is_elsewhere = any("://" in path for path in every)
    if not all(path.endswith(".tar") for path in every) or (is_elsewhere and config.streaming):
        return None
    if is_elsewhere:
        files = datasets.DownloadManager(download_config=datasets.DownloadConfig(token=builder.token)).download(files)
    return {split: list(map(Path, paths)) for split, paths in files.items()}


def _has_card(folder: Path) -> bool:
    """Whether a README says what the data set's files are, as on the Hub."""
    path = folder / "README.md"
    text = path.read_text(errors="replace") if path.is_file() else ""
    return text.startswith("---") and any(f"\n{key}:" in text for key in ("configs", "dataset_info"))


def _is_saved(folder: Path) -> bool:
    """Whether `save_to_disk` wrote it."""
    return any((folder / name).is_file() for name in ("dataset_dict.json", "state.json"))


def _load_saved(folder: Path, config: DataConfig) -> Loaded:
    """Loads what `save_to_disk` wrote. It stores the paths of files and not their bytes, so the files may lie anywhere."""
    if config.streaming:
        raise UserError(f"{folder} was written by `save_to_disk`, which cannot be streamed: leave `streaming` out.")
    saved = datasets.load_from_disk(str(folder)).with_format(None)  # it stores the format too, such as "torch"
    anywhere = Root(folder.absolute().anchor, str(folder.absolute()))
    return Loaded(saved if isinstance(saved, dict) else {"train": saved}, anywhere, str(folder))


def _is_read_by_us(splits: dict[str, Rows]) -> bool:
    """Whether paths in rows come from our reader of folders, and not from a table that anybody may have written."""
    return all(rows.info.builder_name in _READ_BY_US for rows in splits.values())


def _root_of(splits: dict[str, Rows], folder: Path, tables: list[PurePosixPath] | None) -> Root | None:
    if _is_read_by_us(splits):
        return None
    tables = survey(folder).tables if tables is None else tables
    inside = os.path.commonpath([path.parent for path in tables]) if tables else ""
    return Root(str(folder.absolute()), str(folder.absolute() / inside))


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    """The error and what caused it, the outermost first."""
    for _ in range(8):
        if error is None:
            return
        yield error
        error = error.__cause__ or (None if error.__suppress_context__ else error.__context__)


def _reasons(error: BaseException) -> str:
    texts: list[str] = []
    for cause in _causes(error):
        text = one_line(cause) or type(cause).__name__
        if not any(text in other for other in texts):
            texts.append(text)
    return "; because: ".join(text[:300] for text in texts)
