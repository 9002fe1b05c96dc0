"""Statistics of runs."""

import math

import torch


def rank_correlation(x: list[float], y: list[float]) -> float:
    r"""Spearman's; equal values share the mean of their ranks. NaN for fewer than three values, or NaN among them."""
    if len(x) < 3 or any(map(math.isnan, [*x, *y])):
        return math.nan
    return float(torch.corrcoef(torch.stack([_mean_ranks(values) for values in (x, y)]))[0, 1])


def _mean_ranks(values: list[float]) -> torch.Tensor:
    _, which, counts = torch.tensor(values, dtype=torch.float64).unique(return_inverse=True, return_counts=True)
    return (counts.cumsum(0) - (counts - 1) / 2).double()[which]
