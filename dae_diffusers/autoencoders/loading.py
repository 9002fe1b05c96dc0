"""Loads any autoencoder that a generator can be trained on, and checks that images fit it."""

import logging
from collections.abc import Sequence
from typing import Any

import torch
from diffusers import AutoencoderKL, ModelMixin, VQModel

from dae_diffusers.autoencoder_dae_asymmetric import DAEAsymmetricAutoencoderKL, DAEAsymmetricVQModel
from dae_diffusers.autoencoders.autoencoder_kl import DAEAutoencoderKL
from dae_diffusers.autoencoders.vq_model import DAEVQModel
from dae_diffusers.data.configuration import DEFAULT_RESOLUTION
from dae_diffusers.errors import UserError, one_line
from dae_diffusers.sizes import height_and_width, nearest_multiples, words_of_size

logger = logging.getLogger(__name__)

_CLASSES = {
    each.__name__: each
    for each in (
        AutoencoderKL,
        DAEAutoencoderKL,
        DAEAsymmetricAutoencoderKL,
        VQModel,
        DAEVQModel,
        DAEAsymmetricVQModel,
    )
}


def load_autoencoder(name_or_path: str) -> AutoencoderKL | VQModel:
    r"""
    Loads a frozen autoencoder, float32, in eval mode, from a folder or the Hub.

    Args:
        name_or_path (`str`): A diffusers autoencoder, or what has one in `vae/`: a pipeline, or the output folder of a run.

    Returns:
        [`~diffusers.AutoencoderKL`] or [`~diffusers.VQModel`]: The autoencoder, which needs no gradients.

    Raises:
        UserError: If there is no autoencoder, or it is damaged.
    """
    model = load_any_autoencoder(name_or_path)
    if is_from_stage1(model):
        logger.warning(
            "%s holds the model of a stage 1: its latents are final, but its decoder has not been trained (unless a "
            "stage 2 followed). Train it with `train_dae.py --stage 2`, or give the `vae` folder of its run.",
            name_or_path,
        )
    return as_plain(model)


def load_any_autoencoder(name_or_path: str, *, takes_stage1: bool = False) -> AutoencoderKL | VQModel:
    r"""
    Loads an autoencoder as [`load_autoencoder`] does, but as the class that it was saved as: that of a stage 1 has its auxiliary
    decoder.

    Args:
        name_or_path (`str`): As in [`load_autoencoder`].
        takes_stage1 (`bool`, *optional*, defaults to `False`): Whether `stage1/` counts too, where there is no `vae/`.

    Raises:
        UserError: If there is no autoencoder, or it is damaged.
    """
    reason = None
    for subfolder in (None, "vae", "stage1") if takes_stage1 else (None, "vae"):
        config = None
        try:
            config = AutoencoderKL.load_config(name_or_path, subfolder=subfolder)
            class_name = config.get("_class_name", "AutoencoderKL")
            if class_name not in _CLASSES:
                raise ValueError(f"its class is {class_name}.")
            vae_class = _CLASSES[class_name]
            vae = vae_class.from_pretrained(name_or_path, subfolder=subfolder, torch_dtype=torch.float32)
            check_has_weights(vae)
            if subfolder is not None:
                logger.info("the autoencoder is `%s` of %s", subfolder, name_or_path)
            return vae.eval().requires_grad_(False)
        except Exception as error:  # a damaged config.json can fail in any way
            if reason is None or config is not None:  # that of the place where there is something
                reason = one_line(error, 300)
    raise UserError(
        f"`{name_or_path}` is not an autoencoder that can be loaded: {reason} Give the folder or Hub id of a diffusers "
        "`AutoencoderKL` or `VQModel`, such as the folder `vae/` that training/train_dae.py writes."
    )


def is_from_stage1(model: ModelMixin) -> bool:
    r"""Whether the model was saved by a stage 1: its latents are final, its real decoder is not trained."""
    return getattr(model, "auxiliary_decoder", None) is not None


def as_plain(model: ModelMixin) -> AutoencoderKL | VQModel:
    r"""The model as a class that loads without a stage, frozen; itself if it is one."""
    plain = model.to_diffusers() if hasattr(model, "to_diffusers") else model
    return plain.eval().requires_grad_(False)


def is_vq(vae: ModelMixin) -> bool:
    r"""Whether the autoencoder has a codebook."""
    return isinstance(vae, VQModel)


