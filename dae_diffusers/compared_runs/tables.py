"""Tables of what differs between runs: settings and results, with the best of each row in bold, and what cannot be compared."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from dae_diffusers.compared_runs.reading import Evaluation, Run, Script
from dae_diffusers.directions import direction, with_arrow
from dae_diffusers.duration import duration
from dae_diffusers.engine.plan import TRAINING_IMAGES
from dae_diffusers.errors import UserError, one_line
from dae_diffusers.evaluation_record import words_of_setting
from dae_diffusers.hub.results import SCRIPTS

EVALUATION = "evaluate"
_MISSING = "–"
_MARK = "†"
_ABSENT = object()

# Beside the images, what the validation numbers of a training depend on: the settings of the judge and of the loss.
_DEPENDS_ON = {
    "gfd_": ("metric_features", "metric_images"),
    "gfid": ("metric_features", "metric_images"),
    "rfd_": ("metric_features",),
    "rfid": ("metric_features",),
    "generated_fd": ("feature_model", "pool_size"),
    "loss": ("distill_guidance_scale",),
}
# What held-out images depend on beside the training images that are left.
_OF_HELD_OUT_IMAGES = ("validation_split", "max_validation_samples", "resolution", "image_channels", "pad")
# What the texts depend on that samples are drawn from.
_OF_TEXTS = ("caption_column", "draw_from", "prompt")
# What stands for the fingerprint of images, and for the objective of a generator, where these were not recorded.
_OF_IMAGES = ("dataset_name", "dataset_config_name", "train_data_dir", "training images")
_OF_OBJECTIVE = ("pretrained_model_name_or_path", "timestep_shift")


@dataclass(frozen=True)
class Row:
    r"""
    One number of several runs.

    Attributes:
        name (`str`): Its name in the log or in `metrics.json`, which says in which direction it is better.
        values (`list[float | None]`): The value of each run; None where there is none.
        more (`list[str]`): What stands behind each value.
        shown (`str`, *optional*): What stands behind the name.
        depends_on (`dict[str, list]`): What the number was measured with, the value of each run; unknown ones are None.
    """

    name: str
    values: list[float | None]
    more: list[str]
    shown: str = ""
    depends_on: dict[str, list[Any]] | None = None

    @property
    def obstacles(self) -> list[str]:
        r"""What differs, so that the values cannot be compared."""
        measured = [n for n, value in enumerate(self.values) if value is not None]
        known = {name: [each[n] for n in measured] for name, each in (self.depends_on or {}).items()}
        return [name for name, each in known.items() if _differ([value for value in each if value is not None])]

    def cells(self) -> list[str]:
        r"""The row as text: with an arrow, with the best values in bold, and marked if they cannot be compared."""
        texts = [_MISSING if value is None else f"{value:.5g}" for value in self.values]
        best = None if self.obstacles else self._best(texts)
        values = [f"**{text}**" if text == best else text for text in texts]
        mark = f" {_MARK}" if self.obstacles else ""
        return [with_arrow(self.name) + self.shown + mark, *(v + m for v, m in zip(values, self.more, strict=True))]

    def _best(self, texts: list[str]) -> str | None:
        """The text of the best value, unless all values look alike."""
        known = [(value, text) for value, text in zip(self.values, texts, strict=True) if value is not None]
        if len({text for _, text in known}) < 2 or not (arrow := direction(self.name)):
            return None
        return (max if arrow == "↑" else min)(known)[1]


def write_tables(runs: Sequence[Run], left_out: Iterable[str]) -> str:
    r"""
    The comparison as Markdown.

    Args:
        runs (`Sequence[Run]`): The runs; one alone is summed up.
        left_out (`Iterable[str]`): Sentences about what is not compared.

    Raises:
        UserError: If no two runs have the same script.
    """
    parts = _parts(runs)
    shared = {name: of for name, of in parts.items() if len(of) >= min(2, len(runs))}
    if not shared:
        kinds = "; ".join(
            f"{run.name} has {' and '.join(n for n, of in parts.items() if run.name in of)}" for run in runs
        )
        raise UserError(f"these runs share nothing that could be compared: {kinds}. Give two runs of the same script.")
    lines = [f"- **{run.name}**: {run.folder}" for run in runs if run.name != str(run.folder)]
    lines += [""] if lines else []
    lines += [line for text in left_out for line in (f"Left out: {text}", "")]
    if len(runs) > 1:
        lines += ["## Settings that differ", ""]
        lines += [line for name, of in shared.items() for line in _settings_table(name, of)]
    lines += ["## Results", ""]
    for name, of in shared.items():
        table = _evaluation_table(of) if name == EVALUATION else _training_table(of)
        lines += [f"### {name}", *table, ""]
    if len(runs) > 1:
        for name, of in parts.items():
            if name not in shared:
                lines += [f"Only {next(iter(of))} has {name}: that is not compared.", ""]
    lines += [line for run in runs for line in _other_weights(run)]
    return "\n".join(lines)


def _parts(runs: Sequence[Run]) -> dict[str, dict[str, Any]]:
    """The runs that have each script, by name, in the order of the scripts; last the evaluations."""
    parts = {name: {run.name: run.scripts[name] for run in runs if name in run.scripts} for name in SCRIPTS}
    parts[EVALUATION] = {run.name: run.evaluation for run in runs if run.evaluation is not None}
    return {name: of for name, of in parts.items() if of}


def _settings_table(name: str, of: dict[str, Script | Evaluation]) -> list[str]:
    flags = [(key, [each.settings.get(key, _ABSENT) for each in of.values()]) for key in _keys(of, "settings")]
    facts = [(key, [each.made_with.get(key, _ABSENT) for each in of.values()]) for key in _keys(of, "made_with")]
    rows = [row for row in flags if _differ(row[1])]
    rows += [row for row in facts if _differ([value for value in row[1] if value is not _ABSENT])]
    rows = [[key, *map(_setting_text, values)] for key, values in rows]
    if not rows:
        return [f"### {name}", "None: all settings are the same.", ""]
    return [f"### {name}", *_table([["setting", *of], *rows]), ""]


def _keys(of: dict[str, Script | Evaluation], attribute: str) -> list[str]:
    return list(dict.fromkeys(key for each in of.values() for key in getattr(each, attribute)))


def _training_table(of: dict[str, Script]) -> list[str]:
    scripts = list(of.values())
    facts = [
        ["steps", *(_steps_text(each) for each in scripts)],
        ["training time", *(duration(s) if s else _MISSING for s in (each.record.get("seconds") for each in scripts))],
        ["seconds a step", *map(_pace_text, scripts)],
        ["parameters", *(_fact(each.record.get("counts", {}).get("parameters")) for each in scripts)],
        ["exported step", *(_fact(each.record.get("exported_step")) for each in scripts)],
    ]
    names = dict.fromkeys(key for each in scripts for key in each.logged if key.startswith("validation/"))
    rows = [row for key in names for row in _validation_rows(key, scripts)]
    return _results(of, facts, rows)


def _validation_rows(key: str, scripts: list[Script]) -> list[Row]:
    """The last value of a validation number, and the best with its step."""
    name, depends_on = key.removeprefix("validation/"), _measured_with(key, scripts)
    final = [each.final_curve(key) for each in scripts]
    curves = [of_end or each.curve(key) for each, of_end in zip(scripts, final, strict=True)]
    depends_on["decoder (stage 1 has another)"] = ["final" if of_end else "of stage 1" for of_end in final]
    last = [curve[-1][1] if curve else None for curve in curves]
    rows = [Row(name, last, [""] * len(scripts), ", last", depends_on)]
    if arrow := direction(name):
        choose = max if arrow == "↑" else min
        best = [choose(curve, key=lambda point: point[1]) if curve else None for curve in curves]
        values, steps = ([None if each is None else each[n] for each in best] for n in (1, 0))
        more = ["" if step is None else f" (step {step})" for step in steps]
        rows.append(Row(name, values, more, ", best", depends_on))
    return rows


def _measured_with(key: str, scripts: list[Script]) -> dict[str, list[Any]]:
    """What a validation number depends on beside the weights: the value of each run, None if it is unknown."""
    name = key.removeprefix("validation/")
    inputs = [each.record.get("inputs") for each in scripts]
    names = dict.fromkeys(n for each in inputs for n in each or ())
    if name != "loss":  # that of a generator depends on its latents and conditions, too
        names = [n for n in names if n == TRAINING_IMAGES]
    found = {n: [None if each is None else str(each.get(n)) for each in inputs] for n in names}
    settings = [n for start, needed in _DEPENDS_ON.items() if name.startswith(start) for n in needed]
    settings += [*_OF_HELD_OUT_IMAGES, *(_OF_IMAGES if None in inputs else ())]
    if name == "loss":
        found |= {n: [each.record.get(n) for each in scripts] for n in ("objective", "timestep_shift")}
        settings += _OF_OBJECTIVE if None in found["objective"] else ()
    known = [each.settings | each.made_with for each in scripts]
    return found | {n: [_as_value(each.get(n, _ABSENT)) for each in known] for n in settings}


def _evaluation_table(of: dict[str, Evaluation]) -> list[str]:
    evaluations = list(of.values())
    settings = [each.setting for each in evaluations]
    judges = [each.get("features") or {} for each in settings]
    size, pad = ([_as_value(each.settings.get(n, _ABSENT)) for each in evaluations] for n in ("resolution", "pad"))
    shown = {
        "judge": [f"{each['name']} ({each.get('fingerprint')})" if "name" in each else None for each in judges],
        "training images": [_images_text(each.get("train_images")) for each in settings],
        "held-out images": [_images_text(each.get("validation_images")) for each in settings],
        "resolution": size,
        "samples": [each.best.get("num_images") for each in evaluations],
        "drawn with": [_drawing_text(each) for each in evaluations],
    }
    floors = [each.metrics.get("floor") or {} for each in evaluations]
    parts = {
        "held-out images": (
            [each.metrics.get("reconstruction", {}) for each in evaluations],
            [each.get("reconstruction", {}) for each in floors],
        ),
        "training images": (
            [each.best for each in evaluations],
            [each.get("generation", {}).get("real", {}) for each in floors],
        ),
    }
    rows = []
    for compared_with, (found, real) in parts.items():
        for name in dict.fromkeys(name for each in found for name in each):
            if name.endswith("_sd") or not (direction(name) or name == "authenticity"):
                continue
            depends_on = {compared_with: shown[compared_with], "resolution": size, "pad": pad}
            if name not in ("psnr", "ssim") and not name.startswith("lpips"):
                depends_on["judge"] = [_judge_of(name, each) for each in settings]
            if found is parts["training images"][0]:
                depends_on["samples"] = shown["samples"]
            if name.startswith("clip_score"):
                depends_on["texts"] = [[each.settings.get(flag) for flag in _OF_TEXTS] for each in evaluations]
            if name == "gap":
                depends_on["autoencoder"] = [each.get("weights", {}).get("vae") for each in settings]
            more = [f" ± {each[f'{name}_sd']:.2g}" if each.get(f"{name}_sd") else "" for each in found]
            rows.append(Row(name, [each.get(name) for each in found], more, depends_on=depends_on))
            if any(name in each for each in real):
                rows.append(Row("", [each.get(name) for each in real], [""] * len(of), f"{name} of real images"))
    return _results(of, [[name, *map(_fact, values)] for name, values in shown.items()], rows)


def _judge_of(metric: str, setting: dict[str, Any]) -> str | None:
    """The fingerprint of a metric's judge: a distance in the features of a further judge has their name."""
    if metric.startswith("clip_score"):
        return (setting.get("clip_model") or {}).get("fingerprint")
    further = (setting.get("more_features") or {}).get(metric.partition("fd_")[2])
    return further or (setting.get("features") or {}).get("fingerprint")


