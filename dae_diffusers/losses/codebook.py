"""Losses and measures of a codebook."""

import torch

from dae_diffusers.losses.processes import mean_over_processes


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


def codebook_entropy_loss(latents: torch.Tensor, codebook: torch.Tensor, *, temperature: float = 0.01) -> torch.Tensor:
    r"""
    `mean_n H(p_n) - H(mean_n p_n)` with `p_n = softmax(-|latents_n - codebook|^2 / temperature)`: low where each latent
    pixel is sure of its code and all codes are used alike.

    The second entropy is that of the mean over all processes; gradients averaged over them, as
    `DistributedDataParallel` does, are those of the whole batch. All processes must call it together.

    Args:
        latents (`torch.Tensor` of shape `(B, C, h, w)`): What the encoder gave.
        codebook (`torch.Tensor` of shape `(K, C)`): Code vectors.
        temperature (`float`, *optional*, defaults to 0.01): In squared units of the latents.

    Returns:
        `torch.Tensor`: Scalar in [-log K, log K], in nats, in float32.

    Source: Chang et al., "MaskGIT", 2022, https://huggingface.co/papers/2202.04200 (their code).
    """
    vectors = latents.float().permute(0, 2, 3, 1).flatten(0, 2)
    codebook = codebook.float()
    with torch.autocast(latents.device.type, enabled=False):
        squared = vectors.square().sum(1, keepdim=True) + codebook.square().sum(1) - 2 * vectors @ codebook.T
        log_p = torch.log_softmax(-squared / temperature, dim=1)
    p = log_p.exp()
    mean_p = p.mean(dim=0)
    mean_p = mean_p + (mean_over_processes(mean_p) - mean_p).detach()
    entropy_of_each = -(p * log_p).sum(dim=1).mean()
    return entropy_of_each + (mean_p * mean_p.clamp(min=1e-12).log()).sum()


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
