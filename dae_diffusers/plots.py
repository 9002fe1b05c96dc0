"""Pictures of a run: image grids and loss curves."""

import math
from pathlib import Path

import numpy as np
import torch
from matplotlib.figure import Figure
from PIL import Image

_MIN_SIZE = 64  # pixels of an image in a grid


def image_grid(images: torch.Tensor, *, columns: int | None = None) -> Image.Image:
    r"""
    Lays images out in rows.

    Args:
        images (`torch.Tensor` of shape `(N, C, H, W)`): In [-1, 1] (clamped), `C` 1 or 3; of another number the first three,
            or the first, are shown.
        columns (`int`, *optional*): Images in a row; by default as square as it gets.

    Returns:
        `PIL.Image.Image`: Images below 64 pixels are enlarged by a whole factor; missing places of the last row are white.
    """
    if images.shape[1] not in (1, 3):
        images = images[:, : 3 if images.shape[1] > 3 else 1]
    count, channels, height, width = images.shape
    columns = columns or math.ceil(math.sqrt(count))
    rows = math.ceil(count / columns)
    pixels = ((images.float().cpu().clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8).permute(0, 2, 3, 1).numpy()
    factor = max(1, math.ceil(_MIN_SIZE / min(height, width)))
    pixels = pixels.repeat(factor, axis=1).repeat(factor, axis=2)
    gap = 2
    sheet = np.full(
        (rows * (height * factor + gap) - gap, columns * (width * factor + gap) - gap, channels), 255, np.uint8
    )
    for number, picture in enumerate(pixels):
        top = number // columns * (height * factor + gap)
        left = number % columns * (width * factor + gap)
        sheet[top : top + height * factor, left : left + width * factor] = picture
    return Image.fromarray(sheet[..., 0] if channels == 1 else sheet)


def plot_curves(history: list[dict[str, float]], path: Path, *, title: str, marks: dict[str, int] | None = None):
    r"""
    Draws every logged value against the step, a panel each; values of `train/x` and `validation/x` share one.

    Args:
        history (`list[dict]`): Rows with `step` and any number of values.
        path (`Path`): The PNG to write.
        title (`str`): Over the panels.
        marks (`dict[str, int]`, *optional*): Steps to mark with a named vertical line.
    """
    panels: dict[str, dict[str, list[tuple[int, float]]]] = {}
    for row in history:
        for name, value in row.items():
            if name != "step":
                part, _, quantity = name.rpartition("/")
                panels.setdefault(quantity, {}).setdefault(part, []).append((row["step"], value))
    if not panels:
        return
    columns = min(3, len(panels))
    rows = math.ceil(len(panels) / columns)
    figure = Figure(figsize=(4.6 * columns, 3.0 * rows + 0.4), layout="constrained")
    figure.suptitle(title)
    axes = figure.subplots(rows, columns, squeeze=False).flat
    for axis, (quantity, parts) in zip(axes, panels.items(), strict=False):
        for part, points in parts.items():
            steps, values = zip(*points, strict=True)
            axis.plot(steps, values, label=part, marker="." if len(steps) < 12 else None, linewidth=1.2)
        values = [value for points in parts.values() for _, value in points if math.isfinite(value)]
        if values and min(values) > 0 and max(values) > 30 * min(values):
            axis.set_yscale("log")
        for name, step in (marks or {}).items():
            axis.axvline(step, color="0.7", linestyle=":", label=name)
        axis.set_title(quantity.replace("_", " "), fontsize=10)
        axis.set_xlabel("step", fontsize=8)
        axis.tick_params(labelsize=8)
        axis.legend(fontsize=7, frameon=False)
    for axis in list(axes):
        axis.set_visible(False)
    figure.savefig(path, dpi=110)
