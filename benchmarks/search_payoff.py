r"""
Does the search pay? The latent space that `find-latents` chooses, against the best of all candidates trained in full.

    python benchmarks/search_payoff.py --candidates digits --data dataset_name=digits image_channels=1 resolution=16 \
        --autoencoder_steps 900 --generator_steps 1000 --seeds 0 1 2 --output_dir runs/payoff-digits

For each seed every candidate is trained in full. The search goes through its rungs, whose lengths are shares of the full length, and
chooses one. The table has its gFD in full training against that of the best, the processor time (and wall time) of the rungs and of its
own full training against that of training all in full, and Spearman's rank correlation of the gFD in each rung with the final one.
Beside them stands what costs nothing: the first candidate, and the mean of all. Below the table: the rank correlation of the full
trainings of two seeds, which no search can be expected to exceed. The rule, fixed before the first run: within 5 % of the best at 35 %
of the cost or less, in the mean over seeds. What is finished stays and is not repeated; start the command several times to share the
work.
"""

import argparse
import itertools
import math
from pathlib import Path
from typing import Any

from experiments.settings import check_same_settings, choose_data
from experiments.statistics import rank_correlation

from dae_diffusers.comparison.sharing import share
from dae_diffusers.errors import UserError
from dae_diffusers.metrics.report import table
from dae_diffusers.script import run_script
from dae_diffusers.search.candidates import read_candidates
from dae_diffusers.search.planning import Rung
from dae_diffusers.search.search import Search
from dae_diffusers.search.settings import SearchConfig
from dae_diffusers.search.trial import distances
from dae_diffusers.store import read_json, write_atomically


def parse_arguments(words: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--candidates", default="digits", help="as for find-latents")
    parser.add_argument("--data", nargs="+", required=True, metavar="FLAG=VALUE", help="flags that choose the images")
    parser.add_argument("--features", help="the judge; default: one is trained on the images")
    parser.add_argument("--autoencoder_steps", type=int, required=True, help="of joint training in full")
    parser.add_argument("--generator_steps", type=int, required=True, help="of a generator in full")
    parser.add_argument("--shares", nargs="+", type=float, default=[1 / 9, 1 / 3], help="of the full length, by rung")
    parser.add_argument("--num_images", type=int, default=1000)
    parser.add_argument("--guidance_scales", nargs="+", type=float, default=[1.5])
    parser.add_argument("--num_inference_steps", type=int, default=25)
    parser.add_argument("--mixed_precision", choices=["no", "fp16", "bf16"], help="of all trainings and of drawing")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--output_dir", type=Path, required=True)
    return parser.parse_args(words)


def main(arguments: argparse.Namespace) -> None:
    rows = [row_of(arguments, seed) for seed in arguments.seeds]
    failed = [
        f"Seed {row['seed']}: the full training of `{name}` failed and is not in the table: {reason}"
        for row in rows
        for name, reason in row.pop("failed").items()
    ]
    finals = [row.pop("finals") for row in rows]
    ratio, cost = (math.fsum(row[name] for row in rows) / len(rows) for name in ("gFD / best", "cost"))
    verdict = f"Mean: {ratio:.3f} times the best gFD at {cost:.0%} of the cost. "
    verdict += "The rule is met." if ratio <= 1.05 and cost <= 0.35 else "The rule is not met."
    text = "\n".join([*table("Does the search pay?", rows), verdict, *between_seeds(finals), "", *failed])
    write_atomically(arguments.output_dir / "payoff.md", text)
    print(text)


def between_seeds(finals: list[dict[str, float]]) -> list[str]:
    """A sentence about how alike the seeds rank the candidates that are trained in full in both; none for one seed."""
    pairs = [(one, two, [name for name in one if name in two]) for one, two in itertools.combinations(finals, 2)]
    found = [
        rank_correlation([one[name] for name in names], [two[name] for name in names]) for one, two, names in pairs
    ]
    if not found:
        return []
    mean = math.fsum(found) / len(found)
    return [
        f"Rank correlation of the full trainings of two seeds: {mean:+.2f} ({', '.join(f'{each:+.2f}' for each in found)})."
    ]


def row_of(arguments: argparse.Namespace, seed: int) -> dict[str, Any]:
    """The search and the full trainings of a seed."""
    data = choose_data(arguments.data)
    config = SearchConfig(
        output_dir=str(arguments.output_dir / f"seed-{seed}"),
        candidates=arguments.candidates,
        features=arguments.features,
        num_images=arguments.num_images,
        guidance_scales=arguments.guidance_scales,
        num_inference_steps=arguments.num_inference_steps,
        mixed_precision=arguments.mixed_precision,
        seed=seed,
    )
    search = Search(config, data, read_candidates(config, data))
    lengths = ("autoencoder_steps", "generator_steps", "shares")
    check_same_settings(search.folder / "lengths.json", {name: getattr(arguments, name) for name in lengths})
    search.experiment["features"] = search.find_judge()
    search.forget_failures()
    search.forget_failures(search.folder / "full")
    whole = Rung(1, arguments.autoencoder_steps, arguments.generator_steps)
    rungs = rungs_of(arguments, len(search.candidates.flags), config.keep_one_in)
    chosen = search.choose(rungs)
    full = {name: search.trial(name, search.folder / "full") for name in search.candidates.flags}
    share(
        list(full),
        search.folder / "full",
        lambda name: full[name].result_path(0).exists(),
        lambda name: full[name].run(0, whole),
    )
    results = {name: read_json(trial.result_path(0)) for name, trial in full.items()}
    finals = {name: distances(row)["gFD"] for name, row in results.items() if "failed" not in row}
    ranked = []
    for number in range(len(rungs)):
        early = {
            name: search.result(name, number) for name in finals if search.trial(name).result_path(number).exists()
        }
        early = {name: distances(row)["gFD"] for name, row in early.items() if "failed" not in row}
        ranked.append(rank_correlation([early[name] for name in early], [finals[name] for name in early]))
    failed = {name: row["failed"] for name, row in results.items() if "failed" in row}
    if chosen in failed or len(finals) < 2:
        name = chosen if chosen in failed else next(iter(failed))
        raise UserError(f"the full training of `{name}` failed, so that there is nothing to compare: {failed[name]}")
    best, first = min(finals, key=finals.get), next(iter(finals))
    rungs_of_search = [read_json(path) for path in search.folder.glob("trials/*/rung-*/result.json")]

    def cost(kind: str) -> float:
        spent = math.fsum(row[kind] for row in [*rungs_of_search, results[chosen]])
        return spent / math.fsum(row[kind] for row in results.values())

    return {
        "seed": seed,
        "chosen": chosen,
        "gFD": finals[chosen],
        "best": best,
        "best gFD": finals[best],
        "gFD / best": finals[chosen] / finals[best],
        f"{first} / best": finals[first] / finals[best],
        "mean / best": math.fsum(finals.values()) / len(finals) / finals[best],
        **{f"rank correlation of rung {number + 1}": round(value, 2) for number, value in enumerate(ranked)},
        "cost": cost("processor_seconds"),
        "wall time": cost("seconds"),
        "failed": failed,
        "finals": finals,
    }


def rungs_of(arguments: argparse.Namespace, candidates: int, keep_one_in: int) -> list[Rung]:
    rungs = []
    for share_of_full in arguments.shares:
        steps = (arguments.autoencoder_steps, arguments.generator_steps)
        rungs.append(Rung(candidates, *(max(2, round(share_of_full * each)) for each in steps)))
        candidates = max(1, candidates // keep_one_in)
        if candidates == 1:
            break
    return rungs


if __name__ == "__main__":
    run_script(main, parse_arguments())
