"""A training run: its accelerator, its folder, its start, its checkpoints and its end."""

import importlib.metadata
import logging
import os
import shlex
import time
from collections.abc import Callable, Collection
from dataclasses import dataclass, field, replace
from functools import cached_property
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import GradientAccumulationPlugin, ProjectConfiguration, broadcast_object_list, set_seed
from diffusers.training_utils import EMAModel
from torch.utils.data import DataLoader, Dataset

from dae_diffusers.data.configuration import DEFAULT_CHANNELS, DEFAULT_RESOLUTION
from dae_diffusers.data.loaders import make_pass_loader
from dae_diffusers.engine.batches import TrainingBatches
from dae_diffusers.engine.checkpointing import Checkpointer, find_checkpoints
from dae_diffusers.engine.distributed import PROCESS_GROUP, describe_hardware, settle_backend
from dae_diffusers.engine.dry_run import DryRun
from dae_diffusers.engine.guard import NonFiniteGuard
from dae_diffusers.engine.log import RunLog, read_log
from dae_diffusers.engine.settings import RunConfig, steps_of
from dae_diffusers.errors import ConfigError, UserError
from dae_diffusers.hub.publisher import Publisher
from dae_diffusers.hub.results import remove_leftovers
from dae_diffusers.locks import take_folder
from dae_diffusers.script import num_cores, show_messages
from dae_diffusers.settings import config_text, flags_of, flat
from dae_diffusers.signals import launcher_pid
from dae_diffusers.store import read_json_or, write_atomically, write_json

logger = logging.getLogger(__name__)

TRAINING_IMAGES = "the training images"  # an input of a run, by the name in its checkpoints
_WAIT_HINT = ": raise `--dataloader_num_workers`, or train from cached latents"
_VERSIONS = ("dae-diffusers", "torch", "diffusers", "accelerate", "datasets")


@dataclass(frozen=True)
class Start:
    r"""
    Where a run begins.

    Attributes:
        checkpoint (`Path` or `None`): The checkpoint to continue from; None for a new run.
        step (`int`): Optimiser steps done.
        state (`dict`): What was saved with it.
    """

    checkpoint: Path | None = None
    step: int = 0
    state: dict[str, Any] = field(default_factory=dict)


