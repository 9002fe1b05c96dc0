"""What makes an autoencoder decoupled: the two stages, what each of them trains, and the conversion to plain diffusers."""

from typing import Literal

import torch
from diffusers import ModelMixin

from dae_diffusers.autoencoders.weak_decoders import AuxiliaryDecoder


class DecoupledAutoencoderMixin:
    r"""
    Adds the two training stages of a decoupled autoencoder to a diffusers autoencoder.

    A model whose `stage` is `None` (the default) behaves like its parent class; its auxiliary decoder is unused.
    In a stage, `forward` runs that stage alone. So `DistributedDataParallel` and FSDP may wrap the model: every
    parameter that requires a gradient gets one.

    | stage | trains | frozen, in eval mode, without gradient |
    |---|---|---|
    | 1 | the latent half and `auxiliary_decoder` | the real decoder |
    | 1, without auxiliary decoder (joint training) | everything | nothing |
    | 2, and 3 for the latents of a generator too | the real decoder | the latent half and `auxiliary_decoder` |

    Source: Hu et al., "Complexity Matters: Rethinking the Latent Space for Generative Modeling", NeurIPS 2023,
    https://huggingface.co/papers/2307.08283.
    """

    # Modules that define the latent space (set by subclasses), and modules that turn latents into images.
    _latent_children: tuple[str, ...]
    _decoder_children: tuple[str, ...] = ("post_quant_conv", "decoder")
    # Prefixes of config fields that the plain model does not have.
    _own_config: tuple[str, ...] = ("auxiliary_",)

    stage: Literal[1, 2, 3] | None = None

    @classmethod
    def from_diffusers(cls, vae: ModelMixin, **auxiliary) -> "DecoupledAutoencoderMixin":
        r"""
        Makes a model with the architecture and weights of a trained autoencoder, and a fresh auxiliary decoder.

        Args:
            vae ([`~diffusers.AutoencoderKL`] or [`~diffusers.VQModel`]): A model of the class that this one extends. The statistics
                of its latents are not copied, since they may change. A codebook becomes one that is learnt by gradient. Stage 2
                fine-tunes its decoder (`auxiliary_warm_start` is False).
            auxiliary: The arguments of this class that begin with `auxiliary_`.

        Returns:
            A model of this class.
        """
        config = {name: value for name, value in vae.config.items() if name not in ("latents_mean", "latents_std")}
        model = cls.from_config({**config, **auxiliary, "auxiliary_warm_start": False})
        missing, unexpected = model.load_state_dict(vae.state_dict(), strict=False)
        strange = [name for name in missing if not name.startswith("auxiliary_decoder.")] + list(unexpected)
        if strange:
            raise ValueError(f"the autoencoder does not fit its own config: {strange[:5]}.")
        return model

    def _make_auxiliary_decoder(
        self, *, use_post_quant_conv: bool = True, code_channels: int | None = None
    ) -> AuxiliaryDecoder | None:
        """Builds the auxiliary decoder from the config, which holds every argument of the constructor; None for joint training."""
        config = self.config
        if config.auxiliary_decoder_type == "none":
            return None
        return AuxiliaryDecoder(
            config.auxiliary_decoder_type,
            latent_channels=config.latent_channels,
            out_channels=config.out_channels,
            up_block_types=config.up_block_types,
            block_out_channels=config.block_out_channels,
            layers_per_block=config.layers_per_block,
            norm_num_groups=config.norm_num_groups,
            act_fn=config.act_fn,
            mid_block_add_attention=config.mid_block_add_attention,
            use_post_quant_conv=use_post_quant_conv,
            dropout=config.auxiliary_dropout,
            channel_multiplier=config.auxiliary_channel_multiplier,
            auxiliary_layers_per_block=config.auxiliary_layers_per_block,
            code_channels=code_channels,
        )

    @property
    def is_decoupled(self) -> bool:
        r"""Whether there is an auxiliary decoder, that is, whether training takes two stages."""
        return self.auxiliary_decoder is not None

    @property
    def can_start_warm(self) -> bool:
        r"""Whether [`start_decoder_from_auxiliary`] works and overwrites nothing that is trained."""
        return self.config.auxiliary_decoder_type in ("same", "dropout", "prefix") and self.config.auxiliary_warm_start

    @property
    def last_layer(self) -> torch.nn.Parameter:
        r"""The last weight of the decoder that the current stage trains. Gradients of losses can be compared there."""
        decoder = self.auxiliary_decoder.decoder if self.stage == 1 and self.is_decoupled else self.decoder
        return (decoder.conv_out if hasattr(decoder, "conv_out") else decoder[0]).weight

    @property
    def encoder_last_layer(self) -> torch.nn.Parameter:
        r"""The last weight of the encoder. Gradients of losses on images and on latents can be compared there."""
        return self.encoder.conv_out.weight

    def set_stage(self, stage: Literal[1, 2, 3] | None) -> None:
        r"""
        Chooses what `forward` runs and what trains. Call it before wrapping the model and before making the optimiser.

        Args:
            stage (`1`, `2`, `3` or `None`): See the table of the class. `None` makes everything trainable again.

        Raises:
            ValueError: For any other value.
        """
        if stage not in (1, 2, 3, None):
            raise ValueError(
                f"`stage` is {stage!r}, but must be 1 (encoder with the auxiliary decoder), 2 or 3 (decoder, encoder "
                "frozen) or None (the plain autoencoder)."
            )
        self.stage = stage
        for name, child in self.named_children():
            child.requires_grad_(name not in self._frozen_children())
        self.zero_grad(set_to_none=True)
        self.train(self.training)

    def train(self, mode: bool = True):
        r"""Like `torch.nn.Module.train`, but modules that the stage has frozen stay in eval mode."""
        super().train(mode)
        for name, child in self.named_children():
            if name in self._frozen_children():
                child.eval()
        return self

    def decode_in_stage(self, latents: torch.Tensor) -> torch.Tensor:
        r"""
        Decodes with the decoder that the current stage trains.

        Args:
            latents (`torch.Tensor` of shape `(B, C, h, w)`): Raw latents.

        Returns:
            `torch.Tensor` of shape `(B, out_channels, H, W)`: Images in [-1, 1] where training has succeeded.
        """
        if self.stage == 1 and self.is_decoupled:
            return self.auxiliary_decoder(latents)
        return self.decode(latents).sample

    def start_decoder_from_auxiliary(self) -> None:
        r"""
        Copies the auxiliary decoder's weights into the real decoder, to start stage 2 warm.

        Raises:
            ValueError: If their shapes differ, there is no auxiliary decoder, or the real one is already trained.
        """
        if not self.can_start_warm:
            raise ValueError(
                "The real decoder can start from the auxiliary decoder only where both have the same shape, that is for "
                "`auxiliary_decoder_type` same, dropout and prefix, and with `auxiliary_warm_start`; this model has "
                f"{self.config.auxiliary_decoder_type!r} and {self.config.auxiliary_warm_start}."
            )
        self.decoder.load_state_dict(self.auxiliary_decoder.decoder.state_dict())
        if self.post_quant_conv is not None:
            self.post_quant_conv.load_state_dict(self.auxiliary_decoder.post_quant_conv.state_dict())

    def to_diffusers(self) -> ModelMixin:
        r"""
        Makes the plain diffusers model to publish: same encoder, same real decoder, same config, no auxiliary decoder.

        Returns:
            [`~diffusers.ModelMixin`]: A copy, of the parent class, in eval mode, on the same device, in the same dtype.
        """
        config = {name: value for name, value in self.config.items() if not name.startswith(self._own_config)}
        plain = self._diffusers_class.from_config(config).to(self.device)
        if self.dtype != plain.dtype:
            plain = plain.to(self.dtype)
        plain.load_state_dict(self._plain_state_dict())
        return plain.eval()

    def _plain_state_dict(self) -> dict[str, torch.Tensor]:
        return {name: value for name, value in self.state_dict().items() if not name.startswith("auxiliary_decoder.")}

    def _frozen_children(self) -> tuple[str, ...]:
        if self.stage in (2, 3):
            return (*self._latent_children, "auxiliary_decoder")
        if self.stage == 1 and self.is_decoupled:
            return self._decoder_children
        return ()
