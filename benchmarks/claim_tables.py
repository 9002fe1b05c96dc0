"""
Makes tables and pictures from the runs of `decoupled_vs_joint.py`.

    python benchmarks/claim_tables.py                         # the table of benchmarks/results/README.md, from all runs there
    python benchmarks/claim_tables.py benchmarks/results/cifar10_16px.csv \\
        --experiment benchmarks/experiments/cifar10_16px.yaml # every table of one experiment

A *run* is an autoencoder of one condition and seed with one generator on its latents, and what was measured of them: a line of a
CSV file. `results.csv` in the benchmark's output folder holds those of an experiment; `benchmarks/results/` has copies.
"""

import argparse
import csv
import itertools
import math
from pathlib import Path
from typing import Any

import yaml
from experiments.statistics import rank_correlation
from experiments.trial import describe_steps, origin_of_latents
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullFormatter

# 97.5 % quantiles of Student's t for n - 1 degrees of freedom, n = 2...16; for more seeds the last, which widens the interval.
_QUANTILES = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179, 2.160, 2.145, 2.131)
T_QUANTILES = dict(enumerate(_QUANTILES, start=2))
BASELINES = ("joint", "same")
# What tells runs apart; everything else was measured.
KEYS = {"condition": str, "steps": str, "seed": int, "generator": str, "parameters": int}
PREDICTORS = ("rFD", "gap", "iFD", "CD paired", "CD excess", "CD unpaired", "DiT val", "HF share", "eff. rank", "probe")

# A run by the names of its columns; and the numbers of several: condition -> seed -> name -> number.
Run = dict[str, Any]
Runs = dict[str, dict[int, dict[str, float]]]


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "runs", type=Path, nargs="?", help="a file of runs; default: all, for the table of benchmarks/results/README.md"
    )
    parser.add_argument("--experiment", type=Path, help="the file of benchmarks/experiments/ that the runs belong to")
    arguments = parser.parse_args()
    if (arguments.runs is None) != (arguments.experiment is None):
        parser.error("a file of runs and `--experiment` go together.")
    for path in (arguments.runs, arguments.experiment):
        if path is not None and not path.is_file():
            parser.error(f"{path} is not a file.")
    return arguments


def main(arguments: argparse.Namespace) -> None:
    if arguments.runs is not None:
        print(summarize(read_runs(arguments.runs), yaml.safe_load(arguments.experiment.read_text())))
        return
    folder = Path(__file__).with_name("results")
    settings = yaml.safe_load((folder / "settings.yaml").read_text())
    print("\n".join(table_of_settings(settings, {path.stem: read_runs(path) for path in folder.glob("*.csv")})))


def write_runs(runs: list[Run], path: Path) -> None:
    with path.open("w", newline="") as file:
        columns = dict.fromkeys(name for run in runs for name in run)
        writer = csv.DictWriter(file, list(columns), restval="nan", lineterminator="\n")
        writer.writeheader()
        writer.writerows(runs)


def read_runs(path: Path) -> list[Run]:
    with path.open(newline="") as file:
        return [{name: KEYS.get(name, float)(value) for name, value in row.items()} for row in csv.DictReader(file)]


def table_of_settings(settings: list[dict[str, Any]], results: dict[str, list[Run]]) -> list[str]:
    """Joint training, the control and a weak decoder in every setting; `results` by the names of the files."""
    lines = [
        "| setting | seeds | joint | `same` | `dropout` 0.1 | `dropout` minus joint | `dropout` minus `same` | gap, `dropout` minus joint |",  # noqa: E501
        "|---|---|---|---|---|---|---|---|",
    ]
    for line in settings:
        chosen, runs = line["runs"], {}
        for name in ("joint", "same", "weak"):
            condition, steps = chosen[name].split()
            runs[name] = {
                run["seed"]: run
                for run in results[chosen["results"]]
                if (run["condition"], run["steps"], run["generator"]) == (condition, steps, chosen["generator"])
            }
        numbers = sorted({len(seeds) for seeds in runs.values()})
        cells = [line["setting"], "-".join(map(str, numbers))]
        cells += [mean_and_deviation([run["gFD"] for run in seeds.values()], ".1f") for seeds in runs.values()]
        for number, baseline in (("gFD", "joint"), ("gFD", "same"), ("gap", "joint")):
            cells.append(show_interval(paired_difference(runs, "weak", baseline, number), "+.1f"))
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def budgets_of(rows: list[Run], experiment: dict[str, Any]) -> list[str]:
    """The experiment's, and with `+N` those after which the decoder was trained on for N steps; only if they have runs of their own."""
    extra = {
        int(row["steps"].removeprefix(f"{base}+"))
        for row in rows
        for budget in experiment["budgets"]
        for base in [describe_steps(experiment, budget, row["condition"])]
        if row["steps"].startswith(f"{base}+")
    }
    budgets = [
        f"{budget}+{steps}" if steps else budget for budget in experiment["budgets"] for steps in [0, *sorted(extra)]
    ]
    shown, seen = [], []
    for budget in budgets:
        new = [row for row in rows_of_budget(rows, experiment, budget) if row not in seen]
        if new:
            shown.append(budget)
            seen += new
    return shown


