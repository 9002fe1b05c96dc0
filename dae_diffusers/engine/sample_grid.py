"""Draws the picture of samples that a run shows at each validation."""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from diffusers import DiffusionPipeline
from PIL import Image

from dae_diffusers.data.condition_values import as_call, in_words
from dae_diffusers.plots import image_grid
from dae_diffusers.randomness import Stream, derived_seed


def draw_sample_grid(
    pipeline: DiffusionPipeline,
    *,
    num_classes: int | None,
    num_images: int,
    batch_size: int,
    seed: int,
    prompts: Sequence[str] | None = None,
    classes: Sequence[int] | None = None,
    conditions: Sequence[dict[str, Any]] | None = None,
    **options: Any,
) -> Image.Image:
    r"""
    Draws a grid from the same noise every time, a column for each class or a row for each prompt or condition.

    Args:
        pipeline (`DiffusionPipeline`): Takes `class_labels`, `num_images_per_label`, `generator` and `output_type`.
        num_classes (`int` or `None`): Number of classes; None without labels.
        num_images, batch_size (`int`): Images in the grid, and images drawn at once.
        seed (`int`): Seed of the run.
        prompts (sequence of `str`, *optional*): For a pipeline that draws from text.
        classes (sequence of `int`, *optional*): The class of each prompt or condition, for a pipeline that also has classes.
        conditions (sequence of `dict`, *optional*): What else to draw from, in each row.
        options: Other arguments of the pipeline's call.
    """
    given: dict[str, Sequence] = {}
    columns = names = row_names = None
    if prompts is not None or conditions is not None:
        given = {"prompt": prompts, "class_labels": classes, "conditions": conditions}
        given = {name: values for name, values in given.items() if values is not None}
        count = len(conditions if prompts is None else prompts)
        columns = max(1, num_images // count)
        num_images = columns * count
        row_names = [_row_name(pipeline, {name: values[n] for name, values in given.items()}) for n in range(count)]
        given = {name: [value for value in values for _ in range(columns)] for name, values in given.items()}
    elif num_classes is not None:
        given = {"class_labels": [n % num_classes for n in range(num_images)]}
        if num_classes <= 20:
            columns, names = num_classes, getattr(pipeline, "id2label", None)
    images = _draw(pipeline, given, num_images, batch_size, seed, options)
    pictures = [value for row in conditions or () for value in row.values() if isinstance(value, torch.Tensor)]
    if pictures:  # each before the images that were drawn from it
        images, columns = _after(pictures, images), columns + 1
    return image_grid(
        images,
        columns=columns,
        column_names=[names[key] for key in sorted(names)] if names else None,
        row_names=row_names,
    )


def _draw(
    pipeline: DiffusionPipeline,
    given: dict[str, Sequence],
    num_images: int,
    batch_size: int,
    seed: int,
    options: dict[str, Any],
) -> torch.Tensor:
    """Images `(N, C, H, W)` in [-1, 1], from the values that are given for each of them."""
    generators = [torch.Generator().manual_seed(derived_seed(seed, Stream.SAMPLE_GRID, n)) for n in range(num_images)]
    pipeline.set_progress_bar_config(disable=True)
    images = []
    for start in range(0, num_images, batch_size):
        chosen = slice(start, start + batch_size)
        arguments = {name: values[chosen] for name, values in given.items()}
        if "conditions" in arguments:
            arguments["conditions"] = as_call(arguments["conditions"])
        images.append(
            pipeline(
                **{"class_labels": None, **arguments},
                num_images_per_label=1 if arguments else len(generators[chosen]),
                generator=generators[chosen],
                output_type="pt",
                **options,
            ).images
        )
    return torch.cat(images) * 2 - 1


def _after(pictures: list[torch.Tensor], images: torch.Tensor) -> torch.Tensor:
    """Images `(N, C, H, W)` in [-1, 1], each row of them behind a picture `(c, h, w)` in [0, 1]."""
    channels = images.shape[1]
    pictures = 2 * torch.stack(pictures).to(images) - 1
    pictures = F.interpolate(pictures, images.shape[2:], mode="nearest-exact")
    if pictures.shape[1] != channels:
        pictures = pictures.mean(1, keepdim=True).expand(-1, channels, -1, -1)
    rows = images.unflatten(0, (len(pictures), -1))
    return torch.cat((pictures[:, None], rows), dim=1).flatten(0, 1)


def _row_name(pipeline: DiffusionPipeline, row: dict[str, Any]) -> str:
    """What a row of a grid is drawn from, in words: a prompt, or a class, and conditions."""
    names = getattr(pipeline, "id2label", None) or {}
    first = row["prompt"] if "prompt" in row else names.get(row.get("class_labels"))
    return _short(", ".join(filter(None, (first, in_words(row.get("conditions", {}))))))


def _short(text: str) -> str:
    return text if len(text) <= 32 else f"{text[:29]}..."
