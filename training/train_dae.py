"""
Train a decoupled autoencoder in two stages: the encoder against a weak auxiliary decoder, then, with the encoder
frozen, the real decoder.

    accelerate launch training/train_dae.py --dataset_name digits --image_channels 1 --output_dir runs/digits
    accelerate launch training/train_dae.py --train_data_dir my_images --resolution 64 --mixed_precision bf16
    accelerate launch training/train_dae.py --config training/configs/cifar10_dae.yaml --output_dir runs/cifar10

The result is `<output_dir>/vae`, a plain diffusers `AutoencoderKL` whose config holds the latents' statistics.
"""

import logging
import math
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal

import torch
from accelerate.utils import gather_object
from diffusers.optimization import get_scheduler
from diffusers.training_utils import EMAModel
from torch.utils.data import DataLoader

from dae_diffusers.autoencoders.autoencoder_kl import DAEAutoencoderKL
from dae_diffusers.autoencoders.weak_decoders import AuxiliaryDecoderType, check_auxiliary_decoder
from dae_diffusers.checkpointing import StopSignal
from dae_diffusers.cli import ConfigError, UserError, field, parse_config, run_script
from dae_diffusers.data import DataConfig, ImageDataset, load_images, make_pass_loader, make_training_loader
from dae_diffusers.latents.statistics import compute_latent_statistics
from dae_diffusers.losses.autoencoder import kl_loss, reconstruction_loss
from dae_diffusers.metrics.image_quality import peak_signal_to_noise_ratio
from dae_diffusers.plots import image_grid
from dae_diffusers.randomness import seed_microbatch
from dae_diffusers.run import OptimizationConfig, RunConfig, TrainingRun, ema_weights, raise_if_not_finite

logger = logging.getLogger(__name__)


@dataclass
class AutoencoderConfig:
    """Autoencoder."""

    block_out_channels: list[int] = field(
        [32, 64, 64], "channels at each resolution; each entry after the first halves"
    )
    layers_per_block: int = field(1, "residual blocks at each resolution of the encoder; the decoder has one more")
    latent_channels: int = field(4, "channels of the latents")
    norm_num_groups: int = field(8, "groups of the group normalisation")
    mid_block_add_attention: bool = field(False, "attention at the lowest resolution")

    def __post_init__(self):
        for name in ("layers_per_block", "latent_channels", "norm_num_groups"):
            if getattr(self, name) < 1:
                raise ConfigError(f"`--{name}` is {getattr(self, name)}, but must be at least 1.")
        bad = [width for width in self.block_out_channels if width < 1 or width % self.norm_num_groups]
        if bad:
            raise ConfigError(
                f"`--block_out_channels` {self.block_out_channels} must all be multiples of `--norm_num_groups` "
                f"{self.norm_num_groups}; {bad} are not."
            )


