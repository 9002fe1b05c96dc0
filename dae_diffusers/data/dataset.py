"""Images that have numbers: one split of a data set on the disk, as tensors."""

import hashlib
import io
import logging
import math
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import datasets
import numpy as np
import torch
from PIL import Image
from tqdm.auto import tqdm

from dae_diffusers.cli import UserError
from dae_diffusers.data.arrays import is_array_data
from dae_diffusers.data.batches import BatchDataset
from dae_diffusers.data.configuration import DataConfig
from dae_diffusers.data.images import ImageReader, read_content

logger = logging.getLogger(__name__)

# Images whose transformed pixels fit into this many bytes are decoded once and kept.
IMAGE_MEMORY_BYTES = 2**30


class ImageDataset(BatchDataset):
    r"""
    One split, as tensors.

    Indexed by an image's number, or by `(number, draw)` where `draw` seeds its augmentation; without a draw there is
    none (centre crop, no flip).

    Each item is `{"pixel_values": float32 (C, resolution, resolution) in [-1, 1], "class_labels": int}`, the labels
    only if `id2label` is not None.

    Attributes:
        id2label (`dict[int, str]` or `None`): Names of the classes; None without labels.
        fingerprint (`str`): Hash of the content, for caches and resumed runs.
        is_array (`bool`): Whether images are read as arrays rather than as 8-bit pictures; decided by the first one if not
            given.
    """

    def __init__(
        self,
        rows: datasets.Dataset,
        config: DataConfig,
        *,
        image_column: str,
        labels: list[int] | None = None,
        id2label: dict[int, str] | None = None,
        is_array: bool | None = None,
    ):
        self.rows = rows.select_columns([image_column])
        self.config = config
        self.image_column = image_column
        self.labels = labels
        self.id2label = id2label
        self.fingerprint = _fingerprint(self.rows, image_column, labels)
        self._given_is_array = is_array
        if is_array is None:
            is_array = holds_arrays(self.rows[0][image_column], config)
        self.is_array = is_array
        self._reader = ImageReader(config, is_array)
        num_bytes = len(rows) * config.resolution**2 * config.image_channels * (4 if self.is_array else 1)
        self._memory = None
        if num_bytes <= IMAGE_MEMORY_BYTES and not config.crops_at_random:
            shape = (len(rows), config.resolution, config.resolution, config.image_channels)
            self._memory = np.empty(shape, np.float32 if self.is_array else np.uint8)
            self._is_in_memory = np.zeros(len(rows), bool)

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, item: int | tuple[int, int]) -> dict[str, torch.Tensor | int]:
        return {
            name: value[0] if name == "pixel_values" else value[0].item()
            for name, value in self.__getitems__([item]).items()
        }

    def __getitems__(self, items: list[int | tuple[int, int]]) -> dict[str, torch.Tensor]:
        indices, draws = zip(*(item if isinstance(item, tuple) else (item, None) for item in items), strict=True)
        batch = {"pixel_values": self._reader.to_pixel_values(self._batch(indices, draws), draws)}
        if self.labels is not None:
            batch["class_labels"] = torch.tensor([self.labels[index] for index in indices])
        return batch

    def _batch(self, indices: Sequence[int], draws: Sequence[int | None]) -> np.ndarray:
        """Cropped but not flipped pixels `(B, resolution, resolution, C)`, a copy."""
        if self._memory is None:
            return np.stack([self._pixels(index, draw) for index, draw in zip(indices, draws, strict=True)])
        for index in indices:
            if not self._is_in_memory[index]:
                self._memory[index] = self._pixels(index)
                self._is_in_memory[index] = True
        return self._memory[list(indices)]

    def name_of(self, index: int) -> str:
        r"""The image's file name, where it has one, else its row."""
        item = self.rows[index][self.image_column]
        return (isinstance(item, dict) and item.get("path")) or f"row {index} of the dataset"

    def without_bad_images(self) -> "ImageDataset":
        r"""
        Reads every image once and leaves those out that cannot be decoded. Each is logged by name.

        Raises:
            UserError: When more than `max_bad_image_share` of the images are bad.
        """

        def problem(index: int) -> str | None:
            try:
                self._pixels(index)
            except UserError as error:
                return str(error)

        with ThreadPoolExecutor() as pool:
            problems = list(
                tqdm(pool.map(problem, range(len(self))), total=len(self), desc="Checking images", leave=False)
            )
        good = [index for index, text in enumerate(problems) if text is None]
        for text in filter(None, problems):
            logger.warning("left out: %s", text)
        if len(self) - len(good) > self.config.max_bad_image_share * len(self):
            raise UserError(
                f"{len(self) - len(good)} of {len(self)} images are bad, more than `--max_bad_image_share` "
                f"{self.config.max_bad_image_share} allows; the first: {next(filter(None, problems))}"
            )
        if len(good) == len(self):
            return self
        labels = None if self.labels is None else [self.labels[index] for index in good]
        return ImageDataset(
            self.rows.select(good),
            self.config,
            image_column=self.image_column,
            labels=labels,
            id2label=self.id2label,
            is_array=self._given_is_array,
        )

    def measure_range(self) -> list[float]:
        r"""
        Lowest and highest value: of the type for 16-bit pictures, else of all images.

        Raises:
            UserError: If all values are the same.
        """
        known = range_of_type(self.rows[0][self.image_column])
        if known is not None:
            return known
        low, high = math.inf, -math.inf
        for index in tqdm(range(len(self)), desc="Measuring the value range", leave=False):
            pixels = self._batch([index], [None])
            low, high = min(low, float(pixels.min())), max(high, float(pixels.max()))
        if not low < high:
            raise UserError(f"all values of the training images are {low}: there is nothing to learn.")
        return [low, high]

    def _pixels(self, index: int, draw: int | None = None) -> np.ndarray:
        """The image as uint8 or float32 (resolution, resolution, C), cropped but not flipped."""
        return self._reader.read(self.rows[index][self.image_column], lambda: self.name_of(index), draw)


def holds_arrays(item: Any, config: DataConfig) -> bool:
    r"""Whether images like this one are read as arrays rather than as 8-bit pictures."""
    if config.value_range or config.image_channels not in (1, 3):
        return True
    try:
        return is_array_data(read_content(item))
    except (ValueError, OSError):
        return False


def range_of_type(item: Any) -> list[float] | None:
    r"""Lowest and highest value of an 8-bit or 16-bit picture; None for other numbers, whose range must be measured or given."""
    content = read_content(item)
    if isinstance(content, bytes) and not content.startswith(b"\x93NUMPY"):
        with Image.open(io.BytesIO(content)) as image:
            if image.mode != "F":
                return [0.0, 65535.0] if image.mode.startswith("I") else [0.0, 255.0]
    return None


def _fingerprint(rows: datasets.Dataset, image_column: str, labels: list[int] | None) -> str:
    """Hash of the number of rows, all labels and up to 64 images spread over the data."""
    digest = hashlib.sha256(str(len(rows)).encode())
    digest.update(np.asarray(labels if labels is not None else [], dtype=np.int64).tobytes())
    for index in np.unique(np.linspace(0, len(rows) - 1, num=min(64, len(rows))).astype(int)):
        try:
            content = read_content(rows[int(index)][image_column])
            digest.update(content if isinstance(content, bytes) else np.asarray(content).tobytes())
        except (ValueError, OSError):
            digest.update(b"unreadable")
    return digest.hexdigest()[:16]
