"""Indexed images: one split of a data set on the disk, as tensors."""

import logging
import math
import mmap
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property
from typing import Any, TypeVar

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch
from diffusers.training_utils import find_nearest_bucket
from tqdm.auto import tqdm

from dae_diffusers.data.arrays import RANGES, Depth, without_warnings
from dae_diffusers.data.batches import BatchDataset
from dae_diffusers.data.buckets import Buckets
from dae_diffusers.data.conditions import ConditionColumns
from dae_diffusers.data.configuration import DataConfig
from dae_diffusers.data.contents import Root, content_hash, inode_of, name_of_row, read_content, size_of
from dae_diffusers.data.images import ImageReader, find_first_depth, split_items
from dae_diffusers.data.ranges import ValueSurvey
from dae_diffusers.errors import UserError
from dae_diffusers.store import fingerprint

logger = logging.getLogger(__name__)

T = TypeVar("T")

# Images whose transformed pixels fit into this many bytes are decoded once and kept.
IMAGE_MEMORY_BYTES = 2**30


class ImageDataset(BatchDataset):
    r"""
    One split, as tensors.

    It is indexed by an image's number, or by `(number, draw)`, where `draw` seeds the augmentation. Without a draw there is
    no augmentation (centre crop, no flip).

    An item is `{"pixel_values": float32 (C, height, width) in [-1, 1], "class_labels": int}`, with labels
    only if `id2label` is not None. All images of a batch must be of one bucket.

    Attributes:
        buckets ([`~dae_diffusers.data.buckets.Buckets`]): Their shapes. A single one, before [`in_buckets`].
        id2label (`dict[int, str]` or `None`): Names of the classes; None without labels.
        captions (`list[list[str]]` or `None`): Texts of each image, at least one; None without a column of them.
        groups (`list[str | None]` or `None`): The group of each image, None where it is a group of its own; None without a column of them.
        conditions ([`~dae_diffusers.data.conditions.ConditionColumns`] or `None`): What else they are drawn from.
        condition_images ([`~dae_diffusers.data.condition_images.ConditionImages`] or `None`): Their condition images.
        depth (`str` or `None`): Depth of the images. Default: that of the first image (with `--on_bad_image skip`, the first that
            is not damaged). The others must fit it.
        is_array (`bool`): Whether images are read as arrays rather than as 8-bit pictures.
        root ([`~dae_diffusers.data.contents.Root`] or `None`): Folder in which the files that rows name must lie.
        range_warnings (`list[str]`): What `load_images` has found wrong with the range of values of training images.
    """

    def __init__(
        self,
        rows: datasets.Dataset,
        config: DataConfig,
        *,
        image_column: str,
        labels: list[int] | None = None,
        id2label: dict[int, str] | None = None,
        depth: Depth | None = None,
        value_range: list[float] | None = None,
        root: Root | None = None,
        captions: list[list[str]] | None = None,
        groups: list[str | None] | None = None,
        buckets: Buckets | None = None,
        conditions: ConditionColumns | None = None,
    ):
        condition_column = None if conditions is None else conditions.image_column
        self.rows = rows.select_columns(
            [image_column] if condition_column is None else [image_column, condition_column]
        )
        self.config = config
        self.image_column = image_column
        self.labels = labels
        self.id2label = id2label
        self.captions = captions
        self.groups = groups
        self.conditions = conditions
        self.condition_images: ImageDataset | None = None
        self.range_warnings: list[str] = []
        self._given_depth = depth
        self.root = root
        self.depth = depth or find_first_depth(
            (row[image_column] for row in self.rows), config, root, name_of=self.name_of
        )
        self._reader = ImageReader(config, self.depth, value_range=value_range, root=root)
        self.is_array = self._reader.is_array
        self._buckets = buckets or Buckets.single(len(rows), config.size)
        dtype = np.float32 if self.is_array else np.uint8
        shapes = [(*size, config.image_channels) for size in self._buckets.sizes]
        num_values = sum(count * math.prod(shape) for count, shape in zip(self._buckets.counts, shapes, strict=True))
        self._memory = None
        if num_values * np.dtype(dtype).itemsize <= IMAGE_MEMORY_BYTES and not config.crops_at_random:
            counts = zip(self._buckets.counts, shapes, strict=True)
            self._memory = [_shared_zeros((count, *shape), dtype) for count, shape in counts]
            self._is_in_memory = _shared_zeros((len(rows),), np.bool_)

    @property
    def buckets(self) -> Buckets:
        return self._buckets

    @property
    def value_range(self) -> list[float] | None:
        r"""
        The lowest and highest value of the original images, which are mapped to -1 and 1. None for 8-bit pictures (0 to 255), and
        for arrays until it is set or measured.
        """
        return self._reader.value_range

    @value_range.setter
    def value_range(self, value_range: list[float] | None) -> None:
        if not self.is_array and value_range is not None:
            raise ValueError(
                "the data set reads 8-bit pictures without a value range; give `value_range` when you create the data set"
            )
        self._reader.value_range = None if value_range is None else [float(value) for value in value_range]

    @property
    def has_classes(self) -> bool:
        r"""Whether there are images of two classes at least, which a classifier could tell apart."""
        return len(set(self.labels or ())) > 1

    @cached_property
    def fingerprint(self) -> str:
        r"""
        Fingerprint of the images, for caches and resumed runs. It covers their number, all labels, the size in bytes of every
        encoded image, and the content of up to 64 images spread over the data, but not their location.
        """
        return fingerprint(self._described())

    def _described(self) -> Iterator[Any]:
        yield str(len(self))
        yield np.asarray(self.labels if self.labels is not None else [], dtype=np.int64)
        yield encoded_sizes(self.rows, self.image_column, self.root)
        if record := self._buckets.record(self.config.size):
            yield np.asarray(record)
        for index in np.unique(np.linspace(0, len(self) - 1, num=min(64, len(self))).astype(int)):
            try:
                content = read_content(self.rows[int(index)][self.image_column], self.root)
            except (ValueError, OSError):
                content = b"unreadable"
            yield content if isinstance(content, bytes) else np.asarray(content)

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, item: int | tuple[int, int]) -> dict[str, torch.Tensor | int]:
        return {
            name: value[0] if name == "pixel_values" else value[0].item()
            for name, value in self.__getitems__([item]).items()
        }

    def __getitems__(self, items: list[int | tuple[int, int]]) -> dict[str, torch.Tensor]:
        indices, draws = split_items(items)
        batch = {"pixel_values": self._reader.to_pixel_values(self._batch(indices, draws), draws)}
        if self.labels is not None:
            batch["class_labels"] = torch.tensor([self.labels[index] for index in indices])
        return batch

    @without_warnings()
    def _batch(self, indices: Sequence[int], draws: Sequence[int | None]) -> np.ndarray:
        """Cropped but not flipped pixels `(B, height, width, C)` of images of one bucket, a copy."""
        if self._memory is None:
            return np.stack([self._pixels(index, draw) for index, draw in zip(indices, draws, strict=True)])
        bucket = self._buckets.of(indices[0])
        memory, start = self._memory[bucket], self._buckets.ranges[bucket].start
        for index in indices:
            if not self._is_in_memory[index]:
                memory[index - start] = self._pixels(index)
                self._is_in_memory[index] = True
        return memory[np.asarray(indices) - start]

    def name_of(self, index: int) -> str:
        r"""The image's file name, where it has one, else its row."""
        return name_in(self.rows, self.image_column, index)

    def in_buckets(self, sizes: Sequence[tuple[int, int]]) -> "ImageDataset":
        r"""The images bucket after bucket: each in the one of `sizes` (heights and widths) whose proportions are nearest."""

        def nearest(index: int) -> int:
            item = self.rows[index][self.image_column]
            return find_nearest_bucket(*self._reader.size_of(item, lambda: self.name_of(index)), sizes)

        found = np.array(self.of_each(nearest, "Reading the sizes of images"))
        buckets = Buckets.without_empty(sizes, np.bincount(found, minlength=len(sizes)).tolist())
        return self._with_rows(np.argsort(found, kind="stable"), self.depth, buckets)

    def in_one_shape(self) -> "ImageDataset":
        r"""The same images in the same order, all of the resolution's shape; itself without buckets."""
        if len(self._buckets.sizes) == 1:
            return self
        return self._with_rows(range(len(self)), self.depth, Buckets.single(len(self), self.config.size))

    @without_warnings()  # around the pool
    def of_each(self, function: Callable[[int], T], description: str, indices: Sequence[int] | None = None) -> list[T]:
        r"""What a function says about each image, by its number; of the images with these numbers, or of all."""
        indices = range(len(self)) if indices is None else indices
        with ThreadPoolExecutor() as pool, tqdm(total=len(indices), desc=description, leave=False) as progress:
            found = []
            for start in range(0, len(indices), 4096):  # what waits for a thread takes 2 KB an image
                part = indices[start : start + 4096]
                found += pool.map(function, part)
                progress.update(len(part))
        return found

    def without_bad_images(self) -> "ImageDataset":
        r"""
        Reads every image once and leaves out those that cannot be decoded, or whose condition image cannot be. Each is named in the log.

        Raises:
            UserError: If more than `max_bad_image_share` of the images are bad, or all of them.
        """

        def problem(index: int) -> str | None:
            try:
                for images in filter(None, (self, self.condition_images)):
                    images._pixels(index)
            except UserError as error:
                return str(error)

        problems = self.of_each(problem, "Checking images")
        good = [index for index, text in enumerate(problems) if text is None]
        for text in filter(None, problems):
            logger.warning("left out: %s", text)
        if len(self) - len(good) > self.config.max_bad_image_share * len(self):
            raise UserError(
                f"{len(self) - len(good)} of {len(self)} images are bad, more than `max_bad_image_share` "
                f"{self.config.max_bad_image_share} allows: remove them, or pass a larger share. The first: {next(filter(None, problems))}"
            )
        if not good:
            raise UserError(f"all {len(self)} images are bad; the first: {problems[0]}")
        return self._select(good, self._given_depth)  # the first may have been bad

    def whole(self, index: int) -> np.ndarray:
        r"""The whole image of a number, neither scaled nor cropped, `(H, W, C)` float32 in [-1, 1]."""
        return self._reader.whole(self.rows[index][self.image_column], lambda: self.name_of(index))

    def choose(self, limit: int) -> "ImageDataset":
        r"""At most `limit` of the images, in order: a fixed random choice, because data may be sorted by class."""
        return self.select(choose_indices(len(self), limit))

    def select(self, indices: Sequence[int]) -> "ImageDataset":
        r"""The images with these ascending numbers."""
        return self._select(indices, self.depth)

    def spread(self, count: int) -> list[int]:
        r"""The numbers of at most `count` images to show: evenly over the classes and within each, in the order of the classes."""
        return spread_over_classes(self.labels or [0] * len(self), count)

    def class_names_of(self, indices: Sequence[int]) -> list[str] | None:
        r"""The name of each image's class; None without classes."""
        return None if self.id2label is None else [self.id2label[self.labels[index]] for index in indices]

    def _select(self, indices: Sequence[int], depth: Depth | None) -> "ImageDataset":
        if len(indices) == len(self):
            return self
        return self._with_rows(indices, depth, self._buckets.chosen(indices))

    def _with_rows(self, indices: Sequence[int], depth: Depth | None, buckets: Buckets) -> "ImageDataset":
        chosen = ImageDataset(
            self.rows.select(indices),
            self.config,
            image_column=self.image_column,
            labels=None if self.labels is None else [self.labels[index] for index in indices],
            id2label=self.id2label,
            depth=depth,
            value_range=self.value_range,
            root=self.root,
            captions=None if self.captions is None else [self.captions[index] for index in indices],
            groups=None if self.groups is None else [self.groups[index] for index in indices],
            buckets=buckets,
            conditions=None if self.conditions is None else self.conditions.select(indices),
        )
        chosen.condition_images = None if self.condition_images is None else self.condition_images.of(chosen)
        return chosen

    def settle_range(self) -> None:
        r"""
        Sets the range of values of arrays, if it has none: that of their depth (see `RANGES`), or measured as [`survey_values`] does.

        Raises:
            UserError: If all values are the same.
        """
        if self.is_array and not self.value_range:
            self.value_range = RANGES.get(self.depth) or self.survey_values().range

    @without_warnings()
    def survey_values(self, indices: Sequence[int] | None = None) -> ValueSurvey:
        r"""
        Surveys the values of the images with these numbers, or of all: over their centre crops, or over whole images if crops are random or
        there are none.
        """
        indices = range(len(self)) if indices is None else indices
        survey = ValueSurvey(len(indices))
        for index in tqdm(indices, desc="Measuring the value range", leave=False):
            if self.config.crops_at_random or self.config.pad:  # scaling leaves no image's range, and padding needs it
                pixels = self._reader.decode(self.rows[index][self.image_column], lambda i=index: self.name_of(i))
            else:
                pixels = self._batch([index], [None])
            survey.add(pixels)
        return survey

    def _pixels(self, index: int, draw: int | None = None) -> np.ndarray:
        """The image as uint8 or float32 (height, width, C), cropped but not flipped."""
        size = self._buckets.sizes[self._buckets.of(index)]
        return self._reader.read(self.rows[index][self.image_column], lambda: self.name_of(index), draw, size)


