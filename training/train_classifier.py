r"""
Train a small classifier on your own images; its features judge reconstructions and samples.

Use it if you cannot download Inception or DINOv2, or if they do not know your kind of image. Its metrics are called `rfd_<folder>`
and `gfd_<folder>`. Compare them only with those of the same classifier.

    accelerate launch training/train_classifier.py --dataset_name digits --image_channels 1 --train_steps 300 \
        --output_dir features/digits
    accelerate launch training/train_classifier.py --dataset_name cifar10 --random_flip --mixed_precision bf16 \
        --output_dir features/cifar10

The result is an ordinary `transformers` folder, for `load_feature_extractor` and for `--features` of `evaluate.py`.
"""

import json
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from accelerate.utils import set_seed
from diffusers.optimization import get_scheduler
from tqdm.auto import tqdm
from transformers import ResNetConfig, ResNetForImageClassification, ViTImageProcessor

from dae_diffusers.cli import parse_config
from dae_diffusers.data import ImageDataset, load_images, make_pass_loader, make_training_loader
from dae_diffusers.engine.distributed import measuring_accelerator
from dae_diffusers.errors import UserError
from dae_diffusers.locks import take_folder
from dae_diffusers.metrics.features import FeatureExtractor, load_feature_extractor, prepare_images
from dae_diffusers.randomness import seed_microbatch
from dae_diffusers.script import run_script
from dae_diffusers.store import replace_files, write_json
from dae_diffusers.training.settings import ClassifierConfig, TrainClassifierConfig

MEAN = STD = (0.5, 0.5, 0.5)


def main(config: TrainClassifierConfig) -> None:
    training = config.training
    output_dir = Path(training.output_dir)
    if (output_dir / "config.json").exists():
        raise UserError(f"`--output_dir` {output_dir} holds a model already. Choose another folder or remove it.")
    accelerator = measuring_accelerator(training.mixed_precision)
    lock = take_folder(output_dir, accelerator)
    set_seed(training.seed)
    with accelerator.main_process_first():
        train_images, test_images = load_images(config.data)
    if not train_images.has_classes:
        seen = "no labels to learn from" if train_images.id2label is None else "training images of one class only"
        raise UserError(
            f"the data have {seen}, but a classifier needs two classes. Name their column with `--label_column`, or judge by a "
            "published model instead (`--features facebook/dinov2-base` of `evaluate.py` and `decoupled_vs_joint.py`)."
        )

    side = config.classifier.input_size or 2 * max(config.data.size)
    model = make_classifier(config.classifier, train_images.id2label)
    start = time.monotonic()
    model = train(model, train_images, side, config, accelerator)
    seconds = time.monotonic() - start

    def save(folder: Path) -> None:
        save_classifier(model, side, folder)
        extractor = load_feature_extractor(str(folder), accelerator.device)  # what users will get
        results = {
            "test_accuracy": round(accuracy(extractor, test_images, training.train_batch_size), 4),
            "num_test_images": len(test_images),
            "num_train_images": len(train_images),
            "num_parameters": sum(parameter.numel() for parameter in extractor.parameters()),
            "train_steps": training.train_steps,
            "train_seconds": round(seconds, 1),
        }
        write_json(folder / "results.json", results)
        print(json.dumps(results))

    if accelerator.is_main_process:
        replace_files(output_dir, save)  # whole or not at all
    accelerator.wait_for_everyone()
    accelerator.end_training()
    lock.release()


def train(
    model: ResNetForImageClassification,
    images: ImageDataset,
    side: int,
    config: TrainClassifierConfig,
    accelerator: Accelerator,
) -> ResNetForImageClassification:
    """Trains the classifier on images resized to `side`, and returns it; `UserError` if it diverges."""
    training = config.training
    optimizer = torch.optim.AdamW(model.parameters(), lr=training.learning_rate, weight_decay=training.weight_decay)
    lr_scheduler = get_scheduler(
        "cosine",
        optimizer,
        num_warmup_steps=training.train_steps // 10,
        num_training_steps=training.train_steps,
    )
    loader = make_training_loader(
        images,
        batch_size=training.train_batch_size,
        seed=training.seed,
        num_workers=config.data.dataloader_num_workers,
        balanced=config.data.balance_classes,
        pin_memory=accelerator.device.type == "cuda",
    )
    model, optimizer, loader = accelerator.prepare(model, optimizer, loader)

    model.train()
    progress = tqdm(total=training.train_steps, unit="step", mininterval=10, disable=not accelerator.is_main_process)
    for step, batch in zip(range(training.train_steps), loader, strict=False):
        seed_microbatch(training.seed, step * accelerator.num_processes + accelerator.process_index)
        pixel_values = random_shift(batch["pixel_values"], training.max_shift)
        inputs = prepare_images(pixel_values, size=(side, side), mean=MEAN, std=STD)
        logits = model(pixel_values=inputs.contiguous(memory_format=torch.channels_last)).logits
        loss = F.cross_entropy(logits.float(), batch["class_labels"], label_smoothing=training.label_smoothing)
        if not torch.isfinite(loss):
            raise UserError(f"`loss` became {loss.item()} at step {step + 1}. Lower `--learning_rate`.")
        accelerator.backward(loss)
        optimizer.step()
        optimizer.zero_grad()
        lr_scheduler.step()
        progress.update()
        progress.set_postfix(loss=f"{loss.item():.3f}", refresh=False)
    progress.close()

    model = accelerator.unwrap_model(model, keep_fp32_wrapper=False)
    if not all(value.isfinite().all() for value in model.state_dict().values()):
        raise UserError("the weights became NaN or infinite; nothing is saved. Lower `--learning_rate`.")
    return model


def make_classifier(settings: ClassifierConfig, id2label: dict[int, str]) -> ResNetForImageClassification:
    """A new ResNet for these classes."""
    model = ResNetForImageClassification(
        ResNetConfig(
            embedding_size=max(1, settings.hidden_sizes[0] // 2),  # the stem works on the largest maps
            hidden_sizes=settings.hidden_sizes,
            depths=settings.depths,
            layer_type="basic",
            id2label=id2label,
            label2id={name: label for label, name in id2label.items()},
        )
    )
    return model.to(memory_format=torch.channels_last)


def save_classifier(model: ResNetForImageClassification, side: int, folder: Path) -> None:
    """Saves the weights, and beside them how images are prepared: resized to `side`, as in training."""
    model.save_pretrained(folder)
    processor = ViTImageProcessor(
        size={"height": side, "width": side}, resample=3, image_mean=list(MEAN), image_std=list(STD)
    )
    processor.save_pretrained(folder)


def random_shift(pixel_values: torch.Tensor, max_shift: int) -> torch.Tensor:
    """Shifts each image by a random whole number of pixels in -max_shift..max_shift, down and right."""
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
    run_script(main, parse_config(TrainClassifierConfig, description=__doc__))
