"""
Train a decoupled autoencoder in two stages: the encoder against a weak auxiliary decoder, then, with the encoder
frozen, the real decoder.

    accelerate launch training/train_dae.py --dataset_name digits --image_channels 1 --output_dir runs/digits
    accelerate launch training/train_dae.py --train_data_dir my_images --resolution 64 --mixed_precision bf16
    accelerate launch training/train_dae.py --config training/configs/cifar10_dae.yaml --output_dir runs/cifar10

The result is `<output_dir>/vae`, a plain diffusers `AutoencoderKL` (or `VQModel`, with `--autoencoder vq`) whose config
holds the latents' statistics.
"""

import logging
import math
import shutil
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from accelerate.utils import gather_object
from diffusers import AutoencoderKL, VQModel
from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution
from diffusers.training_utils import EMAModel

from dae_diffusers.alignment import LatentAlignment
from dae_diffusers.autoencoders.adversary import AdversarialTraining
from dae_diffusers.autoencoders.autoencoder_kl import DAEAutoencoderKL
from dae_diffusers.autoencoders.configuration import (
    AutoencoderConfig,
    CodebookConfig,
    LossConfig,
    RegularizationConfig,
    StageConfig,
)
from dae_diffusers.autoencoders.discriminators import BackboneDiscriminator, PatchDiscriminator
from dae_diffusers.autoencoders.loading import (
    check_image_size,
    is_vq,
    load_autoencoder,
    num_latent_channels,
    spatial_factor,
)
from dae_diffusers.autoencoders.perceptual import load_perceptual_loss
from dae_diffusers.autoencoders.quantizers import CodebookQuantizer, Quantization
from dae_diffusers.autoencoders.vq_model import DAEVQModel
from dae_diffusers.autoencoders.weak_decoders import check_shallow
from dae_diffusers.checkpointing import StopSignal
from dae_diffusers.cli import parse_config, run_script
from dae_diffusers.data import (
    DataConfig,
    ImageDataset,
    StreamedImages,
    count_images,
    describe_size,
    load_images,
)
from dae_diffusers.data.arrays import read_value_range, save_value_range
from dae_diffusers.errors import ConfigError, UserError
from dae_diffusers.latents.cache import (
    CachedLatents,
    ImagesWithLatents,
    autoencoder_fingerprint,
    write_latent_cache,
)
from dae_diffusers.latents.codes import codebook_metrics, count_codes
from dae_diffusers.latents.diagnostics import LatentDiagnostics
from dae_diffusers.latents.statistics import write_latent_statistics
from dae_diffusers.losses.autoencoder import kl_loss, reconstruction_loss
from dae_diffusers.losses.codebook import codebook_entropy_loss, codebook_loss, commitment_loss
from dae_diffusers.losses.regularizers import perturb
from dae_diffusers.metrics.image_quality import peak_signal_to_noise_ratio
from dae_diffusers.plots import image_grid
from dae_diffusers.randomness import derived_seed, seed_microbatch
from dae_diffusers.run import OptimizationConfig, RunConfig, TrainingRun, ema_weights
from dae_diffusers.vision import load_backbone

logger = logging.getLogger(__name__)


