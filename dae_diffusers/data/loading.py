"""From the flags to the training and the validation images."""

import logging
from importlib.resources import files
from pathlib import Path

import datasets
import numpy as np

from dae_diffusers.cli import did_you_mean
from dae_diffusers.data.arrays import RANGES
from dae_diffusers.data.columns import find_image_column, find_label_column, label_ids, label_names
from dae_diffusers.data.configuration import EMBEDDED, DataConfig
from dae_diffusers.data.dataset import ImageDataset, choose_indices
from dae_diffusers.data.folders import load_folder
from dae_diffusers.data.images import ImageReader, find_first_depth
from dae_diffusers.data.streaming import StreamedImages, content_hash, fetch
from dae_diffusers.errors import UserError
from dae_diffusers.randomness import derived_seed
from dae_diffusers.store import fingerprint

logger = logging.getLogger(__name__)


def load_images(config: DataConfig, seed: int = 0) -> tuple[ImageDataset | StreamedImages, ImageDataset]:
    r"""
    Loads the training and the validation images.

    Args:
        config ([`DataConfig`]): What to load. Its `value_range` is filled in for images that are arrays.
        seed (`int`, *optional*): Chooses the held-out images if the data have no validation split.

    Returns:
        Training and validation images, with the same `id2label`; the former as [`StreamedImages`] with `config.streaming`.

    Raises:
        UserError: For a data set, split or column that does not exist, empty splits and unusable labels.
    """
    splits = _load_splits(config)
    validation_name = _validation_split(config, splits)
    train = splits[config.train_split]
    validation = None if validation_name is None else splits[validation_name]
    if config.streaming:
        return _streamed(config, train, validation)

    image_column = find_image_column(train, config.image_column)
    label_column = find_label_column(train, config.label_column, image_column)
    if validation is None:
        if len(train) < 2:
            raise UserError(f"the split {config.train_split!r} has {len(train)} images; at least 2 are needed.")
        order = np.random.default_rng(derived_seed(seed, 2)).permutation(len(train))
        num_validation = max(1, round(config.validation_fraction * len(train)))
        train, validation = train.select(order[num_validation:]), train.select(np.sort(order[:num_validation]))
    if config.max_train_samples is not None:
        train = train.select(choose_indices(len(train), config.max_train_samples))
    validation = validation.select(choose_indices(len(validation), config.max_validation_samples))
    for name, rows in ((config.train_split, train), (validation_name, validation)):
        if len(rows) == 0:
            raise UserError(f"the split {name!r} is empty.")

    id2label, value2id = label_names(train, validation, label_column)
    result, is_range_given = [], bool(config.value_range)
    for rows in (train, validation):
        labels = None if label_column is None else label_ids(rows[label_column], value2id, id2label, label_column)
        images = ImageDataset(
            _undecoded(rows, image_column),
            config,
            image_column=image_column,
            labels=labels,
            id2label=id2label,
            depth=result[0].depth if result else None,  # one way for both splits
        )
        if images.is_array and not config.value_range:
            config.value_range = list(RANGES.get(images.depth, []))
        result.append(images.without_bad_images() if config.on_bad_image == "skip" else images)
    if result[0].is_array and not is_range_given:
        config.value_range = config.value_range or result[0].measure_range()
        logger.info("the images' values lie in [%g, %g]", *config.value_range)
    return tuple(result)


