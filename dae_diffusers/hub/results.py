"""Reads what a run has written: models, and how they were made."""

import math
import re
import shlex
import shutil
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from dae_diffusers.data import EMBEDDED
from dae_diffusers.errors import UserError, one_line
from dae_diffusers.evaluation_record import name_of_setting
from dae_diffusers.fit_record import read_fit
from dae_diffusers.settings import is_of_one_run, without_paths
from dae_diffusers.store import bring_back, read_json, read_json_or, read_rows
from dae_diffusers.weights import have_other_encoders, weights_fingerprint_of

PIPELINE_INDEX = "model_index.json"

# The scripts, in the order in which they run, and what their curves show. Each has a folder of its name in the output folder.
SCRIPTS = {
    "train_dae": "Training of the autoencoder",
    "train_dit": "Training of the generator",
    "train_vqgan_prior": "Training of the generator",
    "train_dae_stage3": "Training of the decoder on what the generator draws",
}
UNFINISHED = "unfinished"  # in the `run.json` of a training that has not ended, or went on and has not ended since
_GENERATOR_SCRIPTS = ("train_dit", "train_vqgan_prior")

# Flags for the machine, which do not describe the model.
_OF_MACHINE = ("logging_steps", "checkpoints_total_limit")

# Pictures that show images of the data set themselves.
DATA_PICTURES = ("reconstructions.png", "nearest.png")
# All pictures that a result can have.
PICTURES = (*DATA_PICTURES, "samples.png", "stage3.png", "sweep.png", *(f"{name}_curves.png" for name in SCRIPTS))
# What the repository of a pipeline says of its weights in numbers.
NUMBERS = ("metrics.json", *(f"training/{name}.{suffix}" for name in SCRIPTS for suffix in ("yaml", "json")))

# Parts of an evaluation by what was measured.
_OF_AUTOENCODER, _OF_SAMPLES = ("reconstruction", "latent_space", "codebook"), ("generation", "classes")
# Parts of a pipeline.
_AUTOENCODERS, _GENERATORS = ("vae", "vqvae"), ("transformer", "guidance_transformer", "prior", "unet")


@dataclass
class Script:
    r"""
    The part of one script in a result: of a training script, or of the evaluation.

    Attributes:
        config (`dict`): Its settings, without those of the machine; absolute paths are shortened to their last part.
        record (`dict`): Its `run.json`: command, seconds, hardware, versions, counts. Empty for runs without one.
        validation (`dict`): The last validation values of its log.
        has_local_data (`bool`): Whether the images were in a folder, which the config may no longer show.
        has_other_weights (`bool`): Whether what it measured and drew is not of the weights that are published.
    """

    folder: Path
    config: dict[str, Any]
    record: dict[str, Any]
    validation: dict[str, float]
    has_local_data: bool = False
    has_other_weights: bool = False

    @property
    def names_images(self) -> bool:
        r"""Whether its settings say which images it read; those of a generator on cached latents may not."""
        return bool(self.config.get("dataset_name") or self.config.get("train_data_dir"))

    @property
    def has_public_images(self) -> bool:
        r"""Whether its images come with the package, or have a name on the Hub."""
        name = self.config.get("dataset_name")
        if self.has_local_data or not name:
            return False
        return name in EMBEDDED or (bool(re.fullmatch(r"\b[\w.-]+(/\b[\w.-]+)?\b", name)) and not Path(name).exists())


