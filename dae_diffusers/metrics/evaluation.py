"""The measurements of `training/evaluate.py`: of an autoencoder, of its latent space, and of images that a pipeline has drawn."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from accelerate import Accelerator
from diffusers import ModelMixin
from torch.utils.data import Subset

from dae_diffusers.autoencoders.loading import check_finite, decode_latents, encode_moments, spatial_factor
from dae_diffusers.caching import CachedRows, cached_rows
from dae_diffusers.data import ImageDataset, make_pass_loader
from dae_diffusers.data.dataset import choose_indices
from dae_diffusers.latents.cache import image_identity
from dae_diffusers.latents.codes import codebook_metrics, codes_of
from dae_diffusers.latents.diagnostics import LatentDiagnostics, linear_probe_accuracy
from dae_diffusers.latents.statistics import normalize_latents
from dae_diffusers.metrics.distances import (
    NUM_NEIGHBORS,
    density_coverage,
    distinct,
    frechet_distance,
    inception_score,
    kernel_distance,
    nearest_neighbors,
    precision_recall,
    spacings,
)
from dae_diffusers.metrics.features import FeatureExtractor
from dae_diffusers.metrics.image_quality import ImageMeasure, image_measures
from dae_diffusers.metrics.interpolation import interpolate_to_neighbors
from dae_diffusers.metrics.statistics import MAX_REFERENCE_IMAGES, FeatureStatistics, pad_batch, reference_statistics
from dae_diffusers.store import fingerprint
from dae_diffusers.weights import model_fingerprint


@dataclass
class EncodedImages:
    r"""
    The latents and reconstructions of some images, measured, in the images' order, the same on every process.

    Attributes:
        latents (`torch.Tensor` of shape `(N, C, h, w)`): Raw posterior means.
        features, reconstruction_features (`torch.Tensor` of shape `(N, D)` or `None`): Features of the images and of their
            reconstructions.
        quality (`dict[str, torch.Tensor]`): Quality of the reconstructions: a number for each image, `(N,)`, by measure.
        diagnostics ([`~dae_diffusers.latents.diagnostics.LatentDiagnostics`]): Diagnostics of the latents.
    """

    latents: torch.Tensor
    features: torch.Tensor | None
    reconstruction_features: torch.Tensor | None
    quality: dict[str, torch.Tensor]
    diagnostics: LatentDiagnostics


@dataclass(frozen=True)
class TrainingFeatures:
    r"""
    What samples are compared with, in the features of an extractor.

    Attributes:
        reference ([`~dae_diffusers.metrics.statistics.FeatureStatistics`]): Statistics of all training images.
        images (`torch.Tensor` of shape `(M, D)`): Features of some training images.
        reconstructions (`torch.Tensor` of shape `(M, D)` or `None`): Features of the reconstructions of these images. None without an
            autoencoder; then there is no `gap`.
        copied (`torch.Tensor` of shape `(K, D)`, *optional*): Features of the training images of which copies are looked for; default:
            `images`.
    """

    reference: FeatureStatistics
    images: torch.Tensor
    reconstructions: torch.Tensor | None = None
    copied: torch.Tensor | None = None

    def nearest(self, features: torch.Tensor) -> "Nearest":
        r"""The training image that is nearest to each row of features, `(N, D)`."""
        images = self.images if self.copied is None else self.copied
        distances, indices = (each[:, 0] for each in nearest_neighbors(features, images))
        unique, places = indices.unique(return_inverse=True)
        ratios = distances / spacings(images, unique)[places]
        ratios[distances == 0] = 0  # a copy, also of one of two equals
        return Nearest(indices, ratios)


class Nearest(NamedTuple):
    r"""
    The training image that is nearest to each sample, in the features of an extractor.

    Attributes:
        indices (`torch.Tensor` of shape `(N,)`): Its number.
        ratios (`torch.Tensor` of shape `(N,)`): The squared distance to it, divided by its own squared distance to its nearest other
            training image that is no copy of it: 0 for a copy. A sample with more than 1 is authentic.
    """

    indices: torch.Tensor
    ratios: torch.Tensor

    def most_alike(self, count: int = 12) -> list[tuple[int, int]]:
        r"""The numbers of the samples that are most like a copy, with those of their training images, most alike first."""
        return [(sample, int(self.indices[sample])) for sample in self.ratios.argsort(stable=True)[:count].tolist()]


@torch.no_grad()
def encode_images(
    vae: ModelMixin,
    images: ImageDataset,
    accelerator: Accelerator,
    *,
    extractor: FeatureExtractor | None = None,
    measures: dict[str, ImageMeasure] | None = None,
    batch_size: int = 64,
    num_workers: int = 0,
    folder: Path | None = None,
    description: str = "Reconstructing",
) -> EncodedImages:
    r"""
    Encodes and decodes each image once, without augmentation, from the posterior's mean. All processes call it.

    Args:
        vae ([`~diffusers.AutoencoderKL`]): The autoencoder, in eval mode, on the accelerator's device.
        images ([`~dae_diffusers.data.ImageDataset`]): The images.
        accelerator ([`~accelerate.Accelerator`]): The run's accelerator.
        extractor ([`~dae_diffusers.metrics.features.FeatureExtractor`], *optional*): Feature extractor.
        measures (`dict[str, ImageMeasure]`, *optional*): Measures of the reconstructions' quality; default: those that
            [`~dae_diffusers.metrics.image_quality.image_measures`] finds.
        batch_size, num_workers (`int`, *optional*): Per process; they do not change the results.
        folder (`Path`, *optional*): Where to keep finished parts, so that an interrupted evaluation can continue.
        description (`str`, *optional*): Text of the progress bar.

    Returns:
        [`EncodedImages`]: The same on every process.
    """
    if measures is None:
        measures = image_measures(tuple(images[0]["pixel_values"].shape))

    def encode(chunk: range) -> dict[str, torch.Tensor]:
        loader = make_pass_loader(Subset(images, chunk), batch_size=batch_size, num_workers=num_workers)
        rows: dict[str, list[torch.Tensor]] = {}
        for batch in loader:
            count = len(batch["pixel_values"])
            pixel_values = pad_batch(batch["pixel_values"].to(accelerator.device))
            mean, std = encode_moments(vae, pixel_values)
            check_finite(mean)
            values = {"latents": mean}
            if measures or extractor is not None:
                reconstruction = decode_latents(vae, mean).float().clamp(-1, 1)
                check_finite(reconstruction, "reconstructions of the autoencoder")
                values |= {name: measure(reconstruction, pixel_values) for name, measure in measures.items()}
            if std.any():  # a posterior
                values["std"] = std
            if extractor is not None:
                values["features"] = extractor(pixel_values)
                values["reconstruction_features"] = extractor(reconstruction)
            for name, value in values.items():
                rows.setdefault(name, []).append(value[:count].float().cpu())
        return {name: torch.cat(values) for name, values in rows.items()}

    rows = cached_rows(
        encode,
        len(images),
        accelerator,
        folder=folder,
        of=folder and {**evaluation_inputs(vae, images, extractor), "measures": sorted(measures)},
        description=description,
    )
    diagnostics = LatentDiagnostics.empty(tuple(rows["latents"].shape[1:]))
    for start in range(0, len(rows["latents"]), 64):
        part = slice(start, start + 64)
        diagnostics.add(rows["latents"][part], rows["std"][part] if "std" in rows else None)
    return EncodedImages(
        latents=rows["latents"],
        features=rows.get("features"),
        reconstruction_features=rows.get("reconstruction_features"),
        quality={name: rows[name] for name in measures},
        diagnostics=diagnostics,
    )


@torch.no_grad()
def image_features(
    images: ImageDataset,
    extractor: FeatureExtractor,
    accelerator: Accelerator,
    *,
    batch_size: int = 64,
    num_workers: int = 0,
    folder: Path | None = None,
    description: str = "Features of training images",
) -> torch.Tensor:
    r"""Features of the images alone, `(N, D)`; arguments as in [`encode_images`]."""

    def extract(chunk: range) -> dict[str, torch.Tensor]:
        loader = make_pass_loader(Subset(images, chunk), batch_size=batch_size, num_workers=num_workers)
        features = [
            extractor(pad_batch(batch["pixel_values"].to(accelerator.device)))[: len(batch["pixel_values"])].cpu()
            for batch in loader
        ]
        return {"features": torch.cat(features)}

    return cached_rows(
        extract,
        len(images),
        accelerator,
        folder=folder,
        of=folder and evaluation_inputs(None, images, extractor),
        description=description,
    )["features"]


def evaluation_inputs(
    vae: ModelMixin | None, images: ImageDataset, extractor: FeatureExtractor | None
) -> dict[str, Any]:
    r"""The inputs that an autoencoder's measurements on some images depend on, for [`~dae_diffusers.store.fingerprint_of_json`]."""
    return {
        "vae": None if vae is None else model_fingerprint(vae),
        "images": [len(images), image_identity(images)],
        "extractor": None if extractor is None else [extractor.name, extractor.fingerprint],
    }


