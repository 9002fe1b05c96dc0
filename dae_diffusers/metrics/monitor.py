"""Distances of samples and of reconstructions, measured while a model trains, and the best weights so far."""

import logging
import shutil
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import gather_object
from diffusers import DiffusionPipeline, ModelMixin

from dae_diffusers.caching import cached_rows
from dae_diffusers.data import ImageDataset
from dae_diffusers.directions import direction
from dae_diffusers.engine.loop import Loop, Step
from dae_diffusers.engine.run import Start, TrainingRun
from dae_diffusers.errors import UserError
from dae_diffusers.metrics.distances import frechet_distance
from dae_diffusers.metrics.features import FeatureExtractor, load_feature_extractor
from dae_diffusers.metrics.sampling import SampleSettings, class_counts, image_batches, image_pixels, prompts_of_images
from dae_diffusers.metrics.statistics import (
    MAX_REFERENCE_IMAGES,
    FeatureStatistics,
    pad_batch,
    padded_size,
    reference_statistics,
)
from dae_diffusers.randomness import Stream, derived_seed
from dae_diffusers.store import fingerprint_of_json, replace_folder
from dae_diffusers.weights import model_fingerprint

logger = logging.getLogger(__name__)
_TRAINED = ("transformer", "guidance_transformer", "prior")  # parts of pipelines

# What a run makes: an autoencoder or a pipeline.
Result = ModelMixin | DiffusionPipeline


class Monitor:
    r"""
    What follows a training. This one watches nothing, for runs that do not look for their best weights. All processes call its methods.

    Attributes:
        name (`str`): What is measured, as the log calls it.
        state (`dict` or `None`): Save it with each checkpoint.
        is_exhausted (`bool`): Whether the last `early_stopping_patience` numbers brought nothing better.
    """

    name = ""
    state: dict[str, Any] | None = None
    is_exhausted = False

    def best_result(self) -> Path | None:
        r"""The folder of the best result so far."""
        return None

    def report(self) -> None:
        r"""Says what was best, if anything was measured."""

    def follow(
        self, loop: Loop, step: Step, result_of: Callable[[torch.nn.Module], Result], validated: float | None
    ) -> None:
        r"""
        Looks at each step of the loop, and ends the loop if patience is used up.

        Args:
            loop ([`~dae_diffusers.engine.loop.Loop`]), step ([`~dae_diffusers.engine.loop.Step`]): The present ones.
            result_of (`Callable`): Makes the result of a model.
            validated (`float`, *optional*): The number of the validation, such as its loss, if the step validates.
        """


class BestResult(Monitor):
    r"""
    Keeps the best result of a run in `<folder>/best/step-<N>`, by a number that [`follow`] finds.

    Args:
        run ([`~dae_diffusers.engine.run.TrainingRun`]): With the parts `monitor`, `optimization` and `run` in its config.
        measure (`str`): A fingerprint of what the number depends on.
        state (`dict`, *optional*): The attribute `state` as a checkpoint holds it.
        after (`int`, *optional*): Numbers up to this step do not count for the best and for patience: their results lack what comes at
            this step, such as a weaker transformer that guides, or a codebook.

    Attributes:
        state (`dict`): `step` and `distance`, the number, of the best result, `worse`, how many numbers came since, and `measure`. It
            changes in place.
    """

    def __init__(self, run: TrainingRun, measure: str, state: dict[str, Any] | None = None, *, after: int = 0):
        self.run, self.config, self.after = run, run.config.monitor, after
        if state is not None and state.get("measure", measure) != measure:
            logger.warning(
                "what is measured has changed since the checkpoint (`metric_features`, the validation images, or for a generator "
                "`metric_images`, the autoencoder, the noise levels, or how samples are drawn): the best weights so far no longer count, "
                "and the search for the best begins again."
            )
            state = None
        if state is not None and state["step"] is not None and not self._folder_of(state["step"]).is_dir():
            logger.warning(
                "the best weights so far, of step %d, are not in %s: the search for the best begins again.",
                state["step"], run.folder / "best",
            )  # fmt: skip
            state = None
        self.state = state or {"step": None, "distance": None, "worse": 0}
        self.state["measure"] = measure
        if self.is_exhausted:
            logger.warning(
                "`early_stopping_patience` %d is used up since step %s, so no step follows. Give a larger one, or leave it out, to go on.",
                self.config.early_stopping_patience, self.state["step"],
            )  # fmt: skip

    @property
    def is_exhausted(self) -> bool:
        patience = self.config.early_stopping_patience
        return patience is not None and self.state["worse"] >= patience

    def best_result(self) -> Path | None:
        return None if self.state["step"] is None else self._folder_of(self.state["step"])

    def report(self) -> None:
        if self.state["step"] is not None:
            logger.info("%s was best at step %d: %.4g", self._metric, self.state["step"], self.state["distance"])

    @property
    def _metric(self) -> str:
        return self.name.partition("/")[2]

    def _compare(self, loop: Loop, result: Callable[[], Result], number: float) -> None:
        """Keeps a result that is better than all before."""
        if loop.step > self.after:
            best, sign = self.state["distance"], -1 if direction(self._metric) == "↑" else 1
            if best is None or sign * number < sign * best:
                if self.run.accelerator.is_main_process:
                    self._keep(result(), loop.step)
                self.state.update(step=loop.step, distance=number, worse=0)
            else:
                self.state["worse"] += 1
        self.run.accelerator.wait_for_everyone()
        if self.is_exhausted:
            logger.info("step %d: `early_stopping_patience` is used up, so the run ends.", loop.step)
            loop.stop()

    def _folder_of(self, step: int) -> Path:
        return self.run.folder / "best" / f"step-{step}"

    def _keep(self, result: Result, step: int) -> None:
        """Saves a result whole or not at all. The one before stays until then: an older checkpoint may still name it."""
        folder = self.run.folder / "best"
        kept = {f"step-{self.state['step']}", f"step-{step}"}
        for old in folder.glob("step-*"):
            if old.name not in kept:
                shutil.rmtree(old, ignore_errors=True)
        replace_folder(self._folder_of(step), lambda folder: _save_trained(result, folder))


