"""
Train a decoupled autoencoder: first the encoder with a weak auxiliary decoder, then the real decoder with the encoder frozen.

    accelerate launch training/train_dae.py --config digits --output_dir runs/digits
    accelerate launch training/train_dae.py --train_data_dir my_images --resolution 64 --mixed_precision bf16

The result is `<output_dir>/vae`, a plain `AutoencoderKL` or `VQModel`. With `--stage 3` its decoder is fitted to a trained generator.
"""

import logging
import math
import shutil
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
from accelerate.utils import gather_object
from PIL.Image import Image

from dae_diffusers.autoencoders.autoencoder_kl import DAEAutoencoderKL
from dae_diffusers.autoencoders.building import make_autoencoder, settings_beside_weights, stage1_folder
from dae_diffusers.autoencoders.loading import is_vq, num_latent_channels, spatial_factor
from dae_diffusers.autoencoders.objective import AutoencoderObjective, check_vision_models
from dae_diffusers.autoencoders.tuned import TunedDecoderMixin
from dae_diffusers.autoencoders.vq_model import DAEVQModel
from dae_diffusers.autoencoders.weak_decoders import keep_prefixes
from dae_diffusers.cli import parse_config
from dae_diffusers.data import ImageDataset, StreamedImages, count_images, describe_size, held_out_settings, load_images
from dae_diffusers.data.arrays import save_value_range
from dae_diffusers.engine.loop import Loop
from dae_diffusers.engine.plan import TRAINING_IMAGES
from dae_diffusers.engine.run import Start, TrainingRun
from dae_diffusers.errors import UserError
from dae_diffusers.fitting.decoder_fit import HOW_IT_DRAWS, STARTED_FROM, DecoderFit, load_generator
from dae_diffusers.fitting.side_by_side import NEWEST, join_waiting, save_newest
from dae_diffusers.latents.cache import CachedLatents, ImagesWithLatents, open_latent_cache, write_latent_cache
from dae_diffusers.latents.codes import codebook_metrics, count_codes
from dae_diffusers.latents.diagnostics import LatentDiagnostics
from dae_diffusers.latents.statistics import set_statistics, write_latent_statistics
from dae_diffusers.metrics.image_quality import ImageMeasure, image_measures, peak_signal_to_noise_ratio
from dae_diffusers.metrics.monitor import Monitor, ReconstructionJudge, best_or_last, make_reconstruction_monitor
from dae_diffusers.metrics.sampling import find_pipeline
from dae_diffusers.plots import image_grid
from dae_diffusers.script import run_script
from dae_diffusers.store import replace_folder
from dae_diffusers.training.settings import TrainDAEConfig
from dae_diffusers.weights import autoencoder_fingerprint

logger = logging.getLogger(__name__)


class HeldOut(NamedTuple):
    """The validation images, and what is measured of their reconstructions: of each, and with a judge of all together."""

    images: ImageDataset
    measures: dict[str, ImageMeasure]
    judge: ReconstructionJudge | None


def main(config: TrainDAEConfig) -> None:
    if config.stages.stage == "3":
        fit_decoder(config)
        return
    run = TrainingRun("train_dae", config)
    config.check_mixed_precision(run.accelerator.mixed_precision)
    model = make_autoencoder(config)
    config.check_lpips(spatial_factor(model))
    stage1 = config.stages.stage1_dir and stage1_folder(config.stages.stage1_dir)
    train_images, validation_images = load_both(run, config.autoencoder.pretrained_model_name_or_path or stage1)
    run.compile_blocks(filter(None, (model.encoder, model.auxiliary_decoder, model.decoder)))
    stage_steps = number_of_steps(run, train_images)
    start = find_start(run, model, train_images, validation_images, stage_steps)
    check_vision_models(config, [stage for stage in stage_steps if stage >= start.state.get("stage", 0)])
    held_out = what_to_measure(run, validation_images)
    monitor = look_for_best(run, held_out, start)
    first_step = 0
    for stage, num_steps in stage_steps.items():
        if stage >= start.state.get("stage", 0):
            if stage == 2 and config.stages.warm_start_decoder and start.checkpoint is None:
                start_warm(model)
            model.set_stage(stage)
            looks = monitor if config.stages.trains_final_decoder(stage) else Monitor()
            model = train_stage(run, model, train_images, held_out, first_step, num_steps, start, looks)
            start = Start()  # a later stage begins afresh
            if stage == 1 and model.is_decoupled and run.accelerator.is_main_process:
                save_model(model, run.output_dir / "stage1", train_images)
        first_step += num_steps
        if run.dry_run is None:
            run.log.mark(f"end of stage {stage}", first_step)

    if run.end_dry_run():
        return
    if config.stages.stage != "1":
        finish_autoencoder(run, model, train_images, monitor)
    run.finish("stage1" if config.stages.stage == "1" else "vae")


