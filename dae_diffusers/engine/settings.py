"""Settings that all training scripts share: of the optimiser, and of the run. Needs no torch."""

from typing import Literal

from dae_diffusers.errors import ConfigError
from dae_diffusers.settings import field, settings

MAX_SEED = 2**32 - 1  # numpy's
_WITH_WARMUP = ("constant_with_warmup", "linear", "cosine", "warmup_stable_decay")


# Those of accelerate, or all that are installed.
TRACKERS = (
    "tensorboard",
    "wandb",
    "trackio",
    "mlflow",
    "swanlab",
    "comet_ml",
    "aim",
    "clearml",
    "dvclive",
    "all",
)


@settings
class OptimizationConfig:
    """Optimisation."""

    train_batch_size: int = field(64, "images per process and micro-batch", at_least=1)
    gradient_accumulation_steps: int = field(1, "micro-batches per optimiser step", at_least=1)
    num_train_epochs: float | None = field(
        None, "train for X passes over the images instead of a number of steps", above=0
    )
    learning_rate: float = field(1e-3, "peak learning rate", above=0, needs="stage 1 or stage 2")
    optimizer: Literal["adamw", "muon"] = field(
        "adamw", "muon: for the matrices of a transformer's blocks, and AdamW for all other weights", advanced=True
    )
    lr_scheduler: Literal["constant", "constant_with_warmup", "linear", "cosine", "warmup_stable_decay"] = field(
        "cosine", "schedule of the learning rate", advanced=True
    )
    lr_decay_share: float = field(
        0.2,
        "`warmup_stable_decay`: share of the steps, at the end, over which it falls to 0",
        above=0,
        at_most=1,
        needs="lr_scheduler warmup_stable_decay",
        advanced=True,
    )
    lr_warmup_steps: int = field(
        100,
        "steps over which the learning rate rises (not with `constant`)",
        at_least=0,
        needs=" or ".join(f"lr_scheduler {name}" for name in _WITH_WARMUP),
        advanced=True,
    )
    adam_beta1: float = field(0.9, "AdamW's first decay", at_least=0, below=1, advanced=True)
    adam_beta2: float = field(0.99, "AdamW's second decay", at_least=0, below=1, advanced=True)
    adam_weight_decay: float = field(0.0, "AdamW's weight decay", at_least=0, advanced=True)
    adam_epsilon: float = field(1e-8, "AdamW's epsilon", above=0, advanced=True)
    max_grad_norm: float = field(1.0, "clip the gradient's norm to this", above=0, advanced=True)
    use_ema: bool = field(True, "keep a moving average of the weights (EMA) and export it", advanced=True)
    ema_decay: float = field(
        0.999,
        "decay of the moving average; it rises to this value",
        at_least=0,
        below=1,
        needs="use_ema",
        advanced=True,
    )
    mixed_precision: Literal["no", "fp16", "bf16"] | None = field(
        None, "precision of the computation; weights stay float32; default: accelerate's"
    )
    gradient_checkpointing: bool = field(
        False, "recompute activations in the backward pass to save memory", advanced=True
    )
    compile: bool = field(
        False, "compile the networks block by block: the first steps are slow, later ones faster", advanced=True
    )
    allow_tf32: bool = field(False, "use TF32 matrix products on GPUs that have them", advanced=True)


@settings
class RunConfig:
    """Run."""

    output_dir: str = field("runs/my-model", "folder for all results")
    seed: int = field(0, "the same seed on the same machine gives the same weights", at_least=0, at_most=MAX_SEED)
    resume_from_checkpoint: str | None = field(
        None, "`latest` (also from the Hub, see `hub_strategy`), or a checkpoint's folder"
    )
    accept_changed_images: bool = field(
        False,
        "resume although the training images are others than those of the checkpoint: more, fewer, or one replaced",
        needs="resume_from_checkpoint",
        advanced=True,
    )
    dry_run: bool = field(False, "measure a few steps, say what the run takes, keep nothing")
    checkpointing_steps: int = field(1000, "save a checkpoint every N steps", at_least=1, advanced=True)
    checkpoints_total_limit: int | None = field(2, "keep only the N newest checkpoints", at_least=1, advanced=True)
    skip_nonfinite: int = field(
        0,
        "skip up to N updates whose loss or gradient is not finite; 0: stop at the first",
        at_least=0,
        advanced=True,
    )
    logging_steps: int = field(50, "log the mean losses every N steps", at_least=1, advanced=True)
    validation_steps: int = field(500, "validate every N steps, and at the end", at_least=1, advanced=True)
    report_to: Literal[TRACKERS] | None = field(
        None, "tracker to log to as well; log.jsonl and curves.png are always written", advanced=True
    )
    tracker_project_name: str | None = field(
        None, "project of the tracker; default: `WANDB_PROJECT`, or dae_diffusers", needs="report_to", advanced=True
    )
    tracker_run_name: str | None = field(
        None, "name of the run there; default: the output folder and the script", needs="report_to", advanced=True
    )


def steps_of(
    max_steps: int | None, num_epochs: float | None, num_images: int | None, images_per_step: int
) -> int | None:
    r"""
    Optimiser steps of a run.

    Args:
        max_steps (`int`, *optional*): Number of steps, used if `num_epochs` is None.
        num_epochs (`float`, *optional*): Passes over the images.
        num_images (`int`, *optional*): Images in a pass; None if unknown, as for a stream.
        images_per_step (`int`): Batch size times micro-batches times processes.

    Raises:
        ConfigError: If passes are asked for over a stream of unknown length.
    """
    if num_epochs is None:
        return max_steps
    if num_images is None:
        raise ConfigError(
            "`num_train_epochs` does not go with `streaming`, whose length is unknown; give steps instead."
        )
    return max(1, round(num_epochs * num_images / images_per_step))


def warmup_of(steps: int) -> int:
    r"""Steps of warm-up that suit a training of any length: the usual number, and at most a tenth of all."""
    return min(OptimizationConfig.lr_warmup_steps, max(1, steps // 10))
