"""Settings of an autoencoder: its size, its codebook, its stages and the regularisation of its latents. Needs no torch."""

import math
from collections.abc import Sequence
from typing import Any, Literal, get_args

from dae_diffusers.errors import ConfigError
from dae_diffusers.settings import field, settings

AuxiliaryDecoderType = Literal["none", "same", "narrow", "shallow", "dropout", "prefix", "linear"]
QuantizerType = Literal["vq", "ema", "fsq"]

# What makes a kind of auxiliary decoder weaker or stronger.
_STRENGTHS = {
    "dropout": "auxiliary_dropout",
    "narrow": "auxiliary_channel_multiplier",
    "shallow": "auxiliary_layers_per_block",
}
_MADE = "stage 1 or stage 2"  # stage 3 takes the autoencoder of its pipeline
_OF_CODES = f"{_MADE} and quantizer ema or quantizer vq"  # the codes of fsq are a grid


@settings
class AutoencoderConfig:
    """Autoencoder."""

    autoencoder: Literal["kl", "vq"] = field("kl", "kl: Gaussian latents; vq: a codebook", needs=_MADE)
    pretrained_model_name_or_path: str | None = field(None, "start from this autoencoder (Hub id or folder)")
    block_out_channels: list[int] = field(
        [32, 64, 64], "channels per resolution; each after the first halves it", at_least=1, needs=_MADE
    )
    layers_per_block: int = field(
        1,
        "residual blocks at each resolution of the encoder; the decoder has one more",
        at_least=1,
        advanced=True,
        needs=_MADE,
    )
    decoder_block_out_channels: list[int] = field(
        [],
        "channels per resolution of the real decoder, if it is to be larger or smaller than the encoder's mirror; stage 1 stays the "
        "same; default: `--block_out_channels`",
        at_least=1,
        advanced=True,
        needs=_MADE,
    )
    decoder_layers_per_block: int | None = field(
        None,
        "residual blocks at each resolution of the real decoder, minus one; default: `--layers_per_block`",
        at_least=0,
        advanced=True,
        needs=_MADE,
    )
    decoder: Literal["mirror", "small", "tiny", "x2"] = field(
        "mirror",
        "the real decoder: small has half the encoder's channels, tiny a quarter of them and as few layers as can be; x2 (with "
        "`--stage 2`) makes images of twice the sides",
        advanced=True,
        needs=_MADE,
    )
    latent_channels: int = field(4, "channels of the latents, or of the codes", at_least=1, needs=_OF_CODES)
    norm_num_groups: int = field(8, "groups of the group normalisation", at_least=1, advanced=True, needs=_MADE)
    mid_block_add_attention: bool = field(False, "attention at the lowest resolution", advanced=True, needs=_MADE)

    def __post_init__(self):
        bad = [width for width in self.block_out_channels if width % self.norm_num_groups]
        if bad:
            raise ConfigError(
                f"`block_out_channels` {self.block_out_channels} must all be multiples of `norm_num_groups` "
                f"{self.norm_num_groups}; {bad} are not."
            )
        if self.decoder != "mirror" and (self.decoder_block_out_channels or self.decoder_layers_per_block is not None):
            raise ConfigError(
                f"`decoder {self.decoder}` chooses the decoder's size: leave it out, or `decoder_block_out_channels` and "
                "`decoder_layers_per_block`."
            )

    @property
    def has_own_decoder(self) -> bool:
        """Whether flags give the real decoder a size of its own."""
        sizes = (self.decoder_block_out_channels or None, self.decoder_layers_per_block)
        return self.decoder != "mirror" or sizes != (None, None)

    def decoder_sizes(self, block_out_channels: Sequence[int], norm_num_groups: int = 1) -> dict[str, Any]:
        """
        The arguments of an autoencoder's constructor that give the real decoder a size of its own, for an encoder with these channels
        and groups; empty where none is asked for.
        """
        sizes = self._given_decoder(block_out_channels, norm_num_groups)
        names = ("decoder_block_out_channels", "decoder_layers_per_block", "decoder_norm_num_groups")
        return {**dict.fromkeys(names), **sizes} if sizes else {}

    def _given_decoder(self, block_out_channels: Sequence[int], norm_num_groups: int) -> dict[str, Any]:
        if self.decoder == "x2":
            first = block_out_channels[0]
            half = first // 2 if first // 2 % norm_num_groups == 0 else first
            return {"decoder_block_out_channels": (half, *block_out_channels)}
        if self.decoder != "mirror":
            share = {"small": 2, "tiny": 4}[self.decoder]
            widths = tuple(max(8, math.ceil(width / share / 8) * 8) for width in block_out_channels)
            # Several channels in a group: alone, a channel would lose its mean, which is the image's colour.
            groups = math.gcd(*widths) // 4
            layers = 0 if self.decoder == "tiny" else None
            return {
                "decoder_block_out_channels": widths,
                "decoder_layers_per_block": layers,
                "decoder_norm_num_groups": groups,
            }
        sizes = {
            "decoder_block_out_channels": tuple(self.decoder_block_out_channels) or None,
            "decoder_layers_per_block": self.decoder_layers_per_block,
        }
        return sizes if any(value is not None for value in sizes.values()) else {}

    @property
    def spatial_factor(self) -> int:
        r"""Pixels of the image per latent pixel, along a side."""
        return 2 ** (len(self.block_out_channels) - 1)


