"""Drawings of one setting: the same images to draw, with other noise each time."""

import statistics
from dataclasses import replace

from dae_diffusers.metrics.sampling import SampleSettings
from dae_diffusers.randomness import derived_seed


def drawings_of(settings: SampleSettings, number: int) -> list[SampleSettings]:
    r"""The same setting with `number` seeds of noise, its own first."""
    seeds = [settings.seed, *(derived_seed(settings.seed, 17, drawing) for drawing in range(1, number))]
    return [replace(settings, seed=seed) for seed in seeds]


def over_drawings(rows: list[dict[str, float]], distance: str) -> dict[str, float]:
    r"""The means of each metric over drawings of one setting; of several, also `<distance>_sd`, the standard deviation of one drawing."""
    if len(rows) == 1:
        return rows[0]
    means = {}
    for name in rows[0]:
        means[name] = statistics.mean(row[name] for row in rows)
        if name == distance:
            means[f"{name}_sd"] = statistics.stdev(row[name] for row in rows)
    return means
