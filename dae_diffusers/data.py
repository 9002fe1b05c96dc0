"""Images from a Hub dataset, a folder or the embedded digits to `pixel_values` in [-1, 1] and `class_labels`."""

import hashlib
import io
import logging
import math
import warnings
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any, Literal

import datasets
import numpy as np
import torch
from PIL import Image, ImageOps
from torch.utils.data import DataLoader, Dataset, Sampler
from tqdm.auto import tqdm

from dae_diffusers.arrays import decode_array, is_array_data, load_array_folder, resize_and_crop_array
from dae_diffusers.cli import ConfigError, UserError, did_you_mean, field
from dae_diffusers.randomness import derived_seed

logger = logging.getLogger(__name__)

# Images whose transformed pixels fit into this many bytes are decoded once and kept.
IMAGE_MEMORY_BYTES = 2**30

EMBEDDED = {"digits"}


@dataclass
class DataConfig:
    """Data."""

    dataset_name: str | None = field(None, "a dataset on the Hub, a local dataset folder, or `digits` (embedded)")
    dataset_config_name: str | None = field(None, "configuration of the dataset, if it has several")
    train_data_dir: str | None = field(None, "a folder of images; sub-folders are classes")
    train_split: str = field("train", "split to train on")
    validation_split: str | None = field(None, "split to validate on; default: `validation` or `test` if there is one")
    validation_fraction: float = field(0.05, "share of the training images held out if there is no validation split")
    image_column: str | None = field(None, "column of the images; default: the first image column")
    label_column: str | None = field(None, "column of the labels; default: the class-label column; `none`: no labels")
    max_train_samples: int | None = field(None, "use only the first N training images")
    max_validation_samples: int = field(1000, "validate on at most this many images")
    resolution: int = field(32, "height and width of the training images, in pixels")
    image_channels: int = field(3, "3: RGB; 1: grayscale; any other number: arrays with that many channels")
    value_range: list[float] = field(
        [],
        "lowest and highest value of the images, mapped to [-1, 1]; default: 0 255 for 8-bit pictures, 0 65535 for 16-bit "
        "ones, measured over the training images for others",
    )
    random_crop: bool = field(False, "crop at a random place instead of the centre")
    random_flip: bool = field(False, "flip half of the images horizontally")
    strict_size: bool = field(False, "refuse images smaller than the resolution instead of enlarging them")
    on_bad_image: Literal["raise", "skip"] = field(
        "raise", "raise: stop and name the file; skip: read every image once before training and leave bad ones out"
    )
    max_bad_image_share: float = field(0.01, "with `--on_bad_image skip`: stop if more than this share is bad")
    dataloader_num_workers: int = field(0, "processes that read images beside each training process")

    def __post_init__(self):
        if self.resolution < 1:
            raise ConfigError(f"`--resolution` is {self.resolution}, but must be at least 1.")
        if self.image_channels < 1:
            raise ConfigError(f"`--image_channels` is {self.image_channels}, but must be at least 1.")
        if self.value_range and not (len(self.value_range) == 2 and self.value_range[0] < self.value_range[1]):
            raise ConfigError(
                f"`--value_range` is {self.value_range}, but must be two numbers, the lowest and the highest value."
            )
        if not 0 < self.validation_fraction < 1:
            raise ConfigError(f"`--validation_fraction` is {self.validation_fraction}, but must lie between 0 and 1.")
        if not 0 <= self.max_bad_image_share <= 1:
            raise ConfigError(f"`--max_bad_image_share` is {self.max_bad_image_share}, but must lie in [0, 1].")
        for name in ("max_train_samples", "max_validation_samples"):
            if getattr(self, name) is not None and getattr(self, name) < 1:
                raise ConfigError(f"`--{name}` is {getattr(self, name)}, but must be at least 1.")
        if self.dataloader_num_workers < 0:
            raise ConfigError(f"`--dataloader_num_workers` is {self.dataloader_num_workers}, but must be 0 or more.")

    def require_source(self) -> None:
        """Raises `ConfigError` unless exactly one source of images is given."""
        if (self.dataset_name is None) == (self.train_data_dir is None):
            raise ConfigError(
                "give one of `--dataset_name` (a Hub id, a dataset folder, or digits) and `--train_data_dir`; "
                f"got {self.dataset_name!r} and {self.train_data_dir!r}."
            )


