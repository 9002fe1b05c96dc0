"""Trains and measures the trials of an experiment. What is finished leaves a JSON file in its folder and is not repeated."""

import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode

from dae_diffusers.autoencoders.building import make_autoencoder
from dae_diffusers.comparison.scripts import launch_script
from dae_diffusers.comparison.trials import Ruler, cache_latents, train_generator
from dae_diffusers.settings import compose
from dae_diffusers.store import read_json, write_json
from dae_diffusers.training.settings import TrainDAEConfig
from experiments.trial import Trial, check_finished


def run_trial(trial: Trial, generators: list[str]) -> None:
    r"""Trains and measures what a trial's condition says, for each of the generators, unless it is finished."""
    if trial.decoder_steps is not None or "decoder_of" in trial.options:
        _train_decoder_on(trial, generators)
    elif "fit_of" in trial.options:
        _fit_decoders(trial, generators)
    elif "latents_of" in trial.options:
        _train_other_decoder(trial, generators)
    else:
        _train(trial, generators)


def _missing(folder: Path, generators: list[str]) -> list[str]:
    return [name for name in generators if not (folder / name / "generator.json").exists()]


def _train(trial: Trial, generators: list[str]) -> None:
    folder, experiment = trial.folder, trial.experiment
    missing = _missing(folder, generators)
    if (folder / "autoencoder.json").exists() and not missing:
        return
    flags = trial.autoencoder_flags()
    ruler = _trained(trial, flags, folder)
    _keep_autoencoder(trial, ruler, lambda: _cost_of(flags, folder))
    latents = folder / "latents"
    if missing:
        cache_latents(experiment, folder / "vae", latents)
    for name in missing:
        row = train_generator(experiment, name, folder / "vae", latents, folder / name, trial.seed)
        row["generation"] = ruler.samples(folder / name / "pipeline", folder / name)
        write_json(folder / name / "generator.json", row)
    shutil.rmtree(latents, ignore_errors=True)


def _train_other_decoder(trial: Trial, generators: list[str]) -> None:
    """Stage 2 of a condition whose stage 1 and generators are those of another."""
    before = trial.of(trial.options["latents_of"]).folder
    whole = trial.autoencoder_flags()
    flags = {**whole, "stage": "2", "stage1_dir": str(before)}
    # The cost as if both stages had been trained: that of the base, with its second stage replaced.
    _decode_again(trial, before, before, flags, generators, lambda: _cost_of(whole, before))


def _train_decoder_on(trial: Trial, generators: list[str]) -> None:
    """The decoder of a finished run trained on alone: of the condition itself for some steps, or as its `decoder_of` says."""
    steps = trial.decoder_steps
    before = trial.of(trial.options["decoder_of"] if steps is None else trial.condition).folder
    flags = trial.base_flags() | (trial.own_flags() if steps is None else {"stage2_steps": steps})
    flags |= {"pretrained_model_name_or_path": str(before / "vae"), "stage": "2", "auxiliary_decoder": "linear"}

    def cost() -> dict[str, float]:
        return _added(read_json(before / "autoencoder.json")["autoencoder_cost"], _cost_of(flags, trial.folder))

    _decode_again(trial, before, trial.origin.folder, flags, generators, cost)


def _decode_again(
    trial: Trial,
    before: Path,
    origin: Path,
    flags: dict[str, Any],
    generators: list[str],
    cost: Callable[[], dict[str, float]],
) -> None:
    """Trains another decoder for the latents of a finished run, and measures it and the samples of the same generators."""
    folder, missing = trial.folder, _missing(trial.folder, generators)
    if not missing:
        return
    needed = [before / "autoencoder.json", *(origin / name / "generator.json" for name in missing)]
    check_finished(trial.condition, needed)
    ruler = _trained(trial, flags, folder)
    _keep_autoencoder(trial, ruler, cost)
    for name in missing:
        (folder / name).mkdir(exist_ok=True)
        row = read_json(origin / name / "generator.json")
        row["generation"] = ruler.samples(origin / name / "pipeline", folder / name, ruler.vae)
        write_json(folder / name / "generator.json", row)


def _fit_decoders(trial: Trial, generators: list[str]) -> None:
    """Stage 3 of a condition for each generator, from the autoencoder that its `fit_of` names."""
    folder, origin = trial.folder, trial.origin.folder
    before = trial.of(trial.options["fit_of"]).folder
    for name in _missing(folder, generators):
        target = folder / name
        check_finished(trial.condition, [before / "autoencoder.json", origin / name / "generator.json"])
        flags = {**trial.base_flags(target), **trial.own_flags(), "stage": "3"}
        flags |= {"pipeline": origin / name / "pipeline", "pretrained_model_name_or_path": before / "vae"}
        ruler = _trained(trial, flags, target, "pipeline/vae")
        more = {**read_json(target / "cost.json"), "flops": math.nan}  # not counted: it depends on the feature model
        row = {**trial.head()}
        row["autoencoder_cost"] = _added(read_json(before / "autoencoder.json")["autoencoder_cost"], more)
        row |= ruler.autoencoder() | read_json(origin / name / "generator.json")
        row["generation"] = ruler.samples(target / "pipeline", target)
        write_json(folder / "autoencoder.json", row)
        write_json(target / "generator.json", row)


def _trained(trial: Trial, flags: dict[str, Any], folder: Path, result: str = "vae") -> Ruler:
    """Trains an autoencoder unless it exists, and returns what measures it."""
    if not (folder / "cost.json").exists():  # the last thing that is written
        write_json(folder / "cost.json", launch_script("train_dae", flags))
    return Ruler(trial.experiment, folder / result, trial.seed, trial.output_dir / "reference")


def _keep_autoencoder(trial: Trial, ruler: Ruler, cost: Callable[[], dict[str, float]]) -> None:
    if not (trial.folder / "autoencoder.json").exists():
        row = {**trial.head(), "autoencoder_cost": cost(), **ruler.autoencoder()}
        write_json(trial.folder / "autoencoder.json", row)


def _cost_of(flags: dict[str, Any], folder: Path) -> dict[str, float]:
    """The cost of an autoencoder that was trained in a folder with these flags."""
    return {**read_json(folder / "cost.json"), "flops": training_flops(compose(TrainDAEConfig, **flags))}


def _added(first: dict[str, float], more: dict[str, float]) -> dict[str, float]:
    return {name: first[name] + more[name] for name in more}


def training_flops(config: TrainDAEConfig) -> float:
    r"""FLOPs of the matrix products and convolutions in an autoencoder's training, without perceptual model and discriminator."""
    model, total = make_autoencoder(config), 0
    pixel_values = torch.zeros(1, config.data.image_channels, *config.data.size)
    for stage, steps in config.stages.stage_steps().items():
        model.set_stage(stage)
        with FlopCounterMode(display=False) as counter:
            model(pixel_values).sample.sum().backward()
        total += counter.get_total_flops() * steps * config.optimization.train_batch_size
    return float(total)


def finished_rows(output_dir: Path) -> list[dict[str, Any]]:
    r"""A row for each generator that is finished, with what was measured of its autoencoder."""
    rows = []
    for path in sorted(output_dir.glob("*/*/*/*/generator.json")):
        autoencoder = read_json(path.parents[1] / "autoencoder.json")
        judged = path.with_name("judged.json")
        rows.append({**autoencoder, **read_json(path), "judged": read_json(judged) if judged.exists() else {}})
    return rows