@dataclass
class Result:
    r"""
    Models that can be published, and all information about them in the run's folder.

    Attributes:
        pipeline (`Path`, *optional*): Folder with `model_index.json`; None for an autoencoder alone.
        vae (`Path`, *optional*): Folder of the autoencoder.
        index (`dict`): `model_index.json`, or empty.
        vae_config (`dict`): The autoencoder's `config.json`, or empty.
        scripts (`dict[str, Script]`): By name, in the order in which they ran.
        evaluation (`Script`, *optional*): The settings of the evaluation in `metrics` and `pictures`; empty if it recorded none.
        metrics (`dict`): What was measured, by source.
        pictures (`dict[str, tuple[Path, str]]`): File name in the repository to file and caption.
        doubts (`list[str]`): What was left out because it is of other weights, and what cannot be checked.
    """

    folder: Path
    pipeline: Path | None
    vae: Path | None
    index: dict[str, Any] = field(default_factory=dict)
    vae_config: dict[str, Any] = field(default_factory=dict)
    scripts: dict[str, Script] = field(default_factory=dict)
    evaluation: Script | None = None
    metrics: dict[str, Any] = field(default_factory=dict)
    pictures: dict[str, tuple[Path, str]] = field(default_factory=dict)
    doubts: list[str] = field(default_factory=list)

    @property
    def decoder_fit(self) -> dict[str, Any]:
        r"""How stage 3 fitted the pipeline's decoder to its generator; empty where it did not."""
        return {} if self.pipeline is None else without_paths(read_fit(self.pipeline))

    @property
    def average_length(self) -> float | None:
        r"""The length of the average whose weights `dae-diffusers ema` put into the pipeline; None if they are those of the training."""
        for part in ("transformer", "prior") if self.pipeline is not None else ():
            record = read_json_or(self.folder / f"{part}_before_ema" / "ema.json", {})
            if record and record.get("weights") == weights_fingerprint_of(self.pipeline / part):
                return record.get("length")
        return None

    @property
    def data_script(self) -> Script | None:
        r"""The script whose images the result draws or reconstructs: that of the generator, else that of the autoencoder."""
        known = {name: script for name, script in self.scripts.items() if script.names_images}
        return next((known[name] for name in (*_GENERATOR_SCRIPTS, *SCRIPTS) if name in known), None)

    @property
    def has_private_data(self) -> bool:
        r"""
        Whether any images may be private, of training or of the evaluation: they neither come with the package nor have a name
        on the Hub, or nothing says which they are.
        """
        return not self.scripts or not all(script.has_public_images for script in self._readers)

    @property
    def data_sets(self) -> set[str]:
        r"""Names on the Hub of the data sets of training and evaluation."""
        names = {script.config.get("dataset_name") for script in self._readers if script.has_public_images}
        return names - {*EMBEDDED}

    @property
    def _readers(self) -> list[Script]:
        return [*self.scripts.values(), *([] if self.evaluation is None else [self.evaluation])]

    @property
    def generator_origin(self) -> str | None:
        r"""The weights that the transformer's training started from; None if it began as a new one."""
        script = self.scripts.get("train_dit")
        return None if script is None else script.config.get("pretrained_model_name_or_path")

    @property
    def autoencoder_origin(self) -> dict[str, str]:
        r"""
        How the autoencoder was trained, as far as the run's folder tells: `auxiliary_decoder`, the kind that its encoder was
        trained with (`none` is joint training); or `fine_tuned_from`, if only the decoder of a given autoencoder was trained.
        """
        if "train_dae" not in self.scripts:
            return {}
        config = self.scripts["train_dae"].config
        stage1 = self.folder / "stage1" / "config.json"
        started_from = config.get("pretrained_model_name_or_path")
        if config.get("stage") == "2" and started_from:
            return {"fine_tuned_from": started_from}
        if stage1.exists():
            return {"auxiliary_decoder": read_json(stage1).get("auxiliary_decoder_type", "none")}
        if config.get("stage") == "2":  # of a stage 1 elsewhere, whose kind the flags do not say
            return {}
        return {"auxiliary_decoder": config["auxiliary_decoder"]} if "auxiliary_decoder" in config else {}