def fit_decoder(config: TrainDAEConfig) -> None:
    """Stage 3, which has a folder of its own: the generator's training lies between it and the other stages."""
    config.stages.pipeline = find_pipeline(config.stages.pipeline)
    run = TrainingRun("train_dae", config, folder="train_dae_stage3")
    config.check_mixed_precision(run.accelerator.mixed_precision)
    pipeline = load_generator(config)
    train_images, validation_images = load_both(run, config.stages.pipeline)
    model = make_autoencoder(config, pipeline.vae)
    run.compile_blocks([model.decoder])
    model.set_stage(3)
    fit = DecoderFit(run, pipeline, train_images)
    stage_steps = number_of_steps(run, train_images)
    start = find_start(run, model, train_images, validation_images, stage_steps, fit)
    held_out = what_to_measure(run, validation_images)
    fit.begin(start, lambda: validate(run, model.to(run.accelerator.device).eval(), held_out, start.step))
    model = train_stage(run, model, train_images, held_out, 0, stage_steps[3], start, Monitor(), fit)
    fit.finish(model, stage_steps[3], lambda: validate(run, model, held_out, stage_steps[3]))
    run.finish("pipeline")


def load_both(run: TrainingRun, starts_from: str | None) -> tuple[ImageDataset | StreamedImages, ImageDataset]:
    """Training and validation images, in the range of values that a trained model knows."""
    config = run.config
    with run.accelerator.main_process_first():
        train, validation = load_images(config.data, model=starts_from)
    logger.info("%s, %d validation images", describe_size(train), len(validation))
    return train, validation


def number_of_steps(run: TrainingRun, images: ImageDataset | StreamedImages) -> dict[int, int]:
    """Number of optimiser steps of each stage."""
    config = run.config
    stage_steps = config.stages.stage_steps(run.num_steps(None, images))
    if config.autoencoder.autoencoder == "vq" and config.codebook.quantizer == "ema":
        config.check_warmup(stage_steps)
    losses = config.losses
    for stage, steps in stage_steps.items() if config.stages.stage != "3" else ():
        is_late = losses.adversarial_start + losses.adversarial_ramp_steps >= steps
        if losses.adversarial_weight_of(config.stages.trains_final_decoder(stage)) > 0 and is_late:
            logger.warning(
                "the adversarial loss reaches its weight after %d + %d steps (`--adversarial_start`, `--adversarial_ramp_steps`), "
                "but stage %d has only %d.",
                losses.adversarial_start, losses.adversarial_ramp_steps, stage, steps,
            )  # fmt: skip
    return stage_steps


def find_start(
    run: TrainingRun, model, images, validation_images, stage_steps: dict[int, int], fit: DecoderFit | None = None
) -> Start:
    """Checks that the plan fits the checkpoint, and returns where to begin."""
    if fit is None:
        more = given_autoencoder(run.config, model)
        plan = run.config.stages.plan() | model.decoder_sizes | settings_beside_weights(model)
    else:
        more, plan = fit.inputs(), fit.plan()
    return run.find_start(
        inputs={TRAINING_IMAGES: images.fingerprint, **more},
        settings=plan | held_out_settings(images),
        counts={
            **count_images(images),
            "held_out_images": len(validation_images),
            "parameters": model.num_parameters(),
        },
        steps={f"stage{stage}_steps": steps for stage, steps in stage_steps.items()},
        may_lack=more if fit is None else [HOW_IT_DRAWS, STARTED_FROM],
        classes=images.id2label,
    )


def given_autoencoder(config: TrainDAEConfig, model) -> dict[str, str]:
    """Fingerprints of what stages 1 and 2 start from, by the flags that name it."""
    start, stage1_dir = config.autoencoder.pretrained_model_name_or_path, config.stages.stage1_dir
    given = {"pretrained_model_name_or_path": "none" if start is None else model.given_weights}
    if start is not None and Path(start).resolve().is_relative_to(Path(config.run.output_dir).resolve()):
        given["pretrained_model_name_or_path"] = "in `output_dir`"  # the result of a finished run may have replaced it
    if stage1_dir is not None:
        given["stage1_dir"] = model.given_weights
    return {f"the autoencoder of `--{name}`": value for name, value in given.items()}


