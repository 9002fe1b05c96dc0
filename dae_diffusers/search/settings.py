"""How a search for a latent space is done. Needs no torch."""

import re
from typing import Literal

from dae_diffusers.engine.settings import MAX_SEED
from dae_diffusers.errors import ConfigError
from dae_diffusers.settings import field, settings

_UNITS = {"d": 86400, "h": 3600, "m": 60, "s": 1}


@settings
class SearchConfig:
    """Search."""

    output_dir: str = field("runs/find", "folder for everything; the same command continues there")
    budget: str = field("4h", "time for the whole search, such as 90m, 4h or 1d12h")
    candidates: str = field("default", "`default`, `digits`, or a YAML file of candidates")
    features: str | None = field(
        None,
        "the judge: `inception`, a vision model (Hub id or folder), or without a network `pixels` or `spectrum`; default: one is "
        "trained on the images",
    )
    train_generator: bool = field(False, "also train a generator on the winner's latents, as `pipeline/`")
    published_vae: str | None = field(None, "a published autoencoder (Hub id or folder) as one more candidate")
    on_misfit: Literal["skip", "stop"] = field("skip", "what to do with candidates that do not fit the images")
    keep_one_in: int = field(3, "keep the best 1 in N candidates for the next rung", at_least=2, advanced=True)
    num_images: int = field(2000, "images that are generated to judge a pilot", at_least=2, advanced=True)
    guidance_scales: list[float] = field(
        [1.5],
        "scales of classifier-free guidance with which they are generated; the best of several counts",
        advanced=True,
    )
    num_inference_steps: int = field(15, "denoising steps with which they are generated", at_least=1, advanced=True)
    mixed_precision: Literal["no", "fp16", "bf16"] | None = field(
        None,
        "precision of all trainings and of drawing; weights stay float32; default: trainings as accelerate says, drawing float32",
    )
    seed: int = field(0, "of weights and data order", at_least=0, at_most=MAX_SEED)

    def __post_init__(self):
        self.seconds  # noqa: B018 (checks it)

    @property
    def seconds(self) -> int:
        """The budget in seconds."""
        parts = re.findall(r"(\d+)([dhms])", self.budget)
        seconds = sum(int(number) * _UNITS[unit] for number, unit in parts)
        if "".join(number + unit for number, unit in parts) != self.budget or seconds == 0:
            raise ConfigError(f"`budget` is {self.budget!r}, but must be a time such as 90m, 4h or 1d12h.")
        return seconds


def show_seconds(seconds: float) -> str:
    r"""A time as `budget` takes it, rounded up to minutes from ten minutes on."""
    seconds = max(1, round(seconds))
    if seconds > 600:
        seconds = -(-seconds // 60) * 60
    text = ""
    for unit, size in _UNITS.items():
        number, seconds = divmod(seconds, size)
        text += f"{number}{unit}" if number else ""
    return text
