"""
Draws docs/images/decoupling.png: gFD of two stages, branch dropout and stage 3, relative to joint training.

    python benchmarks/confirmation_picture.py

Its runs are the `confirmation_*.csv` in benchmarks/results/. Each run counts with the best of its guidance scales, relative to joint
training of the same seed. A dot is a seed, a bar the mean; a line is the 95 % interval of the mean of three seeds or more.
"""

import math
from pathlib import Path

from claim_tables import T_QUANTILES, Run, read_runs
from matplotlib.figure import Figure

RESULTS = Path(__file__).with_name("results")
PICTURE = Path(__file__).resolve().parents[1] / "docs" / "images" / "decoupling.png"
# What is compared: names of conditions in each file, with the generator.
DATA = {"CIFAR-10": "confirmation_cifar10.csv", "digits": "confirmation_digits.csv", "emoji": "confirmation_emoji.csv"}
BASELINES = {"CIFAR-10": ("joint-adv", "muon-6000"), "digits": ("joint", "muon-1000"), "emoji": ("joint", "muon-2000")}
SIDES = {
    "two stages": {"CIFAR-10": ("same-late-adv", "muon-6000"), "digits": ("same", "muon-1000")},
    "two stages, weak decoder": {
        "CIFAR-10": ("branch-0.3-late-adv", "muon-6000"),
        "digits": ("branch-0.3", "muon-1000"),
        "emoji": ("branch-0.3", "muon-2000"),
    },
    "joint training, stage 3": {
        "CIFAR-10": ("joint-adv-fit", "muon-6000"),
        "digits": ("joint-fit", "muon-1000"),
        "emoji": ("joint-fit", "muon-2000"),
    },
    "two stages, stage 3": {"CIFAR-10": ("same-late-adv-fit", "muon-6000"), "digits": ("same-fit", "muon-1000")},
    "weak decoder, stage 3": {
        "CIFAR-10": ("branch-0.3-late-adv-fit", "muon-6000"),
        "digits": ("branch-0.3-fit", "muon-1000"),
        "emoji": ("branch-0.3-fit", "muon-2000"),
    },
    "joint training, longer generator": {
        "CIFAR-10": ("joint-adv", "muon-13000"),
        "digits": ("joint", "muon-2500"),
        "emoji": ("joint", "muon-4000"),
    },
}


def main() -> None:
    runs = {data: read_runs(RESULTS / name) for data, name in DATA.items()}
    figure = Figure(figsize=(7.2, 3.4), layout="constrained")
    axis = figure.subplots()
    height = 0.8 / len(DATA)
    for row, side in enumerate(reversed(SIDES)):
        for number, data in enumerate(DATA):
            ratios = relative(runs[data], SIDES[side].get(data), BASELINES[data])
            if not ratios:
                continue
            place = row + height * (len(DATA) / 2 - 0.5 - number)
            mean = math.fsum(ratios) / len(ratios)
            label = data if row == 0 else None
            axis.barh(place, mean - 1, 0.9 * height, left=1, color=f"C{number}", alpha=0.55, label=label)
            axis.scatter(
                ratios, [place] * len(ratios), color=f"C{number}", edgecolor="black", linewidth=0.5, s=16, zorder=3
            )
            if len(ratios) > 2:
                half = half_interval(ratios, mean)
                axis.plot((mean - half, mean + half), (place, place), color="black", linewidth=1, zorder=2)
    axis.axvline(1, color="black", linewidth=1)
    axis.set_yticks(range(len(SIDES)), list(reversed(SIDES)))
    axis.set_xlabel("gFD relative to joint training (left is better)")
    axis.legend(frameon=False, loc="lower right")
    axis.spines[["top", "right"]].set_visible(False)
    figure.savefig(PICTURE, dpi=120)


def relative(runs: list[Run], side: tuple[str, str] | None, baseline: tuple[str, str]) -> list[float]:
    """gFD of a side over that of joint training, for each seed that both have."""
    if side is None:
        return []
    ours, theirs = (
        {run["seed"]: best(run) for run in runs if (run["condition"], run["generator"]) == each}
        for each in (side, baseline)
    )
    return [ours[seed] / theirs[seed] for seed in sorted(ours.keys() & theirs.keys())]


def best(run: Run) -> float:
    """gFD at the best of the guidance scales, by the classifier."""
    names = [name for name in run if name == "gFD" or name.startswith("gFD guidance")]
    return min(run[name] for name in names if not math.isnan(run[name]))


def half_interval(values: list[float], mean: float) -> float:
    """Half the width of the 95 % interval of a mean, by Student's t."""
    variance = math.fsum((value - mean) ** 2 for value in values) / (len(values) - 1)
    return T_QUANTILES[len(values)] * math.sqrt(variance / len(values))


if __name__ == "__main__":
    main()
