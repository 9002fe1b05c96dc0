"""
What an experiment means: a mapping, as a YAML file beside this one holds it.

*Budgets* say how many steps joint and two-stage training get, *conditions* how the autoencoder is trained, *generators* what is trained
on its latents. A condition with `latents_of`, `decoder_of` or `fit_of` continues another one.
"""

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from dae_diffusers.comparison.scripts import shared_flags
from dae_diffusers.errors import UserError
from dae_diffusers.store import read_json
from experiments.settings import with_kept

# What all runs of a folder share.
SHARED = ("data", "features", "num_images", "num_inference_steps", "autoencoder", "transformer")
_NOT_FLAGS = ("baselines", "budgets", "decoder_of", "fit_of", "generators", "latents_of", "steps")

Experiment = dict[str, Any]


@dataclass(frozen=True)
class Trial:
    r"""
    An autoencoder of an experiment: one condition and seed under one budget.

    Attributes:
        experiment (`dict`): The experiment.
        output_dir (`Path`): Folder of all its runs.
        budget, condition (`str`), seed (`int`): Which one.
        decoder_steps (`int`, *optional*): Whether, and how long, its decoder is trained on alone.
    """

    experiment: Experiment
    output_dir: Path
    budget: str
    condition: str
    seed: int
    decoder_steps: int | None = None

    @property
    def options(self) -> dict[str, Any]:
        """The condition's."""
        return self.experiment["conditions"][self.condition]

    @cached_property
    def folder(self) -> Path:
        """Named after its settings, so that budgets share it."""
        steps = describe_steps(self.experiment, self.budget, self.condition, self.decoder_steps)
        return self.output_dir / self.condition / steps / f"seed-{self.seed}"

    def of(self, condition: str) -> "Trial":
        """The trial of another condition with the same budget and seed."""
        return Trial(self.experiment, self.output_dir, self.budget, condition, self.seed)

    @property
    def origin(self) -> "Trial":
        """The trial whose encoder and generators this one has; often itself."""
        return self.of(origin_of_latents(self.experiment, self.condition))

    def base_flags(self, folder: Path | None = None) -> dict[str, Any]:
        """Flags of `train_dae.py` for a folder that all conditions share."""
        shared = shared_flags(folder or self.folder, self.seed)
        return {**shared, **self.experiment["data"], **self.experiment["autoencoder"]}

    def own_flags(self) -> dict[str, Any]:
        """The flags of `train_dae.py` among the options of the condition."""
        return {name: value for name, value in self.options.items() if name not in _NOT_FLAGS}

    def autoencoder_flags(self) -> dict[str, Any]:
        """All flags of `train_dae.py` for a condition that continues no other."""
        return self.base_flags() | steps_of(self.experiment, self.budget, self.condition) | self.own_flags()

    def head(self) -> dict[str, Any]:
        """How rows name this trial."""
        return {"condition": self.condition, "steps": self.folder.parent.name, "seed": self.seed}


def origin_of_latents(experiment: Experiment, condition: str) -> str:
    """The condition whose encoder and generators this one has: its own, or those that it names, which may name others."""
    options = experiment["conditions"][condition]
    base = options.get("latents_of") or options.get("decoder_of") or options.get("fit_of")
    return condition if base is None else origin_of_latents(experiment, base)


def steps_of(experiment: Experiment, budget: str, condition: str) -> dict[str, int]:
    """`stage1_steps` and `stage2_steps`; joint training takes their sum. A condition may have its own for a budget."""
    options = experiment["conditions"][condition]
    is_joint = options["auxiliary_decoder"] == "none"
    return options.get("steps", {}).get(budget) or experiment["budgets"][budget]["joint" if is_joint else "decoupled"]


def describe_steps(experiment: Experiment, budget: str, condition: str, decoder_steps: int | None = None) -> str:
    """Such as `450` for joint training, `210+340` for two stages; more of the decoder alone stands at the end."""
    options = experiment["conditions"][condition]
    if "fit_of" in options:
        parts = [describe_steps(experiment, budget, options["fit_of"]), options["stage3_steps"]]
    elif "decoder_of" in options:
        parts = [describe_steps(experiment, budget, options["decoder_of"]), options["stage2_steps"]]
    else:
        steps = steps_of(experiment, budget, condition)
        is_joint = options["auxiliary_decoder"] == "none"
        parts = [sum(steps.values())] if is_joint else [steps["stage1_steps"], steps["stage2_steps"]]
    return "+".join(map(str, parts + ([] if decoder_steps is None else [decoder_steps])))


def check_same_experiment(experiment: Experiment, output_dir: Path) -> dict[str, Any]:
    r"""
    What the runs of a folder have in common, and what each condition and generator is: that of this experiment with what is
    kept of those before, which it must not contradict.

    Raises:
        UserError: If something differs: finished runs would be taken for those of this experiment.
    """
    path = output_dir / "experiment.json"
    kept = read_json(path) if path.exists() else {}
    this = {name: experiment.get(name) for name in SHARED}
    for name, options in experiment["conditions"].items():
        not_trained_with = ("baselines", "budgets", "generators", "steps")  # the steps are in the folder's name
        this[f"condition {name}"] = {key: value for key, value in options.items() if key not in not_trained_with}
    this |= {f"generator {name}": options for name, options in experiment["generators"].items()}
    return with_kept(kept, this, f"{output_dir} holds runs of another experiment")


def check_finished(condition: str, needed: list[Path]) -> None:
    r"""Raises `UserError` if files of the runs that a condition continues are missing."""
    unfinished = [str(path.parent) for path in needed if not path.exists()]
    if unfinished:
        raise UserError(
            f"`{condition}` continues runs that are not finished: {', '.join(unfinished)}. Run their conditions first."
        )
