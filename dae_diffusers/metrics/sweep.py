"""The settings with which a pipeline's images are drawn and compared, as the flags of `SamplingConfig` say."""

import itertools
import logging
import statistics
from dataclasses import replace
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from diffusers import DiffusionPipeline

from dae_diffusers.data import DataConfig, ImageDataset, load_images
from dae_diffusers.data.arrays import read_value_range
from dae_diffusers.errors import UserError
from dae_diffusers.fit_record import read_fit
from dae_diffusers.metrics.features import FeatureExtractor
from dae_diffusers.metrics.sampling import Sampler, SampleSettings, class_counts, prompts_of, prompts_of_images
from dae_diffusers.metrics.settings import JUDGES_WITHOUT_NETWORK, SamplingConfig
from dae_diffusers.pipelines.dae_dit import DAEDiTPipeline, columns_of
from dae_diffusers.pipelines.dae_vqgan import PIPELINE_FILE, DAEVQGANPipeline
from dae_diffusers.randomness import derived_seed
from dae_diffusers.settings import changes_of
from dae_diffusers.store import fingerprint, read_json, weights_of, write_atomically, write_json
from dae_diffusers.vision import backbone_of

logger = logging.getLogger(__name__)

# Options of a pipeline's call that are swept, and the flags with their values.
SWEPT = {"guidance_scale": "guidance_scales", "num_inference_steps": "num_inference_steps"}

# Options that are not swept.
_OTHERS = ("temperature", "top_k", "top_p", "velocity_scale")

# Images that are drawn for each setting if no number is given, unless there are fewer training images.
_MAX_DRAWN_IMAGES = 10_000

_FEWEST = 2  # images that have a distance to others


def load_and_check(
    config: Any,
    seed: int,
    pipeline: DiffusionPipeline | None,
    extractor: FeatureExtractor | None,
    accelerator: Accelerator,
    *,
    name: str | None,
    vae: str | None = None,
) -> tuple[ImageDataset, ImageDataset, Sampler | None]:
    r"""
    Loads the images of an evaluation and makes what draws the samples, once all has been found to fit together. All processes call it.

    Args:
        config: A composed settings class with the parts `data`, whose size is settled, and `sampling`, which gets its `num_images` here.
        seed (`int`): Chooses the held-out images.
        pipeline (`DiffusionPipeline`, *optional*): What draws; None if only an autoencoder is measured.
        extractor ([`~dae_diffusers.metrics.features.FeatureExtractor`], *optional*): The judge.
        accelerator ([`~accelerate.Accelerator`]): The run's accelerator.
        name (`str` or `None`): Folder or Hub id of the pipeline.
        vae (`str`, *optional*): That of the autoencoder, if it is given on its own.

    Returns:
        `tuple`: Training images, held-out images, and the sampler, None without a pipeline.

    Raises:
        UserError: If the judge is partial, an option means nothing to the pipeline, or there are too few images.
    """
    data, sampling = config.data, config.sampling
    for each in filter(None, (name, vae)) if extractor is not None else ():
        check_judge(each, extractor)
    take_columns(data, pipeline)
    value_range = read_value_range(vae) or (pipeline and pipeline.config.get("value_range"))
    with accelerator.main_process_first():
        train, validation = load_images(data, seed, value_range=value_range, model=name or vae)
    sampling.num_images = sampling.num_images or min(_MAX_DRAWN_IMAGES, len(train))
    described = validation if sampling.draw_from == "validation" else train
    sampler = None if pipeline is None else Sampler(pipeline, **what_to_draw(sampling, described, pipeline))
    check_options(sampling, sampler)
    if sampler is not None:
        warn_of_missing_classes(sampling, sampler, train)
    if extractor is not None:
        check_enough_images(extractor, train, validation, sampling.num_images, of_samples=sampler is not None)
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


def check_guidance(sampling: SamplingConfig, name: str | None, pipeline: DiffusionPipeline | None) -> None:
    r"""Raises `UserError` if guidance scales are given to a pipeline whose guidance is fixed."""
    if getattr(pipeline, "is_flow_map", False) and sampling.guidance_scales != [1.0]:
        raise UserError(
            f"{name} draws in few steps with its guidance in it, so `guidance_scales` changes nothing: leave it out. "
            "`num_inference_steps 1 2 4 8` shows what steps change."
        )


def check_judge(name_or_path: str | Path, extractor: FeatureExtractor) -> None:
    r"""
    Raises `UserError` if a decoder was fitted in the features that are to judge it.

    Args:
        name_or_path (`str`): A pipeline or an autoencoder, in a folder or on the Hub.
        extractor ([`~dae_diffusers.metrics.features.FeatureExtractor`]): The judge.
    """
    fit = read_fit(name_or_path)
    if extractor.name in JUDGES_WITHOUT_NETWORK:
        if fit:
            logger.warning(
                "the decoder of %s was fitted in statistics of pixels and spectrum (stage 3), so %s judges it too kindly.",
                name_or_path,
                extractor.name,
            )
        return
    weights = fit.get("feature_weights")
    if weights and weights == fingerprint(weights_of(backbone_of(extractor.model))):
        raise UserError(
            f"the decoder of {name_or_path} was fitted in the features of {extractor.name} (stage 3), which cannot judge it. Choose other "
            "`features`, best of another kind."
        )