def rows_of_budget(rows: list[Run], experiment: dict[str, Any], budget: str) -> list[Run]:
    base, _, decoder_steps = budget.partition("+")
    more = int(decoder_steps) if decoder_steps else None
    return [
        row
        for row in rows
        if base in experiment["conditions"][row["condition"]].get("budgets", experiment["budgets"])
        and row["steps"] == describe_steps(experiment, base, row["condition"], more)
    ]


def summarize(rows: list[Run], experiment: dict[str, Any]) -> str:
    """For each budget and generator: means, paired differences and the verdict; rank correlations with gFD."""
    lines = []
    for budget, generator in itertools.product(budgets_of(rows, experiment), experiment["generators"]):
        chosen = [row for row in rows_of_budget(rows, experiment, budget) if row["generator"] == generator]
        if not chosen:
            continue
        runs: Runs = {condition: {} for condition in experiment["conditions"]}
        for row in chosen:
            runs[row["condition"]][row["seed"]] = {name: value for name, value in row.items() if name not in KEYS}
        runs = {condition: seeds for condition, seeds in runs.items() if seeds}
        # Another decoder brings the same latents and transformers again.
        with_own_latents = {
            condition: seeds
            for condition, seeds in runs.items()
            if origin_of_latents(experiment, condition) == condition
        }
        steps = dict.fromkeys(row["steps"] for row in chosen)
        lines += [
            f"## Budget `{budget}`, generator `{generator}` ({chosen[0]['parameters'] / 1e6:.2f} M parameters)",
            "",
            f"Autoencoder steps (stage 1 + stage 2, or joint): {', '.join(steps)}.",
            "",
        ]
        lines += [
            *table_of_means(runs),
            "",
            *table_of_runs(runs),
            "",
            *table_of_differences(runs, experiment),
            "",
            *table_of_correlations(with_own_latents),
            "",
        ]
    return "\n".join(lines)


def table_of_means(runs: Runs) -> list[str]:
    names = list(dict.fromkeys(name for seeds in runs.values() for run in seeds.values() for name in run))
    lines = ["Mean ± standard deviation over seeds:", ""]
    lines += [f"| condition | seeds | {' | '.join(names)} |", "|---" * (len(names) + 2) + "|"]
    for condition, seeds in runs.items():
        cells = [mean_and_deviation([run.get(name, math.nan) for run in seeds.values()]) for name in names]
        lines.append(f"| {condition} | {len(seeds)} | {' | '.join(cells)} |")
    return lines


def table_of_runs(runs: Runs) -> list[str]:
    """The numbers that matter most, seed by seed; none where each condition has one."""
    if all(len(seeds) == 1 for seeds in runs.values()):
        return []
    numbers = sorted({seed for seeds in runs.values() for seed in seeds})
    lines = ["PSNR / rFD / gFD / gap of each seed:", ""]
    lines += [f"| condition | {' | '.join(map(str, numbers))} |", "|---" * (len(numbers) + 1) + "|"]
    for condition, seeds in runs.items():
        cells = [
            " / ".join(f"{seeds[seed][name]:.4g}" for name in ("PSNR", "rFD", "gFD", "gap")) if seed in seeds else ""
            for seed in numbers
        ]
        lines.append(f"| {condition} | {' | '.join(cells)} |")
    return lines


