"""The settings with which a pipeline's images are drawn and compared, as the flags of `SamplingConfig` say."""

import itertools
import logging
from typing import Any

from diffusers import DiffusionPipeline

from dae_diffusers.data import ImageDataset
from dae_diffusers.guidance import intervals_of
from dae_diffusers.metrics.sampling import Sampler, SampleSettings, class_counts, prompts_of, prompts_of_images
from dae_diffusers.metrics.schedulers import full_name
from dae_diffusers.metrics.settings import SamplingConfig

logger = logging.getLogger(__name__)

# Options of a pipeline's call that are swept, and the flags with their values.
SWEPT = {
    "guidance_scale": "guidance_scales",
    "guidance_interval": "guidance_intervals",
    "num_inference_steps": "num_inference_steps",
    "scheduler": "schedulers",
}
# Their values for a pipeline without defaults of its own.
_USUAL = {"guidance_scale": 1.0, "guidance_interval": None, "num_inference_steps": 25, "scheduler": None}

# Options that are not swept.
NOT_SWEPT = ("temperature", "top_k", "top_p", "velocity_scale")


def what_to_draw(sampling: SamplingConfig, images: ImageDataset, pipeline: DiffusionPipeline) -> dict[str, Any]:
    r"""What samples are drawn from: captions and conditions of the images. A `prompt` takes the place of the captions."""
    of_images = prompts_of_images(images, sampling.num_images, pipeline)
    if sampling.prompt is None and of_images:
        return of_images
    texts = prompts_of(sampling.prompt, images.id2label)
    if "conditions" not in of_images:
        return {"prompts": texts}
    if texts is not None and len(texts) > 1:  # a text for each class; now one for each image
        texts = tuple(texts[label] for label in prompts_of_images(images, sampling.num_images)["classes"])
    return of_images | {"prompts": texts}


def texts_of(sampling: SamplingConfig, images: ImageDataset) -> list[str]:
    r"""The text of each image, as [`what_to_draw`] would draw it: its first caption, or the `prompt` with the name of its class."""
    if sampling.prompt is None:
        return [captions[0] for captions in images.captions]
    texts = prompts_of(sampling.prompt, images.id2label)
    return [texts[label] for label in images.labels] if len(texts) > 1 else [*texts] * len(images)


def is_by_class(sampling: SamplingConfig, sampler: Sampler) -> bool:
    r"""Whether samples are drawn from classes, or from a text for each, and not from captions or conditions of the images."""
    return sampler.conditions is None and (sampler.prompts is None or sampling.prompt is not None)


def values_of(option: str, sampling: SamplingConfig, pipeline: DiffusionPipeline) -> list[Any]:
    r"""The values of an option in `SWEPT` that are to be measured."""
    flag = SWEPT[option]
    values = _value_of(option, flag, sampling, pipeline)
    if values is None:
        return [_USUAL[option]]
    if option == "guidance_interval":
        return intervals_of(flag, values)
    if option == "scheduler":
        return [full_name(name) for name in values]
    return values if isinstance(values, list) else [values]


def _value_of(option: str, flag: str, sampling: SamplingConfig, pipeline: DiffusionPipeline) -> Any:
    """What is given, or the pipeline's default: cached samples are known by their settings."""
    given = getattr(sampling, flag)
    return pipeline.config.get(f"default_{option}") if given is None else given


def swept_settings(sampling: SamplingConfig, seed: int, sampler: Sampler, train: ImageDataset) -> list[SampleSettings]:
    r"""The settings to measure: one for each combination of the swept options that the pipeline has."""
    by_class = is_by_class(sampling, sampler)
    counts = class_counts(sampler.pipeline, train, sampler.num_classes) if by_class else None
    label_sampling = sampling.label_sampling if by_class else "data"
    if label_sampling == "data" and by_class and counts is None and sampler.num_classes:
        label_sampling = "balanced"
        logger.warning("the images do not have the pipeline's classes, so that each class is generated equally often.")

    pipeline = sampler.pipeline
    sweep = [values_of(option, sampling, pipeline) if option in sampler.accepted else [None] for option in SWEPT]
    others = {name: _value_of(name, name, sampling, pipeline) for name in NOT_SWEPT if name in sampler.accepted}
    return [
        SampleSettings(
            sampling.num_images,
            **dict(zip(SWEPT, chosen, strict=True)),
            label_sampling=label_sampling,
            seed=seed,
            prompts=sampler.prompts,
            classes=sampler.classes,
            conditions=sampler.conditions,
            class_counts=counts,
            **others,
        )
        for chosen in itertools.product(*sweep)
        if chosen[0] != 1 or chosen[1] == sweep[1][0]  # without guidance its interval changes nothing
    ]
