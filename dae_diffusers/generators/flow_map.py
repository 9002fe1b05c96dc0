"""Teaches a transformer of flow matching to take long steps, so that a few of them draw an image."""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import diffusers
import torch
from diffusers import SchedulerMixin

from dae_diffusers.errors import UserError
from dae_diffusers.generators.denoising import Model
from dae_diffusers.guidance import ALL_LEVELS
from dae_diffusers.losses.flow_matching import interpolate, shifted

_GOLDEN = 0.6180339887498949  # multiples of it, modulo 1, make evenly spread pairs with evenly spread numbers

Arguments = dict[str, torch.Tensor]


@dataclass
class FlowMap:
    r"""
    Distills a finished transformer, the teacher, into a flow map, which predicts the mean velocity of the teacher's path from one noise
    level down to another. A step of any length is then one call, and guidance is part of it.

    In the first half of a batch both levels are equal: the mean velocity is the teacher's velocity there. In the other half, a step must
    lead where two steps of half its length lead, as the flow map itself takes them.

    Attributes:
        teacher (callable, *optional*): The finished transformer; needed for the loss.
        guidance_scale (`float`): Of the teacher; 1 is none.
        guidance_interval (pair of `float`): The noise levels between which the teacher is guided.
        shift (`float`): As in [`~dae_diffusers.generators.denoising.FlowMatching`].
        autocast (callable): Makes the context in which the teacher runs.
        guide (callable, *optional*): A weaker version of the teacher, which guidance then leads away from; default: what the teacher
            predicts for no class, no text and no conditions.

    Sources: Frans et al., 2024, https://huggingface.co/papers/2410.12557; Boffi et al., 2025, https://huggingface.co/papers/2505.18825.
    """

    teacher: Model | None = None
    guidance_scale: float = 1.0
    guidance_interval: tuple[float, float] = ALL_LEVELS
    shift: float = 1.0
    autocast: Callable[[], AbstractContextManager] = nullcontext
    guide: Model | None = None

    def draw(self, count: int, device: torch.device) -> torch.Tensor:
        r"""Pairs of noise levels for training, `(count, 2)`: where a step begins, and where it ends."""
        return shifted(torch.rand(count, 2, device=device), self.shift).sort(dim=1, descending=True).values

    def spread(self, quantiles: torch.Tensor) -> torch.Tensor:
        r"""Pairs for validation, from numbers in [0, 1) that are evenly spread."""
        pairs = torch.stack((quantiles, quantiles * len(quantiles) * _GOLDEN % 1), dim=1)
        return shifted(pairs, self.shift).sort(dim=1, descending=True).values

    def loss(
        self,
        model: Model,
        latents: torch.Tensor,
        noise: torch.Tensor,
        levels: torch.Tensor,
        *,
        unconditional: Arguments,
        in_halves: bool = True,
        **given: torch.Tensor,
    ) -> torch.Tensor:
        r"""
        The loss of each sample, `(B,)`, float32: the mean squared error.

        Args:
            model (callable): The flow map.
            latents, noise (`torch.Tensor` of shape `(B, C, h, w)`): Normalised latents, and standard normal noise.
            levels (`torch.Tensor` of shape `(B, 2)`): What `draw` or `spread` gave.
            unconditional (`dict`): What stands for no class, no text and no conditions, for guidance without a guide.
            in_halves (`bool`): Whether the first half of the batch learns velocities and the second half steps. If not, the loss is the
                mean of both for each sample, whatever the batch.
            given: The transformer's other arguments: classes, text, conditions.
        """
        start, end = levels.unbind(1)
        noisy = interpolate(latents, noise, start)
        if not in_halves:
            losses = (self._loss(model, noisy, start, end, half, unconditional, given) for half in (0, len(latents)))
            return sum(losses) / 2
        return self._loss(model, noisy, start, end, (len(latents) + 1) // 2, unconditional, given)

    def _loss(
        self,
        model: Model,
        noisy: torch.Tensor,
        start: torch.Tensor,
        end: torch.Tensor,
        half: int,
        unconditional: Arguments,
        given: Arguments,
    ) -> torch.Tensor:
        """The loss of each sample, of which the first `half` learn velocities and the others steps."""
        end = torch.cat((start[:half], end[half:]))
        with torch.no_grad():
            parts = []
            if half > 0:
                some = (_part(each, 0, half) for each in (given, unconditional))
                parts.append(self._velocity(noisy[:half], start[:half], *some))
            if half < len(noisy):
                parts.append(_two_steps(model, noisy[half:], start[half:], end[half:], _part(given, half)))
        target = torch.cat(parts)
        return (_mean_velocity(model, noisy, start, end, given) - target).square().mean(dim=(1, 2, 3))

    def _velocity(self, noisy: torch.Tensor, level: torch.Tensor, given: Arguments, unconditional: Arguments):
        """The teacher's velocity, with guidance."""
        if self.guidance_scale == 1:
            return self._predict(self.teacher, noisy, level, given)
        if self.guide is not None:
            guided, baseline = (self._predict(model, noisy, level, given) for model in (self.teacher, self.guide))
        else:
            both = {name: torch.cat((value, unconditional[name])) for name, value in given.items()}
            doubled = torch.cat((noisy, noisy)), torch.cat((level, level))
            guided, baseline = self._predict(self.teacher, *doubled, both).chunk(2)
        low, high = self.guidance_interval
        is_guided = ((low <= level) & (level <= high)).view(-1, 1, 1, 1)
        return torch.where(is_guided, baseline + self.guidance_scale * (guided - baseline), guided)

    def _predict(self, model: Model, noisy: torch.Tensor, level: torch.Tensor, arguments: Arguments):
        with self.autocast():
            return model(noisy, 1000 * level, return_dict=False, **arguments)[0].float()


def flow_map_scheduler(shift: float = 1.0) -> SchedulerMixin:
    r"""
    The scheduler that samples from a flow map.

    Raises:
        UserError: If the installed diffusers has none.
    """
    if not hasattr(diffusers, "FlowMapEulerDiscreteScheduler"):
        raise UserError(
            f"`distill_guidance_scale` needs FlowMapEulerDiscreteScheduler, which diffusers {diffusers.__version__} lacks: "
            "`pip install --upgrade diffusers`."
        )
    return diffusers.FlowMapEulerDiscreteScheduler(shift=shift)


def _two_steps(model: Model, noisy: torch.Tensor, start: torch.Tensor, end: torch.Tensor, given: Arguments):
    """The mean velocity of two steps of equal length."""
    middle = (start + end) / 2
    first = _mean_velocity(model, noisy, start, middle, given)
    halfway = noisy - (start - middle).view(-1, 1, 1, 1) * first
    return (first + _mean_velocity(model, halfway, middle, end, given)) / 2


def _mean_velocity(model: Model, noisy: torch.Tensor, start: torch.Tensor, end: torch.Tensor, given: Arguments):
    return model(noisy, 1000 * start, r_timestep=1000 * end, return_dict=False, **given)[0].float()


def _part(arguments: Arguments, first: int, end: int | None = None) -> Arguments:
    return {name: value[first:end] for name, value in arguments.items()}