def _streamed(
    config: DataConfig, train: datasets.IterableDataset, validation: datasets.IterableDataset | None
) -> tuple[StreamedImages, ImageDataset]:
    """Training images as a stream. Validation images are few and kept: of their split, else the first of the stream."""
    if train.features is None:
        raise UserError(
            "the stream does not say what its columns hold; use Parquet or webdataset shards, or no `--streaming`."
        )
    image_column = find_image_column(train, config.image_column)
    label_column = find_label_column(train, config.label_column, image_column)
    id2label = _streamed_label_names(config, train.features, label_column)
    train = _undecoded(train, image_column)
    sizes = train.info.splits or {}
    num_examples = sizes[config.train_split].num_examples if config.train_split in sizes else None
    first = _take(train, 64, image_column)
    if len(first) < 2:
        raise UserError(f"the split {config.train_split!r} has {len(first)} images; at least 2 are needed.")
    described = [f"{train.num_shards} {num_examples} {sorted(train.features)}"]
    for row in first:
        described += [content_hash(row[image_column]), str(row.get(label_column))]

    depth = find_first_depth((row[image_column] for row in first), config)
    if ImageReader(config, depth).is_array and not config.value_range:
        if depth not in RANGES:
            raise UserError(
                "the range of a stream's values cannot be measured in advance: give `--value_range LOW HIGH`."
            )
        config.value_range = list(RANGES[depth])

    held_out = frozenset()
    if validation is not None:
        rows = _take(_undecoded(validation, image_column), config.max_validation_samples, image_column)
        if not rows:
            raise UserError(f"the split {config.validation_split or 'for validation'!r} is empty.")
    else:
        rows = _take(train, config.max_validation_samples + 1, image_column)
        if len(rows) <= config.max_validation_samples:
            num_examples = len(rows)  # the whole of a small stream
        share = len(rows) if num_examples is None else config.validation_fraction * num_examples
        rows = rows[: max(1, min(config.max_validation_samples, round(share)))]
        held_out = frozenset(content_hash(row[image_column]) for row in rows)
    if train.num_shards == 1:
        logger.warning(
            "the stream has one shard: images are shuffled within blocks of %d only (`--shuffle_buffer_size`). If the data are "
            "sorted by class, split them into more files.",
            config.shuffle_buffer_size,
        )
    kept = datasets.Dataset.from_list(rows, features=train.features)
    validation_images = ImageDataset(
        kept,
        config,
        image_column=image_column,
        labels=None if label_column is None else label_ids(kept[label_column], None, id2label, label_column),
        id2label=id2label,
        depth=depth,
    )
    train_images = StreamedImages(
        train,
        config,
        image_column=image_column,
        label_column=label_column,
        id2label=id2label,
        depth=depth,
        fingerprint=fingerprint(described),
        held_out=held_out,
        num_examples=num_examples,
    )
    return train_images, validation_images.without_bad_images() if config.on_bad_image == "skip" else validation_images


def _streamed_label_names(config: DataConfig, features: datasets.Features, column: str | None) -> dict[int, str] | None:
    if column is None:
        return None
    feature = features[column]
    if isinstance(feature, datasets.ClassLabel):
        return dict(enumerate(feature.names))
    if config.num_classes is None or not getattr(feature, "dtype", "").startswith(("int", "uint")):
        raise UserError(
            f"`--label_column` {column!r} holds {feature}, whose classes a stream cannot count in advance. Give `--num_classes` "
            "for integers from 0, or `--label_column none`."
        )
    return {index: str(index) for index in range(config.num_classes)}


def _take(rows: datasets.IterableDataset, number: int, image_column: str) -> list[dict]:
    return [{**row, image_column: fetch(row[image_column])} for row in rows.take(number)]


def _undecoded(
    rows: datasets.Dataset | datasets.IterableDataset, image_column: str
) -> datasets.Dataset | datasets.IterableDataset:
    if isinstance(rows.features[image_column], datasets.Image):
        return rows.cast_column(image_column, datasets.Image(decode=False))
    return rows


def _validation_split(config: DataConfig, splits: dict) -> str | None:
    """The split that is asked for, or one whose name says that it is for this; None without one."""
    if config.train_split not in splits:
        raise UserError(f"`--train_split` {config.train_split!r} does not exist; the splits are {list(splits)}.")
    if config.validation_split is not None:
        if config.validation_split not in splits:
            raise UserError(
                f"`--validation_split` {config.validation_split!r} does not exist; the splits are {list(splits)}."
            )
        return config.validation_split
    return next((name for name in ("validation", "val", "test") if name in splits and name != config.train_split), None)


def _load_splits(config: DataConfig) -> dict[str, datasets.Dataset | datasets.IterableDataset]:
    try:
        if config.train_data_dir is not None:
            folder = Path(config.train_data_dir)
            if not folder.is_dir():
                raise UserError(f"`--train_data_dir` {folder} is not a folder.")
            return load_folder(folder, streaming=config.streaming, with_labels=config.label_column != "none")
        if config.dataset_name in EMBEDDED:
            folder = files("dae_diffusers") / "assets"
            names = {split: str(folder / f"{config.dataset_name}_{split}.parquet") for split in ("train", "test")}
            return datasets.load_dataset("parquet", data_files=names)
        return datasets.load_dataset(config.dataset_name, config.dataset_config_name, streaming=config.streaming)
    except UserError:
        raise
    except Exception as error:  # a data set can fail to load in any way; the user gets the reason, not the stack
        source = config.train_data_dir or config.dataset_name
        flag = "--train_data_dir" if config.train_data_dir else "--dataset_name"
        hint = "" if config.train_data_dir else did_you_mean(source, sorted(EMBEDDED))
        raise UserError(f"`{flag}` {source} cannot be loaded: {' '.join(str(error).split())[:500]}{hint}") from None