def table_of_differences(runs: Runs, experiment: dict[str, Any]) -> list[str]:
    """Makes the table of differences in gFD and gap to both baselines, and says whether the rule of success is met."""
    lines = ["Paired differences with 95 % intervals (negative: the condition is better):", ""]
    columns = [f"{name} minus {baseline}" for name in ("gFD", "gap") for baseline in BASELINES]
    lines += [f"| condition | {' | '.join(columns)} | success |", "|---" * 6 + "|"]
    others: dict[tuple[str, ...], list[str]] = {}
    for condition in runs:
        baselines = tuple(experiment["conditions"][condition].get("baselines", BASELINES))
        intervals = [paired_difference(runs, condition, of, name) for name in ("gFD", "gap") for of in baselines]
        cells = [show_interval(interval) for interval in intervals]
        against = intervals[: len(BASELINES)]
        if condition in baselines or condition.startswith("joint"):
            success = ""
        elif None in against or any(math.isinf(interval[2]) for interval in against):
            success = "too few seeds"
        else:
            success = "yes" if all(interval[2] < 0 for interval in against) else "no"
        lines.append(f"| {condition} | {' | '.join(cells)} | {success} |")
        if baselines != BASELINES:
            others.setdefault(baselines, []).append(condition)
    notes = [
        f"`{'`, `'.join(conditions)}` {'is' if len(conditions) == 1 else 'are'} compared with `{'` and `'.join(baselines)}`"
        for baselines, conditions in others.items()
    ]
    return lines + (["", f"Here {'; '.join(notes)}."] if others else [])


def table_of_correlations(runs: Runs) -> list[str]:
    """Spearman's with gFD over all runs, with rFD held fixed (partial rank correlation), and over the conditions' means."""
    if not runs:
        return []
    numbers = [run for seeds in runs.values() for run in seeds.values()]
    predictors = [name for name in PREDICTORS if any(name in run for run in numbers)]
    names = [*predictors, "gFD"]
    means = [
        {name: math.fsum(run.get(name, math.nan) for run in seeds.values()) / len(seeds) for name in names}
        for seeds in runs.values()
    ]
    lines = [
        f"Spearman's rank correlation with gFD over {len(numbers)} runs and the means of {len(means)} conditions:",
        "",
    ]
    lines += [f"| | {' | '.join(predictors)} |", "|---" * (len(predictors) + 1) + "|"]
    for label, points in (("runs", numbers), ("conditions", means)):
        values = {name: [point.get(name, math.nan) for point in points] for name in names}
        plain = {name: rank_correlation(values[name], values["gFD"]) for name in predictors}
        partial = {
            name: partial_correlation(plain[name], rank_correlation(values[name], values["rFD"]), plain["rFD"])
            for name in predictors
        }
        for of_label, row in ((label, plain), (f"{label}, at matched rFD", partial)):
            few = len(points) < (5 if row is partial else 3)  # a partial correlation of three points is always 1 or -1
            cells = ["" if few or math.isnan(row[name]) else f"{row[name]:+.2f}" for name in predictors]
            lines.append(f"| {of_label} | {' | '.join(cells)} |")
    return lines


def mean_and_deviation(values: list[float], fixed: str | None = None) -> str:
    """With four and two digits, or both in a `fixed` format."""
    mean = math.fsum(values) / len(values)
    if len(values) == 1:
        return f"{mean:{fixed or '.4g'}}"
    deviation = math.sqrt(math.fsum((v - mean) ** 2 for v in values) / (len(values) - 1))
    return f"{mean:{fixed or '.4g'}} ± {0 if deviation < 1e-9 * abs(mean) else deviation:{fixed or '.2g'}}"


def paired_difference(runs: Runs, condition: str, baseline: str, name: str) -> tuple[float, float, float] | None:
    """Mean difference over the seeds that both have, and its 95 % interval by Student's t."""
    seeds = sorted(runs[condition].keys() & runs.get(baseline, {}).keys())
    if condition == baseline or not seeds:
        return None
    differences = [runs[condition][s][name] - runs[baseline][s][name] for s in seeds]
    mean = math.fsum(differences) / len(seeds)
    if len(seeds) < min(T_QUANTILES):
        return mean, -math.inf, math.inf
    deviation = math.sqrt(math.fsum((d - mean) ** 2 for d in differences) / (len(seeds) - 1))
    half = T_QUANTILES[min(len(seeds), max(T_QUANTILES))] * deviation / math.sqrt(len(seeds))
    return mean, mean - half, mean + half


