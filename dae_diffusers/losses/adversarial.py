"""Adversarial loss: discriminators, and the training of one beside an autoencoder."""

import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from torch import nn

from dae_diffusers.losses.perceptual import FrozenBackbone

logger = logging.getLogger(__name__)

AdversarialLossType = Literal["hinge", "non_saturating"]


class PatchDiscriminator(nn.Module):
    r"""
    A convolutional discriminator that judges overlapping patches: 70x70 pixels with three strided layers.

    Group normalisation stands where the original has batch normalisation: it has no state, so that gradient
    accumulation, several processes and several passes in a step change nothing.

    Args:
        in_channels (`int`, *optional*, defaults to 3): Channels of the images.
        num_channels (`int`, *optional*, defaults to 64): Channels after the first layer, a multiple of 8; doubled by
            each strided layer up to eight times that.
        num_layers (`int`, *optional*, defaults to 3): Strided layers. Images must have at least `2 ** (num_layers + 1)`
            pixels a side.

    Source: Isola et al., 2017, https://huggingface.co/papers/1611.07004.
    """

    def __init__(self, in_channels: int = 3, num_channels: int = 64, num_layers: int = 3):
        super().__init__()
        layers = [nn.Conv2d(in_channels, num_channels, 4, stride=2, padding=1), nn.LeakyReLU(0.2)]
        width = num_channels
        for number in range(1, num_layers + 1):
            next_width = num_channels * min(2**number, 8)
            layers += [
                nn.Conv2d(width, next_width, 4, stride=2 if number < num_layers else 1, padding=1),
                nn.GroupNorm(8, next_width),
                nn.LeakyReLU(0.2),
            ]
            width = next_width
        self.layers = nn.Sequential(*layers, nn.Conv2d(width, 1, 4, padding=1))

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        r"""Images `(B, in_channels, H, W)` to logits `(B, 1, h, w)`, high for real ones."""
        return self.layers(images)


class BackboneDiscriminator(nn.Module):
    r"""
    Small heads on the hidden states of a frozen vision model; only the heads train.

    Args:
        backbone ([`~dae_diffusers.losses.perceptual.FrozenBackbone`]): Of the features.
        num_channels (`int`, *optional*, defaults to 64): Width of the heads, a multiple of 8.

    Source: Sauer et al., 2021, https://huggingface.co/papers/2111.01007.
    """

    def __init__(self, backbone: FrozenBackbone, num_channels: int = 64):
        super().__init__()
        self.backbone = backbone
        with torch.no_grad():
            widths = [hidden.shape[1] for hidden in backbone(torch.zeros(1, 3, *backbone.size))]
        self.heads = nn.ModuleList(
            nn.Sequential(
                nn.Conv1d(width, num_channels, 1),
                nn.GroupNorm(8, num_channels),
                nn.LeakyReLU(0.2),
                nn.Conv1d(num_channels, 1, 1),
            )
            for width in widths
        )

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        r"""Images `(B, C, H, W)` to logits `(B, 1, N)`, those of all layers and positions, high for real ones."""
        layers = self.backbone(images)
        return torch.cat([head(hidden.flatten(2)) for head, hidden in zip(self.heads, layers, strict=True)], dim=2)


def discriminator_loss(
    logits_real: torch.Tensor, logits_fake: torch.Tensor, loss_type: AdversarialLossType = "hinge"
) -> torch.Tensor:
    r"""
    What the discriminator minimises, averaged over all logits; half of each side.

    `hinge`: `relu(1 - real)` and `relu(1 + fake)`; `non_saturating`: `softplus(-real)` and `softplus(fake)`.
    """
    if loss_type == "hinge":
        return 0.5 * (F.relu(1 - logits_real.float()).mean() + F.relu(1 + logits_fake.float()).mean())
    return 0.5 * (F.softplus(-logits_real.float()).mean() + F.softplus(logits_fake.float()).mean())


def generator_loss(logits_fake: torch.Tensor, loss_type: AdversarialLossType = "hinge") -> torch.Tensor:
    r"""What the decoder minimises: `-fake` for `hinge`, `softplus(-fake)` for `non_saturating`; mean over all logits."""
    return -logits_fake.float().mean() if loss_type == "hinge" else F.softplus(-logits_fake.float()).mean()


def adaptive_weight(
    accelerator: Accelerator, other_loss: torch.Tensor, loss: torch.Tensor, layer: torch.Tensor, *, cap: float
) -> torch.Tensor:
    r"""
    `|d other_loss / d layer| / |d loss / d layer|`, the factor that makes a loss pull at a layer as hard as the others do.

    The gradients are averaged over all processes, so that all of them use the same factor; under accumulation each
    micro-batch has its own.

    Args:
        accelerator ([`~accelerate.Accelerator`]): Of the run.
        other_loss, loss (`torch.Tensor`): Scalars whose graphs stay.
        layer (`torch.Tensor`): A weight that both depend on.
        cap (`float`): Upper bound.

    Returns:
        `torch.Tensor`: Scalar, without gradient.

    Source: Esser et al., 2021, https://huggingface.co/papers/2012.09841.
    """
    norms = []
    for term in (other_loss, loss):
        (gradient,) = torch.autograd.grad(term, layer, retain_graph=True)
        norms.append(accelerator.reduce(gradient.float(), reduction="mean").norm())
    return (norms[0] / (norms[1] + 1e-6)).clamp(max=cap)


