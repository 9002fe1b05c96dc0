"""Stage 3: fitting a decoder to the latents that a trained generator draws."""

import logging
import shutil
import warnings
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from diffusers import ModelMixin

from dae_diffusers.autoencoders.adversary import make_adversary
from dae_diffusers.autoencoders.loading import check_can_be_trained, is_vq, load_autoencoder, settle_images
from dae_diffusers.autoencoders.settings import GeneratedConfig
from dae_diffusers.caching import cached_rows
from dae_diffusers.data import ImageDataset
from dae_diffusers.engine.post_hoc_ema.choosing import generator_of
from dae_diffusers.engine.precision import loss_scale
from dae_diffusers.engine.run import Start, TrainingRun
from dae_diffusers.errors import UserError
from dae_diffusers.fit_record import read_fit, write_fit
from dae_diffusers.fitting.image_statistics import ImageStatistics, RunningMoments, Whitening
from dae_diffusers.losses.adaptive_weight import adaptive_weight
from dae_diffusers.metrics.distances import frechet_distance
from dae_diffusers.metrics.sampling import draws_of, ids_in_pipeline, image_sides, load_pipeline, scheduler_options
from dae_diffusers.metrics.statistics import MAX_REFERENCE_IMAGES, FeatureStatistics, pad_batch, reference_statistics
from dae_diffusers.pipelines.dae_dit import DAEDiTPipeline
from dae_diffusers.pipelines.dae_vqgan import DAEVQGANPipeline
from dae_diffusers.plots import image_grid
from dae_diffusers.randomness import Stream, derived_seed
from dae_diffusers.store import fingerprint, fingerprint_of_json, replace_files, replace_folder
from dae_diffusers.weights import STATISTICS, latents_fingerprint, model_fingerprint, weights_of

logger = logging.getLogger(__name__)

# The autoencoder as it was, in the output folder.
KEPT_VAE = "vae_before_stage3"
# Inputs of a run, by the names that their fingerprints are compared under. Checkpoints of earlier versions may lack them.
STARTED_FROM = "the autoencoder that stage 3 starts from"
HOW_IT_DRAWS = "how `--pipeline` draws"


def load_generator(config: Any) -> DAEDiTPipeline | DAEVQGANPipeline:
    r"""
    The pipeline of stage 3 on the CPU, with the decoder to start from.

    Args:
        config: With the parts `data`, `autoencoder`, `stages` and `run`.

    Raises:
        UserError: If it is not a `DAEDiTPipeline` or `DAEVQGANPipeline`, does not fit the images, or would overwrite another one, or if
            `pretrained_model_name_or_path` has another encoder or a decoder of another size.
    """
    name, start = config.stages.pipeline, config.autoencoder.pretrained_model_name_or_path
    pipeline = load_pipeline(name, torch.device("cpu"))
    if not isinstance(pipeline, DAEDiTPipeline | DAEVQGANPipeline):
        raise UserError(
            f"`pipeline` {name} is a {type(pipeline).__name__}, but stage 3 needs a DAEDiTPipeline or a DAEVQGANPipeline."
        )
    if getattr(pipeline, "takes_text", False):
        raise UserError(
            f"`pipeline` {name} draws from text, which stage 3 cannot do. Give one that draws by class or without classes."
        )
    if getattr(pipeline, "conditions", None):
        raise UserError(
            f"`pipeline` {name} draws from `{'`, `'.join(pipeline.conditions)}`, which stage 3 cannot do. Give one that draws by class or "
            "without classes."
        )
    check_can_be_trained(pipeline.vae, name)
    target = Path(config.run.output_dir) / "pipeline"
    if target.exists() and not _is_same_folder(target, name):
        raise UserError(
            f"{target} holds a pipeline already, and `pipeline` is {name}. Choose another `output_dir`, or give `pipeline {target}` "
            "to train that one's decoder on."
        )
    if start is not None:
        vae = load_autoencoder(start)
        if latents_fingerprint(vae) != latents_fingerprint(pipeline.vae):
            raise UserError(
                f"`pretrained_model_name_or_path` {start} has another encoder or codebook than the autoencoder of `pipeline` "
                f"{name}: its decoder knows other latents. Give an autoencoder whose decoder alone was trained on."
            )
        if _decoder_size(vae) != _decoder_size(pipeline.vae):
            raise UserError(
                f"`pretrained_model_name_or_path` {start} has a decoder of another size than the one of `pipeline` {name}, which "
                "stage 3 cannot change. Put it into the pipeline with `dae-diffusers assemble`, then leave out "
                "`pretrained_model_name_or_path`."
            )
        pipeline.vae.load_state_dict(vae.state_dict())
    settle_images(config, pipeline.vae, side=image_sides(pipeline))
    return pipeline