@dataclass
class StageConfig:
    """Stages and losses."""

    stage: Literal["all", "1", "2"] = field("all", "both stages, only the first, or only the second")
    pretrained_model_name_or_path: str | None = field(
        None, "for `--stage 2`: the output folder of a stage 1, or its `stage1` folder"
    )
    auxiliary_decoder: AuxiliaryDecoderType = field(
        "dropout",
        "what makes the decoder of stage 1 weak; `same`: nothing (the control); `none`: joint training in one stage of "
        "`stage1_steps + stage2_steps` steps (the baseline)",
    )
    auxiliary_dropout: float = field(0.1, "channel dropout rate of `dropout`")
    auxiliary_channel_multiplier: float = field(0.25, "relative width of `narrow`")
    auxiliary_layers_per_block: int = field(0, "residual blocks per resolution of `shallow`, less one")
    stage1_steps: int = field(2000, "optimiser steps of stage 1")
    stage2_steps: int = field(4000, "optimiser steps of stage 2; each costs about half of one of stage 1")
    warm_start_decoder: bool = field(
        False, "start stage 2 from the auxiliary decoder's weights (`same` and `dropout`) instead of afresh"
    )
    l1_weight: float = field(1.0, "weight of the mean absolute error")
    mse_weight: float = field(1.0, "weight of the mean squared error")
    kl_weight: float = field(1e-4, "weight of the KL divergence per latent element (stage 1)")

    def __post_init__(self):
        try:
            check_auxiliary_decoder(
                self.auxiliary_decoder,
                self.auxiliary_dropout,
                self.auxiliary_channel_multiplier,
                self.auxiliary_layers_per_block,
            )
        except ValueError as error:
            raise ConfigError(str(error)) from None
        for name in ("stage1_steps", "stage2_steps"):
            if getattr(self, name) < 1:
                raise ConfigError(f"`--{name}` is {getattr(self, name)}, but must be at least 1.")
        for name in ("l1_weight", "mse_weight", "kl_weight"):
            if getattr(self, name) < 0:
                raise ConfigError(f"`--{name}` is {getattr(self, name)}, but must be 0 or more.")
        if self.l1_weight == self.mse_weight == 0:
            raise ConfigError("`--l1_weight` and `--mse_weight` are both 0: nothing would be reconstructed.")
        if self.stage != "all" and self.auxiliary_decoder == "none":
            raise ConfigError("`--auxiliary_decoder none` has only one stage: use `--stage all`.")
        if self.warm_start_decoder and self.auxiliary_decoder not in ("same", "dropout"):
            raise ConfigError(
                "`--warm_start_decoder` needs an auxiliary decoder of the real one's shape: `--auxiliary_decoder` same or "
                f"dropout, not {self.auxiliary_decoder}."
            )
        if (self.stage == "2") != (self.pretrained_model_name_or_path is not None):
            raise ConfigError(
                "`--stage 2` and `--pretrained_model_name_or_path <output_dir of stage 1>` go together: the second "
                "stage needs the first one's encoder."
            )


@dataclass
class TrainDAEConfig(RunConfig, OptimizationConfig, StageConfig, AutoencoderConfig, DataConfig):
    def __post_init__(self):
        for part in (DataConfig, AutoencoderConfig, StageConfig, OptimizationConfig, RunConfig):
            part.__post_init__(self)
        self.require_source()
        factor = 2 ** (len(self.block_out_channels) - 1)
        if self.resolution % factor:
            raise ConfigError(
                f"`--resolution` {self.resolution} is not divisible by {factor}, the factor of an autoencoder with "
                f"{len(self.block_out_channels)} resolutions. The nearest valid ones are "
                f"{max(1, self.resolution // factor) * factor} and {(self.resolution // factor + 1) * factor}."
            )

    def stage_steps(self) -> dict[int, int]:
        """Optimiser steps of each stage that this run has."""
        if self.auxiliary_decoder == "none":
            return {1: self.stage1_steps + self.stage2_steps}
        both = {1: self.stage1_steps, 2: self.stage2_steps}
        return both if self.stage == "all" else {int(self.stage): both[int(self.stage)]}


def main(config: TrainDAEConfig) -> None:
    run = TrainingRun("train_dae", config)
    with run.accelerator.main_process_first():
        train_images, validation_images = load_images(config, config.seed)
    logger.info("%d training images, %d validation images", len(train_images), len(validation_images))

    model = load_model(config)
    resume_path, start_step, state = run.start(
        training_images=len(train_images),
        held_out_images=len(validation_images),
        parameters=sum(parameter.numel() for parameter in model.parameters()),
    )
    first_step = 0
    for stage, num_steps in config.stage_steps().items():
        if stage >= state.get("stage", 0):
            if stage == 2 and config.warm_start_decoder:
                model.start_decoder_from_auxiliary()
            model.set_stage(stage)
            model = train_stage(
                run, model, train_images, validation_images, first_step, max(start_step, first_step), resume_path
            )
            resume_path = None  # a later stage begins afresh
            if stage == 1 and model.is_decoupled and run.accelerator.is_main_process:
                model.save_pretrained(run.output_dir / "stage1")
        first_step += num_steps
        run.mark(f"end of stage {stage}", first_step)

    if config.stage != "1":
        loader = make_pass_loader(
            train_images,
            batch_size=config.train_batch_size,
            process_index=run.accelerator.process_index,
            num_processes=run.accelerator.num_processes,
            num_workers=config.dataloader_num_workers,
        )
        vae = model.to_diffusers().to(run.accelerator.device)
        statistics = compute_latent_statistics(
            vae, loader, device=run.accelerator.device, disable_progress=not run.accelerator.is_local_main_process
        )
        try:
            statistics.write_to_config(vae)
        except ValueError as error:
            raise UserError(str(error)) from None
        if run.accelerator.is_main_process:
            vae.save_pretrained(run.output_dir / "vae")
            logger.info("saved %s", run.output_dir / "vae")
    run.finish("stage1" if config.stage == "1" else "vae")


