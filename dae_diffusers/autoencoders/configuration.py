"""The flags of `training/train_dae.py` that describe the autoencoder, its stages, its losses and its regularisation."""

import math
from dataclasses import dataclass
from typing import Any, Literal

from dae_diffusers.alignment import LatentAlignmentSettings
from dae_diffusers.autoencoders.adversary import AdversarialSettings
from dae_diffusers.autoencoders.quantizers import QuantizerType, check_quantizer
from dae_diffusers.autoencoders.weak_decoders import AuxiliaryDecoderType, check_auxiliary_decoder
from dae_diffusers.cli import field
from dae_diffusers.errors import ConfigError
from dae_diffusers.losses.adversarial import AdversarialLossType


@dataclass
class AutoencoderConfig:
    """Autoencoder."""

    autoencoder: Literal["kl", "vq"] = field("kl", "kl: Gaussian latents; vq: a codebook, see its flags")
    block_out_channels: list[int] = field(
        [32, 64, 64], "channels at each resolution; each entry after the first halves"
    )
    layers_per_block: int = field(1, "residual blocks at each resolution of the encoder; the decoder has one more")
    latent_channels: int = field(4, "channels of the latents; with a codebook, the dimension of the codes")
    norm_num_groups: int = field(8, "groups of the group normalisation")
    mid_block_add_attention: bool = field(False, "attention at the lowest resolution")

    def __post_init__(self):
        for name in ("layers_per_block", "latent_channels", "norm_num_groups"):
            if getattr(self, name) < 1:
                raise ConfigError(f"`--{name}` is {getattr(self, name)}, but must be at least 1.")
        bad = [width for width in self.block_out_channels if width < 1 or width % self.norm_num_groups]
        if bad:
            raise ConfigError(
                f"`--block_out_channels` {self.block_out_channels} must all be multiples of `--norm_num_groups` "
                f"{self.norm_num_groups}; {bad} are not."
            )


@dataclass
class CodebookConfig:
    """Codebook (`--autoencoder vq`)."""

    quantizer: QuantizerType = field(
        "ema", "ema: moving averages; vq: learnt by gradient; fsq: a fixed grid (finite scalar quantisation)"
    )
    codebook_size: int = field(1024, "number of codes (`ema`, `vq`)")
    l2_normalize_codes: bool = field(True, "codes of norm 1 (`ema`, `vq`)")
    codebook_ema_decay: float = field(0.99, "decay of the moving averages, per step (`ema`)")
    codebook_warmup_steps: int = field(100, "steps without quantisation, before k-means sets the codes (`ema`)")
    dead_code_threshold: float = field(
        0.03, "replace codes that occur less often than this share of the mean; 0: none (`ema`)"
    )
    fsq_levels: list[int] = field([], "steps of each channel, such as 8 5 5 5; instead of size and dimension (`fsq`)")
    commitment_weight: float = field(0.25, "weight of the latents' squared distance to their codes (stage 1)")
    entropy_weight: float = field(0.0, "weight of the term that asks for sure and evenly used codes (stage 1)")

    def __post_init__(self):
        for name in ("commitment_weight", "entropy_weight"):
            if getattr(self, name) < 0:
                raise ConfigError(f"`--{name}` is {getattr(self, name)}, but must be 0 or more.")
        if (self.quantizer == "fsq") != bool(self.fsq_levels):
            raise ConfigError("`--quantizer fsq` and `--fsq_levels` (such as 8 5 5 5) go together.")
        size = self.quantizer_size(latent_channels=1)
        try:
            check_quantizer(
                self.quantizer, size["num_vq_embeddings"], size["latent_channels"], **self.quantizer_settings()
            )
        except ValueError as error:
            raise ConfigError(str(error)) from None

    def quantizer_size(self, latent_channels: int) -> dict[str, int]:
        """Number and dimension of the codes, as constructor's arguments."""
        if self.quantizer == "fsq":
            return {"num_vq_embeddings": math.prod(self.fsq_levels), "latent_channels": len(self.fsq_levels)}
        return {"num_vq_embeddings": self.codebook_size, "latent_channels": latent_channels}

    def quantizer_settings(self) -> dict[str, Any]:
        """How the quantiser works, besides its type, as `CodebookQuantizer` names it."""
        return {
            "l2_normalize": self.l2_normalize_codes and self.quantizer != "fsq",
            "ema_decay": self.codebook_ema_decay,
            "warmup_steps": self.codebook_warmup_steps,
            "dead_code_threshold": self.dead_code_threshold,
            "fsq_levels": tuple(self.fsq_levels) or None,
        }


