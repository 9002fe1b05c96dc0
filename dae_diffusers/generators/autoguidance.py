"""The weaker version of a transformer that guides it: its own weights after fewer steps."""

import logging
from typing import Any

from diffusers import ModelMixin

from dae_diffusers.engine.loop import Loop
from dae_diffusers.engine.run import TrainingRun
from dae_diffusers.errors import UserError
from dae_diffusers.store import replace_folder

logger = logging.getLogger(__name__)


class WeakerWeights:
    r"""
    Keeps the averaged weights after `autoguidance_steps` steps N, in `<folder>/guidance_transformer/step-<N>`. Source:
    autoguidance, Karras et al., 2024, https://huggingface.co/papers/2406.02507.

    Args:
        run ([`~dae_diffusers.engine.run.TrainingRun`]): With `autoguidance_steps` in the part `flow` of its config.
        transformer (`ModelMixin`): The transformer, for its class.
        step (`int`): Steps done; after `autoguidance_steps` the weights are read.
        steps (`int`): Steps of the whole training.

    Raises:
        UserError: If there will be no such step, or it is over and its weights are not there.
    """

    def __init__(self, run: TrainingRun, transformer: ModelMixin, step: int, steps: int):
        self.run, self.at = run, run.config.flow.autoguidance_steps
        self.folder, self.model_class = run.folder / "guidance_transformer" / f"step-{self.at}", type(transformer)
        self.model: ModelMixin | None = None
        if self.at is None or run.dry_run is not None:
            return
        if self.at >= steps:
            raise UserError(
                f"`--autoguidance_steps` {self.at} must be below the {steps} steps of the training; a third, {max(1, steps // 3)}, is "
                "a good start."
            )
        if step >= self.at:
            if not (self.folder / "config.json").exists():
                raise UserError(
                    f"`--autoguidance_steps` {self.at} was given, but the run goes on at step {step} and has kept no weights of "
                    f"step {self.at}. Leave it out, give a later step, or begin again in another `--output_dir`."
                )
            self._load()

    def parts(self) -> dict[str, Any]:
        r"""What it adds to the pipeline."""
        return {} if self.model is None else {"guidance_transformer": self.model}

    def follow(self, loop: Loop) -> None:
        r"""Keeps the weights if it is time. Call it after each step, on all processes."""
        if loop.step != self.at or self.run.dry_run is not None:
            return
        with loop.averaged() as model:
            if self.run.accelerator.is_main_process:
                replace_folder(self.folder, model.save_pretrained)
        self.run.accelerator.wait_for_everyone()
        self._load()
        logger.info("step %d: kept these weights as `guidance_transformer`", loop.step)

    def _load(self) -> None:
        self.model = self.model_class.from_pretrained(self.folder).eval().to(self.run.accelerator.device)
