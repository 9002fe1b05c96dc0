"""Which averages a training keeps. Needs no torch."""

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
