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

import itertools
import logging
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from diffusers import DiffusionPipeline, ModelMixin

from dae_diffusers.autoencoders.loading import is_vq, load_autoencoder, settle_images
from dae_diffusers.cli import parse_config, run_script, show_messages
from dae_diffusers.data import DataConfig, ImageDataset, load_images
from dae_diffusers.data.arrays import read_value_range
from dae_diffusers.engine.distributed import PROCESS_GROUP
from dae_diffusers.errors import UserError
from dae_diffusers.evaluation_record import name_of_setting
from dae_diffusers.fitting.decoder_fit import check_judge
from dae_diffusers.latents.diagnostics import plot_latent_space
from dae_diffusers.locks import take_folder
from dae_diffusers.metrics.evaluation import (
    EncodedImages,
    codebook_use,
    encode_images,
    evaluation_inputs,
    image_features,
    latent_metrics,
    reconstruction_metrics,
    sample_features,
    sample_metrics,
)
from dae_diffusers.metrics.features import FeatureExtractor, load_feature_extractor
from dae_diffusers.metrics.image_quality import image_measures
from dae_diffusers.metrics.kept import KeptRows, keep_values
from dae_diffusers.metrics.report import describe, draw_reconstructions, plot_sweep, save_grids, to_markdown
from dae_diffusers.metrics.sampling import (
    Sampler,
    SampleSettings,
    autoencoder_of,
    class_counts,
    draw_samples,
    generation_inputs,
    image_sides,
    load_pipeline,
    prompts_of,
    prompts_of_images,
    say_duration,
)
from dae_diffusers.metrics.statistics import reference_statistics
from dae_diffusers.metrics.yardstick import Yardstick
from dae_diffusers.pipelines.dae_dit import DAEDiTPipeline, columns_of
from dae_diffusers.settings import changes_of
from dae_diffusers.store import read_json, write_atomically, write_json
from dae_diffusers.training.settings import EvaluateConfig

logger = logging.getLogger(__name__)

# Options of a pipeline's call that are swept, and the flags with their values.
SWEPT = {"guidance_scale": "guidance_scales", "num_inference_steps": "num_inference_steps"}


def main(config: EvaluateConfig) -> None:
    accelerator = Accelerator(
        mixed_precision=config.evaluation.mixed_precision or "no", kwargs_handlers=[PROCESS_GROUP]
    )
    show_messages(accelerator.is_main_process)
    folder = Path(config.evaluation.output_dir)
    lock = take_folder(folder, accelerator)
    pipeline = (
        None if config.evaluation.pipeline is None else load_pipeline(config.evaluation.pipeline, accelerator.device)
    )
    if getattr(pipeline, "is_flow_map", False) and config.sampling.guidance_scales != [1.0]:
        raise UserError(
            f"{config.evaluation.pipeline} draws in few steps with its guidance in it, so `guidance_scales` changes nothing: leave it out. "
            "`num_inference_steps 1 2 4 8` shows what steps change."
        )
    if config.sampling.set_defaults:
        check_takes_defaults(config.evaluation.pipeline, pipeline)
    vae = choose_autoencoder(config, pipeline, accelerator.device)
    sides = None if pipeline is None else image_sides(pipeline)
    if vae is None:
        logger.info(
            "%s has no autoencoder that can be measured, so only its samples are measured.", config.evaluation.pipeline
        )
        config.data.settle(*[] if sides is None else [sides])
    else:
        settle_images(config, vae.eval(), side=sides)
    extractor = (
        None
        if config.evaluation.features is None
        else load_feature_extractor(config.evaluation.features, accelerator.device)
    )
    vae_path = config.evaluation.vae
    if extractor is not None:
        for name in filter(None, (config.evaluation.pipeline, vae_path)):
            check_judge(name, extractor)
    take_columns(config.data, pipeline)
    value_range = read_value_range(vae_path) if vae_path else pipeline.config.get("value_range")
    with accelerator.main_process_first():
        train, validation = load_images(
            config.data, config.evaluation.seed, value_range=value_range, model=config.evaluation.pipeline or vae_path
        )
    config.sampling.num_images = config.sampling.num_images or min(10_000, len(train))
    sampler = None if pipeline is None else Sampler(pipeline, **what_to_draw(config, train, pipeline))
    check_options(config, sampler)
    check_counts(config, sampler, extractor, train, validation)

    some = train.choose(config.sampling.num_images)
    results, held_out, seen = {}, None, None
    if vae is not None:
        results, held_out, seen = evaluate_autoencoder(config, vae, some, validation, extractor, accelerator)
    drawn: list[KeptRows] = []
    of_train = ()
    if sampler is not None:
        results["generation"], drawn, of_train = evaluate_samples(
            config, sampler, vae, train, some, seen, extractor, accelerator
        )
    if extractor is not None:
        sweep = [] if sampler is None else swept_settings(config, sampler, train)
        results |= keep_values(
            lambda: measure_real_images(config, train, validation, held_out, extractor, drawn, of_train, accelerator),
            accelerator,
            folder=folder / "parts",
            of=["real images", *(evaluation_inputs(vae, images, extractor) for images in (train, validation, some))]
            + [generation_inputs(sampler.pipeline, settings, accelerator) for settings in sweep],
        )

    if accelerator.is_main_process:
        results["setting"] = describe(config, vae, pipeline, train, validation, extractor, accelerator)
        write_atomically(folder / "metrics.md", to_markdown(results))
        if len(results.get("generation", [])) > 1:
            plot_sweep(results["generation"], extractor.distance_name("g"), folder / "sweep.png")
        write_json(folder / "metrics.json", results)
        logger.info("%s\nwritten to %s", to_markdown(results), folder)
        if config.sampling.set_defaults:
            set_defaults(config.evaluation.pipeline, results["generation"], extractor.distance_name("g"))
    accelerator.end_training()
    lock.release()


