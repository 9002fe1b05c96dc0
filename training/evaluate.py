"""
Measure an autoencoder, its latent space, and a pipeline: numbers, grids and plots.

    accelerate launch training/evaluate.py --vae runs/digits/vae --dataset_name digits --image_channels 1 \
        --features facebook/dinov2-small --output_dir runs/digits/evaluation
    accelerate launch training/evaluate.py --pipeline runs/digits/pipeline --dataset_name digits --image_channels 1 \
        --features inception --guidance_scales 1 2 4 --num_inference_steps 10 25

`metrics.json` and `metrics.md` in the output folder say what was measured on what; docs/metrics.md explains each number.
An interrupted evaluation goes on where it stopped when the same command is given again: what is done lies in `samples/`,
`parts/` and `reference/` there, under a hash of what it depends on. They can be removed at the end.
"""

import importlib.metadata
import itertools
import logging
from dataclasses import asdict, dataclass, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal

import torch
from accelerate import Accelerator
from diffusers import DiffusionPipeline, ModelMixin
from matplotlib.figure import Figure

from dae_diffusers.autoencoders.loading import (
    check_has_weights,
    check_image_size,
    encode_moments,
    is_vq,
    load_autoencoder,
)
from dae_diffusers.checkpointing import take_folder
from dae_diffusers.cli import field, parse_config, run_script
from dae_diffusers.data import DataConfig, ImageDataset, load_images, make_pass_loader
from dae_diffusers.data.arrays import read_value_range
from dae_diffusers.errors import ConfigError, UserError
from dae_diffusers.latents.codes import codebook_metrics, codes_of
from dae_diffusers.latents.diagnostics import plot_latent_space
from dae_diffusers.metrics.complexity import (
    HEADLINES,
    MAX_EVAL_IMAGES,
    MAX_TRAIN_IMAGES,
    ComplexityConfig,
    complexity_distance,
    plot_complexity,
)
from dae_diffusers.metrics.evaluation import (
    EncodedImages,
    encode_images,
    evaluation_inputs,
    image_features,
    latent_metrics,
    reconstruction_metrics,
    sample_metrics,
)
from dae_diffusers.metrics.features import FeatureExtractor, load_feature_extractor
from dae_diffusers.metrics.image_quality import image_measures
from dae_diffusers.metrics.kept import KeptRows, keep_values
from dae_diffusers.metrics.sampling import (
    Sampler,
    SampleSettings,
    autoencoder_of,
    draw_samples,
    generation_inputs,
    scheduler_options,
)
from dae_diffusers.metrics.statistics import reference_statistics
from dae_diffusers.pipelines.dae_dit import DAEDiTPipeline
from dae_diffusers.pipelines.dae_vqgan import DAEVQGANPipeline
from dae_diffusers.plots import image_grid
from dae_diffusers.run import PROCESS_GROUP
from dae_diffusers.store import write_atomically, write_json

logger = logging.getLogger(__name__)

# Options of a pipeline's call that are swept, and the flags with their values.
SWEPT = {"guidance_scale": "guidance_scales", "num_inference_steps": "num_inference_steps"}


