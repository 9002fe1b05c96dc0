"""The report of an evaluation: its settings, tables and pictures."""

import importlib.metadata
import math
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from diffusers import DiffusionPipeline, ModelMixin
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from PIL import Image as PILImage

from dae_diffusers.autoencoders.loading import decode_latents, encode_moments
from dae_diffusers.caching import CachedRows
from dae_diffusers.data import ImageDataset
from dae_diffusers.directions import with_arrow
from dae_diffusers.evaluation_record import is_deviation, weights_by_part, words_of_setting
from dae_diffusers.metrics.distances import few_images_note
from dae_diffusers.metrics.features import FeatureExtractor
from dae_diffusers.metrics.sampling import scheduler_options
from dae_diffusers.metrics.statistics import MAX_REFERENCE_IMAGES
from dae_diffusers.plots import image_grid, scale_axis
from dae_diffusers.settings import flat

_MANY_CLASSES = 20


def describe(
    config: Any,
    vae: ModelMixin | None,
    pipeline: DiffusionPipeline | None,
    train: ImageDataset,
    validation: ImageDataset,
    extractor: FeatureExtractor | None,
    accelerator: Accelerator,
    others: Sequence[FeatureExtractor] = (),
    clip: FeatureExtractor | None = None,
) -> dict[str, Any]:
    r"""
    Everything that the numbers depend on; `config` is the script's settings class, `others` are further judges, `clip` is the model of
    the CLIP score.
    """
    parts = ("_class_name", "latent_channels", "block_out_channels")
    packages = ["dae-diffusers", "diffusers", "torch", "transformers", "accelerate", "datasets"]
    packages += [name for name in ("torchmetrics", "torch-fidelity", "lpips") if find_spec(name.replace("-", "_"))]
    return {
        "config": flat(config),
        "local_data": config.data.is_local,
        "pipeline": None if pipeline is None else type(pipeline).__name__,
        "autoencoder": None if vae is None else {name: vae.config.get(name) for name in parts},
        "scheduler": None if pipeline is None else scheduler_options(pipeline),
        "weights": weights_by_part({"vae": vae} if pipeline is None else pipeline.components),
        "features": extractor
        and {
            "name": extractor.name,
            "description": extractor.description,
            "fingerprint": extractor.fingerprint,
            "dim": extractor.feature_dim,
        },
        "more_features": {each.name: each.fingerprint for each in others},
        "clip_model": clip and {"name": clip.name, "description": clip.description, "fingerprint": clip.fingerprint},
        "train_images": {"number": len(train), "fingerprint": train.fingerprint},
        "validation_images": {"number": len(validation), "fingerprint": validation.fingerprint},
        "num_processes": accelerator.num_processes,
        "versions": {name: importlib.metadata.version(name) for name in packages},
    }