def load_model(config: TrainDAEConfig) -> DAEAutoencoderKL:
    """A new model, or, for stage 2 alone, the one that a stage 1 has left."""
    if config.stage != "2":
        levels = len(config.block_out_channels)
        return DAEAutoencoderKL(
            in_channels=config.image_channels,
            out_channels=config.image_channels,
            down_block_types=("DownEncoderBlock2D",) * levels,
            up_block_types=("UpDecoderBlock2D",) * levels,
            block_out_channels=tuple(config.block_out_channels),
            layers_per_block=config.layers_per_block,
            latent_channels=config.latent_channels,
            norm_num_groups=config.norm_num_groups,
            mid_block_add_attention=config.mid_block_add_attention,
            sample_size=config.resolution,
            auxiliary_decoder_type=config.auxiliary_decoder,
            auxiliary_dropout=config.auxiliary_dropout,
            auxiliary_channel_multiplier=config.auxiliary_channel_multiplier,
            auxiliary_layers_per_block=config.auxiliary_layers_per_block,
        )
    path = config.pretrained_model_name_or_path
    for subfolder in ("stage1", None):
        try:
            model = DAEAutoencoderKL.from_pretrained(path, subfolder=subfolder)
            break
        except OSError as error:
            reason = " ".join(str(error).split())[:300]
    else:
        raise UserError(f"`--pretrained_model_name_or_path` {path} holds no stage-1 autoencoder: {reason}")
    if model.config.in_channels != config.image_channels:
        raise UserError(
            f"the stage-1 autoencoder in {path} takes {model.config.in_channels} image channels, but "
            f"`--image_channels` is {config.image_channels}."
        )
    return model


