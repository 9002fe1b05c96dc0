"""What every training script needs around its loop: flags, an accelerator, a folder, logs, checkpoints, the Hub."""

import importlib.metadata
import json
import logging
import math
import os
import platform
import shlex
import shutil
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from datetime import timedelta
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import (
    DistributedType,
    InitProcessGroupKwargs,
    ProjectConfiguration,
    broadcast_object_list,
    gather_object,
    send_to_device,
    set_seed,
)
from diffusers import DiffusionPipeline
from diffusers.optimization import get_scheduler
from diffusers.training_utils import EMAModel
from PIL import Image
from torch.distributed.fsdp import FSDPModule, StateDictType
from torch.utils.data import DataLoader, Dataset
from tqdm.auto import tqdm
from transformers import PreTrainedModel

from dae_diffusers.checkpointing import Checkpointer, take_folder, whole_tensor
from dae_diffusers.cli import config_text, field, flags_of
from dae_diffusers.data import (
    ImageStream,
    StreamedImages,
    make_pass_loader,
    make_stream_loader,
    make_training_loader,
)
from dae_diffusers.errors import ConfigError, UserError
from dae_diffusers.guard import NonFiniteGuard
from dae_diffusers.hub import upload
from dae_diffusers.plots import image_grid, plot_curves
from dae_diffusers.randomness import derived_seed
from dae_diffusers.store import write_atomically

logger = logging.getLogger(__name__)

_WAIT_HINT = ": raise `--dataloader_num_workers`, or train from cached latents"
# The others wait while the main process prepares a data set or measures something: NCCL would give up after ten minutes.
PROCESS_GROUP = InitProcessGroupKwargs(timeout=timedelta(hours=6))

_VERSIONS = ("dae-diffusers", "torch", "diffusers", "accelerate", "datasets")


@dataclass
class OptimizationConfig:
    """Optimisation."""

    train_batch_size: int = field(64, "images per process and micro-batch")
    gradient_accumulation_steps: int = field(1, "micro-batches per optimiser step")
    learning_rate: float = field(1e-3, "peak learning rate")
    lr_scheduler: Literal["constant", "constant_with_warmup", "linear", "cosine"] = field(
        "cosine", "schedule of the learning rate"
    )
    lr_warmup_steps: int = field(100, "steps over which the learning rate rises (not with `constant`)")
    adam_beta1: float = field(0.9, "AdamW's first decay")
    adam_beta2: float = field(0.99, "AdamW's second decay")
    adam_weight_decay: float = field(0.0, "AdamW's weight decay")
    max_grad_norm: float = field(1.0, "clip the gradient's norm to this")
    use_ema: bool = field(True, "keep an exponential moving average of the weights, and export that")
    ema_decay: float = field(0.999, "its decay (it warms up by itself)")
    mixed_precision: Literal["no", "fp16", "bf16"] | None = field(
        None, "autocast; the weights stay float32; default: what `accelerate` is configured to"
    )
    gradient_checkpointing: bool = field(False, "recompute activations in the backward pass to save memory")
    compile: bool = field(False, "compile the networks, block by block: slow first steps, faster ones after that")
    allow_tf32: bool = field(False, "TF32 matrix products on GPUs that have them")

    def __post_init__(self):
        for name in ("train_batch_size", "gradient_accumulation_steps"):
            if getattr(self, name) < 1:
                raise ConfigError(f"`--{name}` is {getattr(self, name)}, but must be at least 1.")
        for name in ("learning_rate", "max_grad_norm"):
            if not getattr(self, name) > 0:
                raise ConfigError(f"`--{name}` is {getattr(self, name)}, but must be above 0.")
        for name in ("ema_decay", "adam_beta1", "adam_beta2"):
            if not 0 <= getattr(self, name) < 1:
                raise ConfigError(f"`--{name}` is {getattr(self, name)}, but must be at least 0 and below 1.")
        if self.lr_warmup_steps < 0:
            raise ConfigError(f"`--lr_warmup_steps` is {self.lr_warmup_steps}, but must be 0 or more.")


