"""How the complexity distance is measured."""

from dataclasses import dataclass
from typing import Literal

from dae_diffusers.cli import field
from dae_diffusers.errors import ConfigError

ComplexityForm = Literal["paired", "unpaired"]

# What each form is ranked by, as a share of the data's variance and of its root.
HEADLINES = {"paired": "variance_left", "unpaired": "std_left"}


@dataclass
class ComplexityConfig:
    """Complexity distance (numbers compare only if all of this but `forms`, `capacities` and `seeds` is the same)."""

    forms: list[str] = field(["paired", "unpaired"], "`paired`, `unpaired` or both")
    capacities: list[int] = field([0, 4, 16, 64], "widths of the generators' hidden layers; 0 is the linear generator")
    seeds: list[int] = field([0, 1, 2], "one generator of each width for each; of its initial weights and batches")
    batch_size: int = field(64, "images in a batch of the generators' training")
    paired_steps: int = field(400, "steps of a generator in the paired form; the linear one needs none")
    paired_learning_rate: float = field(
        5e-3, "Adam's in the paired form: constant for half of the steps, then linear to 0"
    )
    unpaired_steps: int = field(150, "steps of a generator in the unpaired form")
    critic_steps: int = field(3, "steps of the critic for each of them")
    unpaired_learning_rate: float = field(2e-3, "of generator and critic in the unpaired form, on the same schedule")
    critic_width: int = field(16, "channels of the critic's first layer; later ones have up to four times as many")
    gradient_penalty: float = field(1.0, "weight of the penalty on the critic's slope")
    evaluation_steps: int = field(200, "steps of the fresh critic that judges the generator")

    def __post_init__(self):
        for name in ("forms", "capacities", "seeds"):
            values = getattr(self, name)
            if not isinstance(values, (list, tuple)) or not values or len(set(values)) != len(values):
                raise ConfigError(f"`{name}` is {values!r}, but must be one or more different values.")
        for form in self.forms:
            if form not in HEADLINES:
                raise ConfigError(f"`forms` holds {form!r}; known are {sorted(HEADLINES)}.")
        for name in ("capacities", "seeds"):
            for value in getattr(self, name):
                if not isinstance(value, int) or value < 0:
                    raise ConfigError(f"`{name}` holds {value!r}, but every one must be an integer of at least 0.")
        for name in (
            "batch_size", "paired_steps", "unpaired_steps", "critic_steps", "critic_width", "evaluation_steps"
        ):  # fmt: skip
            if getattr(self, name) < 1:
                raise ConfigError(f"`{name}` is {getattr(self, name)}, but must be at least 1.")
        for name in ("paired_learning_rate", "unpaired_learning_rate", "gradient_penalty"):
            if not getattr(self, name) > 0:
                raise ConfigError(f"`{name}` is {getattr(self, name)}, but must be above 0.")