def draw_latents(
    pipeline: DAEDiTPipeline | DAEVQGANPipeline,
    labels: torch.Tensor | None,
    num_latents: int,
    folder: Path | None,
    accelerator: Accelerator,
    *,
    guidance_scale: float,
    num_inference_steps: int,
    seed: int,
    stream: Stream = Stream.POOL,
    batch_size: int = 64,
) -> torch.Tensor:
    r"""
    Draws latents as the pipeline would before it decodes them, in chunks that are kept in `folder` under a fingerprint of what
    they depend on. All processes call it.

    Args:
        pipeline ([`~dae_diffusers.DAEDiTPipeline`] or [`~dae_diffusers.DAEVQGANPipeline`]): On its device.
        labels (`torch.Tensor` of shape `(num_latents,)`, *optional*): A class for each; None for a generator without classes.
        num_latents (`int`): How many.
        folder (`Path`, *optional*): Where to keep them; None keeps nothing.
        accelerator ([`~accelerate.Accelerator`]): Processes take turns at the chunks.
        guidance_scale, num_inference_steps: As the pipeline takes them. Codes have no steps.
        seed, stream (`int`): Latent `n` depends on `(seed, stream, n)` and its label alone. Samples to be judged come from
            `Stream.SAMPLES`.
        batch_size (`int`, *optional*): Latents at once.

    Returns:
        `torch.Tensor` of shape `(num_latents, C, h, w)`: Raw latents, as `vae.decode` takes them, float32, on the CPU; of a codebook
        the codes' vectors.
    """
    pipeline.set_progress_bar_config(disable=True)
    is_codes = isinstance(pipeline, DAEVQGANPipeline)
    options = (
        {"output_type": "codes"} if is_codes else {"output_type": "latent", "num_inference_steps": num_inference_steps}
    )
    options |= own_defaults(pipeline)  # given by name, because kept latents are known by their options
    guide = guide_of(pipeline)
    if labels is not None or guide is not None:
        options["guidance_scale"] = guidance_scale

    def draw(chunk: range) -> dict[str, torch.Tensor]:
        parts = []
        for count, numbers, generators in draws_of(pipeline, chunk, batch_size, seed, stream):
            given = (
                {"num_images_per_label": len(numbers)} if labels is None else {"class_labels": labels[numbers].tolist()}
            )
            with accelerator.autocast():
                drawn = pipeline(**given, **options, generator=generators).images
            raw = pipeline.code_vectors(drawn) if is_codes else pipeline.raw_latents(drawn)
            parts.append(raw[:count].float().cpu())
        return {"latents": torch.cat(parts)}

    described = {
        "generator": model_fingerprint(generator_of(pipeline)[1]),
        **({} if guide is None else {"guide": model_fingerprint(guide)}),
        "autoencoder": latents_fingerprint(pipeline.vae),
        "statistics": {name: pipeline.vae.config.get(name) for name in STATISTICS},
        "scheduler": scheduler_options(pipeline),
        "labels": None if labels is None else fingerprint([labels]),
        "options": {**options, "seed": [seed, stream]},
        "mixed_precision": accelerator.mixed_precision,
    }
    rows = cached_rows(draw, num_latents, accelerator, folder=folder, of=described, description="Drawing latents")
    return rows["latents"]


