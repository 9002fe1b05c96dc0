"""Per-channel statistics of the latents, and the normalisation by them."""

from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from diffusers import ModelMixin
from torch.utils.data import DataLoader
from tqdm.auto import tqdm

from dae_diffusers.autoencoders.loading import encode_moments, num_latent_channels
from dae_diffusers.errors import UserError
from dae_diffusers.pipelines.dae_dit import is_representation_autoencoder


@dataclass
class LatentStatistics:
    r"""
    Running sums over raw latents. The sum of two instances describes both sets.

    Attributes:
        count (`int`): Latent elements of each channel seen.
        total, total_square (`torch.Tensor` of shape `(C,)`): Sums of the latents and of their squares, float64.
    """

    count: int
    total: torch.Tensor
    total_square: torch.Tensor

    @classmethod
    def empty(cls, channels: int) -> "LatentStatistics":
        r"""Statistics of nothing."""
        return cls(0, torch.zeros(channels, dtype=torch.float64), torch.zeros(channels, dtype=torch.float64))

    def add(self, mean: torch.Tensor, std: torch.Tensor | None = None) -> None:
        r"""
        Adds a batch of posteriors. The statistics are the expectation over draws from the posteriors.

        Args:
            mean (`torch.Tensor` of shape `(B, C, h, w)`): Posterior means.
            std (`torch.Tensor` of the same shape, *optional*): Posterior standard deviations; 0 if absent.
        """
        mean = mean.detach().cpu().double()
        square = mean.square() if std is None else mean.square() + std.detach().cpu().double().square()
        self.count += mean.numel() // mean.shape[1]
        self.total += mean.sum(dim=(0, 2, 3))
        self.total_square += square.sum(dim=(0, 2, 3))

    def __add__(self, other: "LatentStatistics") -> "LatentStatistics":
        return LatentStatistics(
            self.count + other.count, self.total + other.total, self.total_square + other.total_square
        )

    @property
    def mean(self) -> torch.Tensor:
        r"""Mean of each channel, `(C,)`, float64."""
        return self.total / self.count

    @property
    def std(self) -> torch.Tensor:
        r"""Standard deviation of each channel, `(C,)`, float64."""
        return (self.total_square / self.count - self.mean.square()).clamp(min=0).sqrt()

    def write_to_config(self, vae: ModelMixin) -> None:
        r"""
        Writes the statistics into the autoencoder's config, as `latents_mean`, `latents_std` and `scaling_factor = 1.0`.

        Raises:
            ValueError: If a channel is constant and so cannot be normalised.
        """
        if not (torch.isfinite(self.mean).all() and torch.isfinite(self.std).all()):
            raise ValueError("the latents hold NaN or infinite values: the weights of the encoder are broken.")
        dead = [channel for channel, std in enumerate(self.std.tolist()) if not std > 1e-6]
        if dead:
            raise ValueError(
                f"latent channels {dead} are constant over the data and cannot be normalised: the encoder has "
                "collapsed in them. Lower the KL weight or the number of latent channels, or train longer."
            )
        mean, std = self.mean, self.std
        if is_representation_autoencoder(vae.config):
            mean, std = mean.view(-1, 1, 1), std.view(-1, 1, 1)
        values = {"latents_mean": mean.tolist(), "latents_std": std.tolist()}
        set_statistics(vae, {**values, "scaling_factor": 1.0, "shift_factor": None})


def set_statistics(vae: ModelMixin, values: dict[str, Any]) -> None:
    r"""
    Gives an autoencoder's config these values of [`~dae_diffusers.weights.STATISTICS`], and an `AutoencoderRAE` also the tensors that
    it computes with.
    """
    vae.register_to_config(**values)
    if is_representation_autoencoder(vae.config):
        for name in ("latents_mean", "latents_std"):
            if values.get(name) is not None:
                setattr(vae, f"_{name}", torch.tensor(values[name], device=vae.device))