@dataclass
class TrainDAEConfig(
    RunConfig,
    OptimizationConfig,
    RegularizationConfig,
    LossConfig,
    StageConfig,
    CodebookConfig,
    AutoencoderConfig,
    DataConfig,
):
    def __post_init__(self):
        for part in reversed(TrainDAEConfig.__bases__):
            part.__post_init__(self)
        self.require_source()
        factor = 2 ** (len(self.block_out_channels) - 1)
        is_new = self.pretrained_vae is None and self.pretrained_model_name_or_path is None
        if is_new and self.resolution % factor:
            raise ConfigError(
                f"`--resolution` {self.resolution} is not divisible by {factor}, the factor of an autoencoder with "
                f"{len(self.block_out_channels)} resolutions. The nearest valid ones are "
                f"{max(1, self.resolution // factor) * factor} and {(self.resolution // factor + 1) * factor}."
            )
        if is_new and self.auxiliary_decoder == "shallow":
            try:
                check_shallow(self.auxiliary_layers_per_block, self.layers_per_block)
            except ValueError as error:
                raise ConfigError(str(error)) from None
        rgb_only = ("perceptual_model", "discriminator_model", "vf_model")
        if self.image_channels not in (1, 3) and any(getattr(self, name) is not None for name in rgb_only):
            raise ConfigError(
                f"`--{'`, `--'.join(rgb_only)}` take images of 1 or 3 channels, not {self.image_channels}."
            )
        self.check_mixed_precision(self.mixed_precision)
        smallest = 3 * 2**self.discriminator_layers
        if self.has_adversarial_loss and self.discriminator_model is None and self.resolution < smallest:
            raise ConfigError(
                f"a discriminator of {self.discriminator_layers} layers needs images of at least {smallest} pixels; "
                f"`--resolution` is {self.resolution}. Lower `--discriminator_layers`."
            )
        is_final = self.trains_final_decoder(1)
        judges_stage1 = 1 in self.stage_steps() and self.adversarial_settings_of(is_final) is not None
        if judges_stage1 and self.equivariance > 0 and self.discriminator_model is None:
            raise ConfigError(
                "`--equivariance` shrinks images below what the PatchGAN judges: use it with `--discriminator_model`, or "
                f"without `--{'adversarial_weight' if is_final else 'stage1_adversarial_weight'}`."
            )
        trains_codebook = self.autoencoder == "vq" and self.stage != "2"
        if trains_codebook and self.pretrained_vae is not None and self.quantizer != "vq":
            raise ConfigError(
                f"`--quantizer {self.quantizer}` makes a codebook of its own. With `--pretrained_vae` use `--quantizer vq`, which "
                "trains the given one on, or `--stage 2`, which keeps it."
            )
        uses_kmeans = trains_codebook and self.quantizer == "ema"
        if uses_kmeans and self.codebook_warmup_steps >= self.stage_steps().get(1, math.inf):
            raise ConfigError(
                f"`--codebook_warmup_steps` is {self.codebook_warmup_steps}, but must be below the "
                f"{self.stage_steps()[1]} steps of stage 1, or nothing is ever quantised."
            )

    @property
    def has_adversarial_loss(self) -> bool:
        return self.adversarial_weight > 0 or self.stage1_adversarial_weight > 0

    def check_mixed_precision(self, mixed_precision: str | None) -> None:
        """Of the flag, and of what `accelerate` makes of it."""
        if mixed_precision == "fp16" and self.gradient_accumulation_steps > 1 and self.has_adversarial_loss:
            raise ConfigError(
                "an adversarial loss with `--gradient_accumulation_steps` needs `--mixed_precision bf16` or no, not fp16: "
                "the two models share one loss scale, which may change between the micro-batches of a step."
            )


def main(config: TrainDAEConfig) -> None:
    run = TrainingRun("train_dae", config)
    config.check_mixed_precision(run.accelerator.mixed_precision)
    starts_from = config.pretrained_vae or (config.pretrained_model_name_or_path if config.stage == "2" else None)
    config.value_range = config.value_range or read_value_range(starts_from) or []
    with run.accelerator.main_process_first():
        train_images, validation_images = load_images(config, config.seed)
    logger.info("%s, %d validation images", describe_size(train_images), len(validation_images))

    model = load_model(config)
    run.compile_blocks(filter(None, (model.encoder, model.auxiliary_decoder, model.decoder)))
    resume_path, start_step, state = run.start(
        {"the training images": train_images.fingerprint},
        **count_images(train_images),
        held_out_images=len(validation_images),
        parameters=sum(parameter.numel() for parameter in model.parameters()),
    )
    check_vision_models(config, state.get("stage", 0))
    first_step = 0
    for stage, num_steps in config.stage_steps().items():
        if stage >= state.get("stage", 0):
            if stage == 2 and config.warm_start_decoder and resume_path is None:
                if model.can_start_warm:
                    model.start_decoder_from_auxiliary()
                    logger.info("the decoder starts from the auxiliary one")
                else:
                    logger.info(
                        "the decoder does not start from the auxiliary one: their shapes differ, or it came trained"
                    )
            model.set_stage(stage)
            model = train_stage(
                run, model, train_images, validation_images, first_step, max(start_step, first_step), resume_path
            )
            resume_path = None  # a later stage begins afresh
            if stage == 1 and model.is_decoupled and run.accelerator.is_main_process:
                model.save_pretrained(run.output_dir / "stage1")
                save_value_range(config.value_range, run.output_dir / "stage1")
        first_step += num_steps
        run.mark(f"end of stage {stage}", first_step)

    if config.stage != "1":
        vae = model.to_diffusers().to(run.accelerator.device)
        num_workers = config.dataloader_num_workers
        if is_vq(vae):
            loader = run.pass_loader(train_images, num_workers=num_workers)
            metrics = codebook_metrics(count_codes(vae, loader, run.accelerator))
            logger.info(
                "over all training images: %s", ", ".join(f"{name} {value:.4g}" for name, value in metrics.items())
            )
        source = cached_latents(run, vae, train_images) or train_images
        write_latent_statistics(vae, run.pass_loader(source, num_workers=num_workers), run.accelerator)
        if run.accelerator.is_main_process:
            vae.save_pretrained(run.output_dir / "vae")
            save_value_range(config.value_range, run.output_dir / "vae")
            logger.info("saved %s", run.output_dir / "vae")
            shutil.rmtree(latent_folder(run), ignore_errors=True)
    run.finish("stage1" if config.stage == "1" else "vae")