@dataclass
class StageConfig:
    """Stages."""

    stage: Literal["all", "1", "2"] = field("all", "both stages, only the first, or only the second")
    pretrained_model_name_or_path: str | None = field(
        None, "for `--stage 2`: the output folder of a stage 1, or its `stage1` folder"
    )
    pretrained_vae: str | None = field(
        None,
        "start from this diffusers `AutoencoderKL`, or `VQModel` with `--autoencoder vq` (Hub id or folder), instead of fresh "
        "weights; its architecture replaces the flags. Stage 1 trains its encoder on against a fresh auxiliary decoder, "
        "stage 2 its decoder",
    )
    auxiliary_decoder: AuxiliaryDecoderType = field(
        "dropout",
        "what makes the decoder of stage 1 weak; `same`: nothing (the control); `none`: joint training in one stage of "
        "`stage1_steps + stage2_steps` steps (the baseline)",
    )
    auxiliary_dropout: float = field(0.1, "channel dropout rate of `dropout`")
    auxiliary_channel_multiplier: float = field(0.25, "relative width of `narrow`")
    auxiliary_layers_per_block: int = field(
        0, "residual blocks per resolution of `shallow`, less one; below `layers_per_block`"
    )
    stage1_steps: int = field(4000, "optimiser steps of stage 1")
    stage2_steps: int = field(
        2000, "optimiser steps of stage 2; each costs about seven tenths of one of joint training"
    )
    warm_start_decoder: bool = field(
        True,
        "start stage 2 from the auxiliary decoder's weights instead of afresh, where it has the real one's shape (`same` and "
        "`dropout`) and no decoder came with `--pretrained_vae`",
    )
    stage2_cache_gib: float = field(
        4.0,
        "stage 2 encodes every image once, into a cache below the output folder, if that saves work and the cache stays below "
        "this many GiB; 0: never",
    )

    def __post_init__(self):
        if self.stage2_cache_gib < 0:
            raise ConfigError(f"`--stage2_cache_gib` is {self.stage2_cache_gib}, but must be 0 or more.")
        try:
            check_auxiliary_decoder(
                self.auxiliary_decoder,
                self.auxiliary_dropout,
                self.auxiliary_channel_multiplier,
                self.auxiliary_layers_per_block,
            )
        except ValueError as error:
            raise ConfigError(str(error)) from None
        for name in ("stage1_steps", "stage2_steps"):
            if getattr(self, name) < 1:
                raise ConfigError(f"`--{name}` is {getattr(self, name)}, but must be at least 1.")
        if self.stage != "all" and self.auxiliary_decoder == "none":
            raise ConfigError("`--auxiliary_decoder none` has only one stage: use `--stage all`.")
        sources = [
            name for name in ("pretrained_model_name_or_path", "pretrained_vae") if getattr(self, name) is not None
        ]
        if len(sources) == 2:
            raise ConfigError("give one of `--pretrained_model_name_or_path` and `--pretrained_vae`, not both.")
        if self.stage == "2" and not sources:
            raise ConfigError(
                "`--stage 2` needs an encoder: `--pretrained_model_name_or_path <output_dir of stage 1>`, or "
                "`--pretrained_vae` to fit the decoder of a published autoencoder to your images."
            )
        if self.stage != "2" and self.pretrained_model_name_or_path is not None:
            raise ConfigError(
                "`--pretrained_model_name_or_path` is for `--stage 2`. To train on from a whole autoencoder use "
                "`--pretrained_vae`."
            )

    def trains_final_decoder(self, stage: int) -> bool:
        """Whether the decoder of this stage is the one that is published."""
        return stage == 2 or self.auxiliary_decoder == "none"

    def auxiliary_settings(self) -> dict[str, Any]:
        """The arguments of an autoencoder's constructor that give the auxiliary decoder its shape."""
        return {
            "auxiliary_decoder_type": self.auxiliary_decoder,
            "auxiliary_dropout": self.auxiliary_dropout,
            "auxiliary_channel_multiplier": self.auxiliary_channel_multiplier,
            "auxiliary_layers_per_block": self.auxiliary_layers_per_block,
        }

    def stage_steps(self) -> dict[int, int]:
        """Optimiser steps of each stage that this run has."""
        if self.auxiliary_decoder == "none":
            return {1: self.stage1_steps + self.stage2_steps}
        both = {1: self.stage1_steps, 2: self.stage2_steps}
        return both if self.stage == "all" else {int(self.stage): both[int(self.stage)]}