@dataclass
class RunConfig:
    """Run."""

    output_dir: str = field("runs/my-model", "folder for everything that is made")
    seed: int = field(0, "of weights, data order, augmentation and noise; same seed, same machine: same weights")
    checkpointing_steps: int = field(1000, "save the training state every this many steps")
    checkpoints_total_limit: int | None = field(2, "keep only the newest this many checkpoints")
    resume_from_checkpoint: str | None = field(None, "`latest`, or the folder of a checkpoint")
    skip_nonfinite: int = field(0, "leave out up to this many updates whose loss or gradient is not finite; 0: stop")
    logging_steps: int = field(50, "log the training losses every this many steps (means over them)")
    validation_steps: int = field(500, "validate every this many steps, and at the end")
    report_to: Literal["tensorboard", "wandb", "trackio", "all"] | None = field(
        None, "also log to a tracker; log.jsonl and curves.png are always written"
    )
    push_to_hub: bool = field(False, "upload the result to the Hub, with a model card; see also training/push.py")
    hub_model_id: str | None = field(None, "repository on the Hub; default: the output folder's name, in your account")
    hub_private: bool = field(False, "make the repository private")
    hub_license: str | None = field(None, "license of the weights, an identifier of the Hub; yours to choose")
    hub_strategy: Literal["end", "every_save"] = field(
        "end", "end: upload the result; every_save: also at each checkpoint, in the background"
    )

    def __post_init__(self):
        for name in ("checkpointing_steps", "checkpoints_total_limit", "logging_steps", "validation_steps"):
            if getattr(self, name) is not None and getattr(self, name) < 1:
                raise ConfigError(f"`--{name}` is {getattr(self, name)}, but must be at least 1.")
        for name in ("seed", "skip_nonfinite"):
            if getattr(self, name) < 0:
                raise ConfigError(f"`--{name}` is {getattr(self, name)}, but must be 0 or more.")