def read_result(folder: str | Path) -> Result:
    r"""
    Reads a result from a folder.

    Args:
        folder (`str` or `Path`): The output folder of a training run, or a pipeline's or an autoencoder's folder. Logs and
            metrics beside the latter two are found too, if one of our scripts has written them.

    Returns:
        [`Result`]: With a pipeline, an autoencoder or both.

    Raises:
        UserError: If there is neither, a pipeline's folder lacks the code that it needs to load elsewhere, or a model's the weights
            that are loaded by default.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise UserError(f"{folder} is not a folder. Give the output folder of a training run, or a pipeline's folder.")
    if (folder / PIPELINE_INDEX).exists():
        pipeline, run = folder, folder.resolve().parent
    elif (folder / "config.json").exists():
        _check_autoencoder(folder)
        _check_weights([folder])
        return _describe(Result(folder.resolve().parent, None, folder), is_run=False)
    else:
        pipeline, run = folder / "pipeline", folder
    if not (pipeline / PIPELINE_INDEX).exists():
        vae = run / "vae"
        if not (vae / "config.json").exists():
            raise UserError(
                f"{folder} holds nothing that can be published: neither pipeline/{PIPELINE_INDEX} nor vae/config.json. "
                "Give the output folder of a finished training run."
            )
        _check_weights([vae])
        return _describe(Result(run, None, vae), is_run=True)
    result = Result(run, pipeline, pipeline / "vae" if (pipeline / "vae").is_dir() else None)
    result.index = read_json(pipeline / PIPELINE_INDEX)
    _check_code(result)
    _check_weights([pipeline / name for name in components_of(result.index)])
    return _describe(result, is_run=pipeline != folder)


def is_stage1_alone(folder: str | Path) -> bool:
    r"""Whether a run's output folder holds the autoencoder of stage 1 and no final one."""
    holds = [(Path(folder) / name).exists() for name in ("stage1/config.json", "vae", f"pipeline/{PIPELINE_INDEX}")]
    return holds == [True, False, False]


def is_leftover(path: Path) -> bool:
    r"""Whether a file or folder is a leftover of a kill during a write: by safetensors, by our files, or by checkpoints."""
    return re.fullmatch(r"\.tmp\w{6}|.+\.tmp|tmp-(old-)?checkpoint-\d+", path.name) is not None


def remove_leftovers(folder: str | Path) -> list[Path]:
    r"""
    Removes leftovers of kills from the output folder of a run (see [`is_leftover`]), and brings back what was being replaced. Of links, it
    removes only the link.

    Call it when no other run writes there.

    Returns:
        `list[Path]`: What was removed.
    """
    bring_back(Path(folder))
    found = [path for path in sorted(Path(folder).rglob("*")) if is_leftover(path)]
    for path in found:
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)
    return found


def latest_grid(script_folder: Path, pattern: str) -> Path | None:
    r"""The newest picture of a kind, such as `samples-*.png`, in a script's `grids/`."""
    return max((script_folder / "grids").glob(pattern), default=None)


def components_of(index: dict[str, Any]) -> dict[str, str]:
    r"""The library or module of each component of a pipeline, from its `model_index.json`."""
    pairs = {name: value for name, value in index.items() if isinstance(value, list) and len(value) == 2}
    pairs = {name: value for name, value in pairs.items() if not name.startswith("_") and name != "value_range"}
    return {name: value[0] for name, value in pairs.items() if all(isinstance(word, str) for word in value)}


def _check_autoencoder(folder: Path) -> None:
    """Refuses the folder of a model that is no autoencoder of diffusers."""
    config = read_json(folder / "config.json")
    name = config.get("_class_name")
    if re.fullmatch(r"(Asymmetric)?Autoencoder\w*|VQModel", str(name)) or "auto_map" in config:
        return
    what = f"a {name}" if name else "no model of diffusers"
    advice = "Give the output folder of a training run, a pipeline's folder, or that of an autoencoder."
    if folder.name == "stage1":
        advice = f"To publish stage 1, give its run: `dae-diffusers push {folder.parent} USER/NAME --stage1`."
    raise UserError(f"{folder} holds {what}, which cannot be published alone. {advice}")


def _check_code(result: Result) -> None:
    import diffusers  # only here: the rest reads files

    missing = []
    for name, module in components_of(result.index).items():
        if module.partition(".")[0] not in ("diffusers", "transformers") and not hasattr(diffusers.pipelines, module):
            missing += [f"{name}/{module}.py"] if not (result.pipeline / name / f"{module}.py").exists() else []
    if not (result.pipeline / "pipeline.py").exists() and not _is_stock(result.index.get("_class_name")):
        missing.append("pipeline.py")
    if missing:
        raise UserError(
            f"{result.pipeline} lacks {' and '.join(missing)}, the code with which it loads where only diffusers is "
            "installed. Load it with its pipeline class and save it again with `save_pretrained`."
        )