def to_markdown(results: dict[str, Any]) -> str:
    r"""The numbers as tables, with their main settings; `metrics.json` holds all settings."""
    lines, setting = judge_lines(results), results["setting"]
    floor = results.get("floor", {})
    for part in [name for name in ("reconstruction", "latent_space", "codebook") if name in results]:
        lines += [f"### {part.replace('_', ' ').capitalize()}", "| metric | value | real images |", "|---|---|---|"]
        lines += [
            f"| {with_arrow(k)} | {v:.5g} | {_to_cell(None if k == 'num_images' else floor.get('reconstruction', {}).get(k))} |"
            for k, v in results[part].items()
            if isinstance(v, (int, float))
        ]
        lines.append("")
    rows = with_floor(results.get("generation", []), floor.get("generation", {}))
    lines += table("Generation", [with_deviation(row) for row in rows])
    if floor:
        lines += [
            "Real images: held-out real images take the place of reconstructions (compared with as many training images) or of samples "
            "(compared with the same images as samples, each class as often as in training if there are enough). If your distance "
            "is no larger, this judge cannot tell your images from real ones. Compare only equal numbers of images.",
            "",
        ]
    if setting["clip_model"]:
        lines += [
            "CLIP score: 100 times the cosine between a sample and the text that it was drawn from; between a real image and its own text. "
            "`clip_chance`: the same images with the texts of all. A model that ignores its text reaches no more than that.",
            "",
        ]
    lines += class_lines(results.get("classes", []), results)
    lines += copies_lines(results.get("generation", []), floor.get("generation", {}))
    number = setting["train_images"]["number"]
    compared = MAX_REFERENCE_IMAGES
    if compared < number and results.get("generation"):
        lines += [
            f"Authenticity and `nearest-*.png` look at {compared} of {number} training images: copies of others are not seen.",
            "",
        ]
    lines += few_images_lines(setting, results)
    shown = {
        "training images": "{number} ({fingerprint})".format(**setting["train_images"]),
        "validation images": "{number} ({fingerprint})".format(**setting["validation_images"]),
        "resolution": setting["config"]["resolution"],
        "features": _judge_in_words(setting["features"]),
        "CLIP model": _judge_in_words(setting["clip_model"]),
        "autoencoder": setting["autoencoder"] and setting["autoencoder"]["_class_name"],
        "pipeline": setting["pipeline"],
        "scheduler": setting["scheduler"] and setting["scheduler"].get("_class_name"),
        "versions": ", ".join(f"{name} {version}" for name, version in setting["versions"].items()),
    }
    lines += ["### Setting", "| what | value |", "|---|---|"]
    lines += [f"| {name} | {value} |" for name, value in shown.items() if value is not None]
    return "\n".join(lines) + "\n"


def _judge_in_words(judge: dict[str, Any] | None) -> str | None:
    return judge and "{name} ({fingerprint}): {description}".format(**judge)


def judge_lines(results: dict[str, Any]) -> list[str]:
    r"""How well the judge knows the classes of held-out images."""
    judge = results.get("judge")
    if not judge:
        return []
    name = results["setting"]["features"]["name"]
    return [
        f"Judge: {name}. A linear classifier on its features finds the class of {judge['judge_accuracy']:.0%} of the held-out images "
        f"(always the same class: {judge['chance']:.0%}). A weak judge overlooks shapeless samples.",
        "",
    ]


def with_floor(rows: list[dict[str, Any]], floor: dict[str, Any]) -> list[dict[str, Any]]:
    r"""The rows of samples; after each, the same of only as many samples as there are held-out images; last, the held-out images."""
    if not rows or not floor:
        return rows
    of_all = ("num_drawings", "inception_score", "classifier_score")
    names = [name for name in rows[0] if name not in floor["real"] and not name.startswith(of_all)]
    names = [name for name in names if not is_deviation(name, rows[0])]
    shown = [{"images": "samples", **row} for row in rows]
    for row, few in zip(rows, floor["samples"], strict=True):
        if row["num_images"] != floor["num_images"]:
            given = {name: row.get(name) for name in names}
            shown.append(
                {"images": "samples", **dict.fromkeys(rows[0]), **given, **few, "num_images": floor["num_images"]}
            )
    real = {**dict.fromkeys(rows[0]), **floor["real"], "num_images": floor["num_images"]}
    return [*shown, {"images": "**real**", **real}]


def class_lines(rows: list[dict[str, Any]], results: dict[str, Any]) -> list[str]:
    r"""The classes that samples are least often of, when they are asked for."""
    if not rows:
        return []
    drawn = sorted((row for row in rows if row["class_agreement"] is not None), key=lambda row: row["class_agreement"])
    name = results["setting"]["features"]["name"]
    some = f", of which the {_MANY_CLASSES} with the least are shown" if len(drawn) > _MANY_CLASSES else ""
    return [
        *table("Classes", drawn[:_MANY_CLASSES]),
        f"Class agreement: the share of samples that a linear classifier on the features of {name}, fitted on training images, takes for "
        f"the class that was asked for{some}. `real`: of held-out images.",
        "",
    ]