class TrainingRun:
    r"""
    The surroundings of a training loop.

    The script's own files lie in `<output_dir>/<name>/`: `config.yaml`, `log.jsonl` (every logged value), `curves.png`,
    `grids/`, `checkpoints/` and the trackers' files. Results (`vae/`, `pipeline/`) lie in `<output_dir>` itself, so that
    several scripts can share it.

    Args:
        name (`str`): The script's.
        config: A dataclass with the fields of [`RunConfig`] and [`OptimizationConfig`].
        one_model (`bool`, *optional*, defaults to `False`): Whether the script trains one model only, whose weights it takes
            from [`whole_model`], as FSDP and DeepSpeed need it.

    Attributes:
        accelerator ([`~accelerate.Accelerator`]): Made from the config.
        checkpointer ([`~dae_diffusers.checkpointing.Checkpointer`]): Of this run.
        guard ([`~dae_diffusers.guard.NonFiniteGuard`]): Asked before each update.
        output_dir, folder (`Path`): Of the results; of the script's own files.

    Raises:
        UserError: If the folder holds another run, is in use by one, or cannot be written.
    """

    def __init__(self, name: str, config: Any, *, one_model: bool = False):
        self.name = name
        self.config = config
        self.output_dir = Path(config.output_dir)
        self.folder = self.output_dir / name
        if config.report_to not in (None, "all") and find_spec(config.report_to) is None:
            raise ConfigError(f"`--report_to {config.report_to}` needs a package: pip install {config.report_to}")
        try:
            self.accelerator = Accelerator(
                kwargs_handlers=[PROCESS_GROUP],
                mixed_precision=config.mixed_precision,
                gradient_accumulation_steps=config.gradient_accumulation_steps,
                step_scheduler_with_optimizer=False,  # a step is one optimiser update, whatever the process count
                log_with=config.report_to,
                project_config=ProjectConfiguration(project_dir=str(self.folder)),
            )
        except ValueError as error:  # a precision that the device lacks, a tracker that is not installed
            raise ConfigError(str(error)) from None
        if config.skip_nonfinite and self.accelerator.mixed_precision == "fp16":
            raise ConfigError(
                "`--skip_nonfinite` does not go with fp16, whose loss scaling leaves updates out by itself. Use "
                "`--mixed_precision bf16`, or leave the flag out."
            )
        if self.accelerator.distributed_type == DistributedType.FSDP:
            _check_fsdp(name, config, self.accelerator, one_model)
        if self.accelerator.distributed_type == DistributedType.DEEPSPEED:
            settle_deepspeed(name, config, self.accelerator, one_model)
        logging.basicConfig(
            format="%(message)s", level=logging.INFO if self.accelerator.is_main_process else logging.ERROR
        )
        for chatty in ("httpx", "accelerate"):
            logging.getLogger(chatty).setLevel(logging.WARNING)
        if self.accelerator.device.type == "cpu" and torch.get_num_threads() == 1 < (os.cpu_count() or 1):
            logger.warning(
                "one CPU thread of %d is in use, accelerate's default. Give it more: "
                "`accelerate launch --num_cpu_threads_per_process %d ...`",
                os.cpu_count(),
                os.cpu_count(),
            )
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = config.allow_tf32
        set_seed(config.seed)
        self._take_folder()
        self.checkpointer = Checkpointer(self.accelerator, self.folder / "checkpoints", config.checkpoints_total_limit)
        self.guard = NonFiniteGuard(self.accelerator, config.skip_nonfinite, self.folder)
        if config.push_to_hub and self.accelerator.is_main_process:
            self.hub_model_id = upload.check_hub_access(
                config.hub_model_id or self.output_dir.resolve().name,
                private=config.hub_private,
                license=config.hub_license,
            )
        self._upload = upload.BackgroundUpload(self.folder / "hub")
        self._record: dict[str, Any] = {}
        self._started = time.monotonic()
        self._tracker_failed = False
        self._marks: dict[str, int] = {}
        self._stream: ImageStream | None = None
        self._stream_state: dict[str, Any] | None = None
        self._num_batches = 0  # taken from the present loader
        self._training_seconds = self._waiting_seconds = 0.0
        self._sums: dict[str, torch.Tensor] = {}
        self._counts: dict[str, int] = {}

    def start(self, inputs: dict[str, str], **counts: int) -> tuple[Path | None, int, dict[str, Any]]:
        r"""
        Finds where to begin: from nothing, or from the checkpoint that `--resume_from_checkpoint` asks for.

        Args:
            inputs (`dict[str, str]`): Fingerprints of what the run is made from, such as its images, by name.
            counts (`int`): What `run.json` and the model card name, such as `training_images`.

        Returns:
            The checkpoint's folder or None, the optimiser steps done, and the state that was saved with it.

        Raises:
            UserError: If the checkpoint was made from other inputs, or none can be used.
        """
        self._inputs = inputs
        found = None
        if self.config.resume_from_checkpoint is not None:
            found = self.checkpointer.newest(self.config.resume_from_checkpoint)
            if found is None:
                logger.warning("no checkpoint in %s yet: starting from the beginning.", self.checkpointer.folder)
        path, step, state = (found[0], found[1]["step"], found[1]["state"]) if found else (None, 0, {})
        if path is not None:
            logger.info("resuming from %s", path)
            for input_name, before in state.pop("inputs", {}).items():
                if inputs.get(input_name, before) != before:
                    raise UserError(
                        f"{input_name} changed since {path} was saved (fingerprint {inputs[input_name]}, was {before}). Go "
                        "on with the same, or train in another `--output_dir`."
                    )
            self.guard.skipped = state.pop("skipped", 0)
            sums, self._counts = state.pop("log_sums"), state.pop("log_counts")
            self._sums = {k: torch.tensor(v, device=self.accelerator.device) for k, v in sums.items()}
            self._stream_state = self._find_stream(state.pop("stream", None))
            if found[1]["num_processes"] != self.accelerator.num_processes:
                logger.warning(
                    "the checkpoint comes from %d processes, this run has %d. The result is equal, up to rounding, only with the same "
                    "`--train_batch_size` and as many micro-batches in a step: processes times `--gradient_accumulation_steps`.",
                    found[1]["num_processes"],
                    self.accelerator.num_processes,
                )
        if self.accelerator.is_main_process:
            write_atomically(self.folder / "config.yaml", config_text(self.config))
            rows = [row for row in read_log(self.folder) if row["step"] <= step]
            write_atomically(self.folder / "log.jsonl", "".join(json.dumps(row) + "\n" for row in rows))
            self._record = {
                "command": f"accelerate launch -m dae_diffusers.training.{self.name} {shlex.join(flags_of(self.config))}",
                "hardware": describe_hardware(self.accelerator),
                "versions": {name: importlib.metadata.version(name) for name in _VERSIONS},
                "counts": counts,
                "seconds": _seconds_before(self.folder / "run.json") if step > 0 else 0.0,
            }
            self._write_record()
        if self.config.report_to is not None:
            simple = {k: v for k, v in asdict(self.config).items() if isinstance(v, (bool, int, float, str))}
            self._guard_tracker(
                lambda: self.accelerator.init_trackers(
                    self.output_dir.resolve().name,
                    config=simple,
                    init_kwargs={"wandb": {"dir": str(self.folder)}},  # else it writes into the working directory
                )
            )
        return path, step, state

    def save_checkpoint(self, step: int, *, ema: EMAModel | None = None, **state: Any) -> None:
        r"""
        Saves everything needed to go on from here, the means that are being gathered for the log included.

        Args:
            step (`int`): Optimiser steps done.
            ema (`EMAModel`, *optional*): Moving averages.
            state: Anything JSON can hold; [`start`] gives it back.
        """
        sums = {k: float(v) for k, v in self.accelerator.reduce(self._sums, reduction="mean").items()}
        self.checkpointer.save(
            step,
            ema=ema,
            log_sums=sums,
            log_counts={k: int(v) for k, v in self._counts.items()},
            inputs=self._inputs,
            skipped=self.guard.skipped,
            stream=self._stream_states(),
            **state,
        )
        self._write_record()

    def first_microbatch(self, step: int) -> int:
        r"""Number, over all processes, of this process's first micro-batch after so many optimiser steps."""
        return (
            step * self.config.gradient_accumulation_steps * self.accelerator.num_processes
            + self.accelerator.process_index
        )

    def pass_loader(self, dataset: Dataset, *, num_workers: int = 0) -> DataLoader:
        r"""One pass over this process's share, in batches of the training's size; see [`~dae_diffusers.data.make_pass_loader`]."""
        return make_pass_loader(
            dataset,
            batch_size=self.config.train_batch_size,
            process_index=self.accelerator.process_index,
            num_processes=self.accelerator.num_processes,
            num_workers=num_workers,
        )

    def training_batches(self, dataset: Dataset, step: int) -> Iterator[dict[str, torch.Tensor]]:
        r"""
        Endless micro-batches for this process, on its device, from the `step`-th optimiser step on; a stream goes on where
        the checkpoint, or the last call, has left it.

        The time that the loop waits for them is reported at the end.
        """
        config = self.config
        options = {
            "num_workers": config.dataloader_num_workers,
            "pin_memory": self.accelerator.device.type == "cuda",
        }
        if isinstance(dataset, StreamedImages):
            if self._stream is not None:
                self._stream_state = self._stream.state_after(self._num_batches)
            self._stream = ImageStream(
                dataset,
                config.train_batch_size,
                seed=config.seed,
                process_index=self.accelerator.process_index,
                num_processes=self.accelerator.num_processes,
                state=self._stream_state,
            )
            device = self.accelerator.device
            batches = (
                send_to_device(batch, device, non_blocking=True)
                for batch in make_stream_loader(self._stream, **options)
            )
        else:
            loader = make_training_loader(
                dataset,
                batch_size=config.train_batch_size,
                seed=config.seed,
                start=self.first_microbatch(step) - self.accelerator.process_index,  # `accelerate` deals them out
                **options,
            )
            batches = self.accelerator.prepare(loader)
        self._num_batches = 0
        return self._timed(iter(batches))

    def _timed(self, batches: Iterator) -> Iterator:
        while True:
            asked = time.perf_counter()
            batch = next(batches)
            got = time.perf_counter()
            self._num_batches += 1
            if self._num_batches > 1:  # the first one starts the worker processes
                self._waiting_seconds += got - asked
            yield batch
            if self._num_batches > 1:
                self._training_seconds += time.perf_counter() - asked

    def _stream_states(self) -> list[dict[str, Any]] | None:
        if self._stream is None:
            return None
        return gather_object([self._stream.state_after(self._num_batches)])

    def _find_stream(self, states: list[dict[str, Any]] | None) -> dict[str, Any] | None:
        """Of this process, in a checkpoint; with another number of processes a new pass over the stream begins."""
        if states is None:
            return None
        if len(states) == self.accelerator.num_processes:
            return states[self.accelerator.process_index]
        logger.warning("the stream was read by %d processes: a new pass over it begins.", len(states))
        epoch = 1 + max(state["epoch"] for state in states)
        return {"position": 0, "block_start": 0, "block_size": states[0]["block_size"], "epoch": epoch}

    def push_snapshot(self, step: int, result: str, save: Callable[[Path], None]) -> None:
        r"""
        With `--hub_strategy every_save`: uploads what training has come to, in the background, on the main process.

        Args:
            step (`int`): Optimiser steps done.
            result (`str`): Name of the folder, such as `vae`.
            save: Writes it into the path that it is given.
        """
        if self.config.push_to_hub and self.config.hub_strategy == "every_save" and self.accelerator.is_main_process:
            self._upload.start(
                step,
                save=lambda folder: self._save_snapshot(folder, result, save),
                push=lambda folder: self._push(folder / result, step),
            )

    def mark(self, name: str, step: int) -> None:
        r"""Marks a step in `curves.png`, such as the border between two stages."""
        self._marks[name] = step

    def add(self, **values: torch.Tensor) -> None:
        r"""Adds one micro-batch's values to the means that [`log_means`] writes; they stay on the device until then."""
        for name, value in values.items():
            value = value.detach()
            self.guard.note(name, value)
            count = 1
            if self.config.skip_nonfinite:  # what belongs to an update that is left out does not count
                count = torch.isfinite(value).int()
                value = torch.where(count > 0, value, 0)
            self._sums[name] = self._sums[name] + value if name in self._sums else value.clone()
            self._counts[name] = self._counts.get(name, 0) + count

    def log_means(self, step: int, prefix: str = "train", **values: float | torch.Tensor) -> dict[str, float]:
        r"""Logs the means, over all processes, of what was added since the last call, and `values` beside them."""
        means = {f"{prefix}/{k}": total.float() / max(1, int(self._counts[k])) for k, total in self._sums.items()}
        means = {k: float(v) for k, v in self.accelerator.reduce(means, reduction="mean").items()}
        self._sums, self._counts = {}, {}
        means.update({f"{prefix}/{k}": float(v) for k, v in values.items() if math.isfinite(v)})
        self.log(means, step)
        return means

    def log(self, values: dict[str, float], step: int) -> None:
        r"""Writes values to `log.jsonl` and the trackers. A tracker that fails is reported once and left alone."""
        if self.accelerator.is_main_process:
            with (self.folder / "log.jsonl").open("a") as file:
                file.write(json.dumps({"step": step, **values}) + "\n")
        self._guard_tracker(lambda: self.accelerator.log(values, step=step))

    def log_grid(self, name: str, grid: Image.Image, step: int) -> None:
        r"""Saves a picture as `grids/<name>-<step>.png` and shows it in every tracker that can."""
        if not self.accelerator.is_main_process:
            return
        folder = self.folder / "grids"
        folder.mkdir(exist_ok=True)
        grid.save(folder / f"{name}-{step:08d}.png")
        for tracker in self.accelerator.trackers:
            self._guard_tracker(lambda tracker=tracker: _log_image(tracker, name, grid, step))

    def log_samples(self, pipeline: DiffusionPipeline, num_classes: int | None, step: int, **options: Any) -> None:
        r"""
        Draws a grid from the same noise every time, a column for each class, on the main process.

        Args:
            pipeline (`DiffusionPipeline`): That takes `class_labels`, `num_images_per_label`, `generator` and `output_type`.
            num_classes (`int` or `None`): Of the data; None: no labels.
            step (`int`): Optimiser steps done.
            options: For the pipeline.
        """
        if not self.accelerator.is_main_process:
            return
        number = self.config.num_sample_images
        labels = None if num_classes is None else [n % num_classes for n in range(number)]
        generators = [torch.Generator().manual_seed(derived_seed(self.config.seed, 4, n)) for n in range(number)]
        pipeline.set_progress_bar_config(disable=True)
        images = []
        for start in range(0, number, self.config.train_batch_size):
            chosen = slice(start, start + self.config.train_batch_size)
            images.append(
                pipeline(
                    class_labels=None if labels is None else labels[chosen],
                    num_images_per_label=len(generators[chosen]) if labels is None else 1,
                    generator=generators[chosen],
                    output_type="pt",
                    **options,
                ).images
            )
        columns = num_classes if num_classes is not None and num_classes <= 20 else None
        self.log_grid("samples", image_grid(torch.cat(images) * 2 - 1, columns=columns), step)

    def draw_curves(self) -> None:
        r"""Draws `curves.png` from the whole log."""
        if self.accelerator.is_main_process:
            title = f"{self.output_dir.name}: {self.name}"
            plot_curves(read_log(self.folder), self.folder / "curves.png", title=title, marks=self._marks)

    def progress(self, total: int, initial: int, description: str) -> tqdm:
        r"""A progress bar over optimiser steps, on the main process."""
        return tqdm(
            total=total,
            initial=initial,
            desc=description,
            unit="step",
            disable=not self.accelerator.is_local_main_process,
            dynamic_ncols=True,
            mininterval=0.2 if sys.stderr.isatty() else 20,  # seconds; a log file needs few lines
        )

    def finish(self, result: str) -> None:
        r"""
        Closes the trackers and pushes if asked to; what cannot be uploaded is a warning.

        Args:
            result (`str`): The folder below `output_dir` to push, such as `vae`.
        """
        if self._training_seconds:
            share = self._waiting_seconds / self._training_seconds
            self._record["data_wait_share"] = round(share, 4)
            logger.info(
                "the model waited for data %.1f %% of the time%s", 100 * share, _WAIT_HINT if share > 0.1 else ""
            )
        self._write_record()
        self.accelerator.wait_for_everyone()
        for tracker in self.accelerator.trackers:
            self._guard_tracker(tracker.finish)
        self.accelerator.trackers = []
        self.accelerator.end_training()  # ends the process group: no process waits for the upload
        if self._lock is not None:
            self._lock.release()
        if not self.config.push_to_hub or not self.accelerator.is_main_process:
            return
        self._upload.wait()
        for failure in self._upload.failures:
            logger.warning("an upload while training failed (%s).", failure)
        try:
            logger.info("pushed to %s", self._push(self.output_dir / result))
        except Exception as error:  # an upload may fail in any way; the run has ended well
            logger.warning(
                "pushing to %s failed (%s). Everything is in %s; push it with\n  %s",
                self.hub_model_id,
                upload.one_line(error),
                self.output_dir / result,
                upload.push_command(
                    self.output_dir / result,
                    self.hub_model_id,
                    private=self.config.hub_private,
                    license=self.config.hub_license,
                ),
            )

    def _push(self, folder: Path, step: int | None = None) -> str:
        private, license = self.config.hub_private, self.config.hub_license
        if folder.name == "stage1":
            return upload.push_stage1(folder.parent, self.hub_model_id, private=private)
        return upload.push_folder(folder, self.hub_model_id, private=private, license=license, step=step)

    def _save_snapshot(self, folder: Path, result: str, save: Callable[[Path], None]) -> None:
        """The result, and beside it what the card tells of the run."""
        save(folder / result)
        for path in self.output_dir.glob("train_*"):
            for name in ("config.yaml", "run.json", "log.jsonl", "curves.png", "grids"):
                if (path / name).is_dir():
                    shutil.copytree(path / name, folder / path.name / name)
                elif (path / name).exists():
                    (folder / path.name).mkdir(parents=True, exist_ok=True)
                    shutil.copyfile(path / name, folder / path.name / name)

    def _write_record(self) -> None:
        """`run.json`: how the result was made, for the model card. Time counts over interruptions."""
        if self.accelerator.is_main_process and self._record:
            now = time.monotonic()
            self._record["seconds"] += now - self._started
            self._started = now
            write_atomically(self.folder / "run.json", json.dumps(self._record, indent=2))

    def _take_folder(self) -> None:
        self._lock, problem = take_folder(self.folder, self.accelerator), [None]
        # Not by config.yaml, which a run that failed before its first step has left too.
        is_taken = bool(read_log(self.folder)) or any(self.folder.glob("checkpoints/checkpoint-*"))
        if self.accelerator.is_main_process and is_taken and self.config.resume_from_checkpoint is None:
            self._lock.release()
            problem = [
                f"`--output_dir` {self.output_dir} holds another run of {self.name}. Continue it with "
                "`--resume_from_checkpoint latest`, choose another folder, or remove "
                f"{self.folder} to start anew."
            ]
        broadcast_object_list(problem)
        if problem[0]:
            raise UserError(problem[0])

    def _guard_tracker(self, call) -> None:
        if self._tracker_failed:
            return
        try:
            call()
        except Exception as error:  # a tracker may fail in any way; the run must not
            self._tracker_failed = True
            logger.warning("the tracker failed (%s: %s); training goes on without it.", type(error).__name__, error)

    def compile_blocks(self, blocks: Iterable[torch.nn.Module]) -> None:
        r"""With `--compile`: compiles each in its place, so that equal blocks share their code and weights keep their names."""
        if self.config.compile:
            torch._functorch.config.donated_buffer = False  # adaptive weights go through a graph twice
            for block in blocks:
                block.compile()

    def make_optimizer(self, parameters: list[torch.nn.Parameter], **instead: Any) -> torch.optim.AdamW:
        r"""
        AdamW by the flags, in one pass over memory: several times faster than the loop that is PyTorch's default on a CPU.

        Args:
            parameters (`list[torch.nn.Parameter]`): What trains.
            instead: `lr`, `betas` or `weight_decay`, instead of the flags'.
        """
        config = self.config
        settings = {
            "lr": config.learning_rate,
            "betas": (config.adam_beta1, config.adam_beta2),
            "weight_decay": config.adam_weight_decay,
            **instead,
        }
        return torch.optim.AdamW(
            parameters, **settings, fused=self.accelerator.device.type in ("cpu", "cuda", "mps", "xpu")
        )

    def make_lr_scheduler(
        self, optimizer: torch.optim.Optimizer, num_steps: int
    ) -> torch.optim.lr_scheduler.LRScheduler:
        r"""The schedule that the flags name, over so many steps; the warm-up is no longer than they are."""
        return get_scheduler(
            self.config.lr_scheduler,
            optimizer,
            num_warmup_steps=min(self.config.lr_warmup_steps, num_steps),
            num_training_steps=num_steps,
        )

    def make_ema(self, parameters: list[torch.nn.Parameter]) -> EMAModel | None:
        r"""Moving averages of prepared parameters, or None without `--use_ema`."""
        if not self.config.use_ema:
            return None
        is_spread = self.accelerator.distributed_type == DistributedType.FSDP  # such tensors lack the fast functions
        return EMAModel(parameters, decay=self.config.ema_decay, foreach=not is_spread)

    def whole_model(self, model: torch.nn.Module) -> torch.nn.Module:
        r"""
        A prepared model without what it was wrapped into. All processes call it.

        Where FSDP has spread the weights it is a copy with all of them, which later updates do not change.
        """
        if self.accelerator.distributed_type != DistributedType.FSDP:
            return self.accelerator.unwrap_model(model)
        model_class = next(c for c in type(model).__mro__ if not issubclass(c, FSDPModule))
        make = model_class if isinstance(model, PreTrainedModel) else model_class.from_config
        whole = make(model.config)
        whole.load_state_dict({name: whole_tensor(value.detach()) for name, value in model.state_dict().items()})
        return whole.to(self.accelerator.device)