@settings
class CodebookConfig:
    """Codebook (`autoencoder vq`)."""

    quantizer: QuantizerType = field(
        "ema",
        "ema: moving averages; vq: learnt by gradient; fsq: a fixed grid (finite scalar quantisation)",
        advanced=True,
        needs=_MADE,
    )
    codebook_size: int = field(1024, "number of codes (`ema`, `vq`)", at_least=2, needs=_OF_CODES, advanced=True)
    l2_normalize_codes: bool = field(True, "codes of norm 1 (`ema`, `vq`)", needs=_OF_CODES, advanced=True)
    codebook_warmup_steps: int = field(
        100,
        "steps without quantisation, before k-means sets the codes (`ema`)",
        at_least=1,
        needs=f"quantizer ema and {_MADE}",
        advanced=True,
    )
    fsq_levels: list[int] = field(
        [],
        "levels of each channel, such as 8 5 5 5; they give the size and dimension (`fsq`)",
        at_least=2,
        advanced=True,
        needs=_MADE,
    )
    commitment_weight: float = field(
        0.25,
        "weight of the squared distance from latents to their codes (stage 1)",
        at_least=0,
        needs="stage 1",
        advanced=True,
    )

    def __post_init__(self):
        if (self.quantizer == "fsq") != bool(self.fsq_levels):
            raise ConfigError("`quantizer fsq` and `fsq_levels` (such as 8 5 5 5) go together.")
        size = self.quantizer_size(latent_channels=1)
        try:
            check_quantizer(
                self.quantizer, size["num_vq_embeddings"], size["latent_channels"], **self.quantizer_settings()
            )
        except ValueError as error:
            raise ConfigError(str(error)) from None

    def quantizer_size(self, latent_channels: int) -> dict[str, int]:
        """Number and dimension of the codes, as arguments of the model's constructor."""
        if self.quantizer == "fsq":
            return {"num_vq_embeddings": math.prod(self.fsq_levels), "latent_channels": len(self.fsq_levels)}
        return {"num_vq_embeddings": self.codebook_size, "latent_channels": latent_channels}

    def quantizer_settings(self) -> dict[str, Any]:
        """How the quantiser works, besides its type, as `CodebookQuantizer` names it."""
        return {
            "l2_normalize": self.l2_normalize_codes and self.quantizer != "fsq",
            "ema_decay": 0.99,
            "warmup_steps": self.codebook_warmup_steps,
            "dead_code_threshold": 0.03,
            "fsq_levels": tuple(self.fsq_levels) or None,
        }


