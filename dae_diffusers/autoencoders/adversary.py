"""Trains a discriminator together with an autoencoder."""

import logging
import math
from collections.abc import Callable

import torch
from accelerate import Accelerator
from torch import nn

from dae_diffusers.autoencoders.discriminators import BackboneDiscriminator, PatchDiscriminator
from dae_diffusers.autoencoders.loss_settings import LossConfig
from dae_diffusers.engine.optimization import make_optimizer
from dae_diffusers.engine.precision import loss_scale
from dae_diffusers.engine.run import TrainingRun
from dae_diffusers.losses.adaptive_weight import adaptive_weight
from dae_diffusers.losses.adversarial import augment, discriminator_loss, generator_loss
from dae_diffusers.randomness import Stream, derived_seed
from dae_diffusers.vision import load_backbone

logger = logging.getLogger(__name__)

# Outside of these, the gradient of a discriminator tells the decoder little.
LOWEST_ACCURACY, HIGHEST_ACCURACY = 0.6, 0.98


class AdversarialTraining:
    r"""
    Trains a discriminator together with an autoencoder.

    In each micro-batch call [`generator_term`], and after the autoencoder's backward pass [`train_discriminator`]; both
    inside `accelerator.accumulate(model, discriminator)`.

    Args:
        accelerator ([`~accelerate.Accelerator`]): The run's accelerator.
        discriminator (`nn.Module`): Maps images to logits, prepared by `accelerator`.
        optimizer (`torch.optim.Optimizer`): The discriminator's optimiser, prepared by `accelerator`.
        settings ([`~dae_diffusers.autoencoders.loss_settings.LossConfig`]): Kind and schedule of the adversarial loss.
        weight (`float`): Weight of the adversarial term, multiplied by the adaptive weight.
        augments (`bool`, *optional*): Whether the discriminator sees images through [`~dae_diffusers.losses.adversarial.augment`], which
            hides the small differences between an image and its reconstruction; default: as the settings say.
        max_grad_norm (`float`): Bound of the discriminator's gradient norm.
        allows_step (`Callable`, *optional*): Called with the norm of the discriminator's gradient and its name; where it
            gives False, the optimiser does not step.
    """

    def __init__(
        self,
        accelerator: Accelerator,
        discriminator: nn.Module,
        optimizer: torch.optim.Optimizer,
        settings: LossConfig,
        *,
        weight: float,
        augments: bool | None = None,
        max_grad_norm: float = 1.0,
        allows_step: Callable[[torch.Tensor, str], bool] | None = None,
    ):
        self.accelerator = accelerator
        self.discriminator = discriminator
        self.optimizer = optimizer
        self.settings = settings
        self.weight = weight
        self.augments = settings.discriminator_augmentation if augments is None else augments
        self.max_grad_norm = max_grad_norm
        self.allows_step = allows_step
        self.parameters = [parameter for parameter in discriminator.parameters() if parameter.requires_grad]
        self._has_warned = False

    def weight_at(self, step: int) -> float:
        r"""Weight of the adversarial term in the update from `step` to `step + 1`."""
        start, ramp_steps = self.settings.adversarial_start, self.settings.adversarial_ramp_steps
        if step < start:
            return 0.0
        return self.weight * min(1.0, (step - start + 1) / max(1, ramp_steps))

    def generator_term(
        self, reconstruction: torch.Tensor, other_loss: torch.Tensor, last_layer: torch.Tensor, step: int
    ) -> tuple[torch.Tensor | None, dict[str, torch.Tensor]]:
        r"""
        Computes the weighted adversarial term of the autoencoder's loss.

        The [`~dae_diffusers.losses.adaptive_weight.adaptive_weight`] costs a second backward pass through the discriminator and
        the perceptual loss, but not through the decoder.

        Args:
            reconstruction (`torch.Tensor` of shape `(B, C, H, W)`): The reconstruction with its graph.
            other_loss (`torch.Tensor`): Scalar: the losses that the adversarial one is balanced with.
            last_layer (`torch.Tensor`): The decoder's last weight.
            step (`int`): Optimiser steps of the stage that are done.

        Returns:
            The term, or None before `adversarial_start`, and what to log.
        """
        weight = self.weight_at(step)
        if weight == 0:
            return None, {}
        # Frozen and unwrapped: its parameters get no gradient here, so there is nothing for DDP to average.
        discriminator = self.accelerator.unwrap_model(self.discriminator)
        for parameter in self.parameters:
            parameter.requires_grad_(False)
        with self.accelerator.autocast():
            logits = discriminator(self._view(reconstruction))
        loss = generator_loss(logits, self.settings.adversarial_loss)
        for parameter in self.parameters:
            parameter.requires_grad_(True)
        cap, scale = self.settings.adaptive_weight_cap, loss_scale(self.accelerator)
        factor = adaptive_weight(other_loss, loss, last_layer, cap=cap, scale=scale)
        return weight * factor * loss, {"adversarial_loss": loss, "adaptive_weight": factor}

    def train_discriminator(
        self, pixel_values: torch.Tensor, reconstruction: torch.Tensor, step: int
    ) -> dict[str, torch.Tensor]:
        r"""
        Trains the discriminator on a micro-batch. Its optimiser steps whenever the autoencoder's does.

        Args:
            pixel_values, reconstruction (`torch.Tensor` of shape `(B, C, H, W)`): Images and their reconstructions.
            step (`int`): As in [`generator_term`].

        Returns:
            What to log: `discriminator_loss`, mean logits, and the share of logits with the right sign.
        """
        if step < self.settings.discriminator_start:
            return {}
        images = torch.cat([self._view(pixel_values), self._view(reconstruction.detach())])
        with self.accelerator.autocast():
            logits_real, logits_fake = self.discriminator(images).float().chunk(2)
        loss = discriminator_loss(logits_real, logits_fake, self.settings.adversarial_loss)
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
        r"""Warns once if the logged means show that the discriminator has won, or that it cannot discriminate."""
        accuracy = means.get("train/discriminator_accuracy")
        if accuracy is None or self._has_warned or step < self.settings.adversarial_start + 100:
            return
        if accuracy > HIGHEST_ACCURACY:
            reason, advice = "has won", "lower `--discriminator_learning_rate` or `--adversarial_weight`"
        elif accuracy < LOWEST_ACCURACY:
            reason = "cannot discriminate"
            advice = "raise `--discriminator_learning_rate`, let it learn longer first (`--adversarial_start`), " + (
                "leave out `--discriminator_augmentation`"
                if self.augments
                else "or leave out the adversarial loss if you cannot tell the images apart either"
            )
        else:
            return
        self._has_warned = True
        logger.warning(
            "the discriminator %s at step %d (accuracy %.2f, logits %.2f for real and %.2f for decoded images): its "
            "gradient tells the decoder little. Try this: %s.",
            reason,
            step,
            accuracy,
            means.get("train/logits_real", math.nan),
            means.get("train/logits_fake", math.nan),
            advice,
        )

    def _view(self, images: torch.Tensor) -> torch.Tensor:
        return augment(images.float()) if self.augments else images


