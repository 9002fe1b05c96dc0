"""Loads the training and validation images that the settings name."""

import logging
import math

import datasets
import numpy as np

from dae_diffusers.data.arrays import RANGES, decode_array, find_depth, read_value_range
from dae_diffusers.data.columns import (
    Rows,
    captions_of,
    class_name,
    class_values,
    describe_classes,
    feature_of,
    find_label_column,
    label_ids,
    label_names,
    value_of,
    with_image_column,
)
from dae_diffusers.data.condition_images import ConditionImages
from dae_diffusers.data.conditions import conditions_of
from dae_diffusers.data.configuration import DEFAULT_MULTIPLE, DataConfig
from dae_diffusers.data.contents import Root, content_hash, read_content
from dae_diffusers.data.copies import without_copies
from dae_diffusers.data.dataset import ImageDataset, choose_indices, files_of
from dae_diffusers.data.groups import choose_groups, count_groups, group_names, read_groups, whole_groups
from dae_diffusers.data.held_out import warn_of_copies, warn_of_seen_images, warn_of_shared_groups
from dae_diffusers.data.images import ImageReader, count_pages, find_first_depth
from dae_diffusers.data.masks import warn_of_masks
from dae_diffusers.data.ranges import ValueSurvey
from dae_diffusers.data.sources import Loaded, load_splits
from dae_diffusers.data.streaming import StreamedImages, check_suffix, fetch
from dae_diffusers.data.tables import SPLITS
from dae_diffusers.errors import UserError
from dae_diffusers.randomness import Stream, derived_seed
from dae_diffusers.store import fingerprint

logger = logging.getLogger(__name__)

# How many pictures (for their depth) and 16-bit files (for their values) are inspected before training.
_LOOKED_AT = 64

# The same images are held out in every run, whatever its seed: of a model, and of those that it is compared with.
_SPLIT_SEED = 0