def check_takes_defaults(name: str, pipeline: DiffusionPipeline) -> None:
    """Raises `UserError` if the pipeline keeps no defaults, or cannot be written to."""
    if not isinstance(pipeline, DAEDiTPipeline):
        raise UserError(
            f"`set_defaults` is for DAEDiTPipelines, but {name} is a {type(pipeline).__name__}. Leave it out."
        )
    if not Path(name).is_dir():
        raise UserError(
            f"`set_defaults` writes into the folder of a pipeline, but {name} is on the Hub. Download it first."
        )


def set_defaults(name: str, rows: list[dict[str, Any]], distance: str) -> None:
    """Makes the settings of the row with the lowest distance those with which the pipeline draws by default."""
    best = min(rows, key=lambda row: row[distance])
    chosen = {option: best[option] for option in SWEPT if option in best}
    path = Path(name) / DAEDiTPipeline.config_name
    write_json(path, read_json(path) | {f"default_{option}": value for option, value in chosen.items()})
    logger.info("%s now draws with %s by default", name, ", ".join(f"{each} {chosen[each]:g}" for each in chosen))


def take_columns(data: DataConfig, pipeline: DiffusionPipeline | None) -> None:
    """Names the columns that a pipeline draws from, unless flags name some."""
    conditions = getattr(pipeline, "conditions", None)
    if not conditions or data.has_conditions:
        return
    labels, (image, *_) = columns_of(conditions, "labels"), [*columns_of(conditions, "channels"), None]
    if pipeline.label_column is not None and data.label_column is None:
        data.label_column = [pipeline.label_column, *labels] if labels else pipeline.label_column
    data.continuous_columns, data.condition_column = columns_of(conditions, "mean"), image


def what_to_draw(config: EvaluateConfig, train: ImageDataset, pipeline: DiffusionPipeline) -> dict[str, Any]:
    """What samples are drawn from: captions and conditions of the images. A `prompt` takes the place of the captions."""
    of_images = prompts_of_images(train, config.sampling.num_images, pipeline)
    if config.sampling.prompt is None and of_images:
        return of_images
    texts = prompts_of(config.sampling.prompt, train.id2label)
    if "conditions" not in of_images:
        return {"prompts": texts}
    if texts is not None and len(texts) > 1:  # a text for each class; now one for each image
        texts = tuple(texts[label] for label in prompts_of_images(train, config.sampling.num_images)["classes"])
    return of_images | {"prompts": texts}


def choose_autoencoder(
    config: EvaluateConfig, pipeline: DiffusionPipeline | None, device: torch.device
) -> ModelMixin | None:
    """Loads the autoencoder of `--vae`, or else that of the pipeline. If both are given, they must be the same."""
    own = None if pipeline is None else autoencoder_of(pipeline)
    if config.evaluation.vae is None:
        return own
    vae = load_autoencoder(config.evaluation.vae).to(device)
    if own is not None and not has_same_weights(own, vae):
        raise UserError(
            f"`--vae` {config.evaluation.vae} is not the autoencoder that `--pipeline` {config.evaluation.pipeline} decodes with, so `gap` would "
            "mean nothing. Leave `--vae` out, or evaluate the two in runs of their own."
        )
    return vae


