"""Turns the bytes of an image file into pixels of the wanted height and width."""

import logging
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Literal

import numpy as np
import torch
from PIL import ExifTags, Image

from dae_diffusers.data.arrays import (
    RANGES,
    Depth,
    LossyDepthError,
    contained,
    covering,
    cut_elongated,
    decode_array,
    find_depth,
    find_picture_depth,
    padded,
    refuse_signed,
    resize_and_crop_array,
    resize_and_pad_array,
    without_warnings,
)
from dae_diffusers.data.configuration import EMBEDDED, DataConfig
from dae_diffusers.data.contents import Root, name_of_row, read_content
from dae_diffusers.data.formats import decode_picture, open_picture
from dae_diffusers.errors import UserError, one_line
from dae_diffusers.sizes import height_and_width, words_of_size

logger = logging.getLogger(__name__)


class ImageReader:
    r"""
    Turns rows into squares of pixels, and batches of those into `pixel_values`, as the flags say.

    Args:
        config ([`DataConfig`]): Resolution, channels, crops, flips and range of values.
        depth (`str` or `None`): Depth of the first image; None if it cannot be read.
        value_range (`list[float]`, *optional*): Lowest and highest value; default: that of the settings, if given.
        root ([`Root`], *optional*): Folder in which files must lie.

    Attributes:
        is_array (`bool`): Whether images are read as arrays of floats rather than as 8-bit pictures.
        value_range (`list[float]` or `None`): The values that are mapped to -1 and 1. None for 8-bit pictures, and for arrays
            until it has been measured.
    """

    def __init__(
        self,
        config: DataConfig,
        depth: Depth | None,
        *,
        value_range: list[float] | None = None,
        root: Root | None = None,
    ):
        self.config = config
        self.depth = depth
        self.root = root
        self.value_range = list(value_range or config.value_range) or None
        self.is_array = (
            self.value_range is not None or config.image_channels not in (1, 3) or depth in ("16-bit", "numbers")
        )
        self._warned_small = self._warned_dark = False

    def read(
        self, item: Any, name: Callable[[], str], draw: int | None = None, size: tuple[int, int] | None = None
    ) -> np.ndarray:
        r"""
        Args:
            item: A row's image: `{"bytes", "path"}`, or nested lists.
            name (`Callable`): Returns the image's name, for an error.
            draw (`int`, *optional*): Seeds the crop; default: the centre.
            size (`tuple[int, int]`, *optional*): Height and width; default: those of the settings.

        Returns:
            `np.ndarray` of shape `(height, width, C)`: uint8, or float32 for arrays; not flipped.

        Raises:
            UserError: If it cannot be decoded or is too small.
        """
        return self.fit(self.decode(item, name), name, draw, size)

    def fit(
        self,
        image: np.ndarray | Image.Image,
        name: Callable[[], str],
        draw: int | None = None,
        size: tuple[int, int] | None = None,
        **scaling: bool,
    ) -> np.ndarray:
        r"""Scales and crops what [`decode`] gives; arguments, result and errors as in [`read`], `scaling` as in [`resize_and_crop`]."""
        size = size or self.config.size
        random = np.random.default_rng(draw) if draw is not None and self.config.crops_at_random else None
        width, height = image.shape[1::-1] if self.is_array else image.size
        self._check_size(width, height, name, size)
        if random is not None and self.config.random_resized_crop is not None:
            box = random_box(width, height, size, self.config.random_resized_crop, random)
            left, top, right, bottom = box
            image = image[top:bottom, left:right] if self.is_array else image.crop(box)
        if self.config.pad is not None:
            pad = resize_and_pad_array if self.is_array else resize_and_pad
            pixels = pad(image, size, self._padding(image), **scaling)
        else:
            resize = resize_and_crop_array if self.is_array else resize_and_crop
            pixels = np.asarray(resize(image, size, random=random, **scaling))
        return pixels.reshape(*size, self.config.image_channels)

    def _padding(self, image: np.ndarray | Image.Image) -> float | None:
        """The value that an image is padded with; None for its edge. Of arrays whose range is unknown, the image's own bounds."""
        if self.config.pad == "edge":
            return None
        bounds = (0, 255)
        if self.is_array:
            bounds = self.value_range or (float(image.min()), float(image.max()))
        return bounds[1] if self.config.pad == "white" else bounds[0]

    def size_of(self, item: Any, name: Callable[[], str]) -> tuple[int, int]:
        r"""Height and width of a whole image; of a picture only the file's header is read. Arguments and errors as in [`read`]."""
        if not self.is_array:
            try:
                return _upright_size(open_picture(read_content(item, self.root)))
            except Exception:  # decoding says what is wrong
                pass
        image = self.decode(item, name)
        return image.shape[:2] if self.is_array else image.size[::-1]

    def decode(self, item: Any, name: Callable[[], str]) -> np.ndarray | Image.Image:
        r"""Reads the whole image, `(H, W, C)` float32, if it is an array; otherwise like [`read`]."""
        try:
            content, channels = read_content(item, self.root), self.config.image_channels
            if self.is_array:
                return self._decode_array(content, channels=channels)
            return decode_image(content, channels=channels, on_16_bits=lambda highest: self._warn_dark(highest, name))
        except Exception as error:  # Pillow's plugins raise OSError, SyntaxError, ValueError, struct.error and more
            reason = one_line(error) or type(error).__name__
            if isinstance(error, MemoryError):
                reason = f"it does not fit into memory: {reason}"
            advice = (
                " Remove or replace it, or pass `on_bad_image skip`." if self.config.on_bad_image == "raise" else ""
            )
            raise UserError(f"the image {name()} cannot be decoded ({reason}).{advice}") from None

    def whole(self, item: Any, name: Callable[[], str]) -> np.ndarray:
        r"""The whole image, neither scaled nor cropped, `(H, W, C)` float32 in [-1, 1]; arguments and errors as in [`read`]."""
        pixels = np.array(self.decode(item, name))
        pixels = pixels if pixels.ndim == 3 else pixels[..., None]
        return self.to_pixel_values(pixels[None], [None])[0].permute(1, 2, 0).numpy()

    def to_pixel_values(self, pixels: np.ndarray, draws: Sequence[int | None]) -> torch.Tensor:
        r"""
        Args:
            pixels (`np.ndarray` of shape `(B, height, width, C)`): As [`read`] gives them; may be changed.
            draws (`Sequence[int | None]`): An image with an odd draw is flipped, if `random_flip` is set. The next bit flips it
                vertically, and two more turn it, if the config says so.

        Returns:
            `torch.Tensor` of shape `(B, C, height, width)`: float32 in [-1, 1].
        """
        flips = [self.config.random_flip and is_flipped(draw) for draw in draws]
        if any(flips):
            pixels[flips] = pixels[flips][:, :, ::-1]
        if self.config.random_vertical_flip:
            flips = [draw is not None and draw >> 1 & 1 == 1 for draw in draws]
            pixels[flips] = pixels[flips][:, ::-1]
        if self.config.random_quarter_turn:
            turns = np.array([0 if draw is None else draw >> 2 & 3 for draw in draws])
            for number in (1, 2, 3):
                pixels[turns == number] = np.rot90(pixels[turns == number], number, axes=(1, 2))
        low, high = self.value_range or (0.0, 255.0)
        pixel_values = (
            torch.from_numpy(pixels).permute(0, 3, 1, 2).to(torch.float32, memory_format=torch.contiguous_format)
        )
        return pixel_values.sub_(low).mul_(2 / (high - low)).sub_(1).clamp_(-1, 1)

    def _decode_array(self, content: Any, *, channels: int) -> np.ndarray:
        """Decodes an array in the scale of the first image: if white is 65535 there, it is so for an 8-bit picture too."""
        depth, has_full_range = find_depth(content), self.value_range == RANGES["16-bit"]
        is_picture = depth == "8-bit" and channels in (1, 3)
        if self.depth not in (None, depth) and not (has_full_range and (is_picture or depth == "16-bit")):
            raise ValueError(f"it holds {depth} pixels, unlike the first image, which holds {self.depth} ones")
        if depth == "16-bit" and channels == 3:  # gray, as Pillow reads no others; 8-bit gray is made RGB too
            return decode_array(content, channels=1).repeat(3, axis=-1)
        if not is_picture:
            return decode_array(content, channels=channels)
        image = np.asarray(decode_image(content, channels=channels), dtype=np.float32)
        return image.reshape(*image.shape[:2], channels) * (257 if has_full_range else 1)

    def _warn_dark(self, highest: int, name: Callable[[], str]) -> None:
        """Warns about dark 16-bit files among 8-bit ones: their values are divided by 257."""
        if 0 < highest < 4096 and not self._warned_dark:
            self._warned_dark = True
            logger.warning(
                "the image %s has 16 bits but no value above %d: it looks nearly black beside 8-bit pictures, and so does any other "
                "such image. Save all with the same range, or keep each kind in its own folder and set `--value_range` for it.",
                name(),
                highest,
            )

    def _check_size(self, width: int, height: int, name: Callable[[], str], size: tuple[int, int]) -> None:
        least_height, least_width = size
        if (height >= least_height and width >= least_width) or self.config.dataset_name in EMBEDDED:
            return
        if not self.config.strict_size and self._warned_small:
            return
        seen = f"the image {name()} has {width}x{height} pixels"
        shown = least_height if least_height == least_width else words_of_size(size)
        if self.config.strict_size:
            raise UserError(
                f"{seen}, fewer than `resolution` {shown}. Remove it, lower the resolution, or drop "
                "`strict_size` to enlarge it."
            )
        self._warned_small = True
        logger.warning("%s: enlarged to %s, as are all smaller images.", seen, shown)


