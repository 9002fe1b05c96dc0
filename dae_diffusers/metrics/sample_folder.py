"""A folder of drawn images, which says how they were drawn, and which training reads like any other folder of images."""

import io
import json
import os
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import quote

import numpy as np
import torch
import yaml
from PIL import Image

from dae_diffusers.data.arrays import RANGES
from dae_diffusers.data.classes import class_name
from dae_diffusers.data.folders import DRAWN, SPLITS, UNSEEN
from dae_diffusers.errors import UserError, one_line
from dae_diffusers.store import read_rows, remove_leftovers, write_atomically

SETTINGS = DRAWN  # with which all images of a folder are drawn
METADATA = "metadata.jsonl"  # a row for each image

# Of the settings those that do not change the images.
_OF_ONE_RUN = ("pipeline",)
_IN_WORDS = {"weights": "other weights", "scheduler": "another scheduler"}
_NOT_IN_NAMES = "/" if os.name == "posix" else '<>:"/\\|?*'
_MAX_NAME_BYTES = 200


def check_is_free(folder: Path) -> None:
    r"""Raises `UserError` for a folder with files that are no drawn images."""
    if not folder.is_dir() or (folder / SETTINGS).exists():
        return
    others = sorted(name for name in os.listdir(folder) if not name.startswith(".") and not name.endswith(".tmp"))
    if others:
        raise UserError(
            f"`output_dir` {folder} holds other files, such as {others[0]}. Give a new folder, an empty one, or one of earlier samples."
        )


def prepare(folder: Path, settings: dict[str, Any], rows: Sequence[dict[str, Any]]) -> list[int]:
    r"""
    Writes what is known before anything is drawn, and finds what is there.

    Args:
        folder (`Path`): The folder, which exists.
        settings (`dict`): All that the images depend on, as JSON can hold it, and `pipeline`, where it lies.
        rows (sequence of `dict`): The row of each image, in order, with its `file_name`.

    Returns:
        `list[int]`: Numbers of the images that are missing.

    Raises:
        UserError: If the folder holds images of other settings.
    """
    remove_leftovers(folder)
    settings = json.loads(json.dumps(settings, default=str))
    kept = _read_settings(folder / SETTINGS)
    if kept is not None and (words := list(_differences(kept, settings))):
        raise UserError(
            f"`output_dir` {folder} holds images that were drawn with {', '.join(words)}. Draw with the same to add to them, or give "
            "another `output_dir`."
        )
    write_atomically(folder / SETTINGS, yaml.safe_dump(settings, sort_keys=False, allow_unicode=True))
    if len(rows) > len(read_rows(folder / METADATA, file_name=str)):
        write_atomically(folder / METADATA, "".join(f"{json.dumps(row, ensure_ascii=False)}\n" for row in rows))
    for inside in sorted({(folder / row["file_name"]).parent for row in rows}):
        inside.mkdir(exist_ok=True)
        remove_leftovers(inside)
    return [number for number, row in enumerate(rows) if not (folder / row["file_name"]).exists()]


def class_folders(names: Mapping[int, str], num_classes: int) -> list[str]:
    r"""
    The folder of each class, called like the class as far as a folder can be. What its name must not hold becomes `%2F` and the like,
    a long name is cut, and classes that a file system could take for the same get their number.

    Args:
        names (`Mapping[int, str]`): Names by number; a class without a name is called by its number.
        num_classes (`int`): Number of classes.
    """
    wanted = [_folder_name(names.get(number, "").strip()) or str(number) for number in range(num_classes)]
    counts = Counter(
        map(_compared, [*wanted, SETTINGS, METADATA, *SPLITS])
    )  # folders called like splits would be read as such
    found = [name if counts[_compared(name)] == 1 else f"{name} ({number})" for number, name in enumerate(wanted)]
    return found if len(set(map(_compared, found))) == num_classes else list(map(str, range(num_classes)))


def suffix_of(channels: int | None, value_range: Sequence[float] | None) -> str:
    r"""
    How images are stored: `.png` for pictures of 8 bits (gray, RGB, RGBA) and gray ones of 16, `.npy` for other numbers and channels.

    Args:
        channels (`int` or `None`): Channels of an image; None if they are not known, as for a pipeline without an autoencoder.
        value_range (pair of `float`, *optional*): That of the pipeline.
    """
    if value_range is None:
        return ".png" if channels in (None, 1, 3, 4) else ".npy"
    return ".png" if (channels, list(value_range)) in ((1, RANGES["16-bit"]), (4, RANGES["8-bit"])) else ".npy"


def encode(image: torch.Tensor, suffix: str, value_range: Sequence[float] | None) -> bytes:
    r"""
    The file of an image.

    Args:
        image (`torch.Tensor` of shape `(C, H, W)`): In [0, 1].
        suffix (`str`): As of [`suffix_of`]. A `.npy` holds float32 `(H, W, C)` in the values of the training images.
        value_range (pair of `float`, *optional*): That of the pipeline.
    """
    pixels, buffer = image.float().cpu().permute(1, 2, 0).numpy(), io.BytesIO()
    if suffix == ".npy":
        low, high = value_range or (0.0, 1.0)
        np.save(buffer, pixels * (high - low) + low)
        return buffer.getvalue()
    depth = np.uint16 if value_range is not None and list(value_range) == RANGES["16-bit"] else np.uint8
    levels = (pixels * np.iinfo(depth).max).round().astype(depth)
    Image.fromarray(levels[..., 0] if levels.shape[2] == 1 else levels).save(buffer, "png")
    return buffer.getvalue()


def _read_settings(path: Path) -> dict[str, Any] | None:
    """The settings of a folder; None if it has none yet."""
    if not path.exists():
        return None
    try:
        kept = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, ValueError) as error:
        raise UserError(f"{path} is damaged ({one_line(error, 200)}). Give another `output_dir`.") from None
    if not isinstance(kept, dict):
        raise UserError(f"{path} is damaged: it holds no settings. Give another `output_dir`.")
    return kept


def _differences(kept: dict[str, Any], settings: dict[str, Any]) -> Iterator[str]:
    """What the kept settings have that the others have not, in words."""
    for name in {**kept, **settings}:
        value = kept.get(name)
        if name in _OF_ONE_RUN or value == settings.get(name):
            continue
        if name == "guidance_interval" and value is not None:
            yield f"`{name}` {value[0]:g} {value[1]:g}"  # as the flag has it
        elif name in _IN_WORDS or isinstance(value, dict | list):
            yield _IN_WORDS.get(name, f"other `{name}`")
        else:
            yield f"no `{name}`" if value is None else f"`{name}` {value}"


def _folder_name(name: str) -> str:
    """A name as the name of a folder, empty for an empty one."""
    kept = "".join(
        each if each.isprintable() and each not in _NOT_IN_NAMES else quote(each, safe="", errors="replace")
        for each in name
    )
    if kept.startswith(UNSEEN):
        kept = f"%{ord(kept[0]):02X}{kept[1:]}"
    return kept.encode()[:_MAX_NAME_BYTES].decode(errors="ignore").strip()


def _compared(name: str) -> str:
    return class_name(name).casefold()
