"""
Encode the images once, so that training a DiT reads latents instead of images.

    accelerate launch training/cache_latents.py --dataset_name digits --image_channels 1 --vae runs/digits/vae \
        --output_dir runs/digits/latents

Then: accelerate launch training/train_dit.py --vae runs/digits/vae --latent_cache runs/digits/latents

An interrupted run goes on where it stopped when the same command is given again, and makes damaged shards anew.
"""

import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from accelerate import Accelerator

from dae_diffusers.autoencoders.loading import check_image_size, load_autoencoder
from dae_diffusers.checkpointing import take_folder
from dae_diffusers.cli import field, parse_config, run_script
from dae_diffusers.data import DataConfig, load_images
from dae_diffusers.data.arrays import read_value_range
from dae_diffusers.errors import ConfigError, UserError
from dae_diffusers.latents.cache import write_latent_cache
from dae_diffusers.run import PROCESS_GROUP

logger = logging.getLogger(__name__)


@dataclass
class CacheConfig:
    """Cache."""

    vae: str = field("runs/my-model/vae", "folder or Hub id of the autoencoder")
    output_dir: str = field("runs/my-model/latents", "folder for the cache: `train/` and `validation/`")
    batch_size: int = field(64, "images encoded at once")
    dtype: Literal["float32", "float16", "bfloat16"] = field("float16", "type of the stored numbers")
    shard_size: int = field(8192, "images in a shard")
    seed: int = field(0, "chooses the held-out images where the data have no validation split; as in training")

    def __post_init__(self):
        for name in ("batch_size", "shard_size"):
            if getattr(self, name) < 1:
                raise ConfigError(f"`--{name}` is {getattr(self, name)}, but must be at least 1.")


@dataclass
class CacheLatentsConfig(CacheConfig, DataConfig):
    def __post_init__(self):
        DataConfig.__post_init__(self)
        CacheConfig.__post_init__(self)
        self.require_source()
        if self.crops_at_random:
            raise ConfigError(
                "`--random_crop` and `--random_resized_crop` cannot be cached: each epoch would see the same crops."
            )
        if self.streaming:
            raise ConfigError("`--streaming` data cannot be cached; train_dit.py encodes them as they come.")


def main(config: CacheLatentsConfig) -> None:
    accelerator = Accelerator(kwargs_handlers=[PROCESS_GROUP])
    logging.basicConfig(format="%(message)s", level=logging.INFO if accelerator.is_main_process else logging.ERROR)
    lock = take_folder(Path(config.output_dir), accelerator)
    vae = load_autoencoder(config.vae).to(accelerator.device)
    check_image_size(vae, channels=config.image_channels, resolution=config.resolution)
    config.value_range = config.value_range or read_value_range(config.vae) or []
    with accelerator.main_process_first():
        splits = dict(zip(("train", "validation"), load_images(config, config.seed), strict=True))
    for name, images in splits.items():
        try:
            write_latent_cache(
                Path(config.output_dir) / name,
                vae,
                images,
                accelerator,
                batch_size=config.batch_size,
                dtype=config.dtype,
                shard_size=config.shard_size,
                num_workers=config.dataloader_num_workers,
            )
        except OSError as error:
            raise UserError(f"the cache cannot be written to {config.output_dir}: {error.strerror or error}") from None
        logger.info("%s: %d images in %s", name, len(images), Path(config.output_dir) / name)
    accelerator.end_training()
    if lock is not None:
        lock.release()


if __name__ == "__main__":
    run_script(main, parse_config(CacheLatentsConfig, description=__doc__))
