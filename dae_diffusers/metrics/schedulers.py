"""Other schedulers than a pipeline's own, to compare what they draw."""

import difflib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import diffusers
from diffusers import DiffusionPipeline, SchedulerMixin

from dae_diffusers.errors import UserError, one_line
from dae_diffusers.store import read_json, write_json

_ENDING = "Scheduler"


@contextmanager
def drawing_by(pipeline: DiffusionPipeline, name: str | None) -> Iterator[None]:
    r"""
    Inside the `with` block, the pipeline draws with another scheduler, made from the config of its own.

    Args:
        pipeline (`DiffusionPipeline`): The pipeline.
        name (`str`, *optional*): Class of the scheduler; None changes nothing.

    Raises:
        UserError: If there is no such scheduler, or it cannot draw from what this pipeline has learnt.
    """
    if name is None:
        yield
        return
    own, other = pipeline.scheduler, _class_of(name)
    try:
        pipeline.scheduler = other.from_config(own.config)
    except (ValueError, TypeError, NotImplementedError) as error:  # ours check it
        raise UserError(f"`schedulers` {name} does not suit the pipeline: {one_line(error, 300)}") from None
    try:
        yield
    finally:
        pipeline.scheduler = own


def full_name(name: str) -> str:
    r"""The class that a name such as `DDIM` or `DDIMScheduler` stands for. Raises `UserError` if diffusers has none."""
    return _class_of(name).__name__


def keep_scheduler(folder: Path, pipeline: DiffusionPipeline) -> None:
    r"""Makes the scheduler with which a pipeline draws now that of its folder."""
    pipeline.scheduler.save_pretrained(folder / "scheduler")
    path = folder / DiffusionPipeline.config_name
    write_json(path, read_json(path) | {"scheduler": ["diffusers", type(pipeline.scheduler).__name__]})


def _class_of(name: str) -> type[SchedulerMixin]:
    known = {each.removesuffix(_ENDING): getattr(diffusers, each) for each in dir(diffusers) if each.endswith(_ENDING)}
    found = known.get(name.removesuffix(_ENDING))
    if _is_scheduler(found):
        return found
    if found is not None:
        raise UserError(f"`schedulers`: {name} needs a package that is not installed: {one_line(_reason(found), 200)}")
    usable = {each.lower(): each for each, found in known.items() if _is_scheduler(found)}
    alike = [each for each in usable if each.startswith(name.lower())]
    alike += difflib.get_close_matches(name.removesuffix(_ENDING).lower(), usable, n=3)
    names = " or ".join(dict.fromkeys(usable[each] for each in alike[:3]))
    hint = f"Did you mean {names}?" if names else "Such names are DDIM, DDPM, DPMSolverMultistep, UniPCMultistep."
    raise UserError(f"`schedulers`: diffusers has no scheduler {name!r}. {hint}")


def _is_scheduler(found: Any) -> bool:
    return isinstance(found, type) and issubclass(found, SchedulerMixin)


def _reason(stand_in: Any) -> str:
    """What diffusers says when a class is used whose package is missing."""
    try:
        stand_in()
    except ImportError as error:
        return str(error)
    return "diffusers does not say which."
