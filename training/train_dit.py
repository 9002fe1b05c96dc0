"""
Train a Diffusion Transformer in the latent space of an autoencoder, with flow matching.

    accelerate launch training/train_dit.py --dataset_name digits --image_channels 1 --vae runs/digits/vae \
        --output_dir runs/digits
    accelerate launch training/train_dit.py --latent_cache runs/digits/latents --vae runs/digits/vae --model DiT-S/2

The result is `<output_dir>/pipeline`, for `DAEDiTPipeline.from_pretrained`.
"""

import logging
import math
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from accelerate.utils import DistributedType, gather_object
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler
from diffusers.training_utils import EMAModel
from torch.utils.data import Dataset

from dae_diffusers.alignment import RepresentationAlignment, make_projector
from dae_diffusers.autoencoders.loading import (
    check_image_size,
    encode_moments,
    load_autoencoder,
    num_latent_channels,
    spatial_factor,
)
from dae_diffusers.checkpointing import StopSignal
from dae_diffusers.cli import field, parse_config, run_script
from dae_diffusers.data import DataConfig, ImageDataset, count_images, describe_size, load_images
from dae_diffusers.data.arrays import read_value_range
from dae_diffusers.errors import ConfigError
from dae_diffusers.latents.cache import CachedLatents, ImagesWithLatents, autoencoder_fingerprint
from dae_diffusers.latents.statistics import has_latent_statistics, normalize_latents, write_latent_statistics
from dae_diffusers.losses.flow_matching import TimestepSampling, flow_matching_loss, interpolate, sample_sigmas
from dae_diffusers.pipelines.dae_dit import DAEDiTPipeline
from dae_diffusers.randomness import derived_seed, seed_microbatch
from dae_diffusers.run import OptimizationConfig, RunConfig, TrainingRun, ema_weights
from dae_diffusers.transformer_dae_dit import DAEDiTTransformer2DModel
from dae_diffusers.vision import load_backbone

logger = logging.getLogger(__name__)


@dataclass
class DiTConfig:
    """Transformer."""

    vae: str = field("runs/my-model/vae", "folder or Hub id of the autoencoder")
    latent_cache: str | None = field(
        None, "folder made by training/cache_latents.py; then no images are needed, and none of the flags of data"
    )
    model: str = field("DiT-S/2", "size and patch size: DiT-Ti, -XS, -S, -B, -L or -XL, then /1, /2, /4")
    patch_size: int | None = field(None, "instead of the name's")
    num_layers: int | None = field(None, "instead of the name's")
    num_attention_heads: int | None = field(None, "instead of the name's")
    attention_head_dim: int | None = field(None, "instead of the name's")
    class_dropout_prob: float = field(0.1, "share of samples whose label is dropped, for classifier-free guidance")
    learning_rate: float = field(3e-4, "peak learning rate")
    max_train_steps: int = field(10000, "optimiser steps")

    def __post_init__(self):
        if not 0 <= self.class_dropout_prob < 1:
            raise ConfigError(
                f"`--class_dropout_prob` is {self.class_dropout_prob}, but must be at least 0 and below 1; for a model without "
                "classes, `--label_column none`."
            )
        for name in ("max_train_steps", "patch_size", "num_layers", "num_attention_heads", "attention_head_dim"):
            if getattr(self, name) is not None and getattr(self, name) < 1:
                raise ConfigError(f"`--{name}` is {getattr(self, name)}, but must be at least 1.")
        try:
            self.architecture()
        except ValueError as error:
            raise ConfigError(f"`--model`: {error}") from None
        if self.attention_head_dim is not None and self.attention_head_dim % 4:
            raise ConfigError(
                f"`--attention_head_dim` is {self.attention_head_dim}, but must be a multiple of 4 (rotary positions)."
            )

    def architecture(self) -> dict[str, int]:
        """The constructor's arguments that give the transformer its size."""
        fields = ("patch_size", "num_layers", "num_attention_heads", "attention_head_dim")
        given = {name: getattr(self, name) for name in fields if getattr(self, name) is not None}
        return {**DAEDiTTransformer2DModel.size_kwargs(self.model), **given}


