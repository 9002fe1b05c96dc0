"""
The settings of each training script, composed of parts, and the checks of what must fit together. Needs no torch, so that a wrong
flag is reported before anything heavy is loaded.
"""

import math
import os
from typing import Any, Literal

from dae_diffusers.autoencoders.loss_settings import LossConfig
from dae_diffusers.autoencoders.settings import (
    AutoencoderConfig,
    CodebookConfig,
    GeneratedConfig,
    RegularizationConfig,
    StageConfig,
    check_decoder_widths,
    check_shallow,
)
from dae_diffusers.complexity.settings import ComplexityConfig
from dae_diffusers.data.configuration import DataConfig
from dae_diffusers.engine.post_hoc_ema.settings import MAX_LENGTH, PostHocEMAConfig
from dae_diffusers.engine.settings import MAX_SEED, OptimizationConfig, RunConfig
from dae_diffusers.errors import ConfigError, UserError, in_full
from dae_diffusers.hub.names import check_repo_id
from dae_diffusers.hub.settings import HubConfig
from dae_diffusers.metrics.settings import ANY_CHANNELS, JUDGES_WITHOUT_NETWORK, EvaluationConfig, SamplingConfig
from dae_diffusers.search.settings import SearchConfig
from dae_diffusers.settings import field, flat, part, settings
from dae_diffusers.sizes import nearest_multiples

# Left open until the trained autoencoder has been read.
_OF_THE_AUTOENCODER = {"resolution": None, "image_channels": None}

# Blocks of each named size; a test compares them with the transformer's.
DIT_LAYERS = {"DiT-Ti": 6, "DiT-XS": 8, "DiT-S": 12, "DiT-B": 12, "DiT-L": 24, "DiT-XL": 28}
DEFAULT_MODEL = "DiT-S/2"

# Of the images that `equivariance` shrinks; a test compares it with the transforms that are drawn.
SMALLEST_SCALE = 0.25
# Pixels of a side that the four poolings of LPIPS (VGG) need.
_LPIPS_SIDE = 16


