"""The distance of samples to the training images, measured while a generator trains, and the best weights so far."""

import logging
import shutil
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from diffusers import DiffusionPipeline, ModelMixin

from dae_diffusers.data import ImageDataset
from dae_diffusers.engine.loop import Loop, Step
from dae_diffusers.engine.run import Start, TrainingRun
from dae_diffusers.errors import UserError
from dae_diffusers.evaluation_record import weights_by_part
from dae_diffusers.metrics.distances import frechet_distance
from dae_diffusers.metrics.features import load_feature_extractor
from dae_diffusers.metrics.kept import keep_rows, model_fingerprint
from dae_diffusers.metrics.sampling import SampleSettings, class_counts, image_batches, image_pixels, prompts_of_images
from dae_diffusers.metrics.statistics import MAX_REFERENCE_IMAGES, FeatureStatistics, padded_size, reference_statistics
from dae_diffusers.store import fingerprint_of_json, replace_folder

logger = logging.getLogger(__name__)


class SampleDistance:
    r"""
    Measures how far samples are from the training images at every `metric_steps` steps, and keeps the best pipeline in
    `<folder>/best/step-<N>`. The samples of a step depend on the weights and the run's seed alone, so that the number of processes
    and interruptions change nothing.

    Args:
        run ([`~dae_diffusers.engine.run.TrainingRun`]): With the parts `monitor`, `optimization` and `run` in its config.
        images ([`~dae_diffusers.data.ImageDataset`]): The training images.
        vae ([`~diffusers.ModelMixin`]): Decodes the samples.
        settings ([`~dae_diffusers.metrics.sampling.SampleSettings`]): How samples are drawn.
        state (`dict`, *optional*): The attribute `state` as a checkpoint holds it.
        after (`int`, *optional*): Measurements up to this step are logged, but do not count for the best and for patience: their
            pipelines lack what comes at this step, such as a weaker transformer that guides.
        settings_until (`SampleSettings`, *optional*): How samples are drawn before that step; default: `settings`.

    Attributes:
        state (`dict`): `step` and `distance` of the best measurement, `worse`, how many were made since, and `measure`, a fingerprint of
            what is measured. It changes in place: save it with each checkpoint.

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
        self.run, self.config, self.settings = run, run.config.monitor, settings
        self.after, self.settings_until = after, settings_until or settings
        self.images = images.in_one_shape().choose(MAX_REFERENCE_IMAGES)
        self.extractor = load_feature_extractor(self.config.metric_features, run.accelerator.device)
        self.name = f"validation/{self.extractor.distance_name('g')}"
        described = [self.extractor.fingerprint, self.images.fingerprint, model_fingerprint(vae), settings.given()]
        measure = fingerprint_of_json(described + [after] * (after > 0))
        if state is not None and state.get("measure", measure) != measure:
            logger.warning(
                "what is measured has changed since the checkpoint (`metric_features`, `metric_images`, the autoencoder or how samples "
                "are drawn): the best weights so far no longer count, and the search for the best begins again."
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
        self.reference: FeatureStatistics | None = None
        self._started, self._spent = time.monotonic(), 0.0

    @property
    def is_exhausted(self) -> bool:
        r"""Whether the last `early_stopping_patience` measurements brought nothing better."""
        patience = self.config.early_stopping_patience
        return patience is not None and self.state["worse"] >= patience

    def follow(self, loop: Loop, step: Step, pipeline_of: Callable[[torch.nn.Module], DiffusionPipeline]) -> None:
        r"""
        Measures if a measurement is due, and ends the loop if patience is. Call it in each step of the loop, on all processes.

        Args:
            loop ([`~dae_diffusers.engine.loop.Loop`]), step ([`~dae_diffusers.engine.loop.Step`]): The present ones.
            pipeline_of (`Callable`): Makes the pipeline of a model.
        """
        if not step.is_last and loop.step % self.config.metric_steps:
            return
        with loop.averaged() as model:
            step.write(self.measure(pipeline_of(model), loop.step))
        if self.is_exhausted:
            logger.info("step %d: `early_stopping_patience` is used up, so the run ends.", loop.step)
            loop.stop()

    @torch.no_grad()
    def measure(self, pipeline: DiffusionPipeline, step: int) -> dict[str, float]:
        r"""
        Draws samples and measures them; a pipeline that is the best so far is saved. All processes call it.

        Args:
            pipeline (`DiffusionPipeline`): With averaged weights, on its device.
            step (`int`): Optimiser steps done.

        Returns:
            `dict[str, float]`: The distance, as it is logged.
        """
        start, run = time.monotonic(), self.run
        if self.reference is None:
            self.reference = reference_statistics(
                self.extractor,
                self.images,
                cache_dir=run.folder / "reference",
                num_workers=run.config.data.dataloader_num_workers,
                disable_progress=not run.accelerator.is_main_process,
            )
        settings = self.settings_until if step < self.after else self.settings
        statistics = FeatureStatistics.of(self._features(pipeline, settings))
        distance = frechet_distance(statistics, self.reference)
        if step > self.after:
            self._compare(pipeline, step, distance)
        run.accelerator.wait_for_everyone()
        self._spent += time.monotonic() - start
        return {self.name: distance}

    def best_pipeline(self) -> Path | None:
        r"""The folder of the best pipeline so far."""
        return None if self.state["step"] is None else self._folder_of(self.state["step"])

    def _folder_of(self, step: int) -> Path:
        return self.run.folder / "best" / f"step-{step}"

    def report(self) -> None:
        r"""Says what was best and what the measurements cost, if there were any."""
        if self.state["step"] is None:
            return
        share = self._spent / max(time.monotonic() - self._started, 1e-9)
        logger.info(
            "%s was smallest at step %d: %.4g; measuring took %.0f %% of the time",
            self.name.partition("/")[2],
            self.state["step"],
            self.state["distance"],
            100 * share,
        )

    def _compare(self, pipeline: DiffusionPipeline, step: int, distance: float) -> None:
        """Keeps a pipeline that is better than all before."""
        if self.state["distance"] is None or distance < self.state["distance"]:
            if self.run.accelerator.is_main_process:
                self._keep(pipeline, step)
            self.state.update(step=step, distance=distance, worse=0)
        else:
            self.state["worse"] += 1

    def _features(self, pipeline: DiffusionPipeline, settings: SampleSettings) -> torch.Tensor:
        """Of all samples, `(N, D)`, on the CPU of each process."""
        accelerator = self.run.accelerator
        size = padded_size(self.run.config.optimization.train_batch_size, image_pixels(pipeline))
        batches = image_batches(pipeline, settings, accelerator, size)

        def extract(chunk: range) -> dict[str, torch.Tensor]:
            drawn = ((images.to(accelerator.device).float() * 2 - 1, count) for images, count in batches(chunk))
            return {"features": torch.cat([self.extractor(images)[:count].cpu() for images, count in drawn])}

        return keep_rows(
            extract, settings.num_images, accelerator, folder=None, of=None, chunk_size=size, description="Drawing"
        )["features"]

    def _keep(self, pipeline: DiffusionPipeline, step: int) -> None:
        """Saves a pipeline whole or not at all. The one before stays until then: an older checkpoint may still name it."""
        folder = self.run.folder / "best"
        kept = {f"step-{self.state['step']}", f"step-{step}"}
        for old in folder.glob("step-*"):
            if old.name not in kept:
                shutil.rmtree(old, ignore_errors=True)
        replace_folder(self._folder_of(step), pipeline.save_pretrained)


def make_monitor(
    run: TrainingRun,
    images: ImageDataset | None,
    vae: ModelMixin,
    start: Start,
    options: dict[str, Any],
    *,
    after: int = 0,
    options_until: dict[str, Any] | None = None,
) -> SampleDistance | None:
    r"""
    What measures samples while a generator trains; None without `metric_features`.

    Args:
        run ([`~dae_diffusers.engine.run.TrainingRun`]): See [`SampleDistance`].
        images ([`~dae_diffusers.data.ImageDataset`]): The training images, whose captions and conditions, or classes, are drawn.
        vae ([`~diffusers.ModelMixin`]): Decodes the samples.
        start ([`~dae_diffusers.engine.run.Start`]): Where the run begins.
        options (`dict`): Fields of [`~dae_diffusers.metrics.sampling.SampleSettings`] that say how samples are drawn.
        after (`int`, *optional*), options_until (`dict`, *optional*): As `after` and `settings_until` of [`SampleDistance`].

    Raises:
        UserError: As [`SampleDistance`], and if there are too few training images to compare with.
    """
    config, count = run.config, run.config.monitor.metric_images
    if config.monitor.metric_features is None or run.dry_run is not None:
        return None
    if len(images) < 2:
        raise UserError(
            f"`metric_features` compares samples with the training images, of which it needs 2 or more, but there is {len(images)}. Give "
            "more images, or leave it out."
        )
    drawn = prompts_of_images(images, count)
    drawn = drawn or {"class_counts": class_counts(None, images, len(images.id2label or ()) or None)}
    settings = SampleSettings(count, seed=config.run.seed, **options, **drawn)
    until = replace(settings, **options_until or {})
    return SampleDistance(run, images, vae, settings, start.state.get("monitor"), after=after, settings_until=until)


def save_result(run: TrainingRun, pipeline: DiffusionPipeline, monitor: SampleDistance | None) -> None:
    r"""
    Saves `<output_dir>/pipeline`: the pipeline with the last weights, or with `export best` the one with the smallest distance.

    Args:
        run ([`~dae_diffusers.engine.run.TrainingRun`]): The run.
        pipeline (`DiffusionPipeline`): With the last weights.
        monitor ([`SampleDistance`], *optional*): What measured the samples.
    """
    target, step = run.output_dir / "pipeline", None
    if monitor is not None:
        monitor.report()
        best = monitor.best_pipeline() if monitor.config.export == "best" else None
        if best is not None:
            pipeline, step = type(pipeline).from_pretrained(best), monitor.state["step"]
            run.note(exported_step=step)
    run.note(weights=weights_by_part(pipeline.components))
    pipeline.save_pretrained(target)
    logger.info("saved %s%s", target, "" if step is None else f", the weights of step {step}")
