"""What an evaluation begins with: the images, and what draws the samples."""

import itertools
from collections.abc import Sequence
from typing import Any

from accelerate import Accelerator
from diffusers import DiffusionPipeline

from dae_diffusers.data import DataConfig, ImageDataset, load_images
from dae_diffusers.data.arrays import read_value_range
from dae_diffusers.metrics.checks import check_enough_images, check_judge, check_options, warn_of_missing_classes
from dae_diffusers.metrics.features import FeatureExtractor
from dae_diffusers.metrics.sampling import Sampler
from dae_diffusers.metrics.sweep import what_to_draw
from dae_diffusers.pipelines.dae_dit import columns_of

# Images that are drawn for each setting if no number is given, unless there are fewer training images.
MAX_DRAWN_IMAGES = 10_000


def prepare_evaluation(
    config: Any,
    pipeline: DiffusionPipeline | None,
    judges: Sequence[FeatureExtractor],
    accelerator: Accelerator,
    *,
    name: str | None,
    vae: str | None = None,
    has_samples: bool = False,
) -> tuple[ImageDataset, ImageDataset, Sampler | None]:
    r"""
    Loads the images of an evaluation and makes what draws the samples, once all has been found to fit together. All processes call it.

    Args:
        config: A composed settings class with the parts `data`, whose size is settled, and `sampling`, which gets its `num_images` here.
        pipeline (`DiffusionPipeline`, *optional*): What draws; None if only an autoencoder is measured.
        judges (`list` of [`~dae_diffusers.metrics.features.FeatureExtractor`]): The judges, if any. The first measures all, the others
            distances only.
        accelerator ([`~accelerate.Accelerator`]): The run's accelerator.
        name (`str` or `None`): Folder or Hub id of the pipeline.
        vae (`str`, *optional*): That of the autoencoder, if it is given on its own.
        has_samples (`bool`, *optional*): Whether there are samples already.

    Returns:
        `tuple`: Training images, held-out images, and the sampler, None without a pipeline.

    Raises:
        UserError: If the judge is partial, an option means nothing to the pipeline, or there are too few images.
    """
    data, sampling = config.data, config.sampling
    for each, judge in itertools.product(filter(None, (name, vae)), judges):
        check_judge(each, judge)
    take_columns(data, pipeline)
    value_range = read_value_range(vae) or (pipeline and pipeline.config.get("value_range"))
    with accelerator.main_process_first():
        train, validation = load_images(data, value_range=value_range, model=name or vae)
    sampling.num_images = sampling.num_images or min(MAX_DRAWN_IMAGES, len(train))
    described = validation if sampling.draw_from == "validation" else train
    sampler = None if pipeline is None else Sampler(pipeline, **what_to_draw(sampling, described, pipeline))
    check_options(sampling, sampler)
    if sampler is not None:
        warn_of_missing_classes(sampling, sampler, train)
    if judges:
        check_enough_images(
            judges[0], train, validation, sampling.num_images, of_samples=sampler is not None or has_samples
        )
    return train, validation, sampler


def take_columns(data: DataConfig, pipeline: DiffusionPipeline | None) -> None:
    r"""Names the columns that a pipeline draws from, unless flags name some."""
    conditions = getattr(pipeline, "conditions", None)
    if not conditions or data.has_conditions:
        return
    labels, (image, *_) = columns_of(conditions, "labels"), [*columns_of(conditions, "channels"), None]
    if pipeline.label_column is not None and data.label_column is None:
        data.label_column = [pipeline.label_column, *labels] if labels else pipeline.label_column
    data.continuous_columns, data.condition_column = columns_of(conditions, "mean"), image