def has_same_weights(one: torch.nn.Module, other: torch.nn.Module) -> bool:
    one, other = one.state_dict(), other.state_dict()
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def check_options(config: EvaluateConfig, sampler: Sampler | None) -> None:
    """Raises `UserError` for an option that the pipeline does not have."""
    for name in ("prompt", "temperature", "top_k", "top_p"):
        if getattr(config.sampling, name) is not None and (sampler is None or name not in sampler.accepted):
            whom = "an autoencoder" if sampler is None else type(sampler.pipeline).__name__
            raise UserError(f"`--{name}` means nothing to {whom}; leave it out.")
    for option, name in SWEPT.items() if sampler is not None else ():
        if option not in sampler.accepted and name in changes_of(config.sampling):
            logger.warning("`--%s` has no effect on what %s draws.", name, config.evaluation.pipeline)


def check_counts(
    config: EvaluateConfig,
    sampler: Sampler | None,
    extractor: FeatureExtractor | None,
    train: ImageDataset,
    validation: ImageDataset,
) -> None:
    """Raises `UserError` where there are fewer images than the metrics need."""
    if (
        sampler is not None
        and config.sampling.label_sampling != "random"
        and config.sampling.num_images < (sampler.num_classes or 0)
    ):
        logger.warning(
            "`--num_images` %d of %d classes: some classes are not drawn. Draw more, or use `--label_sampling random`.",
            config.sampling.num_images,
            sampler.num_classes,
        )
    known = getattr(sampler.pipeline, "id2label", None) if sampler is not None else None
    missing = sorted(set(known.values()) - set(train.id2label.values())) if known and train.id2label else []
    if missing and config.sampling.label_sampling != "data":
        logger.warning(
            "there are no images of classes that the pipeline draws, such as %r: use `--label_sampling data`, or give images of all.",
            missing[0],
        )
    # Distances need two of each; density and coverage compare with the fifth neighbour; the classifier's score has ten parts.
    needed = 2 if sampler is None else 6 if extractor.num_classes is None else 10
    if extractor is not None and (len(validation) < 2 or min(len(train), config.sampling.num_images) < needed):
        raise UserError(
            f"there are {len(train)} training and {len(validation)} validation images, and `--num_images` is "
            f"{config.sampling.num_images}: metrics in `--features` need at least {needed} of each, and mean little below some hundreds."
        )


def evaluate_autoencoder(
    config: EvaluateConfig,
    vae: ModelMixin,
    some: ImageDataset,
    validation: ImageDataset,
    extractor: FeatureExtractor | None,
    accelerator: Accelerator,
) -> tuple[dict[str, Any], EncodedImages, EncodedImages]:
    """Measures reconstruction, latent space and codebook; also returns how it encodes the held-out and `some` training images."""
    folder = Path(config.evaluation.output_dir)
    work = {
        "batch_size": config.evaluation.batch_size,
        "num_workers": config.data.dataloader_num_workers,
        "folder": folder / "parts",
    }
    shape = (config.data.image_channels, *config.data.size)
    lpips_net = None if config.evaluation.lpips_net == "none" else config.evaluation.lpips_net
    measures = image_measures(shape, lpips_net=lpips_net, device=accelerator.device)
    held_out = encode_images(vae, validation, accelerator, extractor=extractor, measures=measures, **work)
    judge = None if config.evaluation.pipeline is None else extractor
    seen = encode_images(
        vae, some, accelerator, extractor=judge, measures={}, description="Encoding training images", **work
    )
    probe = None
    if some.labels is not None:
        probe = (seen.latents, torch.tensor(some.labels), torch.tensor(validation.labels))
    results: dict[str, Any] = {
        "reconstruction": reconstruction_metrics(held_out, extractor),
        "latent_space": keep_values(
            lambda: latent_metrics(vae, held_out, extractor, accelerator, probe=probe),
            accelerator,
            folder=folder / "parts",
            of=["latent_space", [evaluation_inputs(vae, images, extractor) for images in (validation, some)]],
        ),
    }
    if is_vq(vae):
        results["codebook"] = {
            f"{split}_{name}": value
            for split, encoded in (("validation", held_out), ("train", seen))
            for name, value in codebook_use(vae, encoded, accelerator, batch_size=config.evaluation.batch_size).items()
        }
    if accelerator.is_main_process:
        plot_latent_space(held_out.diagnostics, folder / "latent_space.png")
        draw_reconstructions(vae, validation, folder / "reconstructions.png")
    accelerator.wait_for_everyone()
    return results, held_out, seen