def num_latent_channels(vae: ModelMixin) -> int:
    r"""Channels of the output of `encode`; for a `VQModel` this is the dimension of its codes."""
    return vae.config.get("vq_embed_dim") or vae.config.latent_channels


def encode_moments(vae: ModelMixin, pixel_values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    r"""
    Mean and standard deviation of the raw latents of images.

    Args:
        vae ([`~diffusers.AutoencoderKL`] or [`~diffusers.VQModel`]): The autoencoder.
        pixel_values (`torch.Tensor` of shape `(B, channels, H, W)`): Images in [-1, 1].

    Returns:
        `tuple[torch.Tensor, torch.Tensor]` of shape `(B, C, h, w)`: Mean and standard deviation of the posterior; for a `VQModel`
        the latents before quantisation, and zeros.
    """
    if is_vq(vae):
        latents = vae.encode(pixel_values).latents
        return latents, torch.zeros_like(latents)
    posterior = vae.encode(pixel_values).latent_dist
    return posterior.mean, posterior.std


def check_has_weights(model: torch.nn.Module) -> None:
    r"""Raises `ValueError` if a file lacks weights of a diffusers model. Such weights are not set and cannot be used."""
    missing = [name for name, value in model.state_dict().items() if value.is_meta]
    if missing:
        raise ValueError(f"{len(missing)} weights of its {type(model).__name__} are missing, such as {missing[0]}.")


def check_finite(values: torch.Tensor, what: str = "latents of the autoencoder") -> None:
    r"""Raises `UserError` if the output of a model holds NaN or infinite values."""
    if not torch.isfinite(values).all():
        raise UserError(
            f"the {what} hold NaN or infinite values: its weights are broken, or the precision is too low. Train it again, "
            "or use float32."
        )


def spatial_factor(vae: ModelMixin) -> int:
    r"""Pixels of the image per latent pixel, along a side."""
    return 2 ** (len(vae.config.block_out_channels) - 1)


def settle_images(
    config: Any, vae: ModelMixin, *, side: int | Sequence[int] | None = None, patch_size: int = 1
) -> None:
    r"""
    Completes the settings of the images with what a trained autoencoder knows: side and channels, where they are left open. A
    side that is given wins, and is logged if it is another one.

    Args:
        config: A composed settings class with the part `data`; its checks run again.
        vae ([`~diffusers.AutoencoderKL`] or [`~diffusers.VQModel`]): The autoencoder.
        side (`int` or pair, *optional*): Side of the images that a generator draws, in pixels; default: the autoencoder's.
        patch_size (`int`, *optional*, defaults to 1): Patch size of the generator, in latent pixels.

    Raises:
        UserError: If images of this size cannot be encoded.
    """
    data, given = config.data, config.data.resolution
    known = side or vae.config.get("sample_size")
    data.settle(known or DEFAULT_RESOLUTION, vae.config.in_channels)
    if given is None:
        logger.info("images have %s pixels, as the trained model knows them", words_of_size(data.size))
    elif known and height_and_width(known) != data.size:
        logger.info(
            "`--resolution` is %s, but the trained model knows images of %s pixels",
            words_of_size(data.size),
            words_of_size(known),
        )
    check_image_size(vae, channels=data.image_channels, size=data.size, patch_size=patch_size)
    config.__post_init__()


def check_image_size(vae: ModelMixin, *, channels: int, size: tuple[int, int], patch_size: int = 1) -> None:
    r"""
    Raises `UserError` unless images of this size can be encoded and cut into the generator's patches.

    Args:
        vae ([`~diffusers.AutoencoderKL`]): The autoencoder.
        channels (`int`): Channels of the images.
        size (`tuple[int, int]`): Height and width of the images.
        patch_size (`int`, *optional*, defaults to 1): Patch size of the generator, in latent pixels.
    """
    if vae.config.in_channels != channels:
        raise UserError(
            f"the autoencoder takes {vae.config.in_channels} image channels, but `image_channels` is {channels}."
        )
    factor = spatial_factor(vae) * patch_size
    for side in size:
        if side % factor:
            raise UserError(
                f"`resolution` {side} is not divisible by {factor} (autoencoder {spatial_factor(vae)} x patch "
                f"{patch_size}). {nearest_multiples(side, factor)}"
            )
