"""The flags that choose the images."""

import os
from collections.abc import Sequence
from typing import Any, Literal

from dae_diffusers.data.buckets import spread_shapes
from dae_diffusers.errors import ConfigError
from dae_diffusers.settings import field, settings
from dae_diffusers.sizes import height_and_width, words_of_size

EMBEDDED = {"digits"}
# What does not go with `streaming`, and why.
_NOT_STREAMED = {
    "aspect_buckets": "because it sorts the images before training: leave one of them out",
    "balance_classes": "because it needs the classes of all images before training: leave one of them out",
    "caption_column": "because texts are encoded once, before training: leave `streaming` out",
    "drop_copies": "because all images are compared before training: leave one of them out",
    "group_column": "which holds out the first images of the stream. Leave `streaming` out, or move whole groups into a validation split "
    "and leave `group_column` out",
    "leave_out": "whose names are read as they come: leave one of them out",
    "on_missing_label": "whose classes are read as they come: leave one of them out",
    "max_train_samples": "which reads all images: leave one of them out",
}
DEFAULT_RESOLUTION = 32
DEFAULT_CHANNELS = 3
DEFAULT_MULTIPLE = 8  # of the sides of buckets, where no autoencoder says more
MAX_RESOLUTION = 8192  # Pillow refuses to cut out much more than twice as much, as a decompression bomb


