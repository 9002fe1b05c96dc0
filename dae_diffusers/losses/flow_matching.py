"""Flow matching along straight lines from data (`sigma = 0`) to noise (`sigma = 1`)."""

from typing import Literal

import torch
from diffusers.training_utils import compute_density_for_timestep_sampling

TimestepSampling = Literal["logit_normal", "uniform"]


def sample_sigmas(
    batch_size: int,
    *,
    sampling: TimestepSampling = "logit_normal",
    shift: float = 1.0,
    device: torch.device | str = "cpu",
    generator: torch.Generator | None = None,
) -> torch.Tensor:
    r"""
    Draws noise levels for training.

    Args:
        batch_size (`int`): Number of draws.
        sampling (`str`, *optional*): `logit_normal` (the sigmoid of a standard normal) or `uniform`.
        shift (`float`, *optional*, defaults to 1.0): Above 1 moves the draws towards noise, as
            `FlowMatchEulerDiscreteScheduler(shift=...)` does when sampling: `shift * s / (1 + (shift - 1) * s)`.
        device (`torch.device`, *optional*): Where they are drawn.
        generator (`torch.Generator`, *optional*): What draws them; default: torch's own.

    Returns:
        `torch.Tensor` of shape `(batch_size,)`: In [0, 1], float32.

    Source: Esser et al., 2024, https://huggingface.co/papers/2403.03206, sections 3.1 and 5.3.2.
    """
    sigmas = compute_density_for_timestep_sampling(
        "logit_normal" if sampling == "logit_normal" else "none",
        batch_size=batch_size,
        logit_mean=0.0,
        logit_std=1.0,
        device=device,
        generator=generator,
    )
    return shifted(sigmas, shift)


def shifted(sigmas: torch.Tensor, shift: float) -> torch.Tensor:
    r"""Noise levels moved towards noise by a shift above 1: `shift * s / (1 + (shift - 1) * s)`."""
    return shift * sigmas / (1 + (shift - 1) * sigmas)


def interpolate(latents: torch.Tensor, noise: torch.Tensor, sigmas: torch.Tensor) -> torch.Tensor:
    r"""`(1 - sigma) * latents + sigma * noise`; `(B, C, h, w)` twice and `(B,)` to `(B, C, h, w)`."""
    sigmas = sigmas.view(-1, *[1] * (latents.dim() - 1))
    return (1 - sigmas) * latents + sigmas * noise


def flow_matching_loss(velocity: torch.Tensor, latents: torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
    r"""
    `mean((velocity - (noise - latents))^2)`.

    Args:
        velocity (`torch.Tensor` of shape `(B, C, h, w)`): The prediction at `interpolate(latents, noise, sigmas)`.
        latents (`torch.Tensor` of shape `(B, C, h, w)`): Normalised latents.
        noise (`torch.Tensor` of shape `(B, C, h, w)`): Standard normal.

    Returns:
        `torch.Tensor` of shape `(B,)`: Mean per element for each sample, float32.

    Source: Lipman et al., 2022, https://huggingface.co/papers/2210.02747.
    """
    return (velocity.float() - (noise - latents).float()).square().mean(dim=(1, 2, 3))
