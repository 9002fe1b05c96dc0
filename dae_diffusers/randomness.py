"""Random numbers as pure functions of (seed, position), so that a resumed run continues as if it had never stopped."""

import numpy as np
import torch


def derived_seed(*key: int) -> int:
    r"""
    A 32-bit seed from any number of non-negative integers, well mixed (numpy's `SeedSequence`).

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
