"""Reads what runs have recorded: settings, logs, evaluations, grids."""

import math
import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from dae_diffusers.errors import UserError, in_full
from dae_diffusers.evaluation_record import best_row
from dae_diffusers.hub.results import SCRIPTS, is_script, read_yaml
from dae_diffusers.settings import is_of_one_run
from dae_diffusers.store import read_json_or, read_rows

_WHAT_TO_GIVE = "Give output folders of training scripts or of `evaluate`"


@dataclass(frozen=True)
class Script:
    r"""
    What one training script has left in a run.

    Attributes:
        folder (`Path`): Its folder, `<output_dir>/<name>`.
        settings (`dict`): Its flags, without those of the folder and of publishing.
        made_with (`dict`): What else it records of how it was made: numbers of images, hardware, versions.
        record (`dict`): Its `run.json`, with `steps` and `inputs` from the newest checkpoint if an earlier version has written it.
        log (`list[dict]`): The rows of its log: `step` and finite numbers.
    """

    folder: Path
    settings: dict[str, Any]
    made_with: dict[str, Any]
    record: dict[str, Any]
    log: list[dict[str, float]]

    @property
    def steps_done(self) -> int:
        return max((row["step"] for row in self.log), default=0)

    @property
    def steps_planned(self) -> int | None:
        r"""None if nothing says it."""
        return sum(self.record["steps"].values()) if "steps" in self.record else None

    def curve(self, name: str) -> list[tuple[int, float]]:
        r"""Steps and values of a logged number."""
        return [(row["step"], row[name]) for row in self.log if name in row]

    def final_curve(self, name: str) -> list[tuple[int, float]]:
        r"""The part of a curve that is of what is kept: after a stage 1, whose decoder is not. Empty if there is none yet."""
        steps = self.record.get("steps", {})
        first = steps.get("stage1_steps", 0) if "stage2_steps" in steps else 0
        return [point for point in self.curve(name) if point[0] > first or not first]

    @property
    def logged(self) -> list[str]:
        r"""Names of all logged numbers, in the order in which they appear."""
        return [name for name in dict.fromkeys(name for row in self.log for name in row) if name != "step"]


@dataclass(frozen=True)
class Evaluation:
    r"""The `metrics.json` of `evaluate`, its folder, and its settings and versions as those of a [`Script`]."""

    folder: Path
    settings: dict[str, Any]
    made_with: dict[str, Any]
    metrics: dict[str, Any]

    @property
    def setting(self) -> dict[str, Any]:
        r"""What the numbers depend on."""
        return self.metrics["setting"]

    @property
    def best(self) -> dict[str, Any]:
        r"""The best row of samples ([`~dae_diffusers.evaluation_record.best_row`])."""
        return best_row(self.metrics.get("generation") or [])


@dataclass(frozen=True)
class Run:
    r"""A folder that was given, and a name that tells it from the others."""

    name: str
    folder: Path
    scripts: dict[str, Script]
    evaluation: Evaluation | None


def read_runs(folders: Sequence[str | Path]) -> tuple[list[Run], list[str]]:
    r"""
    Reads runs.

    Args:
        folders (`Sequence[str | Path]`): Output folders of training scripts, of `evaluate`, or of both.

    Returns:
        `tuple[list[Run], list[str]]`: The runs, and a sentence for each folder that holds none.

    Raises:
        UserError: If a folder does not exist or is given twice, none holds a run, or a run's settings cannot be read.
    """
    known: dict[Path, Path] = {}
    found: dict[Path, Run] = {}
    left_out = []
    for folder in map(Path, folders):
        if folder.is_file():
            left_out.append(f"{folder} is a file.")
            continue
        if not folder.is_dir():
            raise UserError(f"{folder} is not a folder. {_WHAT_TO_GIVE}{in_full(folder)}.")
        place = folder.resolve()
        if place in known:
            same = "is given twice" if folder == known[place] else f"and {known[place]} are the same folder"
            raise UserError(f"{folder} {same}. Give each run once.")
        known[place] = folder
        run = _read_run(folder)
        if run is None:
            left_out.append(_describe_other(folder))
        else:
            found[folder] = run
    if not found:
        raise UserError(left_out[0])
    return [replace(run, name=name) for name, run in zip(short_names([*found]), found.values(), strict=True)], left_out