@dataclass
class EvaluationConfig:
    """What to measure."""

    vae: str | None = field(None, "folder or Hub id of an autoencoder; default: the pipeline's")
    pipeline: str | None = field(None, "folder or Hub id of a diffusion pipeline; without it only the autoencoder")
    features: str | None = field(
        None, "`inception`, or a vision backbone on the Hub or in a folder; without it no distances between features"
    )
    output_dir: str = field("runs/my-model/evaluation", "folder for the results")
    num_images: int = field(10000, "images to draw for each setting, and training images to compare them with")
    guidance_scales: list[float] = field([1.0], "classifier-free guidance; several are swept")
    num_inference_steps: list[int] = field([25], "denoising steps; several are swept")
    temperature: float | None = field(None, "of a pipeline that draws codes; default: its own")
    top_k: int | None = field(None, "the same: draw from the this many likeliest codes only")
    top_p: float | None = field(None, "the same: draw from the fewest likeliest codes with this share")
    label_sampling: Literal["balanced", "random"] = field("balanced", "labels of the drawn images")
    prompt: str | None = field(
        None, "text for a text-to-image pipeline; {label} in it stands for the name of an image's class"
    )
    batch_size: int = field(64, "images at once in each process; changes no result")
    lpips_net: Literal["alex", "vgg", "squeeze", "none"] = field(
        "alex", "network of the LPIPS, which is measured where the package `lpips` is installed"
    )
    seed: int = field(0, "of noise and labels; with that of training, the same held-out images")
    mixed_precision: Literal["no", "fp16", "bf16"] | None = field(None, "autocast while drawing; default: no")
    complexity: bool = field(False, "also the complexity distance of the latent space (minutes)")
    complexity_capacities: list[int] = field([0, 4, 16, 64], "widths of its generators; 0 is the linear one")
    complexity_seeds: int = field(3, "generators of each width")

    def __post_init__(self):
        if self.vae is None and self.pipeline is None:
            raise ConfigError("give `--vae` or `--pipeline` (or both): there is nothing to evaluate.")
        if self.pipeline is not None and self.features is None:
            raise ConfigError("`--pipeline` needs `--features`, such as `inception` or facebook/dinov2-base.")
        if self.seed < 0:
            raise ConfigError(f"`--seed` is {self.seed}, but must be at least 0.")
        for name in ("num_images", "batch_size", "top_k"):
            if getattr(self, name) is not None and getattr(self, name) < 1:
                raise ConfigError(f"`--{name}` is {getattr(self, name)}, but must be at least 1.")
        if self.temperature is not None and not self.temperature > 0:
            raise ConfigError(f"`--temperature` is {self.temperature}, but must be above 0.")
        if self.top_p is not None and not 0 < self.top_p <= 1:
            raise ConfigError(f"`--top_p` is {self.top_p}, but must be above 0 and at most 1.")
        if min(self.num_inference_steps) < 1:
            raise ConfigError(f"`--num_inference_steps` is {self.num_inference_steps}, but must be at least 1.")
        if self.complexity_seeds < 1:
            raise ConfigError(f"`--complexity_seeds` is {self.complexity_seeds}, but must be at least 1.")
        try:
            self.complexity_config()
        except ValueError as error:
            raise ConfigError(f"complexity distance: {error}") from None

    def complexity_config(self) -> ComplexityConfig:
        return ComplexityConfig(capacities=tuple(self.complexity_capacities), seeds=tuple(range(self.complexity_seeds)))


@dataclass
class EvaluateConfig(EvaluationConfig, DataConfig):
    def __post_init__(self):
        DataConfig.__post_init__(self)
        EvaluationConfig.__post_init__(self)
        if self.streaming:
            raise ConfigError(
                "`--streaming` does not go with evaluate.py, which counts every image once; leave it out."
            )
        if self.features is not None and self.image_channels not in (1, 3):
            raise ConfigError(
                f"`--features` are made for gray and for RGB, not for {self.image_channels} channels; leave them out."
            )
        self.require_source()


