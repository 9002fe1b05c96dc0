"""What an evaluation measures, and how it generates images. Needs no torch."""

from typing import Literal

from dae_diffusers.engine.settings import MAX_SEED
from dae_diffusers.errors import ConfigError
from dae_diffusers.settings import field, settings

# Feature extractors of images with any number of channels.
JUDGES_WITHOUT_NETWORK = ("pixels", "spectrum")
ANY_CHANNELS = " The judges `pixels` and `spectrum` take any number of channels."


@settings
class EvaluationConfig:
    """What to measure."""

    vae: str | None = field(None, "folder or Hub id of an autoencoder; default: the pipeline's")
    pipeline: str | None = field(
        None, "folder or Hub id of a diffusers pipeline; default: only the autoencoder is measured"
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
    output_dir: str = field("runs/my-model/evaluation", "folder for the results")
    batch_size: int = field(64, "images at once in each process; does not change the results", at_least=1)
    lpips_net: Literal["alex", "vgg", "squeeze", "none"] = field(
        "alex", "network of LPIPS, which is measured if the package `lpips` is installed", advanced=True
    )
    seed: int = field(
        0,
        "seed of noise, labels and held-out images; the seed of the training holds out the same images",
        at_least=0,
        at_most=MAX_SEED,
    )
    mixed_precision: Literal["no", "fp16", "bf16"] | None = field(
        None, "autocast while sampling; default: no", needs="pipeline"
    )

    def __post_init__(self):
        if self.vae is None and self.pipeline is None:
            raise ConfigError("give `vae` or `pipeline` (or both): there is nothing to evaluate.")
        if self.pipeline is not None and self.features is None:
            raise ConfigError("`pipeline` needs `features`, such as `inception` or facebook/dinov2-base.")
        if self.more_features and self.features is None:
            raise ConfigError("`more_features` adds judges to that of `features`: give it too.")
        judges = [self.features, *(self.more_features or [])]
        if len(set(judges)) < len(judges):
            raise ConfigError(f"each judge of `features` and `more_features` counts once, but they are {judges}.")


@settings
class SamplingConfig:
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
    guidance_scales: list[float] = field(
        [1.0], "one or more scales of classifier-free guidance to measure", needs="pipeline"
    )
    num_inference_steps: list[int] = field(
        [25], "one or more numbers of denoising steps to measure", at_least=1, needs="pipeline"
    )
    set_defaults: bool = field(
        False,
        "make the guidance scale and the steps with the lowest distance (for `ema.py`: and the weights), and a given `--velocity_scale`, "
        "those of the pipeline",
    )
    velocity_scale: float | None = field(
        None,
        "multiply what a transformer of flow matching predicts; with little guidance 1.03 to 1.05 lowers gFD; default: the pipeline's own, or 1",
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
    label_sampling: Literal["data", "balanced", "random"] = field(
        "data",
        "labels of the generated images: each class as often as among the training images, equally often, or at random",
        needs="pipeline",
        advanced=True,
    )
    prompt: str | None = field(
        None,
        "text for a text-to-image pipeline; {label} in it is replaced by the name of a class",
        advanced=True,
        free_text=True,
    )
