"""
Which solver and which grid of noise levels are best at few denoising steps? Draws the same images (the same noise and classes)
from a flow-matching pipeline with each, and writes a table of Fréchet distances to the training images, and a picture:

    python benchmarks/solvers.py runs/mine/pipeline --dataset_name digits --features runs/mine/classifier --output_dir runs/solvers

A function evaluation is one call of the transformer for an image (two with guidance count once): what a step costs. Heun takes two
for a step. What is measured is kept; the same command goes on.
"""

import argparse
import statistics
from collections.abc import Iterator
from pathlib import Path

import torch
from accelerate import Accelerator
from diffusers import (
    DPMSolverMultistepScheduler,
    FlowMatchEulerDiscreteScheduler,
    FlowMatchHeunDiscreteScheduler,
    SchedulerMixin,
    UniPCMultistepScheduler,
)
from experiments.settings import check_same_settings
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, NullLocator
from tqdm.auto import tqdm

from dae_diffusers import DAEDiTPipeline
from dae_diffusers.data import DataConfig, load_images
from dae_diffusers.metrics.distances import frechet_distance
from dae_diffusers.metrics.features import load_feature_extractor
from dae_diffusers.metrics.sampling import SampleSettings, class_counts, image_batches
from dae_diffusers.metrics.statistics import FeatureStatistics, reference_statistics
from dae_diffusers.pipelines.dae_dit import FLOW_SETTINGS
from dae_diffusers.store import read_json, write_atomically, write_json

SHIFTS = (0.5, 1.0, 2.0, 3.0)  # below 1: more steps near the image; above 1: more steps near the noise


def solvers() -> Iterator[tuple[str, SchedulerMixin]]:
    r"""Each solver on the evenly spaced grid, and Euler and UniPC on shifted ones."""
    for shift in SHIFTS:
        grid = "" if shift == 1 else f", shift {shift:g}"
        yield f"Euler{grid}", FlowMatchEulerDiscreteScheduler(shift=shift)
        yield f"UniPC{grid}", UniPCMultistepScheduler(**FLOW_SETTINGS, flow_shift=shift)
    yield "Heun", FlowMatchHeunDiscreteScheduler()
    yield "DPM-Solver++ 2M", DPMSolverMultistepScheduler(**FLOW_SETTINGS, final_sigmas_type="zero")


def steps_for(name: str, evaluations: int) -> int | None:
    r"""The denoising steps that take so many evaluations; None if no whole number does."""
    if not name.startswith("Heun"):
        return evaluations
    return (evaluations + 1) // 2 if evaluations % 2 else None  # its last step takes one


class Bench:
    r"""Measures a pipeline's samples by one judge. Attributes: `calls`, of the transformer so far."""

    def __init__(self, arguments: argparse.Namespace):
        self.accelerator, self.arguments, self.calls = Accelerator(), arguments, 0
        self.pipeline = DAEDiTPipeline.from_pretrained(arguments.pipeline).to(self.accelerator.device)
        self.pipeline.set_progress_bar_config(disable=True)
        self.pipeline.transformer.register_forward_pre_hook(self._count)
        size = self.pipeline.vae.config.sample_size
        data = DataConfig(
            dataset_name=arguments.dataset_name,
            train_data_dir=arguments.train_data_dir,
            resolution=size,
            image_channels=self.pipeline.vae.config.in_channels,
        )
        self.judge = load_feature_extractor(arguments.features, self.accelerator.device)
        images = load_images(data)[0]
        self.class_counts = class_counts(self.pipeline, images, self.pipeline.null_class)
        self.reference = reference_statistics(self.judge, images, cache_dir=Path(arguments.output_dir) / "reference")

    def _count(self, *_) -> None:
        self.calls += 1

    @torch.no_grad()
    def distance(self, scheduler: SchedulerMixin, steps: int, seed: int) -> tuple[float, float]:
        r"""The Fréchet distance, and the calls of the transformer for each batch."""
        self.pipeline.scheduler, self.calls = scheduler, 0
        settings = SampleSettings(
            self.arguments.num_images, self.arguments.guidance_scale, steps, seed=seed, class_counts=self.class_counts
        )
        found, batches = FeatureStatistics.empty(self.judge.feature_dim), 0
        for images, count in image_batches(self.pipeline, settings, self.accelerator, 100)(range(settings.num_images)):
            found.add(self.judge(images[:count].to(self.accelerator.device).float() * 2 - 1))
            batches += 1
        return frechet_distance(found, self.reference), self.calls / batches


