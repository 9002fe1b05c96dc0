"""Loads the training and validation images that the settings name."""

import logging

import datasets

from dae_diffusers.data.arrays import RANGES, Depth, read_value_range
from dae_diffusers.data.captions import captions_of
from dae_diffusers.data.classes import Classes, class_name, describe_classes, without_unlabelled
from dae_diffusers.data.columns import feature_of, is_word_for_nothing, value_of, with_image_column
from dae_diffusers.data.condition_images import ConditionImages
from dae_diffusers.data.conditions import ConditionColumns, conditions_of
from dae_diffusers.data.configuration import DEFAULT_MULTIPLE, DataConfig
from dae_diffusers.data.contents import Root, content_hash
from dae_diffusers.data.copies import without_copies
from dae_diffusers.data.dataset import ImageDataset, choose_indices
from dae_diffusers.data.found import Found
from dae_diffusers.data.groups import group_names, read_groups
from dae_diffusers.data.held_out import hold_out, warn_of_copies, warn_of_seen_images, warn_of_shared_groups
from dae_diffusers.data.images import ImageReader, find_first_depth
from dae_diffusers.data.inspection import LOOKED_AT, inspect
from dae_diffusers.data.left_out import LeftOut
from dae_diffusers.data.masks import warn_of_masks
from dae_diffusers.data.streaming import StreamedImages, check_suffix, fetch
from dae_diffusers.errors import UserError
from dae_diffusers.store import fingerprint

logger = logging.getLogger(__name__)


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
    found = Found.of(config, config.value_range or value_range)
    if config.value_range and value_range and config.value_range != value_range:
        logger.warning(
            "`--value_range` is %g %g, but the autoencoder was trained with %g %g.", *config.value_range, *value_range
        )
    return _streamed(found) if config.streaming else _indexed(found, model)


def _indexed(found: Found, model: str | None) -> tuple[ImageDataset, ImageDataset]:
    """Both splits on the disk."""
    config, column = found.config, found.label_column
    train, validation = _rows_of_both(found, model)
    classes = None
    if column is not None:
        classes = Classes.of(train, validation, column, is_chosen=config.label_column is not None)
    both = ((config.train_split, train), (found.validation_name, validation))
    conditions = conditions_of(config, both, found.image_column, column)
    train_images = _in_buckets(_images(found, train, classes, conditions[0]))
    validation_images = _images(found, validation, classes, conditions[1], like=train_images)
    logger.info(
        "%d training and %d validation images%s from %s, split %s, column %s",
        len(train_images), len(validation_images), " (held out)" if found.validation is None else "", found.source,
        config.train_split, found.image_column,
    )  # fmt: skip
    _log_classes(train_images.labels, classes, train.features)
    config.check_pictures(train_images.depth)
    measured = None
    if train_images.is_array and not train_images.value_range:
        measured = train_images.survey_values()
        train_images.value_range = validation_images.value_range = measured.range
    if train_images.value_range:
        logger.info("image values [%g, %g] are mapped to [-1, 1]", *train_images.value_range)
    train_images.range_warnings = inspect(train_images, measured, is_given=bool(found.value_range))
    return train_images, validation_images


def _rows_of_both(found: Found, model: str | None) -> tuple[datasets.Dataset, datasets.Dataset]:
    """The rows to train on and to validate on, as many as are allowed. Warns if the validation has images that training sees."""
    config, column, root = found.config, found.image_column, found.root
    train, validation = found.train, found.validation
    if config.leave_out is not None:
        train, validation = _not_named(found, LeftOut(config.leave_out))
    if config.on_missing_label == "skip" and found.label_column is not None:
        train = without_unlabelled(train, found.label_column, config.train_split, found.train.features)
        if validation is not None:
            validation = without_unlabelled(validation, found.label_column, found.validation_name, found.train.features)
    if config.drop_copies:
        train = without_copies(train, validation, column, root)
    if validation is None:
        train, validation = hold_out(config, train, column, root)
        warn_of_seen_images(config, model, len(train))
    elif config.group_column is not None:
        both = ((config.train_split, train), (found.validation_name, validation))
        names = [read_groups(rows, config.group_column, split, train.features) for split, rows in both]
        warn_of_shared_groups(*names, config.group_column)
    if not config.drop_copies:  # then there are none
        warn_of_copies(train, validation, column, root)
    warn_of_masks(train, column)
    if config.max_train_samples is not None:
        train = train.select(choose_indices(len(train), config.max_train_samples))
    num_unused = len(validation) - config.max_validation_samples
    if num_unused > 0 and found.validation is None:
        logger.info("%d held-out images are not used: `--max_validation_samples` allows no more", num_unused)
    validation = validation.select(choose_indices(len(validation), config.max_validation_samples))
    for name, rows in ((config.train_split, train), (found.validation_name, validation)):
        if len(rows) == 0:
            raise UserError(f"the split {name!r} is empty.")
    return train, validation