def load_model(config: TrainDAEConfig) -> DAEAutoencoderKL | DAEVQModel:
    """A new model, one that starts from a published autoencoder, or, for stage 2 alone, the one that a stage 1 has left."""
    model_class, diffusers_class = (
        (DAEVQModel, VQModel) if config.autoencoder == "vq" else (DAEAutoencoderKL, AutoencoderKL)
    )
    if config.pretrained_vae is not None:
        vae = load_autoencoder(config.pretrained_vae)
        if not isinstance(vae, diffusers_class):
            raise UserError(
                f"`--pretrained_vae` {config.pretrained_vae} is of class {type(vae).__name__}, but `--autoencoder {config.autoencoder}` "
                f"takes a model of class {diffusers_class.__name__}. Choose the `--autoencoder` that fits it: kl or vq."
            )
        check_image_size(vae, channels=config.image_channels, resolution=config.resolution)
        try:
            return model_class.from_diffusers(vae, **config.auxiliary_settings())
        except ValueError as error:  # an auxiliary decoder that does not fit this architecture
            raise UserError(str(error)) from None
    if config.stage != "2":
        levels = len(config.block_out_channels)
        latents = {"latent_channels": config.latent_channels}
        if config.autoencoder == "vq":
            settings = {"type": config.quantizer, **config.quantizer_settings()}
            latents = config.quantizer_size(config.latent_channels)
            latents |= {f"quantizer_{name}": value for name, value in settings.items()}
        return model_class(
            in_channels=config.image_channels,
            out_channels=config.image_channels,
            down_block_types=("DownEncoderBlock2D",) * levels,
            up_block_types=("UpDecoderBlock2D",) * levels,
            block_out_channels=tuple(config.block_out_channels),
            layers_per_block=config.layers_per_block,
            **latents,
            norm_num_groups=config.norm_num_groups,
            mid_block_add_attention=config.mid_block_add_attention,
            sample_size=config.resolution,
            **config.auxiliary_settings(),
        )
    path = config.pretrained_model_name_or_path
    for subfolder in ("stage1", None):
        try:
            class_name = model_class.load_config(path, subfolder=subfolder).get("_class_name")
            if class_name != model_class.__name__:
                raise UserError(
                    f"{path} holds a {class_name}, but `--autoencoder {config.autoencoder}` goes on from a "
                    f"{model_class.__name__}. Choose the `--autoencoder` of its stage 1."
                )
            model = model_class.from_pretrained(path, subfolder=subfolder)
            break
        except OSError as error:
            reason = " ".join(str(error).split())[:300]
    else:
        raise UserError(f"`--pretrained_model_name_or_path` {path} holds no stage-1 autoencoder: {reason}")
    check_image_size(model, channels=config.image_channels, resolution=config.resolution)
    return model