def what_to_measure(run: TrainingRun, images: ImageDataset) -> HeldOut:
    """PSNR, SSIM where this machine has it, and with `metric_features` the distance of the reconstructions."""
    data = run.config.data
    measures = image_measures((data.image_channels, *data.size))
    has_judge = run.config.monitor.metric_features is not None and run.dry_run is None
    return HeldOut(images, measures, ReconstructionJudge(run, images) if has_judge else None)


def look_for_best(run: TrainingRun, held_out: HeldOut, start: Start) -> Monitor:
    """What looks for the best weights of joint training or of stage 2, if flags ask for it."""
    config, codebook = run.config, run.config.codebook
    learns_codes = config.autoencoder.autoencoder == "vq" and config.stages.trains_final_decoder(1)
    if config.monitor.export == "best" and held_out.judge is None and config.losses.adversarial_weight > 0:
        logger.warning(
            "`--export best` goes by PSNR, which is often highest before the adversarial loss makes images sharp: give `--metric_features`."
        )
    # Until k-means sets the codebook, the decoder learns latents that are not quantised.
    after = codebook.codebook_warmup_steps if learns_codes and codebook.quantizer == "ema" else 0
    return make_reconstruction_monitor(run, held_out.images, held_out.judge, start, after=after)


def start_warm(model: DAEAutoencoderKL | DAEVQModel) -> None:
    """Copies the auxiliary decoder's weights into the real decoder, if they have counterparts."""
    if model.can_start_warm:
        copied = model.start_decoder_from_auxiliary()
        logger.info("%s", copied)
    else:
        logger.info("the decoder does not start from the auxiliary one: it is of another kind, or it came trained")


def train_stage(
    run: TrainingRun,
    model,
    images,
    held_out: HeldOut,
    first_step: int,
    num_steps: int,
    start: Start,
    monitor: Monitor,
    fit: DecoderFit | None = None,
) -> DAEAutoencoderKL | DAEVQModel:
    """Trains the stage that `model` is set to, and returns it with averaged weights."""
    config, stage = run.config, model.stage
    if config.optimization.gradient_checkpointing:
        model.enable_gradient_checkpointing()
    objective = AutoencoderObjective(run, model, fit)
    is_final = config.stages.trains_final_decoder(stage)
    first = max(start.step, first_step)
    loop = Loop(
        run,
        model,
        steps=first - first_step if monitor.is_exhausted else num_steps,
        first_step=first_step,
        step=first,
        checkpoint=start.checkpoint,
        description=f"Stage {stage}",
        headline="reconstruction_loss",
        learning_rate=None if fit is None else config.generated.stage3_learning_rate,
        also=objective.also,
        others=objective.others,
        after_step=objective.after_step,
        after_skip=objective.after_skip,
        snapshot=("vae", partial(save_snapshot, config, images.value_range)) if is_final else None,
        state={"stage": stage, "monitor": monitor.state, **({} if fit is None else {"before": fit.before})},
    )
    if (
        stage > 1
        and run.dry_run is None
        and loop.step < loop.last_step
        and pays_to_cache_latents(run, model, images, num_steps)
    ):
        images = with_cached_latents(run, model, images)
    for step in loop.over(images):
        for batch in step:
            step.backward(objective(loop.model, batch, step))
            objective.after_backward(step)
        objective.check_balance(step)
        if step.validates:
            with loop.averaged() as averaged:
                values = validate(run, averaged, held_out, loop.step)
                step.write(values if fit is None else values | fit.validate(averaged, values, loop.step))
                if stage == 2 and not step.is_last and run.accelerator.is_main_process:
                    save_newest(averaged, run.folder, loop.step)
            monitor.follow(loop, step, lambda model: model.to_diffusers(), values.get(monitor.name))
    return loop.finished_model()


