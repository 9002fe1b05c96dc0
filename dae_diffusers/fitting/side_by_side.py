"""A decoder and a generator of the same encoder, trained side by side: whichever ends last makes the pipeline."""

import logging
import shutil
from collections.abc import Iterable
from functools import partial
from pathlib import Path

import torch
from diffusers import DiffusionPipeline, ModelMixin
from filelock import FileLock

from dae_diffusers.autoencoders.loading import (
    as_plain,
    is_from_stage1,
    load_any_autoencoder,
    load_autoencoder,
    spatial_factor,
)
from dae_diffusers.engine.run import TrainingRun
from dae_diffusers.errors import UserError
from dae_diffusers.evaluation_record import weights_by_part
from dae_diffusers.fit_record import read_fit, write_fit
from dae_diffusers.latents.statistics import set_statistics
from dae_diffusers.metrics.monitor import Monitor, best_or_last
from dae_diffusers.metrics.sampling import load_pipeline
from dae_diffusers.store import read_json, replace_folder, write_json
from dae_diffusers.weights import (
    ENCODER,
    STATISTICS,
    have_other_encoders,
    latents_fingerprint,
    weights_fingerprint,
    weights_fingerprint_of,
)

logger = logging.getLogger(__name__)

WAITING = "pipeline_waiting"  # in the output folder: a finished generator whose decoder still trains
REPLACED = "vae_before_assemble"  # beside the pipeline: the autoencoder that another decoder replaced
BEFORE = "pipeline_before"  # beside the pipeline: what a further training replaced, if it had been changed
NEWEST = "newest_decoder"  # in the folder of train_dae: the decoder of stage 2 at its last validation


class GrowingAutoencoder:
    r"""
    The autoencoder that a generator is trained on. Its encoder is final; its decoder may still be in stage 2, in another process.

    Args:
        place (`str`): An autoencoder, or the output folder of train_dae.py, of which stage 1 is finished.
        output_dir (`Path`): Where the generator's pipeline goes. A decoder is looked for here and at `place`.
        device (`torch.device`): Where the models go.

    Attributes:
        vae ([`~diffusers.AutoencoderKL`] or [`~diffusers.VQModel`]): With the encoder to train on. Decode with [`newest`].
        is_finished (`bool`): Whether its decoder was trained when it was loaded.

    Raises:
        UserError: If there is no autoencoder.
    """

    def __init__(self, place: str, output_dir: Path, device: torch.device):
        model = load_any_autoencoder(place, takes_stage1=True)
        self.device, self.output_dir = device, output_dir
        self.is_finished = not is_from_stage1(model)
        if self.is_finished and have_other_encoders(Path(place) / "stage1", Path(place) / "vae", ENCODER):
            raise UserError(
                f"{place} has the autoencoder of an earlier run: the encoder of `vae/` is not that of `stage1/`. Give {place}/vae or "
                f"{place}/stage1, or remove the old one."
            )
        self.vae = as_plain(model).to(device)
        self._fit = read_fit(place)
        self._runs = list(dict.fromkeys(path.resolve() for path in (output_dir, Path(place), Path(place).parent)))
        self._stage1 = None if self.is_finished else model
        self._origin: str | None = None
        if not self.is_finished:
            logger.info("%s: the encoder of a stage 1. Its decoder may train at the same time (stage 2).", place)

    def newest(self, *, of_same_size: bool = False) -> ModelMixin:
        r"""
        The same encoder with the newest decoder there is: of stage 2, or the auxiliary one of stage 1. Logs which.

        Args:
            of_same_size (`bool`, *optional*, defaults to `False`): Whether decoders that make larger images do not count: for a
                generator that draws from images.
        """
        if self.is_finished:
            return self.vae
        vae, origin = self._of_stage2(of_same_size) or (
            with_auxiliary_decoder(self._stage1),
            "the auxiliary decoder of stage 1",
        )
        if origin != self._origin:
            logger.info("samples are decoded by %s", origin)
            self._origin = origin
        return with_statistics_of(self.vae, vae).to(self.device)

    def finish(self, run: TrainingRun, pipeline: DiffusionPipeline, monitor: Monitor) -> None:
        r"""
        Saves the pipeline of a generator that is trained, whole or [`WAITING`], and finishes its run. All processes call it.

        Args:
            run ([`~dae_diffusers.engine.run.TrainingRun`]): The generator's.
            pipeline (`DiffusionPipeline`): With the last weights.
            monitor ([`~dae_diffusers.metrics.monitor.Monitor`]): What has looked for the best weights.
        """
        is_whole = self.is_finished
        if run.accelerator.is_main_process:
            pipeline = best_or_last(run, pipeline, monitor)
            parts = weights_by_part(pipeline.components)
            target = run.output_dir / "pipeline"
            if (
                is_whole
                and not run.has_steps
                and run.weights_before
                and (target / DiffusionPipeline.config_name).exists()
            ):
                logger.info(
                    "no step was left, so %s stays as it is, with what `ema`, stage 3 or `--set_defaults` may have changed since. To have "
                    "it made again, move it elsewhere.",
                    target,
                )
            elif is_whole:
                set_aside_if_changed(target, run.weights_before)
                run.note(weights=parts)
                replace_folder(target, partial(self._save, pipeline))
                logger.info("saved %s", target)
            else:
                run.note(weights={name: of for name, of in parts.items() if name != "vae"})  # the decoder comes later
                is_whole = self.save_waiting(pipeline)
        run.finish("pipeline" if is_whole else None)

    def save_waiting(self, pipeline: DiffusionPipeline) -> bool:
        r"""
        Saves a finished generator whose decoder was not finished at the start: as `pipeline/` if the decoder is finished now, else in
        [`WAITING`], until train_dae.py ends. One process calls it.

        Returns:
            `bool`: Whether the pipeline is whole.
        """
        replace_folder(self.output_dir / WAITING, partial(self._save, pipeline))
        if join_waiting(self.output_dir, self._runs):
            return True
        logger.info(
            "saved %s: the generator is finished, its decoder is not. When stage 2 ends in the same `output_dir`, it makes "
            "%s. For a decoder elsewhere: dae-diffusers assemble --pipeline %s --vae <its vae/>",
            self.output_dir / WAITING,
            self.output_dir / "pipeline",
            self.output_dir,
        )
        return False

    def _save(self, pipeline: DiffusionPipeline, folder: Path) -> None:
        """Saves a pipeline, and the record of a stage 3 that has fitted its decoder to another generator."""
        pipeline.save_pretrained(folder)
        if self._fit:
            write_fit(folder / "vae", folder / "vae", self._fit)

    def _of_stage2(self, of_same_size: bool) -> tuple[ModelMixin, str] | None:
        wanted = latents_fingerprint(self.vae)
        for folder in (run / name for run in self._runs for name in ("vae", f"train_dae/{NEWEST}")):
            vae = _load(folder)
            if vae is None or (of_same_size and spatial_factor(vae) != spatial_factor(self.vae)):
                continue
            if latents_fingerprint(vae) == wanted:
                step = vae.config.get("trained_steps")
                return vae, f"{folder}{'' if step is None else f', the decoder at step {step}'}"
        return None


