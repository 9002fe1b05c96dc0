"""What an evaluation records for publishing: which weights it measured, and how its numbers and pictures are called."""

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


def name_of_setting(guidance_scale: float | None, num_inference_steps: int | None) -> str:
    r"""The part of a picture's file name that says how its samples were drawn, such as `guidance-2-steps-25`."""
    chosen = (("guidance", guidance_scale), ("steps", num_inference_steps))
    return "-".join(f"{label}-{value:g}" for label, value in chosen if value is not None) or "default"


def is_deviation(name: str, row: dict[str, Any]) -> bool:
    r"""Whether a number of a row is the standard deviation of another."""
    return name.endswith("_sd") and name.removesuffix("_sd") in row
