"""What an evaluation records for publishing: which weights it measured, and how its numbers and pictures are called."""

import math
from typing import Any

from dae_diffusers.weights import weights_fingerprint


def weights_by_part(parts: dict[str, Any]) -> dict[str, str]:
    r"""
    Fingerprints of the weights of a pipeline's `components`, by name, to be recorded beside what is measured: `push` publishes
    numbers only with the weights that they were measured with. Text encoders, which are not trained, are left out.
    """
    return {
        name: weights_fingerprint(part.state_dict().values())
        for name, part in sorted(parts.items())
        if hasattr(part, "state_dict") and not name.startswith("text_encoder")
    }


def setting_of(row: dict[str, Any]) -> dict[str, str]:
    r"""How the samples of a row were drawn: `guidance`, `from`, `to`, `steps`, `by` (scheduler), those that the row has."""
    low, high = row.get("guidance_interval") or (None, None)
    setting = {"guidance": row.get("guidance_scale"), "from": low, "to": high, "steps": row.get("num_inference_steps")}
    words = {label: f"{value:g}" for label, value in setting.items() if value is not None}
    scheduler = row.get("scheduler")
    return words if scheduler is None else {**words, "by": scheduler.removesuffix("Scheduler")}


def name_of_setting(row: dict[str, Any]) -> str:
    r"""The part of a picture's file name that says how the samples of a row were drawn, such as `guidance-2-from-0-to-0.8-steps-25`."""
    return "-".join(f"{label}-{value}" for label, value in setting_of(row).items()) or "default"


def words_of_setting(row: dict[str, Any]) -> str:
    r"""How the samples of a row were drawn, in words, such as "guidance 2 from 0 to 0.8, 25 steps"."""
    setting = setting_of(row)
    steps = f"{setting.pop('steps')} steps" if "steps" in setting else ""
    scheduler = setting.pop("by", "")
    guidance = " ".join(f"{label} {value}" for label, value in setting.items())
    return ", ".join(filter(None, (guidance, steps, scheduler)))


def best_row(rows: list[dict[str, Any]]) -> dict[str, Any]:
    r"""The row of samples with the smallest distance in the features of the first judge; the first if none has one, empty without rows."""
    name = next((name for row in rows for name in row if name.startswith(("gfd", "gfid"))), None)

    def distance(row: dict[str, Any]) -> float:
        value = row.get(name)
        return value if isinstance(value, (int, float)) and math.isfinite(value) else math.inf

    return min(rows, key=distance, default={})


def is_deviation(name: str, row: dict[str, Any]) -> bool:
    r"""Whether a number of a row is the standard deviation of another."""
    return name.endswith("_sd") and name.removesuffix("_sd") in row
