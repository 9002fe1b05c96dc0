"""
The settings of each training script, composed of parts, and the checks of what must fit together. Needs no torch, so that a wrong
flag is reported before anything heavy is loaded.
"""

import math
import os
from typing import Any

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
from dae_diffusers.complexity.settings import ComplexityConfig, LatentSpaceConfig
from dae_diffusers.data.configuration import DataConfig
from dae_diffusers.engine.post_hoc_ema.settings import LengthsConfig, PostHocEMAConfig
from dae_diffusers.engine.settings import MAX_SEED, OptimizationConfig, RunConfig
from dae_diffusers.errors import ConfigError, UserError, in_full
from dae_diffusers.generators.settings import (
    FlowMatchingConfig,
    PriorConfig,
    PriorSamplesConfig,
    RepresentationAlignmentConfig,
    TransformerConfig,
    check_conditions,
)
from dae_diffusers.hub.settings import HubConfig, PushConfig
from dae_diffusers.latents.settings import CacheConfig
from dae_diffusers.metrics.settings import (
    ANY_CHANNELS,
    JUDGES_WITHOUT_NETWORK,
    ClassifierConfig,
    ClassifierTrainingConfig,
    EvaluationConfig,
    MonitorConfig,
    OneSettingConfig,
    ReconstructionMonitorConfig,
    SampleFolderConfig,
    SamplingConfig,
    check_channels,
    check_monitor,
)
from dae_diffusers.search.settings import SearchConfig
from dae_diffusers.settings import field, flat, part, settings
from dae_diffusers.sizes import nearest_multiples

