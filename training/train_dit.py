r"""
Train a Diffusion Transformer in the latent space of an autoencoder, with flow matching.

    accelerate launch training/train_dit.py --dataset_name digits --image_channels 1 --vae runs/digits/vae \
        --output_dir runs/digits
    accelerate launch training/train_dit.py --latent_cache runs/digits/latents --vae runs/digits/vae --model DiT-S/2

The result is `<output_dir>/pipeline`, for `DAEDiTPipeline.from_pretrained`.
"""

import logging
import math
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import gather_object
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler
from torch.utils.data import Dataset

from dae_diffusers.alignment import make_representation_alignment
from dae_diffusers.autoencoders.loading import (
    num_latent_channels,
    settle_images,
    spatial_factor,
)
from dae_diffusers.cli import parse_config, run_script
from dae_diffusers.data import ImageDataset, count_images, describe_size, load_images
from dae_diffusers.data.arrays import read_value_range
from dae_diffusers.fitting.side_by_side import GrowingAutoencoder
from dae_diffusers.latents.cache import (
    CachedLatents,
    ImagesWithLatents,
    autoencoder_fingerprint,
    follow_cache,
    open_latent_cache,
)
from dae_diffusers.latents.statistics import (
    has_latent_statistics,
    moments_of,
    normalize_latents,
    write_latent_statistics,
)
from dae_diffusers.loop import Loop
from dae_diffusers.losses.flow_matching import flow_matching_loss, interpolate, sample_sigmas
from dae_diffusers.metrics.monitor import SampleDistance, save_result
from dae_diffusers.metrics.sampling import SampleSettings
from dae_diffusers.pipelines.dae_dit import DAEDiTPipeline
from dae_diffusers.randomness import derived_seed
from dae_diffusers.run import Start, TrainingRun
from dae_diffusers.run_settings import steps_of
from dae_diffusers.training.settings import TrainDiTConfig
from dae_diffusers.transformer_dae_dit import DAEDiTTransformer2DModel

logger = logging.getLogger(__name__)