def with_deviation(row: dict[str, Any]) -> dict[str, Any]:
    r"""A row with its standard deviations behind their means, instead of in columns of their own."""
    joined = {}
    for name, value in row.items():
        deviation = row.get(f"{name}_sd")
        joined[name] = value if deviation is None else f"{value:.4g} ± {deviation:.2g}"
    return {name: value for name, value in joined.items() if not is_deviation(name, row)}


def copies_lines(rows: list[dict[str, Any]], floor: dict[str, Any]) -> list[str]:
    r"""A warning below the tables if samples lie much nearer to training images than held-out images do."""
    if not rows or not floor:
        return []
    real, number = floor["real"]["authenticity"], floor["num_images"]
    lowest = min(row["authenticity"] for row in rows)
    chance = 3 * math.sqrt(
        max(real * (1 - real), 0.25 / number) / number
    )  # three standard deviations of a share of `number` images
    if lowest >= min(0.8 * real, real - chance):
        return []
    return [
        f"**Warning:** the model repeats training images: {lowest:.0%} of its samples are authentic, but {real:.0%} of held-out "
        "real images, so its distances are too low. Look at `nearest-*.png`; more images, fewer steps or a smaller model help "
        '(docs/planning.md, "Overfitting").',
        "",
    ]


def few_images_lines(setting: dict[str, Any], results: dict[str, Any]) -> list[str]:
    r"""A warning below the tables if distances come from fewer images than the features have dimensions."""
    if not setting["features"]:
        return []
    counts = [setting[images]["number"] for images in ("train_images", "validation_images")]
    counts += [row["num_images"] for row in results.get("generation", [])]
    note = few_images_note(min(counts), setting["features"]["dim"])
    return [] if note is None else [f"**Warning:** {note}", ""]


def table(title: str, rows: list[dict[str, Any]]) -> list[str]:
    r"""Lines of Markdown; none without rows."""
    if not rows:
        return []
    lines = [f"### {title}", f"| {' | '.join(map(with_arrow, rows[0]))} |", "|---" * len(rows[0]) + "|"]
    return [*lines, *(f"| {' | '.join(map(_to_cell, row.values()))} |" for row in rows), ""]


def _to_cell(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.5g}"
    if isinstance(value, list | tuple):
        return " to ".join(map(_to_cell, value))
    return "" if value is None else str(value).replace("|", "\\|")


def plot_sweep(rows: list[dict[str, Any]], distance: str, path: Path) -> None:
    r"""
    Draws the distance against guidance, or against steps if there is only one guidance scale, with a line for each combination of the
    other options. Bars are standard deviations over drawings, if there are several.
    """
    figure = Figure(figsize=(5, 3.5), layout="constrained")
    axis = figure.subplots()
    along = "num_inference_steps" if len({row.get("guidance_scale") for row in rows}) == 1 else "guidance_scale"
    lines: dict[str, list[tuple[float, float, float]]] = {}
    for row in rows:
        others = {name: value for name, value in row.items() if name != along}
        lines.setdefault(words_of_setting(others), []).append((row[along], row[distance], row.get(f"{distance}_sd", 0)))
    for label, points in lines.items():
        places, distances, deviations = zip(*sorted(points), strict=True)
        bars = deviations if any(deviations) else None
        axis.errorbar(places, distances, bars, marker="o", capsize=3, label=label or None)
    scale_axis(axis, [row[distance] for row in rows])
    axis.set_xlabel(along.replace("num_inference_", "").replace("_", " "))
    axis.set_ylabel(with_arrow(distance))
    if along == "num_inference_steps":
        axis.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    if axis.get_legend_handles_labels()[0]:
        axis.legend(frameon=False)
    figure.savefig(path, dpi=120)


