"""How long something takes, said before it is over."""

import math
import time

_LONG = 3600.0  # seconds
_MEASURED_SECONDS, _MEASURED_STEPS = 20.0, 5


def duration(seconds: float) -> str:
    r"""A duration in round words: "40 seconds", "15 minutes", "3.5 hours", "8 days"."""
    units = (("second", 1, 90), ("minute", 60, 90), ("hour", 3600, 96), ("day", 86400, math.inf))
    unit, size, _ = next(each for each in units if seconds / each[1] < each[2])
    number = seconds / size
    shown = f"{number:.1f}" if size >= 3600 and number < 10 else f"{max(1, number):.0f}"
    shown = shown.removesuffix(".0")
    return f"{shown} {unit}{'' if shown == '1' else 's'}"


def pace(steps: int, seconds: float, images: int, of: int | None) -> str:
    r"""
    What steps take, in words.

    Args:
        steps (`int`): Number of steps.
        seconds (`float`): Of a step.
        images (`int`): Of a step.
        of (`int`, *optional*): Number of training images; None if unknown.
    """
    seen = "" if not of else f", {steps * images / of:,.3g} passes over the images"
    return (
        f"{duration(steps * seconds)}, at {seconds:.2g} seconds a step, {images / seconds:,.3g} images a second{seen}"
    )


class Forecast:
    r"""
    Says after the first steps how fast the run is and how long the rest takes. The very first step does not count: it compiles and
    warms up.

    Args:
        last_step (`int`): The run's last step.
        images (`int`): Of a step.
        of (`int`, *optional*): Number of training images; None if unknown.
        advice (`str`, *optional*): How the run would be faster.
        long_advice (`str`, *optional*): How it might be, if more than an hour is left.
    """

    def __init__(
        self, last_step: int, images: int, of: int | None, advice: str | None = None, long_advice: str | None = None
    ):
        self.last_step, self._images, self._of = last_step, images, of
        self._advice, self._long_advice = advice, long_advice
        self._first: tuple[int, float] | None = None
        self._is_over = False

    def after(self, step: int) -> str | None:
        r"""The sentence, once, as soon as it can be said; else None."""
        now = time.monotonic()
        if self._first is None:
            self._first = step, now
        steps, seconds = step - self._first[0], now - self._first[1]
        left = self.last_step - step
        if self._is_over or steps < _MEASURED_STEPS or seconds < _MEASURED_SECONDS or not left:
            return None
        self._is_over = True
        text = f"the {left:,} steps that are left take about {pace(left, seconds / steps, self._images, self._of)}."
        text += f" {self._advice}" if self._advice else ""
        if left * seconds / steps < _LONG:
            return text
        text += f" {self._long_advice}" if self._long_advice else ""
        return f"{text} Ctrl-C saves and stops; the same command with --resume_from_checkpoint latest goes on."