@settings
class StageConfig:
    """Stages."""

    stage: Literal["all", "1", "2", "3"] = field("all", "all: 1 and 2; 3: fit a pipeline's decoder to its generator")
    stage1_dir: str | None = field(None, "with `--stage 2`: the output folder of a stage 1", advanced=True)
    keep_latent_channels: int | None = field(
        None,
        "with `--stage1_dir`: the latents are the first N channels of that encoder's, which `--auxiliary_decoder prefix` has trained",
        at_least=1,
        advanced=True,
    )
    pipeline: str | None = field(None, "with `--stage 3`: the pipeline, or its run (folder or Hub id)")
    feature_model: str | None = field(
        None, "with `--stage 3`: compare in this vision model's features too", needs="stage 3"
    )
    auxiliary_decoder: AuxiliaryDecoderType = field(
        "dropout",
        "decoder that trains the encoder in stage 1; none: joint training",
        needs="stage 1",
    )
    auxiliary_dropout: float = field(0.3, "`dropout`: channel dropout rate", needs="auxiliary_decoder dropout")
    auxiliary_channel_multiplier: float = field(
        0.25, "`narrow`: relative width", needs="auxiliary_decoder narrow", advanced=True
    )
    auxiliary_layers_per_block: int = field(
        0,
        "`shallow`: residual blocks per resolution, minus one; must be below `--layers_per_block`",
        needs="auxiliary_decoder shallow",
        advanced=True,
    )
    stage1_steps: int = field(4000, "optimiser steps of stage 1", at_least=1, needs="stage 1")
    stage2_steps: int = field(
        2000,
        "optimiser steps of stage 2; each takes 0.7 to 0.9 times as long as a joint step",
        at_least=1,
        needs="stage 2 or auxiliary_decoder none",
    )
    stage3_steps: int = field(1000, "optimiser steps of stage 3", at_least=1, needs="stage 3", advanced=True)
    warm_start_decoder: bool = field(
        True,
        "start stage 2 from the auxiliary decoder's weights, as far as their shapes fit, instead of random ones; not if "
        "`--pretrained_model_name_or_path` brought a trained decoder",
        needs="stage 2",
        advanced=True,
    )
    stage2_cache_gib: float = field(
        4.0,
        "stage 2 encodes every image once, into a cache in the output folder, if that saves work and the cache stays below "
        "this many GiB; 0: never",
        at_least=0,
        needs="stage 2 or stage 3",
        advanced=True,
    )

    def __post_init__(self):
        try:
            check_auxiliary_decoder(
                self.auxiliary_decoder,
                self.auxiliary_dropout,
                self.auxiliary_channel_multiplier,
                self.auxiliary_layers_per_block,
            )
        except ValueError as error:
            raise ConfigError(str(error)) from None
        if (self.stage == "3") != (self.pipeline is not None):
            raise ConfigError(
                "`stage 3` and `pipeline` go together: name the pipeline (folder or Hub id) whose decoder is to be fitted to its generator."
            )
        if self.stage in ("1", "2") and self.auxiliary_decoder == "none":
            raise ConfigError("`auxiliary_decoder none` has only one stage: use `stage all`.")
        if self.stage != "2" and self.stage1_dir is not None:
            raise ConfigError(
                "`stage1_dir` is for `stage 2`. To train on from a whole autoencoder use `pretrained_model_name_or_path`."
            )

        if self.keep_latent_channels is not None and self.stage1_dir is None:
            raise ConfigError(
                "`keep_latent_channels` needs `stage 2` and `stage1_dir`: the output folder of a stage 1 with `auxiliary_decoder prefix`."
            )

    def trains_final_decoder(self, stage: int) -> bool:
        """Whether the decoder of this stage is the one that is published."""
        return stage > 1 or self.auxiliary_decoder == "none"

    def auxiliary_settings(self) -> dict[str, Any]:
        """The arguments of an autoencoder's constructor that define the auxiliary decoder."""
        return {
            "auxiliary_decoder_type": self.auxiliary_decoder,
            "auxiliary_dropout": self.auxiliary_dropout,
            "auxiliary_channel_multiplier": self.auxiliary_channel_multiplier,
            "auxiliary_layers_per_block": self.auxiliary_layers_per_block,
        }

    def plan(self) -> dict[str, Any]:
        """What a resumed run must have in common with its checkpoint: the auxiliary decoder, and the strength that its kind has."""
        if self.stage == "2":  # it comes from stage 1, whatever the flags say
            return {"keep_latent_channels": self.keep_latent_channels}
        strength = _STRENGTHS.get(self.auxiliary_decoder)
        names = ("auxiliary_decoder", *([strength] if strength else []))
        return {name: getattr(self, name) for name in names}

    def stage_steps(self, num_steps: int | None = None) -> dict[int, int]:
        """
        Optimiser steps of each stage that this run has; of `num_steps` in all, where it is given, stage 1 gets the share that
        `stage1_steps` and `stage2_steps` give it.
        """
        if self.stage == "3":
            return {3: num_steps or self.stage3_steps}
        total = self.stage1_steps + self.stage2_steps
        if self.auxiliary_decoder == "none":
            return {1: num_steps or total}
        both = {1: self.stage1_steps, 2: self.stage2_steps}
        if num_steps is not None:
            first = max(1, round(num_steps * self.stage1_steps / total))
            both = {1: first, 2: max(1, num_steps - first)} if self.stage == "all" else dict.fromkeys(both, num_steps)
        return both if self.stage == "all" else {int(self.stage): both[int(self.stage)]}


