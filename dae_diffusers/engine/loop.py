"""The training loop: everything from a batch to a checkpoint that is the same for every model."""

import functools
import math
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import Dataset
from tqdm.auto import tqdm

from dae_diffusers.duration import Forecast
from dae_diffusers.engine.distributed import whole_model
from dae_diffusers.engine.guard import raise_if_not_finite_weights
from dae_diffusers.engine.heartbeat import Heartbeat
from dae_diffusers.engine.optimization import ema_weights, make_ema, make_lr_scheduler, make_optimizer, trainable
from dae_diffusers.engine.post_hoc_ema.averages import PostHocAverages
from dae_diffusers.engine.post_hoc_ema.settings import PostHocEMAConfig
from dae_diffusers.engine.precision import faster_precision
from dae_diffusers.engine.run import TrainingRun
from dae_diffusers.randomness import seed_microbatch
from dae_diffusers.signals import StopSignal, resuming_command
from dae_diffusers.store import finite_or_none

# State of a checkpoint that was saved before the measurements of its step.
_TO_REPEAT = "step_to_repeat"


class Loop:
    r"""
    Trains a model, one [`Step`] after another.

    ```python
    loop = Loop(run, transformer, steps=1000)
    for step in loop.over(images):
        for batch in step:  # micro-batches
            loss = loss_of(loop.model, batch)
            step.add(loss=loss)
            step.backward(loss)
        if step.validates:
            with loop.averaged() as model:
                step.write({"validation/loss": validate(model)})
    model = loop.finished_model()
    ```

    After the last micro-batch of a step, it guards against losses that are not finite, clips, updates, averages the weights and
    logs. After the body of the loop, it saves a checkpoint if one is due, and ends the process if a signal has asked for that.

    Args:
        run ([`~dae_diffusers.engine.run.TrainingRun`]): The run, with its settings and checkpoints.
        model (`nn.Module`): The model to train. It is prepared, and its weights averaged, here.
        steps (`int`): Optimiser steps.
        first_step (`int`, *optional*, defaults to 0): Steps of the run before this loop, such as those of an earlier stage.
        step (`int`, *optional*): Steps of the run that are done; default: `first_step`.
        checkpoint (`Path`, *optional*): The checkpoint to continue from.
        description (`str`, *optional*): Text of the progress bar.
        headline (`str`, *optional*, defaults to `"loss"`): The value that the progress bar shows.
        learning_rate (`float`, *optional*): Peak learning rate; default: that of the settings.
        also (`Iterable[nn.Module]`): Prepared models whose parameters the same optimiser trains, such as a projector.
        others (`Iterable[nn.Module]`): Prepared models with an optimiser of their own, such as a discriminator.
        after_step (`Callable`, *optional*): Called after the last micro-batch of a step, such as a codebook's update.
        after_skip (`Callable`, *optional*): Called if the guard skips an update.
        snapshot (`tuple[str, Callable]`, *optional*): What `hub_strategy every_save` uploads: its name, and a function that saves
            it, which takes the model with averaged weights and a folder.
        post_hoc ([`~dae_diffusers.engine.post_hoc_ema.settings.PostHocEMAConfig`], *optional*): Which averages are kept to choose
            from afterwards.
        state: Other state to save with each checkpoint.
    """

    def __init__(
        self,
        run: TrainingRun,
        model: torch.nn.Module,
        *,
        steps: int,
        first_step: int = 0,
        step: int | None = None,
        checkpoint: Path | None = None,
        description: str = "Training",
        headline: str = "loss",
        learning_rate: float | None = None,
        also: Iterable[torch.nn.Module] = (),
        others: Iterable[torch.nn.Module] = (),
        after_step: Callable[[], None] | None = None,
        after_skip: Callable[[], None] | None = None,
        snapshot: tuple[str, Callable[[torch.nn.Module, Path], None]] | None = None,
        post_hoc: PostHocEMAConfig | None = None,
        state: dict[str, Any] | None = None,
    ):
        self.run, self.accelerator, config = run, run.accelerator, run.config.optimization
        self.first_step, self.last_step = first_step, first_step + steps
        self.step = first_step if step is None else step
        self.description, self.headline = description, headline
        self.after_step, self.after_skip = after_step, after_skip
        self.snapshot, self.state = snapshot, state or {}
        also = list(also)
        instead = {} if learning_rate is None else {"lr": learning_rate}
        optimizer = make_optimizer(config, [model, *also], self.accelerator.device, **instead)
        scheduler = make_lr_scheduler(config, optimizer, steps)
        self.model, self.optimizer, self.lr_scheduler = self.accelerator.prepare(model, optimizer, scheduler)
        self.accumulated = [self.model, *also, *others]
        self.parameters = trainable(self.model)  # FSDP has replaced them
        self.trained = trainable(self.model, *also)
        self.ema = make_ema(config, self.parameters, self.accelerator)
        self.averages = {} if self.ema is None else {"ema": self.ema}
        self.post_hoc = None
        if post_hoc is not None and post_hoc.post_hoc_ema:
            self.post_hoc = PostHocAverages(run, post_hoc, self.model, self.last_step)
            self.averages |= self.post_hoc.by_name
        self._to_repeat = None if checkpoint is None else run.resumed_state.get(_TO_REPEAT)
        self._saved_step: int | None = None  # whose checkpoint has the weights of now
        if checkpoint is not None:
            run.checkpointer.load(checkpoint, averages=self.averages)

    def over(self, dataset: Dataset) -> Iterator["Step"]:
        r"""Yields the steps that are left, on the batches of a data set. Before the first, the run's settings are written."""
        run, settings = self.run, self.run.config.run
        run.begin(self.step, None if self._to_repeat is None else self._to_repeat["rows"])
        if self.post_hoc is not None:
            self.post_hoc.begin(self.step)
        per_step = self.accelerator.num_processes * run.config.optimization.gradient_accumulation_steps
        self.microbatch = self.step * per_step + self.accelerator.process_index
        self.batches = run.batches.over(dataset, self.step * per_step)
        self.progress = make_progress_bar(self)
        is_compiled = run.config.optimization.compile
        forecast = Forecast(
            run.last_step,
            run.images_per_step,
            run.num_images,
            advice=faster_precision(self.accelerator),
            long_advice=None if is_compiled else "`--dry_run --compile` measures whether compiling would save time.",
        )
        self.model.train()
        if run.dry_run is not None:
            run.dry_run.begin(self)
        with StopSignal(self.accelerator) as stop, Heartbeat(self.accelerator, run.folder) as heartbeat:
            self._stop = stop
            while self.step < self.last_step or self._to_repeat is not None:
                step = self.present = Step(self, self._to_repeat)
                self._to_repeat = None
                yield step
                step.check_whole()
                heartbeat.beat(self.step)
                if run.dry_run is not None and run.dry_run.has_seen_step():
                    self._save_checkpoint()
                    break
                if run.dry_run is None and (text := forecast.after(self.step)):
                    self.show(text)
                if step.validates:
                    run.log.draw_curves()
                step.is_last = self.step == self.last_step
                if self.post_hoc is not None:
                    self.post_hoc.keep(self.step, self.last_step)
                is_due = self.step % settings.checkpointing_steps == 0 or step.is_last
                has_measured = step.is_repeated or self._saved_step == self.step
                if is_due or has_measured:  # what was measured is part of the state
                    self._save_checkpoint()
                if is_due and not step.is_last:
                    self._push_snapshot()
                if stop.requested():
                    if not (is_due or has_measured):
                        self._save_checkpoint()
                    self._leave()
        self.progress.close()
        self.accelerator.wait_for_everyone()

    @contextmanager
    def averaged(self) -> Iterator[torch.nn.Module]:
        r"""
        Gives the whole model with averaged weights in eval mode, inside the `with` block. All processes enter it, and all raise
        `UserError` if a weight is not finite.
        """
        with ema_weights(self.ema, self.parameters):
            raise_if_not_finite_weights(
                self.model, f"the model of step {self.step}", self.accelerator, cannot_be="validated"
            )
            model = whole_model(self.model, self.accelerator)
            was_training = model.training
            yield model.eval()
            model.train(was_training)

    @contextmanager
    def interruptible(self) -> Iterator[None]:
        r"""
        For measurements that take long, in the body of the loop: inside the `with` block, a signal ends the process at once. Nothing is
        lost, because a checkpoint is saved first. A run that goes on from it yields its step once more, without micro-batches. Enter it
        before [`averaged`].
        """
        step = self.present
        if not step.is_repeated:
            self._save_checkpoint(**{_TO_REPEAT: step.state()})
        if self._stop.requested():
            self._leave()
        try:
            with self._stop.at_once(self._exit):
                yield
        except SystemExit:
            self.run.finish_upload()
            raise

    def _leave(self) -> None:
        """Ends the run, after a signal. All processes call it."""
        self.progress.close()  # else it is drawn again after the last line
        self.run.finish_upload()
        self.accelerator.wait_for_everyone()  # a launcher ends all processes when the first one ends
        self._exit()

    def _exit(self) -> None:
        self.progress.close()
        self._stop.exit(step=self.step, command=resuming_command())

    def finished_model(self) -> torch.nn.Module:
        r"""Returns the unwrapped model, with averaged weights from now on. All processes call it."""
        if self.ema is not None:
            self.ema.copy_to(self.parameters)
        raise_if_not_finite_weights(self.model, "the trained model", self.accelerator)
        model = self.accelerator.unwrap_model(whole_model(self.model, self.accelerator), keep_fp32_wrapper=False)
        self.accelerator.free_memory()
        return model

    def stop(self) -> None:
        r"""Makes the present step the last one. Call it in the loop's body, on all processes."""
        self.last_step = self.step
        if self.present.means is None:
            self.present.write_means()

    def show(self, text: str) -> None:
        r"""Shows a line above the progress bar, on the main process: a bar that is switched off writes it, too."""
        if self.accelerator.is_main_process:
            self.progress.write(text)

    def _save_checkpoint(self, **state: Any) -> None:
        only_state = self._saved_step == self.step
        self.run.save_checkpoint(self.step, averages=self.averages, only_state=only_state, **self.state, **state)
        self._saved_step = self.step

    def _push_snapshot(self) -> None:
        if self.snapshot is not None:
            result, save = self.snapshot
            self.run.push_snapshot(self.step, result, functools.partial(self._save_snapshot, save))

    def _save_snapshot(self, save: Callable[[torch.nn.Module, Path], None], folder: Path) -> None:
        with ema_weights(self.ema, self.parameters):
            save(self.accelerator.unwrap_model(self.model), folder)