def plot_lengths(rows: list[dict[str, Any]], distance: str, path: Path) -> None:
    r"""
    Draws the distance against the length of the averaged weights, a line for each way of drawing; dashed: the weights of the row whose
    `length` is None.
    """
    figure = Figure(figsize=(5, 3.5), layout="constrained")
    axis = figure.subplots()
    for number, way in enumerate(dict.fromkeys(map(words_of_setting, rows))):
        of_way = [row for row in rows if words_of_setting(row) == way]
        points = sorted((row["length"], row[distance]) for row in of_way if row["length"] is not None)
        axis.plot(*zip(*points, strict=True), marker="o", color=f"C{number}", label=way or None)
        for row in (each for each in of_way if each["length"] is None):
            axis.axhline(row[distance], color=f"C{number}", linestyle="--")
    scale_axis(axis, [row[distance] for row in rows])
    axis.set_xlabel("length of the average (dashed: the pipeline as it was)")
    axis.set_ylabel(with_arrow(distance))
    if axis.get_legend_handles_labels()[0]:
        axis.legend(frameon=False)
    figure.savefig(path, dpi=120)


@torch.no_grad()
def draw_reconstructions(vae: ModelMixin, images: ImageDataset, path: Path, count: int = 12) -> None:
    r"""Draws held-out images, their reconstructions, and four times the difference (gray: no difference)."""
    chosen = images.spread(count)
    pixel_values = torch.stack([images[n]["pixel_values"] for n in chosen])
    mean, _ = encode_moments(vae, pixel_values.to(vae.device))
    reconstruction = decode_latents(vae, mean).float().cpu().clamp(-1, 1)
    rows = torch.cat([pixel_values, reconstruction, 4 * (reconstruction - pixel_values)])
    image_grid(
        rows,
        columns=len(chosen),
        row_names=["image", "reconstruction", "4 x difference"],
        column_names=images.class_names_of(chosen),
    ).save(path)


def sample_grid(
    samples: CachedRows, labels: torch.Tensor | None, id2label: dict[int, str] | None = None, rows: int = 8
) -> PILImage.Image:
    r"""A grid of the first samples, a column for each of few classes; the arguments are those of [`save_grids`], and how many rows."""
    found = (
        [] if labels is None else [(labels == label).nonzero().flatten()[:rows].tolist() for label in labels.unique()]
    )
    columns, column_names, chosen = 10, None, range(min(10 * rows, len(samples)))
    if 0 < len(found) <= 20:
        number = min(map(len, found))
        columns, chosen = len(found), [of_class[n] for n in range(number) for of_class in found]
        column_names = id2label and [id2label.get(label, str(label)) for label in labels.unique().tolist()]
    few = torch.cat([samples[n : n + 1] for n in chosen]).float() / 127.5 - 1
    return image_grid(few, columns=columns, column_names=column_names)


def save_grids(
    folder: Path,
    name: str,
    samples: CachedRows,
    labels: torch.Tensor | None,
    train: ImageDataset,
    pairs: list[tuple[int, int]],
    id2label: dict[int, str] | None = None,
) -> None:
    r"""
    Saves a grid of samples, a column for each of few classes, and a grid of those that are most like a training image, above it.

    Args:
        folder (`Path`), name (`str`): Where to: `samples-<name>.png` and `nearest-<name>.png`.
        samples ([`~dae_diffusers.caching.CachedRows`] of shape `(N, C, H, W)`): uint8.
        labels (`torch.Tensor` of shape `(N,)`, *optional*): The class of each sample.
        train ([`~dae_diffusers.data.ImageDataset`]): Training images.
        pairs (`list[tuple[int, int]]`): Numbers of samples and of the training images below them, as
            [`~dae_diffusers.metrics.evaluation.Nearest.most_alike`] gives them.
        id2label (`dict[int, str]`, *optional*): Names of the classes.
    """
    sample_grid(samples, labels, id2label).save(folder / f"samples-{name}.png")
    alike = torch.cat([samples[sample : sample + 1] for sample, _ in pairs]).float() / 127.5 - 1
    nearest = torch.stack([train[image]["pixel_values"] for _, image in pairs])
    rows = torch.cat([alike, nearest])
    image_grid(rows, columns=len(pairs), row_names=["sample", "nearest"]).save(folder / f"nearest-{name}.png")
