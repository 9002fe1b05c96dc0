r"""
Train an autoregressive prior over the codes of a vector-quantised autoencoder: VQGAN's second stage.

    accelerate launch training/train_vqgan_prior.py --dataset_name digits --image_channels 1 --vae runs/digits-vq/vae \
        --output_dir runs/digits-vq

The autoencoder comes from `train_dae.py --autoencoder vq`. The images are encoded once, into `<output_dir>/codes`. The result
is `<output_dir>/pipeline`, for `DAEVQGANPipeline.from_pretrained`.
"""

import logging
import math
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import gather_object
from diffusers import VQModel
from torch.nn.functional import cross_entropy
from transformers import LlamaConfig, LlamaForCausalLM

from dae_diffusers.autoencoders.loading import is_vq, settle_images, spatial_factor
from dae_diffusers.cli import parse_config
from dae_diffusers.data import ImageDataset, count_images, describe_size, load_images
from dae_diffusers.engine.loop import Loop
from dae_diffusers.engine.plan import TRAINING_IMAGES
from dae_diffusers.engine.run import Start, TrainingRun
from dae_diffusers.engine.sample_grid import draw_sample_grid
from dae_diffusers.errors import UserError
from dae_diffusers.fitting.side_by_side import GrowingAutoencoder
from dae_diffusers.latents.codes import CodeGrids, cached_codes
from dae_diffusers.metrics.monitor import make_monitor
from dae_diffusers.pipelines.dae_vqgan import DAEVQGANPipeline, code_fingerprint
from dae_diffusers.script import run_script
from dae_diffusers.training.settings import TrainPriorConfig
from dae_diffusers.weights import latents_fingerprint

logger = logging.getLogger(__name__)


def main(config: TrainPriorConfig) -> None:
    run = TrainingRun("train_vqgan_prior", config, one_model=True)
    accelerator = run.accelerator
    autoencoder = load_vq_model(run)
    config.hub.check_snapshots(autoencoder.is_finished)
    config.monitor.check_decoder(autoencoder.is_finished)
    vae = autoencoder.vae
    with accelerator.main_process_first():
        name = config.prior.vae
        images = load_images(config.data, model=name)
    prior = make_prior(config, vae, images[0])
    steps = run.num_steps(config.prior.max_train_steps, images[0])
    start = find_start(run, prior, images[0], steps)
    train_codes, validation_codes = load_codes(run, vae, images)
    loss_inputs = [latents_fingerprint(vae), images[1].fingerprint]
    monitor = make_monitor(run, images[0], vae, start, sampling_options(config), loss_inputs=loss_inputs)
    pipeline_of = partial(
        DAEVQGANPipeline,
        vae=vae,
        id2label=train_codes.id2label,
        value_range=images[0].value_range,
        **{f"default_{name}": value for name, value in sampling_options(config).items()},
    )
    if config.optimization.gradient_checkpointing:
        is_renamed = hasattr(prior, "activation_checkpointing_enable")  # by transformers, between 5.0 and 6.0
        getattr(prior, "activation_checkpointing_enable" if is_renamed else "gradient_checkpointing_enable")()
    run.compile_blocks(prior.model.layers)
    loop = Loop(
        run,
        prior,
        steps=start.step if monitor.is_exhausted else steps,
        step=start.step,
        checkpoint=start.checkpoint,
        description="Prior",
        snapshot=("pipeline", lambda model, folder: pipeline_of(model).save_pretrained(folder)),
        post_hoc=config.post_hoc,
        state={"monitor": monitor.state},
    )
    for step in loop.over(train_codes):
        for batch in step:
            labels = class_tokens(batch, train_codes)
            if train_codes.id2label is not None:  # dropped once a sample, for classifier-free guidance
                dropped = torch.rand(len(labels), device=labels.device) < config.prior.class_dropout_prob
                labels = torch.where(dropped, len(train_codes.id2label), labels)
            loss = code_losses(loop.model, batch["codes"], labels, vae.config.num_vq_embeddings).mean()
            step.add(loss=loss)
            step.backward(loss)
        value = None
        if step.validates:
            with loop.averaged() as model:
                value = validation_loss(run, model, validation_codes)
                run.guard.check_validation(loop.step, loss=value)
                draw_samples(run, pipeline_of(model, vae=autoencoder.newest()), loop.step)
            step.write({"validation/loss": value})
        monitor.follow(loop, step, pipeline_of, value)
    if run.end_dry_run():
        return
    autoencoder.finish(run, pipeline_of(loop.finished_model().eval()), monitor)


