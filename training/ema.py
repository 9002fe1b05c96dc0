r"""
Choose the length of the averaged weights (EMA) after a training with `--post_hoc_ema`.

    dae-diffusers ema runs/digits --length 0.1
    dae-diffusers ema runs/digits --length 0.02 0.05 0.1 0.15 0.25 --dataset_name digits --image_channels 1 \
        --features facebook/dinov2-small --guidance_scales 1 1.25 --set_defaults

Writes a pipeline for each length, `length-0.1/` in `ema/` of the run's folder. With `--features` it draws images with each of
them, and with the run's pipeline as it is, and compares them with the training images: `ema.md`, `ema.json` and `lengths.png`.
Then `--set_defaults` puts the best weights into the run's pipeline. Give the same command again to continue an interrupted one.
"""

import itertools
import logging
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from diffusers import DiffusionPipeline

from dae_diffusers.autoencoders.loading import settle_images
from dae_diffusers.cli import parse_config
from dae_diffusers.engine.distributed import measuring_accelerator
from dae_diffusers.engine.post_hoc_ema.choosing import generator_of, put_into_pipeline
from dae_diffusers.engine.post_hoc_ema.snapshots import Snapshots, snapshots_folder
from dae_diffusers.errors import UserError, in_full
from dae_diffusers.fit_record import read_fit, write_fit
from dae_diffusers.hub.results import PIPELINE_INDEX
from dae_diffusers.locks import take_folder
from dae_diffusers.metrics.checks import check_guidance
from dae_diffusers.metrics.defaults import set_defaults
from dae_diffusers.metrics.drawings import measure_drawings, over_drawings
from dae_diffusers.metrics.evaluation import training_features
from dae_diffusers.metrics.features import FeatureExtractor, load_feature_extractor
from dae_diffusers.metrics.preparation import prepare_evaluation
from dae_diffusers.metrics.report import plot_lengths, table, with_deviation
from dae_diffusers.metrics.sampling import autoencoder_of, image_sides, load_pipeline
from dae_diffusers.metrics.sweep import NOT_SWEPT, SWEPT, swept_settings
from dae_diffusers.pipelines.dae_dit import DAEDiTPipeline
from dae_diffusers.pipelines.dae_vqgan import DAEVQGANPipeline
from dae_diffusers.script import run_script
from dae_diffusers.store import replace_folder, write_atomically, write_json
from dae_diffusers.training.settings import EMAConfig, with_flags

logger = logging.getLogger(__name__)

# Which script trained the model of this name in a pipeline.
SCRIPTS = {"transformer": "train_dit", "prior": "train_vqgan_prior"}


def main(config: EMAConfig) -> None:
    accelerator = measuring_accelerator(config.lengths.mixed_precision or "no")
    folder = Path(config.lengths.folder)
    pipeline = load_own_pipeline(folder, accelerator.device)
    part, _ = generator_of(pipeline)
    snapshots = open_snapshots(folder / SCRIPTS[part], config.lengths.length)
    output_dir = Path(config.lengths.output_dir or folder / "ema")
    lock = take_folder(output_dir, accelerator)
    candidates = averages(config, pipeline, snapshots, output_dir, accelerator)
    if config.lengths.features is None:
        for _ in candidates:
            pass
    else:
        compare(config, pipeline, candidates, output_dir, accelerator)
    accelerator.end_training()
    lock.release()


def load_own_pipeline(folder: Path, device: torch.device) -> DiffusionPipeline:
    """The pipeline that the training has made."""
    if not (folder / "pipeline" / PIPELINE_INDEX).exists():
        raise UserError(
            f"`folder` {folder} holds no `pipeline`{in_full(folder)}. Give the output folder of a finished train_dit.py or "
            "train_vqgan_prior.py."
        )
    return load_pipeline(str(folder / "pipeline"), device)


def open_snapshots(script_folder: Path, lengths: list[float]) -> Snapshots:
    """The snapshots of a training, of which averages of all these lengths can be made."""
    snapshots = Snapshots(snapshots_folder(script_folder))
    for length in lengths:
        snapshots.check(length)
    last = snapshots.steps[-1]
    if last < snapshots.planned_step:
        logger.warning(
            "the last snapshot is of step %d of %d: averages are those of that step.", last, snapshots.planned_step
        )
    return snapshots