@contextmanager
def ema_weights(ema: EMAModel | None, parameters: Iterable[torch.nn.Parameter]) -> Iterator[None]:
    r"""Lets the parameters hold their moving averages inside the block, and their own values after it."""
    parameters = list(parameters)
    if ema is None:
        yield
        return
    ema.store(parameters)
    ema.copy_to(parameters)
    try:
        yield
    finally:
        ema.restore(parameters)


def _check_fsdp(name: str, config: Any, accelerator: Accelerator, one_model: bool) -> None:
    if not one_model:
        raise ConfigError(f"{name} does not run under FSDP; use training/configs/accelerate/ddp.yaml.")
    plugin = accelerator.state.fsdp_plugin
    if plugin.fsdp_version != 2 or plugin.state_dict_type != StateDictType.FULL_STATE_DICT:
        raise ConfigError(
            "under FSDP the script needs `fsdp_version: 2` and `fsdp_state_dict_type: FULL_STATE_DICT`, as in "
            "training/configs/accelerate/fsdp2.yaml."
        )
    if config.push_to_hub and config.hub_strategy == "every_save":
        raise ConfigError("`--hub_strategy every_save` does not go with FSDP; use `end`.")


def settle_deepspeed(name: str, config: Any, accelerator: Accelerator, one_model: bool) -> None:
    r"""
    Gives DeepSpeed the script's flags; under bfloat16 the weights stay in float32, as everywhere else.

    Raises:
        ConfigError: If the script does not run so.
    """
    if not one_model:
        raise ConfigError(f"{name} does not run under DeepSpeed; use training/configs/accelerate/ddp.yaml.")
    plugin = accelerator.state.deepspeed_plugin
    if plugin.zero_stage == 3:
        raise ConfigError(
            "the script does not run with `zero_stage: 3`; use 2, or training/configs/accelerate/fsdp2.yaml."
        )
    if accelerator.mixed_precision == "fp16":
        raise ConfigError("fp16 does not go with DeepSpeed here; use `--mixed_precision bf16`.")
    settings = plugin.deepspeed_config
    settings["train_micro_batch_size_per_gpu"] = config.train_batch_size  # it is prepared without a loader
    settings["gradient_accumulation_steps"] = config.gradient_accumulation_steps
    settings["gradient_clipping"] = config.max_grad_norm
    if accelerator.mixed_precision == "bf16":
        settings["bf16"] = {"enabled": False}
        settings["torch_autocast"] = {"enabled": True, "dtype": "bfloat16"}