def _upright_size(image: Image.Image) -> tuple[int, int]:
    """Height and width of an opened picture after its EXIF rotation. Some versions of Pillow turn the size of a TIFF by themselves."""
    stored = getattr(image, "tag_v2", {})
    width = stored.get(ExifTags.Base.ImageWidth, image.width)
    height = stored.get(ExifTags.Base.ImageLength, image.height)
    is_turned = image.getexif().get(ExifTags.Base.Orientation) in (5, 6, 7, 8)
    return (width, height) if is_turned else (height, width)


def split_items(items: Sequence[int | tuple[int, int]]) -> tuple[list[int], list[int | None]]:
    r"""The indices and draws of a batch's items, which are indices or pairs of index and draw; without a draw it is None."""
    pairs = [item if isinstance(item, tuple) else (item, None) for item in items]
    return [index for index, _ in pairs], [draw for _, draw in pairs]


def is_flipped(draw: int | None) -> bool:
    r"""Whether a draw flips its image; without one it is not flipped. Images and cached latents follow the same rule."""
    return draw is not None and draw % 2 == 1


def decode_image(
    data: bytes, *, channels: Literal[1, 3] = 3, on_16_bits: Callable[[int], None] | None = None
) -> Image.Image:
    r"""
    Decodes an image file to 8-bit RGB (`channels=3`) or grayscale (`channels=1`).

    EXIF rotation is applied. Of an animation, the first frame is used. Transparent pixels are put on white. Pillow converts CMYK,
    palette and other modes, and 16 bits to 8 (then `on_16_bits` is called with the highest value). Data sets of
    16-bit or float files go through `dae_diffusers.data.arrays` instead.

    Raises:
        Exception: Whatever Pillow raises for data that it cannot read.
        ValueError: For float, signed and 32-bit images.
    """
    image = open_picture(data)
    if find_picture_depth(image) == "numbers":
        raise ValueError("it has float, signed or 32-bit pixels, unlike the first image")
    refuse_signed(image, data)
    image = decode_picture(image)
    if image.mode.startswith("I"):
        values = np.asarray(image).clip(0, 65535)
        if on_16_bits is not None:
            on_16_bits(int(values.max()))
        image = Image.fromarray(np.rint(values / 257).astype(np.uint8))
    if image.mode in ("RGBA", "LA", "PA", "RGBa", "La") or "transparency" in image.info:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB" if channels == 3 else "L")


