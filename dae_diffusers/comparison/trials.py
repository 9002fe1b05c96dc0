"""Trains generators on the latents of an autoencoder, and measures it and their samples."""

from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL

from dae_diffusers.autoencoders.loading import load_autoencoder
from dae_diffusers.comparison.scripts import launch_script, shared_flags
from dae_diffusers.data import DataConfig, load_images
from dae_diffusers.data.arrays import read_value_range
from dae_diffusers.engine.distributed import measuring_accelerator
from dae_diffusers.metrics.drawings import measure_drawings
from dae_diffusers.metrics.evaluation import TrainingFeatures, encode_images, latent_metrics, reconstruction_metrics
from dae_diffusers.metrics.features import load_feature_extractor
from dae_diffusers.metrics.report import sample_grid
from dae_diffusers.metrics.sampling import SampleSettings, class_counts
from dae_diffusers.metrics.statistics import reference_statistics
from dae_diffusers.pipelines.dae_dit import DAEDiTPipeline
from dae_diffusers.store import read_rows


class Ruler:
    r"""
    Measures an autoencoder, and samples of generators on its latents.

    Args:
        experiment (`dict`): Its `data`, `features`, `num_images`, `num_inference_steps` and `mixed_precision` (of drawing; default: none)
            are used.
        vae (`Path` or `str`): The autoencoder: a folder or a Hub id.
        seed (`int`): Chooses noise.
        reference (`Path`): Folder of the training images' statistics.
    """

    def __init__(self, experiment: dict[str, Any], vae: Path | str, seed: int, reference: Path):
        self.experiment, self.seed, self.reference = experiment, seed, reference
        # Not as accelerate is configured: measurements of different starts are compared.
        self.accelerator = measuring_accelerator(experiment.get("mixed_precision") or "no")
        data = DataConfig(**experiment["data"])
        self.train, self.validation = load_images(data, value_range=read_value_range(str(vae)))
        self.some = self.train.choose(experiment["num_images"])
        self.extractor = load_feature_extractor(
            experiment["features"], self.accelerator.device, channels=self.train.config.image_channels
        )
        self.vae = load_autoencoder(str(vae)).eval().to(self.accelerator.device)
        self.seen = encode_images(self.vae, self.some, self.accelerator, extractor=self.extractor, measures={})

    def autoencoder(self) -> dict[str, Any]:
        """Reconstruction and latent space, on images that it was not trained on."""
        held_out = encode_images(self.vae, self.validation, self.accelerator, extractor=self.extractor)
        labels = self.train.labels and [torch.tensor(each.labels) for each in (self.some, self.validation)]
        probe = labels and (self.seen.latents, *labels)
        return {
            "reconstruction": reconstruction_metrics(held_out, self.extractor),
            "latent_space": latent_metrics(self.vae, held_out, self.extractor, self.accelerator, probe=probe),
        }

    def samples(
        self,
        pipeline: Path,
        folder: Path,
        vae: AutoencoderKL | None = None,
        *,
        guidance_scale: float = 1.0,
        grid: Path | None = None,
    ) -> dict[str, float]:
        """
        Draws samples into a folder and compares them with the training images, and with their reconstructions (`gap`). `grid` is a file
        for a picture of some of them.
        """
        instead = {} if vae is None else {"vae": vae}
        loaded = DAEDiTPipeline.from_pretrained(pipeline, **instead).to(self.accelerator.device)
        settings = SampleSettings(
            self.experiment["num_images"],
            guidance_scale,
            self.experiment["num_inference_steps"],
            seed=1000 + self.seed,
            class_counts=class_counts(loaded, self.train, loaded.null_class),
        )
        reference = reference_statistics(self.extractor, self.train, cache_dir=self.reference)
        training = TrainingFeatures(reference, self.seen.features, self.seen.reconstruction_features)
        (drawing,) = measure_drawings(loaded, settings, self.extractor, training, self.accelerator, folder=folder)
        if grid is not None:
            sample_grid(drawing.samples, settings.labels(loaded.null_class), loaded.id2label, rows=4).save(grid)
        return drawing.metrics


def train_generator(
    experiment: dict[str, Any], name: str, vae: Path, latents: Path, folder: Path, seed: int, **more: Any
) -> dict[str, Any]:
    r"""
    Trains a generator of the experiment on cached latents.

    Args:
        experiment (`dict`): Its `transformer` and `generators` say how.
        name (`str`): Which generator.
        vae, latents (`Path`): The autoencoder, and the cache of its latents.
        folder (`Path`): Where to; its `pipeline` is the result.
        seed (`int`): Of weights, noise and data order.
        more: Other flags of `train_dit.py`.

    Returns:
        `dict`: Its name, parameters, cost and validation loss.
    """
    options = {**experiment["transformer"], **(experiment["generators"][name] or {}), **more}
    if experiment["data"].get("balance_classes"):  # the only setting of the images that latents leave open
        options = {"balance_classes": experiment["data"]["balance_classes"], **options}
    cost = launch_script("train_dit", {**shared_flags(folder, seed), **options, "vae": vae, "latent_cache": latents})
    rows = read_rows(folder / "train_dit" / "log.jsonl")
    transformer = DAEDiTPipeline.from_pretrained(folder / "pipeline").transformer
    return {
        "generator": name,
        "parameters": transformer.num_parameters(),
        "generator_cost": cost,
        "validation_loss": next(row["validation/loss"] for row in reversed(rows) if "validation/loss" in row),
    }


def cache_latents(experiment: dict[str, Any], vae: Path, folder: Path) -> dict[str, float]:
    r"""Caches the latents of the experiment's images, and returns the cost."""
    return launch_script("cache_latents", {**experiment["data"], "vae": vae, "output_dir": folder})
