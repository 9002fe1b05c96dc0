"""The images of iFID: decoded from latents halfway to their nearest neighbour. A good latent space gives plausible images there."""

import torch

from dae_diffusers.metrics.distances import nearest_neighbors


def interpolate_to_neighbors(
    latents: torch.Tensor, normalized_latents: torch.Tensor, *, alpha: float = 0.5
) -> torch.Tensor:
    r"""
    Moves each latent towards its nearest neighbour among the others, `(1 - alpha) * latent + alpha * neighbour`.

    iFID is the Fréchet distance between the decoded results and the images. It tells how smooth a latent space is
    between its data, which the distance of reconstructions does not. Only the abstract of the source was available to us: "FID of
    images decoded from a latent interpolated with its nearest neighbour". The details are our choices: Euclidean
    distance between normalised posterior means, the straight line, and its middle.

    Args:
        latents (`torch.Tensor` of shape `(N, C, h, w)`): Raw latents of distinct images (posterior means), two or
            more.
        normalized_latents (`torch.Tensor` of the same shape): The same latents, normalised per channel, to find neighbours in:
            [`~dae_diffusers.latents.statistics.normalize_latents`].
        alpha (`float`, *optional*, defaults to 0.5): How far to go, in [0, 1]: 0 gives reconstructions.

    Returns:
        `torch.Tensor` of the same shape as `latents`: Raw latents, to be decoded. Interpolating and normalising
        commute.

    Source: https://huggingface.co/papers/2603.05630 (abstract).
    """
    if latents.shape != normalized_latents.shape or latents.ndim != 4:
        raise ValueError(
            f"`latents` {tuple(latents.shape)} and `normalized_latents` {tuple(normalized_latents.shape)} must have "
            "the same shape, (N, C, h, w)."
        )
    if not 0 <= alpha <= 1:
        raise ValueError(f"`alpha` is {alpha}, but must lie in [0, 1].")
    if not torch.isfinite(normalized_latents).all():
        raise ValueError("the latents hold NaN or infinite values: the autoencoder is broken.")
    neighbors = nearest_neighbors(normalized_latents.flatten(1))[1][:, 0]
    return torch.lerp(latents, latents[neighbors.to(latents.device)], alpha)