def main(config: EvaluateConfig) -> None:
    accelerator = Accelerator(mixed_precision=config.mixed_precision or "no", kwargs_handlers=[PROCESS_GROUP])
    logging.basicConfig(format="%(message)s", level=logging.INFO if accelerator.is_main_process else logging.ERROR)
    folder = Path(config.output_dir)
    lock = take_folder(folder, accelerator)
    pipeline = None if config.pipeline is None else load_pipeline(config.pipeline, accelerator.device)
    vae = choose_autoencoder(config, pipeline, accelerator.device)
    if vae is None:
        logger.info("%s has no autoencoder that can be measured: only what it draws is.", config.pipeline)
    else:
        check_image_size(vae.eval(), channels=config.image_channels, resolution=config.resolution)
    extractor = None if config.features is None else load_feature_extractor(config.features, accelerator.device)
    if not config.value_range:
        found = read_value_range(config.vae) if config.vae else pipeline.config.get("value_range")
        config.value_range = list(found or [])
    with accelerator.main_process_first():
        train, validation = load_images(config, config.seed)
    sampler = None if pipeline is None else Sampler(pipeline, prompts_of(config, train))
    for name in ("prompt", "temperature", "top_k", "top_p"):
        if getattr(config, name) is not None and (sampler is None or name not in sampler.accepted):
            raise UserError(
                f"`--{name}` means nothing to {'an autoencoder' if sampler is None else type(pipeline).__name__}; leave it out."
            )
    if sampler is not None and config.label_sampling == "balanced" and config.num_images < (sampler.num_classes or 0):
        logger.warning(
            "`--num_images` %d of %d classes: only the first ones are drawn. Draw more, or use `--label_sampling random`.",
            config.num_images,
            sampler.num_classes,
        )
    # Distances need two of each; density and coverage compare with the fifth neighbour; the classifier's score has ten parts.
    needed = 2 if sampler is None else 6 if extractor.num_classes is None else 10
    if extractor is not None and (len(validation) < 2 or min(len(train), config.num_images) < needed):
        raise UserError(
            f"there are {len(train)} training and {len(validation)} validation images, and `--num_images` is "
            f"{config.num_images}: metrics in `--features` need at least {needed} of each, and mean little below some hundreds."
        )

    some = train.choose(config.num_images)
    results, seen = {}, None
    if vae is not None:
        results, seen = evaluate_autoencoder(config, vae, train, some, validation, extractor, accelerator)
    if sampler is not None:
        results["generation"] = evaluate_samples(config, sampler, vae, train, some, seen, extractor, accelerator)

    if accelerator.is_main_process:
        results["setting"] = describe(config, vae, pipeline, train, validation, extractor, accelerator)
        write_atomically(folder / "metrics.md", to_markdown(results))
        if len(results.get("generation", [])) > 1:
            plot_sweep(results["generation"], extractor.distance_name("g"), folder / "sweep.png")
        write_json(folder / "metrics.json", results)
        logger.info("%s\nwritten to %s", to_markdown(results), folder)
    accelerator.end_training()
    if lock is not None:
        lock.release()


def choose_autoencoder(
    config: EvaluateConfig, pipeline: DiffusionPipeline | None, device: torch.device
) -> ModelMixin | None:
    """That of `--vae`, which must be the pipeline's where both are given; else the pipeline's, if it has one."""
    own = None if pipeline is None else autoencoder_of(pipeline)
    if config.vae is None:
        return own
    vae = load_autoencoder(config.vae).to(device)
    if own is not None and not has_same_weights(own, vae):
        raise UserError(
            f"`--vae` {config.vae} is not the autoencoder that `--pipeline` {config.pipeline} decodes with, so that `gap` would "
            "mean nothing. Leave `--vae` out, or evaluate the two in runs of their own."
        )
    return vae


def has_same_weights(one: torch.nn.Module, other: torch.nn.Module) -> bool:
    one, other = one.state_dict(), other.state_dict()
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def load_pipeline(name_or_path: str, device: torch.device) -> DiffusionPipeline:
    """Ours, also for any other with a class-conditional transformer and latents; else as diffusers loads it."""
    try:
        index = DiffusionPipeline.load_config(name_or_path)
        parts = {name for name, value in index.items() if isinstance(value, list) and value[0] is not None}
        pipeline_class = DiffusionPipeline
        if index.get("_class_name") == "DAEVQGANPipeline":
            pipeline_class = DAEVQGANPipeline
        elif parts == {"scheduler", "transformer", "vae"}:
            pipeline_class = DAEDiTPipeline
        pipeline = pipeline_class.from_pretrained(name_or_path)
        for part in pipeline.components.values():
            if isinstance(part, torch.nn.Module):
                check_has_weights(part)
        return pipeline.to(device)
    except Exception as error:  # a damaged folder can fail in any way
        reason = " ".join(str(error).split())[:300]
        raise UserError(f"`--pipeline` {name_or_path} cannot be loaded: {reason}") from None


