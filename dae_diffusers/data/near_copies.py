"""Finds images that look like others: the same picture, compressed or scaled once more."""

import itertools
from collections.abc import Iterator

import numpy as np
import torch
import torch.nn.functional as F

SIDE, _MOST_CHANNELS = 8, 4  # of a thumbnail
# The most by which near copies differ: in the mean of the channels and in each of them, of values in [-1, 1] ...
_MOST_IN_BRIGHTNESS, _MOST_IN_CHANNEL = 0.06, 0.18
# ... and in all, as a share of the standard deviation, so that pale images are told apart, too.
_MOST_OF_CONTRAST = 0.12
# Of more images than this, not all pairs are compared. They are sorted into cells by the directions in which they differ most.
_FEW, _NUM_DIRECTIONS = 1000, 4
# The most by which near copies differ in one of these directions, per value. Of 18,000 that were saved again, two differed by more.
_MOST_IN_DIRECTION = 0.03
_MOST_PAIRS = 1_000_000  # compared for one way to lay the cells
_ROUNDING = 1e-6


def thumbnail(pixel_values: torch.Tensor) -> np.ndarray:
    r"""
    The means of 8 x 8 parts of an image.

    Args:
        pixel_values (`torch.Tensor` of shape `(C, H, W)`): In [-1, 1].

    Returns:
        `np.ndarray` of shape `(min(C, 4), 64)`: float32. Of more than four channels, neighbours are averaged.
    """
    size = (min(len(pixel_values), _MOST_CHANNELS), SIDE, SIDE)
    return F.adaptive_avg_pool3d(pixel_values[None].float(), size).flatten(2)[0].numpy()


def first_alike(thumbnails: np.ndarray) -> np.ndarray:
    r"""
    Finds near copies: images whose thumbnails differ by at most 3 % of the range in brightness, by 9 % in each channel, and by 12 % of
    their contrast.

    They are copies that were saved again as JPEG or in another size. Mirrored, cropped and recoloured ones are not found. If tens of
    thousands of images look alike, some are missed.

    Taken for copies by mistake are no packaged digits, none of 50,000 images of CIFAR-10, and 0.26 % of 3,403 emoji at 64 pixels, half of
    which differ from others by a skin tone (1.2 % in gray). Of images saved again as JPEG of quality 75 at least 99.6 % are found. A 64-bit
    difference hash of small or flat images does neither: with a distance of at most 3 it takes 67 % of the digits and 53 % of the emoji for
    copies. `benchmarks/results/near_copies.md` has the table.

    Args:
        thumbnails (`np.ndarray` of shape `(N, C, 64)`): From [`thumbnail`].

    Returns:
        `np.ndarray` of shape `(N,)`: int64, the lowest number of an image that looks like this one; its own if there is none before it.
    """
    firsts = np.arange(len(thumbnails))
    flat, brightness = thumbnails.reshape(len(thumbnails), -1), thumbnails.mean(axis=1)
    contrast = flat.std(axis=1)
    for pair in _all_pairs(len(flat)) if len(flat) <= _FEW else _likely_pairs(flat, float(contrast.max())):
        pair = pair[:, pair[0] < firsts[pair[1]]]  # the others would change nothing
        difference = brightness[pair[0]] - brightness[pair[1]]
        pair = pair[:, np.abs(difference).max(axis=1) <= _MOST_IN_BRIGHTNESS]
        difference = flat[pair[0]] - flat[pair[1]]
        most = _MOST_OF_CONTRAST * flat.shape[1] ** 0.5 * contrast[pair].min(axis=0) + _ROUNDING
        is_near = (np.abs(difference).max(axis=1) <= _MOST_IN_CHANNEL) & (np.linalg.norm(difference, axis=1) <= most)
        np.minimum.at(firsts, pair[1, is_near], pair[0, is_near])
    return firsts


def _all_pairs(count: int) -> Iterator[np.ndarray]:
    """Pairs of images `(2, M)`, the lower number first."""
    numbers = np.arange(count)
    for step in range(1, count):
        yield np.stack((numbers[:-step], numbers[step:]))


def _likely_pairs(flat: np.ndarray, contrast: float) -> Iterator[np.ndarray]:
    """As [`_all_pairs`], but only those that lie close in the directions of the largest variance."""
    centred = flat - flat.mean(axis=0)
    directions = np.linalg.eigh(centred.T @ centred)[1][:, -_NUM_DIRECTIONS:]
    places = (centred @ directions)[:, ::-1]
    tolerance = _MOST_IN_DIRECTION * flat.shape[1] ** 0.5 * min(1, 2 * contrast) + _ROUNDING
    # Places closer than half a cell share a cell of one of two grids, half a cell apart.
    for shifts in itertools.product((0.0, 0.5), repeat=_NUM_DIRECTIONS):
        cells = np.floor(places / (2 * tolerance) + shifts).astype(np.int64)
        cell = np.unique(cells, axis=0, return_inverse=True)[1].reshape(-1)
        order = np.lexsort((places[:, 0], cell))
        cell, place = cell[order], places[order, 0]
        starts, num_pairs = np.arange(len(order)), 0
        for step in range(1, len(order)):  # next neighbours, then those one further, and so on
            starts = starts[starts + step < len(order)]
            starts = starts[(cell[starts] == cell[starts + step]) & (place[starts + step] - place[starts] <= tolerance)]
            num_pairs += len(starts)
            if not len(starts) or num_pairs > _MOST_PAIRS:
                break
            yield np.sort([order[starts], order[starts + step]], axis=0)
