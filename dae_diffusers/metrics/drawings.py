"""Drawings of one setting: the same images to draw, with other noise each time."""

import statistics
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from diffusers import DiffusionPipeline

from dae_diffusers.caching import CachedRows, cached_values
from dae_diffusers.metrics.evaluation import TrainingFeatures, sample_metrics
from dae_diffusers.metrics.features import FeatureExtractor
from dae_diffusers.metrics.sampling import SampleSettings, draw_samples, generation_inputs
from dae_diffusers.metrics.schedulers import drawing_by
from dae_diffusers.randomness import Stream, derived_seed


@dataclass(frozen=True)
class Drawing:
    r"""
    Samples that were drawn once, and measured.

    Attributes:
        settings ([`~dae_diffusers.metrics.sampling.SampleSettings`], *optional*): How they were drawn; None for given images.
        inputs: What the samples depend on, as JSON can hold it; None where nothing is kept of them.
        samples ([`~dae_diffusers.caching.CachedRows`] or `torch.Tensor` of shape `(N, C, H, W)`): uint8.
        metrics (`dict[str, float]`): Those of [`~dae_diffusers.metrics.evaluation.sample_metrics`].
        most_alike (`list[tuple[int, int]]`): The numbers of the samples that are most like a training image, with that of the image.
    """

    settings: SampleSettings | None
    inputs: Any
    samples: CachedRows | torch.Tensor
    metrics: dict[str, float]
    most_alike: list[tuple[int, int]]


def measure_drawings(
    pipeline: DiffusionPipeline,
    settings: SampleSettings,
    extractor: FeatureExtractor,
    training: TrainingFeatures,
    accelerator: Accelerator,
    *,
    folder: Path,
    num_drawings: int = 1,
    image_shape: tuple[int, int, int] | None = None,
    batch_size: int = 64,
    parts: Path | None = None,
    of: list[Any] | None = None,
) -> list[Drawing]:
    r"""
    Draws samples of one setting once or several times, and compares each drawing with the training images. All processes call it.

    Args:
        pipeline (`DiffusionPipeline`), settings ([`~dae_diffusers.metrics.sampling.SampleSettings`]): What to draw.
        extractor ([`~dae_diffusers.metrics.features.FeatureExtractor`]): The judge.
        training ([`~dae_diffusers.metrics.evaluation.TrainingFeatures`]): What samples are compared with.
        accelerator ([`~accelerate.Accelerator`]): The run's accelerator.
        folder (`Path`): Samples are kept in its `samples/`.
        num_drawings (`int`, *optional*): How often to draw, see [`drawings_of`].
        image_shape (`tuple[int, int, int]`), batch_size (`int`, *optional*): As in [`~dae_diffusers.metrics.sampling.draw_samples`].
        parts (`Path`, *optional*): Where to keep features of the samples.
        of (`list`, *optional*): What `training` depends on, as JSON can hold it. With it metrics are kept in `parts` too.

    Raises:
        UserError: As [`~dae_diffusers.metrics.sampling.draw_samples`].
    """

    def measure(drawing: SampleSettings) -> Drawing:
        samples = draw_samples(
            pipeline, drawing, folder / "samples", accelerator, image_shape=image_shape, batch_size=batch_size
        )

        def compare() -> dict[str, Any]:
            metrics, nearest = sample_metrics(
                samples, extractor, training, accelerator, batch_size=batch_size, folder=parts
            )
            return {"metrics": metrics, "most_alike": nearest.most_alike()}

        if of is None:
            return Drawing(drawing, None, samples, **compare())
        inputs = generation_inputs(pipeline, drawing, accelerator)
        return Drawing(drawing, inputs, samples, **cached_values(compare, accelerator, folder=parts, of=[*of, inputs]))

    with drawing_by(pipeline, settings.scheduler):
        return [measure(drawing) for drawing in drawings_of(settings, num_drawings)]


def drawings_of(settings: SampleSettings, number: int) -> list[SampleSettings]:
    r"""The same setting with `number` seeds of noise, its own first."""
    seeds = [
        settings.seed,
        *(derived_seed(settings.seed, Stream.REPEATED_SAMPLES, drawing) for drawing in range(1, number)),
    ]
    return [replace(settings, seed=seed) for seed in seeds]


def over_drawings(rows: list[dict[str, float]], distance: str) -> dict[str, float]:
    r"""The means of each metric over drawings of one setting; of several, also `<distance>_sd`, the standard deviation of one drawing."""
    if len(rows) == 1:
        return rows[0]
    means = {}
    for name in rows[0]:
        means[name] = statistics.mean(row[name] for row in rows)
        if name == distance:
            means[f"{name}_sd"] = statistics.stdev(row[name] for row in rows)
    return means
