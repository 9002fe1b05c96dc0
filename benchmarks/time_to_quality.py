"""
How long until samples are good? Trains transformers on the same latents by several recipes, and measures while they train how far samples
are from the training images:

    python benchmarks/time_to_quality.py --experiment benchmarks/experiments/time_to_quality_digits.yaml --output_dir runs/quality

The experiment names the autoencoder, the images, the judge, flags of `train_dit.py` that all recipes share, and the recipes. A recipe has
flags of its own, and `start` if it trains diffusers' `DiTTransformer2DModel`: `noise` for noise prediction on its linear schedule, sampled
by DDIM, or `flow` for flow matching, sampled as ours.

A step's time is processor time, measured between runs of two lengths that change places, without measurements, so that other work on the
machine changes it little. With `evaluations`, numbers of denoising steps, the distance over these is measured too, by several
schedulers. Writes `time_to_quality.md`, pictures, and `runs.json`; what is finished is kept.
"""

import argparse
import itertools
import statistics
from pathlib import Path
from typing import Any

import torch
import yaml
from claim_tables import T_QUANTILES
from diffusers import AutoencoderKL, DDIMScheduler, DiTTransformer2DModel
from experiments.settings import check_same_settings, choose_data
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from dae_diffusers import DAEDiTPipeline, DAEDiTTransformer2DModel
from dae_diffusers.cli import read_yaml
from dae_diffusers.comparison.judges import find_features
from dae_diffusers.comparison.scripts import launch_script, shared_flags
from dae_diffusers.data import DataConfig, load_images
from dae_diffusers.engine.log import read_log
from dae_diffusers.generators.denoising import flow_scheduler
from dae_diffusers.store import read_json, write_atomically, write_json

SHORT, LONG = 20, 120  # steps of the runs that are timed
SCHEDULERS = {
    "noise": lambda: DDIMScheduler(clip_sample=False),  # 1000 steps, betas from 1e-4 to 2e-2, as the DiT paper has it
    "flow": lambda: flow_scheduler(1.0),  # as ours, so that the transformers are compared, and not the solvers
}
SOLVERS = {  # each calls the transformer once in a step, or twice with guidance
    "noise": ["DDPM", "DDIM", "DPMSolverMultistep"],
    "flow": ["FlowMatchEulerDiscrete", "UniPCMultistep"],
}

Runs = dict[str, Any]


def save_start(kind: str, experiment: dict[str, Any], folder: Path, seed: int) -> None:
    """Saves a pipeline with a new transformer of diffusers, of the size that the other recipes have."""
    classes = load_images(DataConfig(**experiment["data"]))[0].id2label
    torch.manual_seed(seed)
    vae = AutoencoderKL.from_pretrained(experiment["vae"])
    shared = experiment["shared"]
    size = {**DAEDiTTransformer2DModel.size_kwargs(shared["model"]), **{k: v for k, v in shared.items() if k in SIZES}}
    transformer = DiTTransformer2DModel(
        in_channels=vae.config.latent_channels,
        out_channels=vae.config.latent_channels,
        sample_size=vae.config.sample_size // 2 ** (len(vae.config.block_out_channels) - 1),
        num_embeds_ada_norm=len(classes),
        **size,
    )
    for block in transformer.transformer_blocks:  # adaLN-Zero, which diffusers leaves to who trains
        torch.nn.init.zeros_(block.norm1.linear.weight)
        torch.nn.init.zeros_(block.norm1.linear.bias)
    torch.nn.init.zeros_(transformer.proj_out_2.weight)
    torch.nn.init.zeros_(transformer.proj_out_2.bias)
    DAEDiTPipeline(transformer, vae, SCHEDULERS[kind](), id2label=classes).save_pretrained(folder)


SIZES = ("num_layers", "num_attention_heads", "attention_head_dim", "patch_size")


def flags_of(experiment: dict[str, Any], name: str, seed: int, output_dir: Path) -> dict[str, Any]:
    """The flags of `train_dit.py` for a recipe, in a folder of its own. What it starts from is made there."""
    recipe = dict(experiment["recipes"][name] or {})
    start, shared = recipe.pop("start", None), dict(experiment["shared"])
    folder = output_dir / name.replace(" ", "-") / f"seed-{seed}"
    if start is not None:
        given = folder / "start"
        if not given.exists():
            save_start(start, experiment, given, seed)
        shared = {key: value for key, value in shared.items() if key != "model" and key not in SIZES}
        recipe["pretrained_model_name_or_path"] = given
    if start == "noise":  # guided at all levels, as such pipelines are
        shared.pop("sample_guidance_interval", None)
    return {**shared_flags(folder / "run", seed), **experiment["data"], "vae": experiment["vae"], **shared, **recipe}


