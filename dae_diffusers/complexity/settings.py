"""How the complexity distance is measured. Needs no torch."""

import itertools
from typing import Literal

from dae_diffusers.engine.settings import MAX_SEED, warmup_of
from dae_diffusers.errors import ConfigError
from dae_diffusers.settings import field, settings


@settings
class ComplexityConfig:
    """Pilots (compare numbers only if everything here is the same)."""

    widths: list[int] = field([64, 128, 256], "widths of the pilot transformers, multiples of 4", at_least=4)
    pilot_seeds: list[int] = field([0], "one pilot of each width is trained for each seed", at_least=0)
    pilot_steps: list[int] = field([400], "optimiser steps of the pilots, one or more lengths", at_least=1)
    pilot_layers: int = field(4, "transformer blocks of a pilot", at_least=1, advanced=True)
    patch_size: int = field(2, "patch size of a pilot", at_least=1, advanced=True)
    train_batch_size: int = field(64, "images in a batch of the training", at_least=1, advanced=True)
    optimizer: Literal["adamw", "muon"] = field("adamw", "optimiser of the pilots; use the generator's", advanced=True)
    learning_rate: float = field(1e-3, "peak learning rate of a pilot; `muon` takes about 8e-3", above=0, advanced=True)
    timestep_shift: float = field(
        1.0, "noise levels of a pilot: above 1 for more noise; use the generator's", above=0, advanced=True
    )
    num_images: int = field(2000, "images that a pilot generates, and training images to compare with", at_least=2)
    num_inference_steps: int = field(25, "denoising steps with which they are generated", at_least=1, advanced=True)
    refit_steps: int = field(
        0, "train the decoder on for so many steps first, the encoder frozen: decoders of several autoencoders become alike",
        at_least=0,
    )  # fmt: skip

    def __post_init__(self):
        for name in ("widths", "pilot_steps", "pilot_seeds"):
            values = getattr(self, name)
            if not isinstance(values, (list, tuple)) or not values or len(set(values)) != len(values):
                raise ConfigError(f"`{name}` is {values!r}, but must be one or more different values.")
        for width in self.widths:
            if not isinstance(width, int) or width % 4:
                raise ConfigError(f"`widths` holds {width!r}, but must hold multiples of 4 (rotary positions).")

    def pilots(self) -> dict[str, tuple[int, int, int]]:
        """Width, steps and seed of each pilot, by its name."""
        every = itertools.product(self.widths, self.pilot_steps, self.pilot_seeds)
        return {"width-{}-steps-{}-seed-{}".format(*pilot): pilot for pilot in every}

    def transformer(self, width: int, steps: int) -> dict[str, int | float | str]:
        """The flags of `train_dit.py` for a pilot."""
        heads = width // 64 if width % 64 == 0 else 1
        return {
            "patch_size": self.patch_size,
            "num_layers": self.pilot_layers,
            "num_attention_heads": heads,
            "attention_head_dim": width // heads,
            "train_batch_size": self.train_batch_size,
            "optimizer": self.optimizer,
            "learning_rate": self.learning_rate,
            "timestep_shift": self.timestep_shift,
            "ema_decay": 0.99,
            "max_train_steps": steps,
            "lr_warmup_steps": warmup_of(steps),
            "num_sample_images": 1,  # nobody looks at its grid
            "sample_steps": 1,
        }


@settings
class LatentSpaceConfig:
    """Latent space."""

    vae: str = field(help="folder or Hub id of the autoencoder")
    features: str | None = field(
        None,
        "`inception`, a vision model (Hub id or folder), `pixels` or `spectrum`, for gFD; default: only the pilots' loss is measured",
    )
    output_dir: str = field("runs/my-model/complexity", "folder for the results")
    seed: int = field(0, "seed of the samples, and of the decoder that is trained again", at_least=0, at_most=MAX_SEED)