def short_names(folders: Sequence[Path]) -> list[str]:
    r"""The parts of paths that tell them apart: without the folders that all begin with, and those that all end with."""
    parts = [Path(os.path.abspath(folder)).parts for folder in folders]
    shortest = min(map(len, parts))
    first = min(_num_shared(parts), shortest - 1)
    last = min(_num_shared([each[::-1] for each in parts]), shortest - first - 1)
    return ["/".join(each[first : len(each) - last]) for each in parts]


def _num_shared(parts: Sequence[Sequence[str]]) -> int:
    """How many elements all sequences begin with."""
    return next((n for n, each in enumerate(zip(*parts, strict=False)) if len(set(each)) > 1), min(map(len, parts)))


def _describe_other(folder: Path) -> str:
    """A sentence about a folder that holds no run, with where one is, if it is near."""
    inside = [path.name for path in sorted(folder.iterdir()) if path.is_dir() and _looks_like_run(path)]
    near = next(filter(_looks_like_run, Path(os.path.abspath(folder)).parents), None)
    advice = f"{_WHAT_TO_GIVE}."
    if inside:
        advice = f"Give the folders in it ({', '.join(inside[:3])}{', ...' if len(inside) > 3 else ''})."
    elif near is not None:
        advice = f"Give {os.path.relpath(near)}."
    return f"{folder} holds no run: none of {', '.join(SCRIPTS)}, and no metrics.json of `evaluate`. {advice}"


def _looks_like_run(folder: Path) -> bool:
    names = (*(f"{name}/config.yaml" for name in SCRIPTS), "metrics.json")
    return any((folder / name).exists() for name in names)


def _read_run(folder: Path) -> Run | None:
    scripts = {name: _read_script(folder / name) for name in SCRIPTS if is_script(folder / name)}
    evaluation = _read_evaluation(folder)
    return Run(folder.name, folder, scripts, evaluation) if scripts or evaluation else None


def _read_script(folder: Path) -> Script:
    config = read_yaml(folder / "config.yaml")
    record = read_json_or(folder / "run.json", {})
    checkpoint = max((folder / "checkpoints").glob("checkpoint-*/checkpoint.json"), default=None)
    if checkpoint is not None and "steps" not in record:
        state = read_json_or(checkpoint, {}).get("state", {})
        record |= {"steps": state["plan"]["steps"], "inputs": state["inputs"]} if "plan" in state else {}
    counts = {name.replace("_", " "): n for name, n in record.get("counts", {}).items() if name != "parameters"}
    made = {"hardware": record["hardware"]} if "hardware" in record else {}
    root = str(config.get("output_dir")).rstrip("/")
    made_with = counts | made | record.get("versions", {})
    log = [
        {name: value for name, value in row.items() if _is_number(value)}
        for row in read_rows(folder / "log.jsonl", step=int)
    ]
    return Script(folder, _own_settings(config, root), made_with, record, log)


def _read_evaluation(folder: Path) -> Evaluation | None:
    for path in (folder / "metrics.json", folder / "evaluation" / "metrics.json"):
        metrics = read_json_or(path, {})
        if isinstance(metrics.get("setting"), dict):  # other scripts write a file of this name, too
            config = metrics["setting"].get("config", {})
            root = os.path.dirname(str(config.get("output_dir")).rstrip("/"))
            versions = metrics["setting"].get("versions", {})
            return Evaluation(path.parent, _own_settings(config, root), versions, metrics)
    return None


def _own_settings(config: dict[str, Any], root: str) -> dict[str, Any]:
    """Settings that can tell runs apart. A path in the run's own folder, such as that of its autoencoder, is the same in all."""
    return {
        name: f"its own {value[len(root) + 1 :]}" if root and str(value).startswith(f"{root}/") else value
        for name, value in config.items()
        if not is_of_one_run(name)
    }


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
