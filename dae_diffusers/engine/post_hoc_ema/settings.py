"""Which averages a training keeps. Needs no torch."""

from typing import Literal

from dae_diffusers.engine.settings import MAX_SEED
from dae_diffusers.errors import ConfigError
from dae_diffusers.settings import field, settings

# Just below that of the plain average of all steps, 1 / sqrt(12).
MAX_LENGTH = 0.2886
# The default number of snapshots of a training.
NUM_SNAPSHOTS = 32


@settings
class PostHocEMAConfig:
    """Post-hoc EMA."""

    post_hoc_ema: bool = field(
        False,
        "keep snapshots of two more averages of the weights, to choose the length of the average afterwards (ema.py)",
    )
    post_hoc_ema_steps: int | None = field(
        None, f"a snapshot every N steps; default: {NUM_SNAPSHOTS} over the training", at_least=1, advanced=True
    )

    def __post_init__(self):
        if self.post_hoc_ema_steps is not None and not self.post_hoc_ema:
            raise ConfigError(
                "`post_hoc_ema_steps` needs `post_hoc_ema`, which keeps the snapshots. Give both or neither."
            )

    def steps_between(self, steps: int) -> int:
        r"""Steps from one snapshot to the next, in a training of `steps` steps."""
        return self.post_hoc_ema_steps or -(-steps // NUM_SNAPSHOTS)


@settings
class LengthsConfig:
    """Averages of the weights."""

    folder: str = field(help="output folder of a training with `--post_hoc_ema` (also the first word)")
    length: list[float] = field(
        help="one or more lengths: the width of the average as a share of the training, such as 0.05 0.1 0.15",
        above=0,
        at_most=MAX_LENGTH,
    )
    output_dir: str | None = field(None, "folder for the pipelines and the table; default: `ema/` in the run's")
    features: str | None = field(
        None,
        "`inception`, a vision model (Hub id or folder), `pixels` or `spectrum`, to compare the lengths by gFD; default: nothing "
        "is measured",
    )
    batch_size: int = field(64, "images at once in each process; does not change the results", at_least=1)
    seed: int = field(0, "seed of noise and labels", at_least=0, at_most=MAX_SEED)
    mixed_precision: Literal["no", "fp16", "bf16"] | None = field(None, "autocast while sampling; default: no")
