"""What makes an autoencoder decoupled: the two stages, what each of them trains, and the conversion to plain diffusers."""

import logging
from typing import Any, Literal

import torch
from diffusers import ModelMixin

from dae_diffusers.autoencoder_dae_asymmetric import shrunk
from dae_diffusers.autoencoders.weak_decoders import AuxiliaryDecoder

logger = logging.getLogger(__name__)

_DECODER_SIZES = ("decoder_block_out_channels", "decoder_layers_per_block", "decoder_norm_num_groups")


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
    # The class of the plain model, and of the one whose decoder has a size of its own.
    _diffusers_class: type[ModelMixin]
    _asymmetric_class: type[ModelMixin]
    # Prefixes of config fields that the plain model does not have.
    _own_config: tuple[str, ...] = ("auxiliary_",)

    stage: Literal[1, 2, 3] | None = None
    # Fingerprint of the weights that a run starts from; None for a new model.
    given_weights: str | None = None
    # What the config of a given autoencoder says about its latents ([`~dae_diffusers.weights.STATISTICS`]).
    given_statistics: dict[str, Any] = {}

    @classmethod
    def from_diffusers(cls, vae: ModelMixin, **settings) -> "DecoupledAutoencoderMixin":
        r"""
        Makes a model with the architecture and weights of a trained autoencoder, and a fresh auxiliary decoder.

        Args:
            vae ([`~diffusers.AutoencoderKL`] or [`~diffusers.VQModel`]): A model of the class that this one extends. The statistics
                of its latents are not copied, since they may change. A codebook becomes one that is learnt by gradient. Stage 2
                fine-tunes its decoder (`auxiliary_warm_start` is False).
            settings: The arguments of this class that begin with `auxiliary_` or `decoder_`. A decoder of another size gets the weights
                whose shapes fit.

        Returns:
            A model of this class.
        """
        left_out = ("latents_mean", "latents_std", "auto_map")
        config = {name: value for name, value in vae.config.items() if name not in left_out}
        model = cls.from_config(config, **{**settings, "auxiliary_warm_start": False})
        missing = [name for name in _take_fitting(model, vae.state_dict()) if not name.startswith("auxiliary_decoder.")]
        may_differ = ("decoder.",) if settings.keys() & set(_DECODER_SIZES) else ()
        strange = [name for name in missing if not name.startswith(may_differ)] if may_differ else missing
        if strange:
            raise ValueError(f"the autoencoder does not fit its own config: {strange[:5]}.")
        if missing:
            logger.info("%s", _describe_missing(model, missing, "the autoencoder to start from"))
        return model

    def with_decoder(self, **sizes: Any) -> "DecoupledAutoencoderMixin":
        r"""
        A copy with a fresh real decoder of another size.

        Args:
            sizes: Arguments of the constructor that begin with `decoder_`.
        """
        model = type(self).from_config(self.config, **sizes)
        decoder = tuple(f"{name}." for name in self._decoder_children)
        _take_fitting(model, {name: value for name, value in self.state_dict().items() if not name.startswith(decoder)})
        return model

    def encode(self, x: torch.Tensor, *args, **kwargs):
        r"""Encodes images of the real decoder's size; see [`~dae_diffusers.autoencoder_dae_asymmetric.shrunk`]."""
        return super().encode(shrunk(x, self.config), *args, **kwargs)

    @property
    def decoder_sizes(self) -> dict[str, Any]:
        r"""The size of the real decoder where it is no mirror of the encoder, as arguments of the constructor; None: as the encoder."""
        sizes = {name: self.config[name] for name in _DECODER_SIZES}
        if sizes["decoder_norm_num_groups"] is None:  # runs of before have no such setting
            del sizes["decoder_norm_num_groups"]
        return {name: list(value) if isinstance(value, tuple) else value for name, value in sizes.items()}

    @property
    def is_asymmetric(self) -> bool:
        r"""Whether the real decoder has a size of its own."""
        return any(value is not None for value in self.decoder_sizes.values())

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

    def start_decoder_from_auxiliary(self) -> str:
        r"""
        Copies the auxiliary decoder's weights into the real decoder, to start stage 2 warm: all of them, or those whose shapes fit
        a real decoder of another size.

        Returns:
            `str`: What was copied, as a sentence without a full stop.

        Raises:
            ValueError: If there is no auxiliary decoder of that kind, or the real one is already trained.
        """
        if not self.can_start_warm:
            raise ValueError(
                "The real decoder can start only from an auxiliary decoder of the kind same, dropout or prefix "
                "(`auxiliary_decoder_type`), and with `auxiliary_warm_start`; this model has "
                f"{self.config.auxiliary_decoder_type!r} and {self.config.auxiliary_warm_start}."
            )
        left = _take_fitting(self, self.auxiliary_decoder.state_dict())
        decoder = tuple(f"{name}." for name in self._decoder_children)
        missing = [name for name in left if name.startswith(decoder)]
        return (
            _describe_missing(self, missing, "the auxiliary one")
            if missing
            else "the decoder starts from the auxiliary one"
        )

    def to_diffusers(self) -> ModelMixin:
        r"""
        Makes the plain diffusers model to publish: same encoder, same real decoder, same config, no auxiliary decoder.

        Returns:
            [`~diffusers.ModelMixin`]: A copy, in eval mode, on the same device, in the same dtype. It is of the parent class, or, with
            a decoder of another size than the encoder's mirror, of [`~dae_diffusers.DAEAsymmetricAutoencoderKL`] or
            [`~dae_diffusers.DAEAsymmetricVQModel`], whose code is saved beside the weights.
        """
        own = self._own_config if self.is_asymmetric else (*self._own_config, *_DECODER_SIZES)
        config = {name: value for name, value in self.config.items() if not name.startswith(own)}
        config.pop("_use_default_values", None)  # diffusers would forget those that were set since
        for name in ("latents_mean", "latents_std"):  # a VQModel takes note of them, but warns of their absence
            if config.get(name) is None:
                config.pop(name, None)
        plain_class = self._asymmetric_class if self.is_asymmetric else self._diffusers_class
        plain = plain_class.from_config(config).to(self.device)
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


def _take_fitting(model: torch.nn.Module, weights: dict[str, torch.Tensor]) -> list[str]:
    """Loads the weights whose name and shape the model has, and returns the names of the others in the model."""
    own = model.state_dict()
    fitting = {name: value for name, value in weights.items() if name in own and own[name].shape == value.shape}
    model.load_state_dict(fitting, strict=False)
    return [name for name in own if name not in fitting]


def _describe_missing(model: DecoupledAutoencoderMixin, missing: list[str], source: str) -> str:
    children = tuple(f"{name}." for name in model._decoder_children)
    total = sum(name.startswith(children) for name in model.state_dict())
    return (
        f"the decoder takes {total - len(missing)} of its {total} tensors from {source}; the others, such as {missing[0]}, have no "
        "counterpart of their shape and start at random"
    )
