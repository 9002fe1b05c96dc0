"""
Autoencoders whose decoder is no mirror of the encoder: wider, narrower, deeper or shallower.

`AutoencoderKL` and `VQModel` of diffusers have one list of widths for both. The whole code is this one file, which needs torch and
diffusers only: `save_pretrained` puts it beside the weights, so that what we publish runs without our package.
"""

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL, ModelMixin, VQModel
from diffusers.configuration_utils import register_to_config
from diffusers.models.autoencoders.vae import Decoder

MODULE = "autoencoder_dae_asymmetric"  # the file beside the weights
# Of the types of blocks in a saved config: diffusers' own classes refuse it. They would load a deeper decoder without its last blocks.
PREFIX = "DAEAsymmetric"


def make_decoder(config: Any) -> Decoder:
    r"""The decoder of an autoencoder's config, which has `decoder_block_out_channels` and `decoder_layers_per_block`."""
    layers, groups = config.decoder_layers_per_block, config.decoder_norm_num_groups
    widths, types = config.decoder_block_out_channels or config.block_out_channels, tuple(config.up_block_types)
    return Decoder(
        in_channels=config.latent_channels,
        out_channels=config.out_channels,
        up_block_types=types + types[-1:] * (len(widths) - len(types)),
        block_out_channels=widths,
        layers_per_block=config.layers_per_block if layers is None else layers,
        norm_num_groups=config.norm_num_groups if groups is None else groups,
        act_fn=config.act_fn,
        norm_type=config.get("norm_type", "group"),
        mid_block_add_attention=config.mid_block_add_attention,
    )


def shrunk(images: torch.Tensor, config: Any) -> torch.Tensor:
    r"""
    Images as the encoder of an autoencoder's config takes them: of half the sides, if its decoder has one resolution more and so makes
    them twice as large.

    Args:
        images (`torch.Tensor` of shape `(B, C, H, W)`): Of the decoder's size.
    """
    widths = config.get("block_out_channels") or ()
    more = len(config.get("decoder_block_out_channels") or widths) - len(widths) if widths else 0
    return F.avg_pool2d(images, 2**more) if more > 0 else images


@contextmanager
def decoder_tiles(autoencoder: AutoencoderKL) -> Iterator[None]:
    r"""Inside, decoded tiles have the decoder's size. diffusers takes the encoder's, which is half of it for images of twice the sides."""
    config, before = autoencoder.config, autoencoder.tile_sample_min_size
    if len(config.decoder_block_out_channels or ()) > len(config.block_out_channels):
        factor = 2 ** (len(config.decoder_block_out_channels) - 1)
        autoencoder.tile_sample_min_size = autoencoder.tile_latent_min_size * factor
    try:
        yield
    finally:
        autoencoder.tile_sample_min_size = before


class _SavesItsCode(ModelMixin):  # pipelines look for `ModelMixin` in this module
    def encode(self, x: torch.Tensor, *args, **kwargs):
        """Encodes images of the size that `decode` makes, see [`shrunk`]."""
        return super().encode(shrunk(x, self.config), *args, **kwargs)

    def save_pretrained(self, save_directory: str | os.PathLike, *args, **kwargs):
        """Saves like [`ModelMixin.save_pretrained`], and adds this file, in which `AutoModel` finds the class."""
        folder = Path(save_directory)
        folder.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(__file__, folder / f"{MODULE}.py")
        types = self.config.up_block_types
        self.register_to_config(
            auto_map={"AutoModel": f"{MODULE}.{type(self).__name__}"},
            up_block_types=tuple(f"{PREFIX}{each}" for each in types),
        )
        try:
            super().save_pretrained(save_directory, *args, **kwargs)
        finally:
            self.register_to_config(up_block_types=types)


