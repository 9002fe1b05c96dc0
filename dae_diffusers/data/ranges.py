"""What a range of values, which serves all channels, leaves of the images."""

import numpy as np

from dae_diffusers.errors import UserError

_SMALL_CHANNEL, _SMALL_CENTRE = 0.01, 0.1  # shares of the range
_PERCENTILES = 0.1, 99.9
_MOST_NAMED = 12  # channels
_SAMPLE = 1_000_000  # values whose percentiles are taken


class ValueSurvey:
    r"""
    The lowest and highest value of each channel, and percentiles of all values, of images that are seen one after the other.

    Args:
        num_images (`int`): How many will be added. The percentiles are those of about a million values.

    Attributes:
        low, high (`np.ndarray` of shape `(C,)`): Of each channel; None before the first image.
    """

    def __init__(self, num_images: int):
        self.num_images = num_images
        self.low: np.ndarray | None = None
        self.high: np.ndarray | None = None
        self._sample: list[np.ndarray] = []
        self._random = np.random.default_rng(0)

    def add(self, pixels: np.ndarray) -> None:
        r"""Adds an image, `(..., C)`."""
        pixels = pixels.reshape(-1, pixels.shape[-1])
        low, high = pixels.min(axis=0), pixels.max(axis=0)
        self.low = low if self.low is None else np.minimum(self.low, low)
        self.high = high if self.high is None else np.maximum(self.high, high)
        number = max(1, _SAMPLE // (max(1, self.num_images) * pixels.shape[1]))
        if number < len(pixels):
            pixels = pixels[self._random.integers(len(pixels), size=number)]
        self._sample.append(pixels.flatten())

    @property
    def range(self) -> list[float]:
        r"""
        The lowest and the highest of all values.

        Raises:
            UserError: If all values are the same.
        """
        low, high = float(self.low.min()), float(self.high.max())
        if not low < high:
            raise UserError(f"all values of the training images are {low}: there is nothing to learn.")
        return [low, high]

    def small_channels(self, value_range: list[float]) -> str | None:
        r"""A sentence that names the channels that use less than 1 % of a range, and says what to do; None if there are none."""
        low, high = value_range
        used = (np.minimum(self.high, high) - np.maximum(self.low, low)).clip(0) / (high - low)
        small = np.flatnonzero(used < _SMALL_CHANNEL).tolist()
        if len(used) < 2 or not small:
            return None
        named = [f"{number + 1} (in [{self.low[number]:g}, {self.high[number]:g}])" for number in small[:_MOST_NAMED]]
        more = f" and {len(small) - _MOST_NAMED} more" if len(small) > _MOST_NAMED else ""
        return (
            f"of {len(used)} channels these use less than 1 % of the range [{low:g}, {high:g}], which serves all: "
            f"{', '.join(named)}{more}. The model hardly sees them. Scale all channels to similar ranges first, and leave out "
            "channels that are the same everywhere."
        )

    def outliers(self, value_range: list[float], *, is_measured: bool) -> str | None:
        r"""
        A sentence about a range of which the values, but for a few outliers, use less than a tenth, and what to do; None otherwise.

        Args:
            value_range (`list[float]`): Its lowest and highest value.
            is_measured (`bool`): Whether it is that of these values, rather than that of the images of a trained model.
        """
        low, high = value_range
        first, last = np.percentile(np.concatenate(self._sample), _PERCENTILES).tolist()
        if last - first >= _SMALL_CENTRE * (high - low):
            return None
        seen = (
            f"the percentiles {_PERCENTILES[0]:g} and {_PERCENTILES[1]:g} of the values are {first:g} and {last:g}, "
            f"{100 * (last - first) / (high - low):.2g} % of the range [{low:g}, {high:g}]"
        )
        if not is_measured:
            return f"{seen} of the trained model: the images look alike to it. Bring their values to the units of its training images."
        advice = f"pass `--value_range {first:g} {last:g}`" if first < last else "give a narrower `--value_range`"
        return (
            f"{seen}: a few outliers widen it, and all other values look alike. If they are no part of the image, {advice}, "
            "which clips them."
        )
