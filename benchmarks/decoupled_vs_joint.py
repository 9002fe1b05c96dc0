"""
Does decoupling help? Autoencoders that differ only in how they were trained, the same generator on each, paired seeds.

    python benchmarks/decoupled_vs_joint.py --experiment benchmarks/experiments/digits.yaml --output_dir runs/claim-digits

Every run goes through the training scripts in processes of their own, and leaves `row.json` in its folder; a run that has one
is not repeated, so the command may be interrupted and given again. At the end `results.md`, `results.json` and the pictures
are written anew from all rows.

The rule of success was fixed before the first run: the generation distance (gFD) of a decoupled condition is below that of
`same` and of `joint`, with 95 % intervals of the paired differences that exclude 0.
"""

import argparse
import itertools
import json
import math
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch
import yaml
from accelerate import Accelerator
from diffusers import AutoencoderKL
from matplotlib.figure import Figure
from tqdm.auto import tqdm

from dae_diffusers import DAEDiTPipeline
from dae_diffusers.data import DataConfig, load_images
from dae_diffusers.metrics.evaluation import (
    SampleSettings,
    draw_samples,
    encode_images,
    latent_metrics,
    reconstruction_metrics,
    sample_metrics,
)
from dae_diffusers.metrics.features import load_feature_extractor
from dae_diffusers.metrics.statistics import reference_statistics

# 97.5 % quantile of Student's t for n - 1 degrees of freedom, n = 2...10.
T_QUANTILES = {2: 12.706, 3: 4.303, 4: 3.182, 5: 2.776, 6: 2.571, 7: 2.447, 8: 2.365, 9: 2.306, 10: 2.262}
BASELINES = ("joint", "same")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--experiment", type=Path, required=True, help="a file of benchmarks/experiments/")
    parser.add_argument("--output_dir", type=Path, required=True)
    parser.add_argument("--features", help="feature extractor, instead of the experiment's")
    parser.add_argument("--dataset_name", help="data set, instead of the experiment's")
    parser.add_argument("--conditions", nargs="+", help="only these")
    parser.add_argument("--seeds", nargs="+", type=int, help="instead of the experiment's")
    parser.add_argument("--only_summary", action="store_true", help="write the tables from the rows that exist")
    arguments = parser.parse_args()
    experiment = yaml.safe_load(arguments.experiment.read_text())
    for name in ("features", "dataset_name", "seeds"):
        if getattr(arguments, name) is not None:
            experiment[name] = getattr(arguments, name)
    conditions = arguments.conditions or list(experiment["conditions"])
    unknown = set(conditions) - set(experiment["conditions"])
    if unknown:
        parser.error(f"unknown conditions {sorted(unknown)}; the experiment has {list(experiment['conditions'])}.")

    arguments.output_dir.mkdir(parents=True, exist_ok=True)
    if not arguments.only_summary:
        # Seed by seed, so that an interrupted benchmark has complete pairs.
        todo = list(itertools.product(experiment["seeds"], conditions))
        for seed, condition in tqdm(todo, desc="Runs", unit="run"):
            folder = arguments.output_dir / condition / f"seed-{seed}"
            if not (folder / "row.json").exists():
                row = run(experiment, condition, seed, folder)
                (folder / "row.json").write_text(json.dumps(row, indent=2))
    rows = [json.loads(path.read_text()) for path in sorted(arguments.output_dir.glob("*/*/row.json"))]
    (arguments.output_dir / "results.json").write_text(json.dumps(rows, indent=2))
    text = summarize(rows, experiment)
    (arguments.output_dir / "results.md").write_text(text)
    plot_frontier(rows, arguments.output_dir / "frontier.png")
    print(text)


