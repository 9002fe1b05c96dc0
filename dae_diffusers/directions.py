"""In which direction each metric is better."""

_BETTER = {
    "↑": (
        *("psnr", "ssim", "precision", "recall", "density", "coverage", "inception_score", "classifier_score"),
        *("probe_accuracy", "class_agreement", "train_codebook", "validation_codebook", "codebook"),
    ),
    "↓": (*("lpips", "rfd", "rfid", "gfd", "gfid", "ifd", "ifid", "gap", "kernel_distance", "l1", "loss"),),
}


def with_arrow(metric: str, name: str | None = None) -> str:
    r"""
    A metric's name with an arrow in the direction that is better, if there is one.

    Args:
        metric (`str`): Its name in `metrics.json`, such as `gfd_dinov2_base`, or in words, such as `gFD`.
        name (`str`, *optional*): The name to show; default: `metric`.
    """
    arrow = next((arrow for arrow, names in _BETTER.items() if metric.lower().startswith(names)), "")
    return f"{name or metric} {arrow}".rstrip()


def is_higher_better(metric: str) -> bool:
    r"""Whether a larger number of the metric of this name is better."""
    return with_arrow(metric).endswith("↑")