def describe_hardware(accelerator: Accelerator) -> str:
    r"""What the run runs on, such as `2 x NVIDIA A100-SXM4-80GB` or `1 process on a CPU with 8 cores`."""
    count = accelerator.num_processes
    if accelerator.device.type == "cuda":
        return f"{count} x {torch.cuda.get_device_name(accelerator.device)}"
    if accelerator.device.type == "cpu":
        return f"{count} process{'es' if count > 1 else ''} on a CPU with {os.cpu_count()} cores ({platform.machine()})"
    return f"{count} x {accelerator.device.type}"


def _seconds_before(path: Path) -> float:
    try:
        return json.loads(path.read_text())["seconds"]
    except (OSError, ValueError, KeyError):
        return 0.0


def read_log(folder: Path) -> list[dict[str, float]]:
    r"""The rows of a run's `log.jsonl`; a last line that a kill cut short is left out."""
    path = folder / "log.jsonl"
    rows = []
    for line in path.read_text().splitlines() if path.exists() else []:
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError:
            break
    return rows


def _log_image(tracker, name: str, image: Image.Image, step: int) -> None:
    if tracker.name == "trackio":  # accelerate's tracker for it has no `log_images`
        import trackio

        tracker.log({name: trackio.Image(image)}, step=step)
    elif tracker.name == "tensorboard":
        tracker.log_images({name: np.asarray(image.convert("RGB"))[None]}, step=step, dataformats="NHWC")
    elif hasattr(tracker, "log_images"):
        tracker.log_images({name: [image]}, step=step)
