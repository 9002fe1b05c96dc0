r"""
Find the latent space that suits your images, within a budget of time.

    accelerate launch training/find_latents.py --train_data_dir my_images --resolution 64 --budget 4h --output_dir runs/find
    accelerate launch training/find_latents.py --dataset_name digits --image_channels 1 --resolution 16 --candidates digits \
        --budget 10m --train_generator --output_dir runs/find-digits

Every candidate gets a short autoencoder and a pilot generator on its latents; the best third goes on, three times as long; the winner
gets the rest of the budget. `report.md` and `report.html` show the result, `vae/` and `pipeline/` hold it. Give the same command again
to continue. Several processes share the candidates.
"""

import logging
import os

import diffusers.utils.logging
import transformers.utils.logging

from dae_diffusers.cli import parse_config
from dae_diffusers.comparison.scripts import work_alone
from dae_diffusers.script import run_script, show_messages
from dae_diffusers.search.candidates import read_candidates
from dae_diffusers.search.report import write_report
from dae_diffusers.search.search import Search
from dae_diffusers.settings import changes_of
from dae_diffusers.training.settings import FindLatentsConfig

logger = logging.getLogger(__name__)


def main(config: FindLatentsConfig) -> None:
    workers = int(os.environ.get("WORLD_SIZE", 1))
    is_first = work_alone()
    show_messages(is_first)
    for library in (diffusers, transformers):  # a bar for each model that is loaded
        library.utils.logging.disable_progress_bar()
    data = changes_of(config.data)
    candidates = read_candidates(config.search, data)
    for name, reason in candidates.left_out.items():
        logger.warning("candidate `%s` does not fit the images and is left out: %s", name, reason)
    search = Search(config.search, data, candidates, workers)
    try:
        search.run()
    except (KeyboardInterrupt, SystemExit):
        logger.info("stopped; the same command goes on from here")
        raise
    if is_first:
        write_report(search)
        logger.info("%s", (search.folder / "report.md").read_text(encoding="utf-8").partition("![")[0])
        logger.info("written to %s", search.folder / "report.html")


if __name__ == "__main__":
    run_script(main, parse_config(FindLatentsConfig, description=__doc__))