def _results(names: Iterable[str], facts: list[list[str]], rows: list[Row]) -> list[str]:
    """A table without empty rows; below it, what cannot be compared, and why."""
    facts = [row for row in facts if any(text != _MISSING for text in row[1:])]
    lines = _table([["", *names], *facts, *(row.cells() for row in rows)])
    reasons: dict[str, list[str]] = {}
    for row in rows:
        if obstacles := row.obstacles:
            reasons.setdefault(_listed(obstacles), []).append(row.name)
    for reason, metrics in reasons.items():
        listed = _listed([f"`{name}`" for name in dict.fromkeys(metrics)])
        lines += ["", f"{_MARK} Not comparable: {listed}, because these differ: {reason}."]
    if any(TRAINING_IMAGES in row.obstacles for row in rows):
        lines.append(
            "Other training images leave other images to validate on, unless the data set has a validation split. Measure all runs on the "
            "same images with `evaluate`."
        )
    return lines


def _other_weights(run: Run) -> list[str]:
    """A sentence if the evaluation of a run measured other weights than its generator's training has made."""
    if run.evaluation is None:
        return []
    measured = run.evaluation.setting.get("weights", {})
    made = {part: of for script in run.scripts.values() for part, of in script.record.get("weights", {}).items()}
    differing = [part for part in made if part in measured and made[part] != measured[part]]
    if not differing:
        return []
    return [
        f"{run.name}: {run.evaluation.folder} measured other weights ({', '.join(differing)}) than the training made last. If nothing "
        "else changed the pipeline (`ema`, stage 3, `assemble`), measure again.",
        "",
    ]


