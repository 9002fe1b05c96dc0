"""The settings with which a pipeline draws if its call names none."""

import logging
from pathlib import Path
from typing import Any

from diffusers import DiffusionPipeline

from dae_diffusers.errors import UserError
from dae_diffusers.metrics.sampling import options_in_words
from dae_diffusers.metrics.schedulers import drawing_by, keep_scheduler
from dae_diffusers.metrics.sweep import NOT_SWEPT, SWEPT
from dae_diffusers.pipelines.dae_dit import DAEDiTPipeline, save_code
from dae_diffusers.pipelines.dae_vqgan import PIPELINE_FILE, DAEVQGANPipeline
from dae_diffusers.store import read_json, write_atomically, write_json

logger = logging.getLogger(__name__)


def check_takes_defaults(name: str, pipeline: DiffusionPipeline) -> None:
    r"""Raises `UserError` if the pipeline keeps no defaults, or cannot be written to."""
    if not isinstance(pipeline, DAEDiTPipeline | DAEVQGANPipeline):
        raise UserError(
            f"`set_defaults` is for DAEDiTPipeline and DAEVQGANPipeline, but {name} is a {type(pipeline).__name__}. Leave it out."
        )
    if not Path(name).is_dir():
        raise UserError(
            f"`set_defaults` writes into the folder of a pipeline, but {name} is on the Hub. Download it first."
        )


def write_defaults(pipeline: Path, **options: float) -> None:
    r"""Makes options of the call those with which the pipeline in a folder draws by default."""
    path, code = pipeline / DAEDiTPipeline.config_name, pipeline / PIPELINE_FILE
    index = read_json(path)
    if code.exists() and not all(f"default_{option}" in code.read_text(encoding="utf-8") for option in options):
        logger.info("%s is of an earlier version, which does not know these defaults: it is replaced", code)
        if index["_class_name"] == "DAEVQGANPipeline":
            write_atomically(code, DAEVQGANPipeline._code)
        else:
            save_code(DAEDiTPipeline._code, pipeline, None)
    write_json(path, index | {f"default_{option}": value for option, value in options.items()})


def set_defaults(name: str, pipeline: DiffusionPipeline, rows: list[dict[str, Any]], distance: str) -> None:
    r"""
    Makes the settings of the row with the lowest distance those with which the pipeline draws by default.

    Args:
        name (`str`): The pipeline's folder.
        pipeline (`DiffusionPipeline`): The pipeline, with the scheduler of its folder.
        rows (`list[dict]`): The rows, with their settings.
        distance (`str`): The column of the distance.
    """
    best = min(rows, key=lambda row: row[distance])
    chosen = {option: best[option] for option in (*SWEPT, *NOT_SWEPT) if best.get(option) is not None}
    if chosen.get("guidance_scale") == 1:
        chosen.pop("guidance_interval", None)  # it was not used, and may not suit another scale
    scheduler = chosen.pop("scheduler", None)
    write_defaults(Path(name), **chosen)
    words = options_in_words(chosen)
    if scheduler is not None:
        with drawing_by(pipeline, scheduler):
            keep_scheduler(Path(name), pipeline)
        words = f"{words}, {scheduler}"
    logger.info("%s now draws with %s by default", name, words)
