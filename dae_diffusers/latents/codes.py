"""Images as grids of codes: how often each code occurs."""

import torch
from accelerate import Accelerator
from diffusers import VQModel
from torch.utils.data import DataLoader

from dae_diffusers.losses.codebook import codebook_perplexity, codebook_usage


@torch.no_grad()
def codes_of(vae: VQModel, latents: torch.Tensor) -> torch.Tensor:
    r"""The codes of raw latents, `(B, C, h, w)` to `(B, h, w)` int64, by the model's own quantiser."""
    return vae.quantize(latents)[2][2].view(len(latents), *latents.shape[2:])


@torch.no_grad()
def count_codes(vae: VQModel, loader: DataLoader, accelerator: Accelerator) -> torch.Tensor:
    r"""
    How often each code occurs in the images.

    Args:
        vae ([`~diffusers.VQModel`]): In eval mode, on the accelerator's device.
        loader (`DataLoader`): This process's share of the images; see `make_pass_loader`.
        accelerator ([`~accelerate.Accelerator`]): Of this run.

    Returns:
        `torch.Tensor` of shape `(K,)`: int64, over all processes.
    """
    counts = torch.zeros(vae.config.num_vq_embeddings, dtype=torch.int64, device=accelerator.device)
    for batch in loader:
        codes = codes_of(vae, vae.encode(batch["pixel_values"].to(accelerator.device)).latents)
        counts += torch.bincount(codes.flatten(), minlength=len(counts))
    return accelerator.reduce(counts, reduction="sum")


def codebook_metrics(counts: torch.Tensor) -> dict[str, float]:
    r"""`codebook_usage`, a share in [0, 1], and `codebook_perplexity`, of `(K,)` occurrences over a whole pass."""
    return {"codebook_usage": codebook_usage(counts), "codebook_perplexity": codebook_perplexity(counts)}
