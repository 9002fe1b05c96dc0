"""How the complexity distance is measured."""

from typing import Literal

from dae_diffusers.errors import ConfigError
from dae_diffusers.settings import field, settings

ComplexityForm = Literal["paired", "unpaired"]

# The value that ranks each form: a share of the data's variance, or of its standard deviation.
HEADLINES = {"paired": "variance_left", "unpaired": "std_left"}


@settings
class ComplexityConfig:
    """Complexity distance (compare numbers only if everything here but `forms`, `capacities` and `seeds` is the same)."""

    forms: list[str] = field(["paired", "unpaired"], "`paired`, `unpaired` or both")
    capacities: list[int] = field([0, 4, 16, 64], "widths of the generators' hidden layers; 0 is the linear generator")
    seeds: list[int] = field([0, 1, 2], "one generator of each width is trained for each seed")
    batch_size: int = field(64, "images in a batch of the generators' training", at_least=1, advanced=True)
    paired_steps: int = field(
        400, "steps of a generator in the paired form (none for width 0, which is solved)", at_least=1, advanced=True
    )
    paired_learning_rate: float = field(
        5e-3,
        "learning rate in the paired form (Adam): constant for half of the steps, then linear to 0",
        above=0,
        advanced=True,
    )
    unpaired_steps: int = field(150, "steps of a generator in the unpaired form", at_least=1, advanced=True)
    critic_steps: int = field(3, "steps of the critic for each step of the generator", at_least=1, advanced=True)
    unpaired_learning_rate: float = field(
        2e-3,
        "learning rate of generator and critic in the unpaired form, on the same schedule",
        above=0,
        advanced=True,
    )
    critic_width: int = field(
        16, "channels of the critic's first layer; later ones have up to four times as many", at_least=1, advanced=True
    )
    gradient_penalty: float = field(1.0, "weight of the penalty on the critic's slope", above=0, advanced=True)
    evaluation_steps: int = field(200, "steps of the fresh critic that judges the generator", at_least=1, advanced=True)

    def __post_init__(self):
        for name in ("forms", "capacities", "seeds"):
            values = getattr(self, name)
            if not isinstance(values, (list, tuple)) or not values or len(set(values)) != len(values):
                raise ConfigError(f"`{name}` is {values!r}, but must be one or more different values.")
        for form in self.forms:
            if form not in HEADLINES:
                raise ConfigError(f"`forms` holds {form!r}, but must hold some of {sorted(HEADLINES)}.")
        for name in ("capacities", "seeds"):
            for value in getattr(self, name):
                if not isinstance(value, int) or value < 0:
                    raise ConfigError(f"`{name}` holds {value!r}, but must hold integers of at least 0.")
