"""
Regularisers that make a latent space easier to model, besides a weak decoder. While the autoencoder trains, they change the
images before the encoder or the latents before the decoder. Each is a pure function of its input and torch's random state.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch

from dae_diffusers.losses.resizing import resize

_MIN_SCALE = 0.25  # of a `SpatialTransform`
_MASKED_PATCH = 4  # pixels of a side


def mask_patches(pixel_values: torch.Tensor, ratio: float, patch_size: int) -> torch.Tensor:
    r"""
    Sets randomly chosen square patches to 0, a share of `ratio` (rounded to whole patches) in every image.

    Args:
        pixel_values (`torch.Tensor` of shape `(B, C, H, W)`): The encoder's input; the reconstruction's target stays whole.
        ratio (`float`): In [0, 1).
        patch_size (`int`): Side of a patch in pixels; border patches may be smaller.

    Returns:
        `torch.Tensor` of the same shape.

    Source: masked autoencoders as tokenizers, Chen et al., 2025, https://huggingface.co/papers/2502.03444.
    """
    batch, _, height, width = pixel_values.shape
    rows, columns = math.ceil(height / patch_size), math.ceil(width / patch_size)
    ranks = torch.rand(batch, rows * columns, device=pixel_values.device).argsort(dim=1).argsort(dim=1)
    keep = (ranks >= round(ratio * rows * columns)).view(batch, 1, rows, columns)
    keep = keep.repeat_interleave(patch_size, dim=2).repeat_interleave(patch_size, dim=3)
    return pixel_values * keep[:, :, :height, :width]


def interpolate_with_noise(latents: torch.Tensor, noise_scale: float) -> torch.Tensor:
    r"""
    `(1 - t) * latents + t * noise_scale * noise` with `t` uniform in [0, 1) for each sample: the decoder must denoise, as a
    diffusion model will.

    Args:
        latents (`torch.Tensor` of shape `(B, C, h, w)`): Raw latents.
        noise_scale (`float`): Standard deviation of the noise.

    Returns:
        `torch.Tensor` of the same shape.

    Source: l-DeTok, Yang et al., 2025, https://huggingface.co/papers/2507.15856.
    """
    time = torch.rand(len(latents), 1, 1, 1, device=latents.device, dtype=latents.dtype)
    return (1 - time) * latents + time * noise_scale * torch.randn_like(latents)


def add_noise(latents: torch.Tensor, tau: float) -> torch.Tensor:
    r"""
    `latents + sigma * std * noise` with `sigma = |normal(0, tau)|` for each sample and `std` the latents' standard deviation in each
    channel: the real decoder learns to tolerate the errors of a diffusion model.

    Args:
        latents (`torch.Tensor` of shape `(B, C, h, w)`): Raw latents.
        tau (`float`): In units of the batch's standard deviation, so that it means the same for every encoder.

    Returns:
        `torch.Tensor` of the same shape.

    Source: RAE, Zheng et al., 2025, https://huggingface.co/papers/2510.11690.
    """
    sigma = tau * torch.randn(len(latents), 1, 1, 1, device=latents.device, dtype=latents.dtype).abs()
    std = latents.std(dim=(0, 2, 3), keepdim=True, correction=0)
    return latents + sigma * std * torch.randn_like(latents)


@dataclass(frozen=True)
class SpatialTransform:
    r"""
    A rotation by quarter turns and a downscaling for both latents and images, as in EQ-VAE: the decoder gets
    transformed latents and must return the transformed image.

    Attributes:
        quarter_turns (`int`): Number of quarter turns, counter-clockwise.
        size (`tuple[int, int]`): Height and width of the latents after scaling, before turning.
        factor (`int`): Pixels of an image per latent, along a side.

    Source: Kouzelis et al., 2025, https://huggingface.co/papers/2502.09509.
    """

    quarter_turns: int
    size: tuple[int, int]
    factor: int

    @classmethod
    def draw(cls, latent_size: tuple[int, int], factor: int) -> "SpatialTransform":
        r"""Draws a random transform: any number of quarter turns, and a scale uniform in [0.25, 1], rounded to whole latents."""
        scale = _MIN_SCALE + (1 - _MIN_SCALE) * torch.rand(()).item()
        size = tuple(max(1, round(scale * side)) for side in latent_size)
        return cls(int(torch.randint(4, ())), size, factor)

    def of_latents(self, latents: torch.Tensor) -> torch.Tensor:
        r"""`(B, C, h, w)` to `(B, C, *size)`, turned."""
        return self._apply(latents, self.size)

    def of_images(self, images: torch.Tensor) -> torch.Tensor:
        r"""`(B, C, H, W)` to `(B, C, *(factor * size))`, turned."""
        return self._apply(images, tuple(self.factor * side for side in self.size))

    def _apply(self, values: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
        return resize(values, size).rot90(self.quarter_turns, dims=(2, 3))


@dataclass(frozen=True)
class Perturbation:
    r"""
    The perturbation of the images and latents of one micro-batch.

    Attributes:
        inputs, targets (`torch.Tensor` of shape `(B, C, H, W)`): Input of the encoder, and target of the decoder.
        of_latents (`Callable` or `None`): Function applied to the latents in between.
    """

    inputs: torch.Tensor
    targets: torch.Tensor
    of_latents: Callable[[torch.Tensor], torch.Tensor] | None = None


def perturb(
    pixel_values: torch.Tensor,
    stage: int,
    factor: int,
    *,
    mask_ratio: float = 0.0,
    latent_denoising: float = 0.0,
    equivariance: float = 0.0,
    noise_tau: float = 0.0,
) -> Perturbation:
    r"""
    Draws a micro-batch's perturbation: in stage 1 masking, equivariance and latent denoising, later noise. Each costs
    less than a convolution; with equivariance the decoder has fewer latents to decode.

    Args:
        pixel_values (`torch.Tensor` of shape `(B, C, H, W)`): The images.
        stage (`int`): 1, 2 or 3.
        factor (`int`): Pixels of an image per latent, along a side.
        mask_ratio (`float`): `ratio` of [`mask_patches`]; 0: none.
        latent_denoising (`float`): `noise_scale` of [`interpolate_with_noise`]; 0: none.
        equivariance (`float`): Share of micro-batches with a [`SpatialTransform`].
        noise_tau (`float`): `tau` of [`add_noise`]; 0: none.
    """
    inputs, targets, steps = pixel_values, pixel_values, []
    if stage == 1:
        if mask_ratio > 0:
            inputs = mask_patches(pixel_values, mask_ratio, _MASKED_PATCH)
        if equivariance > 0 and torch.rand(()).item() < equivariance:
            size = pixel_values.shape[2] // factor, pixel_values.shape[3] // factor
            transform = SpatialTransform.draw(size, factor)
            targets = transform.of_images(pixel_values)
            steps.append(transform.of_latents)
        if latent_denoising > 0:
            steps.append(partial(interpolate_with_noise, noise_scale=latent_denoising))
    elif noise_tau > 0:
        steps.append(partial(add_noise, tau=noise_tau))

    def of_latents(latents: torch.Tensor) -> torch.Tensor:
        for step in steps:
            latents = step(latents)
        return latents

    return Perturbation(inputs, targets, of_latents if steps else None)