def _steps_text(script: Script) -> str:
    return f"{script.steps_done}" if script.steps_planned is None else f"{script.steps_done} of {script.steps_planned}"


def _pace_text(script: Script) -> str:
    """Seconds a step. The time is noted at checkpoints and at the end, the log of an unfinished run may be further."""
    seconds = script.record.get("seconds")
    return f"{seconds / script.steps_done:.2g}" if seconds and script.steps_done == script.steps_planned else _MISSING


def _images_text(images: dict[str, Any] | None) -> str | None:
    return f"{images.get('number')} ({images.get('fingerprint')})" if images else None


def _drawing_text(evaluation: Evaluation) -> str | None:
    number = len(evaluation.metrics.get("generation") or ())
    best = f"best of {number}" if number > 1 else ""
    return ", ".join(filter(None, (words_of_setting(evaluation.best), best))) or None


def _setting_text(value: Any) -> str:
    if value is _ABSENT:
        return _MISSING
    if isinstance(value, bool):
        return "yes" if value else "no"
    if value in (None, []):
        return "not given"
    return one_line(" ".join(map(str, value)) if isinstance(value, list) else value)


def _fact(value: Any) -> str:
    return _MISSING if value is None else f"{value:,}" if isinstance(value, int) else str(value)


def _as_value(value: Any) -> Any:
    """A setting as what a number depends on, where None stands for unknown."""
    return None if value is _ABSENT else _setting_text(value)


def _differ(values: Sequence[Any]) -> bool:
    return any(value != values[0] for value in values[1:])


def _listed(words: Sequence[str]) -> str:
    return " and ".join(filter(None, (", ".join(words[:-1]), words[-1])))


def _table(rows: list[list[str]]) -> list[str]:
    """A table in Markdown whose columns are aligned, so that it can be read in a terminal, too. The first row is the head."""
    rows = [[text.replace("|", "\\|") for text in row] for row in rows]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = [
        "| " + " | ".join(text.ljust(width) for text, width in zip(row, widths, strict=True)) + " |" for row in rows
    ]
    return [lines[0], "|" + "|".join("-" * (width + 2) for width in widths) + "|", *lines[1:]]
