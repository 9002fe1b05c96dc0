r"""
Train a Diffusion Transformer in the latent space of an autoencoder, with flow matching.

    accelerate launch training/train_dit.py --dataset_name digits --image_channels 1 --vae runs/digits/vae \
        --output_dir runs/digits
    accelerate launch training/train_dit.py --latent_cache runs/digits/latents --vae runs/digits/vae --model DiT-S/2

The result is `<output_dir>/pipeline`, for `DAEDiTPipeline.from_pretrained`. Training starts from nothing, or from given weights with
`--pretrained_model_name_or_path`.
"""

import logging
import math
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from accelerate.utils import gather_object
from diffusers import AutoencoderKL, ModelMixin, SchedulerMixin
from torch.utils.data import Dataset

from dae_diffusers.autoencoders.loading import (
    num_latent_channels,
    settle_images,
    spatial_factor,
)
from dae_diffusers.cli import parse_config
from dae_diffusers.data import DataConfig, ImageDataset, count_images, describe_size, held_out_settings, load_images
from dae_diffusers.engine.loop import Loop
from dae_diffusers.engine.plan import TRAINING_IMAGES
from dae_diffusers.engine.run import Start, TrainingRun
from dae_diffusers.engine.sample_grid import draw_sample_grid
from dae_diffusers.errors import UserError
from dae_diffusers.fitting.side_by_side import GrowingAutoencoder
from dae_diffusers.generators.autoguidance import WeakerWeights
from dae_diffusers.generators.conditioning import DRAWN_FROM, Conditioning
from dae_diffusers.generators.conditions import Conditions
from dae_diffusers.generators.denoising import Diffusion, FlowMatching, flow_scheduler
from dae_diffusers.generators.flow_map import FlowMap, flow_map_scheduler
from dae_diffusers.generators.repa import make_representation_alignment
from dae_diffusers.generators.text import Captions
from dae_diffusers.generators.warm_start import WarmStart
from dae_diffusers.guidance import ALL_LEVELS, DEFAULT_INTERVAL
from dae_diffusers.latents.cache import CachedLatents, ImagesWithLatents, follow_cache, open_latent_cache
from dae_diffusers.latents.statistics import (
    has_latent_statistics,
    moments_of,
    normalize_latents,
    set_statistics,
    write_latent_statistics,
)
from dae_diffusers.metrics.monitor import Monitor, make_monitor
from dae_diffusers.metrics.sampling import prompts_of_images
from dae_diffusers.pipelines.dae_dit import DAEDiTPipeline, is_representation_autoencoder
from dae_diffusers.randomness import Stream, derived_seed
from dae_diffusers.script import run_script
from dae_diffusers.settings import changes_of
from dae_diffusers.sizes import height_and_width, words_of_size
from dae_diffusers.training.settings import TrainDiTConfig
from dae_diffusers.transformer_dae_dit import DAEDiTTransformer2DModel
from dae_diffusers.weights import STATISTICS, autoencoder_fingerprint, model_fingerprint

logger = logging.getLogger(__name__)

Objective = FlowMatching | FlowMap | Diffusion


class TrainingData(NamedTuple):
    """Training and validation data, as images or cached latents; and `images`, both as images, None if only latents are given."""

    train: Dataset
    validation: Dataset
    images: tuple[Dataset, ImageDataset] | None


@dataclass(frozen=True)
class Task:
    """
    What a run asks of its transformer, settled before there is one.

    Attributes:
        vae: Its latents are learnt.
        statistics: Those of the latents, as in the autoencoder's config.
        data, conditioning: What is learnt, and what it is drawn from.
        origin: What the transformer starts from; None for a new one.
        architecture: Arguments of the transformer's constructor that define its size.
        objective, scheduler: What it learns to predict, and what samples from that.
    """

    run: TrainingRun
    vae: AutoencoderKL
    statistics: dict[str, Any]
    data: TrainingData
    conditioning: Conditioning
    origin: WarmStart | None
    architecture: dict[str, int]
    objective: Objective
    scheduler: SchedulerMixin

    @classmethod
    def of(cls, run: TrainingRun, vae: AutoencoderKL) -> "Task":
        """Reads and checks what the settings name."""
        origin = find_origin(run)
        architecture = architecture_of(run.config, origin)
        objective, scheduler = make_objective(run, origin)
        data = load_data(run, vae, architecture["patch_size"])
        conditioning = find_conditioning(run, data, vae, origin)
        warn_of_idle_guidance(run.config, conditioning, data.train)
        statistics = measure_statistics(run, vae, data.train, origin)
        return cls(run, vae, statistics, data, conditioning, origin, architecture, objective, scheduler)

    @property
    def is_flow_matching(self) -> bool:
        return not isinstance(self.objective, Diffusion)

    @property
    def token(self) -> int:
        """Side of one of the transformer's positions, in pixels."""
        return spatial_factor(self.vae) * self.architecture["patch_size"]

    def state(self) -> dict[str, Any]:
        """What a checkpoint must hold of it, so that a resumed run has the same task."""
        return {
            "latent_statistics": self.statistics,
            **({} if self.origin is None else {"warm_start": self.origin.state(self.scheduler)}),
            **({} if self.conditioning.conditions is None else {"conditions": self.conditioning.conditions.config}),
        }

    def record(self) -> dict[str, Any]:
        """What the run's record says of it, for the model card and `compare`."""
        objective = {
            "objective": type(self.objective).__name__,
            "timestep_shift": getattr(self.objective, "shift", None),
        }
        return objective | self.conditioning.example()