class TrainingRun:
    r"""
    Everything around a training loop: accelerator, folder, checkpoints, log and batches.

    The script's own files lie in `<output_dir>/<name>/`: `config.yaml`, `log.jsonl` (every logged value), `curves.png`,
    `grids/`, `checkpoints/` and the trackers' files. Results (`vae/`, `pipeline/`) lie in `<output_dir>` itself, so that
    several scripts can share it.

    Args:
        name (`str`): Name of the script.
        config: A composed settings class with the parts `data`, `optimization`, `run` and `hub`.
        one_model (`bool`, *optional*, defaults to `False`): Whether the script trains only one model, which FSDP and DeepSpeed
            require.
        folder (`str`, *optional*): Name of the folder of the script's own files; default: `name`.

    Attributes:
        accelerator ([`~accelerate.Accelerator`]): Made from the config.
        checkpointer ([`~dae_diffusers.engine.checkpointing.Checkpointer`]): Saves and finds the run's checkpoints.
        guard ([`~dae_diffusers.engine.guard.NonFiniteGuard`]): Asked before each update.
        log ([`~dae_diffusers.engine.log.RunLog`]): Means, curves, grids, trackers.
        batches ([`~dae_diffusers.engine.batches.TrainingBatches`]): The training batches.
        output_dir, folder (`Path`): Folder of the results, and folder of the script's own files.

    Raises:
        UserError: If the folder holds another run, is in use, or cannot be written.
    """

    def __init__(self, name: str, config: Any, *, one_model: bool = False, folder: str | None = None):
        self.name = name
        self.config = config
        self.accelerator = make_accelerator(config, Path(config.run.output_dir) / (folder or name))
        self.dry_run = DryRun(self.accelerator) if config.run.dry_run else None
        self.output_dir = Path(config.run.output_dir) if self.dry_run is None else self.dry_run.folder
        self.folder = self.output_dir / (folder or name)
        settle_backend(name, config, self.accelerator, one_model)
        start_messages(self.accelerator)
        allow_tf32 = config.optimization.allow_tf32
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = allow_tf32
        set_seed(config.run.seed)
        self._take_folder()
        self.checkpointer = Checkpointer(
            self.accelerator, self.folder / "checkpoints", config.run.checkpoints_total_limit
        )
        self.guard = NonFiniteGuard(self.accelerator, config.run.skip_nonfinite, self.folder)
        self.log = RunLog(
            self.accelerator,
            self.folder,
            f"{self.output_dir.name}: {name}",
            skips_nonfinite=config.run.skip_nonfinite > 0,
        )
        self.batches = TrainingBatches(
            self.accelerator,
            batch_size=config.optimization.train_batch_size,
            seed=config.run.seed,
            num_workers=config.data.dataloader_num_workers,
            balanced=config.data.balance_classes,
        )
        self._publisher: Publisher | None = None
        if config.hub.push_to_hub and self.accelerator.is_main_process and self.dry_run is None:
            self._publisher = Publisher(config.hub, self.output_dir, self.folder)
        self._record: dict[str, Any] | None = None
        self._classes: list[str] | None = None
        self._images_changed: list[int] = []  # steps at which a resumed run went on with other images
        self._started = time.monotonic()

    @property
    def images_per_step(self) -> int:
        r"""Images that one optimiser step sees, over all processes."""
        optimization = self.config.optimization
        return optimization.train_batch_size * optimization.gradient_accumulation_steps * self.accelerator.num_processes

    def num_steps(self, max_steps: int | None, images: Dataset) -> int | None:
        r"""Optimiser steps that the settings ask for: passes over the training images, or else `max_steps`; see [`steps_of`]."""
        num_images = None if self.config.data.streaming else len(images)
        return steps_of(max_steps, self.config.optimization.num_train_epochs, num_images, self.images_per_step)

    @property
    def last_step(self) -> int:
        r"""Optimiser steps of all stages together, once [`find_start`] knows them."""
        return sum(self._plan["steps"].values())

    @property
    def num_images(self) -> int | None:
        r"""Training images, once [`find_start`] knows them; None for a stream of unknown length."""
        return self.counts.get("training_images")

    @cached_property
    def resumed(self) -> tuple[Path, dict[str, Any]] | None:
        r"""
        The checkpoint that `resume_from_checkpoint` asks for, and its manifest; None for a new run. All processes ask for it.

        Raises:
            UserError: If no checkpoint can be used.
        """
        resume = None if self.dry_run else self.config.run.resume_from_checkpoint
        found = None if resume is None else self.checkpointer.newest(resume)
        if resume is not None and found is None:
            logger.warning("no checkpoint in %s yet: starting at step 0.", self.checkpointer.folder)
        return found

    @property
    def resumed_state(self) -> dict[str, Any]:
        r"""What the run put into the checkpoint that it goes on from; empty for a new run."""
        return {} if self.resumed is None else self.resumed[1]["state"]

    def find_start(
        self,
        inputs: dict[str, str],
        plan: dict[str, Any],
        counts: dict[str, int],
        steps: dict[str, int],
        *,
        may_lack: Collection[str] = (),
        classes: dict[int, str] | None = None,
    ) -> Start:
        r"""
        Finds where to begin: from nothing, or from the checkpoint that `resume_from_checkpoint` asks for. Writes nothing; that is
        done by [`begin`], once everything has been accepted.

        Args:
            inputs (`dict[str, str]`): Fingerprints of the run's inputs, such as its images, by name.
            plan (`dict`): Settings that determine the model, by name; a resumed run must have the same, and images of the same size.
            counts (`dict[str, int]`): Numbers for `run.json` and the model card, such as `training_images`.
            steps (`dict[str, int]`): Optimiser steps of each stage, in order, by the name of their setting.
            may_lack (`Collection[str]`, *optional*): Names of inputs that checkpoints of earlier versions do not know.
            classes (`dict[int, str]`, *optional*): Names of the classes, which other images must have too.

        Raises:
            UserError: If the checkpoint was made from other inputs, more or fewer, or with another plan, or no checkpoint can be used.
        """
        self._inputs, self.counts = inputs, counts
        data = self.config.data
        of_images = {"resolution": data.resolution, "balance_classes": data.balance_classes or None, "pad": data.pad}
        plan = plan | of_images
        self._classes = None if classes is None else list(classes.values())
        self._plan = {"settings": plan, "steps": steps, "images_per_step": self.images_per_step}
        if self.resumed is None:
            return Start()
        path, manifest = self.resumed
        step, state = manifest["step"], manifest["state"]
        inputs_before, plan_before = state.pop("inputs", inputs), state.pop("plan", None)
        self._images_changed, classes_before = state.pop("images_changed", []), state.pop("classes", None)
        if self._check_inputs(inputs, inputs_before, classes_before, path):
            self._images_changed.append(step)
        if self.config.optimization.num_train_epochs is not None:
            check_passes(self._plan, plan_before or {}, path)
        check_plan(self._plan, plan_before, step, path, self.config.optimization.num_train_epochs)
        for name in sorted((inputs.keys() ^ inputs_before.keys()) - set(may_lack)):
            was, now = ("without", "has") if name in inputs else ("with", "lacks")
            raise UserError(
                f"{path} was trained {was} {name}, which this run {now}. Continue with the same, or train in another `output_dir`."
            )
        logger.info("resuming from %s", path)
        planned, total = sum((plan_before or {}).get("steps", steps).values()), sum(steps.values())
        if planned != total:
            logger.info(
                "the run ends after %d steps instead of %d; from here on the learning rate follows the schedule for the new length",
                total,
                planned,
            )
        self.guard.skipped = state.pop("skipped", 0)
        self.log.load_state(state.pop("log_sums"), state.pop("log_counts"))
        self.batches.load_state(state.pop("stream", None))
        if manifest["num_processes"] != self.accelerator.num_processes:
            logger.warning(
                "the checkpoint comes from %d processes, this run has %d. The result stays the same, up to rounding, only if "
                "`--train_batch_size` and the product of processes and `--gradient_accumulation_steps` stay the same.",
                manifest["num_processes"],
                self.accelerator.num_processes,
            )
        return Start(path, step, state)

    def _check_inputs(
        self, inputs: dict[str, str], before: dict[str, str], classes_before: list[str] | None, path: Path
    ) -> bool:
        """Refuses inputs that have changed since a checkpoint. Returns whether the images have, and may."""
        # A stream has a position in its files.
        accepts = self.config.run.accept_changed_images and not self.config.data.streaming
        changed = [name for name, value in before.items() if inputs.get(name, value) != value]
        for name in changed:
            hint = ""
            if name == TRAINING_IMAGES and accepts:
                continue
            if name == TRAINING_IMAGES and not self.config.data.streaming:
                hint = " To go on with the new ones, pass `accept_changed_images`."
            elif accepts and TRAINING_IMAGES in changed:
                hint = " `accept_changed_images` accepts images alone, without captions or conditions of their own."
            raise UserError(
                f"{name} changed since {path} was saved (fingerprint {inputs[name]}, was {before[name]}). Continue "
                f"with the same, or train in another `output_dir`.{hint}"
            )
        if not changed:
            return False
        if classes_before not in (None, self._classes):
            raise UserError(
                f"the classes changed since {path} was saved: they were {classes_before} and are {self._classes}. "
                "`accept_changed_images` takes other images of the same classes."
            )
        logger.warning(
            "the training images changed since %s was saved: from here on the run learns from the new ones. Without a validation "
            "split of their own, others are held out now, some of which it may have seen.",
            path,
        )
        return True

    def begin(self, step: int) -> None:
        r"""
        Sets aside what a resumed run has left behind after `step`, writes the run's settings and opens its log at `step`, unless that
        has been done. All processes call it.
        """
        if self._record is not None:
            return
        self._record = {}
        self.checkpointer.set_aside_after(step)
        if self.accelerator.is_main_process:
            write_atomically(self.folder / "config.yaml", config_text(self.config))
            self._record = {
                "command": f"accelerate launch -m dae_diffusers.training.{self.name} {shlex.join(flags_of(self.config))}",
                "hardware": describe_hardware(self.accelerator),
                "versions": {name: importlib.metadata.version(name) for name in _VERSIONS},
                "counts": self.counts,
                **({"images_changed": self._images_changed} if self._images_changed else {}),
                "local_data": self.config.data.is_local,
                "seconds": _seconds_before(self.folder / "run.json") if step > 0 else 0.0,
            }
            self._write_record()
        simple = {k: v for k, v in flat(self.config).items() if isinstance(v, (bool, int, float, str))}
        self.log.begin(step, self.output_dir.resolve().name, simple)

    def save_checkpoint(self, step: int, *, averages: dict[str, EMAModel] | None = None, **state: Any) -> None:
        r"""
        Saves everything needed to go on from here, the means that are being gathered for the log included.

        Args:
            step (`int`): Optimiser steps done.
            averages (`dict[str, EMAModel]`, *optional*): Moving averages, by name.
            state: Anything JSON can hold; [`find_start`] gives it back.
        """
        self.checkpointer.save(
            step,
            averages=averages,
            inputs=self._inputs,
            plan=self._plan,
            skipped=self.guard.skipped,
            images_changed=self._images_changed,
            classes=self._classes,
            stream=self.batches.state(),
            **self.log.state(),
            **state,
        )
        self._write_record()

    def note(self, **values: Any) -> None:
        r"""Adds values to `run.json`, for the model card."""
        self._record.update(values)

    def pass_loader(self, dataset: Dataset, *, num_workers: int = 0) -> DataLoader:
        r"""One pass over this process's share, in batches of the training's size; see [`~dae_diffusers.data.make_pass_loader`]."""
        return make_pass_loader(
            dataset,
            batch_size=self.config.optimization.train_batch_size,
            process_index=self.accelerator.process_index,
            num_processes=self.accelerator.num_processes,
            num_workers=num_workers,
        )

    def push_snapshot(self, step: int, result: str, save: Callable[[Path], None]) -> None:
        r"""Uploads the present state of the model, if `hub_strategy` asks for it; see [`~dae_diffusers.hub.publisher.Publisher`]."""
        if self._publisher is not None:
            self._publisher.push_snapshot(step, result, save)

    def compile_blocks(self, blocks) -> None:
        r"""With `compile`: compiles the blocks of the models in place, so equal blocks share code and weights keep their names."""
        if self.config.optimization.compile:
            torch._functorch.config.donated_buffer = False  # adaptive weights go through a graph twice
            for block in blocks:
                block.compile()

    def next_command(self, script: str, **results: str) -> str:
        r"""
        The command of the script that comes next, on the same images.

        Args:
            script (`str`): Its name, such as `"train_dit"`.
            results: Flags that take a result of this run, by the name of its folder in the output folder.
        """
        given = self.config.data
        known = {"resolution": DEFAULT_RESOLUTION, "image_channels": DEFAULT_CHANNELS}  # to the model
        data = replace(given, **known, aspect_buckets=[])
        words = [word for flag, name in results.items() for word in (f"--{flag}", str(self.output_dir / name))]
        words += [*flags_of(data, whole_paths=True), *flags_of(RunConfig(seed=self.config.run.seed))]
        if given.aspect_buckets and script == "train_dit":
            words += ["--aspect_buckets", *map(str, given.aspect_buckets)]
        words += ["--output_dir", str(self.output_dir)]
        is_command = "DAE_DIFFUSERS_COMMAND" in os.environ
        module = f"accelerate launch -m dae_diffusers.training.{script}"  # also without a checkout
        start = f"dae-diffusers {script.replace('_', '-')}" if is_command else module
        return f"{start} {shlex.join(words)}"

    def finish(self, result: str | None) -> None:
        r"""
        Closes the log and pushes the result if asked to. A failed upload is only a warning.

        Args:
            result (`str` or `None`): The folder below `output_dir` to push, such as `vae`. None: the result is not whole yet.
        """
        share = self.batches.waiting_share
        if share is not None:
            if self.accelerator.is_main_process:
                self._record["data_wait_share"] = round(share, 4)
            logger.info(
                "the model waited for data %.1f %% of the time%s", 100 * share, _WAIT_HINT if share > 0.1 else ""
            )
        self._write_record()
        self.accelerator.wait_for_everyone()
        self.log.finish()
        self.accelerator.end_training()  # ends the process group: no process waits for the upload
        self._lock.release()
        if self._publisher is not None and result is not None:
            self._publisher.push_result(result)
        elif self._publisher is not None:
            logger.warning("nothing is pushed yet: the decoder is not finished. Then use `dae-diffusers push`.")

    def end_dry_run(self) -> bool:
        r"""
        Ends a dry run: says what the whole run would take, and removes the temporary folder. Returns whether it was one; if not, nothing
        happens. All processes call it.
        """
        if self.dry_run is None:
            return False
        if self.accelerator.is_main_process:
            self.dry_run.report(self)
        self.accelerator.end_training()
        self._lock.release()
        self.dry_run.close()
        return True

    def _write_record(self) -> None:
        """Writes `run.json`: how the result was made, for the model card. The time adds up over interruptions."""
        if self._record:
            now = time.monotonic()
            self._record["seconds"] += now - self._started
            self._started = now
            write_json(self.folder / "run.json", self._record)

    def _take_folder(self) -> None:
        self._lock, problem = take_folder(self.folder, self.accelerator), [None]
        # config.yaml does not tell: a run that failed before its first step has written it too.
        is_taken = bool(read_log(self.folder)) or bool(find_checkpoints(self.folder / "checkpoints"))
        is_resumed = self.config.run.resume_from_checkpoint is not None
        if self.accelerator.is_main_process and is_taken and not is_resumed:
            self._lock.release()
            problem = [
                f"`output_dir` {self.output_dir} holds another run of {self.name}. Continue it with "
                "`resume_from_checkpoint latest`, choose another folder, or remove "
                f"{self.folder} to start again."
            ]
        broadcast_object_list(problem)
        if problem[0]:
            raise UserError(problem[0])
        if self.accelerator.is_main_process:
            remove_leftovers(self.folder)