def measure(arguments: argparse.Namespace) -> dict[str, dict[str, list[float]]]:
    r"""Distances of each seed, by solver and evaluations; kept in `solvers.json` one by one."""
    path = Path(arguments.output_dir) / "solvers.json"
    lists = ("seeds", "evaluations")  # of which there may be more the next time
    check_same_settings(path.with_name("settings.json"), {k: v for k, v in vars(arguments).items() if k not in lists})
    found = read_json(path) if path.exists() else {}
    bench = None
    jobs = [(name, n, seed) for seed in arguments.seeds for n in arguments.evaluations for name, _ in solvers()]
    for name, evaluations, seed in tqdm(jobs, desc="Solvers", unit="draw"):
        steps = steps_for(name, evaluations)
        kept = found.setdefault(name, {}).setdefault(str(evaluations), {})
        if steps is None or str(seed) in kept:
            continue
        bench = bench or Bench(arguments)
        kept[str(seed)], calls = bench.distance(dict(solvers())[name], steps, seed)
        if calls != evaluations:
            raise RuntimeError(f"{name} with {steps} steps called the transformer {calls} times, not {evaluations}.")
        path.parent.mkdir(parents=True, exist_ok=True)
        write_json(path, found)
    return {name: {n: list(each.values()) for n, each in row.items() if each} for name, row in found.items()}


def table(found: dict[str, dict[str, list[float]]], evaluations: list[int]) -> str:
    r"""A Markdown table: a row for each solver, a column for each number of evaluations; the best of a column is bold."""
    lines = [f"| solver | {' | '.join(map(str, evaluations))} |", "|---" * (len(evaluations) + 1) + "|"]
    mean = {name: {n: statistics.mean(values) for n, values in row.items()} for name, row in found.items()}
    best = {str(n): min(row[str(n)] for row in mean.values() if str(n) in row) for n in evaluations}
    for name, row in mean.items():
        cells = [f"{row[n]:.2f}" if n in row else "" for n in map(str, evaluations)]
        cells = [f"**{cell}**" if cell and row[n] == best[n] else cell for cell, n in zip(cells, best, strict=True)]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def plot(found: dict[str, dict[str, list[float]]], path: Path) -> None:
    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.subplots()
    for name, row in found.items():
        points = sorted((int(n), statistics.mean(values)) for n, values in row.items())
        axes.plot(
            *zip(*points, strict=True),
            marker="o",
            markersize=3,
            label=name,
            linestyle="-" if "shift" not in name else ":",
        )
    axes.set(
        xscale="log", yscale="log", xlabel="evaluations of the transformer", ylabel="Fréchet distance (lower is better)"
    )
    evaluations = sorted({int(n) for row in found.values() for n in row})
    axes.xaxis.set_major_locator(FixedLocator(evaluations))
    axes.xaxis.set_major_formatter("{x:.0f}")
    axes.xaxis.set_minor_locator(NullLocator())
    axes.legend(fontsize=8)
    figure.savefig(path, dpi=120)


def main(arguments: argparse.Namespace) -> None:
    found, folder = measure(arguments), Path(arguments.output_dir)
    text = table(found, arguments.evaluations)
    write_atomically(folder / "solvers.md", text)
    plot(found, folder / "solvers.png")
    print(text)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("pipeline", help="a flow-matching pipeline of train_dit.py")
    parser.add_argument(
        "--features", required=True, help="the judge: a vision model, such as one of train_classifier.py"
    )
    parser.add_argument("--dataset_name"), parser.add_argument("--train_data_dir")
    parser.add_argument("--output_dir", required=True)
    parser.add_argument("--num_images", type=int, default=2000)
    parser.add_argument("--guidance_scale", type=float, default=1.5)
    parser.add_argument("--evaluations", type=int, nargs="+", default=[3, 5, 9, 15, 25, 51])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1])
    main(parser.parse_args())