def choose_indices(count: int, limit: int) -> np.ndarray:
    r"""`min(count, limit)` ascending indices below `count`: all of them, or a random choice that is always the same."""
    return np.sort(np.random.default_rng(0).permutation(count)[:limit]) if limit < count else np.arange(count)


def spread_over_classes(labels: Sequence[int], count: int) -> list[int]:
    r"""
    The places of at most `count` labels: as many of each class as of any other, while it has that many, evenly over its places. If
    there are more classes than `count`, every so many-th class has one.
    """
    places = [np.flatnonzero(np.asarray(labels) == label) for label in np.unique(labels)]
    places = [places[n] for n in _evenly(len(places), count)]
    shares = [0] * len(places)
    while sum(shares) < min(count, sum(map(len, places))):
        smallest = min((n for n in range(len(places)) if shares[n] < len(places[n])), key=shares.__getitem__)
        shares[smallest] += 1
    return [int(each[n]) for each, share in zip(places, shares, strict=True) for n in _evenly(len(each), share)]


def _evenly(count: int, limit: int) -> np.ndarray:
    """At most `limit` ascending numbers below `count`, evenly spaced."""
    return np.arange(min(count, limit)) * count // max(1, min(count, limit))


def name_in(rows: datasets.Dataset, column: str, index: int) -> str:
    r"""The file name of an image of chosen rows, where it has one, else its row before they were chosen."""
    row = index if rows._indices is None else rows._indices.column(0)[index].as_py()
    return name_of_row(rows[index][column], row)


