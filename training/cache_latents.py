r"""
Encode the images once, so that the training of a DiT can read latents instead of images.

    accelerate launch training/cache_latents.py --dataset_name digits --image_channels 1 --vae runs/digits/vae \
        --output_dir runs/digits/latents

Then: accelerate launch training/train_dit.py --vae runs/digits/vae --latent_cache runs/digits/latents

Give the same command again to continue an interrupted run and to repair damaged shards.
"""

import logging
from pathlib import Path

from dae_diffusers.autoencoders.loading import as_plain, load_any_autoencoder, settle_images
from dae_diffusers.cli import parse_config
from dae_diffusers.data import load_images
from dae_diffusers.engine.distributed import measuring_accelerator
from dae_diffusers.errors import UserError
from dae_diffusers.latents.cache import write_latent_cache
from dae_diffusers.locks import take_folder
from dae_diffusers.script import run_script
from dae_diffusers.training.settings import CacheLatentsConfig

logger = logging.getLogger(__name__)


def main(config: CacheLatentsConfig) -> None:
    accelerator = measuring_accelerator()
    cache, data = config.cache, config.data
    folder = Path(cache.output_dir)
    lock = take_folder(folder, accelerator)
    vae = as_plain(load_any_autoencoder(cache.vae, takes_stage1=True)).to(accelerator.device)
    settle_images(config, vae)
    with accelerator.main_process_first():
        splits = load_images(data, model=cache.vae)
    for name, images in zip(("train", "validation"), splits, strict=True):
        try:
            write_latent_cache(
                folder / name,
                vae,
                images,
                accelerator,
                batch_size=cache.batch_size,
                dtype=cache.dtype,
                shard_size=cache.shard_size,
                num_workers=data.dataloader_num_workers,
            )
        except OSError as error:
            raise UserError(f"the cache cannot be written to {folder}: {error.strerror or error}") from None
        logger.info("%s: %d images in %s", name, len(images), folder / name)
    accelerator.end_training()
    lock.release()


if __name__ == "__main__":
    run_script(main, parse_config(CacheLatentsConfig, description=__doc__))