@dataclass
class LossConfig:
    """Losses."""

    l1_weight: float = field(1.0, "weight of the mean absolute error")
    mse_weight: float = field(1.0, "weight of the mean squared error")
    kl_weight: float = field(1e-4, "weight of the KL divergence per latent element (stage 1)")
    perceptual_model: str | None = field(
        None,
        "features of the perceptual loss: a vision model on the Hub or in a folder, or `lpips`; default: no such loss",
    )
    perceptual_weight: float = field(1.0, "weight of the perceptual loss, if there is one, for the real decoder")
    stage1_perceptual_weight: float | None = field(None, "the same in stage 1; default: the same weight")
    adversarial_weight: float = field(0.0, "weight of the adversarial loss for the real decoder; 0: none")
    stage1_adversarial_weight: float = field(0.0, "the same in stage 1")
    adversarial_loss: AdversarialLossType = field("hinge", "kind of adversarial loss")
    discriminator_model: str | None = field(
        None, "a frozen vision model (Hub id or folder) under the discriminator; default: a PatchGAN"
    )
    discriminator_channels: int = field(64, "width of the discriminator, a multiple of 8")
    discriminator_layers: int = field(3, "strided layers of the PatchGAN; 3 see 70x70 pixels")
    discriminator_learning_rate: float = field(2e-4, "constant learning rate of the discriminator")
    discriminator_start: int = field(0, "step of the stage at which the discriminator begins to learn")
    adversarial_start: int = field(0, "step of the stage at which the decoder begins to feel it")
    adversarial_ramp_steps: int = field(0, "steps over which the adversarial weight then rises")
    adaptive_weight_cap: float = field(
        100.0,
        "upper bound of the adaptive weight, which balances gradients at the decoder's last layer; 0: not adaptive",
    )
    diffaug: bool = field(True, "show the discriminator augmented images")

    def __post_init__(self):
        for name in (
            "l1_weight", "mse_weight", "kl_weight", "perceptual_weight", "stage1_perceptual_weight", "adversarial_weight",
            "stage1_adversarial_weight", "discriminator_start", "adversarial_start", "adversarial_ramp_steps",
            "adaptive_weight_cap",
        ):  # fmt: skip
            if getattr(self, name) is not None and getattr(self, name) < 0:
                raise ConfigError(f"`--{name}` is {getattr(self, name)}, but must be 0 or more.")
        if self.l1_weight == self.mse_weight == 0:
            raise ConfigError("`--l1_weight` and `--mse_weight` are both 0: nothing would be reconstructed.")
        if self.discriminator_channels < 8 or self.discriminator_channels % 8:
            raise ConfigError(
                f"`--discriminator_channels` is {self.discriminator_channels}, but must be a multiple of 8."
            )
        if self.discriminator_layers < 1:
            raise ConfigError(f"`--discriminator_layers` is {self.discriminator_layers}, but must be at least 1.")
        if not self.discriminator_learning_rate > 0:
            raise ConfigError(
                f"`--discriminator_learning_rate` is {self.discriminator_learning_rate}, but must be above 0."
            )
        if self.discriminator_start > self.adversarial_start:
            raise ConfigError(
                f"`--adversarial_start` {self.adversarial_start} lies before `--discriminator_start` "
                f"{self.discriminator_start}: the decoder would feel a discriminator that has learnt nothing."
            )

    def perceptual_weight_of(self, final_decoder: bool) -> float:
        """Of a stage; 0 without a perceptual model."""
        if self.perceptual_model is None:
            return 0.0
        if final_decoder or self.stage1_perceptual_weight is None:
            return self.perceptual_weight
        return self.stage1_perceptual_weight

    def adversarial_settings_of(self, final_decoder: bool) -> AdversarialSettings | None:
        """Of a stage; None where it has no adversarial loss."""
        weight = self.adversarial_weight if final_decoder else self.stage1_adversarial_weight
        if weight == 0:
            return None
        return AdversarialSettings(
            weight,
            self.adversarial_loss,
            self.discriminator_start,
            self.adversarial_start,
            self.adversarial_ramp_steps,
            self.adaptive_weight_cap,
            self.diffaug,
        )