def check_vision_models(config: TrainDAEConfig, first_stage: int) -> None:
    """Loads those that only a later stage's losses need, so that a wrong name is not found after hours of training."""
    final = [config.trains_final_decoder(stage) for stage in config.stage_steps() if stage >= first_stage]
    perceptual = [config.perceptual_weight_of(each) > 0 for each in final]
    if any(perceptual) and not perceptual[0]:
        load_perceptual_loss(config.perceptual_model)
    adversarial = [config.adversarial_settings_of(each) is not None for each in final]
    if config.discriminator_model is not None and any(adversarial) and not adversarial[0]:
        load_backbone(config.discriminator_model)


def train_stage(
    run: TrainingRun,
    model: DAEAutoencoderKL | DAEVQModel,
    train_images: ImageDataset | StreamedImages,
    validation_images: ImageDataset,
    first_step: int,
    start_step: int,
    resume_path: Path | None,
) -> DAEAutoencoderKL | DAEVQModel:
    """Trains the stage that `model` is set to, from `start_step` to its end, and returns it with averaged weights."""
    config, accelerator, stage = run.config, run.accelerator, model.stage
    last_step = first_step + config.stage_steps()[stage]
    if config.gradient_checkpointing:
        model.enable_gradient_checkpointing()
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    alignment = make_latent_alignment(run, model)
    trained = [*parameters, *([] if alignment is None else alignment.projection.parameters())]
    optimizer = run.make_optimizer(trained)
    lr_scheduler = run.make_lr_scheduler(optimizer, last_step - first_step)
    perceptual_weight = config.perceptual_weight_of(config.trains_final_decoder(stage))
    perceptual_loss = (
        load_perceptual_loss(config.perceptual_model).to(accelerator.device) if perceptual_weight else None
    )
    adversary = make_adversary(run, stage)
    last_layer, encoder_last_layer = model.last_layer, model.encoder_last_layer
    factor = spatial_factor(model)
    model, optimizer, lr_scheduler = accelerator.prepare(model, optimizer, lr_scheduler)
    ema = run.make_ema(parameters)
    if resume_path is not None:
        run.checkpointer.load(resume_path, ema=ema)
    if (
        stage == 2
        and start_step < last_step
        and pays_to_cache_latents(config, accelerator.unwrap_model(model), train_images, accelerator.num_processes)
    ):
        train_images = with_cached_latents(run, accelerator.unwrap_model(model), train_images)
    step = start_step
    microbatch = run.first_microbatch(step)
    accumulated = [model]
    accumulated += [] if adversary is None else [adversary.discriminator]
    accumulated += [] if alignment is None else [alignment.projection]
    codebook = accelerator.unwrap_model(model).quantize if config.autoencoder == "vq" else None
    forward_options = {"sample_posterior": True} if codebook is None else {}
    progress = run.progress(last_step - first_step, start_step - first_step, f"Stage {stage}")
    batches = run.training_batches(train_images, start_step)
    model.train()
    with StopSignal(accelerator) as stop:
        while step < last_step:
            batch = next(batches)
            seed_microbatch(config.seed, microbatch)
            with accelerator.accumulate(*accumulated):
                perturbation = perturb(batch["pixel_values"], stage, factor, **config.perturbations())
                pixel_values = perturbation.targets
                reconstruction, latent = model(
                    perturbation.inputs,
                    return_dict=False,
                    perturb_latents=perturbation.of_latents,
                    moments=(batch["latents_mean"], batch["latents_std"]) if "latents_mean" in batch else None,
                    **forward_options,
                )
                loss = reconstruction_loss(
                    reconstruction, pixel_values, l1_weight=config.l1_weight, mse_weight=config.mse_weight
                )
                latent_terms = latent_losses(config, latent, codebook)
                run.add(reconstruction_loss=loss, **{name: value for name, (_, value) in latent_terms.items()})
                if perceptual_loss is not None:
                    with accelerator.autocast():
                        perceptual = perceptual_loss(reconstruction, pixel_values)
                    run.add(perceptual_loss=perceptual)
                    loss = loss + perceptual_weight * perceptual
                if alignment is not None:
                    latents = latent.sample() if codebook is None else latent.latents
                    term, values = alignment.term(latents, batch["pixel_values"], loss, encoder_last_layer)
                    run.add(**values)
                    loss = loss + term
                if adversary is not None:
                    term, values = adversary.generator_term(reconstruction, loss, last_layer, step - first_step)
                    run.add(**values)
                    loss = loss if term is None else loss + term
                if stage == 1:
                    loss = loss + sum(weight * value for weight, value in latent_terms.values())
                run.guard.watch(loss, step + 1, microbatch)
                accelerator.backward(loss)
                if accelerator.sync_gradients:
                    gradient_norm = accelerator.clip_grad_norm_(trained, config.max_grad_norm)
                    if run.guard.allows(gradient_norm):
                        optimizer.step()
                    elif codebook is not None:
                        codebook.forget()
                optimizer.zero_grad()
                if adversary is not None:
                    run.add(**adversary.train_discriminator(pixel_values, reconstruction, step - first_step))
                if codebook is not None and stage == 1 and accelerator.sync_gradients:
                    codebook.update()
            microbatch += accelerator.num_processes
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
                if adversary is not None:
                    adversary.warn_if_unbalanced(means, step - first_step)
            if step % config.validation_steps == 0 or step == last_step:
                with ema_weights(ema, parameters):
                    values = validate(run, accelerator.unwrap_model(model), validation_images, step)
                run.log(values, step)
                run.draw_curves()
                progress.write(f"step {step}: " + ", ".join(f"{name} {value:.4g}" for name, value in values.items()))
            if step % config.checkpointing_steps == 0 or step == last_step:
                run.save_checkpoint(step, ema=ema, stage=stage)
                if step != last_step and config.trains_final_decoder(stage):
                    run.push_snapshot(step, "vae", partial(save_vae, accelerator.unwrap_model(model), ema, parameters))
            if stop.requested():
                if step % config.checkpointing_steps and step != last_step:
                    run.save_checkpoint(step, ema=ema, stage=stage)
                stop.exit()
    progress.close()
    accelerator.wait_for_everyone()
    if ema is not None:
        ema.copy_to(parameters)
    model = accelerator.unwrap_model(model, keep_fp32_wrapper=False)
    accelerator.free_memory()
    return model


