"""What training will see of a data set: crops, classes, counts and sizes."""

import math
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image

from dae_diffusers.data import ImageDataset, StreamedImages
from dae_diffusers.data.arrays import contained, without_warnings
from dae_diffusers.data.buckets import Buckets
from dae_diffusers.data.dataset import choose_indices
from dae_diffusers.data.groups import count_groups
from dae_diffusers.data.streaming import ImageStream
from dae_diffusers.plots import image_grid
from dae_diffusers.randomness import Stream, derived_seed
from dae_diffusers.sizes import words_of_size

LOOKED_AT = 512  # images whose size is measured; of a stream these are all that is known
_MAX_CLASSES = 12
_TILE = 96  # pixels of a side, at least
_DIM = 0.35
_SHOWN_CAPTIONS = 8


@dataclass
class Seen:
    r"""
    One image.

    Attributes:
        whole (`np.ndarray` of shape `(H, W, C)`): The file's picture in [-1, 1].
        pixel_values (`torch.Tensor` of shape `(C, height, width)`): What training gets, in [-1, 1].
        label (`int` or `None`): Its class.
        condition (`torch.Tensor` of shape `(C, height, width)`, *optional*): Its condition image as training gets it, in [-1, 1].
    """

    whole: np.ndarray
    pixel_values: torch.Tensor
    label: int | None
    condition: torch.Tensor | None = None


@without_warnings()
def look(images: ImageDataset | StreamedImages, seed: int, indices: Iterable[int] = ()) -> Iterator[Seen]:
    r"""Reads images with the augmentation of their first pass: those of the indices, or the first of a stream."""
    if isinstance(images, StreamedImages):
        for rows in ImageStream(images, 1, seed=seed, max_samples=LOOKED_AT):
            batch = images.read(rows)
            if batch is None:
                continue
            label = int(batch["class_labels"][0]) if "class_labels" in batch else None
            yield Seen(images.whole(rows[0]), batch["pixel_values"][0], label)
        return
    for index in map(int, indices):
        item = index, derived_seed(seed, Stream.AUGMENTATION, index)
        batch, condition = images[item], images.condition_images and images.condition_images[item]["pixel_values"]
        yield Seen(images.whole(index), batch["pixel_values"], batch.get("class_labels"), condition)


def of_each_class(images: ImageDataset | StreamedImages, seed: int, number: int) -> dict[int | None, list[Seen]]:
    r"""Up to `number` images of each class, of the first 12 classes that have images; without classes, of all images together."""
    if isinstance(images, StreamedImages):
        chosen: dict[int | None, list[Seen]] = {}
        for seen in look(images, seed):
            of_class = chosen.setdefault(seen.label, [])
            if len(of_class) < number:
                of_class.append(seen)
        return {label: chosen[label] for label in sorted(chosen, key=lambda label: label or 0)[:_MAX_CLASSES]}
    if images.labels is None:
        return {None: [*look(images, seed, choose_indices(len(images), number))]}
    labels = np.array(images.labels)
    found = {label: np.flatnonzero(labels == label) for label in np.unique(labels).tolist()[:_MAX_CLASSES]}
    return {label: [*look(images, seed, of[choose_indices(len(of), number)])] for label, of in found.items()}


