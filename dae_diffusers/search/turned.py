"""Images turned by 0, 90, 180 and 270 degrees, with the turn as their class: data for a judge that has seen no class."""

from collections.abc import Iterator
from pathlib import Path

import torch
from datasets import ClassLabel, Dataset, Features, Image
from PIL import Image as PILImage

from dae_diffusers.data import ImageDataset

TURNS = ["0", "90", "180", "270"]
_MAX_IMAGES = 8192  # more do not make a better judge


def write_turned(splits: tuple[ImageDataset, ImageDataset], folder: Path) -> None:
    r"""
    Writes a dataset folder. A network that learns to tell the turn is self-supervised.

    Args:
        splits (`tuple`): Training and validation images.
        folder (`Path`): For Parquet files; the folder of `dataset_name`.
    """
    folder.mkdir(parents=True, exist_ok=True)
    features = Features({"image": Image(), "label": ClassLabel(names=TURNS)})
    for split, images in zip(("train", "validation"), splits, strict=True):
        rows = Dataset.from_list(list(_turned(images)), features=features)
        rows.to_parquet(folder / f"{split}-00000-of-00001.parquet")


def _turned(images: ImageDataset) -> Iterator[dict]:
    images = images.choose(_MAX_IMAGES)
    for number in range(len(images)):
        levels = ((images[number]["pixel_values"] + 1) * 127.5).round().to(torch.uint8)
        for turn in range(len(TURNS)):
            pixels = torch.rot90(levels, turn, dims=(1, 2)).permute(1, 2, 0).contiguous().numpy()
            yield {"image": PILImage.fromarray(pixels[..., 0] if pixels.shape[2] == 1 else pixels), "label": turn}