@torch.no_grad()
def decoder_inputs(pipeline: DAEDiTPipeline | DAEVQGANPipeline, latents: torch.Tensor) -> torch.Tensor:
    r"""
    Drawn latents as the decoder gets them when the pipeline decodes: `vae.decode` of an autoencoder with a codebook quantises those
    of a [`~dae_diffusers.DAEDiTPipeline`] first; those of a [`~dae_diffusers.DAEVQGANPipeline`] are the codes' vectors already.

    Args:
        pipeline: On its device.
        latents (`torch.Tensor` of shape `(N, C, h, w)`): What [`draw_latents`] returns.

    Returns:
        `torch.Tensor` of the same shape: On the CPU.
    """
    if isinstance(pipeline, DAEVQGANPipeline) or not is_vq(pipeline.vae):
        return latents
    vae = pipeline.vae
    return torch.cat([vae.quantize(part.to(vae.device))[0].cpu() for part in latents.split(64)])


def own_defaults(pipeline: DAEDiTPipeline | DAEVQGANPipeline) -> dict[str, Any]:
    r"""How a pipeline draws by default, beside its guidance scale and its steps, by the names of its call."""
    own = ("velocity_scale", "guidance_interval")
    if isinstance(pipeline, DAEVQGANPipeline):
        own = ("temperature", "top_k", "top_p")
    defaults = {name: pipeline.config.get(f"default_{name}") for name in own}
    return {name: value for name, value in defaults.items() if value is not None}


def guide_of(pipeline: DAEDiTPipeline | DAEVQGANPipeline) -> torch.nn.Module | None:
    r"""The weaker transformer that guides the one of a pipeline."""
    return getattr(pipeline, "guidance_transformer", None)


def _decoder_size(vae: ModelMixin) -> dict[str, Any]:
    """Shapes of an autoencoder's weights, by name, and the groups of its decoder's normalisation, which no shape tells."""
    groups = vae.config.get("decoder_norm_num_groups") or vae.config.norm_num_groups
    return {"groups": groups, **{name: value.shape for name, value in vae.state_dict().items()}}


def as_the_pipeline_draws(settings: GeneratedConfig, pipeline: DAEDiTPipeline | DAEVQGANPipeline) -> GeneratedConfig:
    r"""The settings with the pipeline's own guidance and steps, where none are given."""
    config = pipeline.config
    if isinstance(pipeline, DAEVQGANPipeline) and settings.pool_inference_steps is not None:
        logger.warning("`--pool_inference_steps` has no effect: a DAEVQGANPipeline draws code by code.")
        settings = replace(settings, pool_inference_steps=None)
    given = {
        "pool_guidance_scale": (settings.pool_guidance_scale, config.get("default_guidance_scale"), 1.5),
        "pool_inference_steps": (settings.pool_inference_steps, config.get("default_num_inference_steps"), 25),
    }
    return replace(
        settings, **{name: next(each for each in found if each is not None) for name, found in given.items()}
    )


