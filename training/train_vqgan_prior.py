"""
Train an autoregressive prior over the codes of a vector-quantised autoencoder: VQGAN's second stage.

    accelerate launch training/train_vqgan_prior.py --dataset_name digits --image_channels 1 --vae runs/digits-vq/vae \
        --output_dir runs/digits-vq

The autoencoder is one of `train_dae.py --autoencoder vq`. The images are encoded once, into `<output_dir>/codes`. The result
is `<output_dir>/pipeline`, for `DAEVQGANPipeline.from_pretrained`.
"""

import logging
import math
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from accelerate.utils import gather_object
from diffusers import VQModel
from diffusers.training_utils import EMAModel
from torch.nn.functional import cross_entropy
from transformers import LlamaConfig, LlamaForCausalLM

from dae_diffusers.autoencoders.loading import check_image_size, is_vq, load_autoencoder, spatial_factor
from dae_diffusers.checkpointing import StopSignal
from dae_diffusers.cli import field, parse_config, run_script
from dae_diffusers.data import DataConfig, ImageDataset, count_images, describe_size, load_images
from dae_diffusers.data.arrays import read_value_range
from dae_diffusers.errors import ConfigError, UserError
from dae_diffusers.latents.codes import CodeGrids, cached_codes
from dae_diffusers.pipelines.dae_vqgan import DAEVQGANPipeline, code_fingerprint
from dae_diffusers.randomness import seed_microbatch
from dae_diffusers.run import OptimizationConfig, RunConfig, TrainingRun, ema_weights

logger = logging.getLogger(__name__)


@dataclass
class PriorConfig:
    """Prior."""

    vae: str = field("runs/my-model/vae", "folder or Hub id of an autoencoder with a codebook")
    code_cache: str | None = field(None, "folder for the codes of the images; default: `<output_dir>/codes`")
    num_layers: int = field(8, "transformer blocks")
    num_attention_heads: int = field(4, "heads of each")
    attention_head_dim: int = field(64, "width of a head; times the heads, the width of the model")
    attention_dropout: float = field(0.0, "dropout of the attention weights")
    class_dropout_prob: float = field(0.1, "share of samples whose label is dropped, for classifier-free guidance")
    learning_rate: float = field(1e-3, "peak learning rate")
    adam_weight_decay: float = field(0.05, "AdamW's weight decay")
    max_train_steps: int = field(10000, "optimiser steps")

    def __post_init__(self):
        for name in ("max_train_steps", "num_layers", "num_attention_heads"):
            if getattr(self, name) < 1:
                raise ConfigError(f"`--{name}` is {getattr(self, name)}, but must be at least 1.")
        if self.attention_head_dim < 2 or self.attention_head_dim % 2:
            raise ConfigError(
                f"`--attention_head_dim` is {self.attention_head_dim}, but must be even (rotary positions)."
            )
        if not 0 <= self.attention_dropout < 1:
            raise ConfigError(f"`--attention_dropout` is {self.attention_dropout}, but must be at least 0 and below 1.")
        if not 0 <= self.class_dropout_prob < 1:
            raise ConfigError(
                f"`--class_dropout_prob` is {self.class_dropout_prob}, but must be at least 0 and below 1; for a model without "
                "classes, `--label_column none`."
            )


@dataclass
class SamplesConfig:
    """Samples."""

    num_sample_images: int = field(40, "images of the grid drawn at each validation, by the same draws every time")
    sample_guidance_scale: float = field(
        2.0, "classifier-free guidance of the grid; 1 is none, as is any with `--class_dropout_prob 0`"
    )
    sample_temperature: float = field(1.0, "temperature of the grid")
    sample_top_k: int | None = field(None, "draw the grid from the this many likeliest codes only")
    sample_top_p: float | None = field(None, "draw the grid from the fewest likeliest codes with this share")

    def __post_init__(self):
        for name in ("num_sample_images", "sample_top_k"):
            if getattr(self, name) is not None and getattr(self, name) < 1:
                raise ConfigError(f"`--{name}` is {getattr(self, name)}, but must be at least 1.")
        if not self.sample_temperature > 0:
            raise ConfigError(f"`--sample_temperature` is {self.sample_temperature}, but must be above 0.")
        if self.sample_top_p is not None and not 0 < self.sample_top_p <= 1:
            raise ConfigError(f"`--sample_top_p` is {self.sample_top_p}, but must be above 0 and at most 1.")