def set_aside_if_changed(pipeline_folder: Path, weights: dict[str, str] | None) -> None:
    r"""
    Keeps a copy of a pipeline beside it, in [`BEFORE`], if some of its weights are not those that its training has saved.

    Args:
        pipeline_folder (`Path`): The pipeline, which may not exist.
        weights (`dict[str, str]` or `None`): Fingerprints of what the training saved, by part; None if it saved nothing.
    """
    changed = [
        name for name, of in (weights or {}).items() if weights_fingerprint_of(pipeline_folder / name) not in (of, None)
    ]
    if changed:
        kept = pipeline_folder.with_name(BEFORE)
        replace_folder(kept, partial(shutil.copytree, pipeline_folder))
        logger.warning(
            "%s is replaced by what was trained now. `ema`, stage 3 or `assemble` had changed its %s since the last training: as it was, "
            "it is in %s.",
            pipeline_folder, " and ".join(changed), kept,
        )  # fmt: skip


def save_newest(model: ModelMixin, folder: Path, step: int) -> None:
    r"""
    Saves the decoder of a stage 2 that still trains, for the samples of a generator beside it.

    Args:
        model: The autoencoder with averaged weights.
        folder (`Path`): That of train_dae.
        step (`int`): Optimiser steps that are done.
    """
    vae = model.to_diffusers()
    vae.register_to_config(trained_steps=step)
    replace_folder(folder / NEWEST, vae.save_pretrained)