def prompts_of(config: EvaluateConfig, images: ImageDataset) -> tuple[str, ...] | None:
    """A text for each class of the images, or one for all."""
    if config.prompt is None or "{label}" not in config.prompt:
        return None if config.prompt is None else (config.prompt,)
    if images.id2label is None:
        raise UserError(
            "`--prompt` speaks of a {label}, but the images have no labels. Name their column, or leave it out."
        )
    return tuple(config.prompt.replace("{label}", images.id2label[label]) for label in sorted(images.id2label))


def evaluate_autoencoder(
    config: EvaluateConfig,
    vae: ModelMixin,
    train: ImageDataset,
    some: ImageDataset,
    validation: ImageDataset,
    extractor: FeatureExtractor | None,
    accelerator: Accelerator,
) -> tuple[dict[str, Any], EncodedImages]:
    """Reconstruction, latent space, codebook and complexity distance; beside them, some training images as it encodes them."""
    folder = Path(config.output_dir)
    options = {
        "batch_size": config.batch_size,
        "num_workers": config.dataloader_num_workers,
        "folder": folder / "parts",
    }
    shape = (config.image_channels, config.resolution, config.resolution)
    lpips_net = None if config.lpips_net == "none" else config.lpips_net
    measures = image_measures(shape, lpips_net=lpips_net, device=accelerator.device)
    held_out = encode_images(vae, validation, accelerator, extractor=extractor, measures=measures, **options)
    seen = encode_images(
        vae,
        some,
        accelerator,
        extractor=None if config.pipeline is None else extractor,
        measures={},
        description="Encoding training images",
        **options,
    )
    probe = None
    if some.labels is not None:
        probe = (seen.latents, torch.tensor(some.labels), torch.tensor(validation.labels))
    results: dict[str, Any] = {
        "reconstruction": reconstruction_metrics(held_out, extractor),
        "latent_space": keep_values(
            lambda: latent_metrics(vae, held_out, extractor, accelerator, probe=probe),
            accelerator,
            folder=folder / "parts",
            of=["latent_space", [evaluation_inputs(vae, images, extractor) for images in (validation, some)]],
        ),
    }
    if is_vq(vae):
        results["codebook"] = {}
        for split, encoded in (("validation", held_out), ("train", seen)):
            parts = encoded.latents.split(config.batch_size)
            codes = torch.cat([codes_of(vae, part.to(accelerator.device)).flatten() for part in parts])
            metrics = codebook_metrics(torch.bincount(codes, minlength=vae.config.num_vq_embeddings))
            results["codebook"] |= {f"{split}_{name}": value for name, value in metrics.items()}
    if accelerator.is_main_process:
        plot_latent_space(held_out.diagnostics, folder / "latent_space.png")
        draw_reconstructions(vae, validation, folder / "reconstructions.png")
    if config.complexity and accelerator.is_main_process:
        # Not `--batch_size`: training on the latents would amplify what it changes in their last digits.
        loaders = (
            make_pass_loader(images.choose(limit), batch_size=64)
            for images, limit in ((train, MAX_TRAIN_IMAGES), (validation, MAX_EVAL_IMAGES))
        )
        try:
            complexity = complexity_distance(
                vae,
                *loaders,
                config.complexity_config(),
                feature_extractor=extractor,
                rows_path=folder / "complexity.jsonl",
                device=accelerator.device,
            )
        except (ValueError, FloatingPointError) as error:
            raise UserError(f"`--complexity` cannot be measured: {error}") from None
        results["complexity"] = complexity.summary
        plot_complexity({"this latent space": complexity}, folder / "complexity.png")
    accelerator.wait_for_everyone()
    return results, seen


