"""In which direction each metric is better."""

_BETTER = {
    "↑": (
        *("psnr", "ssim", "precision", "recall", "density", "coverage", "inception_score", "classifier_score"),
        *("probe_accuracy", "class_agreement", "clip_score", "train_codebook", "validation_codebook", "codebook"),
    ),
    "↓": (
        *("lpips", "rfd", "rfid", "gfd", "gfid", "ifd", "ifid", "gap", "kernel_distance", "l1", "loss"),
        "generated_fd",
    ),
}


def direction(metric: str) -> str:
    r"""The arrow in the direction in which a metric is better; empty if there is none or it is not known."""
    return next((arrow for arrow, names in _BETTER.items() if metric.lower().startswith(names)), "")


def with_arrow(metric: str, name: str | None = None) -> str:
    r"""
    A metric's name with an arrow in the direction that is better, if there is one.

    Args:
        metric (`str`): Its name in `metrics.json`, such as `gfd_dinov2_base`, or in words, such as `gFD`.
        name (`str`, *optional*): The name to show; default: `metric`.
    """
    return f"{name or metric} {direction(metric)}".rstrip()
