"""The noise levels between which guidance acts, as flags have them."""

from collections.abc import Sequence

from dae_diffusers.errors import ConfigError

ALL_LEVELS = (0.0, 1.0)
# Of new pipelines: guidance at high noise harms (benchmarks/results/guidance_interval.md).
DEFAULT_INTERVAL = (0.0, 0.6)


def intervals_of(name: str, levels: Sequence[float]) -> list[tuple[float, float]]:
    r"""
    Pairs of noise levels that a flag has one after another.

    Args:
        name (`str`): The flag, for messages.
        levels (`Sequence[float]`): From 0 (clean) to 1 (noise).

    Raises:
        ConfigError: If they are no pairs, or the lower one does not come first.
    """
    pairs = list(zip(levels[::2], levels[1::2], strict=False))
    if len(levels) % 2 or any(low > high for low, high in pairs):
        raise ConfigError(
            f"`{name}` is {list(levels)}, but must be pairs of noise levels, the lower one first, such as 0 0.6."
        )
    return pairs


def check_interval(name: str, levels: Sequence[float] | None) -> None:
    r"""Raises `ConfigError` unless a flag has one pair of noise levels, or None."""
    if levels is not None and len(intervals_of(name, levels)) != 1:
        raise ConfigError(f"`{name}` is {list(levels)}, but must be two noise levels, such as 0 0.6.")