def find_start(run: TrainingRun, prior: LlamaForCausalLM, images: ImageDataset, steps: int) -> Start:
    """Checks that the plan fits the checkpoint, and returns where to begin."""
    num_parameters = prior.num_parameters()
    logger.info(
        "%s of %d x %d codes, %s classes, %.1f M parameters",
        describe_size(images),
        *prior.config.grid_size,
        prior.config.num_classes or "no",
        num_parameters / 1e6,
    )
    sizes = ("num_layers", "num_attention_heads", "attention_head_dim")
    return run.find_start(
        inputs={TRAINING_IMAGES: images.fingerprint, "the codes of `--vae`": prior.config.code_fingerprint},
        settings={name: getattr(run.config.prior, name) for name in sizes}
        | {"post_hoc_ema": run.config.post_hoc.post_hoc_ema or None},
        counts={**count_images(images), "parameters": num_parameters},
        steps={"max_train_steps": steps},
        classes=images.id2label,
    )


def load_codes(run: TrainingRun, vae: VQModel, images: tuple[ImageDataset, ImageDataset]) -> list[CodeGrids]:
    """The codes of the training and validation images, read from `code_cache` or encoded into it."""
    folder = Path(run.config.prior.code_cache or run.output_dir / "codes")
    if run.dry_run is not None:
        folder = run.output_dir / "codes"
        images = tuple(each.choose(min(len(each), 2 * run.images_per_step)) for each in images)
    return [
        cached_codes(
            folder / f"{split}.safetensors",
            vae,
            split_images,
            run.accelerator,
            batch_size=run.config.optimization.train_batch_size,
            num_workers=run.config.data.dataloader_num_workers,
        )
        for split, split_images in zip(("train", "validation"), images, strict=True)
    ]


def load_vq_model(run: TrainingRun) -> GrowingAutoencoder:
    """Loads the autoencoder, and checks that it has codes and fits the images."""
    config = run.config
    autoencoder = GrowingAutoencoder(config.prior.vae, run.output_dir, run.accelerator.device)
    vae = autoencoder.vae
    if not is_vq(vae):
        raise UserError(
            f"`vae` {config.prior.vae} is of class {type(vae).__name__}, which has no codes. Train one with "
            "`training/train_dae.py --autoencoder vq`, or use training/train_dit.py."
        )
    settle_images(config, vae)
    return autoencoder


def make_prior(config: TrainPriorConfig, vae: VQModel, images: ImageDataset) -> LlamaForCausalLM:
    """Makes a transformer whose tokens are the codes, then the classes, then "no class"."""
    num_codes = vae.config.num_vq_embeddings
    height, width = (side // spatial_factor(vae) for side in config.data.size)
    num_classes = 0 if images.id2label is None else len(images.id2label)
    hidden_size = config.prior.num_attention_heads * config.prior.attention_head_dim
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=num_codes + num_classes + 1,
            hidden_size=hidden_size,
            intermediate_size=4 * hidden_size * 2 // 3,  # as many weights as two layers of four times the width
            num_hidden_layers=config.prior.num_layers,
            num_attention_heads=config.prior.num_attention_heads,
            num_key_value_heads=config.prior.num_attention_heads,
            max_position_embeddings=height * width,
            attention_dropout=config.prior.attention_dropout,
            bos_token_id=None,
            eos_token_id=None,
            tie_word_embeddings=False,
            # What DAEVQGANPipeline asks for:
            num_codes=num_codes,
            num_classes=num_classes,
            grid_size=[height, width],
            code_fingerprint=code_fingerprint(vae),
        )
    )


def draw_samples(run: TrainingRun, pipeline: DAEVQGANPipeline, step: int) -> None:
    """Draws the grid of samples at a validation."""
    if not run.accelerator.is_main_process:
        return
    config = run.config
    with run.guard.drawing(step):
        grid = draw_sample_grid(
            pipeline,
            num_classes=pipeline.prior.config.num_classes or None,
            num_images=config.samples.num_sample_images,
            batch_size=config.optimization.train_batch_size,
            seed=config.run.seed,
            **sampling_options(config),
        )
    run.log.write_grid("samples", grid, step)


def sampling_options(config: TrainPriorConfig) -> dict[str, Any]:
    """How the pipeline draws while the prior trains; without guidance if no labels are dropped."""
    samples = config.samples
    return {
        "guidance_scale": samples.sample_guidance_scale if config.prior.class_dropout_prob else 1.0,
        "temperature": samples.sample_temperature,
        "top_k": samples.sample_top_k,
        "top_p": samples.sample_top_p,
    }


def class_tokens(batch: dict, codes: CodeGrids) -> torch.Tensor:
    """The label of each grid, `(B,)`; without classes it is 0, which is "no class"."""
    if codes.id2label is None:
        return torch.zeros(len(batch["codes"]), dtype=torch.int64, device=batch["codes"].device)
    return batch["class_labels"]


def code_losses(prior: torch.nn.Module, codes: torch.Tensor, labels: torch.Tensor, num_codes: int) -> torch.Tensor:
    """Cross-entropy in nats of each code, given the label and the codes before it; `(B, h, w)` to `(B, h * w)`."""
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
