"""The results of a measurement of the complexity distance: a row for each generator, in memory and in a file."""

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from dae_diffusers.complexity.settings import ComplexityConfig, ComplexityForm
from dae_diffusers.store import keep_row, kept_rows


@dataclass(frozen=True)
class ComplexityRow:
    r"""
    One generator, trained and measured on the held-out images.

    Attributes:
        form (`str`): `paired` or `unpaired`.
        capacity (`int` or `None`): Width of the generator; `None` is the autoencoder's own decoder, which is only measured
            here.
        seed (`int`): Seed of generator and critic.
        num_parameters (`int` or `None`): Parameters of the generator; None for the autoencoder's decoder.
        seconds (`float`): Wall time of training and measuring.
        values (`dict[str, float]`): For `paired`: `mse`, the mean squared error of a pixel's value, images in [-1, 1];
            `variance_left`, the same divided by the data's variance: 1 for a latent without information. For
            `unpaired`: `wasserstein`, the estimated distance in the unit of `sqrt(mse)`, which may come out slightly
            below 0 if there is nothing to find; `std_left`, the same divided by the root of the data's variance. For
            both, with a feature extractor: `frechet_distance` between the features of the generator's images and of
            the held-out ones.
    """

    form: ComplexityForm
    capacity: int | None
    seed: int
    num_parameters: int | None
    seconds: float
    values: dict[str, float]


@dataclass(frozen=True)
class ComplexityResult:
    r"""
    All rows of a measurement.

    Attributes:
        config ([`ComplexityConfig`]): How it was measured.
        rows (`tuple[ComplexityRow, ...]`): In the order form, capacity (the decoder last), seed.
        data_variance (`float`): Mean squared distance of a held-out pixel's value from the mean of its channel.
        num_train_images, num_eval_images (`int`): Images trained on and held out.
        latent_shape, image_shape (`tuple[int, int, int]`): Channels, height and width.
    """

    config: ComplexityConfig
    rows: tuple[ComplexityRow, ...]
    data_variance: float
    num_train_images: int
    num_eval_images: int
    latent_shape: tuple[int, int, int]
    image_shape: tuple[int, int, int]

    @property
    def summary(self) -> list[dict[str, Any]]:
        r"""
        Statistics over the seeds: a dictionary for each form and capacity.

        For every value of the rows: its mean under its name, `<name>_std` (of a sample; None with one seed) and
        `<name>_min` (a minimum over generators is sought, so that the best seed is the tightest bound). With the
        decoder's rows, for every capacity: `<name>_ratio` and `<name>_difference` of the mean and the decoder's.
        """
        summary = []
        for form in self.config.forms:
            of_form = [row for row in self.rows if row.form == form]
            means = {}
            for capacity in dict.fromkeys(row.capacity for row in of_form):
                rows = [row for row in of_form if row.capacity == capacity]
                entry = {"form": form, "capacity": capacity, "num_parameters": rows[0].num_parameters}
                entry["num_seeds"] = len(rows)
                for name in rows[0].values:
                    values = torch.tensor([row.values[name] for row in rows], dtype=torch.float64)
                    entry[name] = values.mean().item()
                    entry[f"{name}_std"] = values.std().item() if len(rows) > 1 else None
                    entry[f"{name}_min"] = values.min().item()
                means[capacity] = {name: entry[name] for name in rows[0].values}
                summary.append(entry)
            for entry in summary:
                if entry["form"] == form and entry["capacity"] is not None and None in means:
                    for name, reference in means[None].items():
                        entry[f"{name}_ratio"] = entry[name] / reference if reference > 0 else None
                        entry[f"{name}_difference"] = entry[name] - reference
        return summary

    def to_dict(self) -> dict[str, Any]:
        r"""Everything, the summary included, in types that JSON knows."""
        return {**asdict(self), "summary": self.summary}


def read_rows(path: Path) -> dict[tuple, ComplexityRow]:
    r"""
    Finished rows by key, form, capacity and seed. Rows that are damaged, cut off or of an older version are removed.

    Raises:
        UserError: If the file holds something else.
    """
    rows = {}
    for key, values in kept_rows(path):
        row = ComplexityRow(**values)
        rows[key, row.form, row.capacity, row.seed] = row
    return rows


def append_row(path: Path, key: str, row: ComplexityRow) -> None:
    r"""Adds a finished row under its key."""
    keep_row(path, asdict(row), key)
