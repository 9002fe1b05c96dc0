"""Losses and measures of a codebook."""

import torch


def commitment_loss(latents: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    r"""
    `mean((latents - target)^2)`, which draws the encoder to its codes and leaves the codes alone.

    This is the term that VQ-VAE weighs with beta. (`diffusers`' `VectorQuantizer` weighs [`codebook_loss`] instead.)

    Args:
        latents (`torch.Tensor` of shape `(B, C, h, w)`): What the encoder gave.
        target (`torch.Tensor` of the same shape): Their codes; taken without gradient.

    Returns:
        `torch.Tensor`: Scalar >= 0, in float32.

    Source: van den Oord et al., 2017, https://huggingface.co/papers/1711.00937.
    """
    return (latents.float() - target.detach().float()).square().mean()


def codebook_loss(quantized: torch.Tensor, latents: torch.Tensor) -> torch.Tensor:
    r"""
    `mean((quantized - latents)^2)`, which draws codes that are learnt by gradient to the latents they stand for.

    Args:
        quantized (`torch.Tensor` of shape `(B, C, h, w)`): Code vectors; without gradient the loss moves nothing.
        latents (`torch.Tensor` of the same shape): What the encoder gave; taken without gradient.

    Returns:
        `torch.Tensor`: Scalar >= 0, in float32.
    """
    return (quantized.float() - latents.detach().float()).square().mean()


def codebook_usage(counts: torch.Tensor) -> float:
    r"""Share in [0, 1] of the codes that occur at all, of `(K,)` occurrences over a whole pass."""
    return (counts.cpu() > 0).double().mean().item()


def codebook_perplexity(counts: torch.Tensor) -> float:
    r"""
    `exp(H)` of the codes' frequencies, between 1 (one code) and K (all alike), of `(K,)` occurrences over a whole pass.

    Over a batch it would depend on the batch's size.
    """
    counts = counts.cpu()  # not every device has float64
    p = counts.double() / counts.sum()
    return torch.special.entr(p).sum().exp().item()
