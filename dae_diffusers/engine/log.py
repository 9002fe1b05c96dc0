"""What a run writes while it trains: mean losses, curves, grids of images, trackers."""

import json
import logging
import math
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.tracking import GeneralTracker
from accelerate.utils import gather_object
from PIL import Image

from dae_diffusers.plots import plot_curves
from dae_diffusers.store import read_json_or, read_rows, write_atomically, write_json

logger = logging.getLogger(__name__)


class RunLog:
    r"""
    `log.jsonl`, `curves.png` and `grids/` in a run's folder, and the trackers of its accelerator.

    Args:
        accelerator ([`~accelerate.Accelerator`]): The run's accelerator.
        folder (`Path`): Folder of the script's own files.
        title (`str`): Title of the curves.
        skips_nonfinite (`bool`, *optional*): Whether values that are not finite are left out of the means.
    """

    def __init__(self, accelerator: Accelerator, folder: Path, title: str, *, skips_nonfinite: bool = False):
        self.accelerator = accelerator
        self.folder = folder
        self.title = title
        self.skips_nonfinite = skips_nonfinite
        self._sums: dict[str, torch.Tensor] = {}
        self._counts: dict[str, int] = {}
        self._marks: dict[str, int] = {}
        self._has_warned = False

    def begin(
        self, step: int, project: str, name: str, settings: dict[str, Any], rows_of_step: int | None = None
    ) -> None:
        r"""
        Drops the rows and the pictures after `step` from an earlier log, and starts the trackers.

        Args:
            step (`int`): Where the run begins.
            project, name (`str`): What trackers call the project and the run in it. A resumed run goes on under its name.
            settings (`dict`): What they show as the run's settings.
            rows_of_step (`int`, *optional*): How many rows of `step` stay, from the first on; default: all.
        """
        if self.accelerator.is_main_process:
            log = read_log(self.folder)
            rows = [row for row in log if row["step"] < step]
            rows += [row for row in log if row["step"] == step][:rows_of_step]
            text = "".join(json.dumps(row) + "\n" for row in rows)
            write_atomically(self.folder / "log.jsonl", text)
            for path in (self.folder / "grids").glob("*-*.png"):  # else they would be taken for the newest
                if (number := path.stem.rpartition("-")[2]).isdecimal() and int(number) > step:
                    path.unlink()
        if self.accelerator.log_with:
            self._guard(
                lambda: self.accelerator.init_trackers(
                    project, config=settings, init_kwargs=self._tracker_options(name, is_new=step == 0)
                )
            )

    def rows_of(self, step: int) -> int:
        r"""How many rows the log has of a step, as this process sees it."""
        return sum(row["step"] == step for row in read_log(self.folder))

    def mark(self, name: str, step: int) -> None:
        r"""Marks a step in `curves.png`, such as the border between two stages."""
        self._marks[name] = step

    def add(self, **values: torch.Tensor) -> None:
        r"""Adds the values of one micro-batch to the means that [`write_means`] writes. They stay on the device until then."""
        for name, value in values.items():
            value, count = value.detach(), 1
            if self.skips_nonfinite:  # what belongs to an update that is left out does not count
                count = torch.isfinite(value).int()
                value = torch.where(count > 0, value, 0)
            self._sums[name] = self._sums[name] + value if name in self._sums else value.clone()
            self._counts[name] = self._counts.get(name, 0) + count

    def write_means(self, step: int, **values: float | torch.Tensor) -> dict[str, float]:
        r"""
        Logs the means, over all processes, of the values added since the last call, together with `values`. One that was never finite
        has no mean.
        """
        totals = self.accelerator.reduce(self._pairs(), reduction="mean")
        means = {f"train/{k}": float(total / count) for k, (total, count) in totals.items() if count > 0}
        self._sums, self._counts = {}, {}
        means.update({f"train/{k}": float(v) for k, v in values.items() if math.isfinite(v)})
        self.write(means, step)
        return means

    def write(self, values: dict[str, float], step: int) -> None:
        r"""Writes values to `log.jsonl` and the trackers. A tracker that fails is reported once and left alone."""
        if self.accelerator.is_main_process:
            with (self.folder / "log.jsonl").open("a") as file:
                file.write(json.dumps({"step": step, **values}) + "\n")
        for tracker in list(self.accelerator.trackers):
            self._guard(lambda tracker=tracker: tracker.log(values, step=step), tracker)

    def check_overfitting(self, loss: float, step: int) -> None:
        r"""Warns once if the validation loss has risen for good: the model learns its training images by heart."""
        if self._has_warned:
            return
        rows = read_log(self.folder)
        losses = [(row["validation/loss"], row["step"]) for row in rows if "validation/loss" in row]
        lowest, then = min(losses, default=(loss, step))
        trained = [row["train/loss"] for row in rows if "train/loss" in row and row["step"] >= then]
        if loss < 1.05 * lowest or len(trained) < 2 or trained[-1] > trained[0]:  # if both rise, it diverges
            return
        self._has_warned = True
        logger.warning(
            "step %d: the validation loss is %.4g, but was %.4g at step %d. The model begins to learn its training images by heart, and "
            "samples will repeat them. Stop (`early_stopping_patience`) and keep the weights of then (`export best`), or use more images, "
            "`random_flip` or a smaller model: docs/planning.md, \"Overfitting\".",
            step, loss, lowest, then,
        )  # fmt: skip

    def write_grid(self, name: str, grid: Image.Image, step: int) -> None:
        r"""Saves a picture as `grids/<name>-<step>.png` and shows it in every tracker that can."""
        if not self.accelerator.is_main_process:
            return
        folder = self.folder / "grids"
        folder.mkdir(exist_ok=True)
        grid.save(folder / f"{name}-{step:08d}.png")
        for tracker in list(self.accelerator.trackers):
            self._guard(lambda tracker=tracker: _log_image(tracker, name, grid, step), tracker)

    def draw_curves(self) -> None:
        r"""Draws `curves.png` from the whole log."""
        if self.accelerator.is_main_process:
            plot_curves(read_log(self.folder), self.folder / "curves.png", title=self.title, marks=self._marks)

    def finish(self) -> None:
        r"""Closes the trackers."""
        for tracker in list(self.accelerator.trackers):
            self._guard(tracker.finish, tracker)
        self.accelerator.trackers = []

    def state(self) -> dict[str, Any]:
        r"""The sums for the next means: for each value the sum and count of every process, as JSON can hold them. All processes call it."""
        mine = {name: pair.tolist() for name, pair in self._pairs().items()}
        shares = gather_object([mine])
        return {"log_sums": {name: [share[name] for share in shares] for name in mine}}

    def load_state(self, sums: dict[str, Any], counts: dict[str, float] | None = None) -> None:
        r"""
        Continues from a [`state`]. If there were more or fewer processes then, each gets the mean of their sums. An earlier version
        saved that mean, and `counts` apart.
        """
        for name, shares in sums.items():
            if not isinstance(shares, list):
                shares = [[shares, counts[name]]]
            is_mine = len(shares) == self.accelerator.num_processes
            pair = shares[self.accelerator.process_index] if is_mine else np.mean(shares, axis=0).tolist()
            self._sums[name], self._counts[name] = torch.tensor(pair[0], device=self.accelerator.device), pair[1]

    def _pairs(self) -> dict[str, torch.Tensor]:
        """Sum and count of each value on this process."""
        return {
            name: torch.stack(
                (total.float(), torch.as_tensor(self._counts[name], dtype=torch.float32, device=total.device))
            )
            for name, total in self._sums.items()
        }

    def _tracker_options(self, name: str, *, is_new: bool) -> dict[str, dict[str, Any]]:
        """What each tracker is started with, so that a resumed run goes on in its chart."""
        path = self.folder / "tracker.json"
        known = None if is_new else read_json_or(path, {}).get("id")
        identity = known or uuid.uuid4().hex[:16]
        if self.accelerator.is_main_process and identity != known:
            write_json(path, {"id": identity})
        return {
            # Without `dir` it writes into the working directory.
            "wandb": {"name": name, "id": identity, "resume": "allow", "dir": str(self.folder)},
            "trackio": {"name": f"{name}-{identity[:4]}", "resume": "allow"},
            "mlflow": {"run_name": name},
            "swanlab": {"experiment_name": name, "id": identity, "resume": "allow", "logdir": str(self.folder)},
        }

    def _guard(self, call: Callable[[], Any], tracker: GeneralTracker | None = None) -> None:
        """Calls something of a tracker, or of all. One that fails is left out from then on; the others go on."""
        try:
            call()
        except Exception as error:  # a tracker may fail in any way; the run must not
            self.accelerator.trackers = [each for each in self.accelerator.trackers if tracker not in (None, each)]
            name = "" if tracker is None else f" {tracker.name}"
            logger.warning(
                "the tracker%s failed (%s: %s); training continues without it.", name, type(error).__name__, error
            )


def read_log(folder: Path) -> list[dict[str, float]]:
    r"""The rows of a run's `log.jsonl`; a last line that a kill cut short is left out."""
    return read_rows(folder / "log.jsonl", step=int)


def _log_image(tracker, name: str, image: Image.Image, step: int) -> None:
    if tracker.name == "trackio":  # accelerate's tracker for it has no `log_images`
        import trackio

        tracker.log({name: trackio.Image(image)}, step=step)
    elif tracker.name == "tensorboard":
        tracker.log_images({name: np.asarray(image.convert("RGB"))[None]}, step=step, dataformats="NHWC")
    elif hasattr(tracker, "log_images"):
        tracker.log_images({name: [image]}, step=step)