def join_waiting(output_dir: Path, runs: Iterable[Path]) -> bool:
    r"""
    Makes the pipeline of a generator that waits for its decoder, and of a finished decoder.

    Args:
        output_dir (`Path`): With the generator in [`WAITING`].
        runs (`Iterable[Path]`): Output folders of train_dae.py. The first whose `vae/` has the generator's encoder gives the decoder.

    Returns:
        `bool`: Whether the pipeline is whole now.
    """
    if not (output_dir / WAITING).is_dir():
        return False
    with FileLock(output_dir / ".joining.lock"):  # both may end at the same time
        waiting = output_dir / WAITING
        if not waiting.is_dir():
            return True
        for run in runs:
            if _load(run / "vae") is None:
                continue
            try:
                assemble(waiting, run / "vae", output_dir / "pipeline")
            except UserError as problem:
                logger.warning("%s stays as it is: %s", waiting, problem)
                continue
            shutil.rmtree(waiting)
            return True
    return False


def assemble(pipeline_folder: Path, vae_folder: str | Path, target: Path) -> None:
    r"""
    Puts a decoder into a pipeline whose generator was trained on the same encoder. The statistics of the latents stay those that
    the generator knows.

    Args:
        pipeline_folder (`Path`): The pipeline.
        vae_folder (`str` or `Path`): The autoencoder, in a folder or on the Hub.
        target (`Path`): Where to write the result. In the pipeline's own folder only the autoencoder is replaced, and kept in [`REPLACED`].

    Raises:
        UserError: If the two have different encoders or codebooks, the generator cannot draw with such a decoder, or one of them
            cannot be loaded.
    """
    pipeline = load_pipeline(str(pipeline_folder), torch.device("cpu"))
    vae = load_autoencoder(str(vae_folder))
    found = [latents_fingerprint(each) for each in (pipeline.vae, vae)]
    if found[0] != found[1]:
        raise UserError(
            f"the generator of {pipeline_folder} was trained on another encoder or codebook ({found[0]}) than that of "
            f"{vae_folder} ({found[1]}). Give the result of a stage 2 that kept the generator's encoder."
        )
    try:
        pipeline.vae = with_statistics_of(pipeline.vae, vae)
    except ValueError as problem:  # one that draws from images takes no decoder of another size
        raise UserError(
            f"the decoder of {vae_folder} does not fit the generator of {pipeline_folder}. {problem}"
        ) from None
    fit, part = read_fit(vae_folder), target / "vae"
    is_same_folder = target.resolve() == pipeline_folder.resolve()

    def save(folder: Path) -> None:
        model, saved = (pipeline.vae, folder) if is_same_folder else (pipeline, folder / "vae")
        model.save_pretrained(folder)
        if fit:
            write_fit(saved, saved, fit)

    if not is_same_folder:
        replace_folder(target, save)
        logger.info("saved %s, with the decoder of %s", target, vae_folder)
        return
    kept = target.resolve().with_name(REPLACED)
    # They are equal if the command was given again.
    if weights_fingerprint_of(part) != weights_fingerprint(vae.state_dict().values()):
        replace_folder(kept, partial(shutil.copytree, part))
    replace_folder(part, save)
    module = type(vae).__module__  # of diffusers, or of a file that lies beside the weights
    library = "diffusers" if module.startswith("diffusers.") else module.rpartition(".")[2]
    index = read_json(target / DiffusionPipeline.config_name)
    write_json(target / DiffusionPipeline.config_name, {**index, "vae": [library, type(vae).__name__]})
    logger.info("%s now has the decoder of %s; the autoencoder before is in %s", part, vae_folder, kept)


def with_statistics_of(known: ModelMixin, vae: ModelMixin) -> ModelMixin:
    r"""`vae` with the statistics of the latents that `known` has in its config."""
    set_statistics(vae, {name: known.config[name] for name in STATISTICS if name in known.config})
    return vae


def with_auxiliary_decoder(model: ModelMixin) -> ModelMixin:
    r"""The plain autoencoder of a stage 1, to decode with its auxiliary decoder. It cannot be saved."""
    vae, auxiliary = as_plain(model), model.auxiliary_decoder
    if auxiliary.post_quant_conv is not None:
        vae.post_quant_conv = auxiliary.post_quant_conv
    vae.decoder = _OfLatents(auxiliary.decoder)
    return vae


class _OfLatents(torch.nn.Module):
    """A decoder that takes latents alone, where diffusers passes more."""

    def __init__(self, decoder: torch.nn.Module):
        super().__init__()
        self.decoder = decoder

    def forward(self, latents: torch.Tensor, *_) -> torch.Tensor:
        return self.decoder(latents)


def _load(folder: Path) -> ModelMixin | None:
    """The autoencoder in a folder; None if there is none, or if it is being written."""
    if not (folder / "config.json").is_file():
        return None
    try:
        return load_autoencoder(str(folder))
    except UserError:
        return None