def encoded_sizes(rows: datasets.Dataset, column: str, root: Root | None = None) -> np.ndarray:
    r"""
    The size in bytes of each encoded image, `(N,)` int64, without reading any; 0 for a file that is missing or not on a local disk.
    For a column of arrays it is empty, `(0,)`.
    """
    images = rows.data.column(column)
    if not pa.types.is_struct(images.type):
        return np.empty(0, np.int64)
    # Selected rows are indices into the whole table. Reading the table through them would copy the images.
    chosen = np.arange(len(rows)) if rows._indices is None else rows._indices.column(0).to_numpy()
    sizes = pc.binary_length(pc.struct_field(images, "bytes")).to_numpy()[chosen]  # NaN where the bytes are elsewhere
    paths = pc.struct_field(images, "path")
    for index in np.flatnonzero(np.isnan(sizes)):
        sizes[index] = size_of(paths[chosen[index]].as_py(), root)
    return sizes.astype(np.int64)


def files_of(rows: datasets.Dataset, column: str, root: Root | None = None) -> np.ndarray:
    r"""
    The number of the file of each row's image, `(N,)` int64, counted from 0 in their order. A table may have several rows of one file, as
    with one caption a row. Rows that hold the bytes themselves have the same file if these and its name are equal; without a name each
    row has its own, because comparing would read all images. Links to a file are that file.
    """
    files = files_by_name(rows, column, root)
    images = rows.data.column(column)
    if not pa.types.is_struct(images.type) or not len(rows):
        return files
    firsts = np.unique(files, return_index=True)[1]
    same, known = np.arange(len(firsts)), {}
    for number, path in _paths_alone(rows, images, firsts):
        inode = inode_of(path, root)
        same[number] = number if inode is None else known.setdefault(inode, number)
    num_links = int((same != np.arange(len(same))).sum())
    if num_links:
        logger.info("%d files are links to others: they are held out together with these", num_links)
    return np.unique(same, return_inverse=True)[1][files]