class ImageDataset(Dataset):
    r"""
    One split, as tensors.

    Indexed by an image's number, or by `(number, draw)` where `draw` seeds its augmentation; without a draw there is
    none (centre crop, no flip).

    Each item is `{"pixel_values": float32 (C, resolution, resolution) in [-1, 1], "class_labels": int}`, the labels
    only if `id2label` is not None.

    Attributes:
        id2label (`dict[int, str]` or `None`): Names of the classes; None without labels.
        fingerprint (`str`): Hash of the content, for caches and resumed runs.
        is_array (`bool`): Whether images are read as arrays rather than as 8-bit pictures; decided by the first one if not
            given.
    """

    def __init__(
        self,
        rows: datasets.Dataset,
        config: DataConfig,
        *,
        image_column: str,
        labels: list[int] | None = None,
        id2label: dict[int, str] | None = None,
        is_array: bool | None = None,
    ):
        self.rows = rows.select_columns([image_column])
        self.config = config
        self.image_column = image_column
        self.labels = labels
        self.id2label = id2label
        self.fingerprint = _fingerprint(self.rows, image_column, labels)
        self._given_is_array = is_array
        if is_array is None:
            is_array = bool(config.value_range) or config.image_channels not in (1, 3) or self._holds_arrays()
        self.is_array = is_array
        num_bytes = len(rows) * config.resolution**2 * config.image_channels * (4 if self.is_array else 1)
        self._memory = None
        if num_bytes <= IMAGE_MEMORY_BYTES and not config.random_crop:
            shape = (len(rows), config.resolution, config.resolution, config.image_channels)
            self._memory = np.empty(shape, np.float32 if self.is_array else np.uint8)
            self._is_in_memory = np.zeros(len(rows), bool)
        self._warned_small = False

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, item: int | tuple[int, int]) -> dict[str, torch.Tensor | int]:
        return {
            name: value[0] if name == "pixel_values" else value[0].item()
            for name, value in self.__getitems__([item]).items()
        }

    def __getitems__(self, items: list[int | tuple[int, int]]) -> dict[str, torch.Tensor]:
        r"""A whole batch at once; `collate_fn` leaves it as it is."""
        indices, draws = zip(*(item if isinstance(item, tuple) else (item, None) for item in items), strict=True)
        pixels = self._batch(indices, draws)  # (B, H, W, C)
        flips = [draw is not None and self.config.random_flip and is_flipped(draw) for draw in draws]
        if any(flips):
            pixels[flips] = pixels[flips][:, :, ::-1]
        low, high = self.config.value_range or (0.0, 255.0)
        pixel_values = (
            torch.from_numpy(pixels).permute(0, 3, 1, 2).to(torch.float32, memory_format=torch.contiguous_format)
        )
        batch = {"pixel_values": pixel_values.sub_(low).mul_(2 / (high - low)).sub_(1).clamp_(-1, 1)}
        if self.labels is not None:
            batch["class_labels"] = torch.tensor([self.labels[index] for index in indices])
        return batch

    @staticmethod
    def collate_fn(batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        r"""For `DataLoader`: `__getitems__` has made the batch already."""
        return batch

    def _batch(self, indices: Sequence[int], draws: Sequence[int | None]) -> np.ndarray:
        """Cropped but not flipped pixels `(B, resolution, resolution, C)`, a copy."""
        if self._memory is None:
            randoms = [
                np.random.default_rng(draw) if draw is not None and self.config.random_crop else None for draw in draws
            ]
            return np.stack([self._pixels(index, random) for index, random in zip(indices, randoms, strict=True)])
        for index in indices:
            if not self._is_in_memory[index]:
                self._memory[index] = self._pixels(index, None)
                self._is_in_memory[index] = True
        return self._memory[list(indices)]

    def name_of(self, index: int) -> str:
        r"""The image's file name, where it has one, else its row."""
        item = self.rows[index][self.image_column]
        return (isinstance(item, dict) and item.get("path")) or f"row {index} of the dataset"

    def without_bad_images(self) -> "ImageDataset":
        r"""
        Reads every image once and leaves those out that cannot be decoded. Each is logged by name.

        Raises:
            UserError: When more than `max_bad_image_share` of the images are bad.
        """

        def problem(index: int) -> str | None:
            try:
                self._pixels(index, None)
            except UserError as error:
                return str(error)

        with ThreadPoolExecutor() as pool:
            problems = list(
                tqdm(pool.map(problem, range(len(self))), total=len(self), desc="Checking images", leave=False)
            )
        good = [index for index, text in enumerate(problems) if text is None]
        for text in filter(None, problems):
            logger.warning("left out: %s", text)
        if len(self) - len(good) > self.config.max_bad_image_share * len(self):
            raise UserError(
                f"{len(self) - len(good)} of {len(self)} images are bad, more than `--max_bad_image_share` "
                f"{self.config.max_bad_image_share} allows; the first: {next(filter(None, problems))}"
            )
        if len(good) == len(self):
            return self
        labels = None if self.labels is None else [self.labels[index] for index in good]
        return ImageDataset(
            self.rows.select(good),
            self.config,
            image_column=self.image_column,
            labels=labels,
            id2label=self.id2label,
            is_array=self._given_is_array,
        )

    def measure_range(self) -> list[float]:
        r"""
        Lowest and highest value: of the type for 16-bit pictures, else of all images.

        Raises:
            UserError: If all values are the same.
        """
        first = _content_of(self.rows[0][self.image_column])
        if isinstance(first, bytes) and not first.startswith(b"\x93NUMPY"):
            with Image.open(io.BytesIO(first)) as image:
                if image.mode.startswith("I"):
                    return [0.0, 65535.0]
                if image.mode != "F":
                    return [0.0, 255.0]
        low, high = math.inf, -math.inf
        for index in tqdm(range(len(self)), desc="Measuring the value range", leave=False):
            pixels = self._batch([index], [None])
            low, high = min(low, float(pixels.min())), max(high, float(pixels.max()))
        if not low < high:
            raise UserError(f"all values of the training images are {low}: there is nothing to learn.")
        return [low, high]

    def _holds_arrays(self) -> bool:
        try:
            return is_array_data(_content_of(self.rows[0][self.image_column]))
        except (ValueError, OSError):
            return False

    def _pixels(self, index: int, random: np.random.Generator | None) -> np.ndarray:
        """The image as uint8 or float32 (resolution, resolution, C), cropped but not flipped."""
        item = self.rows[index][self.image_column]
        decode = decode_array if self.is_array else decode_image
        try:
            image = decode(_content_of(item), channels=self.config.image_channels)
        except Exception as error:  # Pillow's plugins raise OSError, SyntaxError, ValueError, struct.error and more
            raise UserError(
                f"the image {self.name_of(index)} cannot be decoded ({' '.join(str(error).split())}). "
                "Remove or replace it, or pass `--on_bad_image skip`."
            ) from None
        crop_random = random if self.config.random_crop else None
        if self.is_array:
            self._check_size(image.shape[1], image.shape[0], index)
            pixels = resize_and_crop_array(image, self.config.resolution, random=crop_random)
        else:
            self._check_size(image.width, image.height, index)
            pixels = np.asarray(resize_and_crop(image, self.config.resolution, random=crop_random))
        return pixels.reshape(self.config.resolution, self.config.resolution, self.config.image_channels)

    def _check_size(self, width: int, height: int, index: int) -> None:
        if min(width, height) >= self.config.resolution or self.config.dataset_name in EMBEDDED:
            return
        seen = f"the image {self.name_of(index)} has {width}x{height} pixels"
        if self.config.strict_size:
            raise UserError(
                f"{seen}, fewer than `--resolution` {self.config.resolution}. Remove it, lower the resolution, or drop "
                "`--strict_size` to enlarge it."
            )
        if not self._warned_small:
            self._warned_small = True
            logger.warning("%s: enlarged to %d, like any other smaller one.", seen, self.config.resolution)


class MicrobatchSampler(Sampler[list[tuple[int, int]]]):
    r"""
    Endless micro-batches of `(image number, draw)`. Micro-batch `m` is a pure function of `(seed, m)`: each pass over
    the data is shuffled anew, no image is left out and none repeated within a pass.

    It knows nothing of processes: `accelerate` deals micro-batches `m = i * num_processes + process_index` to each.

    Args:
        num_samples (`int`): Number of images.
        batch_size (`int`): Images in a micro-batch.
        seed (`int`): The run's.
        start (`int`, *optional*, defaults to 0): The first micro-batch, to continue a run.
    """

    def __init__(self, num_samples: int, batch_size: int, seed: int, start: int = 0):
        self.num_samples = num_samples
        self.batch_size = batch_size
        self.drop_last = False
        self.seed = seed
        self.start = start

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        position, epoch, order = self.start * self.batch_size, -1, []
        while True:
            batch = []
            for _ in range(self.batch_size):
                if position // self.num_samples != epoch:
                    epoch = position // self.num_samples
                    order = np.random.default_rng((self.seed, epoch)).permutation(self.num_samples)
                batch.append((int(order[position % self.num_samples]), derived_seed(self.seed, 1, position)))
                position += 1
            yield batch


def load_images(config: DataConfig, seed: int = 0) -> tuple[ImageDataset, ImageDataset]:
    r"""
    Loads the training and the validation images.

    Args:
        config ([`DataConfig`]): What to load.
        seed (`int`, *optional*): Chooses the held-out images if the data have no validation split.

    Returns:
        `tuple[ImageDataset, ImageDataset]`: Training and validation images, with the same `id2label`.

    Raises:
        UserError: For a data set, split or column that does not exist, empty splits and unusable labels.
    """
    splits = _load_splits(config)
    if config.train_split not in splits:
        raise UserError(f"`--train_split` {config.train_split!r} does not exist; the splits are {list(splits)}.")
    train = splits[config.train_split]
    validation_name = config.validation_split
    if validation_name is None:
        validation_name = next(
            (name for name in ("validation", "val", "test") if name in splits and name != config.train_split), None
        )
    elif validation_name not in splits:
        raise UserError(f"`--validation_split` {validation_name!r} does not exist; the splits are {list(splits)}.")

    image_column = _find_image_column(train, config.image_column)
    label_column = _find_label_column(train, config.label_column, image_column)
    if validation_name is not None:
        validation = splits[validation_name]
    else:
        if len(train) < 2:
            raise UserError(f"the split {config.train_split!r} has {len(train)} images; at least 2 are needed.")
        order = np.random.default_rng(derived_seed(seed, 2)).permutation(len(train))
        num_validation = max(1, round(config.validation_fraction * len(train)))
        train, validation = train.select(order[num_validation:]), train.select(np.sort(order[:num_validation]))
    if config.max_train_samples is not None:
        train = train.select(range(min(config.max_train_samples, len(train))))
    validation = validation.select(range(min(config.max_validation_samples, len(validation))))
    for name, rows in ((config.train_split, train), (validation_name, validation)):
        if len(rows) == 0:
            raise UserError(f"the split {name!r} is empty.")

    id2label, value2id = _label_names(train, validation, label_column)
    result = []
    for rows in (train, validation):
        if isinstance(rows.features[image_column], datasets.Image):
            rows = rows.cast_column(image_column, datasets.Image(decode=False))
        labels = None if label_column is None else _label_ids(rows[label_column], value2id, id2label, label_column)
        images = ImageDataset(
            rows,
            config,
            image_column=image_column,
            labels=labels,
            id2label=id2label,
            is_array=result[0].is_array if result else None,  # one way for both splits
        )
        result.append(images.without_bad_images() if config.on_bad_image == "skip" else images)
    if result[0].is_array and not config.value_range:
        config.value_range = result[0].measure_range()
        logger.info("the images' values lie in [%g, %g]", *config.value_range)
    return tuple(result)


def make_training_loader(
    dataset: Dataset, *, batch_size: int, seed: int, start: int = 0, num_workers: int = 0, pin_memory: bool = False
) -> DataLoader:
    r"""An endless loader of shuffled micro-batches, to be prepared by `accelerate`; see [`MicrobatchSampler`]."""
    if batch_size > len(dataset):
        warnings.warn(
            f"`--train_batch_size` {batch_size} is larger than the data set ({len(dataset)} images): images repeat "
            "within a batch. Use a smaller batch.",
            stacklevel=2,
        )
    return DataLoader(
        dataset,
        batch_sampler=MicrobatchSampler(len(dataset), batch_size, seed, start),
        collate_fn=collate_fn_of(dataset),
        num_workers=num_workers,
        persistent_workers=num_workers > 0,
        pin_memory=pin_memory,
    )


def make_pass_loader(
    dataset: Dataset, *, batch_size: int, process_index: int = 0, num_processes: int = 1, num_workers: int = 0
) -> DataLoader:
    r"""One pass without augmentation over this process's share; over all processes each image comes exactly once."""
    share = torch.utils.data.Subset(dataset, range(process_index, len(dataset), num_processes))
    return DataLoader(share, batch_size=batch_size, num_workers=num_workers, collate_fn=collate_fn_of(dataset))


def collate_fn_of(dataset: Dataset) -> Callable | None:
    r"""That of a dataset which makes whole batches, also below a `Subset`; None for others."""
    while isinstance(dataset, torch.utils.data.Subset):
        dataset = dataset.dataset
    return getattr(dataset, "collate_fn", None)


def is_flipped(draw: int) -> bool:
    r"""Whether a draw flips its image; images and cached latents follow the same rule."""
    return draw % 2 == 1


def decode_image(data: bytes, *, channels: Literal[1, 3] = 3) -> Image.Image:
    r"""
    Decodes an image file to 8-bit RGB (`channels=3`) or grayscale (`channels=1`).

    EXIF rotation is applied; an animation gives its first frame; transparency is laid over white; CMYK, palette and
    other modes are converted by Pillow. Files of 16 bits or floats go through `dae_diffusers.arrays` instead.

    Raises:
        Exception: Whatever Pillow raises for data that it cannot read, and ValueError for float images.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Pillow's remarks on odd EXIF and palettes; bombs still raise
        image = Image.open(io.BytesIO(data))
        image.load()
        image = ImageOps.exif_transpose(image)
    if image.mode == "F":
        raise ValueError("it has float pixels, unlike the first image")
    if image.mode.startswith("I"):
        image = Image.fromarray(np.rint(np.asarray(image).clip(0, 65535) / 257).astype(np.uint8))
    if image.mode in ("RGBA", "LA", "PA", "RGBa", "La") or "transparency" in image.info:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB" if channels == 3 else "L")


def resize_and_crop(image: Image.Image, resolution: int, *, random: np.random.Generator | None = None) -> Image.Image:
    r"""
    Scales the shorter side to `resolution` and crops a square.

    Large images are first halved by box filtering while they stay at least twice as large, then scaled bicubically, as
    in ADM's preprocessing, so that nothing aliases.

    Args:
        image (`PIL.Image.Image`): Of any size.
        resolution (`int`): Side of the result, in pixels.
        random (`numpy.random.Generator`, *optional*): Chooses the place of the crop; without it, the centre.

    Source: Dhariwal and Nichol, 2021, https://huggingface.co/papers/2105.05233.
    """
    while min(image.size) >= 2 * resolution:
        image = image.resize((image.width // 2, image.height // 2), Image.Resampling.BOX)
    scale = resolution / min(image.size)
    size = (max(resolution, round(image.width * scale)), max(resolution, round(image.height * scale)))
    image = image.resize(size, Image.Resampling.BICUBIC)
    spare = (image.width - resolution, image.height - resolution)
    left, top = (x // 2 for x in spare) if random is None else (int(random.integers(x + 1)) for x in spare)
    return image.crop((left, top, left + resolution, top + resolution))


def _load_splits(config: DataConfig) -> dict[str, datasets.Dataset]:
    try:
        if config.train_data_dir is not None:
            folder = Path(config.train_data_dir)
            if not folder.is_dir():
                raise UserError(f"`--train_data_dir` {folder} is not a folder.")
            return load_array_folder(folder) or datasets.load_dataset("imagefolder", data_dir=str(folder))
        if config.dataset_name in EMBEDDED:
            folder = files("dae_diffusers") / "assets"
            names = {split: str(folder / f"{config.dataset_name}_{split}.parquet") for split in ("train", "test")}
            return datasets.load_dataset("parquet", data_files=names)
        return datasets.load_dataset(config.dataset_name, config.dataset_config_name)
    except UserError:
        raise
    except Exception as error:  # a data set can fail to load in any way; the user gets the reason, not the stack
        source = config.train_data_dir or config.dataset_name
        flag = "--train_data_dir" if config.train_data_dir else "--dataset_name"
        hint = "" if config.train_data_dir else did_you_mean(source, sorted(EMBEDDED))
        raise UserError(f"`{flag}` {source} cannot be loaded: {' '.join(str(error).split())[:500]}{hint}") from None


def _find_image_column(rows: datasets.Dataset, name: str | None) -> str:
    kinds = (datasets.Image, datasets.Array2D, datasets.Array3D)
    image_columns = [column for column, feature in rows.features.items() if isinstance(feature, kinds)]
    if name is None and image_columns:
        return image_columns[0]
    if name is None or name not in rows.features:
        raise UserError(
            f"`--image_column` is {name!r}, but the columns are {list(rows.features)}, those with images {image_columns}."
        )
    if name not in image_columns and not isinstance(rows.features[name], (datasets.List, datasets.LargeList)):
        raise UserError(
            f"`--image_column` {name!r} holds {rows.features[name]}, not images; those are {image_columns}."
        )
    return name


def _find_label_column(rows: datasets.Dataset, name: str | None, image_column: str) -> str | None:
    if name == "none":
        return None
    if name is None:
        columns = [column for column, feature in rows.features.items() if isinstance(feature, datasets.ClassLabel)]
        if len(columns) > 1:
            raise UserError(f"several columns hold labels: {columns}. Choose one with `--label_column`, or `none`.")
        return columns[0] if columns else None
    if name not in rows.features or name == image_column:
        raise UserError(f"`--label_column` {name!r} is not among the columns {list(rows.features)}; `none`: no labels.")
    return name


def _label_names(train, validation, column: str | None) -> tuple[dict[int, str] | None, dict | None]:
    """Names of the classes by id, and the id of each value of the column where it does not hold ids already."""
    if column is None:
        return None, None
    feature = train.features[column]
    if isinstance(feature, datasets.ClassLabel):
        return dict(enumerate(feature.names)), None
    values = set(train[column]) | (set(validation[column]) if column in validation.features else set())
    if all(isinstance(value, int) and not isinstance(value, bool) for value in values):
        return {index: str(index) for index in range(max(values) + 1)}, None
    if all(isinstance(value, str) for value in values):
        return dict(enumerate(sorted(values))), {value: index for index, value in enumerate(sorted(values))}
    raise UserError(f"`--label_column` {column!r} must hold integers or strings without gaps, but holds {feature}.")


def _label_ids(values: list, value2id: dict | None, id2label: dict[int, str], column: str) -> list[int]:
    ids = [value2id[value] for value in values] if value2id is not None else list(values)
    bad = next((value for value in ids if value is None or not 0 <= value < len(id2label)), 0)
    if bad is None or bad != 0:
        raise UserError(
            f"`--label_column` {column!r} holds {bad}, but labels must lie in 0..{len(id2label) - 1}. "
            "Remove the unlabelled rows or train without labels (`--label_column none`)."
        )
    return ids


def _content_of(item: Any) -> Any:
    """The bytes of an image file, or the lists of an array column as they are."""
    if item is None:
        raise ValueError("the row is empty")
    if not isinstance(item, dict):
        return item
    data = item["bytes"] if item["bytes"] is not None else Path(item["path"]).read_bytes()
    if not data:
        raise ValueError("the file has 0 bytes")
    return data


def _fingerprint(rows: datasets.Dataset, image_column: str, labels: list[int] | None) -> str:
    """Hash of the number of rows, all labels and up to 64 images spread over the data."""
    digest = hashlib.sha256(str(len(rows)).encode())
    digest.update(np.asarray(labels if labels is not None else [], dtype=np.int64).tobytes())
    for index in np.unique(np.linspace(0, len(rows) - 1, num=min(64, len(rows))).astype(int)):
        try:
            content = _content_of(rows[int(index)][image_column])
            digest.update(content if isinstance(content, bytes) else np.asarray(content).tobytes())
        except (ValueError, OSError):
            digest.update(b"unreadable")
    return digest.hexdigest()[:16]
