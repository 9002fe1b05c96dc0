"""
Train a small ResNet classifier on your own images, whose features then judge reconstructions and samples where
Inception or DINOv2 are out of reach or out of place (`rfd_<folder>`, `gfd_<folder>`; comparable only with the same
folder).

    python benchmarks/train_feature_extractor.py --dataset_name digits --image_channels 1 --train_steps 300 \\
        --output_dir features/digits
    python benchmarks/train_feature_extractor.py --dataset_name cifar10 --random_flip --mixed_precision bf16 \\
        --output_dir features/cifar10

The result is an ordinary `transformers` folder, for `load_feature_extractor` and the `--features` of `evaluate.py`.
"""

import json
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from accelerate.utils import set_seed
from diffusers.optimization import get_scheduler
from tqdm.auto import tqdm
from transformers import ResNetConfig, ResNetForImageClassification, ViTImageProcessor

from dae_diffusers.cli import field, parse_config, run_script
from dae_diffusers.data import DataConfig, ImageDataset, load_images, make_pass_loader, make_training_loader
from dae_diffusers.errors import ConfigError, UserError
from dae_diffusers.metrics.features import FeatureExtractor, load_feature_extractor, prepare_images
from dae_diffusers.randomness import seed_microbatch
from dae_diffusers.run import PROCESS_GROUP
from dae_diffusers.store import write_json

MEAN = STD = (0.5, 0.5, 0.5)


@dataclass
class ClassifierConfig:
    """Classifier."""

    hidden_sizes: list[int] = field([32, 64, 128, 192], "channels of each stage; each after the first halves")
    depths: list[int] = field([1, 1, 1, 1], "basic blocks of each stage")
    input_size: int | None = field(
        None, "enlarge images to this, because the stem divides by 4; default: twice the resolution"
    )

    def __post_init__(self):
        if len(self.hidden_sizes) != len(self.depths) or min(self.hidden_sizes + self.depths, default=0) < 1:
            raise ConfigError(
                f"`--hidden_sizes` {self.hidden_sizes} and `--depths` {self.depths} must be positive and equally many."
            )
        if self.input_size is not None and self.input_size < 1:
            raise ConfigError(f"`--input_size` is {self.input_size}, but must be at least 1.")


@dataclass
class TrainingConfig:
    """Training."""

    output_dir: str = field("features/my-images", "folder of the result; its name becomes the name of the features")
    train_steps: int = field(3200, "optimiser steps")
    train_batch_size: int = field(64, "images per step and process")
    learning_rate: float = field(2e-3, "peak learning rate of AdamW, after a tenth of the steps; cosine to 0")
    weight_decay: float = field(0.05, "AdamW's weight decay")
    label_smoothing: float = field(0.0, "share of the target spread over all classes")
    max_shift: int = field(2, "shift images by up to this many pixels in both directions, the border mirrored")
    mixed_precision: Literal["no", "fp16", "bf16"] = field("no", "autocast; the weights stay float32")
    seed: int = field(0, "of weights, data order and augmentation")

    def __post_init__(self):
        for name in ("train_steps", "train_batch_size"):
            if getattr(self, name) < 1:
                raise ConfigError(f"`--{name}` is {getattr(self, name)}, but must be at least 1.")
        if not self.learning_rate > 0:
            raise ConfigError(f"`--learning_rate` is {self.learning_rate}, but must be above 0.")
        if self.weight_decay < 0:
            raise ConfigError(f"`--weight_decay` is {self.weight_decay}, but must be 0 or more.")
        if not 0 <= self.label_smoothing < 1:
            raise ConfigError(f"`--label_smoothing` is {self.label_smoothing}, but must be at least 0 and below 1.")


@dataclass
class TrainFeatureExtractorConfig(TrainingConfig, ClassifierConfig, DataConfig):
    max_validation_samples: int = field(10000, "test on at most this many images")

    def __post_init__(self):
        for part in (DataConfig, ClassifierConfig, TrainingConfig):
            part.__post_init__(self)
        self.require_source()
        if self.streaming:
            raise ConfigError("`--streaming` does not go with this script; leave it out.")
        if self.image_channels not in (1, 3):
            raise ConfigError(
                f"`--image_channels` is {self.image_channels}, but features are of gray (1) or RGB (3) images."
            )
        if not 0 <= self.max_shift < self.resolution:
            raise ConfigError(f"`--max_shift` is {self.max_shift}, but must be 0 or more and below `--resolution`.")