def _check_weights(models: list[Path]) -> None:
    """Refuses models whose weights `from_pretrained` would not find: the Hub may still have others of the names that it looks for."""
    for folder in models:
        names = {path.name for path in folder.glob("*model*")}
        found = sorted(name for name in names if name.endswith((".bin", ".safetensors")))
        wanted = [
            f"{each}.safetensors{end}" for each in ("diffusion_pytorch_model", "model") for end in ("", ".index.json")
        ]
        index = next(folder.glob("*model.safetensors.index.json"), None)
        shards = set(read_json(index).get("weight_map", {}).values()) if index is not None else set()
        lacks = sorted(shards - names) or (
            ["model.safetensors"] if (folder / "config.json").exists() and not found else []
        )
        if lacks:
            raise UserError(
                f"{folder} lacks its weights, such as {lacks[0]}. Save the model again with `save_pretrained`."
            )
        if found and names.isdisjoint(wanted):
            raise UserError(
                f"{folder} has its weights in {found[0]}, but must have them in safetensors files without a variant in their names. "
                "Load the model as it is, with its `variant`, and save it again with `save_pretrained(folder)` alone. `push --fp16` adds "
                "half precision."
            )


def _is_stock(class_name: Any) -> bool:
    import diffusers  # only here: the rest reads files

    return hasattr(diffusers, str(class_name))


def _describe(result: Result, *, is_run: bool) -> Result:
    """Adds the information in the folder. Without `is_run`, the folder is only the parent of the model, and may not be ours."""
    if result.vae is not None:
        result.vae_config = read_json(result.vae / "config.json")
    folders = [result.folder / name for name in SCRIPTS if is_script(result.folder / name)]
    if not is_run and not folders:
        return result
    for path in list(folders):  # the autoencoder may come from another run
        used = read_yaml(path / "config.yaml").get("vae")
        if used and Path(used).is_dir():
            other = Path(used) if (Path(used) / "train_dae").is_dir() else Path(used).resolve().parent
            is_other = other.resolve() != result.folder.resolve() and not _has_own_autoencoder(result)
            if is_other and is_script(other / "train_dae"):
                folders.insert(0, other / "train_dae")
    for path in list(folders):  # stage 3 may have begun with the pipeline of another run
        used = read_yaml(path / "config.yaml").get("pipeline")
        other = Path(used).resolve().parent if used and Path(used).is_dir() else result.folder
        if other.resolve() != result.folder.resolve():
            folders[:0] = [other / name for name in list(SCRIPTS)[:-1] if is_script(other / name)]
    for path in folders:
        if result.pipeline is None and path.name != "train_dae":
            continue
        result.scripts.setdefault(path.name, _read_script(path))
    _leave_out_other_encoder(result)
    _leave_out_unfinished(result)
    _leave_out_other_generator(result)
    result.metrics = _read_metrics(result)
    result.pictures = _find_pictures(result)
    if "evaluation" in result.metrics or "nearest.png" in result.pictures:
        result.evaluation = _read_evaluation(result.folder)
    return result


def _leave_out_other_encoder(result: Result) -> None:
    """Leaves `train_dae` out if it was run again since, so that its settings and images are those of another latent space."""
    script = result.scripts.get("train_dae")
    if script is None or result.vae is None:
        return
    if have_other_encoders(result.vae, script.folder.parent / "vae"):
        del result.scripts["train_dae"]
        result.doubts.append(
            f"{script.folder} is not published: it trained another encoder than that in {result.vae}. Train the generator again to "
            "publish both."
        )