def show_interval(interval: tuple[float, float, float] | None, form: str = "+.3g") -> str:
    if interval is None:
        return ""
    mean, low, high = interval
    return f"{mean:{form}} (1 seed)" if math.isinf(low) else f"{mean:{form}} [{low:{form}}, {high:{form}}]"


def partial_correlation(xy: float, xz: float, yz: float) -> float:
    """The correlation of x and y with z held fixed, from the three correlations."""
    rest = (1 - xz**2) * (1 - yz**2)
    return (xy - xz * yz) / math.sqrt(rest) if rest > 1e-9 else math.nan


def plot_frontier(rows: list[Run], experiment: dict[str, Any], path: Path) -> None:
    """gFD and gap against rFD for the first generator: a small point for each seed, a large one for their mean; joint training at
    several KL weights is joined by a line: the curve to beat."""
    generator = next(iter(experiment["generators"]))
    chosen = [row for row in rows if row["generator"] == generator]
    if not chosen:
        return
    figure = Figure(figsize=(10, 4.2), layout="constrained")
    for axis, name in zip(figure.subplots(1, 2), ("gFD", "gap"), strict=True):
        means = []
        for condition, (color, marker) in styles_of(experiment).items():
            points = [(row["rFD"], row[name]) for row in chosen if row["condition"] == condition]
            if not points:
                continue
            x, y = zip(*points, strict=True)
            mean = (sum(x) / len(x), sum(y) / len(y))
            axis.scatter(x, y, marker=marker, color=color, s=12, alpha=0.5)
            axis.scatter(*mean, label=condition, marker=marker, color=color, s=44, edgecolor="black", linewidth=0.6)
            if condition == "joint" or condition.startswith("joint-kl"):
                means.append(mean)
        if means:
            axis.plot(*zip(*sorted(means), strict=True), color="0.6", linewidth=1, zorder=0)
        axis.set_xscale("log")
        axis.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axis.xaxis.set_major_formatter("{x:g}")
        axis.xaxis.set_minor_formatter(NullFormatter())
        axis.set_xlabel("rFD of the autoencoder (lower is better)")
        axis.set_ylabel(f"{name} (lower is better)")
    figure.legend(*axis.get_legend_handles_labels(), fontsize=8, frameon=False, loc="outside right")
    figure.savefig(path, dpi=120)


def styles_of(experiment: dict[str, Any]) -> dict[str, tuple[str, str]]:
    """
    Colour and marker of each condition. Those with the same baselines share a marker; the two baselines have the same two
    colours everywhere.
    """
    styles, groups = {}, {}
    for condition, options in experiment["conditions"].items():
        baselines = tuple(options.get("baselines", BASELINES))
        others = groups.setdefault(baselines, [])
        if condition in baselines:
            place, turn = baselines.index(condition), 0
        else:
            turn, place = divmod(len(others), 8)
            place += 2
            others.append(condition)
        number = list(groups).index(baselines) + 7 * turn
        styles[condition] = f"C{place}", "oDv^P*Xs<>phd8"[number % 14]
    return styles


def plot_sizes(rows: list[Run], experiment: dict[str, Any], path: Path) -> None:
    """gFD against the transformer's size, for conditions that have several: does a smaller one suffice?"""
    figure = Figure(figsize=(5, 3.6), layout="constrained")
    axis = figure.subplots()
    for number, condition in enumerate(experiment["conditions"]):
        sizes: dict[float, list[float]] = {}
        for row in rows:
            if row["condition"] == condition:
                sizes.setdefault(row["parameters"] / 1e6, []).append(row["gFD"])
        if len(sizes) < 2:
            continue
        points = sorted((size, math.fsum(values) / len(values)) for size, values in sizes.items())
        axis.plot(*zip(*points, strict=True), color=f"C{number % 10}", label=condition)
        axis.scatter(*zip(*[(s, v) for s, vs in sizes.items() for v in vs], strict=True), color=f"C{number % 10}", s=12)
    if not axis.lines:
        return
    axis.set_xscale("log")
    axis.set_yscale("log")
    axis.set_xlabel("parameters of the transformer (millions)")
    axis.set_ylabel("gFD (lower is better)")
    axis.legend(fontsize=8, frameon=False)
    figure.savefig(path, dpi=120)


if __name__ == "__main__":
    main(parse_arguments())
