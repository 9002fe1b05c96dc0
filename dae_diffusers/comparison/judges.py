"""Finds the judge of samples: a feature extractor, or a classifier that is trained on the images."""

import contextlib
import os
import shutil
from pathlib import Path
from typing import Any

from dae_diffusers.comparison.scripts import launch_script


def find_features(features: str | dict[str, Any], data: dict[str, Any], output_dir: Path) -> str:
    r"""The feature extractor's name; one that is described by flags of `train_classifier.py` is trained on the images first."""
    if not isinstance(features, dict):
        return features
    folder = output_dir / "features" / "classifier"
    if not (folder / "results.json").exists():
        # Elsewhere, and moved at the end: it may be interrupted, or be trained by another process too.
        unfinished = folder.with_name(f"classifier-{os.getpid()}")
        launch_script("train_classifier", {**data, **features, "output_dir": unfinished})
        with contextlib.suppress(OSError):  # another was faster
            unfinished.replace(folder)
        shutil.rmtree(unfinished, ignore_errors=True)
    return str(folder)
