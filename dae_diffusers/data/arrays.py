"""Images that are more than 8-bit pictures: 16-bit and float files, NumPy arrays, any number of channels."""

import contextlib
import io
import json
import math
import re
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image

from dae_diffusers.data.formats import decode_picture, open_picture, precisions
from dae_diffusers.errors import UserError
from dae_diffusers.repository_files import find_file
from dae_diffusers.sizes import height_and_width
from dae_diffusers.store import write_atomically

NPY_MAGIC = b"\x93NUMPY"
_RANGE_FILE = "preprocessor_config.json"
MAX_VALUES = 2**28  # of one array: 1 GiB as float32, 16384 x 16384 pixels with one channel
# An image longer than this many times its width is cut before it is scaled: enlarging all of it could take gigabytes.
MAX_ELONGATION = 8

Depth = Literal["8-bit", "16-bit", "numbers"]
# Lowest and highest value, if the depth implies them; for other numbers they must be measured or given.
RANGES: dict[Depth, list[float]] = {"8-bit": [0.0, 255.0], "16-bit": [0.0, 65535.0]}


class LossyDepthError(ValueError):
    """A file of which Pillow would read only some of the bits."""


@contextlib.contextmanager
def without_warnings() -> Iterator[None]:
    r"""
    Hides Pillow's warnings about odd EXIF data and palettes; decompression bombs still raise. Warning filters belong to the process
    and must not change in threads. So use this around a pool, in the thread that starts it, not in the pool's functions.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def find_depth(content: Any) -> Depth:
    r"""
    Finds what a row's image holds: pixels of 8 or 16 bits, or numbers of any size (nested lists, `.npy`, and files of floats,
    signed or 32-bit integers).

    Raises:
        LossyDepthError: For several channels of more than 8 bits each, of which Pillow keeps 8.
        Exception: Whatever Pillow raises for data that it cannot read.
    """
    if not isinstance(content, bytes) or content.startswith(NPY_MAGIC):
        return "numbers"
    image = open_picture(content)
    refuse_signed(image, content)
    if _is_cut(image, content):
        raise LossyDepthError(
            "it has more than 8 bits in each channel, but Pillow keeps only 8; save it as `.npy`, (H, W, channels)"
        )
    return find_picture_depth(image)


def refuse_signed(image: Image.Image, content: bytes) -> None:
    r"""
    Raises:
        LossyDepthError: For an opened file of signed numbers that Pillow takes for unsigned ones.
    """
    bits, is_signed = precisions(image, content)
    if is_signed and find_picture_depth(image) != "numbers":
        raise LossyDepthError(
            f"it holds signed {bits}-bit numbers, which Pillow reads as unsigned ones; save it as `.npy`, (H, W, channels)"
        )


# Pictures of 8 bits that are read as RGBA where images have four channels.
_OTHER_THAN_RGBA = ("1", "L", "LA", "La", "P", "PA", "RGB", "RGBa")


def find_picture_depth(image: Image.Image) -> Depth:
    r"""The depth of a file that Pillow has opened, as far as Pillow preserves it."""
    # "I" is any integer but in formats that have unsigned ones only, which older versions of Pillow open so.
    if image.mode == "F" or (image.mode == "I" and image.format not in ("PNG", "PPM")):
        return "numbers"
    return "16-bit" if image.mode.startswith("I") else "8-bit"


def decode_array(item: Any, *, channels: int) -> np.ndarray:
    r"""
    Reads an image without losing precision. EXIF rotation is applied. With four channels, pictures of 8 bits are read as RGBA. What is
    wholly transparent becomes white.

    Args:
        item: The bytes of an image file (Pillow's, or `.npy`, never a pickle), or nested lists or an array.
        channels (`int`): Number of channels that the image must have.

    Returns:
        `np.ndarray` of shape `(H, W, channels)`: float32, in the values of the file.

    Raises:
        ValueError: For other shapes, dtypes that are not numeric, and values that are not finite.
    """
    if isinstance(item, bytes) and item.startswith(NPY_MAGIC):
        array = load_npy(item)
    elif isinstance(item, bytes):
        image = open_picture(item)
        if image.mode == "CMYK":  # four channels, as RGBA has
            raise ValueError(
                "its four channels are CMYK; save it as RGB or RGBA, or as `.npy` to keep them as they are"
            )
        is_unsigned = "I;32N" in str(image.tile[:1])  # which Pillow's mode "I" is not
        has_bands = image.format == "TIFF"  # its fourth channel may be any, such as near infrared
        image = decode_picture(image)
        if channels == 4 and image.mode in _OTHER_THAN_RGBA:
            image = image.convert("RGBA")
        array = np.asarray(image)
        if image.mode == "RGBA" and not has_bands:  # colours that nobody sees are nothing to learn
            array = np.where(array[..., 3:] > 0, array, np.array((255, 255, 255, 0), np.uint8))
        array = array.view(np.uint32) if is_unsigned else array
    else:
        array = np.asarray(item)
    if array.dtype.kind not in "uif":
        raise ValueError(f"it holds {array.dtype}, not numbers")
    if array.ndim == 2:
        array = array[..., None]
    if array.ndim == 3 and array.shape[-1] != channels and array.shape[0] == channels:
        array = array.transpose(1, 2, 0)
    if array.ndim != 3 or array.shape[-1] != channels or 0 in array.shape:
        is_gray = array.ndim == 3 and 1 in (array.shape[0], array.shape[-1])
        hint = "; if all images are gray, give `image_channels 1`" if is_gray else ""
        raise ValueError(f"it has the shape {array.shape}, but must be (H, W, {channels}) or ({channels}, H, W){hint}")
    array = array.astype(np.float32)
    if not np.isfinite(array).all():
        raise ValueError("it holds NaN or infinite values")
    return array


def resize_and_crop_array(
    array: np.ndarray,
    size: int | tuple[int, int],
    *,
    random: np.random.Generator | None = None,
    nearest: bool = False,
    halve: bool = False,
) -> np.ndarray:
    r"""
    Scales an image until it just covers `size`, bicubically with antialiasing, and crops what is over. Overshoots are clipped to the
    image's range.

    Args:
        array (`np.ndarray` of shape `(H, W, C)`): float32.
        size (`int` or pair): Height and width of the result, in pixels; a number for a square.
        random (`numpy.random.Generator`, *optional*): Chooses the position of the crop; default: the centre.
        nearest (`bool`, *optional*): Scale by nearest neighbour instead, which mixes no values.
        halve (`bool`, *optional*): Choose the size before the crop as for images that are halved first.

    Returns:
        `np.ndarray` of shape `(*size, C)`
    """
    size = height_and_width(size)
    array, is_placed = cut_elongated(array, array.shape[1::-1], size, random)
    random = None if is_placed else random
    image = torch.from_numpy(array).permute(2, 0, 1)[None]
    sides = image.shape[2:]
    scaled = covering(array.shape[1::-1], size, halve=halve)[::-1]
    if tuple(sides) != scaled:
        image = scaled_array(image, scaled, nearest=nearest)
    spare = [side - wanted for side, wanted in zip(scaled, size, strict=True)]
    top, left = (each // 2 if random is None else int(random.integers(each + 1)) for each in spare)
    return image[0, :, top : top + size[0], left : left + size[1]].permute(1, 2, 0).numpy()


def resize_and_pad_array(
    array: np.ndarray, size: tuple[int, int], fill: float | None, *, nearest: bool = False, halve: bool = False
) -> np.ndarray:
    r"""
    Scales an image until it just fits into `size`, bicubically with antialiasing, and pads it on both sides.

    Args:
        array (`np.ndarray` of shape `(H, W, C)`): float32.
        size (`tuple[int, int]`): Height and width of the result, in pixels.
        fill (`float`, *optional*): What it is padded with; None: the pixels of its edge.
        nearest (`bool`, *optional*): Scale by nearest neighbour instead, which mixes no values.
        halve (`bool`, *optional*): Ignored; as in [`resize_and_crop_array`].

    Returns:
        `np.ndarray` of shape `(*size, C)`
    """
    scaled = contained(array.shape[1::-1], size)[::-1]
    if array.shape[:2] != scaled:
        image = torch.from_numpy(np.ascontiguousarray(array)).permute(2, 0, 1)[None]
        array = scaled_array(image, scaled, nearest=nearest)[0].permute(1, 2, 0).numpy()
    return padded(array, size, fill)


def padded(pixels: np.ndarray, size: tuple[int, int], fill: float | None) -> np.ndarray:
    r"""Pixels `(h, w, C)` in the middle of `(*size, C)`, surrounded by `fill`, or by their edge if that is None."""
    spare = [wanted - side for side, wanted in zip(pixels.shape, size, strict=False)]
    around = [*((each // 2, each - each // 2) for each in spare), (0, 0)]
    return np.pad(pixels, around, mode="edge") if fill is None else np.pad(pixels, around, constant_values=fill)


def contained(image_size: Sequence[int], size: tuple[int, int]) -> tuple[int, int]:
    r"""Width and height of an image of `image_size` (width, height) that just fits into `size` (height, width)."""
    scale = min(wanted / side for side, wanted in zip(image_size, size[::-1], strict=True))
    width, height = (
        min(wanted, max(1, round(side * scale))) for side, wanted in zip(image_size, size[::-1], strict=True)
    )
    return width, height


def covering(image_size: Sequence[int], size: tuple[int, int], *, halve: bool) -> tuple[int, int]:
    r"""Width and height of an image of `image_size` (width, height) that just covers `size` (height, width), perhaps after halving it."""
    width, height = image_size
    while halve and width >= 2 * size[1] and height >= 2 * size[0]:
        width, height = width // 2, height // 2
    scale = max(size[1] / width, size[0] / height)
    return max(size[1], round(width * scale)), max(size[0], round(height * scale))


def scaled_array(image: torch.Tensor, size: Sequence[int], *, nearest: bool = False) -> torch.Tensor:
    r"""`(B, C, H, W)` in another size, bicubically with antialiasing and clipped to the image's range, or by nearest neighbour."""
    if nearest:
        return F.interpolate(image, size=size, mode="nearest-exact")
    low, high = image.min(), image.max()
    return F.interpolate(image, size=size, mode="bicubic", antialias=True, align_corners=False).clamp(low, high)


def cut_elongated(
    image: Any, image_size: tuple[int, int], size: tuple[int, int], random: np.random.Generator | None
) -> tuple[Any, bool]:
    r"""
    Cuts the largest box with the proportions of `size` out of an image that is more than `MAX_ELONGATION` times as long.

    Args:
        image (`PIL.Image.Image` or `np.ndarray`): The image; one that is less elongated is returned as it is.
        image_size (`tuple[int, int]`): Its width and height.
        size (`tuple[int, int]`): Height and width that it is scaled to.
        random (`numpy.random.Generator` or `None`): Chooses the position; None: the centre.

    Returns:
        The image, and whether it was cut.
    """
    wanted = size[::-1]
    shares = [side / each for side, each in zip(image_size, wanted, strict=True)]
    if max(shares) <= MAX_ELONGATION * min(shares):
        return image, False
    box = [max(1, round(each * min(shares))) for each in wanted]
    spare = [side - each for side, each in zip(image_size, box, strict=True)]
    left, top = (each // 2 if random is None else int(random.integers(each + 1)) for each in spare)
    if isinstance(image, np.ndarray):
        return np.ascontiguousarray(image[top : top + box[1], left : left + box[0]]), True
    return image.crop((left, top, left + box[0], top + box[1])), True


def save_value_range(value_range: list[float] | None, folder: Path) -> None:
    r"""Writes the range of the original values beside an autoencoder. 8-bit values have none: that of an earlier run goes."""
    if value_range:
        write_atomically(folder / _RANGE_FILE, json.dumps({"value_range": list(value_range)}) + "\n")
    else:
        (folder / _RANGE_FILE).unlink(missing_ok=True)


def read_value_range(name_or_path: str | None) -> list[float] | None:
    r"""
    The range that [`save_value_range`] wrote beside an autoencoder, or that its pipeline has; None if there is none.

    Args:
        name_or_path (`str` or `None`): Folder or Hub id of an autoencoder, or of a folder that has one in `vae/` or `stage1/`; also the
            folder `vae` of a pipeline.

    Raises:
        UserError: If a file is damaged.
    """
    if name_or_path is None:
        return None
    places = ("", "vae/", "stage1/")  # the first with an autoencoder counts: others may be left of an earlier run
    place = next((each for each in places if find_file(name_or_path, f"{each}config.json")), "")
    folder = Path(name_or_path)
    around = folder.absolute().parent / "model_index.json" if folder.is_dir() and folder.name == "vae" else None
    for path in (*(find_file(name_or_path, name) for name in ("model_index.json", f"{place}{_RANGE_FILE}")), around):
        if path is None or not path.exists():
            continue
        try:
            value_range = json.loads(path.read_text()).get("value_range")
            if value_range is not None:
                return [float(value) for value in value_range]
        except (ValueError, TypeError, AttributeError) as error:
            raise UserError(f"{path} is damaged ({error}). Pass `value_range LOW HIGH` and remove the file.") from None
    return None


def load_npy(content: bytes) -> np.ndarray:
    r"""Like `numpy.load`, but does not allocate memory for a size that the file only claims to have."""
    file = io.BytesIO(content)
    version = np.lib.format.read_magic(file)
    read_header = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
    shape, is_fortran, dtype = read_header(file)
    if dtype.kind not in "uif":
        raise ValueError(f"it holds {dtype}, not numbers")
    count, start = math.prod(shape), file.tell()
    if count > MAX_VALUES:
        raise ValueError(f"it has the shape {shape}: {count} values, but an image may have at most {MAX_VALUES}")
    if count * dtype.itemsize > len(content) - start:
        raise ValueError(
            f"it has the shape {shape}, which needs {count * dtype.itemsize} bytes, but only {len(content) - start} are there"
        )
    array = np.frombuffer(content, dtype, count, start)
    return array.reshape(shape[::-1]).T if is_fortran else array.reshape(shape)


def _is_cut(image: Image.Image, content: bytes) -> bool:
    """Whether Pillow keeps only 8 bits of a deeper channel. Its mode looks like 8 bits then, so the file's header decides."""
    if image.mode.startswith("I") or image.mode == "F" or not image.tile:
        return False
    codec, _, _, arguments = image.tile[0]
    if codec.startswith("ppm") and isinstance(arguments, tuple):
        return arguments[1] > 255  # the highest value
    bits, _ = precisions(image, content)
    return bits > 8 or re.search(";16[BLN]", str(arguments)) is not None  # "RGB;16B"; "BGR;16" is 5 + 6 + 5
