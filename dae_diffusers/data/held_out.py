"""Compares the images that are held out with those that are trained on, now and when a model was trained."""

import json
import logging
import os
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import yaml

from dae_diffusers.data.configuration import DataConfig
from dae_diffusers.data.contents import Root, content_hash
from dae_diffusers.data.dataset import encoded_sizes, name_in

logger = logging.getLogger(__name__)

_SCRIPTS = ("train_dae", "train_dit", "train_vqgan_prior")
_CHOICE = ("train_split", "validation_fraction", "group_column", "drop_copies")
_OF_OLDER_RUNS = {"group_column": None, "drop_copies": False}  # which do not say so
# Of more images, or images of more bytes that may be copies, none are compared: that takes more than seconds.
_MOST_COMPARED, _MOST_COMPARED_BYTES = 20_000, 2**28


def warn_of_seen_images(config: DataConfig, model: str | None, num_images: int | None = None) -> None:
    r"""
    Warns if a model was trained on the same data, but with other images held out: then it has seen images of this validation.

    Args:
        config ([`DataConfig`]): The images, of which a part is held out.
        model (`str` or `None`): Folder of an autoencoder or a pipeline, in the output folder of its run, or that folder.
        num_images (`int`, *optional*): How many images are left for training, before any limit.
    """
    now = {name: getattr(config, name) for name in _CHOICE}
    for folder in (Path(model), Path(model).absolute().parent) if model else ():
        for script in _SCRIPTS:
            before = {**_OF_OLDER_RUNS, **_settings_of(folder / script)}
            differing = [name for name in now if before.get(name, now[name]) != now[name]]
            if _source(before) != _source(vars(config)):
                continue
            if differing:
                given = " ".join(_flag(name, before[name]) for name in differing if before[name] not in (None, False))
                without = " ".join(f"--{name}" for name in differing if before[name] in (None, False))
                logger.warning(
                    "%s was trained %s: other images were held out there, so it has seen some of the validation images. Give the "
                    "same here.",
                    folder / script,
                    " and ".join([f"with `{given}`"] * bool(given) + [f"without `{without}`"] * bool(without)),
                )  # fmt: skip
                return
            trained = _num_trained(folder / script, before, config)
            if trained and num_images and trained != num_images:
                logger.warning(
                    "%s was trained with %d images, now there are %d: other images are held out, and about %.0f %% of those were trained "
                    "on. Validate on the images of before, or on a split of their own (`--validation_split`).",
                    folder / script, trained, num_images, 100 * (1 - config.validation_fraction),
                )  # fmt: skip
                return


def warn_of_copies(train: datasets.Dataset, validation: datasets.Dataset, column: str, root: Root | None) -> None:
    r"""
    Warns if files that are held out are byte for byte files that are trained on. Only files of the same size are read, and none of
    large data sets.

    Args:
        train, validation (`datasets.Dataset`): The rows of both parts.
        column (`str`): The column of their images.
        root ([`~dae_diffusers.data.contents.Root`], *optional*): Folder in which the files that rows name must lie.
    """
    if len(train) + len(validation) > _MOST_COMPARED:
        return
    parts = [rows.select_columns(column) for rows in (train, validation)]
    sizes = [encoded_sizes(rows, column, root) for rows in parts]
    shared = np.setdiff1d(np.intersect1d(*sizes), [0])
    likely = [np.flatnonzero(np.isin(each, shared)) for each in sizes]
    if sum(int(each[chosen].sum()) for each, chosen in zip(sizes, likely, strict=True)) > _MOST_COMPARED_BYTES:
        return
    trained = {content_hash(parts[0][int(index)][column], root) for index in likely[0]} - {content_hash(None)}
    copies = [int(index) for index in likely[1] if content_hash(parts[1][int(index)][column], root) in trained]
    if copies:
        logger.warning(
            "%d of %d images for validation are copies of training images, such as %s: validation sees what was trained on. "
            "`--drop_copies` trains without them.",
            len(copies), len(validation), name_in(parts[1], column, copies[0]),
        )  # fmt: skip


def warn_of_shared_groups(train: list[str | None], validation: list[str | None], column: str) -> None:
    r"""
    Warns if groups of images are on both sides of a split that the data set has.

    Args:
        train, validation (`list[str | None]`): The group of each image, from [`~dae_diffusers.data.groups.read_groups`].
        column (`str`): The column that names them.
    """
    shared = set(train) & set(validation) - {None}
    if shared:
        logger.warning(
            "%d of %d images for validation are of groups with training images, such as %r (column %s): validation sees what was trained "
            "on. Move these images to one side, or hold out whole groups of the training images with `--validation_split train`.",
            sum(name in shared for name in validation), len(validation), min(shared), column,
        )  # fmt: skip


def _num_trained(folder: Path, settings: dict[str, Any], config: DataConfig) -> int | None:
    """The images that a run has trained with; None if it is unknown, or not all that were not held out."""
    if settings.get("validation_split") != config.validation_split or settings.get("on_bad_image") == "skip":
        return None
    if settings.get("max_train_samples") is not None or settings.get("streaming"):
        return None
    try:
        return json.loads((folder / "run.json").read_text())["counts"]["training_images"]
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _flag(name: str, value: Any) -> str:
    return f"--{name}" if value is True else f"--{name} {value}"


def _settings_of(folder: Path) -> dict[str, Any]:
    try:
        values = yaml.safe_load((folder / "config.yaml").read_text())
    except (OSError, ValueError, yaml.YAMLError):
        return {}
    return values if isinstance(values, dict) else {}


def _source(settings: dict[str, Any]) -> tuple[str | None, ...]:
    folder = settings.get("train_data_dir")
    names = (settings.get("dataset_name"), settings.get("dataset_config_name"))
    return (folder and os.path.realpath(folder), *names)
