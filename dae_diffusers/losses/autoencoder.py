"""Losses of the autoencoder."""

import torch
from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution


def reconstruction_loss(
    reconstruction: torch.Tensor, pixel_values: torch.Tensor, *, l1_weight: float = 1.0, mse_weight: float = 1.0
) -> torch.Tensor:
    r"""
    `l1_weight * mean(|reconstruction - pixel_values|) + mse_weight * mean((reconstruction - pixel_values)^2)`.

    Args:
        reconstruction, pixel_values (`torch.Tensor` of shape `(B, C, H, W)`): In [-1, 1].
        l1_weight, mse_weight (`float`): Weights >= 0 of the two terms.

    Returns:
        `torch.Tensor`: Scalar >= 0, in float32.
    """
    difference = reconstruction.float() - pixel_values.float()
    return l1_weight * difference.abs().mean() + mse_weight * difference.square().mean()


def kl_loss(posterior: DiagonalGaussianDistribution) -> torch.Tensor:
    r"""
    Divergence of the posterior from the standard normal, `mean((mean^2 + var - 1 - log var) / 2)`.

    The mean is over samples and latent elements, so its weight does not depend on the size of the
    latents. (`DiagonalGaussianDistribution.kl` sums over the elements instead.)

    Args:
        posterior (`DiagonalGaussianDistribution`): The posterior, of shape `(B, C, h, w)`.

    Returns:
        `torch.Tensor`: Scalar >= 0, in nats per latent element, in float32.
    """
    mean, logvar = posterior.mean.float(), posterior.logvar.float()
    return 0.5 * (mean.square() + logvar.exp() - 1.0 - logvar).mean()
