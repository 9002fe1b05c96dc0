"""Curves of several runs in shared panels, and their newest grids side by side."""

import math
from collections.abc import Iterator, Sequence
from pathlib import Path

from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from PIL import Image, ImageDraw, ImageFont

from dae_diffusers.compared_runs.reading import Run
from dae_diffusers.directions import with_arrow
from dae_diffusers.evaluation_record import name_of_setting
from dae_diffusers.hub.results import latest_grid
from dae_diffusers.plots import scale_axis

_COLUMNS = 4
_STYLES = ("-", "--", ":", "-.")  # of ten runs each, which have the ten colours
_SIDE, _GAP, _FONT_SIZE = 800, 12, 16  # pixels

_ORDER = ("validation", "train", "latents")
_GRIDS = {
    "train_dae": "reconstruction-*.png",  # stage 2 comes last
    "train_dit": "samples-*.png",
    "train_vqgan_prior": "samples-*.png",
    "train_dae_stage3": "generated-stage3-*.png",
}


def figure_of_runs(runs: Sequence[Run]) -> Figure | None:
    r"""
    A panel for each number that at least two runs have logged, or that a single run has, with a line for each run. None without such
    numbers.
    """
    curves: dict[tuple[str, str], dict[int, list[tuple[int, float]]]] = {}
    for number, run in enumerate(runs):
        for script, of in run.scripts.items():
            for name in of.logged:
                curves.setdefault((script, name), {})[number] = of.curve(name)
    panels = sorted((key for key, of in curves.items() if len(of) >= min(2, len(runs))), key=_place)
    if not panels:
        return None
    num_rows = math.ceil(len(panels) / _COLUMNS)
    figure = Figure(figsize=(16, 3 * num_rows + 0.3 + 0.2 * len(runs) / 4), layout="constrained")
    several = len({script for script, _ in panels}) > 1
    lines = {}
    for place, (script, name) in enumerate(panels, start=1):
        axis = figure.add_subplot(num_rows, _COLUMNS, place)
        for number, points in curves[script, name].items():
            (lines[number],) = axis.plot(
                *zip(*points, strict=True), color=f"C{number % 10}", linestyle=_STYLES[number // 10 % len(_STYLES)],
                marker="." if len(points) < 12 else None, linewidth=1.2,
            )  # fmt: skip
        scale_axis(axis, [value for points in curves[script, name].values() for _, value in points])
        metric = name.removeprefix("validation/") if name.startswith("validation/") else ""
        axis.set_title((f"{script}: " if several else "") + with_arrow(metric, name), fontsize=10)
        axis.set_xlabel("step", fontsize=8)
        axis.xaxis.set_major_locator(MaxNLocator(6, integer=True, min_n_ticks=1))
        axis.tick_params(labelsize=8)
    shown = sorted(lines)
    figure.legend(
        [lines[n] for n in shown], [runs[n].name for n in shown], loc="outside upper center", ncols=4, frameon=False
    )
    return figure


def _place(key: tuple[str, str]) -> tuple[int, int]:
    """Where the panel of a number belongs: scripts in their order, the validation first. The sort keeps the order of the log."""
    kind = key[1].partition("/")[0]
    return list(_GRIDS).index(key[0]), _ORDER.index(kind) if kind in _ORDER else len(_ORDER)


def side_by_side(runs: Sequence[Run]) -> Image.Image | None:
    r"""A column for each run, a row for each kind of picture that at least two runs, or a single one, have; None without pictures."""
    found = [dict(_pictures_of(run)) for run in runs]
    kinds = dict.fromkeys(kind for each in found for kind in each)
    kinds = [kind for kind in kinds if sum(kind in each for each in found) >= min(2, len(runs))]
    pictures = {(kind, n): _fitting(each[kind]) for kind in kinds for n, each in enumerate(found) if kind in each}
    if not pictures:
        return None
    columns = [n for n in range(len(runs)) if any((kind, n) in pictures for kind in kinds)]
    widths = [max(each.width for (_, n), each in pictures.items() if n == column) for column in columns]
    heights = [max(each.height for (kind, _), each in pictures.items() if kind == row) for row in kinds]
    text_height = _FONT_SIZE + 8
    size = (sum(widths) + _GAP * (len(widths) - 1), sum(heights) + (text_height + _GAP) * len(heights))
    sheet = Image.new("RGB", size, "white")
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(_FONT_SIZE)
    for row, kind in enumerate(kinds):
        top = sum(heights[:row]) + (text_height + _GAP) * row
        for place, column in enumerate(columns):
            left = sum(widths[:place]) + _GAP * place
            if (kind, column) in pictures:
                text = f"{runs[column].name}: {found[column][kind].stem if kind in _GRIDS else kind}"
                draw.text((left, top), text, "black", font)
                sheet.paste(pictures[kind, column], (left, top + text_height))
    return sheet


def _pictures_of(run: Run) -> Iterator[tuple[str, Path]]:
    for name, script in run.scripts.items():
        if (newest := latest_grid(script.folder, _GRIDS[name])) is not None:
            yield name, newest
    if run.evaluation is None:
        return
    names = {"evaluate, reconstructions": "reconstructions.png"}
    names["evaluate, samples"] = f"samples-{name_of_setting(run.evaluation.best)}.png"
    for kind, name in names.items():
        if (path := run.evaluation.folder / name).exists():
            yield kind, path


def _fitting(path: Path) -> Image.Image:
    picture = Image.open(path).convert("RGB")
    picture.thumbnail((_SIDE, _SIDE))
    return picture
