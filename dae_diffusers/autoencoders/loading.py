"""Loads any autoencoder that a generator can be trained on, and checks that images fit it."""

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import diffusers
import torch
from diffusers import AutoencoderKL, ModelMixin, VQModel

from dae_diffusers.autoencoder_dae_asymmetric import DAEAsymmetricAutoencoderKL, DAEAsymmetricVQModel
from dae_diffusers.autoencoders.autoencoder_kl import DAEAutoencoderKL
from dae_diffusers.autoencoders.vq_model import DAEVQModel
from dae_diffusers.data.configuration import DEFAULT_RESOLUTION
from dae_diffusers.errors import UserError, one_line
from dae_diffusers.pipelines.dae_dit import autoencoder_shape, is_representation_autoencoder
from dae_diffusers.settings import check_again
from dae_diffusers.sizes import height_and_width, nearest_multiples, words_of_size

logger = logging.getLogger(__name__)

_KNOWN = {
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


def load_autoencoder(name_or_path: str) -> ModelMixin:
    r"""
    Loads a frozen autoencoder, float32, in eval mode, from a folder or the Hub.

    Args:
        name_or_path (`str`): A diffusers autoencoder of images, or what has one in `vae/`: a pipeline, or the output folder of a run. Or a
            single file with the weights of an `AutoencoderKL`, as Stable Diffusion's are often shared.

    Returns:
        [`~diffusers.ModelMixin`]: The autoencoder, which needs no gradients.

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


def load_any_autoencoder(name_or_path: str, *, takes_stage1: bool = False) -> ModelMixin:
    r"""
    Loads an autoencoder as [`load_autoencoder`] does, but as the class that it was saved as: that of a stage 1 has its auxiliary
    decoder.

    Args:
        name_or_path (`str`): As in [`load_autoencoder`].
        takes_stage1 (`bool`, *optional*, defaults to `False`): Whether `stage1/` counts too, where there is no `vae/`.

    Raises:
        UserError: If there is no autoencoder, or it is damaged.
    """
    if Path(name_or_path).is_file():
        return _load_single_file(Path(name_or_path))
    reason = None
    for subfolder in (None, "vae", "stage1") if takes_stage1 else (None, "vae"):
        config = None
        try:
            config = AutoencoderKL.load_config(name_or_path, subfolder=subfolder)
            class_name = config.get("_class_name", "AutoencoderKL")
            vae = _load_weights(_class_of(class_name), name_or_path, subfolder)
            check_has_weights(vae)
            vae.eval().requires_grad_(False)
            if class_name not in _KNOWN:
                check_takes_images(vae)
            if subfolder is not None:
                logger.info("the autoencoder is `%s` of %s", subfolder, name_or_path)
            return vae
        except Exception as error:  # a damaged config.json can fail in any way
            if reason is None or config is not None:  # that of the place where there is something
                reason = one_line(error, 300)
    raise UserError(
        f"`{name_or_path}` is not an autoencoder that can be loaded: {reason} Give the folder or Hub id of an "
        "autoencoder of diffusers (AutoencoderKL, VQModel, AutoencoderDC...), such as the folder `vae/` that training/train_dae.py writes."
    )


def _load_weights(model_class: type[ModelMixin], name_or_path: str, subfolder: str | None) -> ModelMixin:
    """The model in float32, also where only half-precision weights (`variant="fp16"`) lie."""
    options = {"subfolder": subfolder, "torch_dtype": torch.float32}
    try:
        return model_class.from_pretrained(name_or_path, **options)
    except OSError:
        try:
            return model_class.from_pretrained(name_or_path, variant="fp16", **options)
        except Exception:
            pass  # what the first one lacked is the reason
        raise


def _load_single_file(path: Path) -> AutoencoderKL:
    """Weights in a file of their own, of Stable Diffusion 1 or 2: without a config, diffusers takes any autoencoder for one of them."""
    if (path.parent / "config.json").is_file():
        raise UserError(f"{path} is one file of an autoencoder. Give its folder, {path.parent}.")
    try:
        vae = AutoencoderKL.from_single_file(str(path), torch_dtype=torch.float32)
    except Exception as error:  # of a file with anything in it
        raise UserError(
            f"{path} is not a file with the weights of Stable Diffusion's autoencoder (1 or 2) that diffusers can load: "
            f"{one_line(error, 300)} The first time it fetches the model's config from the Hub. Of any other autoencoder give the folder."
        ) from None
    check_has_weights(vae)
    return vae.eval().requires_grad_(False)


def _class_of(name: str) -> type[ModelMixin]:
    found = _KNOWN.get(name) or getattr(diffusers, name, None)
    if not (isinstance(found, type) and issubclass(found, ModelMixin) and hasattr(found, "encode")):
        raise ValueError(f"its class is {name}.")
    return found


def check_can_be_trained(vae: ModelMixin, name: str) -> None:
    r"""Raises `UserError` for a class whose decoder train_dae.py cannot train."""
    if not isinstance(vae, AutoencoderKL | VQModel):
        raise UserError(
            f"{name} has a {type(vae).__name__}, but train_dae trains only AutoencoderKL and VQModel. Use it as it is: as the `vae` of "
            "train_dit."
        )


def takes_images(model: torch.nn.Module) -> bool:
    r"""Whether this is an autoencoder that images can be encoded with."""
    if isinstance(model, AutoencoderKL | VQModel):
        return True
    try:
        check_takes_images(model)
    except ValueError:
        return False
    return True


@torch.no_grad()
def check_takes_images(vae: ModelMixin) -> None:
    r"""Raises `ValueError` if a small image does not become latents and an image again, of the shapes that the config tells."""
    try:
        shape = autoencoder_shape(vae.config)
        side = shape.side if is_representation_autoencoder(vae.config) else 2 * shape.factor
        image = torch.zeros(1, shape.image_channels, side, side, device=vae.device, dtype=vae.dtype)
        mean, _ = encode_moments(vae, image)
        found = tuple(mean.shape), tuple(decode_latents(vae, mean).shape)
    except Exception as error:  # classes for videos, sounds or proteins fail in any way
        raise ValueError(
            f"its class {type(vae).__name__} cannot encode and decode images ({one_line(error, 100)})."
        ) from None
    expected = (1, shape.latent_channels, *[side // shape.factor] * 2), tuple(image.shape)
    if found != expected:
        raise ValueError(
            f"an image {expected[1]} becomes latents {found[0]} instead of {expected[0]}, and an image {found[1]}."
        )


def is_from_stage1(model: ModelMixin) -> bool:
    r"""Whether the model was saved by a stage 1: its latents are final, its real decoder is not trained."""
    return getattr(model, "auxiliary_decoder", None) is not None


def as_plain(model: ModelMixin) -> ModelMixin:
    r"""The model as a class that loads without a stage, frozen; itself if it is one."""
    plain = model.to_diffusers() if hasattr(model, "to_diffusers") else model
    return plain.eval().requires_grad_(False)


def is_vq(vae: ModelMixin) -> bool:
    r"""Whether the autoencoder has a codebook."""
    return isinstance(vae, VQModel)


def num_latent_channels(vae: ModelMixin) -> int:
    r"""Channels of the output of `encode`; for a `VQModel` this is the dimension of its codes."""
    return autoencoder_shape(vae.config).latent_channels


def encode_moments(vae: ModelMixin, pixel_values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    r"""
    Mean and standard deviation of the raw latents of images.

    Args:
        vae ([`~diffusers.ModelMixin`]): The autoencoder.
        pixel_values (`torch.Tensor` of shape `(B, channels, H, W)`): Images in [-1, 1].

    Returns:
        `tuple[torch.Tensor, torch.Tensor]` of shape `(B, C, h, w)`: Mean and standard deviation of the posterior. Where the encoder
        gives latents and no posterior: those, and zeros; for a `VQModel` before quantisation, for an `AutoencoderRAE` before it
        normalises them.
    """
    if is_representation_autoencoder(vae.config):
        latents = vae.encode(pixel_values / 2 + 0.5).latent
        latents = vae._denormalize_latents(latents / vae.config.scaling_factor)
        return latents, torch.zeros_like(latents)
    encoded = vae.encode(pixel_values)
    if hasattr(encoded, "latent_dist"):
        return encoded.latent_dist.mean, encoded.latent_dist.std
    return encoded[0], torch.zeros_like(encoded[0])


def decode_latents(vae: ModelMixin, latents: torch.Tensor) -> torch.Tensor:
    r"""
    Images, about [-1, 1], of raw latents.

    Args:
        vae ([`~diffusers.ModelMixin`]): The autoencoder.
        latents (`torch.Tensor` of shape `(B, C, h, w)`): As [`encode_moments`] gives them.

    Returns:
        `torch.Tensor` of shape `(B, channels, H, W)`.
    """
    if is_representation_autoencoder(vae.config):
        return 2 * vae.decode(vae._normalize_latents(latents) * vae.config.scaling_factor).sample - 1
    return vae.decode(latents).sample


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
    return autoencoder_shape(vae.config).factor


def settle_images(
    config: Any, vae: ModelMixin, *, side: int | Sequence[int] | None = None, patch_size: int = 1
) -> None:
    r"""
    Completes the settings of the images with what a trained autoencoder knows: side and channels, where they are left open. A
    side that is given wins, and is logged if it is another one.

    Args:
        config: A composed settings class with the part `data`; its checks run again.
        vae ([`~diffusers.ModelMixin`]): The autoencoder.
        side (`int` or pair, *optional*): Side of the images that a generator draws, in pixels; default: the autoencoder's.
        patch_size (`int`, *optional*, defaults to 1): Patch size of the generator, in latent pixels.

    Raises:
        UserError: If images of this size cannot be encoded.
    """
    data, given = config.data, config.data.resolution
    shape = autoencoder_shape(vae.config)
    known = side or shape.side
    data.settle(known or DEFAULT_RESOLUTION, shape.image_channels)
    if given is None:
        why = (
            "as the trained model knows them"
            if known
            else "the default: the trained model does not say; `--resolution` sets it"
        )
        logger.info("images have %s pixels, %s", words_of_size(data.size), why)
    elif known and height_and_width(known) != data.size:
        logger.info(
            "`--resolution` is %s, but the trained model knows images of %s pixels",
            words_of_size(data.size),
            words_of_size(known),
        )
    check_image_size(vae, channels=data.image_channels, size=data.size, patch_size=patch_size)
    data.settle_buckets(shape.factor * max(2, patch_size))  # so that a cache fits generators of patch size 1 and 2
    for size in data.shapes[: len(data.aspect_buckets)]:
        check_image_size(vae, channels=data.image_channels, size=size, patch_size=patch_size, field="aspect_buckets")
    check_again(config)


def check_image_size(
    vae: ModelMixin, *, channels: int, size: tuple[int, int], patch_size: int = 1, field: str = "resolution"
) -> None:
    r"""
    Raises `UserError` unless images of this size can be encoded and cut into the generator's patches.

    Args:
        vae ([`~diffusers.ModelMixin`]): The autoencoder.
        channels (`int`): Channels of the images.
        size (`tuple[int, int]`): Height and width of the images.
        patch_size (`int`, *optional*, defaults to 1): Patch size of the generator, in latent pixels.
        field (`str`, *optional*, defaults to `"resolution"`): The setting that gives the size, for messages.
    """
    shape = autoencoder_shape(vae.config)
    if shape.image_channels != channels:
        raise UserError(
            f"the autoencoder takes {shape.image_channels} image channels, but `image_channels` is {channels}."
        )
    if is_representation_autoencoder(vae.config) and size != height_and_width(shape.side):
        raise UserError(
            f"`{field}` is {words_of_size(size)}, but this {type(vae).__name__} makes images of {words_of_size(shape.side)} pixels only."
        )
    factor = shape.factor * patch_size
    for side in size:
        if side % factor:
            raise UserError(
                f"`{field}` {side} is not divisible by {factor} (autoencoder {shape.factor} x patch "
                f"{patch_size}). {nearest_multiples(side, factor)}"
            )