def train(experiment: dict[str, Any], name: str, seed: int, output_dir: Path) -> dict[str, Any]:
    """Trains a recipe to its end, and returns the distance after so many steps."""
    flags = flags_of(experiment, name, seed, output_dir)
    monitored = {"metric_features": experiment["judge"], **experiment["metric"]}
    launch_script("train_dit", {**flags, **monitored, "checkpointing_steps": experiment["metric"]["metric_steps"]})
    rows = read_log(Path(flags["output_dir"]) / "train_dit")
    found = {row["step"]: value for row in rows for key, value in row.items() if key.startswith("validation/g")}
    return {"steps": list(found), "distances": list(found.values())}


def over_evaluations(experiment: dict[str, Any], name: str, seed: int, output_dir: Path) -> dict[str, dict[str, float]]:
    """The distance of a trained recipe, by scheduler and by number of denoising steps."""
    run = Path(flags_of(experiment, name, seed, output_dir)["output_dir"])
    is_noise = (experiment["recipes"][name] or {}).get("start") == "noise"
    options = {
        "pipeline": run / "pipeline",
        "features": experiment["judge"],
        "num_images": experiment["metric"]["metric_images"],
        "num_inference_steps": experiment["evaluations"],
        "schedulers": SOLVERS["noise" if is_noise else "flow"],
        "output_dir": run.with_name("evaluation"),
    }
    launch_script("evaluate", {**experiment["data"], **options})
    found: dict[str, dict[str, float]] = {}
    for row in read_json(run.with_name("evaluation") / "metrics.json")["generation"]:
        distance = next(value for name, value in row.items() if name.startswith(("gfd_", "gfid")))
        found.setdefault(row["scheduler"], {})[str(row["num_inference_steps"])] = distance
    return found


def is_measured(found: dict[str, dict[str, float]] | None, steps: list[int]) -> bool:
    """Whether all schedulers were measured with these numbers of steps."""
    return found is not None and all(each.keys() == {str(number) for number in steps} for each in found.values())


def seconds_of(experiment: dict[str, Any], name: str, output_dir: Path, repeat: int) -> float:
    """Processor time of a step, in seconds."""
    spent = {}
    for steps in (SHORT, LONG):
        flags = flags_of(experiment, name, 0, output_dir)
        flags |= {"output_dir": output_dir / "timing" / f"{name.replace(' ', '-')}-{steps}-{repeat}"}
        spent[steps] = launch_script("train_dit", {**flags, "max_train_steps": steps})["cpu_seconds"]
    return (spent[LONG] - spent[SHORT]) / (LONG - SHORT)


def measure(experiment: dict[str, Any], output_dir: Path) -> Runs:
    """Everything that is not measured yet; kept in `runs.json` piece by piece."""
    path = output_dir / "runs.json"
    shared = {
        key: value for key, value in experiment.items() if key not in ("recipes", "seeds", "repeats", "evaluations")
    }
    recipes = {f"recipe {name}": recipe for name, recipe in experiment["recipes"].items()}
    check_same_settings(output_dir / "settings.json", shared | recipes)
    runs = read_json(path) if path.exists() else {"seconds": {}, "curves": {}}
    output_dir.mkdir(parents=True, exist_ok=True)
    for repeat, name in itertools.product(range(experiment["repeats"]), experiment["recipes"]):
        kept = runs["seconds"].setdefault(name, [])
        if len(kept) == repeat:
            kept.append(seconds_of(experiment, name, output_dir, repeat))
            write_json(path, runs)
    for seed, name in itertools.product(experiment["seeds"], experiment["recipes"]):
        kept = runs["curves"].setdefault(name, {})
        if str(seed) not in kept:
            kept[str(seed)] = train(experiment, name, seed, output_dir)
            write_json(path, runs)
        kept = runs.setdefault("evaluations", {}).setdefault(name, {})
        if "evaluations" in experiment and not is_measured(kept.get(str(seed)), experiment["evaluations"]):
            kept[str(seed)] = over_evaluations(experiment, name, seed, output_dir)
            write_json(path, runs)
    return runs


def interval(values: list[float]) -> str:
    """Mean and half the width of its 95 % interval."""
    if len(values) < 2:
        return f"{values[0]:.2f}"
    half = T_QUANTILES[min(len(values), max(T_QUANTILES))] * statistics.stdev(values) / len(values) ** 0.5
    return f"{statistics.mean(values):.2f} ± {half:.2f}"


def at(curve: dict[str, list], step: float) -> float | None:
    """The distance after so many steps, linear between measurements; None before the first and after the last."""
    points = list(zip(curve["steps"], curve["distances"], strict=True))
    for (left, before), (right, after) in itertools.pairwise(points):
        if left <= step <= right:
            return before + (after - before) * (step - left) / (right - left)
    return None


def first_at(curve: dict[str, list], distance: float) -> float | None:
    """The step at which a distance is first reached, linear between measurements; None if it never is."""
    points = list(zip(curve["steps"], curve["distances"], strict=True))
    if points[0][1] <= distance:
        return points[0][0]
    for (left, before), (right, after) in itertools.pairwise(points):
        if after <= distance:
            return left + (right - left) * (before - distance) / (before - after)
    return None