def make_accelerator(config: Any, folder: Path) -> Accelerator:
    r"""
    The accelerator of a training run.

    Args:
        config: A composed settings class with the parts `optimization` and `run`.
        folder (`Path`): Folder for the trackers' files.

    Raises:
        ConfigError: If a tracker is not installed, or the device lacks the precision.
    """
    tracker = None if config.run.dry_run else config.run.report_to
    if tracker not in (None, "all") and find_spec(tracker) is None:
        raise ConfigError(f"`report_to {tracker}` needs a package: pip install {tracker}")
    try:
        accelerator = Accelerator(
            kwargs_handlers=[PROCESS_GROUP],
            mixed_precision=config.optimization.mixed_precision,
            # As a plugin, which `ACCELERATE_GRADIENT_ACCUMULATION_STEPS` does not replace.
            gradient_accumulation_plugin=GradientAccumulationPlugin(
                num_steps=config.optimization.gradient_accumulation_steps
            ),
            step_scheduler_with_optimizer=False,  # a step is one optimiser update, whatever the process count
            log_with=tracker,
            project_config=ProjectConfiguration(project_dir=str(folder)),
        )
    except ValueError as error:  # a precision that the device lacks, a tracker that is not installed
        raise ConfigError(str(error)) from None
    if config.run.skip_nonfinite and accelerator.mixed_precision == "fp16":
        raise ConfigError(
            "`skip_nonfinite` does not go with fp16, whose loss scaling skips updates by itself. Use "
            "`mixed_precision bf16`, or leave the flag out."
        )
    return accelerator


