"""Aligns latents of an autoencoder with the features of a frozen vision model (VF loss)."""

import torch
from accelerate import Accelerator
from torch import nn

from dae_diffusers.autoencoders.autoencoder_kl import DAEAutoencoderKL
from dae_diffusers.autoencoders.loading import num_latent_channels
from dae_diffusers.autoencoders.settings import RegularizationConfig
from dae_diffusers.autoencoders.vq_model import DAEVQModel
from dae_diffusers.engine.precision import loss_scale
from dae_diffusers.engine.run import TrainingRun
from dae_diffusers.losses.adaptive_weight import adaptive_weight
from dae_diffusers.losses.alignment import marginal_cosine_loss, marginal_distance_matrix_loss
from dae_diffusers.losses.resizing import resize
from dae_diffusers.randomness import Stream, derived_seed
from dae_diffusers.vision import FrozenBackbone, load_backbone


class LatentAlignment:
    r"""
    The VF loss of VA-VAE: [`marginal_cosine_loss`] plus [`marginal_distance_matrix_loss`] between linearly projected latents
    and the features of the same images in a frozen vision model.

    Both losses see the projected latents. The projection trains with the autoencoder: put its
    parameters into the same optimiser, and both models into `accelerator.accumulate`.

    Args:
        accelerator ([`~accelerate.Accelerator`]): The run's accelerator.
        backbone ([`~dae_diffusers.vision.FrozenBackbone`]): The vision model, on the accelerator's device.
        projection (`nn.Module`): Latents `(B, C, h, w)` to `(B, D, h, w)`, prepared by `accelerator`.
        settings ([`~dae_diffusers.autoencoders.settings.RegularizationConfig`]): Weight and margins of the VF loss.
    """

    def __init__(
        self,
        accelerator: Accelerator,
        backbone: FrozenBackbone,
        projection: nn.Module,
        settings: RegularizationConfig,
    ):
        self.accelerator = accelerator
        self.backbone = backbone
        self.projection = projection
        self.settings = settings

    def term(
        self, latents: torch.Tensor, pixel_values: torch.Tensor, other_loss: torch.Tensor, last_layer: torch.Tensor
    ) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        r"""
        Computes the weighted term of the autoencoder's loss.

        It costs a forward pass of the backbone, a 1x1 convolution and the distance matrices; with the adaptive weight also a
        second backward pass through these and through the decoder, which leads from `other_loss` to the encoder.

        Args:
            latents (`torch.Tensor` of shape `(B, C, h, w)`): Latents with their graph.
            pixel_values (`torch.Tensor` of shape `(B, 1 or 3, H, W)`): The images that they encode, unmasked, in [-1, 1].
            other_loss (`torch.Tensor`): Scalar: the reconstruction loss that the term is balanced with.
            last_layer (`torch.Tensor`): The encoder's last weight.

        Returns:
            The term, and what to log.
        """
        with self.accelerator.autocast():
            features = self.backbone.patch_features(pixel_values)
        features = resize(features, tuple(latents.shape[2:]))
        projected = self.projection(latents)
        cosine = marginal_cosine_loss(projected, features, self.settings.vf_cosine_margin)
        distance = marginal_distance_matrix_loss(projected, features, self.settings.vf_distance_margin)
        loss = cosine + distance
        cap, scale = self.settings.vf_adaptive_weight_cap, loss_scale(self.accelerator)
        factor = adaptive_weight(other_loss, loss, last_layer, cap=cap, scale=scale)
        logs = {"vf_cosine_loss": cosine, "vf_distance_loss": distance, "vf_adaptive_weight": factor}
        return self.settings.vf_weight * factor * loss, logs


def make_latent_alignment(run: TrainingRun, model: DAEAutoencoderKL | DAEVQModel) -> LatentAlignment | None:
    r"""The VF loss with its projection, or None in stage 2 and without `vf_model`."""
    config = run.config.regularization
    if config.vf_model is None or model.stage != 1:
        return None
    backbone = load_backbone(config.vf_model).to(run.accelerator.device)
    # The same weights however many processes drew before.
    torch.manual_seed(derived_seed(run.config.run.seed, Stream.VF_PROJECTION))
    projection = torch.nn.Conv2d(num_latent_channels(model), backbone.patch_feature_dim, 1, bias=False)
    return LatentAlignment(run.accelerator, backbone, run.accelerator.prepare(projection), config)