def _not_named(found: Found, left_out: LeftOut) -> tuple[datasets.Dataset, datasets.Dataset | None]:
    """The rows of both splits without the images that a file names."""
    both = [rows and left_out.of(rows, found.image_column) for rows in (found.train, found.validation)]
    before, after = (sum(len(rows or ()) for rows in each) for each in ((found.train, found.validation), both))
    left_out.report(before, after)
    return both[0], both[1]


def _images(
    found: Found,
    rows: datasets.Dataset,
    classes: Classes | None,
    conditions: ConditionColumns | None,
    like: ImageDataset | None = None,
) -> ImageDataset:
    """The images of a split; those that validate are read in the way of the training images (`like`)."""
    config, train = found.config, found.train.features
    name, is_held_out = config.train_split, False
    if like is not None:
        name, is_held_out = found.validation_name, found.validation is None
    labels = None if classes is None else classes.ids(rows, name, is_held_out=is_held_out)
    captions = None
    if config.caption_column is not None:
        captions = captions_of(rows, config.caption_columns, name, is_held_out=is_held_out)
    groups = None if config.group_column is None else group_names(rows, config.group_column, train)
    if config.condition_column is not None:
        rows = with_image_column(rows, config.condition_column, "condition_column")[0]
    images = ImageDataset(
        rows,
        config,
        image_column=found.image_column,
        labels=labels,
        id2label=None if classes is None else classes.id2label,
        depth=None if like is None else like.depth,
        value_range=found.value_range,
        root=found.root,
        captions=captions,
        groups=groups,
        conditions=conditions,
    )
    if images.is_array and not images.value_range:
        images.value_range = RANGES.get(images.depth)
    if config.condition_column is not None:
        images.condition_images = ConditionImages(images, None if like is None else like.condition_images)
    if config.on_bad_image == "skip":
        images = images.without_bad_images()
    if images.condition_images is not None:
        images.condition_images.settle_range()
    return images


def _in_buckets(images: ImageDataset) -> ImageDataset:
    images.config.settle_buckets(DEFAULT_MULTIPLE)
    if len(images.config.shapes) > 1:
        images = images.in_buckets(images.config.shapes)
        logger.info(
            "%d of %d shapes have images: %s", len(images.buckets.counts), len(images.config.shapes), images.buckets
        )
    return images


def _log_classes(labels: list[int] | None, classes: Classes | None, features: datasets.Features) -> None:
    if classes is None:
        logger.info("no classes; the columns are %s", ", ".join(features))
    else:
        logger.info("column %s has %s", classes.column, describe_classes(labels, classes.id2label))
        for name in filter(is_word_for_nothing, classes.id2label.values()):
            logger.warning(
                "a class is called %r, as programs write a missing name. If its images have no class, remove them, or train without "
                "labels (`--label_column none`).",
                name,
            )


