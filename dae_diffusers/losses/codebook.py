"""Losses and measures of a codebook."""

import torch


def commitment_loss(latents: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    r"""
    `mean((latents - target)^2)`, which pulls the encoder to its codes and does not move the codes.

    VQ-VAE multiplies this term by beta. (The `VectorQuantizer` of diffusers multiplies [`codebook_loss`] by it instead.)

    Args:
        latents (`torch.Tensor` of shape `(B, C, h, w)`): Output of the encoder.
        target (`torch.Tensor` of the same shape): Their codes, used without gradient.

    Returns:
        `torch.Tensor`: Scalar >= 0, in float32.

    Source: van den Oord et al., 2017, https://huggingface.co/papers/1711.00937.
    """
    return (latents.float() - target.detach().float()).square().mean()


def codebook_loss(quantized: torch.Tensor, latents: torch.Tensor) -> torch.Tensor:
    r"""
    `mean((quantized - latents)^2)`, which pulls codes that are learnt by gradient to the latents that they replace.

    Args:
        quantized (`torch.Tensor` of shape `(B, C, h, w)`): Code vectors; without a gradient the loss has no effect.
        latents (`torch.Tensor` of the same shape): Output of the encoder, used without gradient.

    Returns:
        `torch.Tensor`: Scalar >= 0, in float32.
    """
    return (quantized.float() - latents.detach().float()).square().mean()


def codebook_usage(counts: torch.Tensor) -> float:
    r"""The share in [0, 1] of codes that occur at all, from their `(K,)` counts over a whole pass."""
    return (counts.cpu() > 0).double().mean().item()


def codebook_perplexity(counts: torch.Tensor) -> float:
    r"""
    `exp(H)` of the codes' frequencies, from 1 (one code) to K (all equally often), from their `(K,)` counts over a whole pass.

    Over a single batch it would depend on the batch's size.
    """
    counts = counts.cpu()  # not every device has float64
    p = counts.double() / counts.sum()
    return torch.special.entr(p).sum().exp().item()