class PipelineMaker:
    """Makes the pipeline of a transformer that trains, with the weaker version that guides it, once there is one."""

    def __init__(self, task: Task, weaker: WeakerWeights):
        data = task.data.train
        self.task, self.weaker = task, weaker
        self.parts = {
            "vae": task.vae,
            "scheduler": task.scheduler,
            "id2label": data.id2label,
            "value_range": data.value_range,
            "is_flow_matching": task.is_flow_matching,
            **task.conditioning.pipeline_kwargs(),
        }

    def __call__(self, model: ModelMixin, **instead: Any) -> DAEDiTPipeline:
        weaker = self.weaker.parts()
        defaults = {f"default_{name}": value for name, value in sampling_options(self.task, bool(weaker)).items()}
        return DAEDiTPipeline(model, **self.parts | defaults | weaker | instead)

    def save(self, model: ModelMixin, folder: Path) -> None:
        self(model).save_pretrained(folder)


def main(config: TrainDiTConfig) -> None:
    run = TrainingRun("train_dit", config, one_model=True)
    autoencoder = load_autoencoder(run)
    task = Task.of(run, autoencoder.vae)
    transformer = prepare_transformer(task)
    alignment = make_representation_alignment(
        config.alignment, transformer, task.token, run.accelerator, config.run.seed
    )
    steps = run.num_steps(config.transformer.max_train_steps, task.data.train)
    start = find_start(task, transformer, steps)
    weaker = WeakerWeights(run, transformer, start.step, steps)
    pipeline_of = PipelineMaker(task, weaker)
    monitor = find_monitor(task, start)
    loop = Loop(
        run,
        transformer,
        steps=start.step if monitor.is_exhausted else steps,
        step=start.step,
        checkpoint=start.checkpoint,
        description="DiT",
        also=[] if alignment is None else [alignment.projector],
        snapshot=("pipeline", pipeline_of.save),
        post_hoc=config.post_hoc,
        state=task.state() | {"monitor": monitor.state},
    )
    train_data, validation_data = with_conditions(task, needs_images=alignment is not None)
    for step in loop.over(train_data):
        for batch in step:
            loss = denoising_loss(task, loop.model, batch)
            step.add(loss=loss)
            if alignment is not None:
                term, values = alignment.term(batch["pixel_values"])
                step.add(**values)
                loss = loss + term
            step.backward(loss)
        weaker.follow(loop)
        value = None
        if step.validates:
            with loop.averaged() as model:
                value = validation_loss(task, model, validation_data)
                run.guard.check_validation(loop.step, loss=value)
                newest = autoencoder.newest(of_same_size=config.data.condition_column is not None)
                draw_samples(task, pipeline_of(model, vae=newest), loop.step)
            step.write({"validation/loss": value})
        monitor.follow(loop, step, pipeline_of, value)
    if run.end_dry_run():
        return
    if run.accelerator.is_main_process:
        run.note(**task.record())
    autoencoder.finish(run, pipeline_of(loop.finished_model().eval()), monitor)


def load_autoencoder(run: TrainingRun) -> GrowingAutoencoder:
    """The autoencoder, and checks that the settings can do without its decoder if that is not finished."""
    autoencoder = GrowingAutoencoder(run.config.transformer.vae, run.output_dir, run.accelerator.device)
    run.config.hub.check_snapshots(autoencoder.is_finished)
    run.config.monitor.check_decoder(autoencoder.is_finished)
    return autoencoder


