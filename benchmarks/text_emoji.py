"""
Trains a model that draws emoji from their names, 64 x 64 pixels, and shows what it draws beside the nearest training images:

    python benchmarks/text_emoji.py runs/emoji --dataset_name <folder or Hub id of pictures with a column `text`>

Needs no weights: the text encoder is a tiny BERT that knows the words of the captions, and its random weights stay as they are. Draws
names of held-out pictures, which training has not seen, and combinations that have no picture (`PROMPTS`). Writes `samples.png`: for
each prompt four images, and the training image that is nearest to the first. The same command goes on with what is finished.
"""

import argparse
import re
from pathlib import Path

import datasets
import torch
from accelerate import Accelerator
from PIL import Image
from text_digits import draw_prompts, save_text_encoder

from dae_diffusers import DAEDiTPipeline
from dae_diffusers.comparison.scripts import launch_script
from dae_diffusers.data import DataConfig, ImageDataset, load_images
from dae_diffusers.metrics.distances import nearest_neighbors
from dae_diffusers.metrics.evaluation import image_features
from dae_diffusers.metrics.features import PixelFeatures
from dae_diffusers.plots import image_grid

PROMPTS = (
    "purple apple",
    "blue cat face",
    "green heart with sparkles",
    "red car",
    "woman astronaut with sunglasses",
    "yellow fish",
)
PER_PROMPT = 4
AUTOENCODER = {
    "latent_channels": 8,
    "block_out_channels": [16, 32, 64, 128],
    "auxiliary_decoder": "none",
    "train_batch_size": 16,
    "learning_rate": 1.5e-3,
    "ema_decay": 0.995,
}
TRANSFORMER = {
    "model": "DiT-Ti/1",
    "train_batch_size": 64,
    "optimizer": "muon",
    "learning_rate": 5e-3,
    "lr_scheduler": "warmup_stable_decay",
    "ema_decay": 0.999,
    "compile": True,
}


def train(arguments: argparse.Namespace) -> None:
    """The text encoder, the autoencoder and the transformer, unless they exist."""
    folder = arguments.folder
    if not (folder / "text_encoder").exists():
        texts = [text for rows in datasets.load_dataset(arguments.dataset_name).values() for text in rows["text"]]
        save_text_encoder(folder / "text_encoder", [" ".join(re.findall(r"\w+|[^\w\s]+", text)) for text in texts])
    common = {
        "dataset_name": arguments.dataset_name,
        "label_column": "none",
        "resolution": 64,
        "mixed_precision": arguments.mixed_precision,
        "output_dir": folder,
        "resume_from_checkpoint": "latest",
    }
    if not (folder / "vae").exists():
        steps = {"stage1_steps": arguments.autoencoder_steps - arguments.autoencoder_steps // 8}
        steps["stage2_steps"] = arguments.autoencoder_steps // 8
        launch_script("train_dae", {**AUTOENCODER, **common, **steps})
    if not (folder / "pipeline").exists():
        cache = {"vae": folder / "vae", "output_dir": folder / "latents"}
        launch_script(
            "cache_latents", {name: common[name] for name in ("dataset_name", "label_column", "resolution")} | cache
        )
        texts = {"caption_column": "text", "text_encoder": folder / "text_encoder", "latent_cache": folder / "latents"}
        given = {"vae": folder / "vae", "max_train_steps": arguments.max_train_steps}
        launch_script("train_dit", {**TRANSFORMER, **common, **texts, **given})


@torch.no_grad()
def nearest(drawn: torch.Tensor, train: ImageDataset) -> list[int]:
    """The training image that is nearest to each drawn one, by pixels of images shrunk to 8 x 8."""
    judge = PixelFeatures()
    return nearest_neighbors(judge(drawn), image_features(train, judge, Accelerator()))[1].flatten().tolist()


def show(arguments: argparse.Namespace) -> Image.Image:
    """Rows of samples, each with its nearest training image at the end."""
    name = arguments.dataset_name
    data = DataConfig(dataset_name=name, label_column="none", caption_column="text", resolution=64)
    train, validation = load_images(data)
    held_out = [validation.captions[number][0] for number in validation.spread(arguments.num_held_out)]
    prompts = [*held_out, *PROMPTS]
    wanted = [prompt for prompt in prompts for _ in range(PER_PROMPT)]
    images = draw_prompts(DAEDiTPipeline.from_pretrained(arguments.folder / "pipeline"), wanted, arguments)
    rows = images.unflatten(0, (-1, PER_PROMPT))
    found = train.__getitems__(nearest(rows[:, 0], train))["pixel_values"]
    rows = torch.cat((rows, found[:, None]), dim=1)
    return image_grid(
        rows.flatten(0, 1),
        columns=PER_PROMPT + 1,
        row_names=prompts,
        column_names=[*[""] * PER_PROMPT, "nearest"],
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="where everything goes; what is there already is used")
    parser.add_argument("--dataset_name", required=True)
    parser.add_argument("--autoencoder_steps", type=int, default=4000)
    parser.add_argument("--max_train_steps", type=int, default=5000)
    parser.add_argument("--num_held_out", type=int, default=6, help="prompts that are names of held-out pictures")
    parser.add_argument("--guidance_scale", type=float, default=3.0)
    parser.add_argument("--num_inference_steps", type=int, default=25)
    parser.add_argument("--mixed_precision", choices=["no", "bf16"], default="bf16")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    train(arguments)
    show(arguments).save(arguments.folder / "samples.png")


if __name__ == "__main__":
    main()