def evaluate_samples(
    config: EvaluateConfig,
    sampler: Sampler,
    vae: ModelMixin | None,
    train: ImageDataset,
    some: ImageDataset,
    seen: EncodedImages | None,
    extractor: FeatureExtractor,
    accelerator: Accelerator,
) -> tuple[list[dict[str, Any]], list[KeptRows], tuple]:
    """
    Measures samples: a row for each setting of guidance and steps. `seen`: how the autoencoder encodes `some` images. Also returns the
    samples of each setting, and the features of training images that they were compared with.
    """
    folder, batch_size = Path(config.evaluation.output_dir), config.evaluation.batch_size
    work = {"batch_size": batch_size, "num_workers": config.data.dataloader_num_workers}
    if seen is None:
        features = image_features(some, extractor, accelerator, folder=folder / "parts", **work)
        reconstruction_features = None
    else:
        features, reconstruction_features = seen.features, seen.reconstruction_features
    hide = not accelerator.is_local_main_process
    reference = reference_statistics(extractor, train, cache_dir=folder / "reference", disable_progress=hide, **work)
    shape = (config.data.image_channels, *config.data.size)
    rows, every, sweep = [], [], swept_settings(config, sampler, train)
    say_duration(sampler, sweep, folder / "samples", accelerator, batch_size)
    for settings in sweep:
        samples = draw_samples(
            sampler.pipeline, settings, folder / "samples", accelerator, image_shape=shape, batch_size=batch_size
        )

        def compare(samples=samples) -> dict[str, Any]:
            judged = (samples, extractor, reference, features, reconstruction_features, accelerator)
            metrics, neighbors = sample_metrics(*judged, batch_size=batch_size, folder=folder / "parts")
            return {"metrics": metrics, "neighbors": neighbors.tolist()}

        drawn = generation_inputs(sampler.pipeline, settings, accelerator)
        compared = keep_values(
            compare,
            accelerator,
            folder=folder / "parts",
            of=["generation", *(evaluation_inputs(vae, images, extractor) for images in (train, some)), drawn],
        )
        given = {
            name: value
            for name, value in settings.given().items()
            if name not in ("prompts", "classes", "conditions", "class_counts")
        }
        rows.append(given | compared["metrics"])
        every.append(samples)
        if accelerator.is_main_process:
            name = name_of_setting(settings.guidance_scale, settings.num_inference_steps)
            id2label = getattr(sampler.pipeline, "id2label", None) or train.id2label or {}
            is_by_class = sampler.conditions is None and train.captions is None
            names = [id2label[label] for label in sorted(id2label)] if is_by_class else None
            labels = settings.labels(sampler.num_classes) if is_by_class else None
            save_grids(folder, name, samples, labels, some, torch.tensor(compared["neighbors"]), names)
    return rows, every, (reference, features, reconstruction_features)


def measure_real_images(
    config: EvaluateConfig,
    train: ImageDataset,
    validation: ImageDataset,
    held_out: EncodedImages | None,
    extractor: FeatureExtractor,
    drawn: list[KeptRows],
    of_train: tuple,
    accelerator: Accelerator,
) -> dict[str, Any]:
    """What held-out images reach in the place of reconstructions and samples (`floor`), and how good the judge is."""
    parts, batch_size = Path(config.evaluation.output_dir) / "parts", config.evaluation.batch_size
    work = {"batch_size": batch_size, "num_workers": config.data.dataloader_num_workers}
    yardstick = Yardstick(extractor, train, validation, accelerator, held_out=held_out, folder=parts, **work)
    floor = {} if held_out is None else {"reconstruction": yardstick.of_reconstructions()}
    if drawn:
        features = [
            sample_features(each, extractor, accelerator, batch_size=batch_size, folder=parts)["features"]
            for each in drawn
        ]
        of_samples = yardstick.of_samples(features, *of_train)
        floor |= {"generation": of_samples} if of_samples else {}
    return {"judge": yardstick.judge(), "floor": floor}


def swept_settings(config: EvaluateConfig, sampler: Sampler, train: ImageDataset) -> list[SampleSettings]:
    """The settings to measure: one for each combination of the swept options that the pipeline has."""
    is_by_class = sampler.conditions is None and (train.captions is None or config.sampling.prompt is not None)
    counts = class_counts(sampler.pipeline, train, sampler.num_classes) if is_by_class else None
    sweep = [getattr(config.sampling, flag) if option in sampler.accepted else [None] for option, flag in SWEPT.items()]
    of_codes = {}
    if "temperature" in sampler.accepted:
        of_codes = {
            "temperature": config.sampling.temperature,
            "top_k": config.sampling.top_k,
            "top_p": config.sampling.top_p,
        }
    return [
        SampleSettings(
            config.sampling.num_images,
            *chosen,
            config.sampling.label_sampling,
            config.evaluation.seed,
            prompts=sampler.prompts,
            classes=sampler.classes,
            conditions=sampler.conditions,
            class_counts=counts,
            **of_codes,
        )
        for chosen in itertools.product(*sweep)
    ]


if __name__ == "__main__":
    run_script(main, parse_config(EvaluateConfig, description=__doc__))
