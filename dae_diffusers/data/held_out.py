"""The images that are held out: which they are, and whether a model has trained on them or on copies of them."""

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
from dae_diffusers.data.dataset import encoded_sizes, files_of, name_in
from dae_diffusers.data.groups import choose_groups, count_groups, read_groups, whole_groups
from dae_diffusers.errors import UserError
from dae_diffusers.randomness import Stream, derived_seed

logger = logging.getLogger(__name__)

# The same images are held out in every run, whatever its seed: of a model, and of those that it is compared with.
_SPLIT_SEED = 0

_SCRIPTS = ("train_dae", "train_dit", "train_vqgan_prior")
_CHOICE = ("train_split", "validation_fraction", "group_column", "drop_copies")
_OF_OLDER_RUNS = {"group_column": None, "drop_copies": False}  # which do not say so
# Of more images, or images of more bytes that may be copies, none are compared: that takes more than seconds.
_MOST_COMPARED, _MOST_COMPARED_BYTES = 20_000, 2**28


def hold_out(
    config: DataConfig, rows: datasets.Dataset, image_column: str, root: Root | None
) -> tuple[datasets.Dataset, datasets.Dataset]:
    r"""
    Divides a split into rows to train on and rows to validate on, the same in every run. All rows of a file, and all images of a group,
    go to one side.

    Args:
        config ([`DataConfig`]): `validation_fraction` and `group_column`.
        rows (`datasets.Dataset`): The rows of the split.
        image_column (`str`): The column of their images.
        root ([`~dae_diffusers.data.contents.Root`], *optional*): Folder in which the files that rows name must lie.

    Raises:
        UserError: If there are fewer than two files, or groups.
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
        values = yaml.safe_load((folder / "config.yaml").read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError):
        return {}
    return values if isinstance(values, dict) else {}


def _source(settings: dict[str, Any]) -> tuple[str | None, ...]:
    folder = settings.get("train_data_dir")
    names = (settings.get("dataset_name"), settings.get("dataset_config_name"))
    return (folder and os.path.realpath(folder), *names)
