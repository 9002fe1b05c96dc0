"""What is measured, during training and after it, how images are generated for that, and the judge. Needs no torch."""

from typing import Literal

from dae_diffusers.data.configuration import DataConfig
from dae_diffusers.engine.settings import MAX_SEED
from dae_diffusers.errors import ConfigError
from dae_diffusers.guidance import check_interval, intervals_of
from dae_diffusers.settings import field, settings

# Feature extractors of images with any number of channels.
JUDGES_WITHOUT_NETWORK = ("pixels", "spectrum")
ANY_CHANNELS = " The judges `pixels` and `spectrum` take any number of channels."


@settings
class EvaluationConfig:
    """What to measure."""

    vae: str | None = field(None, "folder or Hub id of an autoencoder; default: the pipeline's")
    pipeline: str | None = field(
        None,
        "folder or Hub id of a diffusers pipeline, or the output folder of its training; default: only the autoencoder is measured",
    )
    samples_dir: str | None = field(
        None,
        "a folder of images to measure instead of a pipeline's samples, such as those of another model or of `dae-diffusers sample`; "
        "the resolution is theirs by default",
    )
    features: str | None = field(
        None,
        "`inception`, a vision model (Hub id or folder), or without a network `pixels` or `spectrum`, for rFD and gFD; default: neither "
        "is measured",
    )
    more_features: list[str] | None = field(
        None,
        "further judges, which add a column with their distance: what several of different kinds see does not hang on one of them",
        needs="features",
    )
    clip_model: str | None = field(
        None,
        "a CLIP or SigLIP of transformers (Hub id or folder), such as openai/clip-vit-base-patch32: measures how well samples follow "
        "the texts that they are drawn from",
        needs="pipeline",
    )
    output_dir: str = field("runs/my-model/evaluation", "folder for the results")
    batch_size: int = field(64, "images at once in each process; does not change the results", at_least=1)
    lpips_net: Literal["alex", "vgg", "squeeze", "none"] = field(
        "alex", "network of LPIPS, which is measured if the package `lpips` is installed", advanced=True
    )
    seed: int = field(0, "seed of noise and labels", at_least=0, at_most=MAX_SEED)
    mixed_precision: Literal["no", "fp16", "bf16"] | None = field(
        None, "autocast while sampling; default: no", needs="pipeline"
    )

    def __post_init__(self):
        if self.samples_dir is not None and (self.vae is not None or self.pipeline is not None):
            raise ConfigError("`samples_dir` takes the place of `pipeline` and `vae`: leave these out.")
        if self.vae is None and self.pipeline is None and self.samples_dir is None:
            raise ConfigError("give `vae` or `pipeline` (or both), or `samples_dir`: there is nothing to evaluate.")
        for name in ("pipeline", "samples_dir"):
            if getattr(self, name) is not None and self.features is None:
                raise ConfigError(f"`{name}` needs `features`, such as `inception` or facebook/dinov2-base.")
        if self.more_features and self.features is None:
            raise ConfigError("`more_features` adds judges to that of `features`: give it too.")
        judges = [self.features, *(self.more_features or [])]
        if len(set(judges)) < len(judges):
            raise ConfigError(f"each judge of `features` and `more_features` counts once, but they are {judges}.")


@settings
class CallConfig:
    """Options of a pipeline's call."""

    velocity_scale: float | None = field(
        None,
        "multiply what a transformer of flow matching predicts; 1.03 to 1.05 sharpens samples with little guidance; default: the "
        "pipeline's own, or 1",
        above=0,
        advanced=True,
    )
    temperature: float | None = field(
        None, "temperature, for a pipeline that samples codes; default: its own", above=0, advanced=True
    )
    top_k: int | None = field(None, "sample only from the N most likely codes", at_least=1, advanced=True)
    top_p: float | None = field(
        None,
        "sample only from the most likely codes that have this probability together",
        above=0,
        at_most=1,
        advanced=True,
    )