def main(config: TrainFeatureExtractorConfig) -> None:
    output_dir = Path(config.output_dir)
    if (output_dir / "config.json").exists():
        raise UserError(f"`--output_dir` {output_dir} holds a model already. Choose another folder or remove it.")
    accelerator = Accelerator(mixed_precision=config.mixed_precision, kwargs_handlers=[PROCESS_GROUP])
    set_seed(config.seed)
    with accelerator.main_process_first():
        train_images, test_images = load_images(config, config.seed)
    if train_images.id2label is None:
        raise UserError(
            "the data have no labels to learn from. Name their column with `--label_column`, or judge by a published model instead "
            "(`--features facebook/dinov2-base` of `evaluate.py` and `decoupled_vs_joint.py`)."
        )

    side = config.input_size or 2 * config.resolution
    model = ResNetForImageClassification(
        ResNetConfig(
            embedding_size=max(1, config.hidden_sizes[0] // 2),  # the stem works on the largest maps
            hidden_sizes=config.hidden_sizes,
            depths=config.depths,
            layer_type="basic",
            id2label=train_images.id2label,
            label2id={name: label for label, name in train_images.id2label.items()},
        )
    ).to(memory_format=torch.channels_last)
    optimizer = torch.optim.AdamW(model.parameters(), lr=config.learning_rate, weight_decay=config.weight_decay)
    lr_scheduler = get_scheduler(
        "cosine", optimizer, num_warmup_steps=config.train_steps // 10, num_training_steps=config.train_steps
    )
    loader = make_training_loader(
        train_images,
        batch_size=config.train_batch_size,
        seed=config.seed,
        num_workers=config.dataloader_num_workers,
        pin_memory=accelerator.device.type == "cuda",
    )
    model, optimizer, loader = accelerator.prepare(model, optimizer, loader)

    model.train()
    start = time.monotonic()
    progress = tqdm(total=config.train_steps, unit="step", mininterval=10, disable=not accelerator.is_main_process)
    for step, batch in zip(range(config.train_steps), loader, strict=False):
        seed_microbatch(config.seed, step * accelerator.num_processes + accelerator.process_index)
        pixel_values = random_shift(batch["pixel_values"], config.max_shift)
        inputs = prepare_images(pixel_values, size=(side, side), mean=MEAN, std=STD)
        logits = model(pixel_values=inputs.contiguous(memory_format=torch.channels_last)).logits
        loss = F.cross_entropy(logits.float(), batch["class_labels"], label_smoothing=config.label_smoothing)
        if not torch.isfinite(loss):
            raise UserError(f"`loss` became {loss.item()} at step {step + 1}. Lower `--learning_rate`.")
        accelerator.backward(loss)
        optimizer.step()
        optimizer.zero_grad()
        lr_scheduler.step()
        progress.update()
        progress.set_postfix(loss=f"{loss.item():.3f}", refresh=False)
    progress.close()
    seconds = time.monotonic() - start

    if accelerator.is_main_process:
        accelerator.unwrap_model(model, keep_fp32_wrapper=False).save_pretrained(output_dir)
        processor = ViTImageProcessor(
            size={"height": side, "width": side}, resample=3, image_mean=list(MEAN), image_std=list(STD)
        )
        processor.save_pretrained(output_dir)
        extractor = load_feature_extractor(str(output_dir), accelerator.device)  # what users will get
        results = {
            "test_accuracy": round(accuracy(extractor, test_images, config.train_batch_size), 4),
            "num_test_images": len(test_images),
            "num_train_images": len(train_images),
            "num_parameters": sum(parameter.numel() for parameter in extractor.parameters()),
            "train_steps": config.train_steps,
            "train_seconds": round(seconds, 1),
        }
        write_json(output_dir / "results.json", results)
        print(json.dumps(results))
    accelerator.wait_for_everyone()


def random_shift(pixel_values: torch.Tensor, max_shift: int) -> torch.Tensor:
    """Moves each image by its own whole number of pixels in -max_shift..max_shift, down and right."""
    batch_size, _, height, width = pixel_values.shape
    padded = F.pad(pixel_values, (max_shift,) * 4, mode="reflect")
    windows = padded.unfold(2, height, 1).unfold(3, width, 1)  # (B, C, 2 max_shift + 1, 2 max_shift + 1, H, W)
    top, left = torch.randint(2 * max_shift + 1, (2, batch_size), device=pixel_values.device)
    return windows[torch.arange(batch_size, device=pixel_values.device), :, top, left]


def accuracy(extractor: FeatureExtractor, images: ImageDataset, batch_size: int) -> float:
    """Share of the images that the extractor's own head classifies rightly."""
    num_right = 0
    for batch in make_pass_loader(images, batch_size=batch_size):
        logits = extractor.features_and_logits(batch["pixel_values"])[1]
        num_right += int((logits.argmax(dim=1).cpu() == batch["class_labels"]).sum())
    return num_right / len(images)


if __name__ == "__main__":
    run_script(main, parse_config(TrainFeatureExtractorConfig, description=__doc__))
