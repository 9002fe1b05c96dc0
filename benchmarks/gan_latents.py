r"""
Do latents take complexity off a generator? Small GANs of growing size, fed with noise or with latents.

    python benchmarks/gan_latents.py --data dataset_name=digits image_channels=1 resolution=32 --features features/digits \
        --sources noise joint=runs/joint/vae weak=runs/weak/vae prior=runs/weak/pipeline --output_dir runs/gan-digits

DAE (https://huggingface.co/papers/2307.08283) starts from this question: a GAN generator whose input is a latent of an encoder
instead of Gaussian noise needs less complexity. Every generator is trained in the same way, against a discriminator of the same
kind, and never sees which image a latent belongs to. The sources:

- `noise`: Gaussian, of the shape of the other sources' latents;
- `NAME=FOLDER` of an autoencoder: its normalised latents of images;
- `NAME=FOLDER` of a pipeline: the normalised latents that its generator draws, without guidance.

The images are halved. Training sees one half and its latents. The measurement takes latents of the other half, whose images no
generator was shown, or other draws of noise or of the pipeline, and compares the result with the images of the first half.

The table shows that Fréchet distance, mean over seeds, for each source and width, and that of the other half's own images; the picture
shows it over the number of parameters. What is finished stays in `rows.jsonl` and is not repeated.
"""

import argparse
import itertools
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from accelerate import Accelerator
from experiments.rows import keep_row, kept_rows
from experiments.settings import choose_data
from matplotlib.figure import Figure
from torch import nn
from tqdm.auto import tqdm

from dae_diffusers.autoencoders.discriminators import PatchDiscriminator
from dae_diffusers.autoencoders.loading import load_autoencoder, spatial_factor
from dae_diffusers.data import DataConfig, ImageDataset, load_images, make_pass_loader
from dae_diffusers.data.dataset import choose_indices
from dae_diffusers.errors import ConfigError, UserError
from dae_diffusers.fitting.decoder_fit import draw_latents, pool_labels
from dae_diffusers.latents.statistics import moments_of, normalize_latents
from dae_diffusers.losses.adversarial import augment, discriminator_loss, generator_loss
from dae_diffusers.metrics.distances import frechet_distance
from dae_diffusers.metrics.evaluation import image_features
from dae_diffusers.metrics.features import FeatureExtractor, load_feature_extractor
from dae_diffusers.metrics.sampling import load_pipeline
from dae_diffusers.metrics.statistics import FeatureStatistics, reference_statistics
from dae_diffusers.plots import image_grid
from dae_diffusers.randomness import derived_seed
from dae_diffusers.script import run_script
from dae_diffusers.store import write_atomically
from dae_diffusers.weights import model_fingerprint


class Generator(nn.Module):
    """Maps latents `(B, C, h, w)` to images `(B, channels, factor * h, factor * w)` in [-1, 1]; attention lets all positions speak."""

    def __init__(self, latent_channels: int, image_channels: int, factor: int, width: int):
        super().__init__()
        self.first = nn.Conv2d(latent_channels, width, 3, padding=1)
        self.blocks = nn.ModuleList(ResidualBlock(width) for _ in range(2))
        self.norm = nn.GroupNorm(1, width)
        self.attention = nn.MultiheadAttention(width, 1, batch_first=True)
        self.up = nn.ModuleList(ResidualBlock(width) for _ in range(int(math.log2(factor))))
        self.last = nn.Conv2d(width, image_channels, 3, padding=1)

    def forward(self, latents: torch.Tensor) -> torch.Tensor:
        hidden = self.blocks[0](self.first(latents))
        tokens = self.norm(hidden).flatten(2).transpose(1, 2)
        mixed = self.attention(tokens, tokens, tokens, need_weights=False)[0]
        hidden = self.blocks[1](hidden + mixed.transpose(1, 2).reshape(hidden.shape))
        for block in self.up:
            hidden = block(F.interpolate(hidden, scale_factor=2.0))
        return self.last(F.silu(hidden)).tanh()


class ResidualBlock(nn.Module):
    def __init__(self, width: int):
        super().__init__()
        self.layers = nn.Sequential(
            nn.GroupNorm(1, width), nn.SiLU(), nn.Conv2d(width, width, 3, padding=1),
            nn.GroupNorm(1, width), nn.SiLU(), nn.Conv2d(width, width, 3, padding=1),
        )  # fmt: skip

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        return hidden + self.layers(hidden)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--data", nargs="+", required=True, metavar="FLAG=VALUE", help="the images, as the training scripts name them"
    )
    parser.add_argument("--features", required=True, help="feature extractor that judges (Hub id or folder)")
    parser.add_argument("--sources", nargs="+", required=True, help="noise, NAME=AUTOENCODER, NAME=PIPELINE")
    parser.add_argument("--output_dir", type=Path, required=True)
    parser.add_argument("--widths", nargs="+", type=int, default=[8, 16, 32, 64], help="widths of the generators")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--batch_size", type=int, default=64)
    parser.add_argument(
        "--num_images",
        type=int,
        default=5000,
        help="images that are trained on, drawn and compared, at most half of all",
    )
    parser.add_argument("--learning_rate", type=float, default=4e-4)
    arguments = parser.parse_args()
    wrong = [source for source in arguments.sources if source != "noise" and "=" not in source]
    if wrong or all(source == "noise" for source in arguments.sources):
        parser.error(f"`--sources` takes noise and at least one NAME=FOLDER, not {arguments.sources}.")
    try:
        arguments.data = choose_data(arguments.data)
    except ConfigError as error:
        parser.error(str(error))
    return arguments


