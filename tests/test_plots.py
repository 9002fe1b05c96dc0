"""Pictures say what they show."""

import numpy as np
import pytest
import torch

from dae_diffusers.plots import _fitting, figure_of_curves, image_grid, plot_curves


@pytest.fixture(scope="module")
def history():
    names = ("train/loss", "validation/loss", "train/kl_loss", "latents/std", "train/my_value", "validation/psnr")
    return [{"step": step, **{name: 1.0 + step for name in names}} for step in (1, 2, 3)]


def test_curves_that_belong_together_share_a_panel_and_no_panel_is_empty(history, tmp_path):
    figure = figure_of_curves(history, title="run", marks={"end of stage 1": 2})
    panels = {axis.get_title(): {line.get_label() for line in axis.get_lines()} for axis in figure.axes}
    assert panels["loss"] == {"train/loss", "validation/loss", "end of stage 1"}
    assert panels["train/my value"] == {"train/my_value", "end of stage 1"}
    assert len(panels) == 5 and all(len(lines) > 1 for lines in panels.values())
    plot_curves([], tmp_path / "none.png", title="run")
    assert not (tmp_path / "none.png").exists()


def test_range_that_hardly_differs_is_not_stretched(history):
    rows = [{"step": step, "validation/psnr": value} for step, value in ((1, 23.610), (2, 23.647))]
    (axis,) = figure_of_curves(rows, title="run", marks={}).axes
    low, high = axis.get_ylim()
    assert high - low > 2


def test_names_are_written_beside_the_images_and_leave_them_as_they_are():
    images = torch.rand(6, 3, 64, 64) * 2 - 1
    plain, named = (
        np.asarray(image_grid(images, columns=3, **names))
        for names in ({}, {"row_names": ["image", "reconstruction"], "column_names": ["a", "b", "c" * 99]})
    )
    height, width, _ = plain.shape
    assert np.array_equal(named[-height:, -width:], plain)
    assert (named[:-height] < 128).any() and (named[:, :-width] < 128).any()


def test_names_that_are_too_long_get_a_smaller_font_and_then_are_cut():
    whole, small, cut = (_fitting(name, 64) for name in ("cat", "automobile!", "c" * 99))
    assert whole[0] == "cat" and small[0] == "automobile!" and cut[0].endswith("ccc...")
    assert whole[1].size > small[1].size > cut[1].size
    assert all(font.getlength(name) <= 64 for name, font in (whole, small, cut))