class Step:
    r"""
    One optimiser step: iterate over it for its micro-batches, and call [`backward`] in each.

    Attributes:
        done (`int`): Steps of the loop before this one.
        is_repeated (`bool`): Whether only its measurements are left, see [`Loop.interruptible`]. It has no micro-batches.
        validates (`bool`): After its micro-batches: whether a validation is due.
        is_last (`bool`): After its micro-batches: whether it is the loop's last.
        means (`dict[str, float]` or `None`): After its micro-batches: the means, if they were logged.
    """

    def __init__(self, loop: Loop, state: dict[str, Any] | None = None):
        self.loop = loop
        self.done = loop.step - loop.first_step
        self.is_repeated = state is not None
        self.validates, self.is_last = False, self.is_repeated and loop.step == loop.last_step
        self.means: dict[str, float] | None = None
        self._needs_backward = not self.is_repeated
        if state is not None:
            self.means, norm = state["means"], state["gradient_norm"]
            self.gradient_norm = math.nan if norm is None else norm

    def __iter__(self) -> Iterator[dict[str, torch.Tensor]]:
        if self.is_repeated:
            return
        loop, seed = self.loop, self.loop.run.config.run.seed
        while self._needs_backward or not loop.accelerator.sync_gradients:
            batch = next(loop.batches)
            seed_microbatch(seed, loop.microbatch)
            with loop.accelerator.accumulate(*loop.accumulated):
                self._needs_backward = True
                yield batch
                self.check_whole()
                if loop.after_step is not None and loop.accelerator.sync_gradients:
                    loop.after_step()
            loop.microbatch += loop.accelerator.num_processes
        self._end()

    def state(self) -> dict[str, Any]:
        r"""What a step that is repeated knows of its micro-batches, as JSON can hold it."""
        rows = self.loop.run.log.rows_of(self.loop.step)
        return finite_or_none({"means": self.means, "gradient_norm": float(self.gradient_norm), "rows": rows})

    @property
    def microbatch(self) -> int:
        r"""The number of the present micro-batch in the whole run, counted over all processes."""
        return self.loop.microbatch

    def add(self, **values: torch.Tensor) -> None:
        r"""Adds scalars of this micro-batch, whose means are logged."""
        for name, value in values.items():
            self.loop.run.guard.note(name, value.detach())
        self.loop.run.log.add(**values)

    def backward(self, loss: torch.Tensor) -> None:
        r"""
        Runs the backward pass of a micro-batch, and after the last one the update.

        Args:
            loss (`torch.Tensor`): Scalar.
        """
        loop, run = self.loop, self.loop.run
        run.guard.watch(loss, loop.step + 1, loop.microbatch)
        loop.accelerator.backward(loss)
        if loop.accelerator.sync_gradients:
            self.gradient_norm = loop.accelerator.clip_grad_norm_(loop.trained, run.config.optimization.max_grad_norm)
            if run.guard.allows(self.gradient_norm):
                loop.optimizer.step()
            elif loop.after_skip is not None:
                loop.after_skip()
        loop.optimizer.zero_grad()
        self._needs_backward = False

    def write(self, values: dict[str, float]) -> None:
        r"""Logs the values of a validation and shows them above the progress bar."""
        loop = self.loop
        loop.run.log.write(values, loop.step)
        if "validation/loss" in values and loop.accelerator.is_main_process:
            loop.run.log.check_overfitting(values["validation/loss"], loop.step)
        shown = ", ".join(f"{name} {value:.4g}" for name, value in values.items())
        loop.show(f"step {loop.step}: {shown}")

    def write_means(self) -> None:
        r"""Logs the means of the micro-batches since the last ones, and shows the loss in the progress bar."""
        loop = self.loop
        self.means = loop.run.log.write_means(
            loop.step, learning_rate=loop.lr_scheduler.get_last_lr()[0], gradient_norm=self.gradient_norm
        )
        if (loss := self.means.get(f"train/{loop.headline}")) is not None:  # else all updates were skipped
            loop.progress.set_postfix(loss=f"{loss:.4f}")

    def check_whole(self) -> None:
        r"""Raises `RuntimeError` if the loop's body left out a micro-batch or its backward pass."""
        if self._needs_backward:
            raise RuntimeError("every micro-batch of a step needs one call of `step.backward`.")

    def _end(self) -> None:
        loop, settings = self.loop, self.loop.run.config.run
        loop.lr_scheduler.step()
        loop.step += 1
        if loop.ema is not None:
            loop.ema.step(loop.parameters)
        if loop.post_hoc is not None:
            loop.post_hoc.step()
        loop.progress.update()
        self.is_last = loop.step == loop.last_step
        self.validates = loop.run.dry_run is None and (loop.step % settings.validation_steps == 0 or self.is_last)
        if loop.step % settings.logging_steps == 0 or self.is_last:
            self.write_means()


def make_progress_bar(loop: Loop) -> tqdm:
    """Over the optimiser steps of the whole run, on the main process."""
    return tqdm(
        total=loop.run.last_step,
        initial=loop.step,
        desc=loop.description,
        unit="step",
        disable=not loop.accelerator.is_local_main_process,
        dynamic_ncols=True,
        mininterval=0.2 if sys.stderr.isatty() else 20,  # seconds; a log file needs few lines
    )
