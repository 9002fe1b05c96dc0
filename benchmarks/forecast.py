r"""
Do short pilots forecast a generator's distance? Pilots on the autoencoders of `decoupled_vs_joint.py` or `search_payoff.py`, beside
every other predictor.

    python benchmarks/forecast.py --runs runs/payoff-digits --widths 128 --steps 35 65 --output_dir runs/forecast-digits
    python benchmarks/forecast.py --runs runs/claim-digits runs/claim-cifar10-16px --output_dir runs/forecast --generator width-128

Every finished run has an autoencoder and the final gFD of a generator. On each autoencoder pilots of several widths and lengths are
trained. The forecast is a straight line through the logarithms of gFD over the logarithms of steps times parameters, with one slope
for all autoencoders of a comparison (in a second row: each with its own) and a height for each. The final gFD is never used for it.

The table has Spearman's rank correlation of each predictor with the final gFD, separately for each comparison, and for each seed of
a search (other images and judges cannot be ranked together), and how often the forecast's 90 % interval holds the final gFD. What
is finished stays in `--output_dir` and is not repeated. Start it several times, once for each core, to share the work.
"""

import argparse
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from experiments.statistics import rank_correlation
from experiments.training import finished_rows

from dae_diffusers.complexity.pilots import measure_pilots
from dae_diffusers.complexity.report import complexity_distance, distance_name
from dae_diffusers.complexity.settings import ComplexityConfig
from dae_diffusers.errors import UserError
from dae_diffusers.metrics.report import table
from dae_diffusers.script import run_script
from dae_diffusers.search.trial import distances
from dae_diffusers.store import read_json, write_atomically, write_json

OTHERS = {
    "reconstruction": ("psnr", "rfd_", "rfid"),
    "latent_space": ("ifd_", "ifid", "high_frequency_share", "effective_rank", "gaussian_entropy", "probe_accuracy"),
}


# 95 % quantiles of Student's t for 1, 2, ... degrees of freedom: the ends of intervals of 90 %. For more, the last one.
_QUANTILES = (6.314, 2.920, 2.353, 2.132, 2.015, 1.943, 1.895, 1.860, 1.833, 1.812, 1.796, 1.782, 1.771, 1.761, 1.753)

Points = list[tuple[float, float]]


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--runs",
        nargs="+",
        type=Path,
        required=True,
        help="output folders of decoupled_vs_joint.py or search_payoff.py",
    )
    parser.add_argument("--output_dir", type=Path, required=True)
    parser.add_argument("--generator", default="width-128", help="of a comparison: the one whose final gFD is forecast")
    parser.add_argument("--widths", nargs="+", type=int, default=[64, 128])
    parser.add_argument("--steps", nargs="+", type=int, default=[100, 250], help="lengths of the pilots")
    parser.add_argument("--num_images", type=int, default=1000, help="that a pilot draws")
    parser.add_argument("--max_train_samples", type=int, help="pilots and their judge see only N training images")
    parser.add_argument("--limit", type=int, help="only the first N autoencoders of each comparison")
    return parser.parse_args()


def main(arguments: argparse.Namespace) -> None:
    rows = []
    for runs in arguments.runs:
        is_comparison = (runs / "experiment.json").exists()
        finished = of_comparison(runs, arguments.generator) if is_comparison else of_searches(runs)
        finished = [each for each in finished if each.vae.is_dir()]
        if not finished:
            wanted = f"`{arguments.generator}`" if is_comparison else "generator in `seed-*/full`"
            raise UserError(f"no autoencoder with a finished {wanted} was found in {runs}.")
        rows += [row_of(arguments, each) for each in finished[: arguments.limit]]
    write_json(arguments.output_dir / "forecast.json", rows)
    text = summarize(rows)
    write_atomically(arguments.output_dir / "forecast.md", text)
    print(text)