def load_images(
    config: DataConfig, *, value_range: list[float] | None = None, model: str | None = None
) -> tuple[ImageDataset | StreamedImages, ImageDataset]:
    r"""
    Loads the training and validation images, and logs their number, source, column, classes and range of values, and the files
    that were left out.

    Args:
        config ([`DataConfig`]): What to load.
        value_range (`list[float]`, *optional*): Range of the autoencoder that will see the images; default: that of `model`
            ([`~dae_diffusers.data.arrays.read_value_range`]). The range in `config` comes first. Without any, the depth of pictures gives
            the range, or it is measured.
        model (`str`, *optional*): A trained model, in a folder or on the Hub. If its training has held out other images, this is said.

    Returns:
        Training and validation images, with the same `id2label` and `value_range`. With `config.streaming` the training images
        are [`StreamedImages`].

    Raises:
        UserError: For a data set, split or column that does not exist, empty splits and unusable labels.
    """
    value_range = value_range or read_value_range(model)
    loaded = load_splits(config)
    splits = loaded.splits
    validation_name = _validation_split(config, splits)
    train = splits[config.train_split]
    unused = sorted(set(splits) - {config.train_split, validation_name})
    if unused:
        logger.info("splits that are not used: %s", ", ".join(unused))
    validation = None if validation_name in (None, config.train_split) else splits[validation_name]
    if config.value_range and value_range and config.value_range != value_range:
        logger.warning(
            "`--value_range` is %g %g, but the autoencoder was trained with %g %g.", *config.value_range, *value_range
        )
    value_range = config.value_range or value_range
    is_given = bool(value_range)
    if config.streaming:
        return _streamed(config, train, validation, validation_name, loaded, value_range)

    train, image_column = with_image_column(train, config.image_column)
    label_column = find_label_column(train, config.first_label_column, image_column, config.group_column)
    if config.group_column == image_column:
        raise UserError(f"`group_column` {image_column!r} is the column of the images: name another one.")
    if validation is not None:
        validation = with_image_column(validation, image_column)[0]  # as files, which are compared
    if config.drop_copies:
        train = without_copies(train, validation, image_column, loaded.root)
    if validation is None:
        train, validation = _hold_out(config, train, image_column, loaded.root)
        warn_of_seen_images(config, model, len(train))
    else:
        _require_labels(validation, label_column, validation_name)
        if config.group_column is not None:
            both = ((config.train_split, train), (validation_name, validation))
            names = [read_groups(rows, config.group_column, split, train.features) for split, rows in both]
            warn_of_shared_groups(*names, config.group_column)
    warn_of_copies(train, validation, image_column, loaded.root)
    warn_of_masks(train, image_column)
    if config.max_train_samples is not None:
        train = train.select(choose_indices(len(train), config.max_train_samples))
    num_unused = len(validation) - config.max_validation_samples
    if num_unused > 0 and validation_name in (None, config.train_split):
        logger.info("%d held-out images are not used: `--max_validation_samples` allows no more", num_unused)
    validation = validation.select(choose_indices(len(validation), config.max_validation_samples))
    for name, rows in ((config.train_split, train), (validation_name, validation)):
        if len(rows) == 0:
            raise UserError(f"the split {name!r} is empty.")

    id2label, value2id = label_names(train, validation, label_column, is_chosen=config.label_column is not None)
    result: list[ImageDataset] = []
    both = ((config.train_split, train), (validation_name or config.train_split, validation))
    for (name, rows), conditions in zip(both, conditions_of(config, both, image_column, label_column), strict=True):
        labels = None
        is_held_out = bool(result) and name == config.train_split
        if label_column is not None:
            values = class_values(rows, label_column, train.features)
            labels = label_ids(values, value2id, id2label, label_column, name, is_held_out=is_held_out)
        captions = None
        if config.caption_column is not None:
            captions = captions_of(rows, config.caption_column, name, is_held_out=is_held_out)
        groups = None
        if config.group_column is not None:
            groups = group_names(rows, config.group_column, train.features)
        rows = with_image_column(rows, image_column)[0]
        if config.condition_column is not None:
            rows = with_image_column(rows, config.condition_column, "condition_column")[0]
        images = ImageDataset(
            rows,
            config,
            image_column=image_column,
            labels=labels,
            id2label=id2label,
            depth=result[0].depth if result else None,  # one way for both splits
            value_range=value_range,
            root=loaded.root,
            captions=captions,
            groups=groups,
            conditions=conditions,
        )
        if images.is_array and not images.value_range:
            images.value_range = RANGES.get(images.depth)
        if config.condition_column is not None:
            images.beside = ConditionImages(images, result[0].beside if result else None)
        if config.on_bad_image == "skip":
            images = images.without_bad_images()
        if images.beside is not None:
            images.beside.settle_range()
        result.append(images if result else _in_buckets(images))  # validation has one shape
    train_images, validation_images = result
    held_out = "" if validation_name not in (None, config.train_split) else " (held out)"
    logger.info(
        "%d training and %d validation images%s from %s, split %s, column %s",
        len(train_images), len(validation_images), held_out, loaded.source, config.train_split, image_column,
    )  # fmt: skip
    _log_classes(train_images.labels, id2label, label_column, train.features)
    measured = None
    if train_images.is_array and not train_images.value_range:
        measured = train_images.survey_values()
        train_images.value_range = validation_images.value_range = measured.range
    if train_images.value_range:
        logger.info("image values [%g, %g] are mapped to [-1, 1]", *train_images.value_range)
    train_images.range_warnings = _warn_of_range(train_images, measured)
    _compare_ranges(train_images, is_given=is_given)
    _warn_of_pages(train_images)
    if train_images.beside is not None:
        train_images.beside.warn_if_dark(choose_indices(len(train_images), _LOOKED_AT).tolist())
    return train_images, validation_images


def _hold_out(
    config: DataConfig, rows: datasets.Dataset, image_column: str, root: Root | None
) -> tuple[datasets.Dataset, datasets.Dataset]:
    """
    Training and validation images of a split, the same in every run. All rows of a file, and all images of a group, go to one side.
    """
    files = files_of(rows, image_column, root)
    num_files = int(files.max(initial=-1)) + 1
    if num_files < 2:
        raise UserError(f"the split {config.train_split!r} has {num_files} images; at least 2 are needed.")
    if num_files < len(rows):
        logger.info("%d rows name %d files: all rows of a file are held out, or none", len(rows), num_files)
    random = np.random.default_rng(derived_seed(_SPLIT_SEED, Stream.SPLIT))
    wanted = max(1, round(config.validation_fraction * num_files))
    if config.group_column is None:
        parts, order = files, random.permutation(num_files)
        held_out = order[:wanted]
    else:
        parts, sizes = _groups_of_files(config, rows, files)
        order = random.permutation(len(sizes))
        held_out = order[choose_groups(sizes[order], wanted)]
        _log_groups(config, sizes, held_out, wanted)
    order = np.argsort(np.argsort(order)[parts], kind="stable")  # of the rows
    is_held_out = np.isin(parts, held_out)
    return rows.select(order[~is_held_out[order]]), rows.select(np.flatnonzero(is_held_out))