def start_messages(accelerator: Accelerator) -> None:
    r"""Shows the log messages of the main process, and warns about settings that cost speed."""
    show_messages(accelerator.is_main_process)
    is_launchers_choice = launcher_pid() is not None and "DAE_DIFFUSERS_COMMAND" not in os.environ
    threads = num_cores() // max(1, accelerator.num_processes)
    if accelerator.device.type == "cpu" and is_launchers_choice and torch.get_num_threads() == 1 < threads:
        logger.warning(
            "one CPU thread of %d is in use, the launcher's default. Give it more: put `OMP_NUM_THREADS=%d` before the command.",
            threads,
            threads,
        )


def check_passes(plan: dict[str, Any], before: dict[str, Any], checkpoint: Path) -> None:
    r"""Raises `UserError` if a run of `num_train_epochs` has another number of images in a step than its checkpoint, and so other passes."""
    now, was = plan["images_per_step"], before.get("images_per_step", plan["images_per_step"])
    if now != was:
        steps = " and ".join(f"`{name} {number}`" for name, number in before["steps"].items())
        raise UserError(
            f"{checkpoint} was trained with {was} images in a step, but now they are {now}, so `num_train_epochs` would be another number "
            "of passes. Keep the product of `train_batch_size`, `gradient_accumulation_steps` and processes, or give steps instead of "
            f"passes: they were {steps}."
        )