# Left open until the trained autoencoder has been read.
_OF_THE_AUTOENCODER = {"resolution": None, "image_channels": None}

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
    monitor: ReconstructionMonitorConfig = part()
    optimization: OptimizationConfig = part()
    run: RunConfig = part()
    hub: HubConfig = part()

    def __post_init__(self):
        self.data.require_source()
        if self.stages.stage == "3":
            self._check_stage3()
        self._check_start()
        self._check_without_effect()
        self._check_sides()
        self._check_vision_models()
        self.check_mixed_precision(self.optimization.mixed_precision)
        self._check_discriminator()
        self._check_monitor()
        self.check_lpips(self.autoencoder.spatial_factor if self._is_new else None)
        self._check_codebook()

    @property
    def _is_new(self) -> bool:
        """Whether the autoencoder begins with random weights."""
        stages = self.stages
        return self.autoencoder.pretrained_model_name_or_path is stages.stage1_dir is stages.pipeline is None

    def _check_start(self) -> None:
        start, stages = self.autoencoder.pretrained_model_name_or_path, self.stages
        if start is not None and stages.stage1_dir is not None:
            raise ConfigError("give one of `pretrained_model_name_or_path` and `stage1_dir`, not both.")
        if stages.stage == "2" and start is None and stages.stage1_dir is None:
            raise ConfigError(
                "`stage 2` needs an encoder: `stage1_dir <output_dir of stage 1>`, or `pretrained_model_name_or_path` to fine-tune "
                "the decoder of a published autoencoder."
            )
        if self.autoencoder.decoder == "x2" and stages.stage != "2":
            raise ConfigError(
                f"`decoder x2` goes with `stage 2` only, not with `stage {stages.stage}`: it makes larger images of the latents of a "
                "finished encoder (`stage1_dir` or `pretrained_model_name_or_path`)."
            )

    def _check_sides(self) -> None:
        """Settles the images of a new autoencoder, and checks that it can take them and be built."""
        if not self._is_new:
            return
        data, autoencoder, factor = self.data, self.autoencoder, self.autoencoder.spatial_factor
        data.settle()
        data.settle_buckets(2 * factor)
        for name, sides in {"resolution": data.size, "aspect_buckets": data.aspect_buckets}.items():
            for side in sides:
                if side % factor:
                    raise ConfigError(
                        f"`{name}` {side} is not divisible by {factor}, the factor of an autoencoder with "
                        f"{len(autoencoder.block_out_channels)} resolutions. {nearest_multiples(side, factor)}"
                    )
        try:
            if self.stages.auxiliary_decoder == "shallow":
                check_shallow(self.stages.auxiliary_layers_per_block, autoencoder.layers_per_block)
            widths = tuple(autoencoder.decoder_block_out_channels)
            check_decoder_widths(widths, autoencoder.block_out_channels, autoencoder.norm_num_groups)
        except ValueError as error:
            raise ConfigError(str(error)) from None

    def _check_vision_models(self) -> None:
        models = {
            "perceptual_model": self.losses.perceptual_model,
            "discriminator_model": self.losses.discriminator_model,
            "vf_model": self.regularization.vf_model,
            "feature_model": self.stages.feature_model,
        }
        for name, model in models.items():
            if model is not None:
                self.data.require_pictures(f"`{name}`")

    def _check_discriminator(self) -> None:
        data, losses, stages = self.data, self.losses, self.stages
        if losses.discriminator_model is not None:
            return
        smallest = 3 * 2**losses.discriminator_layers
        too_small = data.resolution is not None and min(map(min, data.shapes)) < smallest
        if self.has_discriminator and too_small:
            raise ConfigError(
                f"a discriminator of {losses.discriminator_layers} layers needs images of at least {smallest} pixels; "
                f"`resolution` is {data.resolution}. Lower `discriminator_layers`."
            )
        is_final = stages.trains_final_decoder(1)
        judges_stage1 = stages.stage in ("all", "1") and losses.adversarial_weight_of(is_final) > 0
        if judges_stage1 and self.regularization.equivariance > 0:
            raise ConfigError(
                "`equivariance` shrinks images below what the PatchGAN judges: use it with `discriminator_model`, or "
                f"without `{'adversarial_weight' if is_final else 'stage1_adversarial_weight'}`."
            )

    def _check_monitor(self) -> None:
        check_channels(self.monitor, self.data)
        flag = "export best" if self.monitor.export == "best" else "early_stopping_patience"
        if self.monitor.looks_for_best and self.stages.stage == "1":
            raise ConfigError(
                f"`{flag}` does not go with `stage 1`: reconstructions of the auxiliary decoder, which is not kept, do not tell which "
                "encoder is best. Leave it out, and give it to stage 2."
            )
        if self.monitor.looks_for_best and self.stages.stage == "3":
            raise ConfigError(
                f"`{flag}` does not go with `stage 3`, which gives up a little of the reconstructions for better samples. Leave it out."
            )
        if self.monitor.metric_features is not None and self.monitor.metric_features == self.stages.feature_model:
            raise ConfigError(
                f"`metric_features` {self.monitor.metric_features} is also the `feature_model` that the decoder is fitted in, which cannot "
                "judge it. Choose another."
            )

    def _check_codebook(self) -> None:
        codebook, stages, start = self.codebook, self.stages, self.autoencoder.pretrained_model_name_or_path
        if self.autoencoder.autoencoder != "vq" or stages.stage not in ("all", "1"):
            return
        if start is not None and codebook.quantizer != "vq":
            raise ConfigError(
                f"`quantizer {codebook.quantizer}` makes its own codebook. With `pretrained_model_name_or_path` use "
                "`quantizer vq`, which fine-tunes the given codebook, or `stage 2`, which keeps it."
            )
        if codebook.quantizer == "ema" and self.optimization.num_train_epochs is None:
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
                f"`generated_loss adversarial` would begin at `adversarial_start` {start}, after all `stage3_steps` {steps}. Give "
                "less, such as `adversarial_start 0`."
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
        data.require_pictures("`repa_model`")

    def _check_distillation(self) -> None:
        if self.flow.distill_guidance_scale is None:
            return
        if self.flow.autoguidance_steps is not None:
            raise ConfigError(
                "`autoguidance_steps` does not go with `distill_guidance_scale`: a distilled transformer has its guidance in it. "
                "Leave one out."
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
        if self.evaluation.clip_model is not None:
            self.data.require_pictures("`clip_model`")
        if self.sampling.set_defaults and self.evaluation.pipeline is None:
            raise ConfigError("`set_defaults` needs the `pipeline` that gets them.")


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
            self.data.require_pictures("a judge with a network", ANY_CHANNELS)
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
        data.require_pictures("`features`", ANY_CHANNELS)


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
        self.data.require_pictures("a classifier")
        if self.training.max_shift >= min(self.data.size):
            raise ConfigError(
                f"`max_shift` is {self.training.max_shift}, but must be 0 or more and below `resolution`."
            )


@settings
class PreviewOutputConfig:
    """Preview."""

    output_dir: str = field("runs/my-model/preview", "folder for the picture and the table")
    num_images: int = field(6, "pictures of each class", at_least=1, at_most=40)
    num_compared: int = field(
        20_000, "look for copies among at most N training images, a fixed random choice; 0: look for none", at_least=0
    )
    seed: int = field(0, "chooses which pictures are shown, and how they are augmented", at_least=0, at_most=MAX_SEED)
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
class CompareConfig:
    """Comparison."""

    LEADING = "RUN RUN ... "

    runs: list[str] = field(
        help="output folders of trainings or of `evaluate` (also the first words); one alone is summed up"
    )
    output_dir: str = field("compare", "folder for the tables and the pictures")


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
class SampleConfig:
    """Settings of sample.py."""

    LEADING = "PIPELINE "

    samples: SampleFolderConfig = part()
    options: OneSettingConfig = part()


SCRIPTS = {
    "assemble": AssembleConfig,
    "cache-latents": CacheLatentsConfig,
    "compare": CompareConfig,
    "complexity": MeasureComplexityConfig,
    "ema": EMAConfig,
    "evaluate": EvaluateConfig,
    "preview": PreviewConfig,
    "find-latents": FindLatentsConfig,
    "push": PushConfig,
    "sample": SampleConfig,
    "train-classifier": TrainClassifierConfig,
    "train-dae": TrainDAEConfig,
    "train-dit": TrainDiTConfig,
    "train-vqgan-prior": TrainPriorConfig,
}

# Settings that name a folder or something on the Hub, which has one slash at most.
_PLACES = (
    "vae", "pipeline", "latent_cache", "stage1_dir", "pretrained_model_name_or_path", "published_vae", "text_encoder", "features",
    "more_features", "metric_features", "feature_model", "perceptual_model", "discriminator_model", "vf_model", "repa_model",
    "samples_dir", "clip_model",
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
_LEADING = {"ema": ("--folder",), "push": ("--folder", "--repo_id"), "sample": ("--pipeline",)}


def with_flags(script: str, argv: list[str]) -> list[str]:
    """The flags of a script; words that may lead those of `compare`, `ema`, `push` and `sample` become flags."""
    words = []
    if script == "compare" and argv and not argv[0].startswith("--"):
        return ["--runs", *argv]  # any number of words
    for flag in _LEADING.get(script, ()):
        if argv and not argv[0].startswith("--"):
            words += [flag, argv[0]]
            argv = argv[1:]
    return [*words, *argv]
