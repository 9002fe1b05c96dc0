"""Divides a budget of time among candidates: successive halving."""

import math
from dataclasses import asdict, dataclass
from typing import Any

from dae_diffusers.errors import UserError
from dae_diffusers.search.settings import show_seconds

MIN_STEPS = 100  # fewer steps rank latent spaces at random, and more can, too: benchmarks/results/forecast.md
_SHARE = 0.5  # of the budget for choosing; the winner gets the rest


@dataclass(frozen=True)
class Speeds:
    r"""
    Seconds that things take here.

    Attributes:
        autoencoder, generator (`float`): A step of joint training, and of a generator.
        fixed (`float`): Everything around them for a candidate in a rung: starting, caching, drawing and measuring.
    """

    autoencoder: float
    generator: float
    fixed: float


@dataclass(frozen=True)
class Rung:
    r"""
    What the candidates of a rung get.

    Attributes:
        candidates (`int`): How many there are.
        autoencoder_steps (`int`): Steps of joint training in all; two stages share about as much time.
        generator_steps (`int`): Steps of the pilot.
    """

    candidates: int
    autoencoder_steps: int
    generator_steps: int

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def turns_of(trials: int, workers: int) -> int:
    r"""How many trials one after another it takes, where processes share them."""
    return math.ceil(trials / min(trials, workers))


def plan_rungs(
    budget: float, candidates: int, keep_one_in: int, speeds: Speeds, workers: int = 1, used: float = 0.0
) -> list[Rung]:
    r"""
    The rungs in which candidates are chosen. Each next one has a third (or another part) of the candidates, trained three times as
    long. An autoencoder and its pilot get the same time. There are as many rungs as possible without going below `MIN_STEPS` in the first.

    Args:
        budget (`float`): Seconds for the whole search, the winner's training included.
        candidates (`int`): How many begin.
        keep_one_in (`int`): The part that goes on.
        speeds ([`Speeds`]): How fast training is here.
        workers (`int`, *optional*): Processes that share the candidates.
        used (`float`, *optional*): Seconds of the budget that are gone.

    Returns:
        `list[Rung]`: Empty for a single candidate.

    Raises:
        UserError: If the budget cannot hold them. It says the least that would do.
    """
    counts = []
    while candidates > 1:
        counts.append(candidates)
        candidates = max(1, candidates // keep_one_in)
    left, least = budget - used, 2 * MIN_STEPS * max(speeds.autoencoder, speeds.generator)
    while True:
        turns = [turns_of(count, workers) * keep_one_in**rung for rung, count in enumerate(counts)]
        fixed = math.fsum(turns_of(count, workers) * speeds.fixed for count in counts)
        needed = (fixed + least * sum(turns)) / _SHARE
        if needed <= left or len(counts) < 2:
            break
        counts.pop()
    if needed > left or not counts and left < least / _SHARE:
        raise UserError(
            f"`budget` {show_seconds(budget)} cannot hold {counts[0] if counts else 1} candidates: here they need at least "
            f"{show_seconds(max(needed, least / _SHARE) * 1.05 + used + 1)}. Give that, or fewer `candidates`."
        )
    each = (_SHARE * left - fixed) / max(1, sum(turns)) / 2
    return [
        Rung(
            count,
            int(each / speeds.autoencoder) * keep_one_in**rung,
            int(each / speeds.generator) * keep_one_in**rung,
        )
        for rung, count in enumerate(counts)
    ]


def plan_winner(left: float, speeds: Speeds, before: Rung | None, train_generator: bool) -> Rung:
    r"""What the winner gets of the seconds that are left: never less than it has had."""
    seconds = max(0.0, left - speeds.fixed) / (2 if train_generator else 1)
    least = (MIN_STEPS, MIN_STEPS) if before is None else (before.autoencoder_steps, before.generator_steps)
    had = 0 if before is None else before.autoencoder_steps
    return Rung(
        1,
        max(least[0], had + int(seconds / speeds.autoencoder)),
        max(least[1], int(seconds / speeds.generator)),
    )
