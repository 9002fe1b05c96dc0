"""The decoupled autoencoder with a Gaussian latent space."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from diffusers import AutoencoderKL
from diffusers.configuration_utils import register_to_config
from diffusers.models.autoencoders.vae import DecoderOutput, DiagonalGaussianDistribution

from dae_diffusers.autoencoder_dae_asymmetric import DAEAsymmetricAutoencoderKL, decoder_tiles, make_decoder
from dae_diffusers.autoencoders.decoupled import DecoupledAutoencoderMixin
from dae_diffusers.autoencoders.settings import AuxiliaryDecoderType


@dataclass
class DAEAutoencoderKLOutput(DecoderOutput):
    r"""
    What a stage returns.

    Args:
        sample (`torch.Tensor` of shape `(B, out_channels, H, W)`): The reconstruction by the stage's decoder.
        posterior (`DiagonalGaussianDistribution`): The encoder's distribution; without gradient in stage 2.
    """

    posterior: DiagonalGaussianDistribution | None = None


class DAEAutoencoderKL(DecoupledAutoencoderMixin, AutoencoderKL):
    r"""
    An `AutoencoderKL` whose encoder is trained against a weak auxiliary decoder (stage 1), then frozen while the real
    decoder is trained (stage 2). With `auxiliary_decoder_type="none"` it is an `AutoencoderKL`.

    Args:
        auxiliary_decoder_type (`str`, *optional*, defaults to `"none"`): The kind of auxiliary decoder, see
            [`~dae_diffusers.autoencoders.weak_decoders.AuxiliaryDecoder`]; `none` means joint training in one stage.
        auxiliary_dropout (`float`, *optional*, defaults to 0.3): Channel dropout rate in [0, 1) of `dropout`.
        auxiliary_channel_multiplier (`float`, *optional*, defaults to 0.25): Relative width in (0, 1] of `narrow`.
        auxiliary_layers_per_block (`int`, *optional*, defaults to 0): `layers_per_block` of `shallow`.
        auxiliary_warm_start (`bool`, *optional*, defaults to `True`): Whether the real decoder may start from the weights of the
            auxiliary one. False for a real decoder that is already trained.
        decoder_block_out_channels, decoder_layers_per_block, decoder_norm_num_groups (*optional*): Size of the real decoder, as in
            [`~dae_diffusers.DAEAsymmetricAutoencoderKL`]; by default it mirrors the encoder. The auxiliary decoder always does.
        latents_mean, latents_std (`list[float]` of length `latent_channels`, *optional*):
            Statistics of the raw latents over the training set, with `scaling_factor = 1.0`.

    The other arguments are those of [`~diffusers.AutoencoderKL`].
    """

    _diffusers_class = AutoencoderKL
    _asymmetric_class = DAEAsymmetricAutoencoderKL
    _latent_children = ("encoder", "quant_conv")

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
        auxiliary_decoder_type: AuxiliaryDecoderType = "none",
        auxiliary_dropout: float = 0.3,
        auxiliary_channel_multiplier: float = 0.25,
        auxiliary_layers_per_block: int = 0,
        auxiliary_warm_start: bool = True,
        decoder_block_out_channels: tuple[int, ...] | None = None,
        decoder_layers_per_block: int | None = None,
        decoder_norm_num_groups: int | None = None,
    ):
        super().__init__(
            in_channels=in_channels,
            out_channels=out_channels,
            down_block_types=down_block_types,
            up_block_types=up_block_types,
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
        self.auxiliary_decoder = self._make_auxiliary_decoder(use_post_quant_conv=use_post_quant_conv)
        if self.is_asymmetric:  # last: stage 1 begins with the same weights as without it
            self.decoder = make_decoder(self.config)

    def tiled_decode(self, z: torch.Tensor, return_dict: bool = True):
        r"""Decodes in tiles, see [`~dae_diffusers.autoencoder_dae_asymmetric.decoder_tiles`]."""
        with decoder_tiles(self):
            return super().tiled_decode(z, return_dict)

    def forward(
        self,
        sample: torch.Tensor,
        sample_posterior: bool = False,
        return_dict: bool = True,
        generator: torch.Generator | None = None,
        perturb_latents: Callable[[torch.Tensor], torch.Tensor] | None = None,
        moments: tuple[torch.Tensor, torch.Tensor] | None = None,
        drawn_latents: torch.Tensor | None = None,
    ) -> DecoderOutput | tuple:
        r"""
        Runs the current stage: images to reconstructions.

        Args:
            sample (`torch.Tensor` of shape `(B, in_channels, H, W)`): `pixel_values` in [-1, 1].
            sample_posterior (`bool`, *optional*, defaults to `False`): Draw latents instead of taking the mean.
            return_dict (`bool`, *optional*, defaults to `True`): Whether to return an output object or a tuple.
            generator (`torch.Generator`, *optional*): Random generator for the draw.
            perturb_latents (`Callable`, *optional*): In a stage: applied to the latents before they are decoded.
            moments (pair of `torch.Tensor` of shape `(B, latent_channels, h, w)`, *optional*): In stages 2 and 3: mean and standard
                deviation of the images' latents, if they are known. The encoder does not run then.
            drawn_latents (`torch.Tensor` of shape `(M, latent_channels, h, w)`, *optional*): In stage 3: raw latents of a generator;
                their `M` images follow the reconstructions.

        Returns:
            [`DAEAutoencoderKLOutput`] or `(reconstruction, posterior)` in a stage; what
            [`~diffusers.AutoencoderKL`] returns when `stage` is `None`.
        """
        if self.stage is None:
            return super().forward(
                sample, sample_posterior=sample_posterior, return_dict=return_dict, generator=generator
            )
        with torch.set_grad_enabled(torch.is_grad_enabled() and self.stage == 1):
            if moments is None:
                posterior = self.encode(sample).latent_dist
            else:
                mean, std = moments
                posterior = DiagonalGaussianDistribution(torch.cat([mean, 2 * std.log()], dim=1))
            latents = posterior.sample(generator=generator) if sample_posterior else posterior.mode()
        if perturb_latents is not None:
            latents = perturb_latents(latents)
        if drawn_latents is not None:
            latents = torch.cat([latents, drawn_latents.to(latents)])
        reconstruction = self.decode_in_stage(latents)
        if not return_dict:
            return reconstruction, posterior
        return DAEAutoencoderKLOutput(sample=reconstruction, posterior=posterior)