def pays_to_cache_latents(config: TrainDAEConfig, model, images: ImageDataset, num_processes: int) -> bool:
    """Whether stage 2 would encode more images than there are, and all their latents fit on the disk."""
    if config.crops_at_random or config.streaming:
        return False
    views = len(images) * (2 if config.random_flip else 1)
    microbatch = config.train_batch_size * config.gradient_accumulation_steps * num_processes
    num_bytes = views * 2 * num_latent_channels(model) * (config.resolution // spatial_factor(model)) ** 2 * 4
    return config.stage2_steps * microbatch > views and num_bytes <= config.stage2_cache_gib * 2**30


def with_cached_latents(run: TrainingRun, model, images: ImageDataset) -> ImagesWithLatents:
    """Encodes every image once, since the encoder no longer changes; the cache goes when the run is done."""
    folder = latent_folder(run)
    was_training = model.training
    model.eval()
    write_latent_cache(
        folder,
        model,
        images,
        run.accelerator,
        batch_size=run.config.train_batch_size,
        dtype="float32",
        num_workers=run.config.dataloader_num_workers,
        replace=True,  # a killed run may have left that of another stage 1
    )
    model.train(was_training)
    return ImagesWithLatents(images, CachedLatents(folder, verify=False))  # whole, or just made so


def cached_latents(run: TrainingRun, vae, images: ImageDataset | StreamedImages) -> CachedLatents | None:
    """What stage 2 has encoded of the images, or None."""
    try:
        latents = CachedLatents(latent_folder(run), verify=False)
        latents.check(autoencoder=autoencoder_fingerprint(vae), images=images)
    except UserError:
        return None
    return latents


def latent_folder(run: TrainingRun) -> Path:
    return run.folder / "latents"


def make_adversary(run: TrainingRun, stage: int) -> AdversarialTraining | None:
    """The discriminator of a stage with its optimiser, or None where the stage has no adversarial loss."""
    config = run.config
    settings = config.adversarial_settings_of(config.trains_final_decoder(stage))
    if settings is None:
        return None
    torch.manual_seed(derived_seed(config.seed, 7, stage))  # the same weights however many processes drew before
    if config.discriminator_model is None:
        discriminator = PatchDiscriminator(
            config.image_channels, config.discriminator_channels, config.discriminator_layers
        )
    else:
        discriminator = BackboneDiscriminator(load_backbone(config.discriminator_model), config.discriminator_channels)
    optimizer = run.make_optimizer(
        [parameter for parameter in discriminator.parameters() if parameter.requires_grad],
        lr=config.discriminator_learning_rate,
        betas=(0.5, 0.9),
        weight_decay=0.0,
    )
    discriminator, optimizer = run.accelerator.prepare(discriminator, optimizer)
    return AdversarialTraining(
        run.accelerator, discriminator, optimizer, settings, config.max_grad_norm, allows_step=run.guard.allows
    )


def make_latent_alignment(run: TrainingRun, model: DAEAutoencoderKL | DAEVQModel) -> LatentAlignment | None:
    """The VF loss with its projection, or None in stage 2 and without `--vf_model`."""
    config = run.config
    if config.vf_model is None or model.stage != 1:
        return None
    backbone = load_backbone(config.vf_model).to(run.accelerator.device)
    torch.manual_seed(derived_seed(config.seed, 8))  # the same weights however many processes drew before
    projection = torch.nn.Conv2d(num_latent_channels(model), backbone.patch_feature_dim, 1, bias=False)
    return LatentAlignment(
        run.accelerator, backbone, run.accelerator.prepare(projection), config.latent_alignment_settings()
    )


def latent_losses(
    config: TrainDAEConfig, latent: DiagonalGaussianDistribution | Quantization, codebook: CodebookQuantizer | None
) -> dict[str, tuple[float, torch.Tensor]]:
    """The terms of stage 1 that concern the latents, each with its weight."""
    if codebook is None:
        return {"kl_loss": (config.kl_weight, kl_loss(latent))}
    terms = {"commitment_loss": (config.commitment_weight, commitment_loss(latent.latents, latent.target))}
    if config.quantizer == "vq":
        terms["codebook_loss"] = (1.0, codebook_loss(latent.quantized, latent.latents))
    if config.entropy_weight:
        weight = 0.0 if codebook.is_warming_up else config.entropy_weight  # before k-means the codes mean nothing
        terms["entropy_loss"] = (weight, codebook_entropy_loss(latent.latents, codebook.codebook))
    return terms


def save_vae(model: DAEAutoencoderKL, ema: EMAModel | None, parameters: list, folder: Path) -> None:
    """What training has come to, with averaged weights; the latents' statistics come at the end."""
    with ema_weights(ema, parameters):
        model.to_diffusers().save_pretrained(folder)


@torch.no_grad()
def validate(
    run: TrainingRun, model: DAEAutoencoderKL | DAEVQModel, images: ImageDataset, step: int
) -> dict[str, float]:
    """
    PSNR, mean absolute error, use of the codebook and diagnostics of the latents over the validation images, and a grid of
    originals above reconstructions.
    """
    accelerator, was_training = run.accelerator, model.training
    model.eval()
    psnr, l1, pairs = [], [], []
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
        if model.stage == 1:  # stage 2 leaves the latents as they are
            diagnostics = diagnostics or LatentDiagnostics.empty(tuple(mean.shape[1:]))
            diagnostics.add(mean, std)
        psnr += peak_signal_to_noise_ratio(reconstruction, pixel_values).tolist()
        l1 += (reconstruction - pixel_values).abs().mean(dim=(1, 2, 3)).tolist()
        if not pairs:
            pairs = [pixel_values[:10], reconstruction[:10]]
    model.train(was_training)
    if accelerator.is_main_process:  # another process may have no image at all
        run.log_grid(f"reconstruction-stage{model.stage}", image_grid(torch.cat(pairs), columns=len(pairs[0])), step)
    psnr, l1 = gather_object(psnr), gather_object(l1)
    values = {"validation/psnr": math.fsum(psnr) / len(psnr), "validation/l1": math.fsum(l1) / len(l1)}
    if counts is not None:
        metrics = codebook_metrics(accelerator.reduce(counts, reduction="sum"))
        values |= {f"validation/{name}": value for name, value in metrics.items()}
    parts = [part for part in gather_object([diagnostics]) if part is not None]
    if parts:
        scalars = sum(parts[1:], start=parts[0]).scalars()
        values |= {f"latents/{name}": value for name, value in scalars.items()}
    return values


if __name__ == "__main__":
    run_script(main, parse_config(TrainDAEConfig, description=__doc__))
