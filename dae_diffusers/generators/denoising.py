"""What a transformer learns to predict: the velocity of flow matching, or what a scheduler for diffusion asks for."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from diffusers import DDPMScheduler, SchedulerMixin, UniPCMultistepScheduler

from dae_diffusers.losses.flow_matching import TimestepSampling, flow_matching_loss, interpolate, sample_sigmas, shifted
from dae_diffusers.pipelines.dae_dit import FLOW_SETTINGS

Model = Callable[..., tuple[torch.Tensor]]


def flow_scheduler(shift: float = 1.0) -> SchedulerMixin:
    r"""
    The scheduler that new pipelines of flow matching get: a solver of second order, because in 10 steps it comes closer to the
    data than Euler steps in 25 (`benchmarks/solvers.py`).
    """
    return UniPCMultistepScheduler(**FLOW_SETTINGS, flow_shift=shift)


@dataclass(frozen=True)
class FlowMatching:
    r"""
    Flow matching: the velocity `noise - latents` at `timestep = 1000 * sigma`.

    Attributes:
        sampling (`str`): Distribution of the noise levels; see [`~dae_diffusers.losses.flow_matching.sample_sigmas`].
        shift (`float`): Above 1: more noise.
    """

    sampling: TimestepSampling = "logit_normal"
    shift: float = 1.0

    def draw(self, count: int, device: torch.device) -> torch.Tensor:
        r"""Noise levels for training, `(count,)`."""
        return sample_sigmas(count, sampling=self.sampling, shift=self.shift, device=device)

    def spread(self, quantiles: torch.Tensor) -> torch.Tensor:
        r"""Noise levels for validation, from numbers in [0, 1) that are evenly spread."""
        return shifted(quantiles, self.shift)

    def noised(
        self, latents: torch.Tensor, noise: torch.Tensor, levels: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        r"""Noisy latents `(B, C, h, w)` and timesteps `(B,)`, for the transformer."""
        return interpolate(latents, noise, levels), 1000 * levels

    def loss(
        self, model: Model, latents: torch.Tensor, noise: torch.Tensor, levels: torch.Tensor, **given: torch.Tensor
    ) -> torch.Tensor:
        r"""
        The loss of each sample, `(B,)`, float32.

        Args:
            model (callable): The transformer.
            latents, noise (`torch.Tensor` of shape `(B, C, h, w)`): Normalised latents, and standard normal noise.
            levels (`torch.Tensor` of shape `(B,)`): What `draw` or `spread` gave.
            given: The transformer's other arguments: classes, text, conditions.
        """
        noisy, timesteps = self.noised(latents, noise, levels)
        return flow_matching_loss(model(noisy, timesteps, return_dict=False, **given)[0], latents, noise)


class Diffusion:
    r"""
    Diffusion: the noise, or what else the scheduler's `prediction_type` says, at timesteps that are drawn uniformly. The loss is
    the mean squared error, without weights.

    Args:
        scheduler ([`~diffusers.SchedulerMixin`]): Its config holds the noise schedule, as that of `DDIMScheduler` does.
    """

    def __init__(self, scheduler: SchedulerMixin):
        self.schedule = DDPMScheduler.from_config(scheduler.config)

    def draw(self, count: int, device: torch.device) -> torch.Tensor:
        r"""As in [`FlowMatching`]; here a level is a timestep, int64."""
        return torch.randint(self.schedule.config.num_train_timesteps, (count,), device=device)

    def spread(self, quantiles: torch.Tensor) -> torch.Tensor:
        r"""As in [`FlowMatching`]."""
        return (quantiles * self.schedule.config.num_train_timesteps).long()

    def noised(
        self, latents: torch.Tensor, noise: torch.Tensor, levels: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        r"""As in [`FlowMatching`]."""
        return self.schedule.add_noise(latents, noise, levels), levels

    def loss(
        self, model: Model, latents: torch.Tensor, noise: torch.Tensor, levels: torch.Tensor, **given: torch.Tensor
    ) -> torch.Tensor:
        r"""As in [`FlowMatching`]."""
        noisy, timesteps = self.noised(latents, noise, levels)
        prediction = model(noisy, timesteps, return_dict=False, **given)[0]
        kind = self.schedule.config.prediction_type
        if kind == "v_prediction":
            noise = self.schedule.get_velocity(latents, noise, levels)
        target = latents if kind == "sample" else noise
        return (prediction.float() - target.float()).square().mean(dim=(1, 2, 3))
