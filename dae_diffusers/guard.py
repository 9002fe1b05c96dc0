"""Stops a run before an update from a loss or gradient that is not finite, or leaves a few such updates out."""

import logging
from pathlib import Path

import torch
from accelerate import Accelerator

from dae_diffusers.checkpointing import whole_tensor
from dae_diffusers.errors import UserError

logger = logging.getLogger(__name__)


class NonFiniteGuard:
    r"""
    Watches losses and gradient norms, and decides before each update, on all processes alike.

    Nothing is read back from the device before [`allows`], once an update.

    Args:
        accelerator ([`~accelerate.Accelerator`]): Of the run.
        tolerated (`int`): Updates of the whole run that may be left out; 0: stop at the first.
        folder (`Path`): The run's, for the message.

    Attributes:
        skipped (`int`): Updates left out so far.
    """

    def __init__(self, accelerator: Accelerator, tolerated: int, folder: Path):
        self.accelerator = accelerator
        self.tolerated = tolerated
        self.folder = folder
        self.skipped = 0
        self._step = 0
        self._skipped_step = -1
        self._terms: dict[str, torch.Tensor] = {}
        self._watched: list[tuple[int, dict[str, torch.Tensor]]] = []

    def note(self, name: str, value: torch.Tensor) -> None:
        r"""Remembers a term of the loss of this micro-batch, so that it can be named."""
        self._terms[name] = value

    def watch(self, loss: torch.Tensor, step: int, microbatch: int) -> None:
        r"""
        Watches a micro-batch. Call it before its backward pass.

        Args:
            loss (`torch.Tensor`): Scalar.
            step (`int`): The update that it belongs to, counted from 1.
            microbatch (`int`): Its number in the whole run, counted over all processes.
        """
        self._step = step
        self._watched.append((microbatch, {**self._terms, "loss": loss.detach()}))
        self._terms = {}

    def allows(self, gradient_norm: torch.Tensor, name: str = "gradient norm") -> bool:
        r"""
        Whether the optimiser may step. All processes call it, between the backward pass and the step.

        Args:
            gradient_norm (`torch.Tensor`): Scalar. With fp16 it may be infinite: the loss scaling leaves such steps out.
            name (`str`, *optional*): For the message.

        Raises:
            UserError: When more updates than tolerated would be left out; names step, term and micro-batch.
        """
        watched, self._watched = self._watched, []
        gradient_norm = torch.as_tensor(gradient_norm, device=self.accelerator.device)  # DeepSpeed gives a number
        seen = [losses["loss"] for _, losses in watched]
        if self.accelerator.mixed_precision != "fp16":
            seen.append(whole_tensor(gradient_norm.detach()))
        if not seen:
            return True
        num_bad = (~torch.isfinite(torch.stack([value.float().reshape(()) for value in seen]))).sum()
        if self.accelerator.num_processes > 1:
            num_bad = self.accelerator.reduce(num_bad, reduction="sum")
        if not int(num_bad):
            return True
        if self._skipped_step != self._step:  # the discriminator of a step already left out does not count
            self.skipped += 1
            self._skipped_step = self._step
        what = self._describe(watched, gradient_norm, name)
        if self.skipped <= self.tolerated:
            logger.warning(
                "%s: this update is left out, %d of `--skip_nonfinite` %d.", what, self.skipped, self.tolerated
            )
            return False
        raise UserError(
            f"{what}; the weights were left as they were before this update. Lower `--learning_rate`, or use "
            "`--mixed_precision bf16` instead of fp16, and continue from the last checkpoint in "
            f"{self.folder / 'checkpoints'} with `--resume_from_checkpoint latest`. `--skip_nonfinite N` leaves out up to "
            "N such updates."
        )

    def _describe(self, watched: list, gradient_norm: torch.Tensor, name: str) -> str:
        for microbatch, losses in watched:
            for term, value in losses.items():
                if not torch.isfinite(value).all():
                    return f"`{term}` became {float(value)} at step {self._step}, in micro-batch {microbatch}"
        if not torch.isfinite(gradient_norm):
            return f"`{name}` became {float(gradient_norm)} at step {self._step}"
        return f"a loss of another process was not finite at step {self._step}"
