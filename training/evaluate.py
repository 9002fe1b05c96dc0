r"""
Measure an autoencoder, its latent space, and a pipeline: numbers, grids and plots.

    accelerate launch training/evaluate.py --vae runs/digits/vae --dataset_name digits --image_channels 1 \
        --features facebook/dinov2-small --output_dir runs/digits/evaluation
    accelerate launch training/evaluate.py --pipeline runs/digits/pipeline --dataset_name digits --image_channels 1 \
        --features inception --guidance_scales 1 2 4 --num_inference_steps 10 25

`metrics.json` and `metrics.md` in the output folder hold the numbers and their settings; docs/metrics.md explains each number.
Give the same command again to continue an interrupted evaluation: finished parts are in `samples/`, `parts/` and `reference/`
there, under a hash of what they depend on. You can remove these folders at the end.
"""

import logging
from collections.abc import Iterator
from pathlib import Path

import torch
from diffusers import DiffusionPipeline, ModelMixin

from dae_diffusers.autoencoders.loading import load_autoencoder, settle_images
from dae_diffusers.cli import parse_config
from dae_diffusers.data.configuration import DEFAULT_RESOLUTION
from dae_diffusers.engine.distributed import measuring_accelerator
from dae_diffusers.errors import UserError
from dae_diffusers.locks import take_folder
from dae_diffusers.metrics.checks import check_enough_images, check_guidance, check_takes_text
from dae_diffusers.metrics.clip_score import load_clip
from dae_diffusers.metrics.defaults import check_takes_defaults, set_defaults
from dae_diffusers.metrics.evaluator import Evaluator
from dae_diffusers.metrics.features import FeatureExtractor, load_feature_extractor
from dae_diffusers.metrics.given_samples import load_samples, side_of
from dae_diffusers.metrics.preparation import MAX_DRAWN_IMAGES, prepare_evaluation
from dae_diffusers.metrics.report import describe, plot_sweep, to_markdown
from dae_diffusers.metrics.sampling import autoencoder_of, find_pipeline, image_sides, load_pipeline
from dae_diffusers.metrics.settings import EvaluationConfig
from dae_diffusers.script import run_script
from dae_diffusers.store import write_atomically, write_json
from dae_diffusers.training.settings import EvaluateConfig

logger = logging.getLogger(__name__)


def main(config: EvaluateConfig) -> None:
    of = config.evaluation
    accelerator = measuring_accelerator(of.mixed_precision or "no")
    folder = Path(of.output_dir)
    lock = take_folder(folder, accelerator)
    of.pipeline = of.pipeline and find_pipeline(of.pipeline)
    pipeline = of.pipeline and load_pipeline(of.pipeline, accelerator.device)
    check_guidance(config.sampling, of.pipeline, pipeline)
    clip_model = None if pipeline is None else of.clip_model
    if clip_model is not None:
        check_takes_text(of.pipeline, pipeline)
    if config.sampling.set_defaults:
        check_takes_defaults(of.pipeline, pipeline)
    vae = choose_autoencoder(of, pipeline, accelerator.device)
    sides = None if pipeline is None else image_sides(pipeline)
    if of.samples_dir is not None and config.data.resolution is None:
        sides = side_of(of.samples_dir)
    if vae is None:
        if pipeline is not None:
            logger.info("%s has no autoencoder that can be measured, so only its samples are measured.", of.pipeline)
        config.data.settle(sides or DEFAULT_RESOLUTION)
    else:
        settle_images(config, vae.eval(), side=sides)
    judges = [*load_judges(config, accelerator.device)]
    clip = None if clip_model is None else load_clip(clip_model, accelerator.device)
    limit = config.sampling.num_images or MAX_DRAWN_IMAGES
    has_samples = of.samples_dir is not None
    train, validation, sampler = prepare_evaluation(
        config, pipeline, judges, accelerator, name=of.pipeline, vae=of.vae, has_samples=has_samples
    )
    extractor, *others = judges or [None]
    given = None
    if has_samples:
        given = load_samples(of.samples_dir, config.data, train.value_range, limit)
        config.sampling.num_images = len(given)
        check_enough_images(extractor, train, validation, len(given))

    evaluator = Evaluator(config, accelerator, train, validation, extractor=extractor, vae=vae, sampler=sampler)
    results, drawn = evaluator.measure(given, others, clip)
    if accelerator.is_main_process:
        results["setting"] = describe(config, vae, pipeline, train, validation, extractor, accelerator, others, clip)
        write_atomically(folder / "metrics.md", to_markdown(results))
        (folder / "sweep.png").unlink(missing_ok=True)  # of an earlier evaluation
        if len(drawn) > 1:
            plot_sweep(results["generation"], extractor.distance_name("g"), folder / "sweep.png")
        write_json(folder / "metrics.json", results)
        logger.info("%s\nwritten to %s", to_markdown(results), folder)
        if config.sampling.set_defaults:
            set_defaults(of.pipeline, pipeline, results["generation"], extractor.distance_name("g"))
    accelerator.end_training()
    lock.release()


def load_judges(config: EvaluateConfig, device: torch.device) -> Iterator[FeatureExtractor]:
    """The feature extractors of `--features` and `--more_features`."""
    of = config.evaluation
    names = [] if of.features is None else [of.features, *(of.more_features or [])]
    known = {}
    for name in names:
        judge = load_feature_extractor(name, device, channels=config.data.image_channels)
        column = judge.distance_name("g")
        if column in known:
            raise UserError(
                f"the judges {known[column]} and {name} would share the column {column}: rename the folder of one of them."
            )
        known[column] = name
        yield judge


def choose_autoencoder(
    of: EvaluationConfig, pipeline: DiffusionPipeline | None, device: torch.device
) -> ModelMixin | None:
    """Loads the autoencoder of `--vae`, or else that of the pipeline. If both are given, they must be the same."""
    own = None if pipeline is None else autoencoder_of(pipeline)
    if of.vae is None:
        return own
    vae = load_autoencoder(of.vae).to(device)
    if own is not None and not has_same_weights(own, vae):
        raise UserError(
            f"`--vae` {of.vae} is not the autoencoder that `--pipeline` {of.pipeline} decodes with, so `gap` would mean nothing. Leave "
            "`--vae` out, or evaluate the two in runs of their own."
        )
    return vae


def has_same_weights(one: torch.nn.Module, other: torch.nn.Module) -> bool:
    one, other = one.state_dict(), other.state_dict()
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


if __name__ == "__main__":
    run_script(main, parse_config(EvaluateConfig, description=__doc__))