def resize_and_crop(
    image: Image.Image,
    size: int | tuple[int, int],
    *,
    random: np.random.Generator | None = None,
    nearest: bool = False,
    halve: bool = True,
) -> Image.Image:
    r"""
    Scales an image until it just covers `size`, and crops what is over.

    Large images are first halved by box filtering while they are at least twice as large, then scaled bicubically, as
    in ADM's preprocessing, to avoid aliasing. Very long images are cut first.

    Args:
        image (`PIL.Image.Image`): An image of any size.
        size (`int` or pair): Height and width of the result, in pixels; a number for a square.
        random (`numpy.random.Generator`, *optional*): Chooses the position of the crop; default: the centre.
        nearest (`bool`, *optional*): Scale by nearest neighbour instead, which mixes no values.
        halve (`bool`, *optional*): Whether large images are halved first.

    Source: Dhariwal and Nichol, 2021, https://huggingface.co/papers/2105.05233.
    """
    size = height, width = height_and_width(size)
    image, is_placed = cut_elongated(image, image.size, size, random)
    random = None if is_placed else random
    scaled = covering(image.size, size, halve=halve)
    image = _scaled(image, scaled, (width, height), nearest=nearest, halve=halve)
    spare = (image.width - width, image.height - height)
    left, top = (x // 2 for x in spare) if random is None else (int(random.integers(x + 1)) for x in spare)
    return image.crop((left, top, left + width, top + height))


def resize_and_pad(
    image: Image.Image, size: tuple[int, int], fill: int | None, *, nearest: bool = False, halve: bool = True
) -> np.ndarray:
    r"""
    Scales an image until it just fits into `size`, as [`resize_and_crop`] scales, and pads it on both sides.

    Args:
        image (`PIL.Image.Image`): An image of any size.
        size (`tuple[int, int]`): Height and width of the result, in pixels.
        fill (`int`, *optional*): What it is padded with; None: the pixels of its edge.
        nearest, halve: As in [`resize_and_crop`].

    Returns:
        `np.ndarray` of shape `(*size, C)`: uint8.
    """
    width, height = contained(image.size, size)
    image = _scaled(image, (width, height), (width, height), nearest=nearest, halve=halve)
    return padded(np.asarray(image).reshape(height, width, -1), size, fill)


def _scaled(
    image: Image.Image, to: tuple[int, int], least: tuple[int, int], *, nearest: bool, halve: bool
) -> Image.Image:
    """The image in another width and height, after halving it while it keeps at least so many pixels."""
    while halve and not nearest and image.width >= 2 * least[0] and image.height >= 2 * least[1]:
        image = image.resize((image.width // 2, image.height // 2), Image.Resampling.BOX)
    return image.resize(to, Image.Resampling.NEAREST if nearest else Image.Resampling.BICUBIC)


def random_box(
    width: int, height: int, size: tuple[int, int], min_area: float, random: np.random.Generator
) -> tuple[int, int, int, int]:
    r"""
    Draws left, top, right and bottom of a box with the proportions of `size` (height and width). Its area is a share of the largest
    such box's, uniform in `[min_area, 1]`.
    """
    largest = min(height / size[0], width / size[1]) * random.uniform(min_area, 1) ** 0.5
    box_height, box_width = (max(1, round(side * largest)) for side in size)
    left, top = (int(random.integers(spare + 1)) for spare in (width - box_width, height - box_height))
    return left, top, left + box_width, top + box_height


@without_warnings()
def count_pages(data: bytes) -> int:
    r"""The pages of a TIFF file; 1 for other pictures, also for animations, whose first frame stands for them."""
    image = open_picture(data)
    return getattr(image, "n_frames", 1) if image.format == "TIFF" else 1


@without_warnings()
def find_first_depth(
    items: Iterable[Any],
    config: DataConfig,
    root: Root | None = None,
    *,
    name_of: Callable[[int], str] | None = None,
) -> Depth | None:
    r"""
    The depth ([`~dae_diffusers.data.arrays.find_depth`]) of the first image, or with `--on_bad_image skip` of the first that
    is not damaged. None if there is none; reading the image reports that later.

    Raises:
        UserError: If the image has several channels of more than 8 bits, of which Pillow would keep 8.
    """
    for index, item in enumerate(items):
        try:
            return find_depth(read_content(item, root))
        except LossyDepthError as error:
            name = name_of_row(item, index) if name_of is None else name_of(index)
            raise UserError(f"the image {name} cannot be read as it is: {error}.") from None
        except Exception:
            if config.on_bad_image == "raise":
                return None
    return None
