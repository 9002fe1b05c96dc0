"""Buckets: groups of images of about equal proportions, each of which is scaled and cropped to one shape."""

from bisect import bisect_left, bisect_right
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate
from typing import Any

from dae_diffusers.sizes import words_of_size

LONGEST = 2  # the longest shapes have sides this many times as far apart as those of `resolution`


@dataclass(frozen=True)
class Buckets:
    r"""
    The shapes of a data set whose images lie bucket after bucket.

    Attributes:
        sizes (`tuple[tuple[int, int], ...]`): Height and width of each bucket's images, in pixels.
        counts (`tuple[int, ...]`): Number of its images, at least 1.
    """

    sizes: tuple[tuple[int, int], ...]
    counts: tuple[int, ...]

    @cached_property
    def stops(self) -> list[int]:
        r"""The number after the last image of each bucket."""
        return list(accumulate(self.counts))

    @cached_property
    def ranges(self) -> list[range]:
        r"""The numbers of each bucket's images."""
        return [range(stop - count, stop) for stop, count in zip(self.stops, self.counts, strict=True)]

    def of(self, index: int) -> int:
        r"""The bucket of an image, by its number."""
        return bisect_right(self.stops, index)

    def batches(self, indices: range, batch_size: int) -> Iterator[range]:
        r"""Cuts ascending numbers of images into batches of at most `batch_size`, each from one bucket."""
        for images in self.ranges:
            share = indices[bisect_left(indices, images.start) : bisect_left(indices, images.stop)]
            for start in range(0, len(share), batch_size):
                yield share[start : start + batch_size]

    def chosen(self, indices: Sequence[int]) -> "Buckets":
        r"""The buckets of a part of the images, given by their ascending numbers; empty ones are left out."""
        counts = [0] * len(self.counts)
        for index in indices:
            counts[self.of(index)] += 1
        return Buckets.without_empty(self.sizes, counts)

    @classmethod
    def single(cls, count: int, size: tuple[int, int] = (0, 0)) -> "Buckets":
        r"""One bucket of all images; its size matters only where images are read."""
        return cls((size,), (count,))

    @classmethod
    def without_empty(cls, sizes: Iterable[tuple[int, int]], counts: Iterable[int]) -> "Buckets":
        r"""Makes buckets, and leaves out those without images."""
        kept = [(size, count) for size, count in zip(sizes, counts, strict=True) if count]
        return cls(*map(tuple, zip(*kept, strict=True)))

    def record(self, size: tuple[int, int]) -> list[list[int]]:
        r"""Height, width and count of each bucket, for files and fingerprints; empty for a single bucket of the resolution's size."""
        if self.sizes == (tuple(size),):
            return []
        return [[*size, count] for size, count in zip(self.sizes, self.counts, strict=True)]

    def part(self, numbers: Sequence[int]) -> "Buckets":
        r"""Some of the buckets."""
        return Buckets(tuple(self.sizes[n] for n in numbers), tuple(self.counts[n] for n in numbers))

    def __str__(self) -> str:
        parts = zip(self.sizes, self.counts, strict=True)
        return ", ".join(f"{words_of_size(size)} ({count} images)" for size, count in parts)


def buckets_of(dataset: Any) -> Buckets:
    r"""The buckets of a data set of images or latents, or of what wraps one; a single one for any other."""
    return getattr(dataset, "buckets", None) or Buckets.single(len(dataset))


def spread_shapes(size: tuple[int, int], number: int, multiple: int) -> list[tuple[int, int]]:
    r"""
    Shapes of about the same area, from wide to tall, evenly spread; in their middle is `size` itself.

    Args:
        size (`tuple[int, int]`): Height and width, in pixels.
        number (`int`): How many, odd. Shapes that rounding makes equal count once.
        multiple (`int`): What both sides of each are multiples of.

    Returns:
        `list[tuple[int, int]]`: Heights and widths.
    """
    height, width = size
    half, shapes = number // 2, {}
    for step in range(-half, half + 1):
        scale = LONGEST ** (abs(step) / max(1, half) / 2)
        longer = max(1, round((width if step < 0 else height) * scale / multiple)) * multiple
        shorter = max(1, round(height * width / longer / multiple)) * multiple
        shape = (shorter, longer) if step < 0 else (longer, shorter)
        shapes[tuple(size) if step == 0 else shape] = None
    return list(shapes)