@dataclass
class Finished:
    """An autoencoder whose generator is finished: its row, and how it was trained and judged."""

    comparison: str
    name: str
    seed: int
    vae: Path
    row: dict[str, Any]
    data: dict[str, Any]
    features: str
    transformer: dict[str, Any]
    num_inference_steps: int


def of_comparison(runs: Path, generator: str) -> list[Finished]:
    experiment = read_json(runs / "experiment.json")
    features = experiment["features"]
    if isinstance(features, dict):
        features = str(runs / "features" / "classifier")
    rows = [row for row in finished_rows(runs) if row["generator"] == generator]
    return [
        Finished(
            comparison=runs.name,
            name=f"{row['condition']} {row['steps']} seed {row['seed']}",
            seed=row["seed"],
            vae=runs / row["condition"] / row["steps"] / f"seed-{row['seed']}" / "vae",
            row=row,
            data=experiment["data"],
            features=features,
            transformer={**experiment["transformer"], **(experiment[f"generator {generator}"] or {})},
            num_inference_steps=experiment["num_inference_steps"],
        )
        for row in rows
    ]


def of_searches(runs: Path) -> list[Finished]:
    found = []
    for path in sorted(runs.glob("seed-*/full/trials/*/rung-0/result.json")):
        folder, row = path.parents[4], read_json(path)
        search, name = read_json(folder / "search.json"), path.parents[1].name
        own = search.get("transformers of candidates", {}).get(name, {})
        if "failed" not in row:
            found.append(
                Finished(
                    comparison=f"{runs.name} {folder.name}",
                    name=name,
                    seed=search["settings"]["seed"],
                    vae=Path(row["vae"]),
                    row=row,
                    data=search["data"],
                    features=search["judge"].get("features") or str(folder / "features" / "classifier"),
                    transformer={**search["transformer"], **own, "max_train_steps": row["rung"]["generator_steps"]},
                    num_inference_steps=search["settings"]["num_inference_steps"],
                )
            )
    return found


def row_of(arguments: argparse.Namespace, finished: Finished) -> dict[str, Any]:
    """The final gFD of a run, what its pilots gave, and every other predictor."""
    data, options, row = finished.data, finished.transformer, finished.row
    if arguments.max_train_samples is not None:
        data = {**data, "max_train_samples": arguments.max_train_samples}
    config = ComplexityConfig(
        widths=arguments.widths,
        pilot_steps=arguments.steps,
        num_images=arguments.num_images,
        num_inference_steps=finished.num_inference_steps,
        **{name: options[name] for name in ("optimizer", "learning_rate", "timestep_shift") if name in options},
    )
    found = measure_pilots(
        str(finished.vae), data, config, arguments.output_dir / finished.comparison / finished.name.replace(" ", "/"),
        features=finished.features, seed=finished.seed, reference=arguments.output_dir / "reference",
    )  # fmt: skip
    pilots, points = {}, []
    for pilot in found:
        size, distance = f"width {pilot['width']}, {pilot['steps']} steps", pilot[distance_name(found)]
        pilots |= {f"pilot gFD, {size}": distance, f"pilot loss, {size}": pilot["validation_loss"]}
        points.append((pilot["steps"] * pilot["parameters"], distance))
    return {
        "comparison": finished.comparison,
        "name": finished.name,
        # Pilots draw without guidance: so does the generator here, where both were measured.
        "gFD": distances({"generation": row.get("guidance", {}).get("1", row["generation"])})["gFD"],
        "effort": options["max_train_steps"] * row["parameters"],
        "cost": math.fsum(pilot["cpu_seconds"] for pilot in found) / row["generator_cost"]["cpu_seconds"],
        "points": points,
        "predictors": {
            "D": complexity_distance(found),
            **pilots,
            "full generator's loss": row["validation_loss"],
            **others_of(row),
        },
    }


def others_of(row: dict[str, Any]) -> dict[str, float]:
    return {
        name: value
        for part, names in OTHERS.items()
        for name, value in row[part].items()
        if name.startswith(names) and value is not None
    }