class DAEAsymmetricAutoencoderKL(_SavesItsCode, AutoencoderKL):
    r"""
    An `AutoencoderKL` whose decoder has a size of its own.

    Args:
        decoder_block_out_channels (`tuple[int]`, *optional*): Its channels per resolution, the highest first; as many as
            `block_out_channels`, which is the default. With one more, images have twice the sides for the same latents.
        decoder_layers_per_block (`int`, *optional*): Its residual blocks per resolution, minus one; default: `layers_per_block`.
        decoder_norm_num_groups (`int`, *optional*): Its groups of the group normalisation; default: `norm_num_groups`.
        auto_map (`dict`, *optional*): Where `AutoModel` finds the code.

    The other arguments are those of [`~diffusers.AutoencoderKL`].
    """

    @register_to_config
    def __init__(
        self,
        in_channels: int = 3,
        out_channels: int = 3,
        down_block_types: tuple[str, ...] = ("DownEncoderBlock2D",),
        up_block_types: tuple[str, ...] = ("UpDecoderBlock2D",),
        block_out_channels: tuple[int, ...] = (64,),
        layers_per_block: int = 1,
        act_fn: str = "silu",
        latent_channels: int = 4,
        norm_num_groups: int = 32,
        sample_size: int = 32,
        scaling_factor: float = 0.18215,
        shift_factor: float | None = None,
        latents_mean: tuple[float, ...] | None = None,
        latents_std: tuple[float, ...] | None = None,
        force_upcast: bool = True,
        use_quant_conv: bool = True,
        use_post_quant_conv: bool = True,
        mid_block_add_attention: bool = True,
        decoder_block_out_channels: tuple[int, ...] | None = None,
        decoder_layers_per_block: int | None = None,
        decoder_norm_num_groups: int | None = None,
        auto_map: dict[str, str] | None = None,
    ):
        super().__init__(
            in_channels=in_channels,
            out_channels=out_channels,
            down_block_types=down_block_types,
            up_block_types=tuple(each.removeprefix(PREFIX) for each in up_block_types),
            block_out_channels=block_out_channels,
            layers_per_block=layers_per_block,
            act_fn=act_fn,
            latent_channels=latent_channels,
            norm_num_groups=norm_num_groups,
            sample_size=sample_size,
            scaling_factor=scaling_factor,
            shift_factor=shift_factor,
            latents_mean=latents_mean,
            latents_std=latents_std,
            force_upcast=force_upcast,
            use_quant_conv=use_quant_conv,
            use_post_quant_conv=use_post_quant_conv,
            mid_block_add_attention=mid_block_add_attention,
        )
        self.decoder = make_decoder(self.config)

    def tiled_decode(self, z: torch.Tensor, return_dict: bool = True):
        """Decodes in tiles, see [`decoder_tiles`]."""
        with decoder_tiles(self):
            return super().tiled_decode(z, return_dict)


class DAEAsymmetricVQModel(_SavesItsCode, VQModel):
    r"""
    A `VQModel` whose decoder has a size of its own.

    Args:
        decoder_block_out_channels, decoder_layers_per_block, decoder_norm_num_groups, auto_map: As in [`DAEAsymmetricAutoencoderKL`].
        latents_mean, latents_std (`tuple[float]`, *optional*): Statistics of the latents before quantisation.

    The other arguments are those of [`~diffusers.VQModel`].
    """

    @register_to_config
    def __init__(
        self,
        in_channels: int = 3,
        out_channels: int = 3,
        down_block_types: tuple[str, ...] = ("DownEncoderBlock2D",),
        up_block_types: tuple[str, ...] = ("UpDecoderBlock2D",),
        block_out_channels: tuple[int, ...] = (64,),
        layers_per_block: int = 1,
        act_fn: str = "silu",
        latent_channels: int = 3,
        sample_size: int = 32,
        num_vq_embeddings: int = 256,
        norm_num_groups: int = 32,
        vq_embed_dim: int | None = None,
        scaling_factor: float = 0.18215,
        norm_type: str = "group",
        mid_block_add_attention: bool = True,
        lookup_from_codebook: bool = False,
        force_upcast: bool = False,
        decoder_block_out_channels: tuple[int, ...] | None = None,
        decoder_layers_per_block: int | None = None,
        decoder_norm_num_groups: int | None = None,
        auto_map: dict[str, str] | None = None,
        latents_mean: tuple[float, ...] | None = None,
        latents_std: tuple[float, ...] | None = None,
    ):
        super().__init__(
            in_channels=in_channels,
            out_channels=out_channels,
            down_block_types=down_block_types,
            up_block_types=tuple(each.removeprefix(PREFIX) for each in up_block_types),
            block_out_channels=block_out_channels,
            layers_per_block=layers_per_block,
            act_fn=act_fn,
            latent_channels=latent_channels,
            sample_size=sample_size,
            num_vq_embeddings=num_vq_embeddings,
            norm_num_groups=norm_num_groups,
            vq_embed_dim=vq_embed_dim,
            scaling_factor=scaling_factor,
            norm_type=norm_type,
            mid_block_add_attention=mid_block_add_attention,
            lookup_from_codebook=lookup_from_codebook,
            force_upcast=force_upcast,
        )
        self.decoder = make_decoder(self.config)