def pays_to_cache_latents(run: TrainingRun, model, images: ImageDataset | StreamedImages, num_steps: int) -> bool:
    """Whether stage 2 would encode images more than once, and the latents of all images fit into the allowed cache."""
    data = run.config.data
    if data.has_random_views or data.streaming:
        return False
    views = len(images) * (2 if data.random_flip else 1)
    num_bytes = views * 2 * num_latent_channels(model) * math.prod(data.size) // spatial_factor(model) ** 2 * 4
    return num_steps * run.images_per_step > views and num_bytes <= run.config.stages.stage2_cache_gib * 2**30


def with_cached_latents(run: TrainingRun, model, images: ImageDataset) -> ImagesWithLatents:
    """Encodes every image once, since the encoder no longer changes; the cache goes when the run is done."""
    folder = run.folder / "latents"
    was_training = model.training
    model.eval()
    latents = write_latent_cache(
        folder,
        model,
        images,
        run.accelerator,
        batch_size=run.config.optimization.train_batch_size,
        dtype="float32",
        num_workers=run.config.data.dataloader_num_workers,
        replace=True,  # a killed run may have left that of another stage 1
    )
    model.train(was_training)
    return ImagesWithLatents(images, latents)


def finish_autoencoder(run: TrainingRun, model, images: ImageDataset | StreamedImages, monitor: Monitor) -> None:
    """Measures the latents over all training images and saves the result, a plain autoencoder of diffusers."""
    vae = model.to_diffusers()
    vae.load_state_dict(best_or_last(run, vae, monitor).state_dict())
    vae.to(run.accelerator.device)
    num_workers = run.config.data.dataloader_num_workers
    if is_vq(vae):
        metrics = codebook_metrics(count_codes(vae, run.pass_loader(images, num_workers=num_workers), run.accelerator))
        shown = ", ".join(f"{name} {value:.4g}" for name, value in metrics.items())
        logger.info("over all training images: %s", shown)
    if keeps_latents(run.config, model):
        set_statistics(vae, model.given_statistics)
    else:
        source = cached_latents(run, vae, images) or images
        write_latent_statistics(vae, run.pass_loader(source, num_workers=num_workers), run.accelerator)
    if run.accelerator.is_main_process:
        save_model(vae, run.output_dir / "vae", images)
        logger.info("saved %s", run.output_dir / "vae")
        if model.is_asymmetric:
            logger.info(
                "its decoder does not mirror its encoder, so no class of diffusers can hold it: it is a %s of dae_diffusers. Without this "
                "package load it with `AutoModel.from_pretrained(%r, trust_remote_code=True)`, whose code lies beside the weights.",
                type(vae).__name__,
                str(run.output_dir / "vae"),
            )
        logger.info("next: %s", run.next_command("train_vqgan_prior" if is_vq(vae) else "train_dit", vae="vae"))
        shutil.rmtree(run.folder / "latents", ignore_errors=True)
        shutil.rmtree(run.folder / NEWEST, ignore_errors=True)
        join_waiting(run.output_dir, [run.output_dir])


def save_snapshot(config: TrainDAEConfig, value_range: list[float] | None, model, folder: Path) -> None:
    """Saves an autoencoder that still trains, to be published. Only given statistics of its latents are known by then."""
    vae = model.to_diffusers()
    set_statistics(vae, model.given_statistics if keeps_latents(config, model) else {"scaling_factor": 1.0})
    vae.save_pretrained(folder)
    save_value_range(value_range, folder)


def save_model(model, folder: Path, images: ImageDataset | StreamedImages) -> None:
    """Saves an autoencoder with the value range of its images, whole or not at all."""

    def save(folder: Path) -> None:
        model.save_pretrained(folder)
        save_value_range(images.value_range, folder)

    replace_folder(folder, save)


def keeps_latents(config: TrainDAEConfig, model) -> bool:
    """
    Whether the encoder stays as given and has statistics of its latents already. Generators that were trained on these latents depend
    on them, so they are not measured again. Of a published class whose encoder is never trained, a factor of 1 is the scale.
    """
    if config.autoencoder.pretrained_model_name_or_path is None or config.stages.stage != "2":
        return False
    given = model.given_statistics
    return (
        isinstance(model, TunedDecoderMixin)
        or given.get("latents_mean") is not None
        or given.get("scaling_factor", 1.0) != 1
    )


def cached_latents(run: TrainingRun, vae, images: ImageDataset | StreamedImages) -> CachedLatents | None:
    """The latents that stage 2 has cached, or None."""
    try:
        latents = open_latent_cache(run.folder / "latents", run.accelerator)
        latents.check(autoencoder=autoencoder_fingerprint(vae), images=images)
    except UserError:
        return None
    return latents


