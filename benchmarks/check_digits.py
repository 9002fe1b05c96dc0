"""
Checks with a classifier, trained on real digits, whether a pipeline draws the digits that it was asked for.

    python benchmarks/check_digits.py runs/demo

Draws 50 images of each class with `runs/demo/pipeline` (a `DAEDiTPipeline` or a `DAEVQGANPipeline`) and writes `samples.png` (one
row per class) and `metrics.json` (`class_agreement`: the share whose class the classifier confirms) into `runs/demo`.
"""

import argparse
from pathlib import Path
from typing import Any

import torch
from diffusers import DiffusionPipeline
from torch import nn
from tqdm.auto import tqdm

from dae_diffusers import DAEDiTPipeline, DAEVQGANPipeline
from dae_diffusers.data import DataConfig, ImageDataset, load_images
from dae_diffusers.evaluation_record import weights_by_part
from dae_diffusers.plots import image_grid
from dae_diffusers.store import read_json, write_json

PER_CLASS = 50
ROWS_SHOW = 12
CLASSIFIER_STEPS = 300


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="where `pipeline/` lies and the results go")
    parser.add_argument("--guidance_scale", type=float, help="default: the pipeline's")
    parser.add_argument("--num_inference_steps", type=int, help="of a DAEDiTPipeline; default: its own")
    parser.add_argument("--top_p", type=float, help="of a DAEVQGANPipeline; default: its own")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()

    classifier, accuracy = train_classifier(*load_images(DataConfig(dataset_name="digits", image_channels=1)))
    index = read_json(arguments.folder / "pipeline" / "model_index.json")
    is_vqgan = index["_class_name"] == "DAEVQGANPipeline"
    pipeline_class, script = (DAEVQGANPipeline, "train_vqgan_prior") if is_vqgan else (DAEDiTPipeline, "train_dit")
    own = "top_p" if is_vqgan else "num_inference_steps"
    pipeline = pipeline_class.from_pretrained(arguments.folder / "pipeline")
    settings = {
        name: getattr(arguments, name) or pipeline.config[f"default_{name}"] for name in ("guidance_scale", own)
    }
    labels = torch.arange(10).repeat(PER_CLASS)
    images = torch.cat(draw(pipeline, labels.tolist(), arguments.seed, output_type="pt", **settings)) * 2 - 1
    with torch.no_grad():
        agreement = (classifier(images).argmax(dim=1) == labels).float()

    show = torch.cat([images[labels == label][:ROWS_SHOW] for label in range(10)])
    image_grid(show, columns=ROWS_SHOW).save(arguments.folder / "samples.png")
    metrics = {
        "class_agreement": agreement.mean().item(),
        "class_agreement_by_class": [agreement[labels == label].mean().item() for label in range(10)],
        "num_images": len(labels),
        "classifier_accuracy_on_real_test_digits": accuracy,
        **settings,
        "seed": arguments.seed,
        "weights": weights_by_part(pipeline.components),
    }
    write_json(arguments.folder / "metrics.json", metrics)
    print(
        f"\nA classifier with {accuracy:.1%} accuracy on unseen real digits agrees with the requested class on "
        f"{metrics['class_agreement']:.1%} of {len(labels)} samples.\n\nLook at\n"
        f"  {arguments.folder}/samples.png           one row per class\n"
        f"  {arguments.folder}/train_dae/curves.png  the two stages of the autoencoder\n"
        f"  {arguments.folder}/train_dae/grids/      originals above reconstructions\n"
        f"  {arguments.folder}/{script}/curves.png  the generator\n"
        f"  {arguments.folder}/metrics.json          the numbers\n"
        f"and use it: {pipeline_class.__name__}.from_pretrained('{arguments.folder}/pipeline')"
        "(class_labels='7').images[0]"
    )


def draw(pipeline: DiffusionPipeline, wanted: list[int] | list[str], seed: int, **options: Any) -> list[Any]:
    """An image of each class or prompt, in batches. The noise of image `n` depends on `seed + n` alone."""
    pipeline.set_progress_bar_config(disable=True)
    parts = []
    for start in tqdm(range(0, len(wanted), 100), desc="Drawing", unit="batch"):
        part = wanted[start : start + 100]
        generators = [torch.Generator().manual_seed(seed + start + n) for n in range(len(part))]
        parts.append(pipeline(part, **options, generator=generators).images)
    return parts


def train_classifier(train: ImageDataset, test: ImageDataset) -> tuple[nn.Module, float]:
    """A small convolutional network on real digits, shifted a little; and its accuracy on unseen ones."""
    torch.manual_seed(0)
    pixels = torch.stack([train[n]["pixel_values"] for n in range(len(train))])
    labels = torch.tensor(train.labels)
    model = nn.Sequential(
        *(nn.Conv2d(1, 16, 3, 2, 1), nn.BatchNorm2d(16), nn.ReLU()),
        *(nn.Conv2d(16, 32, 3, 2, 1), nn.BatchNorm2d(32), nn.ReLU()),
        *(nn.Conv2d(32, 64, 3, 2, 1), nn.BatchNorm2d(64), nn.ReLU()),
        *(nn.Flatten(), nn.Dropout(0.3), nn.Linear(64 * 16, 10)),
    )
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    for _ in tqdm(range(CLASSIFIER_STEPS), desc="Classifier", unit="step"):
        chosen = torch.randint(len(labels), (64,))
        shift = torch.randint(-2, 3, (2,)).tolist()
        loss = nn.functional.cross_entropy(model(pixels[chosen].roll(shift, (2, 3))), labels[chosen])
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model.eval()
    with torch.no_grad():
        unseen = torch.stack([test[n]["pixel_values"] for n in range(len(test))])
        accuracy = (model(unseen).argmax(dim=1) == torch.tensor(test.labels)).float().mean().item()
    return model, accuracy


if __name__ == "__main__":
    main()