@dataclass
class RegularizationConfig:
    """Regularisation of the latents (other ways to hinder the decoder, freely combined)."""

    mask_ratio: float = field(0.0, "stage 1: share of the input's patches that the encoder does not see")
    mask_patch_size: int = field(4, "side of these patches in pixels")
    latent_denoising: float = field(0.0, "stage 1: scale of the noise that latents are interpolated with (l-DeTok)")
    equivariance: float = field(0.0, "stage 1: share of batches that are turned and scaled in latent space (EQ-VAE)")
    noise_tau: float = field(0.0, "stage 2: scale of the noise on the real decoder's input")
    vf_model: str | None = field(
        None, "stage 1: align latents with the features of this vision model (Hub id or folder), the VF loss of VA-VAE"
    )
    vf_weight: float = field(0.1, "weight of the VF loss")
    vf_cosine_margin: float = field(0.5, "VF loss: cosine distance between latents and features that is free")
    vf_distance_margin: float = field(0.25, "VF loss: difference between their cosines of two positions that is free")
    vf_adaptive_weight_cap: float = field(
        100.0,
        "VF loss: upper bound of the adaptive weight, which balances gradients at the encoder's last layer; 0: not adaptive",
    )

    def __post_init__(self):
        if not 0 <= self.mask_ratio < 1:
            raise ConfigError(f"`--mask_ratio` is {self.mask_ratio}, but must be at least 0 and below 1.")
        if self.mask_patch_size < 1:
            raise ConfigError(f"`--mask_patch_size` is {self.mask_patch_size}, but must be at least 1.")
        if not 0 <= self.equivariance <= 1:
            raise ConfigError(f"`--equivariance` is {self.equivariance}, but must lie between 0 and 1.")
        for name in ("latent_denoising", "noise_tau", "vf_adaptive_weight_cap"):
            if getattr(self, name) < 0:
                raise ConfigError(f"`--{name}` is {getattr(self, name)}, but must be 0 or more.")
        if not self.vf_weight > 0:
            raise ConfigError(
                f"`--vf_weight` is {self.vf_weight}, but must be above 0; leave out `--vf_model` instead."
            )
        for name in ("vf_cosine_margin", "vf_distance_margin"):
            if not 0 <= getattr(self, name) < 2:
                raise ConfigError(f"`--{name}` is {getattr(self, name)}, but must be at least 0 and below 2.")

    def perturbations(self) -> dict[str, Any]:
        """As [`~dae_diffusers.losses.regularizers.perturb`] takes them."""
        names = ("mask_ratio", "mask_patch_size", "latent_denoising", "equivariance", "noise_tau")
        return {name: getattr(self, name) for name in names}

    def latent_alignment_settings(self) -> LatentAlignmentSettings:
        """Of the VF loss."""
        return LatentAlignmentSettings(
            self.vf_weight, self.vf_cosine_margin, self.vf_distance_margin, self.vf_adaptive_weight_cap
        )
