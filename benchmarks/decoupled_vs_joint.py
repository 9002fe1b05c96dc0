"""
Does decoupling help? Compares autoencoders that differ only in their training, with the same generators on each and paired seeds.

    python benchmarks/decoupled_vs_joint.py --experiment benchmarks/experiments/digits.yaml --output_dir runs/claim-digits
    python benchmarks/decoupled_vs_joint.py --experiment benchmarks/experiments/cifar10_16px.yaml --output_dir runs/claim-mine \\
        --data train_data_dir=my_images resolution=32 --conditions joint same dropout-0.1 --budgets time --seeds 0

An experiment names *budgets* (how many steps joint and two-stage training get), *conditions* (how the autoencoder is trained)
and *generators* (transformers trained on each latent space). Every training goes through the scripts in processes of its own.
What is finished leaves a JSON file in its folder and is not repeated, so the command may be interrupted and given again; two
budgets that give a condition the same steps share its runs. Start it several times, with other `--seeds` or `--conditions`: once
for each core of a CPU, with `OMP_NUM_THREADS=1`; on a GPU, which small models do not fill, about as often as there are cores, best
under NVIDIA's MPS. At the end `results.json`, `results.csv`, `results.md` and the pictures are written again from everything that exists.

A condition with `latents_of` has the stage 1 and the transformers of another condition and differs from it only in how the real
decoder is trained (`warm_start_decoder`, `noise_tau`); only that is done. One with `decoder_of` has the whole autoencoder and the
transformers of another; its decoder is trained on for `stage2_steps`, with the losses that the condition names
(`perceptual_model`, `adversarial_weight`), its encoder frozen. One with `fit_of` has stage 3 on top of another: for each of its
transformers the decoder is trained on for `stage3_steps`, for the latents that this transformer draws. One with
`baselines: [joint-c8, same-c8]` is compared with those instead of `joint` and `same`.

Every sample is judged at each of the experiment's `guidance_scales` by the features, and by its `judges`: `pixels`, `spectrum`, or
names of vision models. `judged.json` beside each transformer holds these numbers; what lacks is measured when the command is given
again. Latents are drawn once for each transformer and guidance, and decoded by each decoder.

With `--decoder_steps N` every decoder is then trained for N more steps with its encoder frozen, and everything is measured again
with the same transformers. This shows whether a difference comes from the latents or from unfinished decoders. In the tables it
is a separate budget.

The rule of success was fixed before the first run: the generation distance (gFD) of a decoupled condition is below that of
`same` and of `joint`, with 95 % intervals of the paired differences that exclude 0.
"""

import argparse
import itertools
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import yaml
from claim_tables import (
    BASELINES,
    KEYS,
    Run,
    budgets_of,
    plot_frontier,
    plot_sizes,
    rows_of_budget,
    summarize,
    write_runs,
)
from experiments.judges import judge_samples
from experiments.settings import choose_data
from experiments.training import finished_rows, run_trial
from experiments.trial import SHARED, Experiment, Trial, check_same_experiment
from tqdm.auto import tqdm

from dae_diffusers.cli import read_yaml
from dae_diffusers.comparison.judges import find_features
from dae_diffusers.errors import ConfigError, UserError
from dae_diffusers.metrics.features import load_feature_extractor
from dae_diffusers.script import run_script
from dae_diffusers.search.trial import distances
from dae_diffusers.store import write_atomically, write_json


