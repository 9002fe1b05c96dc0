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
import yaml
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
from dae_diffusers.engine.hub_checkpoints import HubCheckpoints
from dae_diffusers.engine.log import RunLog, read_log
from dae_diffusers.engine.plan import Plan
from dae_diffusers.engine.precision import use_tf32
from dae_diffusers.engine.settings import RunConfig, steps_of
from dae_diffusers.errors import ConfigError, UserError
from dae_diffusers.hub.publisher import Publisher
from dae_diffusers.hub.results import UNFINISHED, remove_leftovers
from dae_diffusers.locks import take_folder
from dae_diffusers.script import num_cores, show_messages
from dae_diffusers.settings import config_text, flags_of, flat, is_of_one_run, without_paths
from dae_diffusers.signals import launcher_pid
from dae_diffusers.store import bring_back, read_json_or, write_atomically, write_json

logger = logging.getLogger(__name__)

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
        plan ([`~dae_diffusers.engine.plan.Plan`]): What the run must keep when it goes on. [`find_start`] sets it.
        counts (`dict[str, int]`): Numbers for `run.json` and the model card. [`find_start`] sets them.
        has_steps (`bool`): Whether steps were left when it began; else it only repeats what comes after them. [`begin`] sets it.
        weights_before (`dict[str, str]` or `None`): Fingerprints of the result that this run saved when it ended before. [`begin`] sets it.

    Raises:
        UserError: If the folder holds another run, is in use, or cannot be written.
    """

    def __init__(self, name: str, config: Any, *, one_model: bool = False, folder: str | None = None):
        self.name = name
        self.config = config
        self.accelerator = make_accelerator(config, Path(config.run.output_dir) / (folder or name))
        self.dry_run = DryRun(self.accelerator, config.optimization.compile) if config.run.dry_run else None
        self.output_dir = Path(config.run.output_dir) if self.dry_run is None else self.dry_run.folder
        self.folder = self.output_dir / (folder or name)
        settle_backend(name, config, self.accelerator, one_model)
        start_messages(self.accelerator)
        use_tf32(config.optimization.allow_tf32)
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
        self.has_steps = True
        self.weights_before: dict[str, str] | None = None
        self._publisher: Publisher | None = None
        if config.hub.push_to_hub and self.accelerator.is_main_process and self.dry_run is None:
            self._publisher = Publisher(config.hub, self.output_dir, self.folder)
        self._hub_checkpoints: HubCheckpoints | None = None
        if config.hub.push_to_hub and config.hub.hub_strategy == "checkpoint" and self.dry_run is None:
            if self._publisher is not None:
                self._hub_checkpoints = HubCheckpoints(self._publisher, self.checkpointer)
                self._hub_checkpoints.fetch(config.run.resume_from_checkpoint)
            self.accelerator.wait_for_everyone()
        self._record: dict[str, Any] | None = None
        self._started = time.monotonic()
        # `find_start` sets these.
        self.plan: Plan
        self.counts: dict[str, int]

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
        return self.plan.last_step

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
        settings: dict[str, Any],
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
            settings (`dict`): Settings that determine the model, by name; a resumed run must have the same, and images of the same size.
            counts (`dict[str, int]`): Numbers for `run.json` and the model card, such as `training_images`.
            steps (`dict[str, int]`): Optimiser steps of each stage, in order, by the name of their setting.
            may_lack (`Collection[str]`, *optional*): Names of inputs that checkpoints of earlier versions do not know.
            classes (`dict[int, str]`, *optional*): Names of the classes, which other images must have too.

        Raises:
            UserError: If the checkpoint was made from other inputs, more or fewer, or with another plan, or no checkpoint can be used.
        """
        data, self.counts = self.config.data, counts
        of_images = {
            "resolution": data.resolution,
            "balance_classes": data.balance_classes or None,
            "pad": data.pad,
            "group_column": data.group_column,
            "drop_copies": data.drop_copies or None,
        }
        names = None if classes is None else list(classes.values())
        self.plan = Plan(without_paths(settings | of_images), steps, self.images_per_step, inputs, names)
        if self.resumed is None:
            return Start()
        path, manifest = self.resumed
        before = Plan.from_state(manifest["state"], default=self.plan)
        self.plan = self.plan.resume(
            before,
            path,
            manifest["step"],
            accepts_images=self.config.run.accept_changed_images,
            is_stream=data.streaming,
            num_epochs=self.config.optimization.num_train_epochs,
            may_lack=may_lack,
        )
        logger.info("resuming from %s", path)
        if before.last_step != self.last_step:
            logger.info(
                "the run ends after %d steps instead of %d; from here on the learning rate follows the schedule for the new length",
                self.last_step,
                before.last_step,
            )
        self._restore(manifest)
        return Start(path, manifest["step"], manifest["state"])

    def _restore(self, manifest: dict[str, Any]) -> None:
        """Gives guard, log and batches what they have put into the checkpoint. Warns if another number of processes has made it."""
        state = manifest["state"]
        self.guard.skipped = state.get("skipped", 0)
        self.log.load_state(state["log_sums"], state.get("log_counts"))
        self.batches.load_state(state.get("stream"))
        if manifest["num_processes"] != self.accelerator.num_processes:
            logger.warning(
                "the checkpoint comes from %d processes, this run has %d. The result stays the same, up to rounding, only if "
                "`--train_batch_size` and the product of processes and `--gradient_accumulation_steps` stay the same.",
                manifest["num_processes"],
                self.accelerator.num_processes,
            )

    def begin(self, step: int, rows_of_step: int | None = None) -> None:
        r"""
        Sets aside what a resumed run has left behind after `step`, writes the run's settings and opens its log at `step`, unless that
        has been done. All processes call it. Arguments are those of [`RunLog.begin`].
        """
        if self._record is not None:
            return
        self._record, self.has_steps = {}, step < self.last_step
        self.checkpointer.set_aside_after(step)
        if self.accelerator.is_main_process:
            if self.resumed is not None and (changed := self._changed_settings(self.resumed[0])):
                logger.warning("from here on other settings hold than before: %s", ", ".join(changed))
            write_atomically(self.folder / "config.yaml", config_text(self.config))
            before = read_json_or(self.folder / "run.json", {}) if step > 0 else {}
            self.weights_before = before.get("weights")
            kept = {name: before[name] for name in ("weights", "exported_step", UNFINISHED) if name in before}
            self._record = {
                # Until it ends, a result in the output folder is of other weights than the log.
                **({UNFINISHED: True} if self.has_steps else kept),
                "command": f"accelerate launch -m dae_diffusers.training.{self.name} {shlex.join(flags_of(self.config))}",
                "hardware": describe_hardware(self.accelerator),
                "versions": {name: importlib.metadata.version(name) for name in _VERSIONS},
                "counts": self.counts,
                "steps": self.plan.steps,
                "inputs": self.plan.inputs,
                **({"images_changed": self.plan.images_changed} if self.plan.images_changed else {}),
                "local_data": self.config.data.is_local,
                "seconds": _seconds_before(self.folder / "run.json") if step > 0 else 0.0,
            }
            self._write_record()
        trackers = self.config.run
        project = trackers.tracker_project_name or os.environ.get("WANDB_PROJECT") or "dae_diffusers"
        name = trackers.tracker_run_name or f"{self.output_dir.resolve().name}-{self.folder.name}"
        shown = {name: value for name, value in flat(self.config).items() if value is not None}
        is_simple = (bool, int, float, str)
        shown = {k: v if isinstance(v, is_simple) else str(v) for k, v in shown.items()}
        self.log.begin(step, project, name, shown, rows_of_step)

    def save_checkpoint(
        self, step: int, *, averages: dict[str, EMAModel] | None = None, only_state: bool = False, **state: Any
    ) -> None:
        r"""
        Saves everything needed to go on from here, the means that are being gathered for the log included.

        Args:
            step (`int`): Optimiser steps done.
            averages (`dict[str, EMAModel]`, *optional*): Moving averages, by name.
            only_state (`bool`, *optional*, defaults to `False`): Whether this step's checkpoint is there, and only `state` is new.
            state: Anything JSON can hold; [`find_start`] gives it back.
        """
        state |= {
            "skipped": self.guard.skipped,
            "stream": self.batches.state(),
            **self.plan.state(),
            **self.log.state(),
        }
        if only_state:
            self.checkpointer.update(step, **state)
            self._write_record()
            return
        checkpoint = self.checkpointer.save(step, averages=averages, **state)
        self._write_record()
        if self._hub_checkpoints is not None:
            self._hub_checkpoints.push(checkpoint, step)

    def finish_upload(self) -> None:
        r"""With `hub_strategy checkpoint`: waits until the newest checkpoint is on the Hub. Needed before the process ends."""
        if self._hub_checkpoints is not None:
            self._hub_checkpoints.finish()

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
        if self.accelerator.is_main_process:
            self._record.pop(UNFINISHED, None)
        self._write_record()
        self.accelerator.wait_for_everyone()
        self.log.finish()
        self.accelerator.end_training()  # ends the process group: no process waits for the upload
        self._lock.release()
        self.finish_upload()
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

    def _changed_settings(self, checkpoint: Path) -> list[str]:
        """The settings of training that differ from those of the run of a checkpoint, in words; its plan tells of the others."""
        try:
            before = yaml.safe_load((checkpoint.parent.parent / "config.yaml").read_text(encoding="utf-8"))
        except (OSError, ValueError, yaml.YAMLError):  # of a checkpoint alone, such as one from the Hub
            return []
        known = {*self.plan.settings, *self.plan.steps, "num_train_epochs", *(flat(self.config.run).keys() - {"seed"})}
        now = without_paths(yaml.safe_load(config_text(self.config)))
        return [
            f"`{name}` {now[name]} (was {value})"
            for name, value in without_paths(before if isinstance(before, dict) else {}).items()
            if name in now and now[name] != value and name not in known and not is_of_one_run(name)
        ]

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
            bring_back(self.output_dir)
        self.accelerator.wait_for_everyone()  # the others read what is there


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
        raise ConfigError(f"`report_to {tracker}` needs a package: pip install {tracker.replace('_', '-')}")
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


def _seconds_before(path: Path) -> float:
    seconds = read_json_or(path, {}).get("seconds")
    return seconds if isinstance(seconds, (int, float)) else 0.0
