"""The plan of a run: what it must keep to go on from a checkpoint."""

import logging
from collections.abc import Collection
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from dae_diffusers.errors import UserError
from dae_diffusers.settings import without_paths

logger = logging.getLogger(__name__)

TRAINING_IMAGES = "the training images"  # an input of a run, by the name in its checkpoints


@dataclass(frozen=True)
class Plan:
    r"""
    What a run must keep to go on from a checkpoint. Each checkpoint holds the plan of its run.

    Attributes:
        settings (`dict`): Settings that determine the model, by name; None for one that is left out. Of an absolute path only the last
            part, since a run may go on on another machine.
        steps (`dict[str, int]`): Optimiser steps of each stage, in order, by the name of their setting.
        images_per_step (`int`): Images that one optimiser step sees, over all processes.
        inputs (`dict[str, str]`): Fingerprints of the run's inputs, such as its images, by name.
        classes (`list[str]`, *optional*): Names of the classes.
        images_changed (`list[int]`): Steps at which the run went on with other images.
    """

    settings: dict[str, Any]
    steps: dict[str, int]
    images_per_step: int
    inputs: dict[str, str]
    classes: list[str] | None = None
    images_changed: list[int] = field(default_factory=list)

    @classmethod
    def from_state(cls, state: dict[str, Any], default: "Plan") -> "Plan":
        r"""The plan in the state of a checkpoint. What an earlier version did not save is as in `default`."""
        plan = state.get("plan") or {}
        return cls(
            without_paths(plan.get("settings", default.settings)),
            plan.get("steps", default.steps),
            plan.get("images_per_step", default.images_per_step),
            state.get("inputs", default.inputs),
            state.get("classes", default.classes),
            state.get("images_changed", default.images_changed),
        )

    def state(self) -> dict[str, Any]:
        r"""What a checkpoint holds of it; see [`from_state`]."""
        return {
            "inputs": self.inputs,
            "plan": {"settings": self.settings, "steps": self.steps, "images_per_step": self.images_per_step},
            "images_changed": self.images_changed,
            "classes": self.classes,
        }

    @property
    def last_step(self) -> int:
        r"""Optimiser steps of all stages together."""
        return sum(self.steps.values())

    def resume(
        self,
        before: "Plan",
        checkpoint: Path,
        step: int,
        *,
        accepts_images: bool = False,
        is_stream: bool = False,
        num_epochs: float | None = None,
        may_lack: Collection[str] = (),
    ) -> "Plan":
        r"""
        This plan for a run that goes on from a checkpoint: with the same settings, inputs and finished stages, and at least as many
        steps of the current stage as the checkpoint has done.

        Args:
            before (`Plan`): The plan of the checkpoint.
            checkpoint (`Path`): The checkpoint, for the messages.
            step (`int`): Optimiser steps that the checkpoint has done.
            accepts_images (`bool`, *optional*): Whether the training images may be others, of the same classes.
            is_stream (`bool`, *optional*): Whether they are a stream. It has a position in its files, so they may not.
            num_epochs (`float`, *optional*): The passes over the images that the steps come from. Then the images in a step must stay.
            may_lack (`Collection[str]`, *optional*): Names of inputs that checkpoints of earlier versions do not know.

        Returns:
            `Plan`: With the steps at which the images changed until now.

        Raises:
            UserError: If the run may not go on. The message says what the checkpoint has done, and what may change.
        """
        self._check_settings(before, checkpoint)  # they may be why the images are others
        images_changed = self._check_inputs(before, checkpoint, accepts_images, is_stream)
        if num_epochs is not None:
            self._check_images_per_step(before, checkpoint)
        self._check_steps(before, checkpoint, step, num_epochs)
        self._check_input_names(before, checkpoint, may_lack)
        return replace(self, images_changed=before.images_changed + ([step] if images_changed else []))

    def _check_inputs(self, before: "Plan", checkpoint: Path, accepts_images: bool, is_stream: bool) -> bool:
        """Returns whether the training images are others, and may be."""
        accepts_images = accepts_images and not is_stream
        changed = [name for name, value in before.inputs.items() if self.inputs.get(name, value) != value]
        for name in changed:
            hint = ""
            if name == TRAINING_IMAGES and accepts_images:
                continue
            if name == TRAINING_IMAGES and not is_stream:
                hint = " To go on with the new ones, pass `accept_changed_images`."
            elif accepts_images and TRAINING_IMAGES in changed:
                hint = " `accept_changed_images` accepts images alone, without captions or conditions of their own."
            raise UserError(
                f"{name} changed since {checkpoint} was saved (fingerprint {self.inputs[name]}, was {before.inputs[name]}). Continue "
                f"with the same, or train in another `output_dir`.{hint}"
            )
        if not changed:
            return False
        if before.classes not in (None, self.classes):
            raise UserError(
                f"the classes changed since {checkpoint} was saved: they were {before.classes} and are {self.classes}. "
                "`accept_changed_images` takes other images of the same classes."
            )
        logger.warning(
            "the training images changed since %s was saved: from here on the run learns from the new ones. Without a validation "
            "split of their own, others are held out now, some of which it may have seen.",
            checkpoint,
        )
        return True

    def _check_images_per_step(self, before: "Plan", checkpoint: Path) -> None:
        now, was = self.images_per_step, before.images_per_step
        if now != was:
            steps = " and ".join(f"`{name} {number}`" for name, number in before.steps.items())
            raise UserError(
                f"{checkpoint} was trained with {was} images in a step, but now they are {now}, so `num_train_epochs` would be another "
                "number of passes. Keep the product of `train_batch_size`, `gradient_accumulation_steps` and processes, or give steps "
                f"instead of passes: they were {steps}."
            )

    def _check_settings(self, before: "Plan", checkpoint: Path) -> None:
        for name, value in before.settings.items():
            if name in self.settings and self.settings[name] != value:
                was, again, _ = _words(name, value)
                *_, now = _words(name, self.settings[name])
                raise UserError(
                    f"{checkpoint} was trained {was}, but now it is {now}. {again}, or train in another `output_dir`."
                )

    def _check_steps(self, before: "Plan", checkpoint: Path, step: int, num_epochs: float | None) -> None:
        begins, began = next(iter(self.steps)), next(iter(before.steps), None)
        if began not in (begins, None):
            raise UserError(
                f"{checkpoint} began with `{began}`, but this run begins with `{begins}`. Train in another `output_dir`."
            )
        give, go_on = "Give", "Continue"
        if num_epochs is not None:
            leave_out = f"Leave out `num_train_epochs` {num_epochs:g}, which says so, and"
            give, go_on = f"{leave_out} give `{{}}` of", f"{leave_out} continue"
        first = 0  # step at which a stage begins
        for position, (name, number) in enumerate(self.steps.items()):
            planned, is_last = before.steps.get(name, number), position == len(self.steps) - 1
            if step > first + planned and not is_last:  # the stage is over
                if number != planned:
                    raise UserError(
                        f"{checkpoint} has done {step} steps and has finished the stage of `{name}` {planned}, but now it is {number}. "
                        f"{go_on} with {planned}, since only an unfinished stage may get more steps, or train in another `output_dir`."
                    )
            elif first <= step and number < step - first:
                raise UserError(
                    f"{checkpoint} has done {step} steps, {step - first} of them of `{name}`, but now `{name}` is {number}. "
                    f"{give.format(name)} at least {step - first} to continue, or train in another `output_dir`."
                )
            first += number

    def _check_input_names(self, before: "Plan", checkpoint: Path, may_lack: Collection[str]) -> None:
        for name in sorted((self.inputs.keys() ^ before.inputs.keys()) - set(may_lack)):
            was, now = ("without", "has") if name in self.inputs else ("with", "lacks")
            raise UserError(
                f"{checkpoint} was trained {was} {name}, which this run {now}. Continue with the same, or train in another `output_dir`."
            )


def _words(name: str, value: Any) -> tuple[str, str, str]:
    """A setting of this value in a message: how a run was trained, what to do to continue it, and what the setting is in another run."""
    match value:
        case None:
            return f"without `{name}`", "Continue without it", "left out"
        case False:
            return f"without `{name}`", f"Give `{name} no`", "off"
        case True:
            return f"with `{name}`", "Give it again", "on"
    text = " ".join(map(str, value)) if isinstance(value, list) else str(value)
    return f"with `{name}` {text}", f"Continue with {text}", text