class DecoderFit:
    r"""
    What stage 3 adds to a decoder's loss: how far its images of drawn latents are, as a whole, from the training images.

    With `generated_loss moments` it is the distance between the moments of their statistics, see
    [`~dae_diffusers.fitting.image_statistics.ImageStatistics`]; with `adversarial` a discriminator tells them apart.

    Args:
        run ([`~dae_diffusers.engine.run.TrainingRun`]): With the parts `data`, `losses`, `generated`, `optimization` and `run` in its
            config.
        pipeline: What draws the latents; see [`load_generator`].
        images ([`~dae_diffusers.data.ImageDataset`]): The training images.
    """

    def __init__(self, run: TrainingRun, pipeline: DAEDiTPipeline | DAEVQGANPipeline, images: ImageDataset):
        config, settings = run.config, as_the_pipeline_draws(run.config.generated, pipeline)
        self.run, self.settings, self.accelerator = run, settings, run.accelerator
        self.pipeline, self.images = pipeline, images
        self.labels = pool_labels(pipeline, images, settings.pool_size, config.run.seed)
        self.moments = self.adversary = None
        self.before: dict[str, float] = {}
        self.now: dict[str, float] = {}
        self.started_from = self._find_started_from()
        self.batch_size = settings.generated_batch_size or 2 * config.optimization.train_batch_size
        if settings.generated_loss == "adversarial":
            self.batch_size = config.optimization.train_batch_size  # as many as images
        self.features = ImageStatistics.load(
            config.stages.feature_model, config.data.image_channels, run.accelerator.device
        )

    def inputs(self) -> dict[str, str]:
        r"""What a resumed run must find unchanged, by name: fingerprints."""
        guide, options = guide_of(self.pipeline), own_defaults(self.pipeline)
        interval = options.pop("guidance_interval", None)
        return {
            "the generator of `--pipeline`": model_fingerprint(generator_of(self.pipeline)[1]),
            **({} if guide is None else {"the `guidance_transformer` of `--pipeline`": model_fingerprint(guide)}),
            **({} if interval is None else {"the guidance interval of `--pipeline`": fingerprint_of_json(interval)}),
            "the encoder of `--pipeline`": latents_fingerprint(self.pipeline.vae),
            HOW_IT_DRAWS: fingerprint_of_json(
                {
                    "options": options,
                    "scheduler": scheduler_options(self.pipeline),
                    "statistics": {name: self.pipeline.vae.config.get(name) for name in STATISTICS},
                }
            ),
            STARTED_FROM: self.started_from,
            "`--feature_model`": self.features.fingerprint,
        }

    def plan(self) -> dict[str, Any]:
        r"""The settings that a resumed run must have again."""
        names = ["generated_loss", "pool_size", "pool_guidance_scale"]
        if not isinstance(self.pipeline, DAEVQGANPipeline):
            names.append("pool_inference_steps")
        return {name: getattr(self.settings, name) for name in names}

    def begin(self, start: Start, validate: Callable[[], dict[str, float]]) -> None:
        r"""
        Draws the pool and measures where the decoder stands. All processes call it.

        Args:
            start ([`~dae_diffusers.engine.run.Start`]): Where the run begins.
            validate (`Callable`): Measures the autoencoder as it is.

        Raises:
            UserError: If the training images are others than at the beginning.
        """
        run, settings, device = self.run, self.settings, self.accelerator.device
        if start.checkpoint is not None and start.step in run.plan.images_changed:
            raise UserError(
                f"the training images differ from those that stage 3 began with, and it compares with their moments. Begin again: remove "
                f"{run.folder}, or give another `output_dir`."
            )
        run.begin(start.step)
        drawn = draw_latents(
            self.pipeline.to(device),
            self.labels,
            settings.pool_size,
            run.folder / "pool",
            run.accelerator,
            guidance_scale=settings.pool_guidance_scale,
            num_inference_steps=settings.pool_inference_steps,
            seed=run.config.run.seed,
            batch_size=run.config.optimization.train_batch_size,
        )
        self.pool = decoder_inputs(self.pipeline, drawn)
        self.vae = self.pipeline.vae.eval()
        chosen = self.images.choose(MAX_REFERENCE_IMAGES)
        with torch.no_grad():
            self.reference = reference_statistics(self.features, chosen, cache_dir=run.folder / "reference")
        self._check_counts(len(chosen))
        drawn_features = self.features_of_pool(self.vae) if start.checkpoint is None else None
        self.before = start.state.get("before")
        if self.before is None:
            values = validate() | {"validation/generated_fd": self._distance(drawn_features)}
            self.before = {name: values[f"validation/{name}"] for name in ("psnr", "generated_fd")}
            run.log.write(values, start.step)
        if settings.generated_weight == 0:
            return
        if settings.generated_loss == "moments":
            self.moments = RunningMoments(Whitening.of(self.reference, device), settings.moments_share).to(device)
            if drawn_features is not None:
                self.moments.start(drawn_features)
            run.accelerator.prepare_model(self.moments, evaluation_mode=True)  # so that checkpoints hold them
        else:
            self.adversary = make_adversary(run, settings.generated_weight, 3, augments=True)  # no pairs

    @property
    def others(self) -> list[torch.nn.Module]:
        r"""What has an optimiser of its own."""
        return [] if self.adversary is None else [self.adversary.discriminator]

    def latents(self, microbatch: int) -> torch.Tensor | None:
        r"""The drawn latents of a micro-batch, which depend on its number alone; None with a weight of 0."""
        if self.settings.generated_weight == 0:
            return None
        generator = torch.Generator().manual_seed(derived_seed(self.run.config.run.seed, Stream.POOL_BATCH, microbatch))
        numbers = torch.randint(len(self.pool), (self.batch_size,), generator=generator)
        return self.pool[numbers].to(self.accelerator.device)

    def term(
        self, decoded: torch.Tensor, other_loss: torch.Tensor, last_layer: torch.Tensor, step: int
    ) -> tuple[torch.Tensor | None, dict[str, torch.Tensor]]:
        r"""
        The weighted term of the decoder's loss.

        Args:
            decoded (`torch.Tensor` of shape `(B, C, H, W)`): Images of drawn latents, with their graph.
            other_loss (`torch.Tensor`): Scalar: the losses of the real images, which it is balanced with at `last_layer`.
            last_layer (`torch.Tensor`): The decoder's last weight.
            step (`int`): Optimiser steps that are done.

        Returns:
            The term, or None, and what to log.
        """
        if self.adversary is not None:
            term, values = self.adversary.generator_term(decoded, other_loss, last_layer, step)
            return term, {f"generated_{name}": value for name, value in values.items()}
        with self.accelerator.autocast():
            features = self.features(decoded.clamp(-1, 1))  # as people will see them
        distance = self.moments(features, step)
        weight = adaptive_weight(other_loss, distance, last_layer, cap=1e4, scale=loss_scale(self.accelerator))
        values = {"generated_distance": distance, "generated_adaptive_weight": weight}
        return self.settings.generated_weight * weight * distance, values

    def after_backward(self, pixel_values: torch.Tensor, decoded: torch.Tensor, step: int) -> dict[str, torch.Tensor]:
        r"""Trains the discriminator, if there is one, and returns what to log."""
        if self.adversary is None:
            return {}
        values = self.adversary.train_discriminator(pixel_values, decoded[: len(pixel_values)], step)
        return {f"generated_{name}": value for name, value in values.items()}

    @torch.no_grad()
    def features_of_pool(self, vae: ModelMixin) -> torch.Tensor:
        r"""The training features, `(N, D)`, of what an autoencoder makes of all drawn latents. All processes call it."""
        size = self.run.config.optimization.train_batch_size

        def extract(chunk: range) -> dict[str, torch.Tensor]:
            parts = self.pool[chunk.start : chunk.stop].split(size)
            return {"features": torch.cat([self.features(self.decode(vae, part))[: len(part)].cpu() for part in parts])}

        return cached_rows(
            extract, len(self.pool), self.accelerator, folder=None, of=None, description="Decoding the pool"
        )["features"]

    def decode(self, vae: ModelMixin, latents: torch.Tensor) -> torch.Tensor:
        r"""Images `(padded B, C, H, W)` in [-1, 1] of latents of the pool, `(B, C, h, w)`."""
        latents = pad_batch(latents.to(self.accelerator.device), 2**16)
        options = {"force_not_quantize": not vae.config.lookup_from_codebook} if is_vq(vae) else {}
        return vae.decode(latents, **options).sample.float().clamp(-1, 1)

    def validate(self, model: ModelMixin, values: dict[str, float], step: int) -> dict[str, float]:
        r"""
        The distance of drawn images in the training features, and a grid of them: the decoder before above the present one. All
        processes call it.

        Args:
            model: The autoencoder with averaged weights.
            values (`dict[str, float]`): Of the validation.
            step (`int`): Optimiser steps that are done.

        Raises:
            UserError: If reconstructions have lost more than `max_psnr_drop`.
        """
        psnr, lowest = values["validation/psnr"], self.before["psnr"] - self.settings.max_psnr_drop
        if not psnr >= lowest:  # also if it is NaN
            raise UserError(
                f"the PSNR of reconstructions fell from {self.before['psnr']:.2f} to {psnr:.2f} dB, by more than `max_psnr_drop` "
                f"{self.settings.max_psnr_drop}. The pipeline is as it was. Lower `generated_weight` or `stage3_learning_rate`, or train "
                "fewer steps, in another `output_dir` or without this one's train_dae_stage3."
            )
        vae = model.to_diffusers()
        if self.accelerator.is_main_process:
            chosen = self.pool[: min(10, len(self.pool))]
            with torch.no_grad():
                rows = [self.decode(each, chosen)[: len(chosen)] for each in (self.vae, vae)]
            grid = image_grid(torch.cat(rows), columns=len(chosen), row_names=["before", "now"])
            self.run.log.write_grid("generated-stage3", grid, step)
        self.now = {"psnr": psnr, "generated_fd": self._distance(self.features_of_pool(vae))}
        return {"validation/generated_fd": self.now["generated_fd"]}

    def finish(self, model: ModelMixin, step: int, validate: Callable[[], dict[str, float]]) -> None:
        r"""
        Puts the decoder into the pipeline's folder. All processes call it.

        Args:
            model: The autoencoder with averaged weights.
            step (`int`): Optimiser steps that are done.
            validate (`Callable`): Measures it, where a run went on from its last checkpoint and has not.
        """
        if not self.now:
            self.validate(model, validate(), step)
        names = ("generated_loss", "generated_weight", "pool_size", "pool_guidance_scale")
        described = {name: getattr(self.settings, name) for name in names}
        if self._is_guided:
            described["guidance_interval"] = self.pipeline.config.get("default_guidance_interval")
        else:
            del described["pool_guidance_scale"]
        described["feature_model"] = self.run.config.stages.feature_model
        backbone = self.features.backbone
        described["feature_weights"] = None if backbone is None else fingerprint(weights_of(backbone.model))
        described |= {"before": self.before, "after": self.now, "started_from": self.started_from}
        if self.accelerator.is_main_process:
            folder = save_pipeline(self.run.output_dir, self.pipeline, model, described)
            shutil.rmtree(self.run.folder / "latents", ignore_errors=True)  # those of the training images
            logger.info("saved %s; the autoencoder as it was is in %s", folder, self.run.output_dir / KEPT_VAE)
            logger.info(
                "PSNR of held-out reconstructions: %.2f -> %.2f dB. Distance of drawn images in the statistics that were matched: "
                "%.4g -> %.4g. Other features must judge them: `dae-diffusers evaluate --pipeline %s --features ...`",
                self.before["psnr"],
                self.now["psnr"],
                self.before["generated_fd"],
                self.now["generated_fd"],
                folder,
            )
        self.accelerator.wait_for_everyone()

    def _find_started_from(self) -> str:
        """
        Fingerprint of the autoencoder that was given. A finished run has put its own decoder there, and says beside it what was
        given.
        """
        config, known = self.run.config, self.run.resumed_state.get("inputs", {})
        name = config.autoencoder.pretrained_model_name_or_path or config.stages.pipeline
        recorded = read_fit(name).get("started_from")
        if recorded is not None and recorded == known.get(STARTED_FROM):
            return recorded
        return fingerprint(weights_of(self.pipeline.vae))

    @property
    def _is_guided(self) -> bool:
        """Whether a guidance scale changes what is drawn."""
        is_flow_map = getattr(self.pipeline, "is_flow_map", False)
        return not is_flow_map and (self.labels is not None or guide_of(self.pipeline) is not None)

    def _distance(self, drawn_features: torch.Tensor) -> float:
        """Fréchet distance in the training features between decoded drawn latents and images."""
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # `_check_counts` has said once that there are few images
            return frechet_distance(FeatureStatistics.of(drawn_features), self.reference)

    def _check_counts(self, num_images: int) -> None:
        fewest = min(num_images, self.settings.pool_size)
        if fewest < 2 * self.features.feature_dim:
            logger.warning(
                "the moments of %d statistics are compared over %d images only: use a smaller `--feature_model`, or none, or more images "
                "and a larger `--pool_size`",
                self.features.feature_dim,
                fewest,
            )


