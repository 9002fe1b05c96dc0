"""Forecasts the generation distance of a long training from short ones."""

import math
from dataclasses import dataclass

# 95 % quantiles of Student's t for 1, 2, ... degrees of freedom: the ends of intervals of 90 %. For more, the last one.
_QUANTILES = (6.314, 2.920, 2.353, 2.132, 2.015, 1.943, 1.895, 1.860, 1.833, 1.812, 1.796, 1.782, 1.771, 1.761, 1.753)

Points = list[tuple[float, float]]


@dataclass(frozen=True)
class Forecast:
    r"""
    A forecast distance with its interval of 90 %.

    Attributes:
        value (`float`): The distance that is expected.
        low, high (`float`): The ends of the interval; 0 and infinite if there are too few points to say.
    """

    value: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.value:.3g}" + ("" if math.isinf(self.high) else f" ({self.low:.3g} to {self.high:.3g})")


def forecast(points: dict[str, Points], effort: float) -> dict[str, Forecast]:
    r"""
    Forecasts each candidate's distance. The logarithm of the distance is a straight line over the logarithm of the effort. The slope
    is the same for all candidates, the height is each candidate's own.

    Args:
        points (`dict`): For each candidate, `(effort, distance)` of its trainings so far, both above 0. Effort is, for example, the
            number of steps times the width.
        effort (`float`): That of the training whose distance is asked for.

    Returns:
        `dict`: A [`Forecast`] for each candidate that has a point. While no candidate has two different efforts, the slope is
        taken to be 0.
    """
    logs = {
        name: [(math.log(x), math.log(y)) for x, y in of_name if x > 0 and 0 < y < math.inf]
        for name, of_name in points.items()
    }
    logs = {name: of_name for name, of_name in logs.items() if of_name}
    centres = {name: tuple(_mean(values) for values in zip(*of_name, strict=True)) for name, of_name in logs.items()}
    deviations = [(x - centres[name][0], y - centres[name][1]) for name, of_name in logs.items() for x, y in of_name]
    spread = math.fsum(x * x for x, _ in deviations)
    slope = math.fsum(x * y for x, y in deviations) / spread if spread > 1e-12 else 0.0
    freedom = len(deviations) - len(logs) - (spread > 1e-12)
    rest = math.fsum((y - slope * x) ** 2 for x, y in deviations)
    found = {}
    for name, (x, y) in centres.items():
        away = math.log(effort) - x
        half = math.inf
        if freedom > 0:
            variance = rest / freedom * (1 + 1 / len(logs[name]) + (away * away / spread if spread > 1e-12 else 0))
            half = _QUANTILES[min(freedom, len(_QUANTILES)) - 1] * math.sqrt(variance)
        value = y + slope * away
        found[name] = Forecast(math.exp(value), math.exp(value - half), math.exp(value + half))
    return found


def _mean(values: tuple[float, ...]) -> float:
    return math.fsum(values) / len(values)