def run(experiment: dict[str, Any], condition: str, seed: int, folder: Path) -> dict[str, Any]:
    """Trains one autoencoder and one transformer, and measures both."""
    data = {"dataset_name": experiment["dataset_name"], **experiment["data"]}
    quiet = {"validation_steps": 10**9, "checkpointing_steps": 10**9, "logging_steps": 100}
    shared = {**data, "output_dir": folder, "seed": seed, "resume_from_checkpoint": "latest", **quiet}
    seconds = {
        "autoencoder": launch(
            "train_dae", {**shared, **experiment["autoencoder"], **experiment["conditions"][condition]}
        ),
        "transformer": launch("train_dit", {**shared, **experiment["transformer"], "vae": folder / "vae"}),
    }
    accelerator = Accelerator()
    images = load_images(DataConfig(**data), seed)
    extractor = load_feature_extractor(experiment["features"])
    num_images = experiment["num_images"]
    vae = AutoencoderKL.from_pretrained(folder / "vae").eval()
    held_out = encode_images(vae, images[1], accelerator, extractor=extractor)
    seen = encode_images(vae, images[0], accelerator, extractor=extractor, max_images=num_images)
    labels = [torch.tensor(split.labels) for split in images]
    probe = (seen.latents, labels[0][: len(seen.latents)], labels[1])
    row = {
        "condition": condition,
        "seed": seed,
        "seconds": seconds,
        "reconstruction": reconstruction_metrics(held_out, extractor),
        "latent_space": latent_metrics(vae, held_out, extractor, accelerator, probe=probe),
        "validation_loss": last_value(folder / "train_dit" / "log.jsonl", "validation/loss"),
    }
    pipeline = DAEDiTPipeline.from_pretrained(folder / "pipeline")
    settings = SampleSettings(num_images, 1.0, experiment["num_inference_steps"], seed=1000 + seed)
    samples = draw_samples(pipeline, settings, folder / "samples", accelerator)
    reference = reference_statistics(extractor, images[0], cache_dir=folder.parents[1] / "reference")
    row["generation"], _ = sample_metrics(
        samples, extractor, reference, seen.features, seen.reconstruction_features, accelerator
    )
    return row


def launch(script: str, flags: dict[str, Any]) -> float:
    """Runs a training script and returns its wall seconds."""
    argv = [sys.executable, "-m", f"dae_diffusers.training.{script}"]
    for name, value in flags.items():
        if value is True:
            argv.append(f"--{name}")
        elif value is not False and value is not None:
            argv += [f"--{name}", *map(str, value if isinstance(value, list) else [value])]
    start = time.monotonic()
    result = subprocess.run(argv, capture_output=True, text=True)
    if result.returncode != 0:
        raise SystemExit(f"{script} failed:\n{result.stderr[-2000:]}")
    return time.monotonic() - start


def last_value(log: Path, name: str) -> float:
    rows = [json.loads(line) for line in log.read_text().splitlines()]
    return next(row[name] for row in reversed(rows) if name in row)


def numbers_of(row: dict[str, Any]) -> dict[str, float]:
    """The numbers of a run that the tables show, by their short names."""
    reconstruction, generation, latents = row["reconstruction"], row["generation"], row["latent_space"]
    return {
        "PSNR": reconstruction["psnr"],
        "rFD": next(value for name, value in reconstruction.items() if name.startswith(("rfd", "rfid"))),
        "gFD": next(value for name, value in generation.items() if name.startswith(("gfd", "gfid"))),
        "gap": generation["gap"],
        "iFD": next(value for name, value in latents.items() if name.startswith(("ifd", "ifid"))),
        "KID": generation["kernel_distance"],
        "precision": generation["precision"],
        "recall": generation["recall"],
        "DiT val": row["validation_loss"],
        "HF share": latents["high_frequency_share"],
        "eff. rank": latents["effective_rank"],
        "probe": latents["probe_accuracy"],
        "AE s": row["seconds"]["autoencoder"],
        "DiT s": row["seconds"]["transformer"],
    }