def summarize(rows: list[dict[str, Any]]) -> str:
    lines = []
    for comparison in dict.fromkeys(row["comparison"] for row in rows):
        chosen = [row for row in rows if row["comparison"] == comparison]
        final = [row["gFD"] for row in chosen]
        made = forecast({row["name"]: row["points"] for row in chosen}, chosen[0]["effort"])
        forecasts = [made[row["name"]] for row in chosen]
        values = {"forecast": [each.value for each in forecasts]}
        alone = [forecast({"": row["points"]}, row["effort"])[""] for row in chosen]
        values["forecast, each with its own slope"] = [each.value for each in alone]
        for name in chosen[0]["predictors"]:
            if all(name in row["predictors"] for row in chosen):
                values[name] = [row["predictors"][name] for row in chosen]
        found = {name: rank_correlation(of_name, final) for name, of_name in values.items()}
        held = sum(each.low <= distance <= each.high for each, distance in zip(forecasts, final, strict=True))
        order = sorted(found, key=lambda name: -abs(found[name]) if math.isfinite(found[name]) else 1)
        cost = math.fsum(row["cost"] for row in chosen) / len(chosen)
        lines += table(
            f"{comparison}: {len(chosen)} runs",
            [{"predictor": name, "rank correlation with final gFD": f"{found[name]:+.2f}"} for name in order],
        )
        lines += [
            f"Pilots cost {cost:.0%} of the generator. The intervals of 90 % hold {held} of {len(chosen)} final distances.",
            "",
        ]
    return "\n".join(lines)


@dataclass(frozen=True)
class Forecast:
    r"""
    A forecast distance with its interval of 90 %.

    Attributes:
        value (`float`): The distance that is expected.
        low, high (`float`): The ends of the interval; 0 and infinite if there are too few points to say.
    """

    value: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.value:.3g}" + ("" if math.isinf(self.high) else f" ({self.low:.3g} to {self.high:.3g})")


def forecast(points: dict[str, Points], effort: float) -> dict[str, Forecast]:
    r"""
    Forecasts each candidate's distance. The logarithm of the distance is a straight line over the logarithm of the effort. The slope
    is the same for all candidates, the height is each candidate's own.

    Args:
        points (`dict`): For each candidate, `(effort, distance)` of its trainings so far, both above 0. Effort is, for example, the
            number of steps times the width.
        effort (`float`): That of the training whose distance is asked for.

    Returns:
        `dict`: A [`Forecast`] for each candidate that has a point. While no candidate has two different efforts, the slope is
        taken to be 0.
    """
    logs = {
        name: [(math.log(x), math.log(y)) for x, y in of_name if x > 0 and 0 < y < math.inf]
        for name, of_name in points.items()
    }
    logs = {name: of_name for name, of_name in logs.items() if of_name}
    centres = {name: tuple(_mean(values) for values in zip(*of_name, strict=True)) for name, of_name in logs.items()}
    deviations = [(x - centres[name][0], y - centres[name][1]) for name, of_name in logs.items() for x, y in of_name]
    spread = math.fsum(x * x for x, _ in deviations)
    slope = math.fsum(x * y for x, y in deviations) / spread if spread > 1e-12 else 0.0
    freedom = len(deviations) - len(logs) - (spread > 1e-12)
    rest = math.fsum((y - slope * x) ** 2 for x, y in deviations)
    found = {}
    for name, (x, y) in centres.items():
        away = math.log(effort) - x
        half = math.inf
        if freedom > 0:
            variance = rest / freedom * (1 + 1 / len(logs[name]) + (away * away / spread if spread > 1e-12 else 0))
            half = _QUANTILES[min(freedom, len(_QUANTILES)) - 1] * math.sqrt(variance)
        value = y + slope * away
        found[name] = Forecast(math.exp(value), math.exp(value - half), math.exp(value + half))
    return found


def _mean(values: tuple[float, ...]) -> float:
    return math.fsum(values) / len(values)


if __name__ == "__main__":
    run_script(main, parse_arguments())