@dataclass
class FlowMatchingConfig:
    """Flow matching and samples."""

    timestep_sampling: TimestepSampling = field("logit_normal", "distribution of the noise levels in training")
    timestep_shift: float = field(1.0, "above 1: more noise, in training and in sampling; for large latents")
    num_sample_images: int = field(40, "images of the grid drawn at each validation, from the same noise every time")
    sample_steps: int = field(25, "denoising steps of the grid")
    sample_guidance_scale: float = field(
        2.0, "classifier-free guidance of the grid; 1 is none, as is any with `--class_dropout_prob 0`"
    )

    def __post_init__(self):
        if not self.timestep_shift > 0:
            raise ConfigError(f"`--timestep_shift` is {self.timestep_shift}, but must be above 0.")
        for name in ("num_sample_images", "sample_steps"):
            if getattr(self, name) < 1:
                raise ConfigError(f"`--{name}` is {getattr(self, name)}, but must be at least 1.")


@dataclass
class RepresentationAlignmentConfig:
    """Representation alignment (REPA)."""

    repa_model: str | None = field(
        None, "align hidden states with the features of this vision model (Hub id or folder); needs the images"
    )
    repa_weight: float = field(0.5, "weight of the alignment")
    repa_layer: int | None = field(None, "number of the block whose output is aligned; default: a third of the depth")
    repa_projector_dim: int = field(2048, "width of the projector, which is not exported")

    def __post_init__(self):
        if not self.repa_weight > 0:
            raise ConfigError(
                f"`--repa_weight` is {self.repa_weight}, but must be above 0; leave out `--repa_model` instead."
            )
        if self.repa_projector_dim < 1:
            raise ConfigError(f"`--repa_projector_dim` is {self.repa_projector_dim}, but must be at least 1.")


@dataclass
class TrainDiTConfig(
    RunConfig, RepresentationAlignmentConfig, FlowMatchingConfig, DiTConfig, OptimizationConfig, DataConfig
):
    def __post_init__(self):
        for part in reversed(TrainDiTConfig.__bases__):
            part.__post_init__(self)
        has_images = self.dataset_name is not None or self.train_data_dir is not None
        if self.latent_cache is None:
            self.require_source()
        elif self.streaming:
            raise ConfigError("`--latent_cache` does not go with `--streaming`; leave one of them out.")
        num_layers = self.architecture()["num_layers"]
        if self.repa_layer is not None and not 1 <= self.repa_layer <= num_layers:
            raise ConfigError(f"`--repa_layer` is {self.repa_layer}, but the transformer has blocks 1 to {num_layers}.")
        if self.repa_model is None:
            return
        if not has_images:
            raise ConfigError(
                "`--repa_model` looks at the images, which a latent cache does not hold: give them beside `--latent_cache` "
                "(`--train_data_dir` or `--dataset_name`, with the flags they were cached with)."
            )
        if self.latent_cache is not None and self.crops_at_random:
            raise ConfigError(
                "`--random_crop` and `--random_resized_crop` show other images than those in `--latent_cache`. Leave out one "
                "of them."
            )
        if self.image_channels not in (1, 3):
            raise ConfigError(f"`--repa_model` takes images of 1 or 3 channels, not {self.image_channels}.")