@settings
class GeneratedConfig:
    """Stage 3."""

    generated_loss: Literal["moments", "adversarial"] = field(
        "moments",
        "moments: mean and covariance of the features; adversarial: a discriminator tells generated images from training images",
        needs="stage 3",
        advanced=True,
    )
    stage3_learning_rate: float = field(
        1e-4,
        "peak learning rate of stage 3, instead of `--learning_rate`",
        above=0,
        needs="stage 3",
        advanced=True,
    )
    generated_weight: float = field(
        1.0,
        "weight of this loss, balanced with the others at the decoder's last layer",
        at_least=0,
        needs="stage 3",
        advanced=True,
    )
    generated_batch_size: int | None = field(
        None,
        "`moments`: generated latents in a batch; default: twice `--train_batch_size`",
        at_least=1,
        needs="stage 3 and generated_loss moments",
        advanced=True,
    )
    moments_share: float = field(
        0.02,
        "share of the running moments that a step replaces",
        above=0,
        at_most=1,
        needs="stage 3 and generated_loss moments",
        advanced=True,
    )
    pool_size: int = field(
        8192, "latents that are generated once, before the first step", at_least=2, needs="stage 3", advanced=True
    )
    pool_guidance_scale: float | None = field(
        None,
        "guidance scale with which they are generated: the one that you will use; 1 turns it off; default: the pipeline's, else 1.5",
        at_least=0,
        needs="stage 3",
        advanced=True,
    )
    pool_inference_steps: int | None = field(
        None,
        "denoising steps with which they are generated; default: the pipeline's, else 25",
        at_least=1,
        needs="stage 3",
        advanced=True,
    )
    max_psnr_drop: float = field(
        2.0,
        "stop, and change nothing, if reconstructions lose more than this many dB of PSNR",
        at_least=0,
        needs="stage 3",
        advanced=True,
    )


@settings
class RegularizationConfig:
    """Regularisation of the latents."""

    mask_ratio: float = field(
        0.0,
        "stage 1: share of image patches hidden from the encoder",
        at_least=0,
        below=1,
        needs="stage 1",
        advanced=True,
    )
    latent_denoising: float = field(
        0.0,
        "stage 1: scale of the noise that latents are mixed with (l-DeTok)",
        at_least=0,
        needs="stage 1",
        advanced=True,
    )
    equivariance: float = field(
        0.0, "stage 1: share of batches that are rotated and scaled (EQ-VAE)", at_least=0, at_most=1, needs="stage 1"
    )
    noise_tau: float = field(
        0.0,
        "stages 2 and 3: scale of the noise on the real decoder's input",
        at_least=0,
        needs="stage 2 or stage 3",
        advanced=True,
    )
    vf_model: str | None = field(
        None,
        "stage 1: align latents with the features of this vision model (Hub id or folder) by the VF loss of VA-VAE",
        needs="stage 1",
        advanced=True,
    )
    vf_weight: float = field(
        0.1,
        "weight of the VF loss",
        above=0,
        hint="leave out `vf_model` instead",
        needs="vf_model",
        advanced=True,
    )
    vf_cosine_margin: float = field(
        0.5,
        "VF loss: cosine distance between latents and features that costs nothing",
        at_least=0,
        below=2,
        needs="vf_model",
        advanced=True,
    )
    vf_distance_margin: float = field(
        0.25,
        "VF loss: difference of the cosines between two positions that costs nothing",
        at_least=0,
        below=2,
        needs="vf_model",
        advanced=True,
    )
    vf_adaptive_weight_cap: float = field(
        100.0,
        "VF loss: upper bound of the adaptive weight, which balances gradients at the encoder's last layer; 0: not adaptive",
        at_least=0,
        needs="vf_model",
        advanced=True,
    )

    def perturbations(self) -> dict[str, float]:
        """The arguments of [`~dae_diffusers.losses.regularizers.perturb`]."""
        names = ("mask_ratio", "latent_denoising", "equivariance", "noise_tau")
        return {name: getattr(self, name) for name in names}