def prefixes_of(model) -> list[int]:
    """Numbers of channels, 1, 2, 4 and so on, with which a stage 1 with the decoder `prefix` is validated too."""
    if model.stage != 1 or model.config.auxiliary_decoder_type != "prefix":
        return []
    return [2**power for power in range((num_latent_channels(model) - 1).bit_length())]


@torch.no_grad()
def validate(run: TrainingRun, model, held_out: HeldOut, step: int) -> dict[str, float]:
    """
    PSNR, also with the first channels of the latents alone where they are ordered, mean absolute error, SSIM, the distance that a judge
    sees, use of the codebook and diagnostics of the latents over the validation images, and a grid of originals above reconstructions.
    Raises `UserError` if latents or reconstructions are not finite.
    """
    accelerator, (images, measures, judge) = run.accelerator, held_out
    fewer = {f"psnr_first_{count}": count for count in prefixes_of(model)}
    of_images = {name: [] for name in ("psnr", "l1", *fewer, *measures)}
    chosen, shown = images.spread(10), {}
    number = accelerator.process_index  # of the image in the data set: a pass deals them out one by one
    counts = diagnostics = None
    if is_vq(model):
        counts = torch.zeros(model.config.num_vq_embeddings, dtype=torch.int64, device=accelerator.device)
    for batch in run.pass_loader(images):
        pixel_values = batch["pixel_values"].to(accelerator.device)
        with accelerator.autocast():
            reconstruction, latent = model(pixel_values, return_dict=False)
        reconstruction = reconstruction.float()
        if counts is not None:
            counts += torch.bincount(latent.codes.flatten(), minlength=len(counts))
        mean, std = (latent.mean, latent.std) if counts is None else (latent.latents, None)
        run.guard.check_validation(step, latents=mean, reconstruction=reconstruction)
        if model.stage == 1:  # stage 2 leaves the latents as they are
            diagnostics = diagnostics or LatentDiagnostics.empty(tuple(mean.shape[1:]))
            diagnostics.add(mean, std)
        for name, measure in measures.items():
            of_images[name] += measure(reconstruction, pixel_values).tolist()
        if judge is not None:
            judge.add(reconstruction)
        decoded = mean if counts is None else latent.straight_through  # what the auxiliary decoder gets
        for name, count in fewer.items():
            with accelerator.autocast():
                first = keep_prefixes(decoded, torch.full((len(decoded),), count, device=decoded.device))
                from_first = model.auxiliary_decoder(first).float()
                of_images[name] += peak_signal_to_noise_ratio(from_first, pixel_values).tolist()
        of_images["l1"] += (reconstruction - pixel_values).abs().mean(dim=(1, 2, 3)).tolist()
        for pair in zip(pixel_values.cpu(), reconstruction.cpu(), strict=True):
            if number in chosen:
                shown[number] = pair
            number += accelerator.num_processes
    shown = dict(gather_object(list(shown.items())))
    if accelerator.is_main_process:
        grid = reconstruction_grid([shown[n] for n in chosen], images.class_names_of(chosen))
        run.log.write_grid(f"reconstruction-stage{model.stage}", grid, step)
    of_images = {name: gather_object(values) for name, values in of_images.items()}
    values = {f"validation/{name}": math.fsum(each) / len(each) for name, each in of_images.items()}
    values |= {} if judge is None else {judge.name: judge.distance()}
    if counts is not None:
        metrics = codebook_metrics(accelerator.reduce(counts, reduction="sum"))
        values |= {f"validation/{name}": value for name, value in metrics.items()}
    parts = [part for part in gather_object([diagnostics]) if part is not None]
    if parts:
        scalars = sum(parts[1:], start=parts[0]).scalars()
        values |= {f"latents/{name}": value for name, value in scalars.items()}
    return values


def reconstruction_grid(pairs: list[tuple[torch.Tensor, torch.Tensor]], names: list[str] | None) -> Image:
    """Originals above reconstructions."""
    rows = torch.stack([pair[row] for row in range(2) for pair in pairs])
    return image_grid(rows, columns=len(pairs), row_names=["image", "reconstruction"], column_names=names)


if __name__ == "__main__":
    run_script(main, parse_config(TrainDAEConfig, description=__doc__))
