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
from collections.abc import Callable
from dataclasses import dataclass
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
from dae_diffusers.metrics.evaluation import (
    EncodedImages,
    TrainingFeatures,
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
    autoencoder_of,
    draw_samples,
    generation_inputs,
    image_sides,
    load_pipeline,
    say_duration,
)
from dae_diffusers.metrics.statistics import reference_statistics
from dae_diffusers.metrics.sweep import (
    check_guidance,
    check_takes_defaults,
    is_by_class,
    load_and_check,
    set_defaults,
    swept_settings,
)
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
    extractor = (
        None
        if config.evaluation.features is None
        else load_feature_extractor(config.evaluation.features, accelerator.device)
    )
    of = config.evaluation
    train, validation, sampler = load_and_check(
        config, of.seed, pipeline, extractor, accelerator, name=of.pipeline, vae=of.vae
    )
    evaluation = Evaluation(
        config, accelerator, extractor, vae, train, validation, some=train.choose(config.sampling.num_images)
    )
    results, held_out, seen = {}, None, None
    if vae is not None:
        results, held_out, seen = evaluation.of_autoencoder()
    drawn: list[KeptRows] = []
    training = None
    if sampler is not None:
        results["generation"], drawn, training = evaluation.of_samples(sampler, seen)
    if extractor is not None:
        sweep = [] if sampler is None else swept_settings(config.sampling, config.evaluation.seed, sampler, train)
        results |= evaluation.keep(
            lambda: evaluation.of_real_images(held_out, drawn, training),
            ["real images, in proportion", *evaluation.inputs(train, validation, evaluation.some)]
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
    ) -> tuple[list[dict[str, Any]], list[KeptRows], TrainingFeatures]:
        """
        A row for each setting of guidance and steps. `seen`: how the autoencoder encodes `some` images. Also the samples of each setting,
        and the features of training images that they were compared with.
        """
        train, extractor, accelerator = self.train, self.extractor, self.accelerator
        batch_size, samples_folder = self.work["batch_size"], self.folder / "samples"
        if seen is None:
            features = [image_features(self.some, extractor, accelerator, folder=self.parts, **self.work)]
        else:
            features = [seen.features, seen.reconstruction_features]
        cache = {"cache_dir": self.folder / "reference", "disable_progress": not accelerator.is_local_main_process}
        training = TrainingFeatures(reference_statistics(extractor, train, **cache, **self.work), *features)
        rows, every = [], []
        sweep = swept_settings(self.config.sampling, self.config.evaluation.seed, sampler, train)
        say_duration(sampler, sweep, samples_folder, accelerator, batch_size)
        for settings in sweep:
            samples = draw_samples(
                *(sampler.pipeline, settings, samples_folder, accelerator),
                image_shape=self.image_shape,
                batch_size=batch_size,
            )

            def compare(samples=samples) -> dict[str, Any]:
                metrics, nearest = sample_metrics(
                    samples, extractor, training, accelerator, batch_size=batch_size, folder=self.parts
                )
                return {"metrics": metrics, "most_alike": nearest.most_alike()}

            drawn = generation_inputs(sampler.pipeline, settings, accelerator)
            compared = self.keep(compare, ["generation, with authenticity", *self.inputs(train, self.some), drawn])
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
                labels = settings.labels(sampler.num_classes) if is_by_class(self.config.sampling, sampler) else None
                save_grids(self.folder, name, samples, labels, self.some, compared["most_alike"], id2label)
        return rows, every, training

    def of_real_images(
        self, held_out: EncodedImages | None, drawn: list[KeptRows], training: TrainingFeatures | None
    ) -> dict[str, Any]:
        """What held-out images reach in the place of reconstructions and samples (`floor`), and how good the judge is."""
        yardstick = Yardstick(
            *(self.extractor, self.train, self.validation, self.accelerator),
            held_out=held_out,
            folder=self.parts,
            **self.work,
        )
        floor = {} if held_out is None else {"reconstruction": yardstick.of_reconstructions()}
        if drawn:
            keep = {"batch_size": self.work["batch_size"], "folder": self.parts}
            features = [sample_features(each, self.extractor, self.accelerator, **keep)["features"] for each in drawn]
            of_samples = yardstick.of_samples(features, training)
            floor |= {"generation": of_samples} if of_samples else {}
        return {"judge": yardstick.judge(), "floor": floor}


if __name__ == "__main__":
    run_script(main, parse_config(EvaluateConfig, description=__doc__))
