"""Puts the weights of a chosen average into the pipeline of a run."""

import logging
import shutil
from functools import partial
from pathlib import Path

import torch
from diffusers import DiffusionPipeline

from dae_diffusers.store import read_json_or, replace_files, replace_folder, write_json
from dae_diffusers.weights import weights_fingerprint_of

logger = logging.getLogger(__name__)

_RECORD = "ema.json"


def generator_of(pipeline: DiffusionPipeline) -> tuple[str, torch.nn.Module]:
    r"""The model that the training of a pipeline trained, and its name there."""
    name = "prior" if hasattr(pipeline, "prior") else "transformer"
    return name, getattr(pipeline, name)


def put_into_pipeline(folder: Path, part: str, source: Path, length: float) -> None:
    r"""
    Puts the weights of an average into `<folder>/pipeline`; those of the training stay in `<folder>/<part>_before_ema`. A kill at
    any moment leaves a whole pipeline: with the weights before, or with the new ones.

    Args:
        folder (`Path`): The output folder of the training.
        part (`str`): Name of the model in the pipeline.
        source (`Path`): The folder of the model with the averaged weights.
        length (`float`): The length of the average.
    """
    target, kept = folder / "pipeline" / part, folder / f"{part}_before_ema"
    present, record = weights_fingerprint_of(target), read_json_or(kept / _RECORD, {})
    if present is None or record.get("weights") != present:  # else they are those of an earlier call
        replace_folder(kept, partial(shutil.copytree, target))
    write_json(kept / _RECORD, {"weights": weights_fingerprint_of(source), "length": length})
    replace_files(target, partial(shutil.copytree, source))
    logger.info("%s now has the average of length %g; the weights of the training are in %s", target, length, kept)
