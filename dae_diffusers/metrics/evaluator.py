"""Measures an autoencoder and samples, and real images in their place."""

from collections.abc import Callable, Sequence
from dataclasses import KW_ONLY, dataclass
from functools import cached_property
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from diffusers import ModelMixin

from dae_diffusers.autoencoders.loading import is_vq
from dae_diffusers.caching import CachedRows, cached_values
from dae_diffusers.data import ImageDataset
from dae_diffusers.evaluation_record import name_of_setting
from dae_diffusers.latents.diagnostics import plot_latent_space
from dae_diffusers.metrics.agreement import class_agreement, share_by_class
from dae_diffusers.metrics.clip_score import ImageTextModel, clip_scores, text_features
from dae_diffusers.metrics.distances import frechet_distance
from dae_diffusers.metrics.drawings import Drawing, drawings_of, measure_drawings, over_drawings
from dae_diffusers.metrics.evaluation import (
    EncodedImages,
    TrainingFeatures,
    codebook_use,
    compared_for_copies,
    encode_images,
    evaluation_inputs,
    image_features,
    kept_reference,
    latent_metrics,
    reconstruction_metrics,
    sample_features,
    sample_metrics,
    training_features,
)
from dae_diffusers.metrics.features import FeatureExtractor
from dae_diffusers.metrics.image_quality import ImageMeasure, image_measures
from dae_diffusers.metrics.report import draw_reconstructions, save_grids
from dae_diffusers.metrics.sampling import Sampler, ids_in_pipeline, say_duration
from dae_diffusers.metrics.statistics import FeatureStatistics
from dae_diffusers.metrics.sweep import is_by_class, swept_settings, texts_of
from dae_diffusers.metrics.yardstick import Yardstick
from dae_diffusers.store import fingerprint

# Settings of a drawing that are not shown beside its metrics.
_NOT_SHOWN = ("prompts", "classes", "conditions", "class_counts")