def _leave_out_unfinished(result: Result) -> None:
    """Leaves out what a training has measured and drawn since its result was saved, if it went on and has not ended."""
    for script in result.scripts.values():
        if script.record.pop(UNFINISHED, None) is None:
            continue
        result.doubts.append(
            f"the numbers and pictures of {script.folder} are not published: that training went on and has not ended, so they are of other "
            f"weights than those in {result.pipeline or result.vae}. Let it end, with `resume_from_checkpoint latest`."
        )
        script.validation, script.has_other_weights = {}, True
        script.record.pop("exported_step", None)


def _leave_out_other_generator(result: Result) -> None:
    """Leaves out what the training of a generator measured and drew, if `ema`, stage 3 or `assemble` have changed the pipeline since."""
    for name in _GENERATOR_SCRIPTS:
        script = result.scripts.get(name)
        weights = None if script is None else script.record.get("weights")
        if script is None or script.has_other_weights or not weights or not _differing_parts(result, weights):
            continue
        if script.validation or latest_grid(script.folder, "samples-*.png"):
            features = script.config.get("metric_features")
            again = _evaluate_command(result, {"features": features}, is_of_samples=True) if features else ""
            result.doubts.append(
                f"the numbers and samples of {script.folder} are not published: they are of other weights than those in "
                f"{result.pipeline}{f', which `{again}` measures' if again else ''}."
            )
        script.validation, script.has_other_weights = {}, True
        script.record.pop("exported_step", None)


def _has_own_autoencoder(result: Result) -> bool:
    """Whether the run trained the autoencoder of its pipeline itself, wherever the generator found it: the run may be a copy."""
    if result.vae is None or not is_script(result.folder / "train_dae"):
        return False
    return weights_fingerprint_of(result.folder / "vae") == weights_fingerprint_of(result.vae) is not None


def is_script(folder: Path) -> bool:
    r"""Whether a folder is that of a script, which has written its settings there."""
    path = folder / "config.yaml"
    return path.exists() and isinstance(read_yaml(path), dict)


def _read_script(folder: Path) -> Script:
    config = {
        name: value
        for name, value in read_yaml(folder / "config.yaml").items()
        if name not in _OF_MACHINE and not is_of_one_run(name)
    }
    record = read_json(folder / "run.json") if (folder / "run.json").exists() else {}
    validation: dict[str, float] = {}
    last = record.get("exported_step") or math.inf  # `--export best`: the weights are older than the end of the log
    for row in read_rows(folder / "log.jsonl", step=int):
        if row["step"] > last:
            break
        values = {k.removeprefix("validation/"): v for k, v in row.items() if k.startswith("validation/")}
        validation = {**values, "step": row["step"]} if values else validation
    is_local = _is_local(config.get("dataset_name"), folder, record.get("local_data"))
    return Script(folder, without_paths(config), without_paths(record), validation, is_local)


def _read_evaluation(run: Path) -> Script:
    """The settings of a run's evaluation; none if it was interrupted, or does not say."""
    folder = run / "evaluation"
    metrics = read_json(folder / "metrics.json") if (folder / "metrics.json").exists() else {}
    setting = metrics.get("setting") or {}
    config = setting.get("config") or {}
    is_local = _is_local(config.get("dataset_name"), folder, setting.get("local_data"))
    return Script(folder, without_paths(config), {}, {}, is_local)


def _is_local(name: str | None, folder: Path, noted: bool | None) -> bool:
    """
    Whether a data set was a folder, as the run noted. Older runs did not: a relative folder lay where the script was started,
    somewhere above the run, most likely.
    """
    if noted is not None:
        return noted
    above = (Path(), *folder.resolve().parents)
    return bool(name) and name not in EMBEDDED and (Path(name).is_absolute() or any((p / name).exists() for p in above))


def _read_metrics(result: Result) -> dict[str, Any]:
    metrics = {name: script.validation for name, script in result.scripts.items() if script.validation}
    if not _has_decoder_of_its_training(result):
        metrics.pop("train_dae", None)
    if not result.decoder_fit:
        metrics.pop("train_dae_stage3", None)
    evaluation, check = (result.folder / name for name in ("evaluation/metrics.json", "metrics.json"))
    if evaluation.exists() and (found := _of_these_weights(result, evaluation)):
        metrics["evaluation"] = without_paths(found)
    if check.exists():
        found = read_json(check)
        if _differing_parts(result, found.get("weights") or {}):
            result.doubts.append(
                f"{check} is not published: it is of other weights. Run the script that wrote it again."
            )
        else:
            metrics["check"] = without_paths(found)
    return metrics