def _save_trained(result: Result, folder: Path) -> None:
    """Saves a model, or of a pipeline what was trained: a text encoder may have gigabytes, and is the same each time."""
    if not isinstance(result, DiffusionPipeline):
        result.save_pretrained(folder)
        return
    for name, part in _trained(result).items():
        part.save_pretrained(folder / name)


def _trained(pipeline: DiffusionPipeline) -> dict[str, torch.nn.Module]:
    return {name: part for name in _TRAINED if (part := getattr(pipeline, name, None)) is not None}


class BestValidation(BestResult):
    r"""
    The result with the best number of a validation: the lowest loss, from before a generator learns its training images by heart, or the
    best reconstructions.

    Args:
        run, measure, state, after: As [`BestResult`].
        name (`str`): The number's name in the log.
    """

    def __init__(
        self, run: TrainingRun, name: str, measure: str, state: dict[str, Any] | None = None, *, after: int = 0
    ):
        self.name = name
        super().__init__(run, measure, state, after=after)

    def follow(
        self, loop: Loop, step: Step, result_of: Callable[[torch.nn.Module], Result], validated: float | None
    ) -> None:
        if validated is not None:
            with loop.averaged() as model:
                self._compare(loop, lambda: result_of(model), validated)


class SampleDistance(BestResult):
    r"""
    Measures how far samples are from the training images at every `metric_steps` steps. The samples of a step depend on the weights and
    the run's seed alone, so that the number of processes and interruptions change nothing.

    Args:
        run, state, after: As [`BestResult`].
        images ([`~dae_diffusers.data.ImageDataset`]): The training images.
        vae ([`~diffusers.ModelMixin`]): Decodes the samples.
        settings ([`~dae_diffusers.metrics.sampling.SampleSettings`]): How samples are drawn.
        settings_until (`SampleSettings`, *optional*): How samples are drawn up to step `after`; default: `settings`.

    Raises:
        UserError: If the features cannot be loaded or do not take such images.
    """

    def __init__(
        self,
        run: TrainingRun,
        images: ImageDataset,
        vae: ModelMixin,
        settings: SampleSettings,
        state: dict[str, Any] | None = None,
        *,
        after: int = 0,
        settings_until: SampleSettings | None = None,
    ):
        self.settings, self.settings_until = settings, settings_until or settings
        self.images = images.in_one_shape().choose(MAX_REFERENCE_IMAGES)
        self.extractor = load_feature_extractor(
            run.config.monitor.metric_features, run.accelerator.device, channels=images.config.image_channels
        )
        self.name = f"validation/{self.extractor.distance_name('g')}"
        described = [self.extractor.fingerprint, self.images.fingerprint, model_fingerprint(vae), settings.given()]
        described += [] if images.config.pad is None else [images.config.pad]
        super().__init__(run, fingerprint_of_json(described + [after] * (after > 0)), state, after=after)
        self.reference: FeatureStatistics | None = None
        self._started, self._spent = time.monotonic(), 0.0

    def follow(
        self, loop: Loop, step: Step, result_of: Callable[[torch.nn.Module], Result], validated: float | None
    ) -> None:
        if not step.is_last and loop.step % self.config.metric_steps:
            return
        with loop.interruptible(), loop.averaged() as model:
            pipeline = result_of(model)
            distance = self.measure(pipeline, loop.step)
            step.write({self.name: distance})
            self._compare(loop, lambda: pipeline, distance)

    def report(self) -> None:
        super().report()
        if self.state["step"] is not None:
            share = self._spent / max(time.monotonic() - self._started, 1e-9)
            logger.info("measuring took %.0f %% of the time", 100 * share)

    @torch.no_grad()
    def measure(self, pipeline: DiffusionPipeline, step: int) -> float:
        r"""
        Draws samples and measures them.

        Args:
            pipeline (`DiffusionPipeline`): With averaged weights, on its device.
            step (`int`): Optimiser steps done.

        Returns:
            `float`: The distance.
        """
        start, run = time.monotonic(), self.run
        if self.reference is None:
            self.reference = _reference(run, self.extractor, self.images)
        settings = self.settings_until if step < self.after else self.settings
        statistics = FeatureStatistics.of(self._features(pipeline, settings))
        distance = frechet_distance(statistics, self.reference)
        self._spent += time.monotonic() - start
        return distance

    def _features(self, pipeline: DiffusionPipeline, settings: SampleSettings) -> torch.Tensor:
        """Of all samples, `(N, D)`, on the CPU of each process."""
        accelerator = self.run.accelerator
        size = padded_size(self.run.config.optimization.train_batch_size, image_pixels(pipeline))
        batches = image_batches(pipeline, settings, accelerator, size)

        def extract(chunk: range) -> dict[str, torch.Tensor]:
            drawn = ((images.to(accelerator.device).float() * 2 - 1, count) for images, count in batches(chunk))
            return {"features": torch.cat([self.extractor(images)[:count].cpu() for images, count in drawn])}

        return cached_rows(
            extract, settings.num_images, accelerator, folder=None, of=None, chunk_size=size, description="Drawing"
        )["features"]