@dataclass(frozen=True)
class Evaluator:
    r"""
    Measures an autoencoder, a pipeline, or both. Writes pictures into the output folder, and keeps finished parts there, so that
    an interrupted evaluation can continue. All processes call its methods.

    Args:
        config: A composed settings class with the parts `data`, `evaluation` and `sampling`, as
            [`~dae_diffusers.metrics.preparation.prepare_evaluation`] leaves it.
        accelerator ([`~accelerate.Accelerator`]): The run's accelerator.
        train, validation ([`~dae_diffusers.data.ImageDataset`]): Training images and held-out ones.
        extractor ([`~dae_diffusers.metrics.features.FeatureExtractor`], *optional*): The judge.
        vae ([`~diffusers.ModelMixin`], *optional*): The autoencoder, in eval mode.
        sampler ([`~dae_diffusers.metrics.sampling.Sampler`], *optional*): What draws samples. It needs a judge.
    """

    config: Any
    accelerator: Accelerator
    train: ImageDataset
    validation: ImageDataset
    _: KW_ONLY
    extractor: FeatureExtractor | None = None
    vae: ModelMixin | None = None
    sampler: Sampler | None = None

    def measure(
        self,
        given: torch.Tensor | None = None,
        others: Sequence[FeatureExtractor] = (),
        clip: ImageTextModel | None = None,
    ) -> tuple[dict[str, Any], list[list[Drawing]]]:
        r"""
        Measures all that there is.

        Args:
            given (`torch.Tensor` of shape `(N, C, H, W)`, *optional*): Samples that are there already: uint8.
            others (`Sequence[FeatureExtractor]`, *optional*): Judges that give distances alone.
            clip ([`~dae_diffusers.metrics.clip_score.ImageTextModel`], *optional*): What compares samples with their texts.

        Returns:
            The numbers by part, and the drawings of each row of `generation`.
        """
        results: dict[str, Any] = {}
        drawn: list[list[Drawing]] = []
        if self.vae is not None:
            results |= self.measure_autoencoder()
        if self.sampler is not None:
            results["generation"], drawn = self.measure_samples()
        elif given is not None:
            results["generation"], drawn = self.measure_given(given)
        if self.extractor is not None:
            results |= self.measure_baseline(drawn)
        if self.sampler is not None:
            self.add_class_agreement(results, drawn)
            if clip is not None:
                self.add_clip_score(results, clip, drawn)
        for judge in others:
            self.add_distances(results, judge, drawn)
        return results, drawn

    def measure_autoencoder(self) -> dict[str, Any]:
        r"""Numbers of `reconstruction` and `latent_space`, and of a `VQModel` those of its `codebook`."""
        vae, held_out, seen = self.vae, self.held_out, self.seen
        probe = None
        if self.some.labels is not None:
            probe = (seen.latents, torch.tensor(self.some.labels), torch.tensor(self.validation.labels))
        results: dict[str, Any] = {
            "reconstruction": reconstruction_metrics(held_out, self.extractor),
            "latent_space": self._keep(
                lambda: latent_metrics(vae, held_out, self.extractor, self.accelerator, probe=probe),
                ["latent_space", self._inputs(self.validation, self.some)],
            ),
        }
        if is_vq(vae):
            results["codebook"] = {
                f"{split}_{name}": value
                for split, encoded in (("validation", held_out), ("train", seen))
                for name, value in codebook_use(vae, encoded, self.accelerator, batch_size=self._batch_size).items()
            }
        if self.accelerator.is_main_process:
            plot_latent_space(held_out.diagnostics, self._folder / "latent_space.png")
            draw_reconstructions(vae, self.validation, self._folder / "reconstructions.png")
        self.accelerator.wait_for_everyone()
        return results

    def measure_samples(self) -> tuple[list[dict[str, Any]], list[list[Drawing]]]:
        r"""A row of numbers for each setting of guidance and steps; and the drawings of each."""
        training, number, seed = self.training, self.config.sampling.num_drawings, self.config.evaluation.seed
        sweep = swept_settings(self.config.sampling, seed, self.sampler, self.train)
        planned = [drawing for settings in sweep for drawing in drawings_of(settings, number)]
        say_duration(self.sampler, planned, self._folder / "samples", self.accelerator, self._batch_size)
        compared_with = ["generation, copies are no neighbours", *self._inputs(self.train, self.some)]
        rows, drawn = [], []
        for settings in sweep:
            drawings = measure_drawings(
                self.sampler.pipeline,
                settings,
                self.extractor,
                training,
                self.accelerator,
                folder=self._folder,
                num_drawings=number,
                image_shape=self._image_shape,
                batch_size=self._batch_size,
                parts=self._parts,
                of=compared_with,
            )
            row = {name: value for name, value in settings.given().items() if name not in _NOT_SHOWN}
            row |= {"num_drawings": number} if number > 1 else {}
            metrics = [drawing.metrics for drawing in drawings]
            rows.append(row | over_drawings(metrics, self.extractor.distance_name("g")))
            drawn.append(drawings)
            if self.accelerator.is_main_process:
                self._save_grids(drawings[0])
        return rows, drawn

    def measure_given(self, samples: torch.Tensor) -> tuple[list[dict[str, Any]], list[list[Drawing]]]:
        r"""
        As [`measure_samples`], for images that are there already.

        Args:
            samples (`torch.Tensor` of shape `(N, C, H, W)`): uint8.
        """
        work = {"batch_size": self._batch_size, "folder": self._parts}
        metrics, nearest = sample_metrics(samples, self.extractor, self.training, self.accelerator, **work)
        drawing = Drawing(None, fingerprint(samples.split(256)), samples, metrics, nearest.most_alike())
        if self.accelerator.is_main_process:
            self._save_grids(drawing)
        return [{"num_images": len(samples), **metrics}], [[drawing]]

    def measure_baseline(self, drawn: Sequence[list[Drawing]] = ()) -> dict[str, Any]:
        r"""
        What held-out real images reach in the place of reconstructions and samples (`floor`), and how good the judge is (`judge`).

        Args:
            drawn (`list[list[Drawing]]`, *optional*): The drawings of each setting. The first of each counts.
        """
        firsts = [drawings[0] for drawings in drawn]

        def measure() -> dict[str, Any]:
            yardstick = self._yardstick(self.extractor, self.held_out)
            floor = {} if self.held_out is None else {"reconstruction": yardstick.of_reconstructions()}
            if firsts:
                features = [self._features(drawing.samples, self.extractor) for drawing in firsts]
                of_samples = yardstick.of_samples(features, self.training)
                floor |= {"generation": of_samples} if of_samples else {}
            return {"judge": yardstick.judge(), "floor": floor}

        inputs = ["real images, copies are no neighbours", *self._inputs(self.train, self.validation, self.some)]
        inputs += [drawing.inputs for drawing in firsts]
        return self._keep(measure, inputs)

    def add_class_agreement(self, results: dict[str, Any], drawn: Sequence[list[Drawing]]) -> None:
        r"""
        Adds to the results how many samples are of the class that was asked for, and a row for each class in `classes`, of the setting with
        the lowest distance. Does nothing unless samples are drawn by class, and the images have classes.

        Args:
            results (`dict`): With `generation` and `floor`.
            drawn (`list[list[Drawing]]`): The drawings of each setting.
        """
        number, by_class = self.sampler.num_classes, is_by_class(self.config.sampling, self.sampler)
        if not by_class or number is None or self.some.labels is None or not 1 < len(self.train.id2label) <= number:
            return
        pipeline = self.sampler.pipeline
        trained, real = (torch.as_tensor(ids_in_pipeline(pipeline, images)) for images in (self.some, self.validation))
        held_out = self._yardstick(self.extractor, self.held_out).held_out
        asked = [drawing.settings.labels(number) for drawings in drawn for drawing in drawings]
        features = [self._features(drawing.samples, self.extractor) for drawings in drawn for drawing in drawings]
        agrees = class_agreement(self.training.images, trained, [held_out, *features], [real, *asked])
        of_real, of_samples = agrees[0], iter(agrees[1:])
        by_setting = [torch.stack([next(of_samples) for _ in drawings]) for drawings in drawn]
        for row, each in zip(results["generation"], by_setting, strict=True):
            row["class_agreement"] = each.double().mean().item()
        floor = results["floor"].get("generation")
        if floor:
            floor["real"]["class_agreement"] = of_real.double().mean().item()
            for row, each in zip(floor["samples"], by_setting, strict=True):
                row["class_agreement"] = each[0, : floor["num_images"]].double().mean().item()
        distance = self.extractor.distance_name("g")
        best = min(range(len(drawn)), key=lambda n: results["generation"][n][distance])
        labels = torch.cat([drawing.settings.labels(number) for drawing in drawn[best]])
        names = getattr(pipeline, "id2label", None) or self.train.id2label
        images = torch.bincount(torch.as_tensor(ids_in_pipeline(pipeline, self.train)), minlength=number).tolist()
        shares = (share_by_class(*pair, number) for pair in ((by_setting[best].flatten(), labels), (of_real, real)))
        results["classes"] = [
            {
                "class": names.get(label, str(label)),
                "training_images": images[label],
                "class_agreement": share,
                "real": of,
            }
            for label, (share, of) in enumerate(zip(*shares, strict=True))
        ]

    def add_clip_score(self, results: dict[str, Any], clip: ImageTextModel, drawn: Sequence[list[Drawing]]) -> None:
        r"""
        Adds to the results how well samples follow the texts that they were drawn from (`clip_score_<name>`), and what the same images
        reach with the texts of others (`clip_chance_<name>`). Images without a text do not count.

        Args:
            results (`dict`): With `generation` and `floor`.
            clip ([`~dae_diffusers.metrics.clip_score.ImageTextModel`]): What compares images with texts.
            drawn (`list[list[Drawing]]`): The drawings of each setting.
        """
        drawings = [drawing for each in drawn for drawing in each]
        keep = {"folder": self._parts, "description": "Features of real images", **self._work}
        images = [image_features(self.validation, clip, self.accelerator, **keep)]
        images += [self._features(drawing.samples, clip) for drawing in drawings]
        texts = [texts_of(self.config.sampling, self.validation)]
        texts += [self.sampler.texts(drawing.settings) for drawing in drawings]
        work = {"batch_size": self._batch_size, "folder": self._parts}
        encoded = text_features(list(chain(*texts)), clip, self.accelerator, **work).split([*map(len, texts)])
        name = f"clip_score_{clip.name}"

        def scores(number: int, limit: int | None = None) -> dict[str, float]:
            """Of the held-out images, 0, or of a drawing, counted from 1."""
            counted = [place for place, text in enumerate(texts[number][:limit]) if text]
            score, chance = clip_scores(images[number][counted], encoded[number][counted])
            return {name: score, f"clip_chance_{clip.name}": chance}

        numbers = iter(range(1, len(images)))
        by_setting = [[next(numbers) for _ in each] for each in drawn]
        for row, of_row in zip(results["generation"], by_setting, strict=True):
            row |= over_drawings([*map(scores, of_row)], name)
        floor = results["floor"].get("generation")
        if floor:
            floor["real"] |= scores(0)
            for row, (first, *_) in zip(floor["samples"], by_setting, strict=True):
                row |= scores(first, floor["num_images"])

    def add_distances(
        self, results: dict[str, Any], judge: FeatureExtractor, drawn: Sequence[list[Drawing]] = ()
    ) -> None:
        r"""
        Adds the distances of a further judge to the results.

        Args:
            results (`dict`): With `floor`, and with `reconstruction` and `generation` if these were measured.
            judge ([`~dae_diffusers.metrics.features.FeatureExtractor`]): The further judge.
            drawn (`list[list[Drawing]]`, *optional*): The drawings of each setting.
        """
        floor = results["floor"]
        held_out = None if self.vae is None else self._encode(self.validation, judge, {})
        yardstick = self._yardstick(judge, held_out)
        if held_out is not None:
            name = judge.distance_name("r")
            results["reconstruction"] |= reconstruction_metrics(held_out, judge)
            floor["reconstruction"][name] = yardstick.of_reconstructions()[name]
        if not drawn:
            return
        name = judge.distance_name("g")
        reference = kept_reference(judge, self.train, self.accelerator, self._folder, **self._work)
        features = [[self._features(drawing.samples, judge) for drawing in drawings] for drawings in drawn]
        for row, drawings in zip(results["generation"], features, strict=True):
            distances = [frechet_distance(FeatureStatistics.of(each), reference) for each in drawings]
            row |= over_drawings([{name: distance} for distance in distances], name)
        if "generation" in floor:
            firsts, number = [drawings[0] for drawings in features], floor["generation"]["num_images"]
            floor["generation"]["real"][name], distances = yardstick.distances(firsts, reference, number)
            for row, distance in zip(floor["generation"]["samples"], distances, strict=True):
                row[name] = distance

    @cached_property
    def some(self) -> ImageDataset:
        r"""As many training images as are drawn."""
        return self.train.choose(self.config.sampling.num_images)

    @cached_property
    def held_out(self) -> EncodedImages | None:
        r"""How the autoencoder encodes the held-out images; None without one."""
        if self.vae is None:
            return None
        name = self.config.evaluation.lpips_net
        lpips_net = None if name == "none" else name
        measures = image_measures(self._image_shape, lpips_net=lpips_net, device=self.accelerator.device)
        return self._encode(self.validation, self.extractor, measures)

    @cached_property
    def seen(self) -> EncodedImages | None:
        r"""How the autoencoder encodes `some` training images, with features if samples are compared with them; None without one."""
        if self.vae is None:
            return None
        judge = None if self.sampler is None else self.extractor
        return self._encode(self.some, judge, {}, description="Encoding training images")

    @cached_property
    def training(self) -> TrainingFeatures:
        r"""What samples are compared with."""
        return training_features(
            self.extractor, self.train, self.some, self.accelerator, folder=self._folder, seen=self.seen, **self._work
        )

    @property
    def _folder(self) -> Path:
        return Path(self.config.evaluation.output_dir)

    @property
    def _parts(self) -> Path:
        return self._folder / "parts"

    @property
    def _batch_size(self) -> int:
        return self.config.evaluation.batch_size

    @property
    def _work(self) -> dict[str, int]:
        return {"batch_size": self._batch_size, "num_workers": self.config.data.dataloader_num_workers}

    @property
    def _image_shape(self) -> tuple[int, int, int]:
        return (self.config.data.image_channels, *self.config.data.size)

    def _inputs(self, *splits: ImageDataset) -> list[dict[str, Any]]:
        """What measurements on some images depend on."""
        return [evaluation_inputs(self.vae, images, self.extractor) for images in splits]

    def _keep(self, measure: Callable[[], dict[str, Any]], of: list[Any]) -> dict[str, Any]:
        """The numbers that `measure` gives, kept under what they depend on."""
        return cached_values(measure, self.accelerator, folder=self._parts, of=of)

    def _encode(
        self,
        images: ImageDataset,
        judge: FeatureExtractor | None,
        measures: dict[str, ImageMeasure],
        description: str = "Reconstructing",
    ) -> EncodedImages:
        return encode_images(
            self.vae,
            images,
            self.accelerator,
            extractor=judge,
            measures=measures,
            folder=self._parts,
            description=description,
            **self._work,
        )

    def _features(self, samples: CachedRows, judge: FeatureExtractor) -> torch.Tensor:
        """A judge's features of samples, `(N, D)`."""
        work = {"batch_size": self._batch_size, "folder": self._parts}
        return sample_features(samples, judge, self.accelerator, **work)["features"]

    def _yardstick(self, judge: FeatureExtractor, held_out: EncodedImages | None) -> Yardstick:
        return Yardstick(
            judge,
            self.train,
            self.validation,
            self.accelerator,
            held_out=held_out,
            folder=self._parts,
            **self._work,
        )

    def _save_grids(self, drawing: Drawing) -> None:
        if drawing.settings is None:
            given = (drawing.samples, None, compared_for_copies(self.train), drawing.most_alike)
            save_grids(self._folder, "given", *given)
            return
        settings, pipeline = drawing.settings, self.sampler.pipeline
        save_grids(
            self._folder,
            name_of_setting(settings.given()),
            drawing.samples,
            settings.labels(self.sampler.num_classes) if is_by_class(self.config.sampling, self.sampler) else None,
            compared_for_copies(self.train),
            drawing.most_alike,
            getattr(pipeline, "id2label", None) or self.train.id2label or {},
        )
