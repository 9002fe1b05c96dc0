r"""
Measure the complexity distance of a latent space: how well small generators turn the latents into images.

    accelerate launch training/complexity.py --vae runs/digits/vae --dataset_name digits --image_channels 1 \
        --output_dir runs/digits/complexity

It takes minutes. `complexity.md`, `complexity.png` and `complexity.json` in the output folder hold the result; docs/metrics.md
explains each number. Give the same command again to continue an interrupted measurement: `complexity.jsonl` holds the finished
generators, under a hash of what they depend on.
"""

import logging
from pathlib import Path

from accelerate import Accelerator

from dae_diffusers.autoencoders.loading import load_autoencoder, settle_images
from dae_diffusers.cli import parse_config, run_script
from dae_diffusers.complexity.distance import MAX_EVAL_IMAGES, MAX_TRAIN_IMAGES, complexity_distance
from dae_diffusers.complexity.report import plot_complexity, to_markdown
from dae_diffusers.data import load_images, make_pass_loader
from dae_diffusers.data.arrays import read_value_range
from dae_diffusers.distributed import PROCESS_GROUP
from dae_diffusers.errors import UserError
from dae_diffusers.locks import take_folder
from dae_diffusers.metrics.features import load_feature_extractor
from dae_diffusers.store import write_atomically, write_json
from dae_diffusers.training.settings import MeasureComplexityConfig

logger = logging.getLogger(__name__)


def main(config: MeasureComplexityConfig) -> None:
    accelerator = Accelerator(kwargs_handlers=[PROCESS_GROUP])
    logging.basicConfig(format="%(message)s", level=logging.INFO if accelerator.is_main_process else logging.ERROR)
    folder = Path(config.latent_space.output_dir)
    lock = take_folder(folder, accelerator)
    vae = load_autoencoder(config.latent_space.vae).to(accelerator.device)
    settle_images(config, vae)
    extractor = (
        None
        if config.latent_space.features is None
        else load_feature_extractor(config.latent_space.features, accelerator.device)
    )
    with accelerator.main_process_first():
        name = config.latent_space.vae
        train, validation = load_images(
            config.data, config.latent_space.seed, value_range=read_value_range(name), model=name
        )
    if accelerator.is_main_process:
        # Always in batches of 64: another size changes the last digits of the latents, and training would amplify that.
        loaders = (
            make_pass_loader(images.choose(limit), batch_size=64)
            for images, limit in ((train, MAX_TRAIN_IMAGES), (validation, MAX_EVAL_IMAGES))
        )
        try:
            result = complexity_distance(
                vae,
                *loaders,
                config.complexity,
                feature_extractor=extractor,
                rows_path=folder / "complexity.jsonl",
                device=accelerator.device,
            )
        except (ValueError, FloatingPointError) as error:
            raise UserError(f"the complexity distance cannot be measured: {error}") from None
        report = to_markdown(result)
        write_atomically(folder / "complexity.md", report)
        write_json(folder / "complexity.json", result.to_dict())
        plot_complexity({"this latent space": result}, folder / "complexity.png")
        logger.info("%s\nwritten to %s", report, folder)
    accelerator.end_training()
    if lock is not None:
        lock.release()


if __name__ == "__main__":
    run_script(main, parse_config(MeasureComplexityConfig, description=__doc__))