def check_plan(
    plan: dict[str, Any], before: dict[str, Any] | None, step: int, checkpoint: Path, num_epochs: float | None = None
) -> None:
    r"""
    Checks that a run may continue from a checkpoint: with the same settings, the same steps of finished stages, and at least as
    many steps of the current stage as the checkpoint has done.

    Args:
        plan (`dict`): `settings` that must stay, by name; `steps` of each stage, in order, by the name of the setting.
        before (`dict`, *optional*): The plan of the checkpoint; None if it does not record one.
        step (`int`): Optimiser steps that the checkpoint has done.
        checkpoint (`Path`): The checkpoint, for the message.
        num_epochs (`float`, *optional*): The passes that the steps come from, for the message.

    Raises:
        UserError: If it may not. The message says what the checkpoint has done, and what may change.
    """
    settings, steps = plan["settings"], plan["steps"]
    before = before or {"settings": {}, "steps": {}}
    for name, value in before["settings"].items():
        if name in settings and settings[name] != value:
            was, again = (
                (f"without `{name}`", "without it")
                if value is None
                else (f"with `{name}` {_as_typed(value)}", f"with {_as_typed(value)}")
            )
            now = "left out" if settings[name] is None else _as_typed(settings[name])
            raise UserError(
                f"{checkpoint} was trained {was}, but now it is {now}. Continue {again}, or train in another `output_dir`."
            )
    begins, began = next(iter(steps)), next(iter(before["steps"]), None)
    if began not in (begins, None):
        raise UserError(
            f"{checkpoint} began with `{began}`, but this run begins with `{begins}`. Train in another `output_dir`."
        )
    give, go_on = "Give", "Continue"
    if num_epochs is not None:
        leave_out = f"Leave out `num_train_epochs` {num_epochs:g}, which says so, and"
        give, go_on = f"{leave_out} give `{{}}` of", f"{leave_out} continue"
    first = 0  # step at which a stage begins
    for position, (name, number) in enumerate(steps.items()):
        planned, is_last = before["steps"].get(name, number), position == len(steps) - 1
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


def _as_typed(value: Any) -> str:
    return " ".join(map(str, value)) if isinstance(value, list) else str(value)


def _seconds_before(path: Path) -> float:
    seconds = read_json_or(path, {}).get("seconds")
    return seconds if isinstance(seconds, (int, float)) else 0.0