@torch.no_grad()
def moments_of(
    batch: dict[str, torch.Tensor], vae: ModelMixin, device: torch.device | str
) -> tuple[torch.Tensor, torch.Tensor]:
    r"""
    Mean and standard deviation of the raw latents of a batch, from a cache (`latents_mean`, `latents_std`) or from the encoder.

    Args:
        batch (`dict`): A batch with cached moments, or with `pixel_values` `(B, C, H, W)` in [-1, 1].
        vae ([`~diffusers.ModelMixin`]): The autoencoder, in eval mode, on `device`.
        device (`torch.device`): Where to encode.

    Returns:
        Two `torch.Tensor` of shape `(B, C, h, w)`, on `device`.
    """
    if "latents_mean" in batch:
        return batch["latents_mean"].to(device), batch["latents_std"].to(device)
    return encode_moments(vae, batch["pixel_values"].to(device))


@torch.no_grad()
def compute_latent_statistics(
    vae: ModelMixin, loader: DataLoader, *, device: torch.device | str = "cpu", disable_progress: bool = True
) -> LatentStatistics:
    r"""
    Encodes every image once, unless its latents are cached, and returns the statistics over all processes.

    Args:
        vae ([`~diffusers.ModelMixin`]): The autoencoder, in eval mode, on `device`.
        loader (`DataLoader`): This process's share of the images or cached latents; see `make_pass_loader`.
        device (`torch.device`, *optional*): Where to encode.
        disable_progress (`bool`, *optional*): Whether to hide the progress bar.

    Returns:
        [`LatentStatistics`]: The same on every process.
    """
    statistics = LatentStatistics.empty(num_latent_channels(vae))
    for batch in tqdm(loader, desc="Latent statistics", disable=disable_progress, leave=False):
        statistics.add(*moments_of(batch, vae, device))
    return sum(gather_object([statistics]), start=LatentStatistics.empty(num_latent_channels(vae)))


def write_latent_statistics(vae: ModelMixin, loader: DataLoader, accelerator: Accelerator) -> None:
    r"""
    Calls [`compute_latent_statistics`] and writes the result into the autoencoder's config.

    Args:
        vae, loader: As in [`compute_latent_statistics`].
        accelerator ([`~accelerate.Accelerator`]): The run's accelerator.

    Raises:
        UserError: If the latents cannot be normalised.
    """
    statistics = compute_latent_statistics(
        vae, loader, device=accelerator.device, disable_progress=not accelerator.is_local_main_process
    )
    try:
        statistics.write_to_config(vae)
    except ValueError as error:
        raise UserError(str(error)) from None


def normalize_latents(latents: torch.Tensor, vae: ModelMixin) -> torch.Tensor:
    r"""
    Normalises raw latents for the denoiser: `(latents - latents_mean) * scaling_factor / latents_std` per channel, or
    `(latents - shift_factor) * scaling_factor` for an autoencoder without statistics. `DAEDiTPipeline` undoes it. For an
    `AutoencoderRAE` it is what that does itself.

    Args:
        latents (`torch.Tensor` of shape `(B, C, h, w)`): Raw latents.
        vae ([`~diffusers.ModelMixin`]): The autoencoder whose config holds the statistics.

    Returns:
        `torch.Tensor` of the same shape: With statistics, each channel has mean 0 and standard deviation 1 over the data.
    """
    config = vae.config
    if is_representation_autoencoder(config):
        return vae._normalize_latents(latents) * config.scaling_factor
    if not has_latent_statistics(vae):
        return (latents - (config.get("shift_factor") or 0.0)) * config.get("scaling_factor", 1.0)
    mean, std = (
        _by_channel(tuple(values), latents.device, latents.dtype)
        for values in (config.latents_mean, config.latents_std)
    )
    return (latents - mean) * config.get("scaling_factor", 1.0) / std


@lru_cache(maxsize=16)
def _by_channel(values: tuple[float, ...], device: torch.device, dtype: torch.dtype) -> torch.Tensor:
    """A number for each channel, `(1, C, 1, 1)`; kept, because each copy to a GPU holds it up."""
    with torch.inference_mode(False):  # it may be kept from drawing to training
        return torch.tensor(values, device=device, dtype=dtype).view(1, -1, 1, 1)


def has_latent_statistics(vae: ModelMixin) -> bool:
    r"""Whether the autoencoder's config holds per-channel statistics."""
    return vae.config.get("latents_mean") is not None and vae.config.get("latents_std") is not None