def main(arguments: argparse.Namespace) -> None:
    accelerator, config = Accelerator(), DataConfig(**arguments.data)
    train, others = halves(load_images(config)[0].choose(2 * arguments.num_images))
    extractor = load_feature_extractor(arguments.features, accelerator.device, channels=train.config.image_channels)
    arguments.output_dir.mkdir(parents=True, exist_ok=True)
    reference = reference_statistics(extractor, train, cache_dir=arguments.output_dir / "reference")
    real = frechet_distance(
        FeatureStatistics.of(image_features(others, extractor, accelerator)), reference
    )  # of the images whose latents are decoded
    sources = load_sources(arguments, train, others, accelerator)
    path = arguments.output_dir / "rows.jsonl"
    done = {json.dumps(of, sort_keys=True): row for of, row in kept_rows(path)} if path.exists() else {}
    rows = []
    todo = list(itertools.product(arguments.seeds, arguments.widths, sources.items()))
    for seed, width, (name, (latents, factor, described)) in tqdm(todo, desc="GANs", unit="run"):
        of = {
            "source": described, "width": width, "seed": seed, "images": [train.fingerprint, others.fingerprint],
            "features": extractor.fingerprint,
            **{key: getattr(arguments, key) for key in ("steps", "batch_size", "learning_rate")},
        }  # fmt: skip
        key = json.dumps(of, sort_keys=True)
        if key not in done:
            generator = train_gan(latents, factor, train, width, seed, arguments, accelerator)
            row = measure(generator, latents, seed, extractor, reference, arguments, name, width)
            keep_row(path, row, of)
            done[key] = row
        rows.append({"source": name, "width": width, "seed": seed, **done[key]})
    text = f"{table_of(rows)}\nThe other half's own images: {real:.3g}, {len(others)} of them.\n"
    write_atomically(arguments.output_dir / "results.md", text)
    plot(rows, real, arguments.output_dir / "results.png")
    print(text)


