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
import json
import logging
from dataclasses import asdict, dataclass, replace
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
from dae_diffusers.cli import ConfigError, UserError, field, parse_config, run_script
from dae_diffusers.data import DataConfig, ImageDataset, load_images, make_pass_loader
from dae_diffusers.data.arrays import read_value_range
from dae_diffusers.files import write_atomically
from dae_diffusers.latents.codes import codebook_metrics, codes_of
from dae_diffusers.latents.diagnostics import plot_latent_space
from dae_diffusers.metrics.complexity import ComplexityConfig, complexity_distance, plot_complexity
from dae_diffusers.metrics.evaluation import (
    SampleSettings,
    draw_samples,
    encode_images,
    evaluation_inputs,
    generation_inputs,
    latent_metrics,
    reconstruction_metrics,
    sample_metrics,
)
from dae_diffusers.metrics.features import load_feature_extractor
from dae_diffusers.metrics.image_quality import image_measures
from dae_diffusers.metrics.kept import keep_values
from dae_diffusers.metrics.statistics import reference_statistics
from dae_diffusers.pipelines.dae_dit import DAEDiTPipeline
from dae_diffusers.pipelines.dae_vqgan import DAEVQGANPipeline
from dae_diffusers.plots import image_grid

logger = logging.getLogger(__name__)


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
        for name in ("num_images", "batch_size", "top_k"):
            if getattr(self, name) is not None and getattr(self, name) < 1:
                raise ConfigError(f"`--{name}` is {getattr(self, name)}, but must be at least 1.")
        if self.temperature is not None and not self.temperature > 0:
            raise ConfigError(f"`--temperature` is {self.temperature}, but must be above 0.")
        if self.top_p is not None and not 0 < self.top_p <= 1:
            raise ConfigError(f"`--top_p` is {self.top_p}, but must be above 0 and at most 1.")
        if min(self.num_inference_steps) < 1:
            raise ConfigError(f"`--num_inference_steps` is {self.num_inference_steps}, but must be at least 1.")
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
        self.require_source()