def table(runs: Runs, classic: str) -> str:
    """A Markdown table: each recipe beside the classic one, at equal steps, at equal time, and the time to its final distance."""
    seconds = {name: statistics.median(each) for name, each in runs["seconds"].items()}
    lines = [
        "| recipe | ms a step | gFD at the end | gFD at the classic recipe's time | time to the classic recipe's gFD |",
        "|---|---|---|---|---|",
    ]
    for name, curves in runs["curves"].items():
        ends, equal, shares = [], [], []
        for seed, curve in curves.items():
            ends.append(curve["distances"][-1])
            other = runs["curves"][classic][seed]
            total = other["steps"][-1] * seconds[classic]
            equal.append(at(curve, min(total / seconds[name], curve["steps"][-1])))
            reached = first_at(curve, other["distances"][-1])
            shares.append(None if reached is None else reached * seconds[name] / total)
        share = "not reached" if None in shares else f"{100 * statistics.mean(shares):.0f} %"
        lines.append(
            f"| {name} | {1000 * seconds[name]:.0f} | {interval(ends)} | {'' if None in equal else interval(equal)} | {share} |"
        )
    return "\n".join(lines) + "\n"


def table_of_evaluations(evaluations: dict[str, Any]) -> str:
    """A Markdown table: a row for each recipe and scheduler, a column for each number of denoising steps; means over seeds."""
    means = mean_distances(evaluations)
    columns = sorted({steps for row in means.values() for steps in row})
    lines = [f"| recipe, scheduler | {' | '.join(map(str, columns))} |", "|---" * (len(columns) + 1) + "|"]
    lines += [f"| {name} | {' | '.join(f'{row[steps]:.2f}' for steps in columns)} |" for name, row in means.items()]
    return "\n".join(lines) + "\n"


def mean_distances(evaluations: dict[str, Any]) -> dict[str, dict[int, float]]:
    """For each recipe and scheduler the mean distance of all seeds, by number of steps."""
    means = {}
    for name, seeds in evaluations.items():
        for scheduler in next(iter(seeds.values()), {}):
            found = [by_scheduler[scheduler] for by_scheduler in seeds.values()]
            row = {int(steps): statistics.mean(each[steps] for each in found) for steps in found[0]}
            means[f"{name}, {scheduler.removesuffix('Scheduler')}"] = row
    return means


def finish(axes: Axes) -> None:
    """Logarithmic axes with plain numbers, and a legend."""
    axes.set(ylabel="gFD (lower is better)", xscale="log", yscale="log")
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_formatter("{x:g}")
        axis.set_minor_formatter("{x:g}")
    axes.legend(fontsize=8)


def plot_evaluations(evaluations: dict[str, Any], path: Path) -> None:
    """Distance over denoising steps, the mean of all seeds, with a line for each recipe and scheduler."""
    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.subplots()
    for name, row in mean_distances(evaluations).items():
        axes.plot(*zip(*sorted(row.items()), strict=True), marker="o", markersize=3, label=name)
    axes.set_xlabel("denoising steps")
    finish(axes)
    figure.savefig(path, dpi=120)


def plot(runs: Runs, path: Path) -> None:
    """Distance over time, the mean of all seeds, with a line for each recipe."""
    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.subplots()
    for name, curves in runs["curves"].items():
        seconds = statistics.median(runs["seconds"][name])
        steps = next(iter(curves.values()))["steps"]
        means = [
            statistics.mean(values) for values in zip(*(each["distances"] for each in curves.values()), strict=True)
        ]
        axes.plot([step * seconds / 60 for step in steps], means, marker="o", markersize=3, label=name)
    axes.set_xlabel("minutes of processor time")
    finish(axes)
    figure.savefig(path, dpi=120)


def main(arguments: argparse.Namespace) -> None:
    experiment = yaml.safe_load(arguments.experiment.read_text())
    experiment["data"] = choose_data([], read_yaml(arguments.experiment, str(arguments.experiment))["data"])
    chosen = arguments.recipes or experiment["recipes"]
    experiment["recipes"] = {name: recipe for name, recipe in experiment["recipes"].items() if name in chosen}
    experiment["judge"] = find_features(experiment["judge"], experiment["data"], arguments.output_dir)
    runs = measure(experiment, arguments.output_dir)
    text = table(runs, next(iter(runs["curves"])))
    if any(runs["evaluations"].values()):
        text += f"\n{table_of_evaluations(runs['evaluations'])}"
        plot_evaluations(runs["evaluations"], arguments.output_dir / "evaluations.png")
    write_atomically(arguments.output_dir / "time_to_quality.md", text)
    plot(runs, arguments.output_dir / "time_to_quality.png")
    print(text)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--experiment", type=Path, required=True, help="YAML file, such as those in benchmarks/experiments/"
    )
    parser.add_argument("--output_dir", type=Path, required=True)
    parser.add_argument("--recipes", nargs="+", help="only these; the first of the experiment is the classic one")
    main(parser.parse_args())
