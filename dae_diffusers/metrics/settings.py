"""What an evaluation measures, and how it draws images. Needs no torch."""

from dataclasses import dataclass
from typing import Literal

from dae_diffusers.cli import field
from dae_diffusers.errors import ConfigError


@dataclass
class EvaluationConfig:
    """What to measure."""

    vae: str | None = field(None, "folder or Hub id of an autoencoder; default: the pipeline's")
    pipeline: str | None = field(None, "folder or Hub id of a diffusion pipeline; without it only the autoencoder")
    features: str | None = field(
        None, "`inception`, or a vision backbone on the Hub or in a folder; without it no distances between features"
    )
    output_dir: str = field("runs/my-model/evaluation", "folder for the results")
    batch_size: int = field(64, "images at once in each process; changes no result")
    lpips_net: Literal["alex", "vgg", "squeeze", "none"] = field(
        "alex", "network of the LPIPS, which is measured where the package `lpips` is installed"
    )
    seed: int = field(0, "of noise and labels; with that of training, the same held-out images")
    mixed_precision: Literal["no", "fp16", "bf16"] | None = field(None, "autocast while drawing; default: no")

    def __post_init__(self):
        if self.vae is None and self.pipeline is None:
            raise ConfigError("give `--vae` or `--pipeline` (or both): there is nothing to evaluate.")
        if self.pipeline is not None and self.features is None:
            raise ConfigError("`--pipeline` needs `--features`, such as `inception` or facebook/dinov2-base.")
        if self.seed < 0:
            raise ConfigError(f"`--seed` is {self.seed}, but must be at least 0.")
        if self.batch_size < 1:
            raise ConfigError(f"`--batch_size` is {self.batch_size}, but must be at least 1.")


@dataclass
class SamplingConfig:
    """Images that the pipeline draws."""

    num_images: int = field(10000, "images to draw for each setting, and training images to compare them with")
    guidance_scales: list[float] = field([1.0], "classifier-free guidance; several are swept")
    num_inference_steps: list[int] = field([25], "denoising steps; several are swept")
    temperature: float | None = field(None, "of a pipeline that draws codes; default: its own")
    top_k: int | None = field(None, "the same: draw from the this many likeliest codes only")
    top_p: float | None = field(None, "the same: draw from the fewest likeliest codes with this share")
    label_sampling: Literal["balanced", "random"] = field("balanced", "labels of the drawn images")
    prompt: str | None = field(
        None, "text for a text-to-image pipeline; {label} in it stands for the name of an image's class"
    )

    def __post_init__(self):
        for name in ("num_images", "top_k"):
            if getattr(self, name) is not None and getattr(self, name) < 1:
                raise ConfigError(f"`--{name}` is {getattr(self, name)}, but must be at least 1.")
        if self.temperature is not None and not self.temperature > 0:
            raise ConfigError(f"`--temperature` is {self.temperature}, but must be above 0.")
        if self.top_p is not None and not 0 < self.top_p <= 1:
            raise ConfigError(f"`--top_p` is {self.top_p}, but must be above 0 and at most 1.")
        if min(self.num_inference_steps) < 1:
            raise ConfigError(f"`--num_inference_steps` is {self.num_inference_steps}, but must be at least 1.")