def main(config: TrainDiTConfig) -> None:
    run = TrainingRun("train_dit", config, one_model=True)
    accelerator = run.accelerator
    vae = load_autoencoder(config.vae).to(accelerator.device)
    config.value_range = config.value_range or read_value_range(config.vae) or []
    with accelerator.main_process_first():
        train_data, validation_data, training_images = load_data(config, vae, verify=accelerator.is_local_main_process)
    sample_size = latent_size(config, vae, train_data)
    if not has_latent_statistics(vae):
        logger.info("%s has no latent statistics: computing them over the training data", config.vae)
        loader = run.pass_loader(train_data, num_workers=config.dataloader_num_workers)
        write_latent_statistics(vae, loader, accelerator)

    transformer = DAEDiTTransformer2DModel(
        sample_size=sample_size,
        in_channels=num_latent_channels(vae),
        num_classes=None if train_data.id2label is None else len(train_data.id2label),
        **config.architecture(),
    )
    if config.gradient_checkpointing:
        transformer.enable_gradient_checkpointing()
    patch_size = transformer.config.patch_size
    run.compile_blocks(transformer.transformer_blocks)
    parameters = list(transformer.parameters())
    num_parameters = sum(parameter.numel() for parameter in parameters)
    logger.info(
        "%s, %s classes, %.1f M parameters",
        describe_size(train_data),
        transformer.config.num_classes or "no",
        num_parameters / 1e6,
    )
    alignment = make_alignment(run, transformer)
    projector_parameters = [] if alignment is None else list(alignment.projector.parameters())
    optimizer = run.make_optimizer(parameters + projector_parameters)
    lr_scheduler = run.make_lr_scheduler(optimizer, config.max_train_steps)
    resume_path, step, _ = run.start(
        {"the training images": train_data.fingerprint, "the encoder of `--vae`": autoencoder_fingerprint(vae)},
        **count_images(train_data),
        parameters=num_parameters,
    )
    transformer, optimizer, lr_scheduler = accelerator.prepare(transformer, optimizer, lr_scheduler)
    parameters = list(transformer.parameters())  # FSDP has replaced them
    ema = run.make_ema(parameters)
    if resume_path is not None:
        run.checkpointer.load(resume_path, ema=ema)

    microbatch = run.first_microbatch(step)
    accumulated = [transformer, *([] if alignment is None else [alignment.projector])]
    progress = run.progress(config.max_train_steps, step, "DiT")
    batches = run.training_batches(
        train_data if training_images is None else ImagesWithLatents(training_images, train_data), step
    )
    transformer.train()
    with StopSignal(accelerator) as stop:
        while step < config.max_train_steps:
            batch = next(batches)
            seed_microbatch(config.seed, microbatch)
            with accelerator.accumulate(*accumulated):
                mean, std = encode(batch, vae, accelerator)
                latents = normalize_latents(mean + std * torch.randn_like(mean), vae)
                noise = torch.randn_like(latents)
                sigmas = sample_sigmas(
                    len(latents),
                    sampling=config.timestep_sampling,
                    shift=config.timestep_shift,
                    device=latents.device,
                )
                labels = batch.get("class_labels")
                if labels is not None:  # dropped once a sample, for classifier-free guidance
                    dropped = torch.rand(len(labels), device=labels.device) < config.class_dropout_prob
                    labels = torch.where(dropped, len(train_data.id2label), labels)
                velocity = transformer(
                    interpolate(latents, noise, sigmas), 1000 * sigmas, class_labels=labels, return_dict=False
                )[0]
                loss = flow_matching_loss(velocity, latents, noise).mean()
                run.add(loss=loss)
                if alignment is not None:
                    grid = tuple(side // patch_size for side in latents.shape[2:])
                    term, values = alignment.term(batch["pixel_values"], grid)
                    run.add(**values)
                    loss = loss + term
                run.guard.watch(loss, step + 1, microbatch)
                accelerator.backward(loss)
                if accelerator.sync_gradients:
                    gradient_norm = accelerator.clip_grad_norm_(parameters + projector_parameters, config.max_grad_norm)
                    if run.guard.allows(gradient_norm):
                        optimizer.step()
                optimizer.zero_grad()
            microbatch += accelerator.num_processes
            if not accelerator.sync_gradients:
                continue

            lr_scheduler.step()
            step += 1
            if ema is not None:
                ema.step(parameters)
            progress.update()
            is_last = step == config.max_train_steps
            if step % config.logging_steps == 0 or is_last:
                means = run.log_means(step, learning_rate=lr_scheduler.get_last_lr()[0], gradient_norm=gradient_norm)
                progress.set_postfix(loss=f"{means['train/loss']:.4f}")
            if step % config.validation_steps == 0 or is_last:
                with ema_weights(ema, parameters):
                    model = run.whole_model(transformer).eval()
                    values = {"validation/loss": validation_loss(run, model, vae, validation_data)}
                    run.log_samples(
                        make_pipeline(config, model, vae, train_data),
                        model.config.num_classes,
                        step,
                        guidance_scale=config.sample_guidance_scale if config.class_dropout_prob else 1,
                        num_inference_steps=config.sample_steps,
                    )
                    model.train()
                run.log(values, step)
                run.draw_curves()
                progress.write(f"step {step}: validation/loss {values['validation/loss']:.4f}")
            if step % config.checkpointing_steps == 0 or is_last:
                run.save_checkpoint(step, ema=ema)
                if not is_last:
                    pipeline = make_pipeline(config, accelerator.unwrap_model(transformer), vae, train_data)
                    run.push_snapshot(step, "pipeline", partial(save_pipeline, pipeline, ema, parameters))
            if stop.requested():
                if step % config.checkpointing_steps and not is_last:
                    run.save_checkpoint(step, ema=ema)
                stop.exit()
    progress.close()

    if ema is not None:
        ema.copy_to(parameters)
    model = run.whole_model(transformer).eval()
    if accelerator.is_main_process:
        make_pipeline(config, model, vae, train_data).save_pretrained(run.output_dir / "pipeline")
        logger.info("saved %s", run.output_dir / "pipeline")
    run.finish("pipeline")


def make_alignment(run: TrainingRun, transformer: DAEDiTTransformer2DModel) -> RepresentationAlignment | None:
    """REPA with its projector, or None without `--repa_model`."""
    config, accelerator = run.config, run.accelerator
    if config.repa_model is None:
        return None
    if accelerator.distributed_type in (DistributedType.FSDP, DistributedType.DEEPSPEED):
        raise ConfigError("`--repa_model` trains a second model, which FSDP and DeepSpeed do not take; use DDP.")
    backbone = load_backbone(config.repa_model).to(accelerator.device)
    blocks = transformer.transformer_blocks
    layer = config.repa_layer or max(1, len(blocks) // 3)
    torch.manual_seed(derived_seed(config.seed, 9))
    projector = make_projector(
        transformer.patch_embed.out_features, config.repa_projector_dim, backbone.patch_feature_dim
    )
    return RepresentationAlignment(
        accelerator, backbone, accelerator.prepare(projector), blocks[layer - 1], config.repa_weight
    )


def load_data(
    config: TrainDiTConfig, vae: AutoencoderKL, *, verify: bool
) -> tuple[Dataset, Dataset, ImageDataset | None]:
    """
    Training and validation data: cached latents, verified if asked for, or images that are encoded on the fly. Then the
    training images that REPA wants beside cached latents, or None.
    """
    images = None
    if config.dataset_name is not None or config.train_data_dir is not None:
        images = load_images(config, config.seed)
    if config.latent_cache is None:
        return (*images, None)
    folders = [Path(config.latent_cache) / split for split in ("train", "validation")]
    caches = tuple(CachedLatents(folder, verify=verify) for folder in folders)
    fingerprint = autoencoder_fingerprint(vae)
    for index, cache in enumerate(caches):
        cache.check(autoencoder=fingerprint, images=None if images is None else images[index])
    return (*caches, None if config.repa_model is None else images[0])


def latent_size(config: TrainDiTConfig, vae: AutoencoderKL, data: Dataset) -> int | tuple[int, int]:
    """Side of the latents, once it is clear that they can be cut into patches."""
    images = data.identity if isinstance(data, CachedLatents) else config
    check_image_size(
        vae,
        channels=images.image_channels,
        resolution=images.resolution,
        patch_size=config.architecture()["patch_size"],
    )
    return images.resolution // spatial_factor(vae)


@torch.no_grad()
def encode(batch: dict, vae: AutoencoderKL, accelerator) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean and standard deviation of the posterior, raw, float32: from the cache, or from the encoder."""
    if "latents_mean" in batch:
        return batch["latents_mean"].to(accelerator.device), batch["latents_std"].to(accelerator.device)
    with accelerator.autocast():
        mean, std = encode_moments(vae, batch["pixel_values"].to(accelerator.device))
    return mean.float(), std.float()


@torch.no_grad()
def validation_loss(run: TrainingRun, model: DAEDiTTransformer2DModel, vae, data: Dataset) -> float:
    """The loss over the validation data, with the same noise and evenly spread noise levels every time."""
    generator = torch.Generator().manual_seed(derived_seed(run.config.seed, 3))
    quantiles = (torch.randperm(len(data), generator=generator) + 0.5) / len(data)
    shift = run.config.timestep_shift
    all_sigmas = shift * quantiles / (1 + (shift - 1) * quantiles)
    all_noise = torch.randn(len(data), model.config.in_channels, *[model.config.sample_size] * 2, generator=generator)
    losses, start, step = [], run.accelerator.process_index, run.accelerator.num_processes
    for batch in run.pass_loader(data):
        mean, _ = encode(batch, vae, run.accelerator)
        latents = normalize_latents(mean, vae)
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


def save_pipeline(pipeline: DAEDiTPipeline, ema: EMAModel | None, parameters: list, folder: Path) -> None:
    """What training has come to, with averaged weights."""
    with ema_weights(ema, parameters):
        pipeline.save_pretrained(folder)


def make_pipeline(config: TrainDiTConfig, model: DAEDiTTransformer2DModel, vae, data: Dataset) -> DAEDiTPipeline:
    """What is saved in the end, and what draws the samples on the way."""
    return DAEDiTPipeline(
        transformer=model,
        vae=vae,
        scheduler=FlowMatchEulerDiscreteScheduler(shift=config.timestep_shift),
        id2label=data.id2label,
        value_range=config.value_range or None,
    )


if __name__ == "__main__":
    run_script(main, parse_config(TrainDiTConfig, description=__doc__))
