"""The complexity distance as a number, as a table and as a picture."""

import math
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from dae_diffusers.metrics.report import table

Rows = list[dict[str, Any]]


def distance_name(rows: Rows) -> str:
    r"""What a pilot is measured by: its gFD, or without features its held-out loss."""
    return next((name for name in rows[0] if name.startswith(("gfd", "gfid"))), "validation_loss")


def complexity_distance(rows: Rows) -> float:
    r"""`D`: the geometric mean over all pilots."""
    return math.exp(math.fsum(math.log(row[distance_name(rows)]) for row in rows) / len(rows))


def summarize(rows: Rows) -> Rows:
    r"""Mean and standard deviation over seeds for each width and length; the deviation of a single seed is None."""
    summary = []
    for size in sorted({(row["width"], row["steps"]) for row in rows}):
        of_size = [row for row in rows if (row["width"], row["steps"]) == size]
        entry = {"width": size[0], "steps": size[1], "parameters": of_size[0]["parameters"], "seeds": len(of_size)}
        for name in dict.fromkeys((distance_name(rows), "gap", "validation_loss")):
            if name in of_size[0]:
                values = [row[name] for row in of_size]
                mean = math.fsum(values) / len(values)
                squares = math.fsum((value - mean) ** 2 for value in values)
                entry[name] = mean
                entry[f"{name}_std"] = math.sqrt(squares / (len(values) - 1)) if len(values) > 1 else None
        summary.append(entry)
    return summary


def to_markdown(rows: Rows) -> str:
    r"""The scalar distance and a table with a line for each width and length."""
    text = f"D = {complexity_distance(rows):.5g}, the geometric mean of `{distance_name(rows)}` over the pilots."
    seconds = math.fsum(row["cpu_seconds"] for row in rows)
    lines = ["# Complexity distance", "", text, f"They took {seconds:.0f} seconds of processor time.", ""]
    return "\n".join([*lines, *table("Pilots", summarize(rows))]) + "\n"


def plot_complexity(results: dict[str, Rows], path: str | Path) -> None:
    r"""
    Draws the distance of the longest pilots against their parameters, with its deviation over seeds.

    Args:
        results (`dict`): Rows of pilots by the name of the latent space, all measured in the same way.
        path (`str` or `Path`): The PNG to write.
    """
    if not results:
        raise ValueError("`results` is empty: there is nothing to draw.")
    figure = Figure(figsize=(5, 3.6), layout="constrained")
    axis = figure.subplots()
    for name, rows in results.items():
        longest, distance = max(row["steps"] for row in rows), distance_name(rows)
        summary = [entry for entry in summarize(rows) if entry["steps"] == longest]
        axis.errorbar(
            [entry["parameters"] for entry in summary],
            [entry[distance] for entry in summary],
            yerr=[entry[f"{distance}_std"] or 0.0 for entry in summary],
            label=name, marker="o", markersize=4, capsize=3, linewidth=1.2,
        )  # fmt: skip
    axis.set_xscale("log")
    axis.set_xlabel("parameters of the pilot")
    axis.set_ylabel(f"{distance} (lower is better)")
    axis.legend(fontsize=8, frameon=False)
    figure.savefig(path, dpi=110)