def _has_decoder_of_its_training(result: Result) -> bool:
    """Whether the decoder is that of `train_dae`, as far as can be told: stage 3 or `assemble` may have brought another."""
    script = result.scripts.get("train_dae")
    if result.vae is None or script is None:
        return True
    found = [weights_fingerprint_of(vae) for vae in (result.vae, script.folder.parent / "vae")]
    return None in found or found[0] == found[1]


def _of_these_weights(result: Result, path: Path) -> dict[str, Any]:
    """The numbers of an evaluation that were measured with the weights of the result. What is not of them becomes a doubt."""
    found = read_json(path)
    setting = found.get("setting") or {}
    config, weights = setting.get("config") or {}, setting.get("weights")
    if config.get("samples_dir"):  # images of any model
        return {}
    if weights:
        differing = _differing_parts(result, weights)
        is_known = all(_fingerprint_in(result, name) for name in weights.keys() - differing)
    else:
        places = [place for name in ("pipeline", "vae") if (place := config.get(name))]
        runs = [result.folder, *(script.folder.parent for script in result.scripts.values())]
        is_elsewhere = places and not any(_is_inside(place, run) for place in places for run in runs)
        differing, is_known = set(_AUTOENCODERS if is_elsewhere else ()), False
    left_out = [*(_OF_AUTOENCODER if differing & {*_AUTOENCODERS} else ()), *(_OF_SAMPLES if differing else ())]
    left_out = [name for name in left_out if found.pop(name, None) is not None]
    floor = found.get("floor") or {}
    for part in left_out:
        floor.pop(part, None)
    model = result.pipeline or result.vae
    again = _evaluate_command(result, config, is_of_samples="generation" in (*found, *left_out))
    if result.pipeline is None and left_out and {*_OF_SAMPLES}.issuperset(left_out):
        pass  # an autoencoder alone draws nothing
    elif left_out:
        result.doubts.append(
            f"{path} was measured with other weights than those in {model}. Not published: {', '.join(left_out)}. Measure again with "
            f"`{again}`."
        )
    elif not is_known:
        result.doubts.append(
            f"{path} does not tell whether it was measured with the weights in {model}. If it was not, measure again with `{again}`."
        )
    return found if any(name in found for name in (*_OF_AUTOENCODER, *_OF_SAMPLES)) else {}


def _differing_parts(result: Result, weights: dict[str, str]) -> set[str]:
    """The measured parts, of these weights, that the result does not have; and its own generator if that was not measured."""
    own = components_of(result.index).keys() or {"vae"}
    own_generator = own & {*_GENERATORS} if weights.keys() - {*_AUTOENCODERS} else set()
    other = {name for name in weights if _fingerprint_in(result, name) not in (None, weights[name])}
    return other | (weights.keys() - own) | (own_generator - weights.keys())


def _fingerprint_in(result: Result, part: str) -> str | None:
    folder = result.vae if result.pipeline is None else result.pipeline / part
    return weights_fingerprint_of(folder)


def _is_inside(place: str, run: Path) -> bool:
    """Whether a recorded path is in the run. It may be relative to another folder, or of another machine: then the name counts."""
    path, run = Path(place), run.resolve()
    return run in (path.resolve(), *path.resolve().parents) or (not path.exists() and run.name in path.parts)