class ReconstructionJudge:
    r"""
    Measures how far the reconstructions of held-out images are from these images, in the features of `metric_features`.

    Args:
        run ([`~dae_diffusers.engine.run.TrainingRun`]): With the parts `monitor` and `data` in its config.
        images ([`~dae_diffusers.data.ImageDataset`]): The held-out images.

    Attributes:
        name (`str`): What is measured, as the log calls it.
        fingerprint (`str`): Of the features.

    Raises:
        UserError: If the features cannot be loaded, or there are too few images.
    """

    def __init__(self, run: TrainingRun, images: ImageDataset):
        if len(images) < 2:
            raise UserError(
                f"`metric_features` compares reconstructions with the held-out images, of which it needs 2 or more, but there is "
                f"{len(images)}. Hold out more (`validation_fraction`), or leave it out."
            )
        self.run, self.images = run, images
        self.extractor = load_feature_extractor(
            run.config.monitor.metric_features, run.accelerator.device, channels=run.config.data.image_channels
        )
        self.name, self.fingerprint = f"validation/{self.extractor.distance_name('r')}", self.extractor.fingerprint
        self.reference: FeatureStatistics | None = None
        self._seen = FeatureStatistics.empty(self.extractor.feature_dim)

    def add(self, reconstruction: torch.Tensor) -> None:
        r"""Takes reconstructions of this process's share, `(B, C, H, W)`, about [-1, 1]."""
        self._seen.add(self.extractor(pad_batch(reconstruction.clamp(-1, 1)))[: len(reconstruction)])

    def distance(self) -> float:
        r"""The distance of all reconstructions since the last call. All processes call it."""
        run, nothing = self.run, FeatureStatistics.empty(self.extractor.feature_dim)
        if self.reference is None:
            self.reference = _reference(run, self.extractor, self.images)
        shares, self._seen = gather_object([self._seen]), nothing
        return frechet_distance(sum(shares, start=nothing), self.reference)


def _reference(run: TrainingRun, extractor: FeatureExtractor, images: ImageDataset) -> FeatureStatistics:
    """The statistics of images that others are compared with, kept in the run's folder."""
    return reference_statistics(
        extractor,
        images,
        cache_dir=run.folder / "reference",
        num_workers=run.config.data.dataloader_num_workers,
        disable_progress=not run.accelerator.is_main_process,
    )