def averages(
    config: EMAConfig, pipeline: DiffusionPipeline, snapshots: Snapshots, output_dir: Path, accelerator: Accelerator
) -> Iterator[float]:
    """Gives the pipeline the weights of one length after the other, and saves it. Yields the length."""
    _, model = generator_of(pipeline)
    fit = read_fit(Path(config.lengths.folder) / "pipeline")

    def save(folder: Path) -> None:
        pipeline.save_pretrained(folder)
        if fit:
            write_fit(folder / "vae", folder / "vae", fit)

    for length in config.lengths.length:
        model.load_state_dict(snapshots.weights(length, model), strict=False)  # what never changed is not among them
        target = folder_of(output_dir, length)
        if accelerator.is_main_process:
            replace_folder(target, save)
            logger.info("saved %s", target)
        accelerator.wait_for_everyone()
        yield length


def folder_of(output_dir: Path, length: float) -> Path:
    """Where the pipeline with the average of a length goes."""
    return output_dir / f"length-{length:g}"


def compare(
    config: EMAConfig,
    pipeline: DiffusionPipeline,
    candidates: Iterator[float],
    output_dir: Path,
    accelerator: Accelerator,
) -> None:
    """Measures the pipeline as it is and with each average, and reports which is best."""
    settle_images(config, autoencoder_of(pipeline), side=image_sides(pipeline))
    extractor = load_feature_extractor(config.lengths.features, accelerator.device, channels=config.data.image_channels)
    rows = measure(config, pipeline, candidates, extractor, output_dir, accelerator)
    distance = extractor.distance_name("g")
    best = min(rows, key=lambda row: row[distance])
    if accelerator.is_main_process:
        shown = [{"weights": words_of(row), **{k: v for k, v in row.items() if k != "length"}} for row in rows]
        text = "\n".join(table("Lengths of the averaged weights", [with_deviation(row) for row in shown]))
        write_atomically(output_dir / "ema.md", text)
        write_json(output_dir / "ema.json", {"rows": rows, "features": extractor.fingerprint})
        plot_lengths(rows, distance, output_dir / "lengths.png")
        logger.info("%s\nwritten to %s", text, output_dir)
        logger.info("best: %s, %s %.4g", words_of(best), distance, best[distance])
        if config.sampling.set_defaults:
            choose(config, pipeline, best, distance, output_dir)
    accelerator.wait_for_everyone()


def measure(
    config: EMAConfig,
    pipeline: DiffusionPipeline,
    candidates: Iterator[float],
    extractor: FeatureExtractor,
    output_dir: Path,
    accelerator: Accelerator,
) -> list[dict[str, Any]]:
    """A row for each length, None for the pipeline as it is, and each setting of guidance and steps."""
    of, data, sampling = config.lengths, config.data, config.sampling
    name = str(Path(of.folder) / "pipeline")
    check_guidance(sampling, name, pipeline)
    train, _, sampler = prepare_evaluation(config, pipeline, [extractor], accelerator, name=name)
    work = {"batch_size": of.batch_size, "num_workers": data.dataloader_num_workers}
    some = train.choose(sampling.num_images)
    training = training_features(extractor, train, some, accelerator, folder=output_dir, **work)
    rows = []
    for length in itertools.chain([None], candidates):  # a candidate changes the weights when its turn comes
        for settings in swept_settings(sampling, of.seed, sampler, train):
            drawings = measure_drawings(
                pipeline,
                settings,
                extractor,
                training,
                accelerator,
                folder=output_dir,
                num_drawings=sampling.num_drawings,
                image_shape=(data.image_channels, *data.size),
                batch_size=of.batch_size,
                parts=output_dir / "parts",
            )
            metrics = over_drawings([drawing.metrics for drawing in drawings], extractor.distance_name("g"))
            given = settings.given()
            drawn = {name: given[name] for name in (*SWEPT, *NOT_SWEPT) if given.get(name) is not None}
            rows.append({"length": length, **drawn, "num_images": settings.num_images, **metrics})
    return rows


def words_of(row: dict[str, Any]) -> str:
    """The weights of a row, in words."""
    return "the pipeline as it was" if row["length"] is None else f"length {row['length']:g}"


def choose(
    config: EMAConfig, pipeline: DiffusionPipeline, best: dict[str, Any], distance: str, output_dir: Path
) -> None:
    """Puts the best weights into the run's pipeline, and lets it draw by default as they were drawn with."""
    folder = Path(config.lengths.folder)
    if best["length"] is not None:
        part, _ = generator_of(pipeline)
        put_into_pipeline(folder, part, folder_of(output_dir, best["length"]) / part, best["length"])
    if isinstance(pipeline, DAEDiTPipeline | DAEVQGANPipeline):
        set_defaults(str(folder / "pipeline"), pipeline, [best], distance)


if __name__ == "__main__":
    run_script(main, parse_config(EMAConfig, with_flags("ema", sys.argv[1:]), description=__doc__))
