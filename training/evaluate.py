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
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from diffusers import DiffusionPipeline, ModelMixin

from dae_diffusers.autoencoders.loading import is_vq, load_autoencoder, settle_images
from dae_diffusers.cli import parse_config
from dae_diffusers.data import ImageDataset
from dae_diffusers.engine.distributed import PROCESS_GROUP
from dae_diffusers.errors import UserError
from dae_diffusers.evaluation_record import name_of_setting
from dae_diffusers.latents.diagnostics import plot_latent_space
from dae_diffusers.locks import take_folder
from dae_diffusers.metrics.checks import check_guidance
from dae_diffusers.metrics.defaults import check_takes_defaults, set_defaults
from dae_diffusers.metrics.distances import frechet_distance
from dae_diffusers.metrics.drawings import drawings_of, measure_drawings, over_drawings
from dae_diffusers.metrics.evaluation import (
    EncodedImages,
    TrainingFeatures,
    codebook_use,
    compared_for_copies,
    encode_images,
    evaluation_inputs,
    kept_reference,
    latent_metrics,
    reconstruction_metrics,
    sample_features,
    training_features,
)
from dae_diffusers.metrics.features import FeatureExtractor, load_feature_extractor
from dae_diffusers.metrics.image_quality import image_measures
from dae_diffusers.metrics.kept import KeptRows, keep_values
from dae_diffusers.metrics.preparation import prepare_evaluation
from dae_diffusers.metrics.report import describe, draw_reconstructions, plot_sweep, save_grids, to_markdown
from dae_diffusers.metrics.sampling import (
    Sampler,
    autoencoder_of,
    generation_inputs,
    image_sides,
    load_pipeline,
    say_duration,
)
from dae_diffusers.metrics.statistics import FeatureStatistics
from dae_diffusers.metrics.sweep import is_by_class, swept_settings
from dae_diffusers.metrics.yardstick import Yardstick
from dae_diffusers.script import run_script, show_messages
from dae_diffusers.store import write_atomically, write_json
from dae_diffusers.training.settings import EvaluateConfig

logger = logging.getLogger(__name__)


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
    check_guidance(config.sampling, config.evaluation.pipeline, pipeline)
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
    of = config.evaluation
    judges = [*load_judges(config, accelerator.device)]
    train, validation, sampler = prepare_evaluation(
        config, of.seed, pipeline, judges, accelerator, name=of.pipeline, vae=of.vae
    )
    extractor, *others = judges or [None]
    evaluation = Evaluation(
        config, accelerator, extractor, vae, train, validation, some=train.choose(config.sampling.num_images)
    )
    results, held_out, seen = {}, None, None
    if vae is not None:
        results, held_out, seen = evaluation.of_autoencoder()
    drawn: list[list[KeptRows]] = []
    training = None
    if sampler is not None:
        results["generation"], drawn, training = evaluation.of_samples(sampler, seen)
    if extractor is not None:
        sweep = [] if sampler is None else swept_settings(config.sampling, config.evaluation.seed, sampler, train)
        results |= evaluation.keep(
            lambda: evaluation.of_real_images(held_out, [drawings[0] for drawings in drawn], training),
            ["real images, copies of all", *evaluation.inputs(train, validation, evaluation.some)]
            + [generation_inputs(sampler.pipeline, settings, accelerator) for settings in sweep],
        )
    for judge in others:
        replace(evaluation, extractor=judge).add_distances(results, drawn)

    if accelerator.is_main_process:
        results["setting"] = describe(config, vae, pipeline, train, validation, extractor, accelerator, others)
        write_atomically(folder / "metrics.md", to_markdown(results))
        if len(results.get("generation", [])) > 1:
            plot_sweep(results["generation"], extractor.distance_name("g"), folder / "sweep.png")
        write_json(folder / "metrics.json", results)
        logger.info("%s\nwritten to %s", to_markdown(results), folder)
        if config.sampling.set_defaults:
            set_defaults(config.evaluation.pipeline, results["generation"], extractor.distance_name("g"))
    accelerator.end_training()
    lock.release()