def train_stage(
    run: TrainingRun,
    model: DAEAutoencoderKL,
    train_images: ImageDataset,
    validation_images: ImageDataset,
    first_step: int,
    start_step: int,
    resume_path: Path | None,
) -> DAEAutoencoderKL:
    """Trains the stage that `model` is set to, from `start_step` to its end, and returns it with averaged weights."""
    config, accelerator, stage = run.config, run.accelerator, model.stage
    last_step = first_step + config.stage_steps()[stage]
    if config.gradient_checkpointing:
        model.enable_gradient_checkpointing()
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(
        parameters,
        lr=config.learning_rate,
        betas=(config.adam_beta1, config.adam_beta2),
        weight_decay=config.adam_weight_decay,
    )
    lr_scheduler = get_scheduler(
        config.lr_scheduler,
        optimizer,
        num_warmup_steps=min(config.lr_warmup_steps, last_step - first_step),
        num_training_steps=last_step - first_step,
    )
    first_microbatch = start_step * config.gradient_accumulation_steps * accelerator.num_processes
    loader = make_training_loader(
        train_images,
        batch_size=config.train_batch_size,
        seed=config.seed,
        start=first_microbatch,
        num_workers=config.dataloader_num_workers,
        pin_memory=accelerator.device.type == "cuda",
    )
    model, optimizer, lr_scheduler, loader = accelerator.prepare(model, optimizer, lr_scheduler, loader)
    ema = EMAModel(parameters, decay=config.ema_decay, foreach=True) if config.use_ema else None
    if resume_path is not None:
        run.checkpointer.load(resume_path, ema=ema)

    step, microbatch = start_step, first_microbatch + accelerator.process_index
    progress = run.progress(last_step - first_step, start_step - first_step, f"Stage {stage}")
    batches = iter(loader)
    model.train()
    with StopSignal(accelerator) as stop:
        while step < last_step:
            batch = next(batches)
            seed_microbatch(config.seed, microbatch)
            microbatch += accelerator.num_processes
            with accelerator.accumulate(model):
                pixel_values = batch["pixel_values"]
                reconstruction, posterior = model(pixel_values, sample_posterior=True, return_dict=False)
                loss = reconstruction_loss(
                    reconstruction, pixel_values, l1_weight=config.l1_weight, mse_weight=config.mse_weight
                )
                kl = kl_loss(posterior)
                run.add(reconstruction_loss=loss, kl_loss=kl)
                if stage == 1:
                    loss = loss + config.kl_weight * kl
                raise_if_not_finite(loss, "loss", step + 1, run.folder)
                accelerator.backward(loss)
                if accelerator.sync_gradients:
                    gradient_norm = accelerator.clip_grad_norm_(parameters, config.max_grad_norm)
                    if (
                        accelerator.mixed_precision != "fp16"
                    ):  # fp16's loss scaling meets infinite gradients and skips them
                        raise_if_not_finite(gradient_norm, "gradient norm", step + 1, run.folder)
                optimizer.step()
                optimizer.zero_grad()
            if not accelerator.sync_gradients:
                continue

            lr_scheduler.step()
            step += 1
            if ema is not None:
                ema.step(parameters)
            progress.update()
            if step % config.logging_steps == 0 or step == last_step:
                means = run.log_means(step, learning_rate=lr_scheduler.get_last_lr()[0], gradient_norm=gradient_norm)
                progress.set_postfix(loss=f"{means['train/reconstruction_loss']:.4f}")
            if step % config.validation_steps == 0 or step == last_step:
                with ema_weights(ema, parameters):
                    values = validate(run, accelerator.unwrap_model(model), validation_images, step)
                run.log(values, step)
                run.draw_curves()
                progress.write(f"step {step}: " + ", ".join(f"{name} {value:.4g}" for name, value in values.items()))
            if step % config.checkpointing_steps == 0 or step == last_step:
                run.save_checkpoint(step, ema=ema, stage=stage)
                if step != last_step and (stage == 2 or config.auxiliary_decoder == "none"):
                    run.push_snapshot(step, "vae", partial(save_vae, accelerator.unwrap_model(model), ema, parameters))
            if stop.requested():
                if step % config.checkpointing_steps and step != last_step:
                    run.save_checkpoint(step, ema=ema, stage=stage)
                stop.exit()
    progress.close()
    if ema is not None:
        ema.copy_to(parameters)
    model = accelerator.unwrap_model(model, keep_fp32_wrapper=False)
    accelerator.free_memory()
    return model


def save_vae(model: DAEAutoencoderKL, ema: EMAModel | None, parameters: list, folder: Path) -> None:
    """What training has come to, with averaged weights; the latents' statistics come at the end."""
    with ema_weights(ema, parameters):
        model.to_diffusers().save_pretrained(folder)


@torch.no_grad()
def validate(run: TrainingRun, model: DAEAutoencoderKL, images: ImageDataset, step: int) -> dict[str, float]:
    """PSNR and mean absolute error over the validation images, and a grid of originals above reconstructions."""
    accelerator, was_training = run.accelerator, model.training
    model.eval()
    loader: DataLoader = make_pass_loader(
        images,
        batch_size=run.config.train_batch_size,
        process_index=accelerator.process_index,
        num_processes=accelerator.num_processes,
    )
    psnr, l1, pairs = [], [], []
    for batch in loader:
        pixel_values = batch["pixel_values"].to(accelerator.device)
        with accelerator.autocast():
            reconstruction = model(pixel_values, return_dict=False)[0].float()
        psnr += peak_signal_to_noise_ratio(reconstruction, pixel_values).tolist()
        l1 += (reconstruction - pixel_values).abs().mean(dim=(1, 2, 3)).tolist()
        if not pairs:
            pairs = [pixel_values[:10], reconstruction[:10]]
    model.train(was_training)
    if accelerator.is_main_process:  # another process may have no image at all
        run.log_grid(f"reconstruction-stage{model.stage}", image_grid(torch.cat(pairs), columns=len(pairs[0])), step)
    psnr, l1 = gather_object(psnr), gather_object(l1)
    return {"validation/psnr": math.fsum(psnr) / len(psnr), "validation/l1": math.fsum(l1) / len(l1)}


if __name__ == "__main__":
    run_script(main, parse_config(TrainDAEConfig, description=__doc__))