def main(config: EvaluateConfig) -> None:
    accelerator = Accelerator(mixed_precision=config.mixed_precision or "no")
    logging.basicConfig(format="%(message)s", level=logging.INFO if accelerator.is_main_process else logging.ERROR)
    folder = Path(config.output_dir)
    lock = take_folder(folder, accelerator)
    pipeline = None if config.pipeline is None else load_pipeline(config.pipeline, accelerator.device)
    vae = pipeline.vae.eval() if config.vae is None else load_autoencoder(config.vae).to(accelerator.device)
    check_image_size(vae, channels=config.image_channels, resolution=config.resolution)
    extractor = None if config.features is None else load_feature_extractor(config.features, accelerator.device)
    if not config.value_range:
        found = read_value_range(config.vae) if config.vae else pipeline.config.get("value_range")
        config.value_range = list(found or [])
    with accelerator.main_process_first():
        train, validation = load_images(config, config.seed)
    fewest = min(len(train), len(validation), config.num_images)
    if extractor is not None and fewest < 2:
        raise UserError(
            f"there are {len(train)} training and {len(validation)} validation images, and `--num_images` is "
            f"{config.num_images}: distances between `--features` need at least 2 of each, and mean little below some hundreds."
        )
    options = {"batch_size": config.batch_size, "num_workers": config.dataloader_num_workers}

    shape = (config.image_channels, config.resolution, config.resolution)
    lpips_net = None if config.lpips_net == "none" else config.lpips_net
    held_out = encode_images(
        vae,
        validation,
        accelerator,
        extractor=extractor,
        measures=image_measures(shape, lpips_net=lpips_net, device=accelerator.device),
        folder=folder / "parts",
        **options,
    )
    seen = encode_images(
        vae,
        train,
        accelerator,
        extractor=extractor if pipeline is not None else None,
        measures={},
        max_images=config.num_images,
        folder=folder / "parts",
        description="Encoding training images",
        **options,
    )
    probe = None
    if train.labels is not None:
        count = len(seen.latents)
        probe = (seen.latents, torch.tensor(train.labels[:count]), torch.tensor(validation.labels))
    inputs = [evaluation_inputs(vae, images, extractor) for images in (validation, train)] + [config.num_images]
    results: dict[str, Any] = {
        "reconstruction": reconstruction_metrics(held_out, extractor),
        "latent_space": keep_values(
            lambda: latent_metrics(vae, held_out, extractor, accelerator, probe=probe),
            accelerator,
            folder=folder / "parts",
            of=["latent_space", inputs],
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
        complexity = complexity_distance(
            vae,
            *(make_pass_loader(images, batch_size=config.batch_size) for images in (train, validation)),
            config.complexity_config(),
            feature_extractor=extractor,
            rows_path=folder / "complexity.jsonl",
            device=accelerator.device,
        )
        results["complexity"] = complexity.summary
        plot_complexity({"this latent space": complexity}, folder / "complexity.png")
    accelerator.wait_for_everyone()

    if pipeline is not None:
        reference = reference_statistics(
            extractor,
            train,
            cache_dir=folder / "reference",
            **options,
            disable_progress=not accelerator.is_local_main_process,
        )
        results["generation"] = []
        for guidance_scale in config.guidance_scales:
            draws_codes = isinstance(pipeline, DAEVQGANPipeline)
            for num_inference_steps in [None] if draws_codes else config.num_inference_steps:
                settings = SampleSettings(
                    config.num_images, guidance_scale, num_inference_steps, config.label_sampling, config.seed
                )
                if draws_codes:
                    settings = replace(settings, temperature=config.temperature, top_k=config.top_k, top_p=config.top_p)
                samples = draw_samples(
                    pipeline, settings, folder / "samples", accelerator, batch_size=config.batch_size
                )

                def compare(samples=samples) -> dict[str, Any]:
                    metrics, neighbors = sample_metrics(
                        samples,
                        extractor,
                        reference,
                        seen.features,
                        seen.reconstruction_features,
                        accelerator,
                        batch_size=config.batch_size,
                        folder=folder / "parts",
                    )
                    return {"metrics": metrics, "neighbors": neighbors.tolist()}

                compared = keep_values(
                    compare,
                    accelerator,
                    folder=folder / "parts",
                    of=["generation", inputs, generation_inputs(pipeline, settings, accelerator)],
                )
                metrics, neighbors = compared["metrics"], torch.tensor(compared["neighbors"])
                results["generation"].append({**settings.given(), **metrics})
                if accelerator.is_main_process:
                    name = f"guidance-{guidance_scale:g}" + ("" if draws_codes else f"-steps-{num_inference_steps}")
                    save_grids(folder, name, samples, settings, pipeline, train, neighbors)

    if accelerator.is_main_process:
        results["setting"] = describe(config, vae, pipeline, train, validation, extractor, accelerator)
        write_atomically(folder / "metrics.md", to_markdown(results))
        if len(results.get("generation", [])) > 1:
            plot_sweep(results["generation"], extractor.distance_name("g"), folder / "sweep.png")
        write_atomically(folder / "metrics.json", json.dumps(results, indent=2))
        logger.info("%s\nwritten to %s", to_markdown(results), folder)
    accelerator.end_training()
    if lock is not None:
        lock.release()


def load_pipeline(name_or_path: str, device: torch.device) -> DiffusionPipeline:
    """Ours, or any other of diffusers with class labels, latents and a VAE."""
    try:
        class_name = DiffusionPipeline.load_config(name_or_path).get("_class_name")
        pipeline_class = DAEVQGANPipeline if class_name == "DAEVQGANPipeline" else DAEDiTPipeline
        pipeline = pipeline_class.from_pretrained(name_or_path)
        for model in (pipeline.vae, pipeline.transformer if hasattr(pipeline, "transformer") else pipeline.prior):
            check_has_weights(model)
        return pipeline.to(device)
    except Exception as error:  # a damaged folder can fail in any way
        reason = " ".join(str(error).split())[:300]
        raise UserError(f"`--pipeline` {name_or_path} cannot be loaded: {reason}") from None


@torch.no_grad()
def draw_reconstructions(vae: ModelMixin, images: ImageDataset, path: Path, count: int = 12) -> None:
    """Held-out images, what the autoencoder makes of them, and four times the difference (gray: none)."""
    pixel_values = torch.stack([images[n]["pixel_values"] for n in range(min(count, len(images)))])
    mean, _ = encode_moments(vae, pixel_values.to(vae.device))
    reconstruction = vae.decode(mean).sample.float().cpu().clamp(-1, 1)
    rows = torch.cat([pixel_values, reconstruction, 4 * (reconstruction - pixel_values)])
    image_grid(rows, columns=len(pixel_values)).save(path)


def save_grids(folder, name, samples, settings, pipeline, train: ImageDataset, neighbors: torch.Tensor) -> None:
    """A grid of samples, and each of twelve samples beside its nearest training image."""
    num_classes = pipeline.null_class
    columns = num_classes if num_classes is not None and num_classes <= 20 else 10
    image_grid(samples[: 8 * columns].float() / 127.5 - 1, columns=columns).save(folder / f"samples-{name}.png")
    chosen = range(min(12, len(samples)))
    pairs = [samples[n].float() / 127.5 - 1 for n in chosen] + [
        train[int(neighbors[n])]["pixel_values"] for n in chosen
    ]
    image_grid(torch.stack(pairs), columns=len(chosen)).save(folder / f"nearest-{name}.png")


def describe(config, vae, pipeline, train, validation, extractor, accelerator) -> dict[str, Any]:
    """Everything that the numbers depend on."""
    return {
        "config": asdict(config),
        "autoencoder": {key: vae.config.get(key) for key in ("_class_name", "latent_channels", "block_out_channels")},
        "scheduler": dict(pipeline.scheduler.config) if hasattr(pipeline, "scheduler") else None,
        "features": None if extractor is None else {"name": extractor.name, "description": extractor.description},
        "train_images": {"number": len(train), "fingerprint": train.fingerprint},
        "validation_images": {"number": len(validation), "fingerprint": validation.fingerprint},
        "num_processes": accelerator.num_processes,
        "versions": {
            name: importlib.metadata.version(name) for name in ("dae-diffusers", "diffusers", "torch", "transformers")
        },
    }


def to_markdown(results: dict[str, Any]) -> str:
    """The numbers as tables."""
    lines = []
    for part in [name for name in ("reconstruction", "latent_space", "codebook") if name in results]:
        lines += [f"### {part.replace('_', ' ').capitalize()}", "| metric | value |", "|---|---|"]
        lines += [f"| {k} | {v:.5g} |" for k, v in results[part].items() if isinstance(v, (int, float))]
        lines.append("")
    for part in ("complexity", "generation"):
        rows = results.get(part, [])
        for names in dict.fromkeys(tuple(row) for row in rows):  # the two forms of the complexity distance differ
            lines += [f"### {part.capitalize()}", f"| {' | '.join(names)} |", "|---" * len(names) + "|"]
            lines += [f"| {' | '.join(map(to_cell, row.values()))} |" for row in rows if tuple(row) == names]
            lines.append("")
    return "\n".join(lines) + "\n"


def to_cell(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.5g}"
    return "" if value is None else str(value)


def plot_sweep(rows: list[dict[str, Any]], distance: str, path: Path) -> None:
    """The distance against guidance, a line for each number of steps."""
    figure = Figure(figsize=(5, 3.5), layout="constrained")
    axis = figure.subplots()
    for steps in sorted({row.get("num_inference_steps") for row in rows}):
        chosen = [row for row in rows if row.get("num_inference_steps") == steps]
        points = sorted((row["guidance_scale"], row[distance]) for row in chosen)
        axis.plot(*zip(*points, strict=True), marker="o", label="codes" if steps is None else f"{steps} steps")
    axis.set_xlabel("guidance scale")
    axis.set_ylabel(distance)
    axis.legend(frameon=False)
    figure.savefig(path, dpi=120)


if __name__ == "__main__":
    run_script(main, parse_config(EvaluateConfig, description=__doc__))
