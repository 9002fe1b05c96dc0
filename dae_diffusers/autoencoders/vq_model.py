"""The decoupled autoencoder with a codebook."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from diffusers import VQModel
from diffusers.configuration_utils import register_to_config
from diffusers.models.autoencoders.vae import DecoderOutput

from dae_diffusers.autoencoder_dae_asymmetric import DAEAsymmetricVQModel, make_decoder
from dae_diffusers.autoencoders.decoupled import DecoupledAutoencoderMixin
from dae_diffusers.autoencoders.quantizers import CodebookQuantizer, Quantization
from dae_diffusers.autoencoders.settings import AuxiliaryDecoderType, QuantizerType


@dataclass
class DAEVQModelOutput(DecoderOutput):
    r"""
    What a stage returns.

    Args:
        sample (`torch.Tensor` of shape `(B, out_channels, H, W)`): The reconstruction by the stage's decoder.
        quantization ([`~dae_diffusers.autoencoders.quantizers.Quantization`]): Latents and codes; without gradient in
            stage 2.
    """

    quantization: Quantization | None = None


class DAEVQModel(DecoupledAutoencoderMixin, VQModel):
    r"""
    A `VQModel` whose encoder and codebook are trained against a weak auxiliary decoder (stage 1), then frozen while the
    real decoder is trained (stage 2), so the codes of every image do not change. With
    `auxiliary_decoder_type="none"` and `quantizer_type="vq"` it is a `VQModel`, except for the weight of the
    commitment term (see [`~dae_diffusers.losses.codebook.commitment_loss`]).

    In stage 1, call `model.quantize.update()` after every optimiser step. [`to_diffusers`] exports the codebook in the form
    in which it is used, so stock diffusers finds the same codes and decodes the same images for every quantiser.

    Args:
        quantizer_type (`str`, *optional*, defaults to `"vq"`): `vq`, `ema` or `fsq`, see
            [`~dae_diffusers.autoencoders.quantizers.CodebookQuantizer`].
        quantizer_l2_normalize (`bool`, *optional*, defaults to `False`): Whether codes have norm 1, for `vq` and `ema`.
        quantizer_ema_decay (`float`, *optional*, defaults to 0.99): Decay of the moving averages, for `ema`.
        quantizer_warmup_steps (`int`, *optional*, defaults to 100): Steps before k-means, for `ema`.
        quantizer_dead_code_threshold (`float`, *optional*, defaults to 0.03): When to replace rarely used codes, for `ema`.
        quantizer_fsq_levels (`list[int]`, *optional*): Levels, for `fsq`; their product is `num_vq_embeddings` and their number
            the dimension of the codes.
        auxiliary_decoder_type, auxiliary_dropout, auxiliary_channel_multiplier, auxiliary_layers_per_block, auxiliary_warm_start:
            As in [`~dae_diffusers.DAEAutoencoderKL`].
        decoder_block_out_channels, decoder_layers_per_block, decoder_norm_num_groups (*optional*): As in
            [`~dae_diffusers.DAEAutoencoderKL`].
        latents_mean, latents_std (`list[float]`, *optional*):
            Statistics of the latents before quantisation over the training set, with `scaling_factor = 1.0`.

    The other arguments are those of [`~diffusers.VQModel`].
    """

    _diffusers_class = VQModel
    _asymmetric_class = DAEAsymmetricVQModel
    _latent_children = ("encoder", "quant_conv", "quantize")
    _own_config = ("auxiliary_", "quantizer_")
    _supports_gradient_checkpointing = True

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
        quantizer_type: QuantizerType = "vq",
        quantizer_l2_normalize: bool = False,
        quantizer_ema_decay: float = 0.99,
        quantizer_warmup_steps: int = 100,
        quantizer_dead_code_threshold: float = 0.03,
        quantizer_fsq_levels: tuple[int, ...] | None = None,
        auxiliary_decoder_type: AuxiliaryDecoderType = "none",
        auxiliary_dropout: float = 0.3,
        auxiliary_channel_multiplier: float = 0.25,
        auxiliary_layers_per_block: int = 0,
        auxiliary_warm_start: bool = True,
        decoder_block_out_channels: tuple[int, ...] | None = None,
        decoder_layers_per_block: int | None = None,
        decoder_norm_num_groups: int | None = None,
        latents_mean: tuple[float, ...] | None = None,
        latents_std: tuple[float, ...] | None = None,
    ):
        if auxiliary_decoder_type != "none" and norm_type != "group":
            raise ValueError(
                f"`norm_type` is {norm_type!r}, but an auxiliary decoder supports only 'group'. Use that, or "
                '`auxiliary_decoder_type="none"`.'
            )
        super().__init__(
            in_channels=in_channels,
            out_channels=out_channels,
            down_block_types=down_block_types,
            up_block_types=up_block_types,
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
        code_channels = latent_channels if vq_embed_dim is None else vq_embed_dim
        self.quantize = CodebookQuantizer(
            num_vq_embeddings,
            code_channels,
            quantizer_type=quantizer_type,
            l2_normalize=quantizer_l2_normalize,
            ema_decay=quantizer_ema_decay,
            warmup_steps=quantizer_warmup_steps,
            dead_code_threshold=quantizer_dead_code_threshold,
            fsq_levels=quantizer_fsq_levels,
        )
        self.auxiliary_decoder = self._make_auxiliary_decoder(code_channels=code_channels)
        if self.is_asymmetric:  # last: stage 1 begins with the same weights as without it
            self.decoder = make_decoder(self.config)

    def forward(
        self,
        sample: torch.Tensor,
        return_dict: bool = True,
        perturb_latents: Callable[[torch.Tensor], torch.Tensor] | None = None,
        moments: tuple[torch.Tensor, torch.Tensor] | None = None,
        drawn_latents: torch.Tensor | None = None,
    ) -> DecoderOutput | tuple:
        r"""
        Runs the current stage: images to reconstructions.

        Args:
            sample (`torch.Tensor` of shape `(B, in_channels, H, W)`): `pixel_values` in [-1, 1].
            return_dict (`bool`, *optional*, defaults to `True`): Whether to return an output object or a tuple.
            perturb_latents (`Callable`, *optional*): In a stage: applied to the quantised latents before they are decoded.
            moments (pair of `torch.Tensor` of shape `(B, C, h, w)`, *optional*): In stages 2 and 3: the images' latents before
                quantisation (and zeros), if they are known. The encoder does not run then.
            drawn_latents (`torch.Tensor` of shape `(M, C, h, w)`, *optional*): In stage 3: what a generator has drawn, quantised; the
                `M` images follow the reconstructions.

        Returns:
            [`DAEVQModelOutput`] or `(reconstruction, quantization)` in a stage; what [`~diffusers.VQModel`] returns when
            `stage` is `None`.
        """
        if self.stage is None:
            return super().forward(sample, return_dict=return_dict)
        with torch.set_grad_enabled(torch.is_grad_enabled() and self.stage == 1):
            latents = self.encode(sample).latents if moments is None else moments[0]
            quantization = self.quantize.quantize(latents)
        if self.stage == 1 and self.training:
            self.quantize.note(quantization)
        quantized = quantization.straight_through
        if perturb_latents is not None:
            quantized = perturb_latents(quantized)
        if drawn_latents is not None:
            quantized = torch.cat([quantized, drawn_latents.to(quantized)])
        reconstruction = self._decode_codes(quantized)
        if not return_dict:
            return reconstruction, quantization
        return DAEVQModelOutput(sample=reconstruction, quantization=quantization)

    def decode_in_stage(self, latents: torch.Tensor) -> torch.Tensor:
        r"""
        Quantises, then decodes with the decoder that the current stage trains.

        Args:
            latents (`torch.Tensor` of shape `(B, C, h, w)`): Raw latents, before quantisation.

        Returns:
            `torch.Tensor` of shape `(B, out_channels, H, W)`: Images in [-1, 1] where training has succeeded.
        """
        return self._decode_codes(self.quantize.quantize(latents).straight_through)

    def _decode_codes(self, quantized: torch.Tensor) -> torch.Tensor:
        if self.stage == 1 and self.is_decoupled:
            return self.auxiliary_decoder(quantized)
        quantized = quantized.to(self.dtype)
        return self.decoder(self.post_quant_conv(quantized), quantized if self.config.norm_type == "spatial" else None)

    def _plain_state_dict(self) -> dict[str, torch.Tensor]:
        codebook = "quantize.embedding.weight"
        state_dict = {
            name: value
            for name, value in super()._plain_state_dict().items()
            if name == codebook or not name.startswith("quantize.")
        }
        return {**state_dict, codebook: self.quantize.codebook.detach()}
