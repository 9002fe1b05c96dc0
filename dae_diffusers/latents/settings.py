"""What a latent cache holds. Needs no torch."""

from typing import Literal

from dae_diffusers.settings import field, settings


@settings
class CacheConfig:
    """Cache."""

    vae: str = field(help="folder or Hub id of the autoencoder")
    output_dir: str = field("runs/my-model/latents", "folder for the cache: `train/` and `validation/`")
    batch_size: int = field(64, "images encoded at once", at_least=1)
    dtype: Literal["float32", "float16", "bfloat16"] = field("float16", "data type of the stored latents")
    shard_size: int = field(8192, "images in a file of the cache", at_least=1, advanced=True)