def find_monitor(task: Task, start: Start) -> Monitor:
    """What looks for the best weights, if the settings ask for it."""
    return make_monitor(
        task.run,
        task.data.images and task.data.images[0],
        task.vae,
        start,
        sampling_options(task, has_weaker=True),
        loss_inputs=[
            autoencoder_fingerprint(task.vae),
            task.statistics,
            task.data.validation.fingerprint,
            task.conditioning.fingerprints,
            type(task.objective).__name__,
            getattr(task.objective, "shift", None),
        ],
        after=task.run.config.flow.autoguidance_steps or 0,
        options_until=sampling_options(task, has_weaker=False),
    )


def with_conditions(task: Task, *, needs_images: bool) -> list[Dataset]:
    """Training and validation data with texts and conditions, and on request the images beside latents that are trained on."""
    train = task.data.train
    if needs_images and isinstance(train, CachedLatents):
        train = ImagesWithLatents(task.data.images[0], train)
    return task.conditioning.add_to(train, task.data.validation)


def denoising_loss(task: Task, model: torch.nn.Module, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    """The transformer's loss on a micro-batch of images or latents, at noise levels that are drawn here."""
    with encoding(task.run):
        mean, std = (moment.float() for moment in moments_of(batch, task.vae, task.run.accelerator.device))
    latents = normalize_latents(mean + std * torch.randn_like(mean), task.vae)
    noise = torch.randn_like(latents)
    levels = task.objective.draw(len(latents), latents.device)
    given = task.conditioning.with_dropout(batch, latents)
    if isinstance(task.objective, FlowMap):
        given["unconditional"] = task.conditioning.nothing(batch, latents)
    return task.objective.loss(model, latents, noise, levels, **given).mean()


def encoding(run: TrainingRun) -> AbstractContextManager:
    """The precision of the encoder. In fp16 it stays float32: numbers inside Stable Diffusion XL's exceed that range."""
    return nullcontext() if run.accelerator.mixed_precision == "fp16" else run.accelerator.autocast()


def measure_statistics(run: TrainingRun, vae: AutoencoderKL, data: Dataset, origin: WarmStart | None) -> dict[str, Any]:
    """
    Gives the autoencoder the statistics of its latents that the checkpoint or given weights know, or measures them if it has none, and
    returns what its config says then. Published ones that scale latents to another deviation than 1 do not count.
    """
    # A run goes on with the statistics that it began with, whatever the autoencoder of a finished stage 2 has by then.
    kept = run.resumed_state.get("latent_statistics")
    if kept is not None:
        set_statistics(vae, kept)
        return kept
    is_settled = origin is not None and origin.settles_statistics(vae)
    is_scaled = vae.config.get("scaling_factor", 1.0) != 1 and not is_representation_autoencoder(vae.config)
    is_known = has_latent_statistics(vae) and not is_scaled
    if not is_settled and not is_known and run.dry_run is None:
        logger.info("computing the statistics of %s over the training data", run.config.transformer.vae)
        loader = run.pass_loader(data, num_workers=run.config.data.dataloader_num_workers)
        write_latent_statistics(vae, loader, run.accelerator)
    return {name: vae.config[name] for name in STATISTICS if name in vae.config}


def find_origin(run: TrainingRun) -> WarmStart | None:
    """What the transformer starts from, read from the checkpoint if the run goes on; None for a new transformer."""
    name = run.config.transformer.pretrained_model_name_or_path
    if run.resumed is not None:
        state = run.resumed_state.get("warm_start")
        return None if state is None else WarmStart.from_state(state, name)
    return None if name is None else WarmStart.load(name)


def architecture_of(config: TrainDiTConfig, origin: WarmStart | None) -> dict[str, int]:
    """The arguments of the transformer's constructor that define its size."""
    name = config.transformer.size if origin is None else config.transformer.model
    given = {} if name is None else DAEDiTTransformer2DModel.size_kwargs(name)
    given |= config.transformer.instead_of_named()
    return given if origin is None else origin.architecture(given)


def warn_of_idle_guidance(config: TrainDiTConfig, conditioning: Conditioning, data: Dataset) -> None:
    """Says which flags have no effect, because there is nothing that guidance could lead away from."""
    if data.id2label or conditioning.parts:
        return
    idle = changes_of(config.transformer).keys() & {"class_dropout_prob"}
    if config.flow.autoguidance_steps is None and config.flow.distill_guidance_scale is None:
        idle |= changes_of(config.flow).keys() & {"sample_guidance_scale", "sample_guidance_interval"}
    for name in sorted(idle):
        logger.warning("`--%s` has no effect: the images have no classes, captions or conditions.", name)


def plan_of(task: Task) -> dict[str, Any]:
    """The settings that a run must keep when it goes on."""
    config, origin, objective = task.run.config, task.origin, task.objective
    interval = list(objective.guidance_interval) if isinstance(objective, FlowMap) else None
    return {
        "pretrained_model_name_or_path": config.transformer.pretrained_model_name_or_path or (origin and origin.name),
        "caption_column": config.data.caption_column,
        **task.architecture,
        **config.data.condition_columns(),
        "distill_guidance_scale": config.flow.distill_guidance_scale,
        "sample_guidance_interval": interval,
        "post_hoc_ema": config.post_hoc.post_hoc_ema or None,
    }


def prepare_transformer(task: Task) -> ModelMixin:
    """The transformer as the settings want it, with what the objective needs besides."""
    run, config, size = task.run, task.run.config, size_of_latents(task.run.config.data, task.vae)
    if task.origin is None and config.flow.timestep_shift is None:
        warn_of_large_latents(config.data, num_latent_channels(task.vae), height_and_width(size))
    is_flow_map = isinstance(task.objective, FlowMap)
    if is_flow_map and (config.optimization.optimizer == "muon" or config.optimization.learning_rate > 3e-4):
        logger.warning(
            "distillation collapsed with Muon, and in some runs with AdamW at rates from 5e-4 on: images became shapeless, and the last "
            "loss hardly showed it. Use `--optimizer adamw --learning_rate 2.5e-4`, and look at the grids."
        )
    transformer = make_transformer(task, size)
    if is_flow_map:
        set_teachers(run, task.objective, task.origin)
    if config.optimization.gradient_checkpointing:
        transformer.enable_gradient_checkpointing()
    run.compile_blocks(transformer.transformer_blocks)
    return transformer


def make_transformer(task: Task, size: int | list[int]) -> ModelMixin:
    """A transformer for latents of this size: a new one, or the given one."""
    channels, more = num_latent_channels(task.vae), task.conditioning.transformer_kwargs()
    id2label, conditions = task.data.train.id2label, task.conditioning.conditions
    if task.origin is not None:
        return task.origin.continued(
            size,
            channels,
            task.architecture["patch_size"],
            id2label,
            task.conditioning.text_encoder,
            conditions=None if conditions is None else conditions.config,
            condition_channels=more.get("condition_channels", 0),
            flow_map=isinstance(task.objective, FlowMap),
        )
    num_classes = None if id2label is None else len(id2label)
    # By name: `from_config` takes positional arguments for defaults.
    return DAEDiTTransformer2DModel(
        sample_size=size,
        in_channels=channels,
        num_classes=num_classes,
        **more,
        **task.architecture,
    )


def size_of_latents(data: DataConfig, vae: AutoencoderKL) -> int | list[int]:
    """The side of the latents, or height and width."""
    height, width = (side // spatial_factor(vae) for side in data.size)
    return height if height == width else [height, width]


def warn_of_large_latents(data: DataConfig, channels: int, size: tuple[int, int]) -> None:
    """Says so if latents hold as many numbers as the images, or more: then the default noise levels hide too little."""
    latents, images = channels * math.prod(size), data.image_channels * math.prod(data.size)
    if latents >= images:
        logger.warning(
            "the latents hold %d numbers and the images %d. Such latents need more noise in training: give `--timestep_shift` 2 for as "
            "many numbers, 3 to 5 for more. Or train an autoencoder with fewer `--latent_channels`.",
            latents,
            images,
        )


def make_objective(run: TrainingRun, origin: WarmStart | None) -> tuple[Objective, SchedulerMixin]:
    """What the transformer learns to predict, and the scheduler that samples from it; those of given weights stay."""
    flow, shift = run.config.flow, run.config.flow.timestep_shift
    if origin is not None and not origin.is_flow_matching:
        of_flow = ("timestep_shift", "timestep_sampling", "distill_guidance_scale", "sample_guidance_interval")
        asked = [name for name in of_flow if name in changes_of(flow)]
        if asked:
            raise UserError(
                f"`{asked[0]}` is for flow matching, but {origin.name} is for diffusion: its {type(origin.scheduler).__name__} says which "
                "noise levels it knows. Leave it out."
            )
        return Diffusion(origin.scheduler), origin.scheduler
    keeps = origin is not None and shift is None and not origin.is_flow_map
    shift = shift or (1.0 if origin is None else origin.shift)
    scale = flow.distill_guidance_scale
    if scale is not None and origin is not None:  # `find_start` refuses a resumed run that began from nothing
        origin.check_distillation(scale)
        interval = tuple(flow.sample_guidance_interval or origin.guidance_interval)
        # Its teacher comes with the transformer.
        return FlowMap(None, scale, interval, shift, run.accelerator.autocast), flow_map_scheduler(shift)
    scheduler = origin.scheduler if keeps else flow_scheduler(shift)
    return FlowMatching(flow.timestep_sampling, shift), scheduler


def set_teachers(run: TrainingRun, objective: FlowMap, origin: WarmStart) -> None:
    """Gives the objective what the flow map learns from."""
    for model in origin.teachers:
        model.to(run.accelerator.device)
        run.compile_blocks(model.transformer_blocks)
    objective.teacher, objective.guide = (*origin.teachers, None)[:2]


def find_start(task: Task, transformer: ModelMixin, steps: int) -> Start:
    """Checks that the plan fits the checkpoint, and returns where to begin."""
    data, objective, num_parameters = task.data.train, task.objective, transformer.num_parameters()
    logger.info(
        "%s, %s classes, %.1f M parameters",
        describe_size(data),
        len(data.id2label or {}) or "no",
        num_parameters / 1e6,
    )
    inputs = {TRAINING_IMAGES: data.fingerprint, "the encoder of `--vae`": autoencoder_fingerprint(task.vae)}
    inputs |= task.conditioning.fingerprints
    if isinstance(objective, FlowMap):
        inputs["the distilled transformer"] = model_fingerprint(objective.teacher)
        if objective.guide is not None:
            inputs["the `guidance_transformer` of the distilled one"] = model_fingerprint(objective.guide)
    return task.run.find_start(
        inputs=inputs,
        settings=plan_of(task) | held_out_settings(data),
        counts={**count_images(data), "parameters": num_parameters},
        steps={"max_train_steps": steps},
        classes=data.id2label,
    )


def load_data(run: TrainingRun, vae: AutoencoderKL, patch_size: int) -> TrainingData:
    """The images, or their cached latents, once it is known that they fit the autoencoder."""
    config, images, caches = run.config, None, None
    if config.transformer.latent_cache is not None:
        folders = [Path(config.transformer.latent_cache) / split for split in ("train", "validation")]
        caches = tuple(open_latent_cache(folder, run.accelerator) for folder in folders)
        follow_cache(config.data, caches[0])
    settle_images(config, vae, patch_size=patch_size)
    if config.data.has_source:
        with run.accelerator.main_process_first():
            name = config.transformer.vae
            images = load_images(config.data, model=name)
    if caches is None:
        return TrainingData(*images, images)
    fingerprint = autoencoder_fingerprint(vae)
    for index, cache in enumerate(caches):
        cache.check(autoencoder=fingerprint, images=None if images is None else images[index])
    for cache, pixels in zip(caches, (caches[0].buckets.sizes[0], config.data.size), strict=True):
        size, cached = tuple(side // spatial_factor(vae) for side in pixels), cache.latent_shape[1:]
        if size != cached:
            raise UserError(
                f"the latents of {cache.folder} have the size {words_of_size(cached)}, but those of `vae` have "
                f"{words_of_size(size)} for images of {words_of_size(pixels)} pixels. Give the autoencoder of the cache, or make the "
                "cache again; `dae-diffusers assemble` adds another decoder afterwards."
            )
    return TrainingData(*caches, images)


def find_conditioning(
    run: TrainingRun, data: TrainingData, vae: AutoencoderKL, origin: WarmStart | None
) -> Conditioning:
    """What the images are drawn from: classes, captions and further columns."""
    captions, conditions = encode_captions(run, data.images), find_conditions(run, data.images, vae, origin)
    dropout = run.config.transformer.class_dropout_prob
    return Conditioning(len(data.train.id2label or ()), dropout, captions, conditions)


def encode_captions(run: TrainingRun, images: tuple[Dataset, ImageDataset] | None) -> Captions | None:
    """The captions of the images, encoded or read from where they were kept: beside the latents. None without `text_encoder`."""
    config = run.config.transformer
    if config.text_encoder is None:
        return None
    is_kept = config.latent_cache is not None and run.dry_run is None
    folder = Path(config.latent_cache if is_kept else run.output_dir) / "captions"
    return Captions(config.text_encoder, getattr(torch, config.text_encoder_dtype), images, run.accelerator, folder)


def find_conditions(
    run: TrainingRun, images: tuple[Dataset, ImageDataset] | None, vae: AutoencoderKL, origin: WarmStart | None
) -> Conditions | None:
    """What the images are drawn from besides a class and a text; None if no columns are named."""
    if not run.config.data.has_conditions:
        return None
    known = None if origin is None else origin.conditions
    if run.resumed is not None:
        known = run.resumed_state.get("conditions")
    conditions, cache = Conditions(images, spatial_factor(vae), known), run.config.transformer.latent_cache
    logger.info("images are also drawn from %s", ", ".join(conditions.config))
    if cache is not None and run.dry_run is None:
        conditions.keep_images(run.accelerator, Path(cache) / "conditions")
    return conditions


@torch.no_grad()
def validation_loss(task: Task, model: ModelMixin, data: Dataset) -> float:
    """The loss over the validation data, with the same noise and evenly spread noise levels every time, whatever the run's seed."""
    run, objective = task.run, task.objective
    generator = torch.Generator().manual_seed(derived_seed(0, Stream.VALIDATION_NOISE))
    quantiles = (torch.randperm(len(data), generator=generator) + 0.5) / len(data)
    all_levels = objective.spread(quantiles)
    all_noise = torch.randn(
        len(data), model.config.in_channels, *height_and_width(model.config.sample_size), generator=generator
    )
    losses, start, step = [], run.accelerator.process_index, run.accelerator.num_processes
    for batch in run.pass_loader(data):
        with encoding(run):
            mean, _ = moments_of(batch, task.vae, run.accelerator.device)
        latents = normalize_latents(mean.float(), task.vae)
        mine = slice(start, start + len(latents) * step, step)
        start = mine.stop
        noise, levels = all_noise[mine].to(latents), all_levels[mine].to(latents.device)
        given = {name: batch[name].to(latents.device) for name in DRAWN_FROM if name in batch}
        if isinstance(objective, FlowMap):
            given |= {"unconditional": task.conditioning.nothing(given, latents), "in_halves": False}
        with run.accelerator.autocast():
            losses += objective.loss(model, latents, noise, levels, **given).tolist()
    losses = gather_object(losses)
    return math.fsum(losses) / len(losses)


def draw_samples(task: Task, pipeline: DAEDiTPipeline, step: int) -> None:
    """Draws the grid of samples at a validation, from captions and conditions of validation images where there are any."""
    run, images, flow, shown = task.run, task.data.images, task.run.config.flow, {}
    if flow.validation_prompts:
        shown = {"prompts": flow.validation_prompts}
    elif images is not None:
        shown = prompts_of_images(images[1], max(1, flow.num_sample_images // 5), to_show=True)
    if not run.accelerator.is_main_process:
        return
    grid = draw_sample_grid(
        pipeline,
        num_classes=pipeline.null_class,
        num_images=flow.num_sample_images,
        batch_size=run.config.optimization.train_batch_size,
        seed=run.config.run.seed,
        **sampling_options(task, has_weaker=pipeline.guidance_transformer is not None),
        **shown,
    )
    run.log.write_grid("samples", grid, step)


def sampling_options(task: Task, has_weaker: bool) -> dict[str, Any]:
    """
    How the pipeline draws while the transformer trains, with or without the weaker transformer of `autoguidance_steps`; without guidance if
    it has learnt none. Guidance acts at all noise levels for diffusion, and where a weaker transformer guides sooner or later.
    """
    flow = task.run.config.flow
    is_guided = task.run.config.transformer.class_dropout_prob or (has_weaker and flow.autoguidance_steps is not None)
    is_limited = task.is_flow_matching and flow.autoguidance_steps is None and flow.distill_guidance_scale is None
    return {
        "guidance_scale": flow.sample_guidance_scale if is_guided else 1.0,
        "guidance_interval": tuple(flow.sample_guidance_interval or DEFAULT_INTERVAL) if is_limited else ALL_LEVELS,
        "num_inference_steps": flow.num_sample_steps,
    }


if __name__ == "__main__":
    run_script(main, parse_config(TrainDiTConfig, description=__doc__))