def main(config: TrainDiTConfig) -> None:
    run = TrainingRun("train_dit", config, one_model=True)
    accelerator, flow = run.accelerator, config.flow
    autoencoder = GrowingAutoencoder(config.transformer.vae, run.output_dir, accelerator.device)
    config.hub.check_snapshots(autoencoder.is_finished)
    config.monitor.check_decoder(autoencoder.is_finished)
    vae = autoencoder.vae
    train_data, validation_data, training_images = load_data(run, vae)
    transformer = make_transformer(config, vae, train_data)
    pipeline_of = partial(make_pipeline, vae=vae, data=train_data, shift=flow.timestep_shift)
    if config.optimization.gradient_checkpointing:
        transformer.enable_gradient_checkpointing()
    run.compile_blocks(transformer.transformer_blocks)
    alignment = make_representation_alignment(config.alignment, transformer, accelerator, config.run.seed)
    num_images = None if config.data.streaming else len(train_data)
    steps = steps_of(
        config.transformer.max_train_steps, config.optimization.num_train_epochs, num_images, run.images_per_step
    )
    start = find_start(run, vae, transformer, train_data, steps)
    statistics = settle_statistics(run, vae, train_data, start)
    monitor = make_monitor(run, training_images, start)
    loop = Loop(
        run,
        transformer,
        steps=steps if monitor is None or not monitor.is_exhausted else start.step,
        step=start.step,
        checkpoint=start.checkpoint,
        description="DiT",
        also=[] if alignment is None else [alignment.projector],
        snapshot=("pipeline", lambda model, folder: pipeline_of(model).save_pretrained(folder)),
        state=statistics | ({} if monitor is None else {"monitor": monitor.state}),
    )
    data = train_data
    if alignment is not None and isinstance(train_data, CachedLatents):
        data = ImagesWithLatents(training_images, train_data)
    for step in loop.over(data):
        for batch in step:
            with accelerator.autocast():
                mean, std = (moment.float() for moment in moments_of(batch, vae, accelerator.device))
            latents = normalize_latents(mean + std * torch.randn_like(mean), vae)
            noise = torch.randn_like(latents)
            sigmas = sample_sigmas(
                len(latents), sampling=flow.timestep_sampling, shift=flow.timestep_shift, device=latents.device
            )
            labels = batch.get("class_labels")
            if labels is not None:  # dropped once a sample, for classifier-free guidance
                dropped = torch.rand(len(labels), device=labels.device) < config.transformer.class_dropout_prob
                labels = torch.where(dropped, len(train_data.id2label), labels)
            velocity = loop.model(
                interpolate(latents, noise, sigmas), 1000 * sigmas, class_labels=labels, return_dict=False
            )[0]
            loss = flow_matching_loss(velocity, latents, noise).mean()
            step.add(loss=loss)
            if alignment is not None:
                grid = tuple(side // transformer.config.patch_size for side in latents.shape[2:])
                term, values = alignment.term(batch["pixel_values"], grid)
                step.add(**values)
                loss = loss + term
            step.backward(loss)
        if step.validates:
            with loop.averaged() as model:
                value = validation_loss(run, model, vae, validation_data)
                draw_samples(run, pipeline_of(model, vae=autoencoder.newest()), loop.step)
            step.write({"validation/loss": value})
        if monitor is not None and monitor.is_due(loop.step, step.is_last):
            with loop.averaged() as model:
                step.write(monitor.measure(pipeline_of(model), loop.step))
            if monitor.is_exhausted:
                loop.stop()

    model = loop.finished_model().eval()
    is_whole = autoencoder.is_finished
    if accelerator.is_main_process and is_whole:
        save_result(run, pipeline_of(model), monitor)
    elif accelerator.is_main_process:
        is_whole = autoencoder.save_waiting(pipeline_of(model))
    run.finish("pipeline" if is_whole else None)


def settle_statistics(run: TrainingRun, vae: AutoencoderKL, data: Dataset, start: Start) -> dict[str, Any]:
    """
    Gives the autoencoder statistics of its latents, unless it has some, and returns the part of a checkpoint's state that keeps
    them: the run goes on with the same, whatever the autoencoder of a finished stage 2 has then.
    """
    kept = start.state.get("latent_statistics")
    if kept is not None:
        vae.register_to_config(**kept)
    elif not has_latent_statistics(vae):
        logger.info("%s has no latent statistics: computing them over the training data", run.config.transformer.vae)
        loader = run.pass_loader(data, num_workers=run.config.data.dataloader_num_workers)
        write_latent_statistics(vae, loader, run.accelerator)
        names = ("latents_mean", "latents_std", "scaling_factor", "shift_factor")
        kept = {name: vae.config[name] for name in names}
    return {} if kept is None else {"latent_statistics": kept}


def architecture_of(config: TrainDiTConfig) -> dict[str, int]:
    """The arguments of the transformer's constructor that define its size."""
    named = DAEDiTTransformer2DModel.size_kwargs(config.transformer.model)
    return {**named, **config.transformer.instead_of_named()}


def make_transformer(config: TrainDiTConfig, vae: AutoencoderKL, data: Dataset) -> DAEDiTTransformer2DModel:
    """A new transformer for the latents of these data."""
    return DAEDiTTransformer2DModel(
        sample_size=config.data.resolution // spatial_factor(vae),
        in_channels=num_latent_channels(vae),
        num_classes=None if data.id2label is None else len(data.id2label),
        **architecture_of(config),
    )


def find_start(
    run: TrainingRun, vae: AutoencoderKL, transformer: DAEDiTTransformer2DModel, data: Dataset, steps: int
) -> Start:
    """Checks that the plan fits the checkpoint, and returns where to begin."""
    num_parameters = sum(parameter.numel() for parameter in transformer.parameters())
    logger.info(
        "%s, %s classes, %.1f M parameters",
        describe_size(data),
        transformer.config.num_classes or "no",
        num_parameters / 1e6,
    )
    sizes = ("patch_size", "num_layers", "num_attention_heads", "attention_head_dim")
    return run.find_start(
        inputs={"the training images": data.fingerprint, "the encoder of `--vae`": autoencoder_fingerprint(vae)},
        plan={name: transformer.config[name] for name in sizes},
        counts={**count_images(data), "parameters": num_parameters},
        steps={"max_train_steps": steps},
    )


def load_data(run: TrainingRun, vae: AutoencoderKL) -> tuple[Dataset, Dataset, ImageDataset | None]:
    """Training and validation data (cached latents or images), and the training images, or None if only their latents are given."""
    config, images = run.config, None
    patch_size, caches = architecture_of(config)["patch_size"], None
    if config.transformer.latent_cache is not None:
        folders = [Path(config.transformer.latent_cache) / split for split in ("train", "validation")]
        caches = tuple(open_latent_cache(folder, run.accelerator) for folder in folders)
        follow_cache(config.data, caches[0])
    settle_images(config, vae, patch_size=patch_size)
    if config.data.has_source:
        with run.accelerator.main_process_first():
            name = config.transformer.vae
            images = load_images(config.data, config.run.seed, value_range=read_value_range(name), model=name)
    if caches is None:
        return (*images, images[0])
    fingerprint = autoencoder_fingerprint(vae)
    for index, cache in enumerate(caches):
        cache.check(autoencoder=fingerprint, images=None if images is None else images[index])
    return (*caches, None if images is None else images[0])


@torch.no_grad()
def validation_loss(run: TrainingRun, model: DAEDiTTransformer2DModel, vae, data: Dataset) -> float:
    """The loss over the validation data, with the same noise and evenly spread noise levels every time."""
    generator = torch.Generator().manual_seed(derived_seed(run.config.run.seed, 3))
    quantiles = (torch.randperm(len(data), generator=generator) + 0.5) / len(data)
    shift = run.config.flow.timestep_shift
    all_sigmas = shift * quantiles / (1 + (shift - 1) * quantiles)
    all_noise = torch.randn(len(data), model.config.in_channels, *[model.config.sample_size] * 2, generator=generator)
    losses, start, step = [], run.accelerator.process_index, run.accelerator.num_processes
    for batch in run.pass_loader(data):
        with run.accelerator.autocast():
            mean, _ = moments_of(batch, vae, run.accelerator.device)
        latents = normalize_latents(mean.float(), vae)
        mine = slice(start, start + len(latents) * step, step)
        start = mine.stop
        noise, sigmas = all_noise[mine].to(latents), all_sigmas[mine].to(latents)
        labels = batch["class_labels"].to(latents.device) if "class_labels" in batch else None
        with run.accelerator.autocast():
            velocity = model(
                interpolate(latents, noise, sigmas), 1000 * sigmas, class_labels=labels, return_dict=False
            )[0]
        losses += flow_matching_loss(velocity, latents, noise).tolist()
    losses = gather_object(losses)
    return math.fsum(losses) / len(losses)


def make_monitor(run: TrainingRun, images: ImageDataset | None, start: Start) -> SampleDistance | None:
    """What measures samples while the transformer trains; None without `metric_features`."""
    config, flow = run.config, run.config.flow
    if config.monitor.metric_features is None:
        return None
    guidance_scale = flow.sample_guidance_scale if config.transformer.class_dropout_prob else 1.0
    settings = SampleSettings(config.monitor.metric_images, guidance_scale, flow.sample_steps, seed=config.run.seed)
    return SampleDistance(run, images, settings, start.state.get("monitor"))


def draw_samples(run: TrainingRun, pipeline: DAEDiTPipeline, step: int) -> None:
    """Draws the grid of samples at a validation."""
    config, flow = run.config, run.config.flow
    run.log.write_samples(
        pipeline,
        step,
        num_classes=pipeline.transformer.config.num_classes,
        num_images=flow.num_sample_images,
        batch_size=config.optimization.train_batch_size,
        seed=config.run.seed,
        guidance_scale=flow.sample_guidance_scale if config.transformer.class_dropout_prob else 1,
        num_inference_steps=flow.sample_steps,
    )


def make_pipeline(model: DAEDiTTransformer2DModel, vae: AutoencoderKL, data: Dataset, shift: float) -> DAEDiTPipeline:
    """Makes the pipeline, which draws samples during training and is saved at the end."""
    return DAEDiTPipeline(
        transformer=model,
        vae=vae,
        scheduler=FlowMatchEulerDiscreteScheduler(shift=shift),
        id2label=data.id2label,
        value_range=data.value_range,
    )


if __name__ == "__main__":
    run_script(main, parse_config(TrainDiTConfig, description=__doc__))
