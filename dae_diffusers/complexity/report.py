"""The complexity distance as a picture and as tables."""

from pathlib import Path

from matplotlib.figure import Figure

from dae_diffusers.complexity.rows import ComplexityResult
from dae_diffusers.complexity.settings import HEADLINES
from dae_diffusers.metrics.report import table


def plot_complexity(results: dict[str, ComplexityResult], path: str | Path, *, title: str = "Complexity distance"):
    r"""
    Draws the remaining share against the capacity, with one panel per form, the mean and standard deviation over seeds, and the
    autoencoder's own decoder as a dashed line.

    Args:
        results (`dict[str, ComplexityResult]`): Results by the name of the latent space.
        path (`str` or `Path`): The PNG to write.
        title (`str`): Title above the panels.
    """
    if not results:
        raise ValueError("`results` is empty: there is nothing to draw.")
    forms = [form for form in HEADLINES if any(form in result.config.forms for result in results.values())]
    capacities = sorted({capacity for result in results.values() for capacity in result.config.capacities})
    labels = {
        "paired": "paired: share of the variance left",
        "unpaired": "unpaired: Wasserstein distance / std of the data",
    }
    figure = Figure(figsize=(5.0 * len(forms), 3.8), layout="constrained")
    figure.suptitle(title)
    for axis, form in zip(figure.subplots(1, len(forms), squeeze=False).flat, forms, strict=True):
        value = HEADLINES[form]
        for number, (name, result) in enumerate(results.items()):
            entries = {entry["capacity"]: entry for entry in result.summary if entry["form"] == form}
            decoder = entries.pop(None, None)
            axis.errorbar(
                [capacities.index(capacity) for capacity in entries],
                [entry[value] for entry in entries.values()],
                yerr=[entry[f"{value}_std"] or 0.0 for entry in entries.values()],
                label=name, color=f"C{number}", marker="o", markersize=4, capsize=3, linewidth=1.2,
            )  # fmt: skip
            if decoder is not None:
                axis.axhline(decoder[value], color=f"C{number}", linestyle="--", linewidth=1, label=f"{name}: decoder")
        axis.set_xticks(range(len(capacities)), ["linear" if width == 0 else str(width) for width in capacities])
        axis.set_ylim(bottom=min(0.0, axis.get_ylim()[0]))
        axis.set_title(labels[form], fontsize=10)
        axis.set_xlabel("width of the generator", fontsize=8)
        axis.tick_params(labelsize=8)
        axis.legend(fontsize=7, frameon=False)
    figure.savefig(path, dpi=110)


def to_markdown(result: ComplexityResult) -> str:
    r"""Makes a table for each form: the remaining share, its deviation over the seeds, and the difference to the decoder."""
    lines = []
    for form in result.config.forms:
        distance = HEADLINES[form]
        rows = [
            {
                "capacity": "the decoder" if entry["capacity"] is None else str(entry["capacity"]),
                "seeds": str(entry["num_seeds"]),
                **{name: entry.get(name) for name in (distance, f"{distance}_std", f"{distance}_difference")},
            }
            for entry in result.summary
            if entry["form"] == form
        ]
        lines += table(f"Complexity distance, {form}", rows)
    return "\n".join(lines) + "\n"
