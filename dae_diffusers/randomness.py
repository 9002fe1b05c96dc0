"""Random numbers as pure functions of (seed, position), so that a resumed run continues as if it had never stopped."""

from enum import IntEnum

import numpy as np
import torch


class Stream(IntEnum):
    r"""
    What a derived seed is for: the second number of its key. Two purposes may share a number if the rest of their keys differs. Other
    values would be other random numbers, and a resumed run would not continue.
    """

    AUGMENTATION = 1
    SPLIT = 2
    VALIDATION_NOISE = 3
    SAMPLE_GRID = 4
    SAMPLES = 5
    SAMPLE_LABELS = 6
    CAPTION = 7  # of a draw, not of the seed
    DISCRIMINATOR = 7
    VF_PROJECTION = 8
    REPA_PROJECTION = 9
    POOL = 9  # with the number of the latent
    POOL_BATCH = 10
    POOL_LABELS = 11
    MONITORED_SAMPLES = 12
    REPEATED_SAMPLES = 17


def derived_seed(*key: int) -> int:
    r"""
    A 32-bit seed from non-negative integers, well mixed (numpy's `SeedSequence`). Zeros at the end of a key change nothing.

    It has 32 bits because torch's CPU generator uses no more bits of the value passed to `manual_seed`.
    """
    return int(np.random.SeedSequence(key).generate_state(1)[0])


def seed_microbatch(seed: int, microbatch: int) -> None:
    r"""
    Seeds torch's global generators for one micro-batch. Posterior draws, noise, timesteps and dropout then depend only
    on (seed, micro-batch), whichever process works on it and wherever the run was interrupted.

    Args:
        seed (`int`): Seed of the run.
        microbatch (`int`): Number of the micro-batch in the whole run, counted over all processes.
    """
    torch.manual_seed(derived_seed(seed, microbatch))
