"""Autoencoders of other classes of diffusers whose decoder is trained on, while the encoder stays as it is."""

import inspect
from collections.abc import Callable

import torch
from diffusers import AsymmetricAutoencoderKL, AutoencoderDC, AutoencoderTiny, ModelMixin
from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution

from dae_diffusers.autoencoders.decoupled import DecoupledAutoencoderMixin
from dae_diffusers.autoencoders.loading import encode_moments


class TunedDecoderMixin(DecoupledAutoencoderMixin):
    r"""Stage 2 alone, for a class without an auxiliary decoder. The result is of the class that was given."""

    _latent_children = ("encoder", "quant_conv")
    auxiliary_decoder = None
    can_start_warm = False
    decoder_sizes: dict = {}

    @classmethod
    def from_diffusers(cls, vae: ModelMixin, **settings) -> "TunedDecoderMixin":
        r"""A copy of a trained autoencoder that can be set to stage 2."""
        return _copied(vae, cls)

    def to_diffusers(self) -> ModelMixin:
        r"""A copy as the class of diffusers, in eval mode, on the same device."""
        return _copied(self, self._diffusers_class).to(self.device).eval()

    @property
    def last_layer(self) -> torch.nn.Parameter:
        return _last_convolution(self.decoder)

    @property
    def encoder_last_layer(self) -> torch.nn.Parameter:
        return _last_convolution(self.encoder)

    def set_stage(self, stage: int | None) -> None:
        super().set_stage(stage)
        if hasattr(self.decoder, "condition_encoder"):  # for inpainting; unused here
            self.decoder.condition_encoder.requires_grad_(False)

    def train(self, mode: bool = True):
        r"""
        As in [`DecoupledAutoencoderMixin`], and batch normalisation keeps the statistics that it came with: those of a batch would make
        the decoder another one than in use, and depend on how many images a process sees at once.
        """
        super().train(mode)
        for module in self.modules():
            if isinstance(module, torch.nn.modules.batchnorm._BatchNorm):
                module.eval()
        return self

    def forward(
        self,
        sample: torch.Tensor,
        sample_posterior: bool = False,
        return_dict: bool = True,
        perturb_latents: Callable[[torch.Tensor], torch.Tensor] | None = None,
        moments: tuple[torch.Tensor, torch.Tensor] | None = None,
    ) -> tuple[torch.Tensor, DiagonalGaussianDistribution]:
        r"""
        Images `(B, C, H, W)` in [-1, 1] to reconstructions and the distribution of their latents, which is as good as a point for an
        encoder without one. The arguments are those of [`~dae_diffusers.DAEAutoencoderKL`].
        """
        with torch.no_grad():
            mean, std = encode_moments(self, sample) if moments is None else moments
            posterior = DiagonalGaussianDistribution(torch.cat([mean, 2 * std.log()], dim=1))
            latents = posterior.sample() if sample_posterior else posterior.mode()
        if perturb_latents is not None:
            latents = perturb_latents(latents)
        return self.decode_in_stage(latents), posterior


class TunedAutoencoderTiny(TunedDecoderMixin, AutoencoderTiny):
    _diffusers_class = AutoencoderTiny


class TunedAsymmetricAutoencoderKL(TunedDecoderMixin, AsymmetricAutoencoderKL):
    _diffusers_class = AsymmetricAutoencoderKL


class TunedAutoencoderDC(TunedDecoderMixin, AutoencoderDC):
    _diffusers_class = AutoencoderDC


TUNED = {
    each._diffusers_class: each for each in (TunedAutoencoderTiny, TunedAsymmetricAutoencoderKL, TunedAutoencoderDC)
}


def _copied(model: ModelMixin, target: type[ModelMixin]) -> ModelMixin:
    known = inspect.signature(target.__init__).parameters
    copy = target.from_config({name: value for name, value in model.config.items() if name in known})
    copy.load_state_dict(model.state_dict())
    # AutoencoderTiny and AutoencoderDC take none.
    if "sample_size" in model.config and "sample_size" not in known:
        copy.register_to_config(sample_size=model.config.sample_size)
    return copy


def _last_convolution(module: torch.nn.Module) -> torch.nn.Parameter:
    return [parameter for parameter in module.parameters() if parameter.ndim == 4][-1]
