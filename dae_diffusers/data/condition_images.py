"""Condition images: each goes through the same geometry as the image that it belongs to."""

import logging
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from PIL import Image

from dae_diffusers.data.arrays import NPY_MAGIC, RANGES, load_npy, scaled_array
from dae_diffusers.data.contents import Root, read_content
from dae_diffusers.data.dataset import ImageDataset
from dae_diffusers.data.formats import open_picture
from dae_diffusers.errors import UserError, one_line

logger = logging.getLogger(__name__)

# Up to which an image counts as a mask, whose values must not be mixed; a test compares it with the pipeline's.
FEW_VALUES = 16
_GRAY_MODES = ("1", "L", "LA", "La", "F")


class ConditionImages(ImageDataset):
    r"""
    The images in the column `condition_column`, by the number and draw of the images that they belong to.

    Each is first resized to its image, then scaled, cropped and flipped as its image. One that holds at most 16 different values, as
    masks do, is resized by nearest neighbour, any other as images are. Gray files have one channel, others three, arrays as many as they
    have; the first one counts.

    Args:
        images ([`ImageDataset`]): The images, with `conditions`.
        like ([`ConditionImages`], *optional*): Those of the training images, which have the same channels, depth and range of values.

    Attributes:
        channels (`int`): Of each.
    """

    def __init__(self, images: ImageDataset, like: "ConditionImages | None" = None):
        self.images, column = images, images.conditions.image_column
        self.channels = _first_channels(images, column) if like is None else like.channels
        options = {} if like is None else {"depth": like.depth, "value_range": like.value_range}
        pad = images.config.pad and "black"  # around a mask there is nothing
        config = replace(images.config, image_channels=self.channels, value_range=[], pad=pad)
        super().__init__(images.rows, config, image_column=column, root=images.root, **options)
        self._kept: Sequence[torch.Tensor] = ()
        self._reader._warned_small = True  # of the images, and that is enough

    def of(self, images: ImageDataset) -> "ConditionImages":
        r"""The condition images of other images, read in the same way."""
        return ConditionImages(images, self)

    def warn_if_dark(self, indices: Sequence[int]) -> None:
        r"""Warns if none of these images has a value in the upper three quarters of their range, as masks of class numbers do."""
        if self.depth not in RANGES:
            return
        white = RANGES[self.depth][1]
        highest = max(float(np.asarray(self._decoded(index)).max()) for index in indices)
        if 4 * highest <= white:
            logger.warning(
                "the images in the column %r, such as %s, have no value above %g, but white is %g: the transformer hardly sees their "
                "differences. Spread the values over [0, %g], or save them as `.npy`, whose range is measured.",
                self.image_column, self.name_of(indices[0]), highest, white, white,
            )  # fmt: skip

    def use_kept(self, chunks: Sequence[torch.Tensor]) -> None:
        r"""
        Takes the pixels from tensors instead of files.

        Args:
            chunks (sequence of `torch.Tensor` of shape `(N, H, W, C)`): What [`pixels`] gives, in order; all but the last of one length.
        """
        self._kept = chunks

    def pixels(self, indices: Sequence[int]) -> torch.Tensor:
        r"""Scaled and cropped, but not flipped, `(N, H, W, C)`: uint8, or float32 for arrays."""
        return torch.from_numpy(self._batch(indices, [None] * len(indices)))

    def _batch(self, indices: Sequence[int], draws: Sequence[int | None]) -> np.ndarray:
        if not self._kept:
            return super()._batch(indices, draws)
        size = len(self._kept[0])
        return np.stack([self._kept[index // size][index % size].numpy() for index in indices])

    def name_of(self, index: int) -> str:
        r"""The file's name, or else the row, and the column."""
        return f"{super().name_of(index)} in the column {self.image_column!r}"

    def _pixels(self, index: int, draw: int | None = None) -> np.ndarray:
        image, images = self._decoded(index), self.images
        height, width = images._reader.size_of(images.rows[index][images.image_column], lambda: images.name_of(index))
        scaling = {"nearest": _has_few_values(image), "halve": not self.images.is_array}
        if not self.is_array:
            resample = Image.Resampling.NEAREST if scaling["nearest"] else Image.Resampling.BICUBIC
            image = image.resize((width, height), resample)
        elif image.shape[:2] != (height, width):
            pixels = torch.from_numpy(image).permute(2, 0, 1)[None]
            image = scaled_array(pixels, (height, width), nearest=scaling["nearest"])[0].permute(1, 2, 0).numpy()
        return self._reader.fit(image, lambda: self.name_of(index), draw, **scaling)

    def _decoded(self, index: int) -> np.ndarray | Image.Image:
        item = self.rows[index][self.image_column]
        if self.channels == 1 and _is_colourful(item, self.root):
            raise UserError(
                f"the image {self.name_of(index)} is in colour, but the first one there is gray. Save all gray, or all in colour."
            )
        return self._reader.decode(item, lambda: self.name_of(index))


def channels_of(content: Any) -> int:
    r"""
    The channels of a condition image: 1 for a file that is gray, 3 for any other, and for arrays the smaller of their first and last side.

    Raises:
        Exception: Whatever Pillow and NumPy raise for what they cannot read.
    """
    if not isinstance(content, bytes) or content.startswith(NPY_MAGIC):
        shape = np.shape(content) if not isinstance(content, bytes) else load_npy(content).shape
        return 1 if len(shape) == 2 else min(shape[0], shape[-1])
    mode = open_picture(content).mode
    return 1 if mode in _GRAY_MODES or mode.startswith("I") else 3


def _is_colourful(item: Any, root: Root | None) -> bool:
    """Whether a file holds colours, and not only the mode for them. What cannot be read holds none: the reader says what is wrong."""
    try:
        content = read_content(item, root)
        if channels_of(content) == 1:
            return False
        bands = np.asarray(open_picture(content).convert("RGB"))
    except Exception:
        return False
    return bool((bands != bands[..., :1]).any())


def _first_channels(images: ImageDataset, column: str) -> int:
    """The channels of the first condition image that can be read."""
    for index in range(len(images)):
        try:
            return channels_of(read_content(images.rows[index][column], images.root))
        except Exception as error:
            if images.config.on_bad_image == "raise":
                raise UserError(
                    f"the image of row {index} in the column {column!r} cannot be decoded ({one_line(error)}). Remove or replace it, or "
                    "pass `on_bad_image skip`."
                ) from None
    raise UserError(f"the column {column!r} holds no image that can be read.")


def _has_few_values(image: np.ndarray | Image.Image) -> bool:
    if isinstance(image, np.ndarray):
        return len(np.unique(image)) <= FEW_VALUES
    counts = np.reshape(image.histogram(), (-1, 256))
    return np.count_nonzero(counts.sum(0)) <= FEW_VALUES