@settings
class TrainDAEConfig:
    """Settings of train_dae.py."""

    RECIPES = "dae"

    data: DataConfig = part(**_OF_THE_AUTOENCODER)
    autoencoder: AutoencoderConfig = part()
    codebook: CodebookConfig = part()
    stages: StageConfig = part()
    generated: GeneratedConfig = part()
    losses: LossConfig = part()
    regularization: RegularizationConfig = part()
    optimization: OptimizationConfig = part()
    run: RunConfig = part()
    hub: HubConfig = part()

    def __post_init__(self):
        data, autoencoder, codebook, stages, losses = (
            self.data, self.autoencoder, self.codebook, self.stages, self.losses
        )  # fmt: skip
        data.require_source()
        start = autoencoder.pretrained_model_name_or_path
        if stages.stage == "3":
            self._check_stage3()
        if start is not None and stages.stage1_dir is not None:
            raise ConfigError("give one of `pretrained_model_name_or_path` and `stage1_dir`, not both.")
        if stages.stage == "2" and start is None and stages.stage1_dir is None:
            raise ConfigError(
                "`stage 2` needs an encoder: `stage1_dir <output_dir of stage 1>`, or `pretrained_model_name_or_path` to fine-tune "
                "the decoder of a published autoencoder."
            )
        self._check_without_effect()
        if autoencoder.decoder == "x2" and stages.stage != "2":
            raise ConfigError(
                f"`decoder x2` goes with `stage 2` only, not with `stage {stages.stage}`: it makes larger images of the latents of a "
                "finished encoder (`stage1_dir` or `pretrained_model_name_or_path`)."
            )
        factor = autoencoder.spatial_factor
        is_new = start is None and stages.stage1_dir is None and stages.pipeline is None
        if is_new:
            data.settle()
            data.settle_buckets(2 * factor)
        given = {"resolution": data.size, "aspect_buckets": data.aspect_buckets} if is_new else {}
        for name, sides in given.items():
            for side in sides:
                if side % factor:
                    raise ConfigError(
                        f"`{name}` {side} is not divisible by {factor}, the factor of an autoencoder with "
                        f"{len(autoencoder.block_out_channels)} resolutions. {nearest_multiples(side, factor)}"
                    )
        if is_new:
            try:
                if stages.auxiliary_decoder == "shallow":
                    check_shallow(stages.auxiliary_layers_per_block, autoencoder.layers_per_block)
                widths = tuple(autoencoder.decoder_block_out_channels)
                check_decoder_widths(widths, autoencoder.block_out_channels, autoencoder.norm_num_groups)
            except ValueError as error:
                raise ConfigError(str(error)) from None
        models = {
            "perceptual_model": losses.perceptual_model,
            "discriminator_model": losses.discriminator_model,
            "vf_model": self.regularization.vf_model,
            "feature_model": stages.feature_model,
        }
        for name, model in models.items():
            if model is not None:
                data.require_gray_or_rgb(f"`{name}`")
        self.check_mixed_precision(self.optimization.mixed_precision)
        smallest = 3 * 2**losses.discriminator_layers
        too_small = data.resolution is not None and min(map(min, data.shapes)) < smallest
        if self.has_discriminator and losses.discriminator_model is None and too_small:
            raise ConfigError(
                f"a discriminator of {losses.discriminator_layers} layers needs images of at least {smallest} pixels; "
                f"`resolution` is {data.resolution}. Lower `discriminator_layers`."
            )
        self.check_lpips(factor if is_new else None)
        is_final = stages.trains_final_decoder(1)
        judges_stage1 = stages.stage in ("all", "1") and losses.adversarial_weight_of(is_final) > 0
        if judges_stage1 and self.regularization.equivariance > 0 and losses.discriminator_model is None:
            raise ConfigError(
                "`equivariance` shrinks images below what the PatchGAN judges: use it with `discriminator_model`, or "
                f"without `{'adversarial_weight' if is_final else 'stage1_adversarial_weight'}`."
            )
        trains_codebook = autoencoder.autoencoder == "vq" and stages.stage in ("all", "1")
        if trains_codebook and start is not None and codebook.quantizer != "vq":
            raise ConfigError(
                f"`quantizer {codebook.quantizer}` makes its own codebook. With `pretrained_model_name_or_path` use "
                "`quantizer vq`, which fine-tunes the given codebook, or `stage 2`, which keeps it."
            )
        if trains_codebook and codebook.quantizer == "ema" and self.optimization.num_train_epochs is None:
            self.check_warmup(stages.stage_steps())

    @property
    def has_discriminator(self) -> bool:
        """Whether any stage has one."""
        fits_adversarially = self.stages.stage == "3" and self.generated.generated_loss == "adversarial"
        return self.losses.has_adversarial_loss or (fits_adversarially and self.generated.generated_weight > 0)

    def known(self) -> dict[str, Any]:
        """What flags may need and no single flag says: the stages of this run."""
        return {"stage": list(self.stages.stage_steps())}

    def _check_without_effect(self) -> None:
        """Raises `ConfigError` for flags that would change nothing although they were given."""
        codebook, defaults = self.codebook, CodebookConfig()
        starts_anew = self.autoencoder.pretrained_model_name_or_path is None and self.stages.stage1_dir is None
        changed = [name for name, value in vars(codebook).items() if value != getattr(defaults, name)]
        if changed and self.autoencoder.autoencoder == "kl" and starts_anew and self.stages.stage != "3":
            raise ConfigError(f"`{changed[0]}` needs a codebook. Add `autoencoder vq`, or leave it out.")
        of_stage1 = ("stage1_adversarial_weight", "stage1_perceptual_weight")
        given = [name for name in of_stage1 if getattr(self.losses, name)]
        if given and self.stages.auxiliary_decoder == "none" and self.stages.stage == "all":
            other = given[0].removeprefix("stage1_")
            raise ConfigError(f"`{given[0]}` is for the auxiliary decoder, but joint training has none. Use `{other}`.")

    def _check_stage3(self) -> None:
        if self.run.dry_run:
            raise ConfigError(
                "`dry_run` does not go with `stage 3`, which first draws a pool. Its log says how long the steps take."
            )
        if self.autoencoder.has_own_decoder:
            raise ConfigError(
                "`stage 3` trains the decoder of `pipeline`, whose size is fixed: leave out `decoder`, `decoder_block_out_channels` and "
                "`decoder_layers_per_block`. `stage 2` makes another decoder, and `dae-diffusers assemble` puts it into the pipeline."
            )
        start, steps = self.losses.adversarial_start, self.stages.stage3_steps
        if self.generated.generated_loss == "adversarial" and start >= steps:
            raise ConfigError(
                f"`generated_loss adversarial` would begin at `adversarial_start` {start}, after all `stage3_steps` {steps}. Give less, such "
                "as `adversarial_start 0`."
            )
        self.data.require_one_shape("`stage 3`")
        self.data.refuse_streaming("`stage 3`, which measures the training images first")
        if self.hub.push_to_hub and self.hub.hub_strategy == "every_save":
            raise ConfigError(
                "`hub_strategy every_save` does not go with `stage 3`, which has a pipeline only at its end; use `end`."
            )

    def check_mixed_precision(self, mixed_precision: str | None) -> None:
        """Checks the precision of the flag, or the one that `accelerate` makes of it."""
        accumulates = self.optimization.gradient_accumulation_steps > 1
        if mixed_precision == "fp16" and accumulates and self.has_discriminator:
            raise ConfigError(
                "an adversarial loss with `gradient_accumulation_steps` needs `mixed_precision bf16` or no, not fp16: "
                "the two models share one loss scale, which may change between the micro-batches of a step."
            )

    def check_lpips(self, factor: int | None) -> None:
        """Checks that the images that LPIPS compares are large enough, also those that `equivariance` shrinks once the factor is known."""
        stages, losses = self.stages, self.losses
        compared = [n for n in stages.stage_steps() if losses.perceptual_weight_of(stages.trains_final_decoder(n)) > 0]
        if losses.perceptual_model != "lpips" or not compared or self.data.resolution is None:
            return
        side = min(map(min, self.data.shapes))
        other = "Use a vision model instead, such as facebook/convnext-tiny-224"
        if side < _LPIPS_SIDE:
            raise ConfigError(
                f"`perceptual_model lpips` needs images of at least {_LPIPS_SIDE} pixels, but a side has {side}. {other}, or larger images."
            )
        if factor is None or 1 not in compared or self.regularization.equivariance == 0:
            return
        shrunk = factor * max(1, round(SMALLEST_SCALE * (side // factor)))
        if shrunk < _LPIPS_SIDE:
            raise ConfigError(
                f"`equivariance` shrinks images of {side} pixels to {shrunk}, but `perceptual_model lpips` needs {_LPIPS_SIDE}. {other}, "
                "or leave out `equivariance`."
            )

    def check_warmup(self, stage_steps: dict[int, int]) -> None:
        """Checks a codebook's warm-up once the length of stage 1 is known."""
        if self.codebook.codebook_warmup_steps >= stage_steps.get(1, math.inf):
            raise ConfigError(
                f"`codebook_warmup_steps` is {self.codebook.codebook_warmup_steps}, but must be below the "
                f"{stage_steps[1]} steps of stage 1, or nothing is ever quantised."
            )


@settings
class TransformerConfig:
    """Transformer."""

    vae: str = field(help="folder or Hub id of the autoencoder")
    latent_cache: str | None = field(None, "folder written by cache_latents.py, to read latents instead of images")
    pretrained_model_name_or_path: str | None = field(
        None, "start from the weights of this pipeline or transformer (Hub id or folder); classes and size may differ"
    )
    model: str | None = field(
        None,
        "size (DiT-Ti, -XS, -S, -B, -L or -XL) and patch size (/1, /2, /4); default: DiT-S/2, or that of pretrained weights",
    )
    patch_size: int | None = field(None, "patch size; default: that of `--model`", at_least=1, advanced=True)
    num_layers: int | None = field(None, "transformer blocks; default: those of `--model`", at_least=1, advanced=True)
    num_attention_heads: int | None = field(
        None, "attention heads of each block; default: those of `--model`", at_least=1, advanced=True
    )
    attention_head_dim: int | None = field(
        None, "width of a head; default: that of `--model`", at_least=1, advanced=True
    )
    text_encoder: str | None = field(None, "generate from captions: a text encoder of transformers (Hub id or folder)")
    text_encoder_dtype: Literal["float32", "float16", "bfloat16"] = field(
        "float32", "data type of the text encoder and of its hidden states", needs="text_encoder", advanced=True
    )
    class_dropout_prob: float = field(
        0.1,
        "share of samples without label, caption and conditions, for guidance; with captions and others, the same share without one of them",
        at_least=0,
        below=1,
        hint="for a model without classes, use `label_column none`",
    )
    max_train_steps: int = field(10000, "optimiser steps", at_least=1)

    def __post_init__(self):
        size, _, patch = self.size.partition("/")
        if size not in DIT_LAYERS or not patch.isdecimal() or int(patch) == 0:
            raise ConfigError(
                f"`model` is {self.model!r}, but must be one of {', '.join(DIT_LAYERS)}, a slash and a patch size, such as `DiT-S/2`."
            )
        if self.attention_head_dim is not None and self.attention_head_dim % 4:
            raise ConfigError(
                f"`attention_head_dim` is {self.attention_head_dim}, but must be a multiple of 4 (rotary positions)."
            )

    def check_captions(self, data: DataConfig) -> None:
        """Raises `ConfigError` unless captions and what encodes them are both given, with images that have them, or neither."""
        given = {"caption_column": data.caption_column, "text_encoder": self.text_encoder}
        missing = [name for name, value in given.items() if value is None]
        if len(missing) == 1:
            (other,) = given.keys() - missing
            raise ConfigError(
                f"`{other}` needs `{missing[0]}`: a transformer generates from captions that a text encoder has encoded. Give both or neither."
            )
        if not missing:
            data.require_images("`caption_column`")

    @property
    def size(self) -> str:
        """The named size of a new transformer."""
        return DEFAULT_MODEL if self.model is None else self.model

    @property
    def depth(self) -> int | None:
        """Number of blocks; None if it is that of pretrained weights."""
        is_given = self.pretrained_model_name_or_path is not None and self.model is None
        return self.num_layers or (None if is_given else DIT_LAYERS[self.size.partition("/")[0]])

    def instead_of_named(self) -> dict[str, int]:
        """The arguments of the transformer's constructor that replace those of the named size."""
        names = ("patch_size", "num_layers", "num_attention_heads", "attention_head_dim")
        return {name: getattr(self, name) for name in names if getattr(self, name) is not None}


@settings
class FlowMatchingConfig:
    """Flow matching and samples."""

    timestep_sampling: Literal["logit_normal", "uniform"] = field(
        "logit_normal", "distribution of the noise levels in training", advanced=True
    )
    timestep_shift: float | None = field(
        None,
        "above 1: more noise, in training and in sampling; for latents that hold more numbers than the images; default: 1, or that of pretrained weights",
        above=0,
        advanced=True,
    )
    num_sample_images: int = field(40, "images of the sample grid at each validation", at_least=1, advanced=True)
    validation_prompts: list[str] = field(
        [],
        "texts that the grid shows, a row for each; default: captions of held-out images",
        needs="text_encoder",
        advanced=True,
        free_text=True,
    )
    sample_steps: int | None = field(
        None,
        "denoising steps of the grid, and later of the pipeline by default; default: 25, or 4 after distillation",
        at_least=1,
        advanced=True,
    )
    sample_guidance_scale: float = field(
        2.0,
        "guidance scale of the grid, and later of the pipeline by default; 1 turns it off; unused with `--class_dropout_prob 0`",
        needs="class_dropout_prob or autoguidance_steps",
        advanced=True,
    )
    autoguidance_steps: int | None = field(
        None,
        "keep the weights after N steps, about a third of all, in the pipeline: guidance leads away from these weaker ones, also "
        "without classes and texts",
        at_least=1,
    )
    distill_guidance_scale: float | None = field(
        None,
        "distill the pretrained transformer into one that samples in 2 to 8 steps, with this guidance scale in it; 1 turns guidance off",
        at_least=1,
        advanced=True,
    )

    @property
    def num_sample_steps(self) -> int:
        """Denoising steps of a drawn image."""
        return self.sample_steps or (25 if self.distill_guidance_scale is None else 4)


@settings
class MonitorConfig:
    """Distance while training."""

    metric_features: str | None = field(
        None, "while training, measure the distance of samples in these features (as `evaluate --features`)"
    )
    metric_images: int = field(2000, "samples for each measurement", at_least=2, needs="metric_features", advanced=True)
    metric_steps: int = field(
        2000, "measure every N steps, and at the end", at_least=1, needs="metric_features", advanced=True
    )
    export: Literal["last", "best"] = field(
        "last",
        "weights of the pipeline: the last, or those with the smallest distance, without `--metric_features` the lowest validation loss",
        advanced=True,
    )
    early_stopping_patience: int | None = field(
        None,
        "stop after N measurements in a row, without `--metric_features` N validations, that bring nothing better",
        at_least=1,
        advanced=True,
    )

    @property
    def looks_for_best(self) -> bool:
        return self.export == "best" or self.early_stopping_patience is not None

    def check_decoder(self, is_finished: bool) -> None:
        """Checks that distances of different steps are those of the same decoder."""
        if self.metric_features is not None and not is_finished:
            raise ConfigError(
                "`metric_features` does not go with the `vae` of a stage 1: its decoder still changes, and the distances with it. Leave "
                "it out, or finish stage 2 first."
            )


def check_monitor(monitor: MonitorConfig, data: DataConfig) -> None:
    """Raises `ConfigError` if the images that samples would be compared with are not at hand."""
    if monitor.metric_features is None:
        return
    data.require_images("`metric_features`")
    data.refuse_streaming("`metric_features`: evaluate afterwards, with `dae-diffusers evaluate`")
    if monitor.metric_features not in JUDGES_WITHOUT_NETWORK:
        data.require_gray_or_rgb("`metric_features`", ANY_CHANNELS)


def check_conditions(data: DataConfig) -> None:
    """Raises `ConfigError` if the columns that images are drawn from are not at hand."""
    for name, value in data.condition_columns().items():
        if value:
            data.require_images(f"`{name}`")


@settings
class RepresentationAlignmentConfig:
    """Representation alignment (REPA)."""

    repa_model: str | None = field(
        None, "align hidden states with the features of this vision model (Hub id or folder); needs the images"
    )
    repa_weight: float = field(
        0.5,
        "weight of the alignment",
        above=0,
        hint="leave out `repa_model` instead",
        needs="repa_model",
        advanced=True,
    )
    repa_layer: int | None = field(
        None,
        "number of the block whose output is aligned; default: a third of the depth",
        needs="repa_model",
        advanced=True,
    )
    repa_projector_dim: int = field(
        2048, "width of the projector, which is not exported", at_least=1, needs="repa_model", advanced=True
    )


@settings
class TrainDiTConfig:
    """Settings of train_dit.py."""

    RECIPES = "dit"

    data: DataConfig = part(**_OF_THE_AUTOENCODER)
    transformer: TransformerConfig = part()
    flow: FlowMatchingConfig = part()
    alignment: RepresentationAlignmentConfig = part()
    monitor: MonitorConfig = part()
    optimization: OptimizationConfig = part(learning_rate=3e-4)
    post_hoc: PostHocEMAConfig = part()
    run: RunConfig = part()
    hub: HubConfig = part()

    def __post_init__(self):
        data, has_cache = self.data, self.transformer.latent_cache is not None
        if not has_cache:
            data.require_source()
        else:
            data.refuse_streaming("`latent_cache`; leave one of them out")
        check_monitor(self.monitor, data)
        self.transformer.check_captions(data)
        check_conditions(data)
        if self.flow.validation_prompts:
            if self.transformer.text_encoder is None:
                raise ConfigError("`validation_prompts` needs `text_encoder`: without it nothing is drawn from texts.")
            data.refuse_conditions("`validation_prompts`: each row of the grid needs its conditions too")
        if has_cache and data.has_source:
            data.refuse_random_views(
                "`latent_cache`: they give other images than those in it. Leave these flags or the cache out"
            )
        self._check_distillation()
        layer, num_layers = self.alignment.repa_layer, self.transformer.depth
        if None not in (layer, num_layers) and not 1 <= layer <= num_layers:
            raise ConfigError(f"`repa_layer` is {layer}, but the transformer has blocks 1 to {num_layers}.")
        if self.alignment.repa_model is None:
            return
        data.require_images("`repa_model`")
        data.require_gray_or_rgb("`repa_model`")

    def _check_distillation(self) -> None:
        if self.flow.distill_guidance_scale is None:
            return
        if self.flow.autoguidance_steps is not None:
            raise ConfigError(
                "`autoguidance_steps` does not go with `distill_guidance_scale`: a distilled transformer has its guidance in it. Leave one out."
            )
        if self.transformer.pretrained_model_name_or_path is None:
            raise ConfigError(
                "`distill_guidance_scale` needs a finished transformer to distill: give its pipeline as `pretrained_model_name_or_path`."
            )
        if self.flow.timestep_sampling != "logit_normal":
            raise ConfigError(
                f"`timestep_sampling {self.flow.timestep_sampling}` does not go with `distill_guidance_scale`, which draws noise levels "
                "of its own. Leave one out."
            )
        if self.alignment.repa_model is not None:
            raise ConfigError(
                "`repa_model` does not go with `distill_guidance_scale`, which learns from the given transformer. Leave one out."
            )
        if self.optimization.train_batch_size < 2:
            raise ConfigError(
                "`distill_guidance_scale` needs `train_batch_size` of at least 2: half of a batch learns velocities, the other half steps."
            )


@settings
class PriorConfig:
    """Prior."""

    vae: str = field(help="folder or Hub id of an autoencoder with a codebook")
    code_cache: str | None = field(
        None, "folder for the codes, which several priors may share; default: `<output_dir>/codes`", advanced=True
    )
    num_layers: int = field(8, "transformer blocks", at_least=1)
    num_attention_heads: int = field(4, "attention heads of each block", at_least=1)
    attention_head_dim: int = field(64, "width of a head; the model is as wide as its heads together", at_least=2)
    attention_dropout: float = field(0.0, "dropout of the attention weights", at_least=0, below=1, advanced=True)
    class_dropout_prob: float = field(
        0.1,
        "share of samples whose label is dropped, for guidance",
        at_least=0,
        below=1,
        hint="for a model without classes, use `label_column none`",
    )
    max_train_steps: int = field(10000, "optimiser steps", at_least=1)

    def __post_init__(self):
        if self.attention_head_dim % 2:
            raise ConfigError(
                f"`attention_head_dim` is {self.attention_head_dim}, but must be even (rotary positions)."
            )


@settings
class PriorSamplesConfig:
    """Samples."""

    num_sample_images: int = field(40, "images of the sample grid at each validation", at_least=1, advanced=True)
    sample_guidance_scale: float = field(
        2.0,
        "guidance scale of the grid; 1 turns it off; unused with `--class_dropout_prob 0`",
        needs="class_dropout_prob",
        advanced=True,
    )
    sample_temperature: float = field(1.0, "temperature of the grid", above=0, advanced=True)
    sample_top_k: int | None = field(
        None, "sample the grid only from the N most likely codes", at_least=1, advanced=True
    )
    sample_top_p: float | None = field(
        None,
        "sample the grid only from the most likely codes that have this probability together",
        above=0,
        at_most=1,
        advanced=True,
    )


@settings
class TrainPriorConfig:
    """Settings of train_vqgan_prior.py."""

    RECIPES = "vqgan_prior"

    data: DataConfig = part(**_OF_THE_AUTOENCODER)
    prior: PriorConfig = part()
    samples: PriorSamplesConfig = part()
    monitor: MonitorConfig = part()
    optimization: OptimizationConfig = part(adam_weight_decay=0.05)
    post_hoc: PostHocEMAConfig = part()
    run: RunConfig = part()
    hub: HubConfig = part()

    def __post_init__(self):
        self.data.require_source()
        self.data.refuse_random_views("images that are encoded once: each epoch would see the same views")
        self.data.require_one_shape("train_vqgan_prior.py")
        self.data.refuse_streaming("train_vqgan_prior.py, which encodes every image once")
        if self.data.caption_column is not None:
            raise ConfigError(
                "`caption_column` does not go with train_vqgan_prior.py, which generates by class: use train_dit.py."
            )
        self.data.refuse_conditions("train_vqgan_prior.py, which generates by one class: use train_dit.py")
        check_monitor(self.monitor, self.data)


@settings
class CacheConfig:
    """Cache."""

    vae: str = field(help="folder or Hub id of the autoencoder")
    output_dir: str = field("runs/my-model/latents", "folder for the cache: `train/` and `validation/`")
    batch_size: int = field(64, "images encoded at once", at_least=1)
    dtype: Literal["float32", "float16", "bfloat16"] = field("float16", "data type of the stored latents")
    shard_size: int = field(8192, "images in a file of the cache", at_least=1, advanced=True)
    seed: int = field(
        0,
        "chooses the held-out images if there is no validation split; use the seed of the training",
        at_least=0,
        at_most=MAX_SEED,
    )


@settings
class CacheLatentsConfig:
    """Settings of cache_latents.py."""

    data: DataConfig = part(**_OF_THE_AUTOENCODER)
    cache: CacheConfig = part()

    def __post_init__(self):
        self.data.require_source()
        self.data.refuse_random_views("a cache: each epoch would see the same views")
        self.data.refuse_streaming("a cache: train_dit.py encodes the images as they come")


@settings
class EvaluateConfig:
    """Settings of evaluate.py."""

    data: DataConfig = part(**_OF_THE_AUTOENCODER)
    evaluation: EvaluationConfig = part()
    sampling: SamplingConfig = part()

    def __post_init__(self):
        for features in [self.evaluation.features, *(self.evaluation.more_features or [])]:
            check_measured_data(self.data, features, "evaluate.py, which counts every image once")
        if self.sampling.set_defaults and self.evaluation.pipeline is None:
            raise ConfigError("`set_defaults` needs the `pipeline` that gets them.")


@settings
class LatentSpaceConfig:
    """Latent space."""

    vae: str = field(help="folder or Hub id of the autoencoder")
    features: str | None = field(
        None,
        "`inception`, a vision model (Hub id or folder), `pixels` or `spectrum`, for gFD; default: only the pilots' loss is measured",
    )
    output_dir: str = field("runs/my-model/complexity", "folder for the results")
    seed: int = field(0, "chooses the held-out images; use the seed of the training", at_least=0, at_most=MAX_SEED)


@settings
class MeasureComplexityConfig:
    """Settings of complexity.py."""

    data: DataConfig = part(**_OF_THE_AUTOENCODER)
    latent_space: LatentSpaceConfig = part()
    complexity: ComplexityConfig = part()

    def __post_init__(self):
        check_measured_data(self.data, self.latent_space.features, "complexity.py, which chooses images")
        refuse_all_but_classes(self.data, "complexity.py, whose pilots know classes only")
        self.data.refuse_random_views("pilots, whose latents are cached")


@settings
class FindLatentsConfig:
    """Settings of find_latents.py."""

    data: DataConfig = part()
    search: SearchConfig = part()

    def __post_init__(self):
        check_measured_data(self.data, self.search.features, "find_latents.py, which chooses images")
        if self.search.features not in JUDGES_WITHOUT_NETWORK:
            self.data.require_gray_or_rgb("a judge with a network", ANY_CHANNELS)
        refuse_all_but_classes(self.data, "find_latents.py, whose pilots know classes only")
        self.data.refuse_random_views("pilots, whose latents are cached")


def refuse_all_but_classes(data: DataConfig, reason: str) -> None:
    """Raises `ConfigError` for images with captions or conditions. The reason begins with what does not go with them."""
    data.refuse_conditions(reason)
    if data.caption_column is not None:
        raise ConfigError(f"`caption_column` cannot be used with {reason}.")


def check_measured_data(data: DataConfig, features: str | None, script: str) -> None:
    """Raises `ConfigError` for images that `script` cannot measure."""
    data.require_source()
    data.require_one_shape(script)
    data.refuse_streaming(f"{script}; leave it out")
    if features not in (None, *JUDGES_WITHOUT_NETWORK):
        data.require_gray_or_rgb("`features`", ANY_CHANNELS)


@settings
class ClassifierConfig:
    """Classifier."""

    hidden_sizes: list[int] = field(
        [32, 64, 128, 192], "channels of each stage; each after the first halves the size", at_least=1
    )
    depths: list[int] = field([1, 1, 1, 1], "basic blocks of each stage", at_least=1)
    input_size: int | None = field(
        None, "enlarge images to this size, because the stem divides it by 4; default: twice the resolution", at_least=1
    )

    def __post_init__(self):
        if len(self.hidden_sizes) != len(self.depths) or not self.depths:
            raise ConfigError(
                f"`hidden_sizes` {self.hidden_sizes} and `depths` {self.depths} must have the same length, at least 1."
            )


@settings
class ClassifierTrainingConfig:
    """Training."""

    output_dir: str = field("features/my-images", "folder of the result; its name becomes the name of the features")
    train_steps: int = field(3200, "optimiser steps", at_least=1)
    train_batch_size: int = field(64, "images per step and process", at_least=1)
    learning_rate: float = field(2e-3, "peak learning rate of AdamW, after a tenth of the steps; cosine to 0", above=0)
    weight_decay: float = field(0.05, "AdamW's weight decay", at_least=0)
    label_smoothing: float = field(0.0, "share of the target spread over all classes", at_least=0, below=1)
    max_shift: int = field(2, "shift images randomly by up to this many pixels; the border is mirrored", at_least=0)
    mixed_precision: Literal["no", "fp16", "bf16"] = field("no", "precision of the computation; weights stay float32")
    seed: int = field(0, "random seed of weights, data order and augmentation", at_least=0, at_most=MAX_SEED)


@settings
class TrainClassifierConfig:
    """Settings of train_classifier.py."""

    data: DataConfig = part(max_validation_samples=10000)
    classifier: ClassifierConfig = part()
    training: ClassifierTrainingConfig = part()

    def __post_init__(self):
        self.data.require_source()
        self.data.require_one_shape("this script")
        self.data.refuse_streaming("this script; leave it out")
        refuse_all_but_classes(self.data, "train_classifier.py, which learns classes only")
        self.data.require_gray_or_rgb("a classifier")
        if self.training.max_shift >= min(self.data.size):
            raise ConfigError(
                f"`max_shift` is {self.training.max_shift}, but must be 0 or more and below `resolution`."
            )


@settings
class PreviewOutputConfig:
    """Preview."""

    output_dir: str = field("runs/my-model/preview", "folder for the picture and the table")
    num_images: int = field(6, "pictures of each class", at_least=1, at_most=40)
    seed: int = field(0, "chooses the held-out images; use the seed of the training", at_least=0, at_most=MAX_SEED)
    vae: str | None = field(None, "autoencoder that the resolution is taken from if none is given, as in training")


@settings
class PreviewConfig:
    """Settings of preview.py. It takes the flags and recipes of the training scripts, and needs those of the images only."""

    PASSES_OVER = (TrainDAEConfig, TrainDiTConfig, TrainPriorConfig)

    data: DataConfig = part(**_OF_THE_AUTOENCODER)
    preview: PreviewOutputConfig = part()

    def __post_init__(self):
        self.data.require_source()


@settings
class AssembleConfig:
    """Assembling."""

    pipeline: str = field(help="folder of the pipeline, or the output folder that holds it")
    vae: str = field(help="folder or Hub id of the autoencoder with the decoder")
    output_dir: str | None = field(
        None,
        "the result goes into `pipeline/` of this folder; default: the pipeline's decoder is replaced, and the autoencoder before "
        "stays beside the pipeline in `vae_before_assemble`",
    )


@settings
class LengthsConfig:
    """Averages of the weights."""

    folder: str = field(help="output folder of a training with `--post_hoc_ema` (also the first word)")
    length: list[float] = field(
        help="one or more lengths: the width of the average as a share of the training, such as 0.05 0.1 0.15",
        above=0,
        at_most=MAX_LENGTH,
    )
    output_dir: str | None = field(None, "folder for the pipelines and the table; default: `ema/` in the run's")
    features: str | None = field(
        None,
        "`inception`, a vision model (Hub id or folder), `pixels` or `spectrum`, to compare the lengths by gFD; default: nothing is measured",
    )
    batch_size: int = field(64, "images at once in each process; does not change the results", at_least=1)
    seed: int = field(
        0,
        "seed of noise, labels and held-out images; use the seed of the training",
        at_least=0,
        at_most=MAX_SEED,
    )
    mixed_precision: Literal["no", "fp16", "bf16"] | None = field(None, "autocast while sampling; default: no")


@settings
class EMAConfig:
    """Settings of ema.py."""

    LEADING = "FOLDER "

    lengths: LengthsConfig = part()
    data: DataConfig = part(**_OF_THE_AUTOENCODER)
    sampling: SamplingConfig = part()

    def __post_init__(self):
        if self.lengths.features is not None:
            check_measured_data(self.data, self.lengths.features, "ema.py, which counts every image once")
        elif self.sampling.set_defaults:
            raise ConfigError("`set_defaults` needs a distance to choose by: give `features`.")


@settings
class PushConfig:
    """Publishing."""

    LEADING = "FOLDER USER/NAME "

    folder: str = field(help="output folder of a training run, or a pipeline's folder (also the first word)")
    repo_id: str = field(help="`user/name` on the Hub (also the second word)")
    license: str | None = field(
        None,
        "license of the weights, as the Hub names it, such as cc-by-4.0; default: that of the card on the Hub, else the answer "
        "to a question in the terminal, else none",
    )
    private: bool = field(False, "make a new repository private, and refuse one that is public")
    revision: str | None = field(None, "branch, created if missing; default: main")
    create_pr: bool = field(False, "open a pull request instead of writing to the branch")
    fp16: bool = field(False, 'add half-precision weights, for `variant="fp16"`')
    data_pictures: bool = field(
        False,
        "also publish pictures that show your data set: held-out images, training images nearest to samples, captions",
    )
    no_data_pictures: bool = field(
        False, "leave these pictures out; the default, unless all data sets are public or you agree in the terminal"
    )
    keep_card: bool = field(False, "do not change the README.md of the repository")
    stage1: bool = field(False, "also upload the autoencoder of stage 1, to the branch `stage1`")
    space: bool = field(False, "also make a Space, an app in which others can try the model")
    space_id: str | None = field(None, "`user/name` of the Space; default: that of the model", needs="space")
    export_dir: str | None = field(
        None, "write everything into this folder and upload nothing; the Space in `space/`, stage 1 in `stage1/`"
    )

    def __post_init__(self):
        check_repo_id(self.repo_id)
        if self.space_id is not None:
            check_repo_id(self.space_id, "space_id")
        if self.data_pictures and self.no_data_pictures:
            raise ConfigError("`data_pictures` and `no_data_pictures` do not go together; leave one out.")
        if self.space and (self.revision is not None or self.create_pr):
            raise ConfigError(
                "`space` makes an app of the model on the branch `main`, so it does not go with `revision` or `create_pr`; push the "
                "Space when the model is on `main`."
            )
        if self.stage1 and (self.revision is not None or self.create_pr):
            raise ConfigError(
                "`stage1` uploads to the branch `stage1`, of the model on `main`, so it does not go with `revision` or `create_pr`; leave it "
                "out."
            )
        if self.export_dir is not None and "/" not in self.repo_id:
            raise ConfigError(f"`export_dir` needs the full `user/name` for the card, but got {self.repo_id!r}.")
        if self.export_dir is not None and (self.revision is not None or self.create_pr):
            raise ConfigError(
                "`export_dir` uploads nothing, so it does not go with `revision` or `create_pr`; leave them out."
            )


SCRIPTS = {
    "assemble": AssembleConfig,
    "cache-latents": CacheLatentsConfig,
    "complexity": MeasureComplexityConfig,
    "ema": EMAConfig,
    "evaluate": EvaluateConfig,
    "preview": PreviewConfig,
    "find-latents": FindLatentsConfig,
    "push": PushConfig,
    "train-classifier": TrainClassifierConfig,
    "train-dae": TrainDAEConfig,
    "train-dit": TrainDiTConfig,
    "train-vqgan-prior": TrainPriorConfig,
}

# Settings that name a folder or something on the Hub, which has one slash at most.
_PLACES = (
    "vae", "pipeline", "latent_cache", "stage1_dir", "pretrained_model_name_or_path", "published_vae", "text_encoder", "features", "more_features",
    "metric_features", "feature_model", "perceptual_model", "discriminator_model", "vf_model", "repa_model",
)  # fmt: skip
# What begins so is no name on the Hub: the scripts write into `runs/` by default.
_PATHS = (".", "/", "runs/")


def check_paths(config: Any) -> None:
    """Raises `UserError` for a folder of images, or a path of a model, that does not exist."""
    values = flat(config)
    folder = values.get("train_data_dir")
    if folder is not None and not os.path.isdir(folder):
        raise UserError(f"`train_data_dir` {folder} is not a folder. Give a folder of images{in_full(folder)}.")
    # The checkpoint of a resumed run holds what came from pretrained weights.
    is_resumed = values.get("resume_from_checkpoint") is not None
    for name in _PLACES:
        given = None if is_resumed and name == "pretrained_model_name_or_path" else values.get(name)
        for place in given if isinstance(given, list) else filter(None, [given]):
            is_path = place.count("/") > 1 or place.startswith(_PATHS)
            if is_path and not os.path.exists(place):
                raise UserError(
                    f"`{name}` {place} does not exist. Give the folder that an earlier step has written, or a Hub id{in_full(place)}."
                )


# Flags that words may stand for, if they come first.
_LEADING = {"ema": ("--folder",), "push": ("--folder", "--repo_id")}


def with_flags(script: str, argv: list[str]) -> list[str]:
    """The flags of a script; words that may lead those of `push` and `ema` become flags."""
    words = []
    for flag in _LEADING.get(script, ()):
        if argv and not argv[0].startswith("--"):
            words += [flag, argv[0]]
            argv = argv[1:]
    return [*words, *argv]