@settings
class DataConfig:
    """Data."""

    dataset_name: str | None = field(None, "a dataset on the Hub, a dataset folder, or `digits` (part of this package)")
    dataset_config_name: str | None = field(
        None, "configuration of the dataset, if it has several", needs="dataset_name", advanced=True
    )
    train_data_dir: str | None = field(None, "a folder of images; sub-folders are classes")
    train_split: str = field("train", "split to train on", advanced=True)
    validation_split: str | None = field(
        None,
        "split to validate on; if it is the training split, a part of that is held out; default: `validation` or `test`, if it exists",
        advanced=True,
    )
    validation_fraction: float = field(
        0.05, "share of the training images held out if there is no validation split", above=0, below=1, advanced=True
    )
    group_column: str | None = field(
        None,
        "column or field of what images belong to, such as a patient, slide, scene or video: all images of one are held out, or none",
        advanced=True,
    )
    image_column: str | None = field(
        None, "column of the images; default: the only image column, or `image` among several", advanced=True
    )
    label_column: str | list[str] | None = field(
        None, "column or field (`json.label`) of the labels, or several columns, or `none`; default: detected"
    )
    caption_column: str | list[str] | None = field(
        None,
        "columns or fields of the texts of each image, one or a list in each; `txt`: a .txt beside each image",
        advanced=True,
    )
    continuous_columns: list[str] = field(
        [], "columns of numbers to draw from, such as `angle temperature`", advanced=True
    )
    condition_column: str | None = field(
        None, "column of an image to draw from, beside each image: a mask, edges, a low resolution", advanced=True
    )
    streaming: bool = field(
        False,
        "read images from the Hub or local shards (Parquet, webdataset) while training, without a copy on the disk",
        advanced=True,
    )
    shuffle_buffer_size: int = field(
        1000, "with `--streaming`: shuffle the images in blocks of N", at_least=1, needs="streaming", advanced=True
    )
    num_classes: int | None = field(
        None,
        "with `--streaming`: number of classes, if the label column holds integers without names",
        at_least=1,
        advanced=True,
    )
    max_train_samples: int | None = field(
        None, "use only N training images, a fixed random choice", at_least=1, advanced=True
    )
    max_validation_samples: int = field(
        1000,
        "validate on at most N images, a fixed random choice; with `--streaming` the first N",
        at_least=1,
        advanced=True,
    )
    # Scripts that may take a trained autoencoder have None here, until they have read it.
    resolution: int | list[int] | None = field(
        DEFAULT_RESOLUTION,
        f"side of the images, or height and width, in pixels; default: as a given autoencoder, else {DEFAULT_RESOLUTION}",
        at_least=1,
        at_most=MAX_RESOLUTION,
    )
    image_channels: int | None = field(
        DEFAULT_CHANNELS,
        f"3: RGB; 4: RGBA; 1: gray; others: arrays; default: the autoencoder's, or {DEFAULT_CHANNELS}",
        at_least=1,
    )
    value_range: list[float] = field(
        [],
        "lowest and highest value of the images, mapped to [-1, 1]; default: 0 255 for 8-bit pictures, 0 65535 for 16-bit "
        "ones, measured over the training images for others",
        advanced=True,
    )
    aspect_buckets: list[int] = field(
        [],
        "train on N shapes of about the area of `--resolution`, up to twice as long, each image in the nearest; N is odd; or "
        "heights and widths",
        at_least=1,
        at_most=MAX_RESOLUTION,
        advanced=True,
    )
    pad: Literal["white", "black", "edge"] | None = field(
        None,
        "keep the whole of each image and pad it to the proportions of `--resolution`, with white, black or the pixels of its edge; "
        "default: crop",
        advanced=True,
    )
    random_crop: bool = field(False, "crop at a random position instead of the centre", advanced=True)
    random_resized_crop: float | None = field(
        None,
        "crop a random square with at least this share of the largest square's area, then scale it",
        above=0,
        at_most=1,
        advanced=True,
    )
    random_flip: bool = field(False, "flip half of the images horizontally")
    random_vertical_flip: bool = field(
        False, "flip half of the images vertically, for images without an up and a down", advanced=True
    )
    random_quarter_turn: bool = field(
        False, "turn square images by 0, 90, 180 or 270 degrees, for images without an up and a down", advanced=True
    )
    balance_classes: bool = field(False, "train on each class equally often, however many images it has", advanced=True)
    strict_size: bool = field(
        False, "refuse images smaller than the resolution instead of enlarging them", advanced=True
    )
    on_bad_image: Literal["raise", "skip"] = field(
        "raise",
        "raise: stop and name the file; skip: read every image once before training and leave bad ones out (with "
        "`--streaming`: replace a bad one with another of its batch)",
        advanced=True,
    )
    max_bad_image_share: float = field(
        0.01,
        "with `--on_bad_image skip`: stop if more than this share is bad",
        at_least=0,
        at_most=1,
        needs="on_bad_image skip",
        advanced=True,
    )
    on_missing_label: Literal["raise", "skip"] = field(
        "raise",
        "raise: stop if an image has no class while others have one; skip: leave such images out",
        advanced=True,
    )
    leave_out: str | None = field(
        None,
        "a file that names images to leave out, one in each line, or a CSV file whose first column does, such as `copies.csv` of `preview`",
        advanced=True,
    )
    drop_copies: bool = field(
        False,
        "leave out training images with the same content as an earlier one or as one of the validation split, before any are held out",
        advanced=True,
    )
    dataloader_num_workers: int = field(
        0,
        "processes that load images, for each training process; 0: the training process loads them",
        at_least=0,
        advanced=True,
    )

    def __post_init__(self):
        self._takers: list[tuple[str, str]] = []
        if isinstance(self.resolution, list | tuple):
            self.resolution = _side(self.resolution)
        for name in ("label_column", "caption_column"):
            given = getattr(self, name)
            if isinstance(given, list | tuple):
                setattr(self, name, list(given) if len(given) > 1 else (*given, None)[0])
        self._check_buckets()
        for name in ("train_data_dir", "dataset_name"):  # a shell does this, a YAML file does not
            if (getattr(self, name) or "").startswith("~"):
                setattr(self, name, os.path.expanduser(getattr(self, name)))
        if self.value_range and not (len(self.value_range) == 2 and self.value_range[0] < self.value_range[1]):
            raise ConfigError(
                f"`value_range` is {self.value_range}, but must be two numbers, the lowest and the highest value."
            )
        if self.random_crop and self.random_resized_crop is not None:
            raise ConfigError("`random_crop` and `random_resized_crop` exclude each other: give only one.")
        if self.pad is not None and self.crops_at_random:
            raise ConfigError("`pad` keeps the whole image: leave `random_crop` and `random_resized_crop` out.")
        self._check_turns()
        if self.balance_classes and self.aspect_buckets:
            raise ConfigError("`balance_classes` does not go with `aspect_buckets`; leave one of them out.")
        if self.num_classes is not None and not self.streaming:
            raise ConfigError("`num_classes` goes with `streaming` only. Leave it out: the classes are counted.")
        columns = [*self.label_columns, *self.continuous_columns, self.condition_column]
        twice = [column for column in filter(None, columns) if columns.count(column) > 1]
        if twice or ("none" in columns and len(self.label_columns) > 1):
            raise ConfigError(
                f"the columns {' '.join(filter(None, columns))} hold {twice[0] if twice else 'none'!r} "
                + ("twice: name each once." if twice else "beside others: leave it out.")
            )
        twice = [column for column in self.caption_columns if self.caption_columns.count(column) > 1]
        if twice:
            raise ConfigError(f"`caption_column` holds {twice[0]!r} twice: name each once.")
        self._check_group_column()
        if self.streaming:
            self._check_streaming()

    def _check_streaming(self) -> None:
        for name, why in _NOT_STREAMED.items():
            if getattr(self, name) not in (None, False, [], "raise"):
                raise ConfigError(f"`{name}` does not go with `streaming`, {why}.")
        self.refuse_conditions("`streaming`, because all values are read before training: leave `streaming` out")
        if self.dataset_name in EMBEDDED:
            raise ConfigError(f"`dataset_name {self.dataset_name}` is on the disk already: leave `streaming` out.")

    def _check_group_column(self) -> None:
        column = self.group_column
        if column is None:
            return
        others = {"image_column": self.image_column} | self.condition_columns() | {"label_column": self.label_columns}
        for name, columns in others.items():
            if column == columns or column in (columns if isinstance(columns, list) else ()):
                raise ConfigError(
                    f"`group_column` is {column!r}, which `{name}` names too. Groups only say which images are held out together: "
                    "name another column, or leave one of the two out."
                )

    def _check_turns(self) -> None:
        if self.random_quarter_turn and (self.aspect_buckets or isinstance(self.resolution, list)):
            raise ConfigError(
                "`random_quarter_turn` turns squares only: give one `resolution` and no `aspect_buckets`."
            )

    def _check_buckets(self) -> None:
        given = self.aspect_buckets
        if given and self.condition_column is not None:
            raise ConfigError("`aspect_buckets` does not go with `condition_column`: condition images have one shape.")
        if len(given) == 1 and given[0] % 2 == 0:
            raise ConfigError(f"`aspect_buckets` is {given[0]}, but must be odd: `resolution` is the middle shape.")
        if len(given) > 1 and len(given) % 2:
            raise ConfigError(
                f"`aspect_buckets` is {given}, but must be one number, or a height and a width for each shape."
            )
        if len(given) > 1 and self.resolution is not None and self.size not in self.shapes:
            raise ConfigError(
                f"`aspect_buckets` is {given} without `resolution` {words_of_size(self.size)}, the shape of validation and of the "
                "pipeline. Add it, or give another `resolution`."
            )

    def require_one_shape(self, script: str) -> None:
        """Raises `ConfigError` if there are buckets, for a script that takes images of one shape."""
        if self.aspect_buckets:
            raise ConfigError(f"`aspect_buckets` does not go with {script}, which takes one shape; leave it out.")

    def refuse_streaming(self, reason: str) -> None:
        """Raises `ConfigError` if the images are streamed. The reason begins with what does not go with it."""
        if self.streaming:
            raise ConfigError(f"`streaming` does not go with {reason}.")

    def refuse_random_views(self, reason: str) -> None:
        """Raises `ConfigError` if images are cropped or turned at random. The reason begins with what does not go with it."""
        if self.has_random_views:
            raise ConfigError(
                "`random_crop`, `random_resized_crop`, `random_vertical_flip` and `random_quarter_turn` do not go with "
                f"{reason}."
            )

    def refuse_conditions(self, reason: str) -> None:
        """Raises `ConfigError` if any of [`condition_columns`] is named. The reason begins with what does not go with it."""
        for name, value in self.condition_columns().items():
            if value:
                several = "several columns in " if name == "label_column" else ""
                raise ConfigError(f"{several}`{name}` cannot be used with {reason}.")

    @property
    def shapes(self) -> list[tuple[int, int]]:
        r"""Height and width of each bucket; only that of the images without buckets."""
        sides = self.aspect_buckets if len(self.aspect_buckets) > 1 else []
        return list(dict.fromkeys(zip(sides[::2], sides[1::2], strict=True))) or [self.size]

    def settle_buckets(self, multiple: int) -> None:
        r"""
        Turns a number of shapes into the shapes, whose sides are multiples of `multiple`. Given shapes stay. The resolution is settled.

        Raises:
            ConfigError: If the resolution is not among the given shapes.
        """
        if len(self.aspect_buckets) == 1:
            shapes = spread_shapes(self.size, self.aspect_buckets[0], multiple)
            self.aspect_buckets = [side for shape in shapes for side in shape]
        self._check_buckets()

    def require_source(self) -> None:
        """Raises `ConfigError` unless exactly one source of images is given."""
        if (self.dataset_name is None) == (self.train_data_dir is None):
            raise ConfigError(
                "give one of `dataset_name` (a Hub id, a dataset folder, or digits) and `train_data_dir` (a folder of images); "
                + ("both are given." if self.dataset_name else "neither is given.")
            )

    def require_images(self, taker: str) -> None:
        """Raises `ConfigError` if there are only cached latents. The message begins with what needs the images."""
        if not self.has_source:
            raise ConfigError(
                f"{taker} needs the images' data set. A latent cache does not hold the images: give them beside `latent_cache` "
                "(`train_data_dir` or `dataset_name`, with the flags they were cached with)."
            )

    def require_pictures(self, taker: str, instead: str = "") -> None:
        """
        Raises `ConfigError` for images with other channels than gray, RGB and RGBA pictures, which `taker` needs. What the images show is
        found when they are loaded: see [`check_pictures`]. `instead`: what would do.
        """
        self._takers.append((taker, instead))
        if self.image_channels is not None:
            self.check_pictures("8-bit")

    def check_pictures(self, depth: str | None) -> None:
        """Raises `ConfigError` if something needs pictures, and images of this depth are none: four channels of numbers are not RGBA."""
        is_picture = self.image_channels in (1, 3) or (self.image_channels == 4 and depth == "8-bit")
        if self._takers and not is_picture:
            taker, instead = self._takers[0]
            raise ConfigError(
                f"`image_channels` is {self.image_channels}, but {taker} takes pictures: gray, RGB, or RGBA of 8 bits.{instead}"
            )

    @property
    def label_columns(self) -> list[str]:
        r"""The columns of classes that are named; `none` counts as one."""
        return [self.label_column] if isinstance(self.label_column, str) else self.label_column or []

    @property
    def caption_columns(self) -> list[str]:
        r"""The columns of texts that are named."""
        return [self.caption_column] if isinstance(self.caption_column, str) else self.caption_column or []

    @property
    def first_label_column(self) -> str | None:
        r"""The column of classes that grids and metrics show; None to find it."""
        return self.label_columns[0] if self.label_columns else None

    def condition_columns(self) -> dict[str, Any]:
        r"""The settings that name columns which images are drawn from besides a class and a text; None for those that name none."""
        several = self.label_columns if len(self.label_columns) > 1 else None
        numbers = self.continuous_columns or None
        return {"label_column": several, "continuous_columns": numbers, "condition_column": self.condition_column}

    @property
    def has_conditions(self) -> bool:
        r"""Whether any of [`condition_columns`] is named."""
        return any(self.condition_columns().values())

    @property
    def has_source(self) -> bool:
        r"""Whether a folder or a data set is named."""
        return self.dataset_name is not None or self.train_data_dir is not None

    @property
    def is_local(self) -> bool:
        r"""Whether the images are in a folder here, and have no name on the Hub."""
        return self.train_data_dir is not None or (
            self.dataset_name not in EMBEDDED and os.path.isdir(self.dataset_name or "")
        )

    @property
    def size(self) -> tuple[int, int]:
        r"""Height and width of the images, in pixels."""
        return height_and_width(self.resolution)

    def settle(self, resolution: int | Sequence[int] = DEFAULT_RESOLUTION, channels: int = DEFAULT_CHANNELS) -> None:
        r"""Sets resolution and channels where they are open."""
        self.resolution = self.resolution or _side(height_and_width(resolution))
        self.image_channels = self.image_channels or channels
        self._check_turns()

    @property
    def crops_at_random(self) -> bool:
        r"""Whether images are cropped at random positions."""
        return self.random_crop or self.random_resized_crop is not None

    @property
    def has_random_views(self) -> bool:
        r"""Whether there are more views of an image than itself and its mirror image."""
        return self.crops_at_random or self.random_vertical_flip or self.random_quarter_turn


def _side(sides: Sequence[int]) -> int | list[int]:
    """One number for a square, so that a square has one name; else height and width."""
    if not 1 <= len(sides) <= 2:
        raise ConfigError(f"`resolution` is {list(sides)}, but must be one side, or height and width.")
    return sides[0] if len(set(sides)) == 1 else list(sides)
