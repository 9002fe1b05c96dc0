"""Pictures of a run: image grids and loss curves."""

import math
import re
from pathlib import Path

import numpy as np
import torch
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from PIL import Image, ImageDraw, ImageFont

_SMALLEST = 64  # pixels of a side; smaller images are enlarged by a whole factor
_GAP = 2
_FONT_SIZE = 14
_SMALLEST_FONT = 9

# Curves that share a panel, in order. Any other curve has its own panel.
_PANELS = {
    "loss": r"(train|validation)/loss",
    "reconstruction": r"train/reconstruction_loss|validation/l1",
    "PSNR in dB": r".*/psnr",
    "SSIM": r".*/ssim",
    "other losses": r"train/(?!discriminator|adversarial).*_loss",
    "discriminator": r"train/(discriminator_loss|adversarial_loss|logits_.*|discriminator_accuracy)",
    "adaptive weights": r"train/.*adaptive_weight",
    "codebook usage": r".*/codebook_usage",
    "codebook perplexity": r".*/codebook_perplexity",
    "latents: shares": r"latents/.*(share|ratio)",
    "latents: size and shape": r"latents/(std|kl|excess_kurtosis)",
    "learning rate": r"train/learning_rate",
    "gradient norm": r"train/gradient_norm",
}


def image_grid(
    images: torch.Tensor,
    *,
    columns: int | None = None,
    row_names: list[str] | None = None,
    column_names: list[str] | None = None,
) -> Image.Image:
    r"""
    Lays images out in rows; those below 64 pixels are enlarged by a whole factor.

    Args:
        images (`torch.Tensor` of shape `(N, C, H, W)`): Images in [-1, 1] (clamped). With other than 1 or 3 channels, the first
            three, or the first, are shown.
        columns (`int`, *optional*): Images in a row; by default the grid is as square as possible.
        row_names, column_names (`list[str]`, *optional*): Written before the rows, and above the columns.

    Returns:
        `PIL.Image.Image`: The grid; missing places of the last row are white.
    """
    if images.shape[1] not in (1, 3):
        images = images[:, : 3 if images.shape[1] > 3 else 1]
    count, channels, height, width = images.shape
    columns = columns or math.ceil(math.sqrt(count))
    rows = math.ceil(count / columns)
    pixels = ((images.float().cpu().clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8).permute(0, 2, 3, 1).numpy()
    factor = max(1, math.ceil(_SMALLEST / min(height, width)))
    pixels = pixels.repeat(factor, axis=1).repeat(factor, axis=2)
    height, width = height * factor + _GAP, width * factor + _GAP
    sheet = np.full((rows * height - _GAP, columns * width - _GAP, channels), 255, np.uint8)
    for number, picture in enumerate(pixels):
        top, left = number // columns * height, number % columns * width
        sheet[top : top + height - _GAP, left : left + width - _GAP] = picture
    grid = Image.fromarray(sheet[..., 0] if channels == 1 else sheet)
    return _with_names(grid, row_names or [], column_names or [], height, width)


def _with_names(grid: Image.Image, rows: list[str], columns: list[str], height: int, width: int) -> Image.Image:
    """A grid with names left of its rows and above its columns; long ones of columns get a smaller font, or are cut."""
    if not rows and not columns:
        return grid
    font = ImageFont.load_default(_FONT_SIZE)
    left = 8 + max((math.ceil(font.getlength(name)) for name in rows), default=-8)
    top = _FONT_SIZE + 6 if columns else 0
    sheet = Image.new(grid.mode, (grid.width + left, grid.height + top), "white")
    sheet.paste(grid, (left, top))
    draw = ImageDraw.Draw(sheet)
    for number, name in enumerate(rows):
        draw.text((0, top + number * height + height // 2), name, "black", font, anchor="lm")
    for number, name in enumerate(columns):
        name, font = _fitting(name, width)
        draw.text((left + number * width + width // 2, 2), name, "black", font, anchor="ma")
    return sheet


def _fitting(name: str, width: int) -> tuple[str, ImageFont.FreeTypeFont]:
    """A name and a font in which it is at most so wide."""
    for size in range(_FONT_SIZE, _SMALLEST_FONT - 1, -1):
        font = ImageFont.load_default(size)
        if font.getlength(name) <= width:
            return name, font
    while name and font.getlength(f"{name}...") > width:
        name = name[:-1]
    return f"{name}...", font


def plot_curves(
    history: list[dict[str, float]], path: Path, *, title: str, marks: dict[str, int] | None = None
) -> None:
    r"""
    Draws every logged value against the step. Related values share a panel; there are no empty panels.

    Args:
        history (`list[dict]`): Rows with `step` and any number of values.
        path (`Path`): The PNG to write, of at most 1600 x 1000 pixels.
        title (`str`): Over the panels.
        marks (`dict[str, int]`, *optional*): Steps to mark with a named vertical line.
    """
    figure = figure_of_curves(history, title=title, marks=marks or {})
    if figure.axes:
        figure.savefig(path, dpi=100)


def figure_of_curves(history: list[dict[str, float]], *, title: str, marks: dict[str, int]) -> Figure:
    r"""Makes the figure that [`plot_curves`] saves."""
    lines: dict[str, list[tuple[int, float]]] = {}
    for row in history:
        for name, value in row.items():
            if name != "step" and math.isfinite(value):
                lines.setdefault(name, []).append((row["step"], value))
    panels: dict[str, list[str]] = {}
    for name in lines:
        panels.setdefault(_panel_of(name), []).append(name)
    order = [*_PANELS, *panels]
    columns = max(1, min(4, math.ceil(math.sqrt(len(panels)))))
    rows = math.ceil(len(panels) / columns)
    figure = Figure(figsize=(16, min(10, 3.3 * rows + 0.6)), layout="constrained")
    figure.suptitle(title)
    for number, panel in enumerate(sorted(panels, key=order.index), start=1):
        axis = figure.add_subplot(rows, columns, number)
        for name in panels[panel]:
            steps, values = zip(*lines[name], strict=True)
            axis.plot(steps, values, label=name, marker="." if len(steps) < 12 else None, linewidth=1.2)
        for name, step in marks.items():
            axis.axvline(step, color="0.7", linestyle=":", label=name)
        scale_axis(axis, [value for name in panels[panel] for _, value in lines[name]])
        axis.set_title(panel, fontsize=10)
        axis.set_xlabel("step", fontsize=8)
        axis.xaxis.set_major_locator(MaxNLocator(6, integer=True, min_n_ticks=1))
        axis.tick_params(labelsize=8)
        axis.legend(fontsize=7, frameon=False)
    return figure


def _panel_of(name: str) -> str:
    for panel, pattern in _PANELS.items():
        if re.fullmatch(pattern, name):
            return panel
    return name.replace("_", " ")


def scale_axis(axis, values: list[float]) -> None:
    r"""Makes a large range logarithmic, and keeps a tiny range from filling the whole panel."""
    low, high = min(values), max(values)
    if low > 0 and high > 30 * low:
        axis.set_yscale("log")
    elif high - low < 0.05 * max(abs(low), abs(high)):
        middle, half = (low + high) / 2, 0.05 * max(abs(low), abs(high))
        axis.set_ylim(middle - half, middle + half)
