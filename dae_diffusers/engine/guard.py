"""Guards against numbers that are not finite: in a loss or gradient they stop the update, in weights they are never saved."""

import logging
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType, gather_object

from dae_diffusers.engine.sharding import local_tensor, whole_tensor
from dae_diffusers.errors import UserError

logger = logging.getLogger(__name__)

# The scale of the loss in fp16 begins at 65536 and halves at each overflow. A gradient that overflows below this is itself not finite.
_MIN_LOSS_SCALE = 1e-3


class NonFiniteGuard:
    r"""
    Watches losses and gradient norms, and makes the same decision on all processes before each update.

    It reads values back from the device only in [`allows`], once per update.

    Args:
        accelerator ([`~accelerate.Accelerator`]): The run's accelerator.
        tolerated (`int`): How many updates of the whole run may be skipped; 0: stop at the first.
        folder (`Path`): The run's folder, for the message.

    Attributes:
        skipped (`int`): Updates skipped so far.
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
            gradient_norm (`torch.Tensor`): Scalar. With fp16 it may be infinite: loss scaling skips such steps, until the scale is so
                small that it cannot be the cause.
            name (`str`, *optional*): Name of the gradient, for the message.

        Raises:
            UserError: If more updates than tolerated would be skipped; names step, term and micro-batch.
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
            self._check_loss_scale(gradient_norm, name)
            return True
        if self._skipped_step != self._step:  # the discriminator of a step already left out does not count
            self.skipped += 1
            self._skipped_step = self._step
        what = self._describe(watched, gradient_norm, name)
        if self.skipped <= self.tolerated:
            logger.warning(
                "%s: this update is skipped, %d of `--skip_nonfinite` %d.", what, self.skipped, self.tolerated
            )
            return False
        raise UserError(f"{what}; {self._advice()}")

    def check_validation(self, step: int, **values: torch.Tensor | float) -> None:
        r"""Raises `UserError` if a value of the validation after `step` updates is not finite: one of them has spoilt the weights."""
        for name, value in values.items():
            if not torch.isfinite(torch.as_tensor(value)).all():
                raise self._divergence(name.replace("_", " "), step)

    @contextmanager
    def drawing(self, step: int) -> Iterator[None]:
        r"""Raises `UserError` if the samples of the validation after `step` updates come from numbers that are not finite."""
        try:
            yield
        except FloatingPointError as error:
            raise self._divergence("samples", step) from error

    def _divergence(self, what: str, step: int) -> UserError:
        return UserError(
            f"the {what} at the validation of step {step} became NaN or infinite: training has diverged. {self._way_out()}"
        )

    def _check_loss_scale(self, gradient_norm: torch.Tensor, name: str) -> None:
        if self.accelerator.mixed_precision != "fp16" or self.accelerator.scaler is None:
            return
        if (
            not torch.isfinite(whole_tensor(gradient_norm))
            and (scale := self.accelerator.scaler.get_scale()) < _MIN_LOSS_SCALE
        ):
            what = self._describe([], gradient_norm, name)
            raise UserError(f"{what}, though the loss scale of fp16 has fallen to {scale:.2g}; {self._advice()}")

    def _advice(self) -> str:
        """What became of the weights, and what to do; fp16 and DeepSpeed do not take `skip_nonfinite`."""
        is_fp16 = self.accelerator.mixed_precision == "fp16"
        is_deepspeed = self.accelerator.distributed_type == DistributedType.DEEPSPEED
        weights = (
            "DeepSpeed has made this update within the backward pass, and the weights are lost"
            if is_deepspeed
            else "the weights were left as they were before this update"
        )
        skip = "" if is_fp16 or is_deepspeed else " `skip_nonfinite N` skips up to N such updates."
        return f"{weights}. {self._way_out()}{skip}"

    def _way_out(self) -> str:
        other = ", or use `mixed_precision bf16`," if self.accelerator.mixed_precision == "fp16" else ""
        return (
            f"Lower `learning_rate`{other} and continue from the last checkpoint in {self.folder / 'checkpoints'} with "
            "`resume_from_checkpoint latest`."
        )

    def _describe(self, watched: list, gradient_norm: torch.Tensor, name: str) -> str:
        for microbatch, losses in watched:
            for term, value in losses.items():
                if not torch.isfinite(value).all():
                    return f"`{term}` became {float(value)} at step {self._step}, in micro-batch {microbatch}"
        if not torch.isfinite(gradient_norm):
            return f"`{name}` became {float(gradient_norm)} at step {self._step}"
        return f"a loss of another process was not finite at step {self._step}"


def raise_if_not_finite_weights(
    weights: torch.nn.Module | Iterable[tuple[str, torch.Tensor]],
    what: str,
    accelerator: Accelerator | None = None,
    *,
    cannot_be: str = "saved",
) -> None:
    r"""
    Refuses weights that are not finite. Call it before weights are saved, exported or validated.

    Args:
        weights (`torch.nn.Module` or pairs of name and `torch.Tensor`): The weights to check.
        what (`str`): What they belong to, for the message, such as `"the transformer"`.
        accelerator ([`~accelerate.Accelerator`], *optional*): Give it if each process has a part or a copy of the weights. Then
            all processes call this function, and all raise.
        cannot_be (`str`, *optional*): What was about to be done with them, for the message.

    Raises:
        UserError: If a weight is NaN or infinite; names it.
    """
    named = weights.state_dict().items() if isinstance(weights, torch.nn.Module) else weights
    named = [(name, local_tensor(value.detach())) for name, value in named]
    named = [(name, value) for name, value in named if value.is_floating_point() and value.numel()]
    bad: set[str] = set()
    for device in {value.device for _, value in named}:  # one answer is read back from each device
        there = [(name, value) for name, value in named if value.device == device]
        flags = torch.stack([~torch.isfinite(value).all() for _, value in there]).tolist()
        bad |= {name for (name, _), is_bad in zip(there, flags, strict=True) if is_bad}
    found = [name for name, _ in named if name in bad]
    if accelerator is not None and accelerator.num_processes > 1:
        found = gather_object(found)
    if found:
        raise UserError(
            f"{what} cannot be {cannot_be}: {len(set(found))} of its weights are not finite, such as `{found[0]}`. Earlier files are "
            "unchanged. Lower `learning_rate`, and continue from the last checkpoint with `resume_from_checkpoint latest`."
        )
