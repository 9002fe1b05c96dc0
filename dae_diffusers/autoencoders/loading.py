"""Loading any autoencoder that a generator can be trained on, and checking that images fit it."""

import torch
from diffusers import AutoencoderKL
from safetensors import SafetensorError

from dae_diffusers.cli import UserError


def load_autoencoder(name_or_path: str) -> AutoencoderKL:
    r"""
    Loads a frozen autoencoder, float32, in eval mode, from a folder or the Hub.

    Args:
        name_or_path (`str`): A diffusers autoencoder, or a pipeline that has one in `vae/`.

    Returns:
        [`~diffusers.AutoencoderKL`]: Without gradients.

    Raises:
        UserError: If there is none, or it is damaged.
    """
    reasons = []
    for subfolder in (None, "vae"):
        try:
            vae = AutoencoderKL.from_pretrained(name_or_path, subfolder=subfolder, torch_dtype=torch.float32)
            return vae.eval().requires_grad_(False)
        except (OSError, ValueError, SafetensorError, RuntimeError) as error:
            reasons.append(" ".join(str(error).split())[:300])
    raise UserError(
        f"`{name_or_path}` is not an autoencoder that can be loaded: {reasons[0]} Expected is a diffusers "
        "`AutoencoderKL` folder or Hub id, such as the `vae` folder that training/train_dae.py makes."
    )


def spatial_factor(vae: AutoencoderKL) -> int:
    r"""How many pixels of a side make one latent pixel."""
    return 2 ** (len(vae.config.block_out_channels) - 1)


def check_image_size(vae: AutoencoderKL, *, channels: int, resolution: int, patch_size: int = 1) -> None:
    r"""
    Raises `UserError` unless images of this kind can be encoded and cut into the generator's patches.

    Args:
        vae ([`~diffusers.AutoencoderKL`]): The autoencoder.
        channels, resolution (`int`): Of the images.
        patch_size (`int`, *optional*, defaults to 1): Of the generator, in latent pixels.
    """
    if vae.config.in_channels != channels:
        raise UserError(
            f"the autoencoder takes {vae.config.in_channels} image channels, but `--image_channels` is {channels}."
        )
    factor = spatial_factor(vae) * patch_size
    if resolution % factor:
        below = max(1, resolution // factor) * factor
        raise UserError(
            f"`--resolution` {resolution} is not divisible by {factor} (autoencoder {spatial_factor(vae)} x patch "
            f"{patch_size}). The nearest valid ones are {below} and {(resolution // factor + 1) * factor}."
        )