def summarize(rows: list[dict[str, Any]], experiment: dict[str, Any]) -> str:
    """Mean and standard deviation of each condition, paired differences, and rank correlations with gFD."""
    names = list(numbers_of(rows[0]))
    by_condition: dict[str, dict[int, dict[str, float]]] = {}
    for row in rows:
        by_condition.setdefault(row["condition"], {})[row["seed"]] = numbers_of(row)
    order = sorted(by_condition, key=lambda c: list(experiment["conditions"]).index(c))
    lines = ["### Conditions: mean ± standard deviation over seeds", ""]
    lines += [f"| condition | seeds | {' | '.join(names)} |", "|---" * (len(names) + 2) + "|"]
    for condition in order:
        cells = [mean_and_deviation([run[name] for run in by_condition[condition].values()]) for name in names]
        lines.append(f"| {condition} | {len(by_condition[condition])} | {' | '.join(cells)} |")
    lines += ["", "### Paired differences in gFD, with 95 % intervals (negative: the condition is better)", ""]
    lines += [f"| condition | {' | '.join(f'minus {b}' for b in BASELINES)} |", "|---" * (1 + len(BASELINES)) + "|"]
    for condition in order:
        cells = [paired_difference(by_condition, condition, baseline, "gFD") for baseline in BASELINES]
        lines.append(f"| {condition} | {' | '.join(cells)} |")
    lines += ["", f"### Spearman's rank correlation with gFD over all {len(rows)} runs", ""]
    values = {name: [numbers_of(row)[name] for row in rows] for name in names}
    others = ["rFD", "gap", "iFD", "DiT val", "HF share", "eff. rank", "probe"]
    correlations = [f"{rank_correlation(values[name], values['gFD']):.2f}" for name in others]
    lines += [f"| {' | '.join(others)} |", "|---" * len(others) + "|"]
    lines.append(f"| {' | '.join(correlations)} |")
    return "\n".join(lines) + "\n"


def mean_and_deviation(values: list[float]) -> str:
    mean = math.fsum(values) / len(values)
    if len(values) == 1:
        return f"{mean:.4g}"
    deviation = math.sqrt(math.fsum((v - mean) ** 2 for v in values) / (len(values) - 1))
    return f"{mean:.4g} ± {deviation:.2g}"


def paired_difference(by_condition: dict, condition: str, baseline: str, name: str) -> str:
    """Mean difference over the seeds that both have, and its 95 % interval by Student's t."""
    seeds = sorted(by_condition[condition].keys() & by_condition.get(baseline, {}).keys())
    if condition == baseline or not seeds:
        return ""
    differences = [by_condition[condition][s][name] - by_condition[baseline][s][name] for s in seeds]
    mean = math.fsum(differences) / len(seeds)
    if len(seeds) not in T_QUANTILES:
        return f"{mean:+.3g} (n = {len(seeds)})"
    deviation = math.sqrt(math.fsum((d - mean) ** 2 for d in differences) / (len(seeds) - 1))
    half = T_QUANTILES[len(seeds)] * deviation / math.sqrt(len(seeds))
    return f"{mean:+.3g} [{mean - half:+.3g}, {mean + half:+.3g}]"


def rank_correlation(x: list[float], y: list[float]) -> float:
    """Spearman's, without ties."""
    ranks = [torch.tensor(values).argsort().argsort().double() for values in (x, y)]
    return float(torch.corrcoef(torch.stack(ranks))[0, 1]) if len(x) > 2 else math.nan


def plot_frontier(rows: list[dict[str, Any]], path: Path) -> None:
    """gFD and gap against rFD, a colour for each condition, a point for each seed; joint conditions are joined."""
    figure = Figure(figsize=(9, 4), layout="constrained")
    for axis, name in zip(figure.subplots(1, 2), ("gFD", "gap"), strict=True):
        means = {}
        for number, condition in enumerate(dict.fromkeys(row["condition"] for row in rows)):
            points = [(n["rFD"], n[name]) for n in (numbers_of(row) for row in rows if row["condition"] == condition)]
            joint = condition.startswith("joint")
            x, y = zip(*points, strict=True)
            axis.scatter(x, y, label=condition, marker="s" if joint else "o", color=f"C{number}", s=22)
            if joint:
                means[condition] = (sum(x) / len(x), sum(y) / len(y))
        axis.plot(*zip(*sorted(means.values()), strict=True), color="0.6", linewidth=1, zorder=0) if means else None
        axis.set_xlabel("rFD of the autoencoder (lower is better)")
        axis.set_ylabel(f"{name} (lower is better)")
    axis.legend(fontsize=8, frameon=False)
    figure.savefig(path, dpi=120)


if __name__ == "__main__":
    main()