def evaluate_samples(
    config: EvaluateConfig,
    sampler: Sampler,
    vae: ModelMixin | None,
    train: ImageDataset,
    some: ImageDataset,
    seen: EncodedImages | None,
    extractor: FeatureExtractor,
    accelerator: Accelerator,
) -> list[dict[str, Any]]:
    """A row for each setting of guidance and steps that the pipeline has; `seen` are some training images in its autoencoder."""
    folder = Path(config.output_dir)
    options = {"batch_size": config.batch_size, "num_workers": config.dataloader_num_workers}
    if seen is None:
        features = image_features(some, extractor, accelerator, folder=folder / "parts", **options)
        reconstruction_features = None
    else:
        features, reconstruction_features = seen.features, seen.reconstruction_features
    reference = reference_statistics(
        extractor,
        train,
        cache_dir=folder / "reference",
        **options,
        disable_progress=not accelerator.is_local_main_process,
    )
    sweep = [getattr(config, flag) if option in sampler.accepted else [None] for option, flag in SWEPT.items()]
    draws_codes = "temperature" in sampler.accepted
    rows = []
    for guidance_scale, num_inference_steps in itertools.product(*sweep):
        settings = SampleSettings(
            config.num_images,
            guidance_scale,
            num_inference_steps,
            config.label_sampling,
            config.seed,
            prompts=sampler.prompts,
        )
        if draws_codes:
            settings = replace(settings, temperature=config.temperature, top_k=config.top_k, top_p=config.top_p)
        samples = draw_samples(
            sampler.pipeline,
            settings,
            folder / "samples",
            accelerator,
            image_shape=(config.image_channels, config.resolution, config.resolution),
            batch_size=config.batch_size,
        )

        def compare(samples=samples) -> dict[str, Any]:
            metrics, neighbors = sample_metrics(
                samples,
                extractor,
                reference,
                features,
                reconstruction_features,
                accelerator,
                batch_size=config.batch_size,
                folder=folder / "parts",
            )
            return {"metrics": metrics, "neighbors": neighbors.tolist()}

        drawn = generation_inputs(sampler.pipeline, settings, accelerator)
        compared = keep_values(
            compare,
            accelerator,
            folder=folder / "parts",
            of=["generation", *(evaluation_inputs(vae, images, extractor) for images in (train, some)), drawn],
        )
        metrics, neighbors = compared["metrics"], torch.tensor(compared["neighbors"])
        rows.append({name: value for name, value in settings.given().items() if name != "prompts"} | metrics)
        if accelerator.is_main_process:
            chosen = (("guidance", guidance_scale), ("steps", num_inference_steps))
            name = "-".join(f"{label}-{value:g}" for label, value in chosen if value is not None) or "default"
            save_grids(folder, name, samples, sampler.num_classes, some, neighbors)
    return rows


@torch.no_grad()
def draw_reconstructions(vae: ModelMixin, images: ImageDataset, path: Path, count: int = 12) -> None:
    """Held-out images, what the autoencoder makes of them, and four times the difference (gray: none)."""
    pixel_values = torch.stack([images[n]["pixel_values"] for n in range(min(count, len(images)))])
    mean, _ = encode_moments(vae, pixel_values.to(vae.device))
    reconstruction = vae.decode(mean).sample.float().cpu().clamp(-1, 1)
    rows = torch.cat([pixel_values, reconstruction, 4 * (reconstruction - pixel_values)])
    image_grid(rows, columns=len(pixel_values)).save(path)


def save_grids(
    folder: Path,
    name: str,
    samples: KeptRows,
    num_classes: int | None,
    train: ImageDataset,
    neighbors: torch.Tensor,
) -> None:
    """A grid of samples, and each of twelve samples beside its nearest training image."""
    columns = num_classes if num_classes is not None and num_classes <= 20 else 10
    few = samples[: 8 * columns].float() / 127.5 - 1
    image_grid(few, columns=columns).save(folder / f"samples-{name}.png")
    few = few[:12]
    nearest = torch.stack([train[number]["pixel_values"] for number in neighbors[: len(few)].tolist()])
    image_grid(torch.cat([few, nearest]), columns=len(few)).save(folder / f"nearest-{name}.png")


