"""A folder of images in the place of samples: those of another model, or of `dae-diffusers sample`."""

import logging
from pathlib import Path

import torch

from dae_diffusers.data import DataConfig, load_images
from dae_diffusers.data.dataset import choose_indices
from dae_diffusers.data.formats import SUFFIXES, open_picture
from dae_diffusers.errors import UserError, one_line

logger = logging.getLogger(__name__)

_ALL = 2**31 - 1


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
            return [picture.height, picture.width]
    except (OSError, ValueError) as error:
        raise UserError(f"`samples_dir`: {first} cannot be read ({one_line(error, 200)}).") from None


def load_samples(folder: str, data: DataConfig, limit: int | None = None) -> torch.Tensor:
    r"""
    The images of a folder, read as the training images are.

    Args:
        folder (`str`): The folder. Class folders in it mean nothing.
        data ([`~dae_diffusers.data.DataConfig`]): That of the training images, whose size and channels are settled.
        limit (`int`, *optional*): At most so many, a fixed random choice.

    Returns:
        `torch.Tensor` of shape `(N, C, H, W)`: uint8.

    Raises:
        UserError: If there are fewer than two images, or one cannot be read.
    """
    plain = DataConfig(
        train_data_dir=folder,
        label_column="none",
        resolution=data.resolution,
        image_channels=data.image_channels,
        value_range=data.value_range,
        pad=data.pad,
        max_validation_samples=_ALL,
    )
    loading = logging.getLogger("dae_diffusers.data")
    level = loading.level
    loading.setLevel(logging.WARNING)  # it would speak of training images
    try:
        splits = load_images(plain, 0)
    finally:
        loading.setLevel(level)
    places = [(images, number) for images in splits for number in range(len(images))]
    chosen = choose_indices(len(places), limit or len(places))
    logger.info("%d images of %s take the place of samples", len(chosen), folder)
    rows = [images[number]["pixel_values"] for images, number in (places[index] for index in chosen)]
    return ((torch.stack(rows) + 1) * 127.5).round().to(torch.uint8)
