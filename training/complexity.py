r"""
Measure the complexity distance of a latent space: how well small generators, trained for a short time, model it.

    accelerate launch training/complexity.py --vae runs/digits/vae --dataset_name digits --image_channels 1 \
        --features features/digits --output_dir runs/digits/complexity

`complexity.md`, `complexity.png` and `complexity.json` in the output folder hold the result; docs/metrics.md explains each number.
Give the same command again to continue an interrupted measurement. Several processes share the pilots.
"""

import logging
from pathlib import Path

from dae_diffusers.autoencoders.loading import load_autoencoder, settle_images
from dae_diffusers.cli import parse_config
from dae_diffusers.comparison.scripts import work_alone
from dae_diffusers.complexity.pilots import measure_pilots
from dae_diffusers.complexity.report import complexity_distance, plot_complexity, summarize, to_markdown
from dae_diffusers.locks import mark_folder
from dae_diffusers.script import run_script, show_messages
from dae_diffusers.settings import changes_of
from dae_diffusers.store import write_atomically, write_json
from dae_diffusers.training.settings import MeasureComplexityConfig

logger = logging.getLogger(__name__)


def main(config: MeasureComplexityConfig) -> None:
    is_main = work_alone()
    show_messages(is_main)
    space, folder = config.latent_space, Path(config.latent_space.output_dir)
    if is_main:
        mark_folder(folder)
    settle_images(config, load_autoencoder(space.vae), patch_size=config.complexity.patch_size)
    data = changes_of(config.data)
    data |= {"resolution": config.data.resolution, "image_channels": config.data.image_channels}
    rows = measure_pilots(space.vae, data, config.complexity, folder, features=space.features, seed=space.seed)
    if not is_main:
        return
    report = to_markdown(rows)
    write_atomically(folder / "complexity.md", report)
    result = {"distance": complexity_distance(rows), "summary": summarize(rows), "pilots": rows}
    write_json(folder / "complexity.json", result)
    plot_complexity({"this latent space": rows}, folder / "complexity.png")
    logger.info("%s\nwritten to %s", report, folder)


if __name__ == "__main__":
    run_script(main, parse_config(MeasureComplexityConfig, description=__doc__))