def draw(chosen: dict[int | None, list[Seen]], id2label: dict[int, str] | None, *, shows_crop: bool) -> Image.Image:
    r"""
    For each class a row of whole pictures, with what the crop leaves out darkened, and below it what training gets: the images, and
    their condition images if they have some.

    Args:
        chosen (`dict`): From [`of_each_class`].
        id2label (`dict[int, str]` or `None`): Names of the classes.
        shows_crop (`bool`): Whether the crop is the centre one, so that it can be shown.
    """
    rows, names = [], []
    columns = max(map(len, chosen.values()))
    every = [each.pixel_values.shape for seen in chosen.values() for each in seen]
    channels, height, width = map(max, zip(*every, strict=True))
    factor = -(-_TILE // max(height, width))
    blank = torch.ones(channels, height * factor, width * factor)
    for label, seen in chosen.items():
        wholes = [_tile(each.whole, shape_of(each), blank.shape[1:], shows_crop=shows_crop) for each in seen]
        below = [[each.pixel_values for each in seen]]
        if seen[0].condition is not None:
            below.append([_with_channels(each.condition, channels) for each in seen])
        enlarged = [
            [_centred(each.repeat_interleave(factor, 1).repeat_interleave(factor, 2), blank.shape[1:]) for each in row]
            for row in below
        ]
        for row in (wholes, *enlarged):
            rows += [*row, *[blank] * (columns - len(row))]
        names += ["file" if label is None else id2label[label][:24], "training", "condition"][: 1 + len(below)]
    return image_grid(torch.stack(rows), columns=columns, row_names=names)


def _with_channels(image: torch.Tensor, channels: int) -> torch.Tensor:
    """The image with as many channels: a gray one repeated, or else its first ones, with black for what lacks."""
    if len(image) == 1:
        return image.expand(channels, -1, -1)
    return torch.cat((image[:channels], -torch.ones(max(0, channels - len(image)), *image.shape[1:])))


def shape_of(seen: Seen) -> tuple[int, int]:
    r"""Height and width of what training gets."""
    return tuple(seen.pixel_values.shape[1:])


def _tile(whole: np.ndarray, shape: tuple[int, int], size: tuple[int, int], *, shows_crop: bool) -> torch.Tensor:
    """The whole picture inside a white tile; what the centre crop to the proportions of `shape` leaves out is darkened."""
    height, width, channels = whole.shape
    image = torch.from_numpy(np.ascontiguousarray(whole)).permute(2, 0, 1)
    if shows_crop:
        rows, columns = (round(side) for side in _kept(height, width, shape))
        top, left = (height - rows) // 2, (width - columns) // 2
        shade = torch.full((height, width), _DIM)
        shade[top : top + rows, left : left + columns] = 1
        image = (image + 1) * shade - 1
    scale = min(size[0] / height, size[1] / width)
    inner = [max(1, round(height * scale)), max(1, round(width * scale))]
    image = torch.nn.functional.interpolate(image[None], size=inner, mode="bilinear", antialias=True)[0]
    return _centred(image, size)


def _centred(image: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
    """The image in the middle of a white tile."""
    tile = torch.ones(image.shape[0], *size)
    height, width = image.shape[1:]
    top, left = (size[0] - height) // 2, (size[1] - width) // 2
    tile[:, top : top + height, left : left + width] = image
    return tile


def _kept(height: float, width: float, size: tuple[int, int]) -> tuple[float, float]:
    """Height and width of what the centre crop to the proportions of `size` keeps."""
    scale = min(height / size[0], width / size[1])
    return size[0] * scale, size[1] * scale


def counts(train: ImageDataset | StreamedImages, validation: ImageDataset, looked: list[Seen]) -> str:
    r"""A Markdown table of the classes: training and validation images, and the share of the training images."""
    is_stream = isinstance(train, StreamedImages)
    if train.id2label is None:
        known = (train.num_examples or "unknown") if is_stream else len(train)
        return f"No classes. Training images: {known}. Validation images: {len(validation)}.\n"
    of_train = Counter(seen.label for seen in looked) if is_stream else Counter(train.labels)
    of_validation, total = Counter(validation.labels), of_train.total()
    head = f"training images{f' (of the first {total})' if is_stream else ''}"
    lines = [f"| class | {head} | share | validation images |", "|---|---|---|---|"]
    for label, name in train.id2label.items():
        share = of_train[label] / max(1, total)
        lines.append(f"| {name} | {of_train[label]} | {share:.1%} | {of_validation[label]} |")
    return "\n".join([*lines, f"| all | {total} | | {len(validation)} |"]) + "\n"


def conditions(train: ImageDataset | StreamedImages) -> str:
    r"""
    Markdown about what else images are drawn from: the classes of further columns, and the range of numbers; empty if there is
    nothing.
    """
    columns = getattr(train, "conditions", None)
    if columns is None:
        return ""
    parts = []
    for name, labels in columns.labels.items():
        counted = Counter(labels)
        lines = [f"| {name} | training images |", "|---|---|"]
        parts.append(lines + [f"| {each} | {counted[number]} |" for number, each in enumerate(columns.names[name])])
    if columns.numbers:
        lines = ["| number | lowest | mean | highest | unknown |", "|---|---|---|---|---|"]
        for name, values in columns.numbers.items():
            known = [value for value in values if value is not None]
            found = (min(known), sum(known) / len(known), max(known)) if known else ()
            cells = [f"{value:.4g}" for value in found] or [""] * 3
            lines.append(f"| {name} | {' | '.join(cells)} | {values.count(None)} |")
        parts.append(lines)
    return "".join("\n" + "\n".join(lines) + "\n" for lines in parts)


def captions(train: ImageDataset | StreamedImages) -> str:
    r"""Markdown about the captions: how many and how long they are, which one many images share, and some; empty without captions."""
    if getattr(train, "captions", None) is None:
        return ""
    of_each = [[text for text in texts if text] for texts in train.captions]
    numbers, every = [len(texts) for texts in of_each], [text for texts in of_each for text in texts]
    words = sorted(len(text.split()) for text in every)
    if not every:
        return f"\nNone of the {len(of_each)} images has a caption.\n"
    lines = [
        f"Captions (`{'`, `'.join(train.config.caption_columns)}`): {_range(numbers)} for each image, {_range(words)} words long "
        f"(median {words[len(words) // 2]})."
    ]
    if 0 in numbers:
        lines.append(f"{numbers.count(0)} of {len(numbers)} images have none.")
    shared, count = Counter(text for texts in of_each for text in {*texts}).most_common(1)[0]
    if count > 1:
        lines.append(f"Of {len(every)} captions {len({*every})} are different; {count} images share {shared!r}.")
    some = [
        " / ".join(texts)
        for texts in (of_each[index] for index in choose_indices(len(of_each), _SHOWN_CAPTIONS))
        if texts
    ]
    return "\n" + " ".join(lines) + "\n\n" + "".join(f"- {text}\n" for text in some)


def _range(numbers: list[int]) -> str:
    low, high = min(numbers), max(numbers)
    return str(low) if low == high else f"{low} to {high}"


def groups(train: ImageDataset | StreamedImages, validation: ImageDataset) -> str:
    r"""A Markdown sentence about the groups that are held out together; empty without a column of them."""
    if getattr(train, "groups", None) is None:
        return ""
    of_both = count_groups(train.groups), count_groups(validation.groups)
    column = train.config.group_column
    return f"\nGroups (`{column}`) of training images: {of_both[0]}. Of validation images: {of_both[1]}.\n"


def sizes(looked: list[Seen], buckets: Buckets | None = None, *, are_padded: bool = False) -> str:
    r"""
    Sentences about the sizes of the files: how many are enlarged, what the crop leaves out or padding adds, and which shapes they
    get.
    """
    sides = np.array([seen.whole.shape[:2] for seen in looked])
    short, long = sides.min(axis=1), sides.max(axis=1)
    shapes = [shape_of(seen) for seen in looked]
    smaller = int((sides < np.array(shapes)).any(axis=1).sum())
    kept = [
        math.prod(_kept(*each, shape)) / math.prod(each) for each, shape in zip(sides.tolist(), shapes, strict=True)
    ]
    several = buckets is not None and len(buckets.sizes) > 1
    than = "their shape" if several else f"{words_of_size(shapes[0])} pixels"
    text = f"\nShapes: {buckets}. Training rounds their sides to what its autoencoder needs.\n" if several else ""
    if (sides == sides[0]).all():
        found = f"All {len(looked)} files have {words_of_size(sides[0].tolist())} pixels."
    else:
        found = (
            f"Of {len(looked)} files: the shorter side has {short.min()} to {short.max()} pixels, the longer one {long.min()} to "
            f"{long.max()}."
        )
    enlarged = f" {smaller} are smaller than {than} and are enlarged." if smaller else ""
    cut = " The crop keeps all of each."
    if are_padded:
        shares = [
            math.prod(contained(each[::-1], shape)) / math.prod(shape)
            for each, shape in zip(sides.tolist(), shapes, strict=True)
        ]
        cut = f" Padding is {1 - np.mean(shares):.0%} of the area on average, at most {1 - min(shares):.0%}."
    elif min(kept) < 1:
        cut = f" The crop keeps {np.mean(kept):.0%} of the area on average, at least {min(kept):.0%}."
    return f"{found}{enlarged}{cut}\n{text}"