def check_options(sampling: SamplingConfig, sampler: Sampler | None) -> None:
    r"""Raises `UserError` for an option that the pipeline does not have."""
    for name in ("prompt", "temperature", "top_k", "top_p", "velocity_scale"):
        if getattr(sampling, name) is not None and (sampler is None or name not in sampler.accepted):
            whom = "an autoencoder" if sampler is None else type(sampler.pipeline).__name__
            raise UserError(f"`{name}` means nothing to {whom}; leave it out.")
    for option, name in SWEPT.items() if sampler is not None else ():
        if option not in sampler.accepted and name in changes_of(sampling):
            logger.warning("`--%s` has no effect on what a %s draws.", name, type(sampler.pipeline).__name__)


def _fewest_samples(extractor: FeatureExtractor) -> int:
    r"""The fewest samples that can be measured: density and coverage have a fifth neighbour, a classifier's score has ten parts."""
    return 6 if extractor.num_classes is None else 10


def check_enough_images(
    extractor: FeatureExtractor,
    train: ImageDataset,
    validation: ImageDataset,
    num_images: int,
    *,
    of_samples: bool = True,
) -> None:
    r"""Raises `UserError` for fewer images than a judge needs: of `num_images` samples, or without `of_samples` of reconstructions alone."""
    needed = _fewest_samples(extractor) if of_samples else _FEWEST
    if len(validation) < _FEWEST or min(len(train), num_images) < needed:
        raise UserError(
            f"too few images to compare: {len(train)} training, {len(validation)} validation and `num_images` {num_images}, but at least "
            f"{needed}, {_FEWEST} and {needed} are needed. Distances mean little below some hundreds."
        )


def warn_of_missing_classes(sampling: SamplingConfig, sampler: Sampler, train: ImageDataset) -> None:
    r"""Logs a warning if the samples do not have all classes, or have some that the images do not have."""
    if sampling.label_sampling != "random" and sampling.num_images < (sampler.num_classes or 0):
        logger.warning(
            "`--num_images` %d of %d classes: some classes are not drawn. Draw more, or use `--label_sampling random`.",
            sampling.num_images,
            sampler.num_classes,
        )
    known = getattr(sampler.pipeline, "id2label", None)
    missing = sorted(set(known.values()) - set(train.id2label.values())) if known and train.id2label else []
    if missing and sampling.label_sampling != "data":
        logger.warning(
            "there are no images of classes that the pipeline draws, such as %r: use `--label_sampling data`, or give images of all.",
            missing[0],
        )


def is_by_class(sampling: SamplingConfig, sampler: Sampler) -> bool:
    r"""Whether samples are drawn from classes, or from a text for each, and not from captions or conditions of the images."""
    return sampler.conditions is None and (sampler.prompts is None or sampling.prompt is not None)


def swept_settings(sampling: SamplingConfig, seed: int, sampler: Sampler, train: ImageDataset) -> list[SampleSettings]:
    r"""The settings to measure: one for each combination of the swept options that the pipeline has."""
    by_class = is_by_class(sampling, sampler)
    counts = class_counts(sampler.pipeline, train, sampler.num_classes) if by_class else None
    label_sampling = sampling.label_sampling
    if label_sampling == "data" and by_class and counts is None and sampler.num_classes:
        label_sampling = "balanced"
        logger.warning("the images do not have the pipeline's classes, so that each class is generated equally often.")
    sweep = [getattr(sampling, flag) if option in sampler.accepted else [None] for option, flag in SWEPT.items()]
    others = {}
    for name in _OTHERS:  # with the pipeline's defaults, because kept samples are known by their settings
        given = getattr(sampling, name)
        others[name] = sampler.pipeline.config.get(f"default_{name}") if given is None else given
    others = {name: value for name, value in others.items() if name in sampler.accepted}
    return [
        SampleSettings(
            sampling.num_images,
            *chosen,
            label_sampling,
            seed,
            prompts=sampler.prompts,
            classes=sampler.classes,
            conditions=sampler.conditions,
            class_counts=counts,
            **others,
        )
        for chosen in itertools.product(*sweep)
    ]


def drawings_of(settings: SampleSettings, number: int) -> list[SampleSettings]:
    r"""The same setting with `number` seeds of noise, its own first."""
    seeds = [settings.seed, *(derived_seed(settings.seed, 17, drawing) for drawing in range(1, number))]
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


def check_takes_defaults(name: str, pipeline: DiffusionPipeline) -> None:
    r"""Raises `UserError` if the pipeline keeps no defaults, or cannot be written to."""
    if not isinstance(pipeline, DAEDiTPipeline | DAEVQGANPipeline):
        raise UserError(
            f"`set_defaults` is for DAEDiTPipeline and DAEVQGANPipeline, but {name} is a {type(pipeline).__name__}. Leave it out."
        )
    if not Path(name).is_dir():
        raise UserError(
            f"`set_defaults` writes into the folder of a pipeline, but {name} is on the Hub. Download it first."
        )


def write_defaults(pipeline: Path, **options: float) -> None:
    r"""Makes options of the call those with which the pipeline in a folder draws by default."""
    path, code = pipeline / DAEDiTPipeline.config_name, pipeline / PIPELINE_FILE
    index = read_json(path)
    if index["_class_name"] == "DAEVQGANPipeline" and code.exists():  # an earlier version's may not know these defaults
        write_atomically(code, DAEVQGANPipeline._code)
    write_json(path, index | {f"default_{option}": value for option, value in options.items()})


def set_defaults(name: str, rows: list[dict[str, Any]], distance: str) -> None:
    r"""Makes the settings of the row with the lowest distance those with which the pipeline draws by default."""
    best = min(rows, key=lambda row: row[distance])
    chosen = {option: best[option] for option in (*SWEPT, *_OTHERS) if option in best}
    write_defaults(Path(name), **chosen)
    logger.info("%s now draws with %s by default", name, ", ".join(f"{each} {chosen[each]:g}" for each in chosen))