def training_features(
    extractor: FeatureExtractor,
    images: ImageDataset,
    some: ImageDataset,
    accelerator: Accelerator,
    *,
    folder: Path,
    seen: EncodedImages | None = None,
    **work: int,
) -> TrainingFeatures:
    r"""
    What samples are compared with. One pass over the training images, and none if `some` are all.

    Args:
        extractor ([`~dae_diffusers.metrics.features.FeatureExtractor`]): The judge.
        images, some ([`~dae_diffusers.data.ImageDataset`]): All training images, and as many of them as are drawn.
        accelerator ([`~accelerate.Accelerator`]): The run's accelerator.
        folder (`Path`): Where to keep features (`parts/`) and statistics (`reference/`).
        seen ([`EncodedImages`], *optional*): How the autoencoder encodes `some`, with features.
        work: `batch_size` and `num_workers`, as in [`encode_images`].
    """
    keep = {"folder": folder / "parts", **work}
    if seen is None:
        of_some = [image_features(some, extractor, accelerator, **keep)]
    else:
        of_some = [seen.features, seen.reconstruction_features]
    copied, choice = of_some[0], compared_for_copies(images)
    if len(some) != len(choice):
        copied = image_features(choice, extractor, accelerator, **keep)
    if len(copied) == len(images):
        reference = FeatureStatistics.of(copied)
    else:
        reference = kept_reference(extractor, images, accelerator, folder, **work)
    return TrainingFeatures(reference, *of_some, copied=copied)


