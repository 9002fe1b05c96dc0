"""The loss that a stage of an autoencoder's training minimises."""

from typing import Any

import torch
from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution

from dae_diffusers.autoencoders.adversary import make_adversary
from dae_diffusers.autoencoders.alignment import make_latent_alignment
from dae_diffusers.autoencoders.autoencoder_kl import DAEAutoencoderKL
from dae_diffusers.autoencoders.loading import is_vq, spatial_factor
from dae_diffusers.autoencoders.perceptual import load_perceptual_loss
from dae_diffusers.autoencoders.quantizers import Quantization
from dae_diffusers.autoencoders.vq_model import DAEVQModel
from dae_diffusers.engine.loop import Step
from dae_diffusers.engine.run import TrainingRun
from dae_diffusers.losses.autoencoder import kl_loss, reconstruction_loss
from dae_diffusers.losses.codebook import codebook_loss, commitment_loss
from dae_diffusers.losses.regularizers import perturb
from dae_diffusers.vision import load_backbone


class AutoencoderObjective:
    r"""
    The losses of the stage that a model is set to, with what they need besides: a perceptual model, a discriminator and its
    optimiser, a projection.

    In each micro-batch call it for the loss, and after the backward pass [`after_backward`].

    Args:
        run ([`~dae_diffusers.engine.run.TrainingRun`]): The run, with the parts `data`, `stages`, `losses`, `regularization`,
            `optimization` and, for a model with a codebook, `codebook` in its config.
        model ([`DAEAutoencoderKL`] or [`DAEVQModel`]): Set to a stage; not prepared yet.
        fit ([`~dae_diffusers.fitting.decoder_fit.DecoderFit`], *optional*): In stage 3.

    Attributes:
        also (`list[nn.Module]`): What the model's optimiser trains beside the model.
        beside (`list[nn.Module]`): What has an optimiser of its own.
    """

    def __init__(self, run: TrainingRun, model: DAEAutoencoderKL | DAEVQModel, fit: Any = None):
        config, accelerator = run.config, run.accelerator
        self.config, self.accelerator, self.stage = config, accelerator, model.stage
        is_final = config.stages.trains_final_decoder(model.stage)
        self.factor = spatial_factor(model)
        self.codebook = model.quantize if is_vq(model) else None
        self.last_layer, self.encoder_last_layer = model.last_layer, model.encoder_last_layer
        self.alignment = make_latent_alignment(run, model)
        self.perceptual_weight = config.losses.perceptual_weight_of(is_final)
        self.perceptual_loss = None
        if self.perceptual_weight:
            self.perceptual_loss = load_perceptual_loss(config.losses.perceptual_model).to(accelerator.device)
        self.adversary = make_adversary(run, config.losses.adversarial_weight_of(is_final), model.stage)
        self.fit = fit
        self.also = [] if self.alignment is None else [self.alignment.projection]
        self.others = [] if self.adversary is None else [self.adversary.discriminator]
        self.others += [] if fit is None else fit.others

    def __call__(self, model: torch.nn.Module, batch: dict[str, torch.Tensor], step: Step) -> torch.Tensor:
        r"""
        The loss of a micro-batch; its terms go into the step's log.

        Args:
            model (`nn.Module`): The prepared model.
            batch (`dict`): `pixel_values` in [-1, 1]; in stage 2 perhaps `latents_mean` and `latents_std`, which spare the encoder.
            step ([`~dae_diffusers.engine.loop.Step`]): The present one.
        """
        losses = self.config.losses
        perturbation = perturb(
            batch["pixel_values"], self.stage, self.factor, **self.config.regularization.perturbations()
        )
        pixel_values = perturbation.targets
        drawn = None if self.fit is None else self.fit.latents(step.microbatch)
        decoded, latent = model(
            perturbation.inputs,
            return_dict=False,
            perturb_latents=perturbation.of_latents,
            moments=(batch["latents_mean"], batch["latents_std"]) if "latents_mean" in batch else None,
            **({"sample_posterior": True} if self.codebook is None else {}),
            **({} if drawn is None else {"drawn_latents": drawn}),
        )
        reconstruction, generated = decoded[: len(pixel_values)], decoded[len(pixel_values) :]
        self._decoded = pixel_values, reconstruction.detach(), generated.detach()
        loss = reconstruction_loss(
            reconstruction, pixel_values, l1_weight=losses.l1_weight, mse_weight=losses.mse_weight
        )
        latent_terms = self.latent_losses(latent)
        step.add(reconstruction_loss=loss, **{name: value for name, (_, value) in latent_terms.items()})
        if self.perceptual_loss is not None:
            with self.accelerator.autocast():
                perceptual = self.perceptual_loss(reconstruction, pixel_values)
            step.add(perceptual_loss=perceptual)
            loss = loss + self.perceptual_weight * perceptual
        if self.alignment is not None:
            latents = latent.sample() if self.codebook is None else latent.latents
            term, values = self.alignment.term(latents, batch["pixel_values"], loss, self.encoder_last_layer)
            step.add(**values)
            loss = loss + term
        if self.adversary is not None:
            term, values = self.adversary.generator_term(reconstruction, loss, self.last_layer, step.done)
            step.add(**values)
            loss = loss if term is None else loss + term
        if drawn is not None:
            term, values = self.fit.term(generated, loss, self.last_layer, step.done)
            step.add(**values)
            loss = loss if term is None else loss + term
        if self.stage == 1:
            loss = loss + sum(weight * value for weight, value in latent_terms.values())
        return loss

    def after_backward(self, step: Step) -> None:
        r"""Trains the discriminators on a micro-batch."""
        pixel_values, reconstruction, generated = self._decoded
        if self.adversary is not None:
            step.add(**self.adversary.train_discriminator(pixel_values, reconstruction, step.done))
        if self.fit is not None:
            step.add(**self.fit.after_backward(pixel_values, generated, step.done))

    def after_step(self) -> None:
        r"""Updates the codebook in stage 1."""
        if self.codebook is not None and self.stage == 1:
            self.codebook.update()

    def after_skip(self) -> None:
        r"""Lets the codebook forget an update that was left out."""
        if self.codebook is not None:
            self.codebook.forget()

    def check_balance(self, step: Step) -> None:
        r"""Warns once if the logged means show that the discriminator has won or collapsed."""
        if self.adversary is not None and step.means is not None:
            self.adversary.warn_if_unbalanced(step.means, step.done + 1)

    def latent_losses(
        self, latent: DiagonalGaussianDistribution | Quantization
    ) -> dict[str, tuple[float, torch.Tensor]]:
        r"""The terms of stage 1 that concern the latents, each with its weight."""
        if self.codebook is None:
            return {"kl_loss": (self.config.losses.kl_weight, kl_loss(latent))}
        codebook = self.config.codebook
        terms = {"commitment_loss": (codebook.commitment_weight, commitment_loss(latent.latents, latent.target))}
        if codebook.quantizer == "vq":
            terms["codebook_loss"] = (1.0, codebook_loss(latent.quantized, latent.latents))
        return terms


def check_vision_models(config: Any, stages: list[int]) -> None:
    r"""
    Loads the vision models that only a later stage's losses need, so that a wrong name is not found after hours of training.

    Args:
        config: With the parts `stages` and `losses`.
        stages (`list[int]`): Those to come, in order.
    """
    final = [config.stages.trains_final_decoder(stage) for stage in stages]
    perceptual = [config.losses.perceptual_weight_of(each) > 0 for each in final]
    if any(perceptual) and not perceptual[0]:
        load_perceptual_loss(config.losses.perceptual_model)
    adversarial = [config.losses.adversarial_weight_of(each) > 0 for each in final]
    if config.losses.discriminator_model is not None and any(adversarial) and not adversarial[0]:
        load_backbone(config.losses.discriminator_model)
