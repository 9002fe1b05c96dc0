"""Images that are more than 8-bit pictures: 16-bit and float files, NumPy arrays, any number of channels."""

import io
import json
import warnings
from pathlib import Path
from typing import Any, Literal

import datasets
import numpy as np
import torch
import torch.nn.functional as F
from huggingface_hub import hf_hub_download
from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError, HFValidationError
from PIL import Image

from dae_diffusers.cli import UserError

_NPY_MAGIC = b"\x93NUMPY"
_RANGE_FILE = "preprocessor_config.json"

Depth = Literal["8-bit", "16-bit", "numbers"]
# Lowest and highest value where the depth says them; of numbers they must be measured or given.
RANGES: dict[Depth, list[float]] = {"8-bit": [0.0, 255.0], "16-bit": [0.0, 65535.0]}


def find_depth(content: Any) -> Depth:
    r"""
    What a row's image holds: pixels of 8 or 16 bits, or numbers of any size, as nested lists, `.npy` and float files do.

    Raises:
        Exception: Whatever Pillow raises for data that it cannot read.
    """
    if not isinstance(content, bytes) or content.startswith(_NPY_MAGIC):
        return "numbers"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        mode = Image.open(io.BytesIO(content)).mode
    return "numbers" if mode == "F" else "16-bit" if mode.startswith("I") else "8-bit"


def decode_array(item: Any, *, channels: int) -> np.ndarray:
    r"""
    Reads an image without losing precision.

    Args:
        item: The bytes of an image file (Pillow's, or `.npy`, never a pickle), or nested lists or an array.
        channels (`int`): That the image must have.

    Returns:
        `np.ndarray` of shape `(H, W, channels)`: float32, in the values of the file.

    Raises:
        ValueError: For other shapes, dtypes that are no numbers, and values that are not finite.
    """
    if isinstance(item, bytes) and item.startswith(_NPY_MAGIC):
        array = np.load(io.BytesIO(item), allow_pickle=False)
    elif isinstance(item, bytes):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            array = np.asarray(Image.open(io.BytesIO(item)))
    else:
        array = np.asarray(item)
    if array.dtype.kind not in "uif":
        raise ValueError(f"it holds {array.dtype}, not numbers")
    if array.ndim == 2:
        array = array[..., None]
    if array.ndim == 3 and array.shape[-1] != channels and array.shape[0] == channels:
        array = array.transpose(1, 2, 0)
    if array.ndim != 3 or array.shape[-1] != channels or 0 in array.shape:
        raise ValueError(f"it has the shape {array.shape}, but must be (H, W, {channels}) or ({channels}, H, W)")
    array = array.astype(np.float32)
    if not np.isfinite(array).all():
        raise ValueError("it holds NaN or infinite values")
    return array


def resize_and_crop_array(
    array: np.ndarray, resolution: int, *, random: np.random.Generator | None = None
) -> np.ndarray:
    r"""
    Scales the shorter side to `resolution`, bicubically with antialiasing, and crops a square. Overshoots are cut to the
    image's range.

    Args:
        array (`np.ndarray` of shape `(H, W, C)`): float32.
        resolution (`int`): Side of the result, in pixels.
        random (`numpy.random.Generator`, *optional*): Chooses the place of the crop; without it, the centre.

    Returns:
        `np.ndarray` of shape `(resolution, resolution, C)`
    """
    image = torch.from_numpy(array).permute(2, 0, 1)[None]
    sides = image.shape[2:]
    size = [max(resolution, round(side * resolution / min(sides))) for side in sides]
    if list(sides) != size:
        low, high = image.min(), image.max()
        image = F.interpolate(image, size=size, mode="bicubic", antialias=True, align_corners=False).clamp(low, high)
    top, left = (
        (side - resolution) // 2 if random is None else int(random.integers(side - resolution + 1)) for side in size
    )
    return image[0, :, top : top + resolution, left : left + resolution].permute(1, 2, 0).numpy()


def load_array_folder(folder: Path) -> dict[str, datasets.Dataset] | None:
    r"""
    A folder of `.npy` files, laid out as `imagefolder` has it: sub-folders are classes; `train`, `validation` and `test` at
    the top are splits. None if the folder holds none.
    """
    paths = sorted(folder.rglob("*.npy"))
    if not paths:
        return None
    by_split: dict[str, list[Path]] = {}
    for path in paths:
        parts = path.relative_to(folder).parts
        split = parts[0] if len(parts) > 1 and parts[0] in ("train", "validation", "val", "test") else "train"
        by_split.setdefault(split, []).append(path)
    roots = {split: folder / split if split != "train" or (folder / "train").is_dir() else folder for split in by_split}
    names = {path: "/".join(path.relative_to(roots[split]).parts[:-1]) for split, ps in by_split.items() for path in ps}
    classes = sorted(set(names.values()) - {""})
    features = {"image": datasets.Image(decode=False)}
    if classes and "" not in names.values():
        features["label"] = datasets.ClassLabel(names=classes)
    result = {}
    for split, split_paths in by_split.items():
        columns = {"image": [{"bytes": None, "path": str(path)} for path in split_paths]}
        if "label" in features:
            columns["label"] = [classes.index(names[path]) for path in split_paths]
        result[split] = datasets.Dataset.from_dict(columns, features=datasets.Features(features))
    return result


def save_value_range(value_range: list[float], folder: Path) -> None:
    r"""Writes the range of the original values beside an autoencoder, unless they are ordinary 8-bit ones (empty)."""
    if value_range:
        (folder / _RANGE_FILE).write_text(json.dumps({"value_range": list(value_range)}) + "\n")


def read_value_range(name_or_path: str | None) -> list[float] | None:
    r"""
    The range that [`save_value_range`] left beside an autoencoder, or that its pipeline has; None without one.

    Args:
        name_or_path (`str` or `None`): Folder or Hub id of an autoencoder, or of what has one in `vae/` or `stage1/`.

    Raises:
        UserError: If a file is damaged.
    """
    if name_or_path is None:
        return None
    for name in (_RANGE_FILE, f"vae/{_RANGE_FILE}", f"stage1/{_RANGE_FILE}", "model_index.json"):
        path = _find_file(name_or_path, name)
        if path is None:
            continue
        try:
            value_range = json.loads(path.read_text()).get("value_range")
            if value_range is not None:
                return [float(value) for value in value_range]
        except (ValueError, TypeError, AttributeError) as error:
            raise UserError(
                f"{path} is damaged ({error}). Pass `--value_range LOW HIGH` and remove the file."
            ) from None
    return None


def _find_file(name_or_path: str, name: str) -> Path | None:
    path = Path(name_or_path) / name
    if Path(name_or_path).is_dir():
        return path if path.is_file() else None
    try:
        return Path(hf_hub_download(name_or_path, name))
    except (HFValidationError, HfHubHTTPError, EntryNotFoundError):  # no Hub id, nothing there, or offline
        return None