def compared_for_copies(images: ImageDataset) -> ImageDataset:
    r"""The training images of which copies are looked for: all, up to `MAX_REFERENCE_IMAGES`."""
    return images.choose(MAX_REFERENCE_IMAGES)


def kept_reference(
    extractor: FeatureExtractor, images: ImageDataset, accelerator: Accelerator, folder: Path, **work: int
) -> FeatureStatistics:
    r"""Statistics of all images, kept in `reference/`; arguments as in [`training_features`]."""
    hide = not accelerator.is_local_main_process
    return reference_statistics(extractor, images, cache_dir=folder / "reference", disable_progress=hide, **work)


@torch.no_grad()
def decode_features(
    vae: ModelMixin, latents: torch.Tensor, extractor: FeatureExtractor, accelerator: Accelerator
) -> torch.Tensor:
    r"""Features of decoded raw latents, `(N, C, h, w)` to `(N, D)`. The processes share the work."""
    image_pixels = latents[0, 0].numel() * spatial_factor(vae) ** 2

    def extract(chunk: range) -> dict[str, torch.Tensor]:
        features = []
        for part in latents[chunk.start : chunk.stop].split(64):
            images = decode_latents(vae, pad_batch(part.to(accelerator.device), image_pixels)).float().clamp(-1, 1)
            features.append(extractor(images)[: len(part)].cpu())
        return {"features": torch.cat(features)}

    return cached_rows(extract, len(latents), accelerator, folder=None, of=None, description="Decoding")["features"]


def reconstruction_metrics(encoded: EncodedImages, extractor: FeatureExtractor | None) -> dict[str, float]:
    r"""Means over images of `psnr` (dB), `ssim` and `lpips_<net>`, and the Fréchet distance of reconstructions to the images."""
    metrics = {name: values.double().mean().item() for name, values in encoded.quality.items()}
    if extractor is not None:
        name = extractor.distance_name("r")
        metrics[name] = frechet_distance(
            FeatureStatistics.of(encoded.reconstruction_features), FeatureStatistics.of(encoded.features)
        )
    return metrics


def latent_metrics(
    vae: ModelMixin,
    encoded: EncodedImages,
    extractor: FeatureExtractor | None,
    accelerator: Accelerator,
    *,
    probe: tuple[torch.Tensor, torch.Tensor, torch.Tensor] | None = None,
) -> dict[str, Any]:
    r"""
    Measures the latent space without a generator: diagnostics, `ifd` (iFID in the extractor's features) and `probe_accuracy`.

    Args:
        vae, accelerator: As in [`encode_images`].
        encoded ([`EncodedImages`]): Held-out images.
        extractor ([`~dae_diffusers.metrics.features.FeatureExtractor`], *optional*): Feature extractor for `ifd`.
        probe (`tuple`, *optional*): Latents and labels to fit the linear probe on, and the labels of `encoded`.
    """
    metrics = encoded.diagnostics.summary()
    if extractor is not None:
        between = interpolate_to_neighbors(encoded.latents, normalize_latents(encoded.latents, vae))
        features = decode_features(vae, between, extractor, accelerator)
        name = "i" + extractor.distance_name("r")[1:]
        metrics[name] = frechet_distance(FeatureStatistics.of(features), FeatureStatistics.of(encoded.features))
    if probe is not None:
        latents, labels, test_labels = probe
        metrics["probe_accuracy"] = linear_probe_accuracy(latents, labels, encoded.latents, test_labels)
    return metrics


def codebook_use(
    vae: ModelMixin, encoded: EncodedImages, accelerator: Accelerator, *, batch_size: int = 64
) -> dict[str, float]:
    r"""How encoded images use the codes of a `VQModel`: the result of [`~dae_diffusers.latents.codes.codebook_metrics`]."""
    parts = encoded.latents.split(batch_size)
    codes = torch.cat([codes_of(vae, part.to(accelerator.device)).flatten() for part in parts])
    return codebook_metrics(torch.bincount(codes, minlength=vae.config.num_vq_embeddings))


