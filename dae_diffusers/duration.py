"""How long something takes, said before it is over."""

import math
import time

_WORTH_SAYING = 3600.0  # seconds
_MEASURED_SECONDS, _MEASURED_STEPS = 20.0, 5


def duration(seconds: float) -> str:
    r"""A duration in round words: "40 seconds", "15 minutes", "3.5 hours", "8 days"."""
    units = (("second", 1, 90), ("minute", 60, 90), ("hour", 3600, 96), ("day", 86400, math.inf))
    unit, size, _ = next(each for each in units if seconds / each[1] < each[2])
    number = seconds / size
    shown = f"{number:.1f}" if size >= 3600 and number < 10 else f"{max(1, number):.0f}"
    shown = shown.removesuffix(".0")
    return f"{shown} {unit}{'' if shown == '1' else 's'}"


class Forecast:
    r"""
    Says after the first steps how long the whole run takes, if it takes hours. The very first step does not count: it compiles and
    warms up.

    Args:
        last_step (`int`): The run's last step.
    """

    def __init__(self, last_step: int):
        self.last_step = last_step
        self._first: tuple[int, float] | None = None
        self._is_over = False

    def after(self, step: int) -> str | None:
        r"""The sentence, once, as soon as it can be said; else None."""
        now = time.monotonic()
        if self._first is None:
            self._first = step, now
        steps, seconds = step - self._first[0], now - self._first[1]
        if self._is_over or steps < _MEASURED_STEPS or seconds < _MEASURED_SECONDS:
            return None
        self._is_over = True
        left = self.last_step - step
        if left * seconds / steps < _WORTH_SAYING:
            return None
        return (
            f"at {seconds / steps:.2g} seconds a step, the {left:,} steps that are left take about {duration(left * seconds / steps)}. "
            "Ctrl-C saves and stops; the same command with --resume_from_checkpoint latest goes on."
        )
