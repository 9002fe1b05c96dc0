"""A folder of images in the place of samples: those of another model, or of `dae-diffusers sample`."""

import logging
from collections.abc import Sequence
from pathlib import Path

import torch
from datasets import concatenate_datasets
from PIL import ImageOps

from dae_diffusers.data import DataConfig, ImageDataset
from dae_diffusers.data.columns import find_image_column, with_image_column
from dae_diffusers.data.formats import SUFFIXES, open_picture
from dae_diffusers.data.sources import load_splits
from dae_diffusers.errors import UserError, one_line

logger = logging.getLogger(__name__)


def side_of(folder: str) -> list[int]:
    r"""
    Height and width of the first picture in a folder.

    Raises:
        UserError: If there is none, or it cannot be read.
    """
    pictures = (path for path in sorted(Path(folder).rglob("*")) if path.suffix.lower() in SUFFIXES and path.is_file())
    first = next(pictures, None)
    if first is None:
        raise UserError(f"`samples_dir` {folder} holds no pictures. Of arrays, give their size as `resolution`.")
    try:
        with open_picture(first.read_bytes()) as picture:
            upright = ImageOps.exif_transpose(picture)
            return [upright.height, upright.width]
    except (OSError, ValueError) as error:
        raise UserError(f"`samples_dir`: {first} cannot be read ({one_line(error, 200)}).") from None


def load_samples(folder: str, data: DataConfig, value_range: Sequence[float] | None, limit: int) -> torch.Tensor:
    r"""
    The images of a folder, read as the training images are.

    Args:
        folder (`str`): The folder. Class folders in it mean nothing.
        data ([`~dae_diffusers.data.DataConfig`]): That of the training images, whose size and channels are settled.
        value_range (pair of `float`, *optional*): That of the training images.
        limit (`int`): At most so many, a fixed random choice.

    Returns:
        `torch.Tensor` of shape `(N, C, H, W)`: uint8.

    Raises:
        UserError: If there are no images, or one cannot be read.
    """
    plain = DataConfig(
        train_data_dir=folder,
        label_column="none",
        resolution=data.resolution,
        image_channels=data.image_channels,
        value_range=list(value_range or ()),
        pad=data.pad,
    )
    splits, root, _ = load_splits(plain)
    column = find_image_column(next(iter(splits.values())), None)
    rows = concatenate_datasets([with_image_column(each, column)[0].select_columns(column) for each in splits.values()])
    images = ImageDataset(rows, plain, image_column=column, root=root).choose(limit)
    images.settle_range()
    logger.info("%d images of %s take the place of samples", len(images), folder)
    return torch.stack([_levels(images[number]["pixel_values"]) for number in range(len(images))])


def _levels(pixel_values: torch.Tensor) -> torch.Tensor:
    return ((pixel_values + 1) * 127.5).round().to(torch.uint8)