@settings
class SamplingConfig(CallConfig):
    """Images that the pipeline generates."""

    num_images: int | None = field(
        None,
        "images to generate for each setting, and training images to compare with; default: as many as there are training images, at "
        "most 10000",
        at_least=1,
    )
    num_drawings: int = field(
        1,
        "draw each setting N times, with other noise each time: the numbers are means, and `_sd` tells how much chance moves the distance",
        at_least=1,
        needs="pipeline",
    )
    guidance_scales: list[float] | None = field(
        None,
        "one or more scales of classifier-free guidance to measure, from 1, which is none; default: the pipeline's own, or 1",
        at_least=1,
        needs="pipeline",
    )
    guidance_intervals: list[float] | None = field(
        None,
        "one or more pairs of noise levels between which guidance acts, from 0 (clean) to 1 (noise), such as `0 1 0 0.6`; default: the "
        "pipeline's own, or 0 1",
        at_least=0,
        at_most=1,
        needs="pipeline",
        advanced=True,
    )
    num_inference_steps: list[int] | None = field(
        None,
        "one or more numbers of denoising steps to measure; default: the pipeline's own, or 25",
        at_least=1,
        needs="pipeline",
    )
    schedulers: list[str] | None = field(
        None,
        "one or more schedulers of diffusers to draw with, such as `UniPCMultistep DPMSolverMultistep`; default: the pipeline's own",
        needs="pipeline",
        advanced=True,
    )
    set_defaults: bool = field(
        False,
        "give the pipeline the guidance scale, its interval, the steps and the scheduler with the lowest distance (for `ema.py`: and the "
        "weights), and a given `--velocity_scale`, `--temperature`, `--top_k`, `--top_p`, as its defaults",
    )
    label_sampling: Literal["data", "balanced", "random"] = field(
        "data",
        "labels of the generated images: each class as often as among the training images, equally often, or at random",
        needs="pipeline",
        advanced=True,
    )
    draw_from: Literal["train", "validation"] = field(
        "train",
        "whose captions and conditions images are drawn from; those of validation images show what the model does with new ones",
        needs="pipeline",
        advanced=True,
    )
    prompt: str | None = field(
        None,
        "text for a text-to-image pipeline; {label} in it is replaced by the name of a class",
        advanced=True,
        free_text=True,
    )

    def __post_init__(self):
        intervals_of("guidance_intervals", self.guidance_intervals or [])


@settings
class SampleFolderConfig:
    """Samples."""

    pipeline: str = field(
        help="folder or Hub id of a pipeline, or the output folder of its training (also the first word)"
    )
    output_dir: str = field("samples", "folder for the images; the same command again draws those that are missing")
    num_images: int = field(64, "number of images, of all classes or texts together", at_least=1)
    class_labels: list[str] | None = field(
        None, "names or numbers of the classes to draw, each equally often; default: all"
    )
    prompts: list[str] | None = field(
        None,
        "texts to draw from, each equally often, or one file with a text in each line",
        free_text=True,
    )
    batch_size: int = field(
        64,
        "images at once in each process, in blocks of 16 (of fewer above 256 pixels); does not change the images",
        at_least=1,
    )
    seed: int = field(0, "seed of the noise", at_least=0, at_most=MAX_SEED)
    mixed_precision: Literal["no", "fp16", "bf16"] = field("no", "autocast while sampling")


@settings
class OneSettingConfig(CallConfig):
    """How the pipeline draws."""

    guidance_scale: float | None = field(
        None, "scale of classifier-free guidance; 1 is none; default: the pipeline's own", at_least=1
    )
    guidance_interval: list[float] | None = field(
        None,
        "the two noise levels between which guidance acts, from 0 (clean) to 1 (noise); default: the pipeline's own",
        at_least=0,
        at_most=1,
        advanced=True,
    )
    num_inference_steps: int | None = field(None, "denoising steps; default: the pipeline's own", at_least=1)

    def __post_init__(self):
        check_interval("guidance_interval", self.guidance_interval)


@settings
class ReconstructionMonitorConfig:
    """Distance while training."""

    metric_features: str | None = field(
        None, "each validation measures rFD in these features (as `evaluate --features`)"
    )
    export: Literal["last", "best"] = field(
        "last",
        "weights of `vae/`: the last, or those of the validation with the smallest distance, without `--metric_features` the highest PSNR; "
        "of joint training, or of stage 2",
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
        """Whether it matters which weights are the best."""
        return self.export == "best" or self.early_stopping_patience is not None


@settings
class MonitorConfig(ReconstructionMonitorConfig):
    """Distance while training."""

    metric_features: str | None = field(
        None, "while training, measure the distance of samples in these features (as `evaluate --features`)"
    )
    export: Literal["last", "best"] = field(
        "last",
        "weights of the pipeline: the last, or those with the smallest distance, without `--metric_features` the lowest validation loss",
        advanced=True,
    )
    metric_images: int = field(2000, "samples for each measurement", at_least=2, needs="metric_features", advanced=True)
    metric_steps: int = field(
        2000, "measure every N steps, and at the end", at_least=1, needs="metric_features", advanced=True
    )

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
    check_channels(monitor, data)


def check_channels(monitor: ReconstructionMonitorConfig, data: DataConfig) -> None:
    """Raises `ConfigError` if the judge does not take images of so many channels."""
    if monitor.metric_features not in (None, *JUDGES_WITHOUT_NETWORK):
        data.require_pictures("`metric_features`", ANY_CHANNELS)


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