def _paths_alone(rows: datasets.Dataset, images: pa.ChunkedArray, indices: np.ndarray) -> Iterator[tuple[int, str]]:
    """The paths of those of some rows that do not hold the bytes, each with its place among `indices`."""
    chosen = indices if rows._indices is None else rows._indices.column(0).to_numpy()[indices]
    is_alone = pc.is_null(pc.struct_field(images, "bytes")).to_numpy()[chosen]
    paths = pc.struct_field(images, "path")
    for number in np.flatnonzero(is_alone):
        yield int(number), paths[int(chosen[number])].as_py()


def files_by_name(rows: datasets.Dataset, column: str, root: Root | None = None) -> np.ndarray:
    r"""As [`files_of`], but links to a file are files of their own."""
    images = rows.data.column(column)
    if not pa.types.is_struct(images.type) or not len(rows):
        return np.arange(len(rows))
    chosen = np.arange(len(rows)) if rows._indices is None else rows._indices.column(0).to_numpy()
    paths = pc.struct_field(images, "path").dictionary_encode().chunks  # all have the same dictionary
    names = pa.chunked_array([chunk.indices for chunk in paths]).fill_null(-1).to_numpy()[chosen]
    if len(np.unique(names[names >= 0])) == np.count_nonzero(names >= 0):
        return np.arange(len(rows))
    sizes = pc.binary_length(pc.struct_field(images, "bytes")).to_numpy()[chosen]  # NaN where the bytes are elsewhere
    likely = list(zip(names.tolist(), np.nan_to_num(sizes, nan=-1).tolist(), strict=True))
    counts, files = Counter(likely), {}

    def key(index: int) -> Any:
        name, size = likely[index]
        if name < 0 or counts[name, size] == 1:
            return index
        # Different pictures are often all called `image.png`.
        return (name, None if size < 0 else content_hash(rows[index][column], root))

    return np.array([files.setdefault(key(index), len(files)) for index in range(len(rows))])


def _shared_zeros(shape: tuple[int, ...], dtype: type) -> np.ndarray:
    """Memory that a loader's processes share, so each image is decoded and stored once. Pages are allocated as they are filled."""
    size = math.prod(shape) * np.dtype(dtype).itemsize
    return np.frombuffer(mmap.mmap(-1, size), dtype).reshape(shape)
