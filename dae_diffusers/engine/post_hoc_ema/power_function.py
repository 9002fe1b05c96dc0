r"""
The mathematics of power-function averages of the weights.

The average of exponent $\gamma$ at step $t$ weighs the weights of step $\tau$ by $\tau^\gamma$, for $0 < \tau \le t$. Its *length*
$\sigma_{rel}$ is the standard deviation of that profile as a share of $t$: it averages over the same share of the training, however long
that is.

Source: Karras et al., 2024, https://huggingface.co/papers/2312.02696, section 3 and appendix C.
"""

import math

import numpy as np

from dae_diffusers.engine.post_hoc_ema.settings import MAX_LENGTH


def exponent_of(length: float) -> float:
    r"""
    The exponent $\gamma \ge 0$ of an average. It solves $\sigma_{rel}^2 (\gamma + 2)^2 (\gamma + 3) = \gamma + 1$.

    Args:
        length (`float`): Its length, above 0 and at most `MAX_LENGTH`.

    Raises:
        ValueError: For another length.
    """
    if not 0 < length <= MAX_LENGTH:
        raise ValueError(
            f"`length` is {length}, but must be above 0 and at most {MAX_LENGTH} (the average of all steps)."
        )
    inverse = length**-2
    roots = np.roots([1, 7, 16 - inverse, 12 - inverse])
    return max(0.0, float(roots.real.max()))


def decay_at(exponent: float, step: int) -> float:
    r"""The share of the average before that stays in the average at a step, `(1 - 1 / step) ** (exponent + 1)`; 0 at the first."""
    return (1 - 1 / step) ** (exponent + 1)


def products(exponents: np.ndarray, steps: np.ndarray, exponent: np.ndarray, step: np.ndarray) -> np.ndarray:
    r"""
    Inner products of the profiles of averages, as integrals over the training.

    Args:
        exponents, exponent (`np.ndarray`): Exponents of both averages; the arguments broadcast.
        steps, step (`np.ndarray`): The steps of both averages, in any unit.
    """
    first, second = exponents + 1, exponent + 1
    both = first + second - 1
    logarithm = both * np.log(np.minimum(steps, step)) - first * np.log(steps) - second * np.log(step)
    return first * second / both * np.exp(logarithm)


def combination(lengths: np.ndarray, steps: np.ndarray, length: float, step: float) -> tuple[np.ndarray, float]:
    r"""
    The combination of stored averages that comes closest to another average, by least squares over the profiles.

    Args:
        lengths, steps (`np.ndarray` of shape `(N,)`): The stored averages.
        length, step (`float`): The wanted one.

    Returns:
        `tuple[np.ndarray, float]`: The factor of each stored average, `(N,)`, whose sum is 1; and the error of the resulting profile, as a
        share of the profile's norm.
    """
    exponents, times = np.array([exponent_of(each) for each in lengths]), np.asarray(steps) / step
    wanted = np.array(exponent_of(length))
    norm = float(products(wanted, np.array(1.0), wanted, np.array(1.0)))
    gram = products(exponents[:, None], times[:, None], exponents[None], times[None]) / norm
    target = products(exponents, times, wanted, np.array(1.0)) / norm
    # A Lagrange multiplier keeps the sum: then weights that never change are their own average.
    system = np.block([[gram, np.ones((len(times), 1))], [np.ones((1, len(times))), np.zeros((1, 1))]])
    factors = np.linalg.lstsq(system, np.append(target, 1.0), rcond=None)[0][:-1]
    squared = factors @ gram @ factors - 2 * factors @ target + 1
    return factors, math.sqrt(max(0.0, float(squared)))