def load_judges(config: EvaluateConfig, device: torch.device) -> Iterator[FeatureExtractor]:
    """The feature extractors of `--features` and `--more_features`."""
    names = [] if config.evaluation.features is None else [config.evaluation.features]
    known = {}
    for name in [*names, *(config.evaluation.more_features or [])]:
        judge = load_feature_extractor(name, device, channels=config.data.image_channels)
        column = judge.distance_name("g")
        if column in known:
            raise UserError(
                f"the judges {known[column]} and {name} would share the column {column}: rename the folder of one of them."
            )
        known[column] = name
        yield judge


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


@dataclass(frozen=True)
class Evaluation:
    """
    What is measured, and with what. The judge, `extractor`, and the autoencoder may be missing; `some` are as many training images as are
    drawn.
    """

    config: EvaluateConfig
    accelerator: Accelerator
    extractor: FeatureExtractor | None
    vae: ModelMixin | None
    train: ImageDataset
    validation: ImageDataset
    some: ImageDataset

    @property
    def folder(self) -> Path:
        return Path(self.config.evaluation.output_dir)

    @property
    def parts(self) -> Path:
        """Where finished parts are kept."""
        return self.folder / "parts"

    @property
    def work(self) -> dict[str, int]:
        return {
            "batch_size": self.config.evaluation.batch_size,
            "num_workers": self.config.data.dataloader_num_workers,
        }

    @property
    def image_shape(self) -> tuple[int, int, int]:
        return (self.config.data.image_channels, *self.config.data.size)

    def inputs(self, *splits: ImageDataset) -> list[dict[str, Any]]:
        """What measurements on some images depend on."""
        return [evaluation_inputs(self.vae, images, self.extractor) for images in splits]

    def keep(self, measure: Callable[[], dict[str, Any]], of: list[Any]) -> dict[str, Any]:
        """The numbers that `measure` gives, kept under what they depend on."""
        return keep_values(measure, self.accelerator, folder=self.parts, of=of)

    def of_autoencoder(self) -> tuple[dict[str, Any], EncodedImages, EncodedImages]:
        """Reconstruction, latent space and codebook; also how the held-out and `some` training images are encoded."""
        config, vae, extractor, accelerator = self.config.evaluation, self.vae, self.extractor, self.accelerator
        lpips_net = None if config.lpips_net == "none" else config.lpips_net
        measures = image_measures(self.image_shape, lpips_net=lpips_net, device=accelerator.device)
        work = {**self.work, "folder": self.parts}
        held_out = encode_images(vae, self.validation, accelerator, extractor=extractor, measures=measures, **work)
        judge = None if config.pipeline is None else extractor
        seen = encode_images(
            vae, self.some, accelerator, extractor=judge, measures={}, description="Encoding training images", **work
        )
        probe = None
        if self.some.labels is not None:
            probe = (seen.latents, torch.tensor(self.some.labels), torch.tensor(self.validation.labels))
        results: dict[str, Any] = {
            "reconstruction": reconstruction_metrics(held_out, extractor),
            "latent_space": self.keep(
                lambda: latent_metrics(vae, held_out, extractor, accelerator, probe=probe),
                ["latent_space", self.inputs(self.validation, self.some)],
            ),
        }
        if is_vq(vae):
            results["codebook"] = {
                f"{split}_{name}": value
                for split, encoded in (("validation", held_out), ("train", seen))
                for name, value in codebook_use(vae, encoded, accelerator, batch_size=config.batch_size).items()
            }
        if accelerator.is_main_process:
            plot_latent_space(held_out.diagnostics, self.folder / "latent_space.png")
            draw_reconstructions(vae, self.validation, self.folder / "reconstructions.png")
        accelerator.wait_for_everyone()
        return results, held_out, seen

    def of_samples(
        self, sampler: Sampler, seen: EncodedImages | None
    ) -> tuple[list[dict[str, Any]], list[list[KeptRows]], TrainingFeatures]:
        """
        A row for each setting of guidance and steps. `seen`: how the autoencoder encodes `some` images. Also the samples of each setting,
        by drawing, and the features of training images that they were compared with.
        """
        number = self.config.sampling.num_drawings
        training = training_features(
            self.extractor, self.train, self.some, self.accelerator, folder=self.folder, seen=seen, **self.work
        )
        rows, every = [], []
        sweep = swept_settings(self.config.sampling, self.config.evaluation.seed, sampler, self.train)
        all_drawings = [each for settings in sweep for each in drawings_of(settings, number)]
        say_duration(sampler, all_drawings, self.folder / "samples", self.accelerator, self.work["batch_size"])
        for settings in sweep:
            drawings = measure_drawings(
                sampler.pipeline,
                settings,
                self.extractor,
                training,
                self.accelerator,
                folder=self.folder,
                num_drawings=number,
                image_shape=self.image_shape,
                batch_size=self.work["batch_size"],
                parts=self.parts,
                of=["generation, copies of all", *self.inputs(self.train, self.some)],
            )
            given = {
                name: value
                for name, value in settings.given().items()
                if name not in ("prompts", "classes", "conditions", "class_counts")
            }
            given |= {"num_drawings": number} if number > 1 else {}
            metrics = [drawing.metrics for drawing in drawings]
            rows.append(given | over_drawings(metrics, self.extractor.distance_name("g")))
            every.append([drawing.samples for drawing in drawings])
            if self.accelerator.is_main_process:
                name = name_of_setting(settings.guidance_scale, settings.num_inference_steps)
                id2label = getattr(sampler.pipeline, "id2label", None) or self.train.id2label or {}
                labels = settings.labels(sampler.num_classes) if is_by_class(self.config.sampling, sampler) else None
                first = drawings[0]
                save_grids(
                    self.folder,
                    name,
                    first.samples,
                    labels,
                    compared_for_copies(self.train),
                    first.most_alike,
                    id2label,
                )
        return rows, every, training

    def add_distances(self, results: dict[str, Any], drawn: list[list[KeptRows]]) -> None:
        """Adds the judge's distances of reconstructions and samples, and of real images in their place, to results of another judge."""
        extractor, floor, held_out = self.extractor, results["floor"], None
        if self.vae is not None:
            work = {**self.work, "folder": self.parts}
            held_out = encode_images(
                self.vae, self.validation, self.accelerator, extractor=extractor, measures={}, **work
            )
        yardstick = self.yardstick(held_out)
        if held_out is not None:
            name = extractor.distance_name("r")
            results["reconstruction"] |= reconstruction_metrics(held_out, extractor)
            floor["reconstruction"][name] = yardstick.of_reconstructions()[name]
        if not drawn:
            return
        name = extractor.distance_name("g")
        reference = kept_reference(extractor, self.train, self.accelerator, self.folder, **self.work)
        features = [[self.features_of(samples) for samples in drawings] for drawings in drawn]
        for row, drawings in zip(results["generation"], features, strict=True):
            distances = [frechet_distance(FeatureStatistics.of(each), reference) for each in drawings]
            row |= over_drawings([{name: distance} for distance in distances], name)
        if "generation" in floor:
            firsts, number = [drawings[0] for drawings in features], floor["generation"]["num_images"]
            floor["generation"]["real"][name], distances = yardstick.distances(firsts, reference, number)
            for row, distance in zip(floor["generation"]["samples"], distances, strict=True):
                row[name] = distance

    def features_of(self, samples: KeptRows) -> torch.Tensor:
        """The judge's features of samples, `(N, D)`."""
        work = {"batch_size": self.work["batch_size"], "folder": self.parts}
        return sample_features(samples, self.extractor, self.accelerator, **work)["features"]

    def yardstick(self, held_out: EncodedImages | None) -> Yardstick:
        return Yardstick(
            self.extractor,
            self.train,
            self.validation,
            self.accelerator,
            held_out=held_out,
            folder=self.parts,
            **self.work,
        )

    def of_real_images(
        self, held_out: EncodedImages | None, drawn: list[KeptRows], training: TrainingFeatures | None
    ) -> dict[str, Any]:
        """What held-out images reach in the place of reconstructions and samples (`floor`), and how good the judge is."""
        yardstick = self.yardstick(held_out)
        floor = {} if held_out is None else {"reconstruction": yardstick.of_reconstructions()}
        if drawn:
            of_samples = yardstick.of_samples([self.features_of(samples) for samples in drawn], training)
            floor |= {"generation": of_samples} if of_samples else {}
        return {"judge": yardstick.judge(), "floor": floor}


if __name__ == "__main__":
    run_script(main, parse_config(EvaluateConfig, description=__doc__))