@dataclass
class TrainPriorConfig(RunConfig, SamplesConfig, PriorConfig, OptimizationConfig, DataConfig):
    def __post_init__(self):
        for part in reversed(TrainPriorConfig.__bases__):
            part.__post_init__(self)
        self.require_source()
        if self.crops_at_random:
            raise ConfigError(
                "`--random_crop` and `--random_resized_crop` do not go with images that are encoded once: each epoch would see "
                "the same crops."
            )
        if self.streaming:
            raise ConfigError("`--streaming` does not go with train_vqgan_prior.py, which encodes every image once.")


def main(config: TrainPriorConfig) -> None:
    run = TrainingRun("train_vqgan_prior", config, one_model=True)
    accelerator = run.accelerator
    vae = load_vq_model(config).to(accelerator.device)
    config.value_range = config.value_range or read_value_range(config.vae) or []
    with accelerator.main_process_first():
        images = load_images(config, config.seed)
    prior = make_prior(config, vae, images[0])
    num_parameters = sum(parameter.numel() for parameter in prior.parameters())
    resume_path, step, _ = run.start(
        {"the training images": images[0].fingerprint, "the codes of `--vae`": prior.config.code_fingerprint},
        **count_images(images[0]),
        parameters=num_parameters,
    )
    folder = Path(config.code_cache or run.output_dir / "codes")
    train_codes, validation_codes = (
        cached_codes(
            folder / f"{split}.safetensors",
            vae,
            split_images,
            accelerator,
            batch_size=config.train_batch_size,
            num_workers=config.dataloader_num_workers,
        )
        for split, split_images in zip(("train", "validation"), images, strict=True)
    )
    if config.gradient_checkpointing:
        # transformers renames it between 5.0 and 6.0.
        getattr(prior, "activation_checkpointing_enable", prior.gradient_checkpointing_enable)()
    run.compile_blocks(prior.model.layers)
    parameters = list(prior.parameters())
    logger.info(
        "%s of %d x %d codes, %s classes, %.1f M parameters",
        describe_size(images[0]),
        *train_codes.grid_size,
        prior.config.num_classes or "no",
        num_parameters / 1e6,
    )
    optimizer = run.make_optimizer(parameters)
    lr_scheduler = run.make_lr_scheduler(optimizer, config.max_train_steps)
    prior, optimizer, lr_scheduler = accelerator.prepare(prior, optimizer, lr_scheduler)
    parameters = list(prior.parameters())  # FSDP has replaced them
    ema = run.make_ema(parameters)
    if resume_path is not None:
        run.checkpointer.load(resume_path, ema=ema)

    microbatch = run.first_microbatch(step)
    progress = run.progress(config.max_train_steps, step, "Prior")
    batches = run.training_batches(train_codes, step)
    prior.train()
    with StopSignal(accelerator) as stop:
        while step < config.max_train_steps:
            batch = next(batches)
            seed_microbatch(config.seed, microbatch)
            with accelerator.accumulate(prior):
                labels = class_tokens(batch, train_codes)
                if train_codes.id2label is not None:  # dropped once a sample, for classifier-free guidance
                    dropped = torch.rand(len(labels), device=labels.device) < config.class_dropout_prob
                    labels = torch.where(dropped, len(train_codes.id2label), labels)
                loss = code_losses(prior, batch["codes"], labels, vae.config.num_vq_embeddings).mean()
                run.add(loss=loss)
                run.guard.watch(loss, step + 1, microbatch)
                accelerator.backward(loss)
                if accelerator.sync_gradients:
                    gradient_norm = accelerator.clip_grad_norm_(parameters, config.max_grad_norm)
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
                    model = run.whole_model(prior).eval()
                    values = {"validation/loss": validation_loss(run, model, validation_codes)}
                    run.log_samples(
                        make_pipeline(config, model, vae, train_codes),
                        model.config.num_classes or None,
                        step,
                        guidance_scale=config.sample_guidance_scale if config.class_dropout_prob else 1,
                        temperature=config.sample_temperature,
                        top_k=config.sample_top_k,
                        top_p=config.sample_top_p,
                    )
                    model.train()
                run.log(values, step)
                run.draw_curves()
                progress.write(f"step {step}: validation/loss {values['validation/loss']:.4f}")
            if step % config.checkpointing_steps == 0 or is_last:
                run.save_checkpoint(step, ema=ema)
                if not is_last:
                    parts = (config, accelerator.unwrap_model(prior), vae, train_codes)
                    run.push_snapshot(step, "pipeline", partial(save_pipeline, parts, ema, parameters))
            if stop.requested():
                if step % config.checkpointing_steps and not is_last:
                    run.save_checkpoint(step, ema=ema)
                stop.exit()
    progress.close()

    if ema is not None:
        ema.copy_to(parameters)
    model = accelerator.unwrap_model(run.whole_model(prior), keep_fp32_wrapper=False).eval()
    if accelerator.is_main_process:
        make_pipeline(config, model, vae, train_codes).save_pretrained(run.output_dir / "pipeline")
        logger.info("saved %s", run.output_dir / "pipeline")
    run.finish("pipeline")