def halves(images: ImageDataset) -> tuple[ImageDataset, ImageDataset]:
    """Two equal parts of the images, chosen at random."""
    one = choose_indices(len(images), len(images) // 2)
    other = np.setdiff1d(np.arange(len(images)), one)[: len(one)]
    return images.select(one), images.select(other)


def load_sources(
    arguments: argparse.Namespace, train: ImageDataset, others: ImageDataset, accelerator: Accelerator
) -> dict[str, tuple[torch.Tensor, int, Any]]:
    """For each name the latents, twice as many as images (the first half to train with), the factor to images, and a fingerprint."""
    found = {}
    for source in arguments.sources:
        name, _, folder = source.partition("=")
        if name == "noise":
            continue
        count = len(train) + len(others)
        if (Path(folder) / "model_index.json").exists():
            pipeline = load_pipeline(folder, accelerator.device)
            latents = draw_latents(
                pipeline, pool_labels(pipeline, train, count, 0), count, arguments.output_dir / "drawn", accelerator,
                guidance_scale=1.0, num_inference_steps=25, seed=0,
            )  # fmt: skip
            vae, described = (
                pipeline.vae,
                ["prior", model_fingerprint(pipeline.transformer), model_fingerprint(pipeline.vae)],
            )
            latents = normalize_latents(latents, vae)
        else:
            vae = load_autoencoder(folder).to(accelerator.device)
            described = ["encoder", model_fingerprint(vae)]
            latents = torch.cat([encode(vae, part) for part in (train, others)])
        found[name] = latents, spatial_factor(vae), described
    shapes = {name: (tuple(latents.shape[1:]), factor) for name, (latents, factor, _) in found.items()}
    if len(set(shapes.values())) > 1:
        raise UserError(f"the sources differ in the shape of their latents: {shapes}. Compare those of one shape.")
    if "noise" in arguments.sources:
        latents, factor, _ = next(iter(found.values()))
        noise = torch.randn(latents.shape, generator=torch.Generator().manual_seed(derived_seed(0, 12)))
        found = {"noise": (noise, factor, ["noise", list(latents.shape[1:])]), **found}
    return found


@torch.no_grad()
def encode(vae, images: ImageDataset) -> torch.Tensor:
    """Normalised draws from the posteriors of the images."""
    means, stds = [], []
    for batch in make_pass_loader(images, batch_size=64):
        mean, std = moments_of(batch, vae, vae.device)
        means.append(mean.cpu())
        stds.append(std.cpu())
    mean, std = torch.cat(means), torch.cat(stds)
    noise = torch.randn(mean.shape, generator=torch.Generator().manual_seed(derived_seed(0, 13)))
    return normalize_latents(mean + std * noise, vae)


def train_gan(
    latents: torch.Tensor,
    factor: int,
    images: ImageDataset,
    width: int,
    seed: int,
    arguments: argparse.Namespace,
    accelerator,
) -> Generator:
    """The generator with averaged weights."""
    torch.manual_seed(derived_seed(seed, 14))
    device, channels = accelerator.device, images.config.image_channels
    generator = Generator(latents.shape[1], channels, factor, width).to(device)
    averaged = torch.optim.swa_utils.AveragedModel(
        generator, multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(0.998)
    )
    layers = 2 if min(images.config.size) < 32 else 3
    discriminator = PatchDiscriminator(channels, 32, layers).to(device)
    rate = arguments.learning_rate
    optimizers = [torch.optim.Adam(each.parameters(), rate, betas=(0.5, 0.99)) for each in (generator, discriminator)]
    half = len(latents) // 2
    draws = torch.Generator().manual_seed(derived_seed(seed, 15))
    for _ in tqdm(range(arguments.steps), desc=f"width {width}", leave=False):
        chosen = torch.randint(half, (arguments.batch_size,), generator=draws)
        real = images.__getitems__(torch.randint(len(images), (arguments.batch_size,), generator=draws).tolist())
        real, given = real["pixel_values"].to(device), latents[chosen].to(device)
        fake = generator(given)
        logits = discriminator(augment(torch.cat([real, fake.detach()]))).chunk(2)
        step(optimizers[1], discriminator_loss(*logits, "hinge"))
        step(optimizers[0], generator_loss(discriminator(augment(fake)), "hinge"))
        averaged.update_parameters(generator)
    return averaged.module.eval()


def step(optimizer: torch.optim.Optimizer, loss: torch.Tensor) -> None:
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()


@torch.no_grad()
def measure(
    generator: Generator, latents: torch.Tensor, seed: int, extractor: FeatureExtractor, reference: FeatureStatistics,
    arguments: argparse.Namespace, name: str, width: int,
) -> dict[str, Any]:  # fmt: skip
    """Its distance on the latents that it was not trained with, and a grid."""
    device, statistics = next(generator.parameters()).device, FeatureStatistics.empty(extractor.feature_dim)
    first = None
    for part in latents[len(latents) // 2 :].split(64):
        images = generator(part.to(device))
        first = images if first is None else first
        statistics.add(extractor(images))
    image_grid(first[:40]).save(arguments.output_dir / f"{name}-{width}-{seed}.png")
    return {
        "parameters": sum(parameter.numel() for parameter in generator.parameters()),
        "fd": frechet_distance(statistics, reference),
    }


def table_of(rows: list[dict[str, Any]]) -> str:
    """Fréchet distances by source and width: mean over seeds, with the smallest and the largest."""
    widths = list(dict.fromkeys(row["width"] for row in rows))
    sizes = {row["width"]: row["parameters"] for row in rows}
    lines = [
        f"| latents | {' | '.join(f'width {width}, {sizes[width]:,} weights' for width in widths)} |",
        "|---" * (len(widths) + 1) + "|",
    ]
    for source in dict.fromkeys(row["source"] for row in rows):
        cells = []
        for width in widths:
            values = [row["fd"] for row in rows if (row["source"], row["width"]) == (source, width)]
            spread = f" [{min(values):.3g}, {max(values):.3g}]" if len(values) > 1 else ""
            cells.append(f"{math.fsum(values) / len(values):.3g}{spread}" if values else "")
        lines.append(f"| {source} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def plot(rows: list[dict[str, Any]], real: float, path: Path) -> None:
    figure = Figure(figsize=(6, 4), layout="constrained")
    axis = figure.subplots()
    for number, source in enumerate(dict.fromkeys(row["source"] for row in rows)):
        points: dict[int, list[float]] = {}
        for row in rows:
            if row["source"] == source:
                points.setdefault(row["parameters"], []).append(row["fd"])
        sizes = sorted(points)
        axis.plot(
            sizes,
            [math.fsum(points[size]) / len(points[size]) for size in sizes],
            "o-",
            color=f"C{number}",
            label=source,
        )
        for size in sizes:
            axis.scatter([size] * len(points[size]), points[size], s=10, color=f"C{number}", alpha=0.5)
    axis.axhline(real, color="gray", linestyle=":", label="real images of the other half")
    axis.set_xscale("log")
    axis.set_yscale("log")
    axis.set_xlabel("weights of the generator")
    axis.set_ylabel("FD to the training images ↓")
    axis.legend(frameon=False)
    figure.savefig(path, dpi=120)


if __name__ == "__main__":
    run_script(main, parse_arguments())