def make_adversary(
    run: TrainingRun, weight: float, number: int, *, augments: bool | None = None
) -> AdversarialTraining | None:
    r"""
    A discriminator with its optimiser, or None for a weight of 0.

    Args:
        run ([`~dae_diffusers.engine.run.TrainingRun`]): With the parts `data`, `losses`, `optimization` and `run` in its config.
        weight (`float`): Of the adversarial term.
        number (`int`): Tells the discriminators of a run apart: their first weights differ.
        augments (`bool`, *optional*): Whether it sees augmented images; default: as the settings say.
    """
    if weight == 0:
        return None
    config, losses = run.config, run.config.losses
    # The same weights however many processes drew before.
    torch.manual_seed(derived_seed(config.run.seed, Stream.DISCRIMINATOR, number))
    if losses.discriminator_model is None:
        discriminator = PatchDiscriminator(
            config.data.image_channels, losses.discriminator_channels, losses.discriminator_layers
        )
    else:
        discriminator = BackboneDiscriminator(load_backbone(losses.discriminator_model), losses.discriminator_channels)
    optimizer = make_optimizer(
        config.optimization,
        [discriminator],
        run.accelerator.device,
        lr=losses.discriminator_learning_rate,
        betas=(0.5, 0.9),
        weight_decay=0.0,
    )
    discriminator, optimizer = run.accelerator.prepare(discriminator, optimizer)
    return AdversarialTraining(
        run.accelerator,
        discriminator,
        optimizer,
        losses,
        weight=weight,
        augments=augments,
        max_grad_norm=config.optimization.max_grad_norm,
        allows_step=run.guard.allows,
    )