def make_reconstruction_monitor(
    run: TrainingRun, images: ImageDataset, judge: ReconstructionJudge | None, start: Start, *, after: int = 0
) -> Monitor:
    r"""
    What looks for the best weights while an autoencoder trains: by the distance of held-out reconstructions, without a judge by their
    PSNR. It watches nothing unless `export` or `early_stopping_patience` asks for it.

    Args:
        run ([`~dae_diffusers.engine.run.TrainingRun`]): With the part `monitor` in its config.
        images ([`~dae_diffusers.data.ImageDataset`]): The held-out images.
        judge ([`ReconstructionJudge`], *optional*): What measures the distance.
        start ([`~dae_diffusers.engine.run.Start`]): Where the run begins.
        after (`int`, *optional*): As `after` of [`BestResult`].
    """
    if run.dry_run is not None or not run.config.monitor.looks_for_best:
        return Monitor()
    name = "validation/psnr" if judge is None else judge.name
    measure = fingerprint_of_json([name, None if judge is None else judge.fingerprint, images.fingerprint, after])
    return BestValidation(run, name, measure, start.state.get("monitor"), after=after)


def make_monitor(
    run: TrainingRun,
    images: ImageDataset | None,
    vae: ModelMixin,
    start: Start,
    options: dict[str, Any],
    *,
    loss_inputs: list[Any],
    after: int = 0,
    options_until: dict[str, Any] | None = None,
) -> Monitor:
    r"""
    What looks for the best weights while a generator trains: by the distance of samples with `metric_features`, else by the validation
    loss, and then it watches nothing unless `export` or `early_stopping_patience` asks for it.

    Args:
        run ([`~dae_diffusers.engine.run.TrainingRun`]): See [`SampleDistance`].
        images ([`~dae_diffusers.data.ImageDataset`]): The training images, whose captions and conditions, or classes, are drawn.
        vae ([`~diffusers.ModelMixin`]): Decodes the samples.
        start ([`~dae_diffusers.engine.run.Start`]): Where the run begins.
        options (`dict`): Fields of [`~dae_diffusers.metrics.sampling.SampleSettings`] that say how samples are drawn.
        loss_inputs (`list`): What the validation loss depends on beside the weights: fingerprints and settings.
        after (`int`, *optional*): As `after` of [`BestResult`].
        options_until (`dict`, *optional*): As `settings_until` of [`SampleDistance`].

    Raises:
        UserError: As [`SampleDistance`], and if there are too few training images to compare with.
    """
    config, count = run.config, run.config.monitor.metric_images
    is_asked_for = config.monitor.looks_for_best or config.monitor.metric_features is not None
    if run.dry_run is not None or not is_asked_for:
        return Monitor()
    if config.monitor.metric_features is None:
        measure = fingerprint_of_json(["validation loss", loss_inputs, after])
        return BestValidation(run, "validation/loss", measure, start.state.get("monitor"), after=after)
    if len(images) < 2:
        raise UserError(
            f"`metric_features` compares samples with the training images, of which it needs 2 or more, but there is {len(images)}. Give "
            "more images, or leave it out."
        )
    drawn = prompts_of_images(images, count)
    drawn = drawn or {"class_counts": class_counts(None, images, len(images.id2label or ()) or None)}
    # Other noise than that of `evaluate`, which otherwise would report the very samples that the weights were chosen by.
    seed = derived_seed(config.run.seed, Stream.MONITORED_SAMPLES)
    settings = SampleSettings(count, seed=seed, **options, **drawn)
    until = replace(settings, **options_until or {})
    return SampleDistance(run, images, vae, settings, start.state.get("monitor"), after=after, settings_until=until)


def best_or_last(run: TrainingRun, result: Result, monitor: Monitor) -> Result:
    r"""
    What a run makes: with the last weights, or with `export best` the best ones. Says and notes which.

    Args:
        run ([`~dae_diffusers.engine.run.TrainingRun`]): The run.
        result (`ModelMixin` or `DiffusionPipeline`): With the last weights.
        monitor ([`Monitor`]): What has looked for the best.
    """
    monitor.report()
    if run.config.monitor.export != "best":
        return result
    best = monitor.best_result()
    if best is None:
        logger.warning("nothing was measured since `export best` was given, so the result has the last weights.")
        return result
    if run.accelerator.is_main_process:
        run.note(exported_step=monitor.state["step"])
    logger.info("the result has the weights of step %d", monitor.state["step"])
    if not isinstance(result, DiffusionPipeline):
        return type(result).from_pretrained(best)
    # All but what was trained is as it is now, such as a decoder that came later.
    for name, part in _trained(result).items():
        setattr(result, name, type(part).from_pretrained(best / name))
    return result