def augment(images: torch.Tensor) -> torch.Tensor:
    r"""
    DiffAug: random brightness, saturation, contrast, translation (by up to 1/8) and a cut-out square (half the side), for
    each image on its own, differentiable. Real and generated images both pass through it.

    Args:
        images (`torch.Tensor` of shape `(B, C, H, W)`): In [-1, 1].

    Returns:
        `torch.Tensor` of the same shape.

    Source: Zhao et al., 2020, https://huggingface.co/papers/2006.10738.
    """
    batch, _, height, width = images.shape
    brightness, saturation, contrast = torch.rand(3, batch, 1, 1, 1, device=images.device)
    images = images + (brightness - 0.5)
    gray = images.mean(dim=1, keepdim=True)
    images = (images - gray) * (2 * saturation) + gray
    mean = images.mean(dim=(1, 2, 3), keepdim=True)
    images = (images - mean) * (contrast + 0.5) + mean

    rows, columns = (torch.arange(side, device=images.device) for side in (height, width))
    from_y, inside_y = _shift(rows, batch, height // 8)
    from_x, inside_x = _shift(columns, batch, width // 8)
    samples = torch.arange(batch, device=images.device)[:, None, None]
    moved = images[samples, :, from_y[:, :, None], from_x[:, None, :]]  # (B, H, W, C)
    inside = inside_y[:, :, None] & inside_x[:, None, :]
    cut = _interval(rows, batch)[:, :, None] & _interval(columns, batch)[:, None, :]
    return moved.permute(0, 3, 1, 2) * (inside & ~cut)[:, None]


def _shift(positions: torch.Tensor, batch: int, reach: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Where each position of a randomly moved side comes from, `(batch, N)`, and whether that lies in the image."""
    source = positions + torch.randint(-reach, reach + 1, (batch, 1), device=positions.device)
    return source.clamp(0, len(positions) - 1), (source >= 0) & (source < len(positions))


def _interval(positions: torch.Tensor, batch: int) -> torch.Tensor:
    """A random interval of half the length, `(batch, N)`."""
    length = len(positions) // 2
    start = torch.randint(0, len(positions) - length + 1, (batch, 1), device=positions.device)
    return (positions >= start) & (positions < start + length)


@dataclass(frozen=True)
class AdversarialSettings:
    r"""
    Attributes:
        weight (`float`): Of the adversarial term, times the adaptive weight.
        loss_type (`str`): `hinge` or `non_saturating`.
        discriminator_start (`int`): Step of the stage at which the discriminator begins to learn.
        generator_start (`int`): Step at which the decoder begins to feel it.
        ramp_steps (`int`): Steps over which the weight then rises from 0.
        adaptive_weight_cap (`float`): Upper bound of the adaptive weight, the ratio of the two gradients' norms at the
            decoder's last layer; 0: no adaptive weight.
        use_augmentation (`bool`): Whether the discriminator sees [`augment`]ed images.
    """

    weight: float
    loss_type: AdversarialLossType = "hinge"
    discriminator_start: int = 0
    generator_start: int = 0
    ramp_steps: int = 0
    adaptive_weight_cap: float = 100.0
    use_augmentation: bool = True

    def weight_at(self, step: int) -> float:
        r"""Of the adversarial term in the update from `step` to `step + 1`."""
        if step < self.generator_start:
            return 0.0
        return self.weight * min(1.0, (step - self.generator_start + 1) / max(1, self.ramp_steps))


class AdversarialTraining:
    r"""
    A discriminator that is trained beside an autoencoder.

    In each micro-batch call [`generator_term`], and after the autoencoder's backward pass [`train_discriminator`]; both
    inside `accelerator.accumulate(model, discriminator)`.

    Args:
        accelerator ([`~accelerate.Accelerator`]): Of the run.
        discriminator (`nn.Module`): Images to logits, prepared by `accelerator`.
        optimizer (`torch.optim.Optimizer`): Of its parameters, prepared by `accelerator`.
        settings ([`AdversarialSettings`]): Weights and times.
        max_grad_norm (`float`): Of the discriminator.
        allows_step (`Callable`, *optional*): Called with the norm of the discriminator's gradient and its name; where it
            gives False, the optimiser does not step.
    """

    def __init__(
        self,
        accelerator: Accelerator,
        discriminator: nn.Module,
        optimizer: torch.optim.Optimizer,
        settings: AdversarialSettings,
        max_grad_norm: float = 1.0,
        allows_step: Callable[[torch.Tensor, str], bool] | None = None,
    ):
        self.accelerator = accelerator
        self.discriminator = discriminator
        self.optimizer = optimizer
        self.settings = settings
        self.max_grad_norm = max_grad_norm
        self.allows_step = allows_step
        self.parameters = [parameter for parameter in discriminator.parameters() if parameter.requires_grad]
        self._has_warned = False

    def generator_term(
        self, reconstruction: torch.Tensor, other_loss: torch.Tensor, last_layer: torch.Tensor, step: int
    ) -> tuple[torch.Tensor | None, dict[str, torch.Tensor]]:
        r"""
        The weighted adversarial term of the autoencoder's loss.

        The [`adaptive_weight`] costs a second backward pass through the discriminator and the perceptual loss, but not
        through the decoder.

        Args:
            reconstruction (`torch.Tensor` of shape `(B, C, H, W)`): With its graph.
            other_loss (`torch.Tensor`): Scalar: the losses that the adversarial one is balanced with.
            last_layer (`torch.Tensor`): The decoder's last weight.
            step (`int`): Optimiser steps of the stage that are done.

        Returns:
            The term, or None before `generator_start`, and what to log.
        """
        weight = self.settings.weight_at(step)
        if weight == 0:
            return None, {}
        # Frozen and unwrapped: its parameters get no gradient here, so there is nothing for DDP to average.
        discriminator = self.accelerator.unwrap_model(self.discriminator)
        for parameter in self.parameters:
            parameter.requires_grad_(False)
        with self.accelerator.autocast():
            logits = discriminator(self._view(reconstruction))
        loss = generator_loss(logits, self.settings.loss_type)
        for parameter in self.parameters:
            parameter.requires_grad_(True)
        logs = {"adversarial_loss": loss}
        if self.settings.adaptive_weight_cap > 0:
            adaptive = adaptive_weight(
                self.accelerator, other_loss, loss, last_layer, cap=self.settings.adaptive_weight_cap
            )
            logs["adaptive_weight"] = adaptive
            loss = adaptive * loss
        return weight * loss, logs

    def train_discriminator(
        self, pixel_values: torch.Tensor, reconstruction: torch.Tensor, step: int
    ) -> dict[str, torch.Tensor]:
        r"""
        The discriminator's share of a micro-batch; its optimiser steps where the autoencoder's does.

        Args:
            pixel_values, reconstruction (`torch.Tensor` of shape `(B, C, H, W)`): Real and decoded images.
            step (`int`): As in [`generator_term`].

        Returns:
            What to log: `discriminator_loss`, mean logits, and the share of logits with the right sign.
        """
        if step < self.settings.discriminator_start:
            return {}
        images = torch.cat([self._view(pixel_values), self._view(reconstruction.detach())])
        with self.accelerator.autocast():
            logits_real, logits_fake = self.discriminator(images).float().chunk(2)
        loss = discriminator_loss(logits_real, logits_fake, self.settings.loss_type)
        self.accelerator.backward(loss)
        if self.accelerator.sync_gradients:
            norm = self.accelerator.clip_grad_norm_(self.parameters, self.max_grad_norm)
            if self.allows_step is None or self.allows_step(norm, "gradient norm of the discriminator"):
                self.optimizer.step()
        self.optimizer.zero_grad()
        accuracy = 0.5 * ((logits_real > 0).float().mean() + (logits_fake < 0).float().mean())
        return {
            "discriminator_loss": loss,
            "logits_real": logits_real.mean(),
            "logits_fake": logits_fake.mean(),
            "discriminator_accuracy": accuracy,
        }

    def warn_if_unbalanced(self, means: dict[str, float], step: int) -> None:
        r"""Says once, when the logged means show it, that the discriminator has won or collapsed."""
        accuracy = means.get("train/discriminator_accuracy")
        if accuracy is None or self._has_warned or step < self.settings.generator_start + 100:
            return
        spread = means["train/logits_real"] - means["train/logits_fake"]
        if accuracy > 0.98:
            reason, advice = "has won", "lower `--discriminator_learning_rate` or `--adversarial_weight`"
        elif abs(spread) < 1e-3:
            reason, advice = "has collapsed", "raise `--discriminator_learning_rate` or start it earlier"
        else:
            return
        self._has_warned = True
        logger.warning(
            "the discriminator %s at step %d (accuracy %.2f, logits %.2f for real and %.2f for decoded images): its "
            "gradient tells the decoder little. Consider to %s.",
            reason,
            step,
            accuracy,
            means["train/logits_real"],
            means["train/logits_fake"],
            advice,
        )

    def _view(self, images: torch.Tensor) -> torch.Tensor:
        return augment(images.float()) if self.settings.use_augmentation else images