def _groups_of_files(config: DataConfig, rows: datasets.Dataset, files: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The number of each row's group, and the number of each group's files."""
    column, split = config.group_column, config.train_split
    names = read_groups(rows, column, split, rows.features)
    parts = whole_groups(names, files)
    sizes = np.bincount(parts[np.unique(files, return_index=True)[1]])
    if len(sizes) < 2:
        raise UserError(
            f"all {len(rows)} images of the split {split!r} are of one group of `group_column` {column!r}, so no group is left for "
            "training if one is held out. Name a column of at least 2 groups, give a `validation_split`, or leave "
            "`group_column` out."
        )
    if len(sizes) < count_groups(names):
        logger.info("column %s: groups that name the same file are one group", column)
    return parts, sizes


def _log_groups(config: DataConfig, sizes: np.ndarray, held_out: np.ndarray, wanted: int) -> None:
    num_images, total = int(sizes[held_out].sum()), int(sizes.sum())
    logger.info(
        "column %s: %d of %d groups are held out, with %d of %d images",
        config.group_column, len(held_out), len(sizes), num_images, total,
    )  # fmt: skip
    if not wanted / 2 <= num_images <= 2 * wanted:
        logger.warning(
            "%.2g %% of the images are held out instead of %g %% (`--validation_fraction`), because no choice of whole groups "
            "comes nearer. For another share give a `--group_column` of smaller groups, or a `--validation_split`.",
            100 * num_images / total, 100 * config.validation_fraction,
        )  # fmt: skip


def _in_buckets(images: ImageDataset) -> ImageDataset:
    images.config.settle_buckets(DEFAULT_MULTIPLE)
    if len(images.config.shapes) > 1:
        images = images.in_buckets(images.config.shapes)
        logger.info(
            "%d of %d shapes have images: %s", len(images.buckets.counts), len(images.config.shapes), images.buckets
        )
    return images


def _require_labels(validation: Rows, column: str | None, split: str) -> None:
    if column is not None and feature_of(validation.features, column) is None:
        raise UserError(
            f"the split {split!r} has no column {column!r} of labels, but {list(validation.features)}. Pass "
            "`validation_split train` to hold out a part of the training images instead, or `label_column none`."
        )


def _log_classes(labels: list[int] | None, id2label: dict[int, str] | None, column: str | None, features) -> None:
    if id2label is None:
        logger.info("no classes; the columns are %s", ", ".join(features))
    else:
        logger.info("column %s has %s", column, describe_classes(labels, id2label))


def _warn_of_range(images: ImageDataset, measured: ValueSurvey | None = None) -> list[str]:
    """
    Warns of a range of values that leaves little of some channels, or of all. It was measured, or sampled images are compared with
    it.
    """
    is_meant = bool(images.config.value_range)
    is_picture = images.depth != "numbers" and images.config.image_channels in (1, 3)  # see `_compare_ranges`
    if is_picture or (is_meant and images.config.image_channels == 1):
        return []
    try:
        survey = measured or images.survey_values(choose_indices(len(images), _LOOKED_AT).tolist())
    except UserError:  # whoever reads it for training names it
        return []
    found = [survey.small_channels(images.value_range)]
    if not is_meant:
        found.append(survey.outliers(images.value_range, is_measured=measured is not None))
    for text in filter(None, found):
        logger.warning("%s", text)
    return [text for text in found if text]


def _compare_ranges(images: ImageDataset, *, is_given: bool) -> None:
    """Logs the range of values of 16-bit pictures and the assumed range, and warns if the latter is far too wide."""
    if images.depth not in ("8-bit", "16-bit") or images.config.image_channels not in (1, 3):
        return
    depths: dict[str, int] = {}
    low, high, example = math.inf, -math.inf, None
    for index in choose_indices(len(images), _LOOKED_AT):
        try:
            content = read_content(images.rows[int(index)][images.image_column], images.root)
            depth = find_depth(content)
            depths[depth] = depths.get(depth, 0) + 1
            if depth == "16-bit":
                values = decode_array(content, channels=1)
                low, high = min(low, float(values.min())), max(high, float(values.max()))
                example = example or images.name_of(int(index))
        except Exception:  # whoever reads it for training names it
            continue
    if example is None:
        return
    assumed = images.value_range or RANGES["16-bit"]
    logger.info(
        "%d of %d sampled images have 16 bits: their values lie in [%g, %g], the range is taken as [%g, %g]",
        depths["16-bit"], sum(depths.values()), low, high, *assumed,
    )  # fmt: skip
    if is_given or assumed != RANGES["16-bit"] or assumed[1] < 4 * high:
        return
    if depths.keys() > {"16-bit"}:
        advice = "8-bit pictures lie beside them: save all with the same range, or each kind in a folder of its own"
    else:
        bound = 2 ** max(8, math.ceil(math.log2(high + 1))) - 1
        advice = (
            f"If {bound} is white, pass `--value_range 0 {bound}`; else `--value_range 0 65535` says that it is meant"
        )
    logger.warning(
        "16-bit images, such as %s, use little of [0, 65535]: they come out nearly black. %s.", example, advice
    )


def _warn_of_pages(images: ImageDataset) -> None:
    """Warns if sampled pictures have several pages."""
    for index in choose_indices(len(images), _LOOKED_AT):
        name = images.name_of(int(index))
        item = images.rows[int(index)][images.image_column]
        if not isinstance(item, dict) or (item["bytes"] is None and ".tif" not in name.lower()):
            continue
        try:
            num_pages = count_pages(read_content(item, images.root))
        except Exception:  # whoever reads it for training names it
            continue
        if num_pages > 1:
            logger.warning(
                "%s has %d pages. Only the first page of each file is used. Save each page as a file, or the stack as `.npy`.",
                name, num_pages,
            )  # fmt: skip
            return


def _streamed(
    config: DataConfig,
    train: datasets.IterableDataset,
    validation: datasets.IterableDataset | None,
    validation_name: str | None,
    loaded: Loaded,
    value_range: list[float] | None,
) -> tuple[StreamedImages, ImageDataset]:
    """Training images as a stream. The validation images, from their split or else the first of the stream, are held in memory."""
    if train.features is None:
        raise UserError(
            "the stream does not say what its columns hold; use Parquet or webdataset shards, or leave `streaming` out."
        )
    root, is_given = loaded.root, bool(value_range)
    train, image_column = with_image_column(train, config.image_column)
    label_column = find_label_column(train, config.first_label_column, image_column)
    if label_column == "cls" and config.label_column is None and config.num_classes is None:
        logger.warning(
            "the labels in the column `cls` are not used: a stream cannot count its classes. To use them give `--label_column cls` and "
            "`--num_classes`."
        )
        label_column = None
    id2label = _streamed_label_names(config, train.features, label_column)
    sizes = train.info.splits or {}
    num_examples = sizes[config.train_split].num_examples if config.train_split in sizes else None
    first = _take(train, _LOOKED_AT, image_column, root)
    if len(first) < 2:
        raise UserError(f"the split {config.train_split!r} has {len(first)} images; at least 2 are needed.")
    described = [f"{train.num_shards} {num_examples} {sorted(train.features)}"]
    for row in first:
        label = None if label_column is None else value_of(row, label_column)
        described += [content_hash(row[image_column], root), str(label)]

    depth = find_first_depth((row[image_column] for row in first), config, root)
    if ImageReader(config, depth, value_range=value_range).is_array and not value_range:
        if depth not in RANGES:
            raise UserError(
                "the range of a stream's values cannot be measured in advance: give `value_range LOW HIGH`."
            )
        value_range = RANGES[depth]

    held_out = frozenset()
    if validation is not None:
        validation = with_image_column(validation, image_column)[0]
        _require_labels(validation, label_column, validation_name)
        rows = _take(validation, config.max_validation_samples, image_column, root)
        if not rows:
            raise UserError(f"the split {validation_name!r} is empty.")
    else:
        rows, num_examples = _first_rows(train, config, image_column, root, num_examples)
        held_out = frozenset(content_hash(row[image_column], root) for row in rows)
    if train.num_shards == 1:
        logger.warning(
            "the stream has one shard: images are shuffled within blocks of %d only (`--shuffle_buffer_size`). If the data are "
            "sorted by class, split them into more files.",
            config.shuffle_buffer_size,
        )
    if config.on_bad_image == "raise":
        for number, row in enumerate(rows):
            check_suffix(train, row[image_column], image_column, f"number {number} of the stream")
    kept = datasets.Dataset.from_list(rows, features=train.features if validation is None else validation.features)
    labels = None
    if label_column is not None:
        name = validation_name or config.train_split
        values = class_values(kept, label_column, train.features)
        value2id, is_held_out = _ids_of_names(train.features, label_column), validation is None
        labels = label_ids(values, value2id, id2label, label_column, name, is_held_out=is_held_out)
    validation_images = ImageDataset(
        kept,
        config,
        image_column=image_column,
        labels=labels,
        id2label=id2label,
        depth=depth,
        value_range=value_range,
        root=root,
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
        value_range=value_range,
        root=root,
    )
    logger.info(
        "training images as a stream from %s, split %s, column %s; %d validation images",
        loaded.source, config.train_split, image_column, len(validation_images),
    )  # fmt: skip
    _log_classes(None, id2label, label_column, train.features)
    train_images.range_warnings = _warn_of_range(validation_images)
    _compare_ranges(validation_images, is_given=is_given)
    _warn_of_pages(validation_images)
    return train_images, validation_images.without_bad_images() if config.on_bad_image == "skip" else validation_images


def _first_rows(
    train: datasets.IterableDataset,
    config: DataConfig,
    image_column: str,
    root: Root | None,
    num_examples: int | None,
) -> tuple[list[dict], int | None]:
    """The first rows of a stream, to be held out, and the number of all its rows, if that is known now."""
    rows = _take(train, config.max_validation_samples + 1, image_column, root)
    if len(rows) <= config.max_validation_samples:
        num_examples = len(rows)  # the whole of a small stream
    share = len(rows) if num_examples is None else config.validation_fraction * num_examples
    return rows[: max(1, min(config.max_validation_samples, round(share)))], num_examples


def _streamed_label_names(config: DataConfig, features: datasets.Features, column: str | None) -> dict[int, str] | None:
    if column is None:
        return None
    feature = feature_of(features, column)
    if isinstance(feature, datasets.ClassLabel):
        return dict(enumerate(map(class_name, feature.names)))
    if config.num_classes is None or not getattr(feature, "dtype", "").startswith(("int", "uint")):
        raise UserError(
            f"`label_column` {column!r} holds {feature}, whose classes a stream cannot count in advance. Give `num_classes` "
            "for integers from 0, or `label_column none`."
        )
    return {index: str(index) for index in range(config.num_classes)}


def _ids_of_names(features: datasets.Features, column: str) -> dict[str, int] | None:
    names = getattr(feature_of(features, column), "names", None)
    return names and {class_name(name): number for number, name in enumerate(names)}


def _take(rows: datasets.IterableDataset, number: int, image_column: str, root: Root | None) -> list[dict]:
    return [{**row, image_column: fetch(row[image_column], root)} for row in rows.take(number)]


def _validation_split(config: DataConfig, splits: dict) -> str | None:
    """The validation split: the one asked for, or one with a usual name. None to hold out a part of the training split."""
    if config.train_split not in splits:
        raise UserError(f"`train_split` {config.train_split!r} does not exist; the splits are {list(splits)}.")
    if config.validation_split is not None:
        if config.validation_split not in splits:
            raise UserError(
                f"`validation_split` {config.validation_split!r} does not exist; the splits are {list(splits)}."
            )
        return config.validation_split
    usual = [name for name, kind in SPLITS.items() if kind != "train"]  # those of validation come before those of test
    return next((name for name in usual if name in splits and name != config.train_split), None)