def _evaluate_command(result: Result, config: dict[str, Any], *, is_of_samples: bool) -> str:
    """The command that measures the result, on the same images with the same judge."""
    is_of_samples = is_of_samples and result.pipeline is not None and bool(config.get("features"))
    words = ["--pipeline", str(result.pipeline)] if is_of_samples else ["--vae", str(result.vae)]
    images = ("dataset_name", "train_data_dir")
    known = (
        config if any(config.get(name) for name in images) or result.data_script is None else result.data_script.config
    )
    words += [word for name in images if known.get(name) for word in (f"--{name}", str(known[name]))]
    words += ["--features", str(config["features"])] if config.get("features") else []
    for name in ("guidance_scales", "guidance_intervals", "num_inference_steps", "schedulers") if is_of_samples else ():
        words += [f"--{name}", *map(str, config[name])] if config.get(name) else []
    for name in ("velocity_scale", "temperature", "top_k", "top_p") if is_of_samples else ():
        words += [f"--{name}", str(config[name])] if config.get(name) is not None else []
    return shlex.join(["dae-diffusers", "evaluate", *words, "--output_dir", str(result.folder / "evaluation")])


def _find_pictures(result: Result) -> dict[str, tuple[Path, str]]:
    pictures = {}

    def by_id(pair: tuple[str, str]) -> int:
        return int(pair[0])

    def add(name: str, path: Path | None, caption: str):
        if path is not None and path.exists():
            pictures[name] = (path, caption)

    if result.pipeline is not None:
        samples: Path | None = result.folder / "samples.png"
        is_of_others = any(script.has_other_weights for script in result.scripts.values())
        if "check" not in result.metrics and (is_of_others or (result.folder / "metrics.json").exists()):
            samples = None  # the script of the check drew it, or it is a copy of a grid of the training
        if samples is None or not samples.exists():
            grids = [_grid_of_weights(script) for script in result.scripts.values()]
            samples = next((grid for grid in grids if grid is not None), samples)
        names = [one_line(name) for _, name in sorted((result.index.get("id2label") or {}).items(), key=by_id)]
        is_by_class = 1 < len(names) <= 10 and not result.index.get("conditions")
        add("samples.png", samples, f"Samples, by class: {', '.join(names)}" if is_by_class else "Samples")
    script = result.scripts.get("train_dae")
    if script is not None and not script.has_other_weights and _has_decoder_of_its_training(result):
        folder = script.folder
        step = script.record.get("exported_step")
        names = [f"reconstruction-{which}.png" for which in ("stage2-*", "*")]
        names = names if step is None else [f"reconstruction-*-{step:08d}.png"]
        newest = next((grid for name in names if (grid := latest_grid(folder, name))), None)
        add("reconstructions.png", newest, "Held-out images of the data set above their reconstructions")
    script = result.scripts.get("train_dae_stage3")
    if result.decoder_fit and script is not None and not script.has_other_weights:
        newest = latest_grid(script.folder, "generated-stage3-*.png")
        add("stage3.png", newest, "Drawn latents, decoded before stage 3 and after it")
    if result.pipeline is not None:
        evaluation = result.folder / "evaluation"
        nearest, is_swept = sorted(evaluation.glob("nearest-*.png")), True
        if (evaluation / "metrics.json").exists():  # there may be pictures of an earlier evaluation, of other weights
            rows = result.metrics.get("evaluation", {}).get("generation", [])
            paths = (evaluation / f"nearest-{name_of_setting(row)}.png" for row in rows)
            nearest, is_swept = [path for path in paths if path.exists()], len(rows) > 1
        add(
            "sweep.png",
            evaluation / "sweep.png" if is_swept else None,
            "Distance to the training images over guidance and steps",
        )
        add("nearest.png", nearest[0] if nearest else None, "The samples most like a training image, above it")
    for name, script in result.scripts.items():
        add(f"{name}_curves.png", script.folder / "curves.png", SCRIPTS[name])
    return pictures


def _grid_of_weights(script: Script) -> Path | None:
    """The samples that a script drew last, or with `--export best` at the step whose weights are published, if they are of these."""
    if script.has_other_weights:
        return None
    step = script.record.get("exported_step")
    return latest_grid(script.folder, "samples-*.png" if step is None else f"samples-{step:08d}.png")


def read_yaml(path: Path) -> Any:
    r"""The content of a YAML file. Raises `UserError` if it cannot be read."""
    try:
        return yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"{path} cannot be read as YAML: {one_line(error)}") from None