def _streamed(found: Found) -> tuple[StreamedImages, ImageDataset]:
    """Training images as a stream. The validation images, from their split or else the first of the stream, are held in memory."""
    config, train, column, root = found.config, found.train, found.image_column, found.root
    is_held_out, classes = found.validation is None, _classes_of_stream(found)
    first = _take(train, LOOKED_AT, column, root)
    if len(first) < 2:
        raise UserError(f"the split {config.train_split!r} has {len(first)} images; at least 2 are needed.")
    depth = find_first_depth((row[column] for row in first), config, root)
    config.check_pictures(depth)
    both = {
        "image_column": column,
        "id2label": None if classes is None else classes.id2label,
        "depth": depth,
        "value_range": found.value_range or _range_of_stream(config, depth),
        "root": root,
    }
    rows, num_examples = _validation_of_stream(found)
    train_images = StreamedImages(
        train,
        config,
        label_column=found.label_column,
        fingerprint=_fingerprint_of_stream(found, first),
        held_out=frozenset(content_hash(row[column], root) for row in rows if is_held_out),
        num_examples=num_examples,
        **both,
    )
    kept = datasets.Dataset.from_list(rows, features=train.features if is_held_out else found.validation.features)
    labels = None if classes is None else classes.ids(kept, found.validation_name, is_held_out=is_held_out)
    if is_held_out and labels and len(labels) > 1 and len({*labels}) == 1 < len(classes.id2label):
        logger.warning(
            "all %d images that are held out are of the class %r, the first of the stream: they are no sample of the others. Shuffle the "
            "files once, or give a split: `--validation_split`.",
            len(labels), classes.id2label[labels[0]],
        )  # fmt: skip
    validation_images = ImageDataset(kept, config, labels=labels, **both)
    logger.info(
        "training images as a stream from %s, split %s, column %s; %d validation images",
        found.source, config.train_split, column, len(validation_images),
    )  # fmt: skip
    _log_classes(None, classes, train.features)
    train_images.range_warnings = inspect(validation_images, is_given=bool(found.value_range))
    return train_images, validation_images.without_bad_images() if config.on_bad_image == "skip" else validation_images


def _classes_of_stream(found: Found) -> Classes | None:
    """The classes that the stream names, or `num_classes` numbers."""
    column, features, number = found.label_column, found.train.features, found.config.num_classes
    if column is None:
        return None
    feature = feature_of(features, column)
    if isinstance(feature, datasets.ClassLabel):
        names = dict(enumerate(map(class_name, feature.names)))
        return Classes(column, names, {name: index for index, name in names.items()}, features)
    if number is None or not getattr(feature, "dtype", "").startswith(("int", "uint")):
        raise UserError(
            f"`label_column` {column!r} holds {feature}, whose classes a stream cannot count in advance. Give `num_classes` "
            "for integers from 0, or `label_column none`."
        )
    return Classes(column, {index: str(index) for index in range(number)}, None, features)


def _range_of_stream(config: DataConfig, depth: Depth | None) -> list[float] | None:
    """The range of values that the depth of the first image gives to all."""
    if not ImageReader(config, depth).is_array:
        return None
    if depth not in RANGES:
        raise UserError("the range of a stream's values cannot be measured in advance: give `value_range LOW HIGH`.")
    return RANGES[depth]


def _validation_of_stream(found: Found) -> tuple[list[dict], int | None]:
    """The rows that validate, and the number of the rows that these may be held out from, if that is known now."""
    config, train, column, root = found.config, found.train, found.image_column, found.root
    num_examples, limit = _num_examples(found), config.max_validation_samples
    if found.validation is not None:
        rows = _take(found.validation, limit, column, root)
        if not rows:
            raise UserError(f"the split {found.validation_name!r} is empty.")
    else:
        rows = _take(train, limit + 1, column, root)
        if len(rows) <= limit:
            num_examples = len(rows)  # the whole of a small stream
        share = len(rows) if num_examples is None else config.validation_fraction * num_examples
        rows = rows[: max(1, min(limit, round(share)))]
    if train.num_shards == 1:
        logger.warning(
            "the stream has one shard: images are shuffled within blocks of %d only (`--shuffle_buffer_size`). If the data are "
            "sorted by class, split them into more files.",
            config.shuffle_buffer_size,
        )
    if config.on_bad_image == "raise":
        for number, row in enumerate(rows):
            check_suffix(train, row[column], column, f"number {number} of the stream")
    return rows, num_examples


def _fingerprint_of_stream(found: Found, first: list[dict]) -> str:
    """Of the columns, the numbers of shards and images, and the content and labels of the first images."""
    train, column = found.train, found.label_column
    described = [f"{train.num_shards} {_num_examples(found)} {sorted(train.features)}"]
    for row in first:
        label = None if column is None else value_of(row, column)
        described += [content_hash(row[found.image_column], found.root), str(label)]
    return fingerprint(described)


def _num_examples(found: Found) -> int | None:
    """The number of training images, if the data set tells it."""
    splits, name = found.train.info.splits or {}, found.config.train_split
    return splits[name].num_examples if name in splits else None


def _take(rows: datasets.IterableDataset, number: int, image_column: str, root: Root | None) -> list[dict]:
    return [{**row, image_column: fetch(row[image_column], root)} for row in rows.take(number)]