def load_vq_model(config: TrainPriorConfig) -> VQModel:
    """The autoencoder, once it is clear that it has codes and takes such images."""
    vae = load_autoencoder(config.vae)
    if not is_vq(vae):
        raise UserError(
            f"`--vae` {config.vae} is of class {type(vae).__name__}, which has no codes. Train one with "
            "`training/train_dae.py --autoencoder vq`, or use training/train_dit.py."
        )
    check_image_size(vae, channels=config.image_channels, resolution=config.resolution)
    return vae


def make_prior(config: TrainPriorConfig, vae: VQModel, images: ImageDataset) -> LlamaForCausalLM:
    """A new transformer whose tokens are the codes, then the classes, then no class."""
    num_codes, side = vae.config.num_vq_embeddings, config.resolution // spatial_factor(vae)
    num_classes = 0 if images.id2label is None else len(images.id2label)
    hidden_size = config.num_attention_heads * config.attention_head_dim
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=num_codes + num_classes + 1,
            hidden_size=hidden_size,
            intermediate_size=4 * hidden_size * 2 // 3,  # as many weights as two layers of four times the width
            num_hidden_layers=config.num_layers,
            num_attention_heads=config.num_attention_heads,
            num_key_value_heads=config.num_attention_heads,
            max_position_embeddings=side * side,
            attention_dropout=config.attention_dropout,
            bos_token_id=None,
            eos_token_id=None,
            tie_word_embeddings=False,
            # What DAEVQGANPipeline asks for:
            num_codes=num_codes,
            num_classes=num_classes,
            grid_size=[side, side],
            code_fingerprint=code_fingerprint(vae),
        )
    )


def save_pipeline(parts: tuple, ema: EMAModel | None, parameters: list, folder: Path) -> None:
    """What training has come to, with averaged weights; `parts` are those of [`make_pipeline`]."""
    with ema_weights(ema, parameters):
        make_pipeline(*parts).save_pretrained(folder)


def make_pipeline(
    config: TrainPriorConfig, model: LlamaForCausalLM, vae: VQModel, codes: CodeGrids
) -> DAEVQGANPipeline:
    """What is saved in the end, and what draws the samples on the way."""
    return DAEVQGANPipeline(model, vae, codes.id2label, config.value_range or None)


def class_tokens(batch: dict, codes: CodeGrids) -> torch.Tensor:
    """The label of each grid, `(B,)`; without classes 0, which is "no class"."""
    if codes.id2label is None:
        return torch.zeros(len(batch["codes"]), dtype=torch.int64, device=batch["codes"].device)
    return batch["class_labels"]


def code_losses(prior: torch.nn.Module, codes: torch.Tensor, labels: torch.Tensor, num_codes: int) -> torch.Tensor:
    """Cross-entropy in nats of each code given those before it and the label, `(B, h, w)` to `(B, h * w)`."""
    codes = codes.flatten(1)
    inputs = torch.cat((num_codes + labels[:, None], codes[:, :-1]), dim=1)
    logits = prior(input_ids=inputs, use_cache=False).logits[..., :num_codes].float()
    return cross_entropy(logits.transpose(1, 2), codes, reduction="none")


@torch.no_grad()
def validation_loss(run: TrainingRun, model: LlamaForCausalLM, codes: CodeGrids) -> float:
    """Nats per code over the validation images, with their labels."""
    accelerator, losses = run.accelerator, []
    for batch in run.pass_loader(codes):
        batch = {name: value.to(accelerator.device) for name, value in batch.items()}
        with accelerator.autocast():
            each = code_losses(model, batch["codes"], class_tokens(batch, codes), model.config.num_codes)
        losses += each.mean(dim=1).tolist()
    losses = gather_object(losses)
    return math.fsum(losses) / len(losses)


if __name__ == "__main__":
    run_script(main, parse_config(TrainPriorConfig, description=__doc__))
