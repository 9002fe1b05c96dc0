"""What must fit together before anything is measured."""

import logging
from pathlib import Path

from diffusers import DiffusionPipeline

from dae_diffusers.data import ImageDataset
from dae_diffusers.errors import UserError
from dae_diffusers.fit_record import read_fit
from dae_diffusers.metrics.features import FeatureExtractor
from dae_diffusers.metrics.sampling import Sampler, takes_text
from dae_diffusers.metrics.schedulers import drawing_by
from dae_diffusers.metrics.settings import JUDGES_WITHOUT_NETWORK, SamplingConfig
from dae_diffusers.metrics.sweep import SWEPT, is_by_class, values_of
from dae_diffusers.settings import changes_of
from dae_diffusers.store import fingerprint
from dae_diffusers.vision import backbone_of
from dae_diffusers.weights import weights_of

logger = logging.getLogger(__name__)

# What the flags choose from.
_DRAWN_FROM = {"label_sampling": "classes alone", "draw_from": "captions or conditions"}

_FEWEST = 2  # images that have a distance to others


def check_guidance(sampling: SamplingConfig, name: str | None, pipeline: DiffusionPipeline | None) -> None:
    r"""
    Raises `UserError` if scales or intervals of guidance are given to a pipeline whose guidance is fixed, or intervals without a scale to
    compare them with.
    """
    given = {"guidance_scales": sampling.guidance_scales, "guidance_intervals": sampling.guidance_intervals}
    for option, values in given.items() if getattr(pipeline, "is_flow_map", False) else ():
        if values not in (None, [1.0]):
            raise UserError(
                f"{name} draws in few steps with its guidance in it, so `{option}` changes nothing: leave it out. "
                "`num_inference_steps 1 2 4 8` shows what steps change."
            )
    if pipeline is None:
        return
    if len(values_of("guidance_interval", sampling, pipeline)) > 1 and set(
        values_of("guidance_scale", sampling, pipeline)
    ) == {1.0}:
        raise UserError(
            "`guidance_intervals` compares intervals of guidance, but `guidance_scales` is 1, which is none. Give others, such as 1.5 2 3."
        )


def check_takes_text(name: str, pipeline: DiffusionPipeline) -> None:
    r"""Raises `UserError` if a pipeline draws from no text that its samples could follow."""
    if not takes_text(pipeline):
        raise UserError(
            f"`clip_model` compares samples with the texts that they are drawn from, but {name} is a {type(pipeline).__name__} that takes "
            "no text: leave it out."
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
    if sampler is None:
        return
    for scheduler in sampling.schedulers or () if "scheduler" in sampler.accepted else ():
        with drawing_by(sampler.pipeline, scheduler):
            pass  # it suits the pipeline
    unused = []
    if not is_by_class(sampling, sampler) or sampler.num_classes is None:
        unused.append("label_sampling")
    if is_by_class(sampling, sampler):
        unused.append("draw_from")
    for name in (name for name in unused if name in changes_of(sampling)):
        logger.warning(
            "`--%s` has no effect: the images of this pipeline are not drawn from %s.", name, _DRAWN_FROM[name]
        )


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
    r"""
    Raises `UserError` for fewer images than a judge needs: of `num_images` samples, or without `of_samples` of reconstructions
    alone.
    """
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