def parse_arguments() -> argparse.Namespace:
    """The flags, with `experiment` as the mapping that its file holds and the other flags have changed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--experiment", type=Path, required=True, help="a file of benchmarks/experiments/")
    parser.add_argument("--output_dir", type=Path, required=True)
    parser.add_argument("--dataset_name", help="short for `--data dataset_name=...`")
    parser.add_argument(
        "--data",
        nargs="+",
        metavar="FLAG=VALUE",
        help="flags of the training scripts that choose the images, such as train_data_dir=my_images resolution=64, instead of "
        "the experiment's",
    )
    parser.add_argument(
        "--features",
        help="feature extractor (Hub id or folder); default: the experiment's, a classifier trained on the images",
    )
    parser.add_argument("--budgets", nargs="+", help="only these")
    parser.add_argument("--conditions", nargs="+", help="only these")
    parser.add_argument("--generators", nargs="+", help="only these")
    parser.add_argument("--seeds", nargs="+", type=int, help="instead of the experiment's")
    parser.add_argument("--decoder_steps", type=int, help="train every decoder on for so many steps and measure again")
    parser.add_argument("--only_summary", action="store_true", help="write the tables from what is finished")
    arguments = parser.parse_args()
    try:
        as_text = read_yaml(arguments.experiment, str(arguments.experiment))
        experiment = yaml.safe_load(arguments.experiment.read_text())
        experiment |= {name: getattr(arguments, name) for name in ("features", "seeds") if getattr(arguments, name)}
        missing = {*SHARED, "seeds", "budgets", "generators", "conditions"} - set(experiment)
        if missing:
            raise ValueError(f"{arguments.experiment} has no {sorted(missing)}.")
        named = [] if arguments.dataset_name is None else [f"dataset_name={arguments.dataset_name}"]
        experiment["data"] = choose_data([*(arguments.data or []), *named], as_text["data"])
        for name, options in experiment["conditions"].items():
            baselines = options.get("baselines")
            if baselines is not None and (
                len(baselines) != len(BASELINES) or set(baselines) - set(experiment["conditions"])
            ):
                raise ValueError(
                    f"`baselines` of {name} are {baselines}, but must be two conditions, those that stand for joint training and for "
                    "the control."
                )
    except (OSError, yaml.YAMLError, ValueError, ConfigError) as error:
        parser.error(str(error))
    for name in ("budgets", "conditions", "generators"):
        setattr(arguments, name, getattr(arguments, name) or list(experiment[name]))
        unknown = set(getattr(arguments, name)) - set(experiment[name])
        if unknown:
            parser.error(f"unknown {name} {sorted(unknown)}; the experiment has {list(experiment[name])}.")
    arguments.experiment = experiment
    return arguments


def main(arguments: argparse.Namespace) -> None:
    experiment, output_dir = arguments.experiment, arguments.output_dir
    output_dir.mkdir(parents=True, exist_ok=True)
    kept = check_same_experiment(experiment, output_dir)
    if not arguments.only_summary:
        check_judges(experiment, arguments.conditions, output_dir, kept)
        # Seed by seed, so that an interrupted benchmark has complete pairs.
        todo = itertools.product(arguments.budgets, experiment["seeds"], arguments.conditions)
        for budget, seed, condition in tqdm(list(todo), desc="Autoencoders", unit="run"):
            options = experiment["conditions"][condition]
            if budget not in options.get("budgets", experiment["budgets"]):
                continue
            generators = [
                name for name in arguments.generators if name in options.get("generators", arguments.generators)
            ]
            trial = Trial(experiment, output_dir, budget, condition, seed)
            run_trial(trial, generators)
            if arguments.decoder_steps is not None and "fit_of" not in options:
                run_trial(replace(trial, decoder_steps=arguments.decoder_steps), generators)
            judge_samples(trial, generators)
    write_results(experiment, output_dir)


def check_judges(experiment: Experiment, conditions: list[str], output_dir: Path, kept: dict[str, Any]) -> None:
    """Finds the features and the other models that the runs need, and keeps what the runs have in common."""
    options = [experiment["conditions"][name] for name in conditions]
    models = {each[name] for each in options for name in ("perceptual_model", "feature_model") if name in each}
    for name in [*experiment.get("judges", []), *sorted(models - {"lpips"})]:
        try:
            load_feature_extractor(name, channels=experiment["data"].get("image_channels", 3))
        except UserError as error:
            raise UserError(
                f"{error} The experiment's file says how to make it. Or choose other `judges` or `--conditions`."
            ) from None
    experiment["features"] = find_features(experiment["features"], experiment["data"], output_dir)
    fingerprint = load_feature_extractor(experiment["features"]).fingerprint
    if kept.setdefault("fingerprint of the features", fingerprint) != fingerprint:
        raise UserError(
            f"the runs in {output_dir} were judged by other weights of {experiment['features']}. Choose another `--output_dir`."
        )
    write_json(output_dir / "experiment.json", kept)


def write_results(experiment: Experiment, output_dir: Path) -> None:
    rows = [row for row in finished_rows(output_dir) if row["condition"] in experiment["conditions"]]
    if not rows:
        raise UserError(f"nothing is finished in {output_dir}.")
    write_json(output_dir / "results.json", rows)
    runs = [run_of(row) for row in rows]
    write_runs(runs, output_dir / "results.csv")
    text = summarize(runs, experiment)
    write_atomically(output_dir / "results.md", text)
    for budget in budgets_of(runs, experiment):
        chosen_rows = rows_of_budget(runs, experiment, budget)
        plot_frontier(chosen_rows, experiment, output_dir / f"frontier-{budget}.png")
        plot_sizes(chosen_rows, experiment, output_dir / f"sizes-{budget}.png")
    print(text)


def run_of(row: dict[str, Any]) -> Run:
    """The values of a run that the tables show."""
    generation = row["generation"]
    latents = {name: math.nan if value is None else value for name, value in row["latent_space"].items()}
    return {name: row[name] for name in KEYS} | {
        **distances(row),
        "KID": generation["kernel_distance"],
        **columns_of(row["judged"]),
        "precision": generation["precision"],
        "recall": generation["recall"],
        "iFD": next(value for name, value in latents.items() if name.startswith(("ifd", "ifid"))),
        "DiT val": row["validation_loss"],
        "HF share": latents["high_frequency_share"],
        "eff. rank": latents["effective_rank"],
        "probe": latents.get("probe_accuracy", math.nan),
        "AE CPU s": row["autoencoder_cost"]["cpu_seconds"],
        "AE TFLOP": math.nan if row["autoencoder_cost"]["flops"] is None else row["autoencoder_cost"]["flops"] / 1e12,
        "DiT CPU s": row["generator_cost"]["cpu_seconds"],
    }


def columns_of(judged: dict[str, dict[str, float]]) -> dict[str, float]:
    """Of each judge and guidance, such as `gFD pixels, guidance 1.5`; what judges the table's gFD without guidance has its column."""
    columns = {}
    for scale, by_judge in judged.items():
        for number, (name, distance) in enumerate(by_judge.items()):
            parts = [] if number == 0 else [Path(name).name]
            parts += [] if float(scale) == 1 else [f"guidance {float(scale):g}"]
            if parts:
                columns[f"gFD {', '.join(parts)}"] = distance
    return columns


if __name__ == "__main__":
    run_script(main, parse_arguments())
