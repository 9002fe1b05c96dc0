"""Random numbers as pure functions of (seed, position), so that a run continues as if it had never stopped."""

import numpy as np
import torch


def derived_seed(*key: int) -> int:
    r"""
    A 32-bit seed from any number of non-negative integers, well mixed (numpy's `SeedSequence`).

    32 bits because torch's CPU generator uses no more of what `manual_seed` is given.
    """
    return int(np.random.SeedSequence(key).generate_state(1)[0])


def seed_microbatch(seed: int, microbatch: int) -> None:
    r"""
    Seeds torch's global generators for one micro-batch: posterior draws, noise, timesteps and dropout then depend on
    nothing but (seed, micro-batch), whichever process works on it and wherever the run was interrupted.

    Args:
        seed (`int`): The run's.
        microbatch (`int`): Its number in the whole run, counted over all processes.
    """
    torch.manual_seed(derived_seed(seed, microbatch))