@torch.no_grad()
def sample_features(
    samples: torch.Tensor | CachedRows,
    extractor: FeatureExtractor,
    accelerator: Accelerator,
    *,
    batch_size: int = 64,
    folder: Path | None = None,
) -> dict[str, torch.Tensor]:
    r"""`features` of samples, `(N, D)`, and `logits` if the extractor is a classifier; arguments as in [`sample_metrics`]."""

    def extract(chunk: range) -> dict[str, torch.Tensor]:
        rows: dict[str, list[torch.Tensor]] = {}
        for part in samples[chunk.start : chunk.stop].split(batch_size):
            images = pad_batch(part.to(accelerator.device).float() / 127.5 - 1)
            if extractor.num_classes is None:
                values = {"features": extractor(images)}
            else:
                values = dict(zip(("features", "logits"), extractor.features_and_logits(images), strict=True))
            for name, value in values.items():
                rows.setdefault(name, []).append(value[: len(part)].cpu())
        return {name: torch.cat(values) for name, values in rows.items()}

    return cached_rows(
        extract,
        len(samples),
        accelerator,
        folder=folder,
        of=folder and [_fingerprint_of_rows(samples), extractor.fingerprint],
        description="Features of samples",
    )


def feature_metrics(
    features: torch.Tensor, extractor: FeatureExtractor, training: TrainingFeatures
) -> tuple[dict[str, float], Nearest]:
    r"""
    Compares features of images, `(N, D)`, with those of training images; see [`sample_metrics`]. Precision, recall, density and
    coverage compare as many of both: of training images a fixed random choice, because data may be sorted by class, without copies.

    Source of `authenticity`, the share of authentic samples: Alaa et al., 2022, https://huggingface.co/papers/2102.08921, here in the
    features themselves instead of a hypersphere learnt from them.
    """
    statistics = FeatureStatistics.of(features)
    metrics = {extractor.distance_name("g"): frechet_distance(statistics, training.reference)}
    if training.reconstructions is not None:
        metrics["gap"] = frechet_distance(statistics, FeatureStatistics.of(training.reconstructions))
    metrics["kernel_distance"] = kernel_distance(features, training.images)
    count = min(len(features), len(training.images))
    real = training.images[choose_indices(len(training.images), count)]
    different = distinct(real)  # among copies no ball has a radius
    if len(different) > NUM_NEIGHBORS:
        real = real[different]
    metrics["precision"], metrics["recall"] = precision_recall(real, features[: len(real)])
    metrics["density"], metrics["coverage"] = density_coverage(real, features[: len(real)])
    nearest = training.nearest(features)
    metrics["authenticity"] = (nearest.ratios > 1).double().mean().item()
    return metrics, nearest


@torch.no_grad()
def sample_metrics(
    samples: torch.Tensor | CachedRows,
    extractor: FeatureExtractor,
    training: TrainingFeatures,
    accelerator: Accelerator,
    *,
    batch_size: int = 64,
    folder: Path | None = None,
) -> tuple[dict[str, float], Nearest]:
    r"""
    Compares samples with the training images.

    Args:
        samples (`torch.Tensor` or [`~dae_diffusers.caching.CachedRows`] of shape `(N, C, H, W)`): uint8.
        extractor ([`~dae_diffusers.metrics.features.FeatureExtractor`]): Feature extractor.
        training ([`TrainingFeatures`]): What they are compared with.
        accelerator ([`~accelerate.Accelerator`]): The run's accelerator.
        batch_size (`int`, *optional*): Images at once, per process.
        folder (`Path`, *optional*): Where to keep features, so that an interrupted evaluation can continue.

    Returns:
        `tuple[dict, Nearest]`: The metrics, and the training image that is nearest to each sample.
        `gap` is the Fréchet distance to the *reconstructions* of training images. A decoder that blurs shrinks it too.
        Precision, recall, density and coverage compare `min(N, M)` of both.
    """
    gathered = sample_features(samples, extractor, accelerator, batch_size=batch_size, folder=folder)
    features = gathered["features"]
    metrics, nearest = feature_metrics(features, extractor, training)
    if "logits" in gathered:
        order = torch.randperm(len(features), generator=torch.Generator().manual_seed(0))  # parts must mix the classes
        name = "inception_score" if extractor.name == "inception" else f"classifier_score_{extractor.name}"
        metrics[name] = inception_score(gathered["logits"][order].softmax(dim=1))[0]
    return metrics, nearest


def _fingerprint_of_rows(rows: torch.Tensor | CachedRows) -> str:
    return fingerprint(rows[start : start + 256] for start in range(0, len(rows), 256))