def check_auxiliary_decoder(
    decoder_type: str, dropout: float, channel_multiplier: float, auxiliary_layers_per_block: int
) -> None:
    r"""Raises `ValueError` for an unknown type of auxiliary decoder or a strength out of its range."""
    if decoder_type not in get_args(AuxiliaryDecoderType):
        raise ValueError(
            f"`auxiliary_decoder_type` is {decoder_type!r}, but must be one of {list(get_args(AuxiliaryDecoderType))}."
        )
    if not 0 <= dropout < 1:
        raise ValueError(f"`auxiliary_dropout` is {dropout}, but must be at least 0 and below 1.")
    if not 0 < channel_multiplier <= 1:
        raise ValueError(f"`auxiliary_channel_multiplier` is {channel_multiplier}, but must be above 0, at most 1.")
    if auxiliary_layers_per_block < 0:
        raise ValueError(f"`auxiliary_layers_per_block` is {auxiliary_layers_per_block}, but must be 0 or more.")


def check_shallow(auxiliary_layers_per_block: int, layers_per_block: int) -> None:
    r"""Raises `ValueError` if a `shallow` auxiliary decoder would not be shallower than the real one."""
    if auxiliary_layers_per_block >= layers_per_block:
        raise ValueError(
            f"`auxiliary_layers_per_block` of `shallow` is {auxiliary_layers_per_block}, but must be below the "
            f"`layers_per_block` of the real decoder, {layers_per_block}. The control that is as deep is `same`."
        )


def check_quantizer(
    quantizer_type: str,
    num_codes: int,
    dim: int,
    l2_normalize: bool,
    ema_decay: float,
    warmup_steps: int,
    dead_code_threshold: float,
    fsq_levels: tuple[int, ...] | None,
) -> None:
    r"""Raises `ValueError` for an unknown type of quantiser or a choice out of its range."""
    if quantizer_type not in get_args(QuantizerType):
        raise ValueError(f"`quantizer_type` is {quantizer_type!r}, but must be one of {list(get_args(QuantizerType))}.")
    if num_codes < 2:
        raise ValueError(f"the codebook has {num_codes} codes, but needs at least 2.")
    if not 0 <= ema_decay < 1:
        raise ValueError(f"the codebook's EMA decay is {ema_decay}, but must be at least 0 and below 1.")
    if warmup_steps < 1:
        raise ValueError(f"the codebook's warm-up is {warmup_steps} steps, but must be at least 1.")
    if not 0 <= dead_code_threshold < 1:
        raise ValueError(f"the threshold for dead codes is {dead_code_threshold}, but must be at least 0 and below 1.")
    if (quantizer_type == "fsq") != bool(fsq_levels):
        raise ValueError(
            f"`fsq_levels` is {fsq_levels} and `quantizer_type` is {quantizer_type!r}: give levels with 'fsq', and with nothing else."
        )
    if quantizer_type != "fsq":
        return
    if l2_normalize:
        raise ValueError("fsq has a fixed grid of codes, which cannot be normalised. Leave the normalisation out.")
    if min(fsq_levels) < 2:
        raise ValueError(f"the levels are {list(fsq_levels)}, but must all be at least 2.")
    if math.prod(fsq_levels) != num_codes or len(fsq_levels) != dim:
        raise ValueError(
            f"the levels {list(fsq_levels)} make {math.prod(fsq_levels)} codes of dimension {len(fsq_levels)}, not "
            f"{num_codes} of dimension {dim}."
        )


def check_decoder_widths(
    widths: tuple[int, ...] | None, block_out_channels: tuple[int, ...], norm_num_groups: int, more: int = 0
) -> None:
    r"""Raises `ValueError` for widths of a decoder that do not fit the encoder."""
    if not widths:
        return
    if len(widths) != len(block_out_channels) + more:
        raise ValueError(
            f"`decoder_block_out_channels` {list(widths)} must have as many widths as the encoder has resolutions: "
            f"{len(block_out_channels)}, {list(block_out_channels)}."
        )
    bad = [width for width in widths if width % norm_num_groups]
    if bad:
        raise ValueError(
            f"`decoder_block_out_channels` {list(widths)} must all be multiples of `norm_num_groups` {norm_num_groups}; {bad} are not."
        )
