"""
Measure the complexity distance of a latent space: how far small generators stay from the images, given the latents.

    accelerate launch training/complexity.py --vae runs/digits/vae --dataset_name digits --image_channels 1 \
        --output_dir runs/digits/complexity

It takes minutes. `complexity.md`, `complexity.png` and `complexity.json` in the output folder hold the result; docs/metrics.md
explains each number. An interrupted measurement goes on when the same command is given again: finished generators stand in
`complexity.jsonl`, under a hash of what they depend on.
"""

import json
import logging
from dataclasses import dataclass, fields
from pathlib import Path

from accelerate import Accelerator

from dae_diffusers.autoencoders.loading import check_image_size, load_autoencoder
from dae_diffusers.checkpointing import take_folder
from dae_diffusers.cli import field, parse_config, run_script
from dae_diffusers.complexity.distance import MAX_EVAL_IMAGES, MAX_TRAIN_IMAGES, complexity_distance
from dae_diffusers.complexity.report import plot_complexity, to_markdown
from dae_diffusers.complexity.settings import ComplexityConfig
from dae_diffusers.data import DataConfig, load_images, make_pass_loader
from dae_diffusers.data.arrays import read_value_range
from dae_diffusers.errors import ConfigError, UserError
from dae_diffusers.files import finite_or_none, write_atomically
from dae_diffusers.metrics.features import load_feature_extractor
from dae_diffusers.run import PROCESS_GROUP

logger = logging.getLogger(__name__)


@dataclass
class LatentSpaceConfig:
    """Latent space."""

    vae: str | None = field(None, "folder or Hub id of an autoencoder")
    features: str | None = field(
        None, "a vision backbone on the Hub or in a folder; with it the Fréchet distance of its features, too"
    )
    output_dir: str = field("runs/my-model/complexity", "folder for the results")
    seed: int = field(0, "with that of training, the same held-out images")

    def __post_init__(self):
        if self.vae is None:
            raise ConfigError("give `--vae`, the folder or Hub id of an autoencoder: there is nothing to measure.")
        if self.seed < 0:
            raise ConfigError(f"`--seed` is {self.seed}, but must be at least 0.")


@dataclass
class MeasureComplexityConfig(ComplexityConfig, LatentSpaceConfig, DataConfig):
    def __post_init__(self):
        for part in (DataConfig, LatentSpaceConfig, ComplexityConfig):
            part.__post_init__(self)
        if self.streaming:
            raise ConfigError("`--streaming` does not go with complexity.py, which chooses images; leave it out.")
        if self.features is not None and self.image_channels not in (1, 3):
            raise ConfigError(
                f"`--features` are made for gray and for RGB, not for {self.image_channels} channels; leave them out."
            )
        self.require_source()

    def measurement(self) -> ComplexityConfig:
        """How to measure, without the rest of the flags."""
        return ComplexityConfig(**{part.name: getattr(self, part.name) for part in fields(ComplexityConfig)})


def main(config: MeasureComplexityConfig) -> None:
    accelerator = Accelerator(kwargs_handlers=[PROCESS_GROUP])
    logging.basicConfig(format="%(message)s", level=logging.INFO if accelerator.is_main_process else logging.ERROR)
    folder = Path(config.output_dir)
    lock = take_folder(folder, accelerator)
    vae = load_autoencoder(config.vae).to(accelerator.device)
    check_image_size(vae, channels=config.image_channels, resolution=config.resolution)
    extractor = None if config.features is None else load_feature_extractor(config.features, accelerator.device)
    config.value_range = config.value_range or list(read_value_range(config.vae) or [])
    with accelerator.main_process_first():
        train, validation = load_images(config, config.seed)
    if accelerator.is_main_process:
        # Always in batches of 64: training on the latents would amplify what another size changes in their last digits.
        loaders = (
            make_pass_loader(images.choose(limit), batch_size=64)
            for images, limit in ((train, MAX_TRAIN_IMAGES), (validation, MAX_EVAL_IMAGES))
        )
        try:
            result = complexity_distance(
                vae,
                *loaders,
                config.measurement(),
                feature_extractor=extractor,
                rows_path=folder / "complexity.jsonl",
                device=accelerator.device,
            )
        except (ValueError, FloatingPointError) as error:
            raise UserError(f"the complexity distance cannot be measured: {error}") from None
        report = to_markdown(result)
        write_atomically(folder / "complexity.md", report)
        write_atomically(folder / "complexity.json", json.dumps(finite_or_none(result.to_dict()), indent=2))
        plot_complexity({"this latent space": result}, folder / "complexity.png")
        logger.info("%s\nwritten to %s", report, folder)
    accelerator.end_training()
    if lock is not None:
        lock.release()


if __name__ == "__main__":
    run_script(main, parse_config(MeasureComplexityConfig, description=__doc__))