def describe(
    config: EvaluateConfig,
    vae: ModelMixin | None,
    pipeline: DiffusionPipeline | None,
    train: ImageDataset,
    validation: ImageDataset,
    extractor: FeatureExtractor | None,
    accelerator: Accelerator,
) -> dict[str, Any]:
    """Everything that the numbers depend on."""
    parts = ("_class_name", "latent_channels", "block_out_channels")
    packages = ["dae-diffusers", "diffusers", "torch", "transformers", "accelerate", "datasets"]
    packages += [name for name in ("torchmetrics", "torch-fidelity", "lpips") if find_spec(name.replace("-", "_"))]
    return {
        "config": asdict(config),
        "pipeline": None if pipeline is None else type(pipeline).__name__,
        "autoencoder": None if vae is None else {name: vae.config.get(name) for name in parts},
        "scheduler": None if pipeline is None else scheduler_options(pipeline),
        "features": extractor
        and {"name": extractor.name, "description": extractor.description, "fingerprint": extractor.fingerprint},
        "train_images": {"number": len(train), "fingerprint": train.fingerprint},
        "validation_images": {"number": len(validation), "fingerprint": validation.fingerprint},
        "num_processes": accelerator.num_processes,
        "versions": {name: importlib.metadata.version(name) for name in packages},
    }


def to_markdown(results: dict[str, Any]) -> str:
    """The numbers as tables, and what they depend on most; all of it stands in `metrics.json`."""
    lines = []
    for part in [name for name in ("reconstruction", "latent_space", "codebook") if name in results]:
        lines += [f"### {part.replace('_', ' ').capitalize()}", "| metric | value |", "|---|---|"]
        lines += [f"| {k} | {v:.5g} |" for k, v in results[part].items() if isinstance(v, (int, float))]
        lines.append("")
    for form, distance in HEADLINES.items():
        rows = [
            {
                "capacity": "the decoder" if row["capacity"] is None else str(row["capacity"]),
                "seeds": str(row["num_seeds"]),
                **{name: row.get(name) for name in (distance, f"{distance}_std", f"{distance}_difference")},
            }
            for row in results.get("complexity", [])
            if row["form"] == form
        ]
        lines += table(f"Complexity distance, {form}", rows)
    lines += table("Generation", results.get("generation", []))
    setting = results["setting"]
    shown = {
        "training images": "{number} ({fingerprint})".format(**setting["train_images"]),
        "validation images": "{number} ({fingerprint})".format(**setting["validation_images"]),
        "resolution": setting["config"]["resolution"],
        "features": setting["features"] and "{name} ({fingerprint}): {description}".format(**setting["features"]),
        "autoencoder": setting["autoencoder"] and setting["autoencoder"]["_class_name"],
        "pipeline": setting["pipeline"],
        "scheduler": setting["scheduler"] and setting["scheduler"].get("_class_name"),
        "versions": ", ".join(f"{name} {version}" for name, version in setting["versions"].items()),
    }
    lines += ["### Setting", "| what | value |", "|---|---|"]
    lines += [f"| {name} | {value} |" for name, value in shown.items() if value is not None]
    return "\n".join(lines) + "\n"


def table(title: str, rows: list[dict[str, Any]]) -> list[str]:
    """Lines of Markdown; none without rows."""
    if not rows:
        return []
    lines = [f"### {title}", f"| {' | '.join(rows[0])} |", "|---" * len(rows[0]) + "|"]
    return [*lines, *(f"| {' | '.join(map(to_cell, row.values()))} |" for row in rows), ""]


def to_cell(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.5g}"
    return "" if value is None else str(value)


def plot_sweep(rows: list[dict[str, Any]], distance: str, path: Path) -> None:
    """The distance against guidance, a line for each number of steps; against steps, where guidance is always the same."""
    figure = Figure(figsize=(5, 3.5), layout="constrained")
    axis = figure.subplots()
    legends = {"num_inference_steps": "{} steps", "guidance_scale": "guidance {:g}"}
    across, along = legends
    if len({row.get("guidance_scale") for row in rows}) == 1:
        across, along = along, across
    for value in dict.fromkeys(row.get(across) for row in rows):
        points = sorted((row[along], row[distance]) for row in rows if row.get(across) == value)
        label = None if value is None else legends[across].format(value)
        axis.plot(*zip(*points, strict=True), marker="o", label=label)
    axis.set_xlabel(along.replace("num_inference_", "").replace("_", " "))
    axis.set_ylabel(distance)
    if axis.get_legend_handles_labels()[0]:
        axis.legend(frameon=False)
    figure.savefig(path, dpi=120)


if __name__ == "__main__":
    run_script(main, parse_config(EvaluateConfig, description=__doc__))