def pool_labels(
    pipeline: DAEDiTPipeline | DAEVQGANPipeline, images: ImageDataset, pool_size: int, seed: int
) -> torch.Tensor | None:
    r"""
    A class for each drawn latent, as often as among the training images; None for a generator without classes.

    Raises:
        UserError: If the generator does not know the images' classes.
    """
    num_classes = pipeline.null_class
    if num_classes is None:
        return None
    if images.labels is None or images.id2label is None:
        raise UserError(
            f"the generator knows {num_classes} classes, but the images have no labels. Name their column with `label_column`."
        )
    labels = torch.as_tensor(ids_in_pipeline(pipeline, images))
    generator = torch.Generator().manual_seed(derived_seed(seed, Stream.POOL_LABELS))
    return labels[torch.randint(len(labels), (pool_size,), generator=generator)]


def save_pipeline(
    folder: Path, pipeline: DAEDiTPipeline | DAEVQGANPipeline, model: ModelMixin, described: dict[str, Any]
) -> Path:
    r"""
    Puts a fitted decoder into `<folder>/pipeline`. The autoencoder from before stage 3 stays in `<folder>/vae_before_stage3`, also when its
    decoder is fitted again.

    A kill at any moment leaves a whole pipeline: with the decoder before, or with the new one.

    Args:
        folder (`Path`): The output folder.
        pipeline: With the decoder before, which the call replaces.
        model: The trained autoencoder.
        described (`dict`): How it was fitted, for [`~dae_diffusers.fit_record.write_fit`].

    Returns:
        `Path`: The pipeline's folder.
    """
    target, kept = folder / "pipeline", folder / KEPT_VAE
    source = target / "vae"
    is_another = source.is_dir() and not read_fit(source)  # no stage 3 has fitted it
    if is_another or _latents_fingerprint_in(kept) != latents_fingerprint(pipeline.vae):
        copy = partial(shutil.copytree, source) if source.is_dir() else pipeline.vae.save_pretrained
        replace_folder(kept, copy)
    pipeline.vae.load_state_dict(model.to_diffusers().state_dict())
    if not target.exists():

        def save_new(folder: Path) -> None:
            pipeline.save_pretrained(folder)
            write_fit(folder / "vae", folder / "vae", described)

        replace_folder(target, save_new)
        return target

    def save(folder: Path) -> None:
        pipeline.vae.save_pretrained(folder)
        # Put in place before the weights: after a kill it names others than there are, and is not used.
        write_fit(source, folder, described)

    replace_files(source, save)
    return target


def _latents_fingerprint_in(folder: Path) -> str | None:
    """Of the autoencoder in a folder; None if there is none. A path that does not exist could be taken for a name on the Hub."""
    try:
        return latents_fingerprint(load_autoencoder(str(folder))) if folder.is_dir() else None
    except UserError:
        return None


def _is_same_folder(first: Path, second: str) -> bool:
    return Path(second).is_dir() and first.resolve() == Path(second).resolve()
