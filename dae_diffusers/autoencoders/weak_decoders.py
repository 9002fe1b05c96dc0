"""The auxiliary decoders of stage 1: kinds of weak decoders, and the control that is not weak."""

import math

import torch
from diffusers.models.autoencoders.vae import Decoder
from diffusers.models.resnet import ResnetBlock2D
from torch import nn

from dae_diffusers.autoencoders.settings import AuxiliaryDecoderType, check_auxiliary_decoder, check_shallow


class AuxiliaryDecoder(nn.Module):
    r"""
    The decoder that trains the encoder in stage 1 and is discarded afterwards.

    Its structure is that of a real decoder that mirrors the encoder: an optional 1x1 `post_quant_conv`, then a decoder. With
    `decoder_type="same"` it is that mirror. A real decoder of another size changes nothing here, so that one stage 1 serves real
    decoders of several sizes.

    Args:
        decoder_type (`str`): What makes it weak.
            `same`: nothing, the control. `narrow`: `channel_multiplier` times the channels. `shallow`:
            `layers_per_block + 1` residual blocks per resolution. `dropout`: a full decoder whose residual branches
            lose whole channels at the rate `dropout` while training; the skip connections lose nothing. `prefix`: a full
            decoder that sees only the first channels of the latents while training, a random number of them for each image
            (nested dropout), so that channels are ordered by importance. `linear`: one linear map from a latent pixel to
            its patch of the image.
        latent_channels (`int`): Channels of the latents.
        code_channels (`int`, *optional*): Channels of the input where `post_quant_conv` changes their number (`VQModel`).
        out_channels (`int`): Channels of the image.
        up_block_types, block_out_channels, layers_per_block, norm_num_groups, act_fn, mid_block_add_attention:
            As in `AutoencoderKL`: those of the encoder's mirror.
        use_post_quant_conv (`bool`): Whether the real decoder has a 1x1 convolution before it.
        dropout (`float`): Rate in [0, 1) of `dropout`.
        channel_multiplier (`float`): Factor in (0, 1] of `narrow`.
        auxiliary_layers_per_block (`int`): Depth >= 0 of `shallow`, below the real decoder's.

    Raises:
        ValueError: For an unknown type, a strength out of its range, or a `shallow` decoder that is not shallower.
    """

    def __init__(
        self,
        decoder_type: AuxiliaryDecoderType,
        *,
        latent_channels: int,
        out_channels: int,
        up_block_types: tuple[str, ...],
        block_out_channels: tuple[int, ...],
        layers_per_block: int,
        norm_num_groups: int,
        act_fn: str,
        mid_block_add_attention: bool,
        use_post_quant_conv: bool,
        dropout: float,
        channel_multiplier: float,
        auxiliary_layers_per_block: int,
        code_channels: int | None = None,
    ):
        super().__init__()
        self.decoder_type = decoder_type
        check_auxiliary_decoder(decoder_type, dropout, channel_multiplier, auxiliary_layers_per_block)
        self.post_quant_conv = None
        if use_post_quant_conv:
            self.post_quant_conv = nn.Conv2d(code_channels or latent_channels, latent_channels, 1)
        if decoder_type == "linear":
            factor = 2 ** (len(block_out_channels) - 1)
            self.decoder = nn.Sequential(
                nn.Conv2d(latent_channels, out_channels * factor**2, 1), nn.PixelShuffle(factor)
            )
            return
        if decoder_type == "narrow":
            block_out_channels = tuple(max(1, round(channel_multiplier * width)) for width in block_out_channels)
            norm_num_groups = math.gcd(norm_num_groups, *block_out_channels)
        if decoder_type == "shallow":
            check_shallow(auxiliary_layers_per_block, layers_per_block)
            layers_per_block = auxiliary_layers_per_block
        self.decoder = Decoder(
            in_channels=latent_channels,
            out_channels=out_channels,
            up_block_types=up_block_types,
            block_out_channels=block_out_channels,
            layers_per_block=layers_per_block,
            norm_num_groups=norm_num_groups,
            act_fn=act_fn,
            mid_block_add_attention=mid_block_add_attention,
        )
        if decoder_type == "dropout":
            for module in self.decoder.modules():
                if isinstance(module, ResnetBlock2D):  # inside the branch, where the block itself has a place for it
                    module.dropout = nn.Dropout2d(dropout)

    def forward(self, latents: torch.Tensor) -> torch.Tensor:
        r"""`(B, latent_channels, h, w)` raw latents to `(B, out_channels, H, W)` images."""
        if self.decoder_type == "prefix" and self.training:
            latents = keep_prefixes(latents)
        if self.post_quant_conv is not None:
            latents = self.post_quant_conv(latents)
        return self.decoder(latents)


def keep_prefixes(latents: torch.Tensor, num_channels: torch.Tensor | None = None) -> torch.Tensor:
    r"""
    Sets all but the first channels of each image's latents to 0.

    Args:
        latents (`torch.Tensor` of shape `(B, C, h, w)`): Raw latents.
        num_channels (`torch.Tensor` of shape `(B,)`, *optional*): How many stay, from 1 to C; drawn uniformly by default.

    Returns:
        `torch.Tensor` of the same shape.

    Source: nested dropout, Rippel et al., 2014, https://huggingface.co/papers/1402.0915.
    """
    batch, channels = latents.shape[:2]
    if num_channels is None:
        num_channels = torch.randint(1, channels + 1, (batch,), device=latents.device)
    keeps = torch.arange(channels, device=latents.device) < num_channels[:, None]
    return latents * keeps[:, :, None, None]
