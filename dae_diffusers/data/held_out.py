"""Compares the images that are held out with those that the training of a model has held out."""

import json
import logging
import os
from pathlib import Path
from typing import Any

import yaml

from dae_diffusers.data.configuration import DataConfig

logger = logging.getLogger(__name__)

_SCRIPTS = ("train_dae", "train_dit", "train_vqgan_prior")
_CHOICE = ("train_split", "validation_fraction")


def warn_of_seen_images(config: DataConfig, seed: int, model: str | None, num_images: int | None = None) -> None:
    r"""
    Warns if a model was trained on the same data, but with other images held out: then it has seen images of this validation.

    Args:
        config ([`DataConfig`]): The images, of which a part is held out.
        seed (`int`): Chooses that part.
        model (`str` or `None`): Folder of an autoencoder or a pipeline, in the output folder of its run, or that folder.
        num_images (`int`, *optional*): How many images are left for training, before any limit.
    """
    now = {name: getattr(config, name) for name in _CHOICE} | {"seed": seed}
    for folder in (Path(model), Path(model).absolute().parent) if model else ():
        for script in _SCRIPTS:
            before = _settings_of(folder / script)
            differing = [name for name in now if before.get(name, now[name]) != now[name]]
            if _source(before) != _source(vars(config)):
                continue
            if differing:
                given = " ".join(f"--{name} {before[name]}" for name in differing)
                logger.warning(
                    "%s was trained with `%s`: other images were held out there, so it has seen some of the validation images. Give the "
                    "same here.",
                    folder / script, given,
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
