"""
Does decoupling help? Autoencoders that differ only in how they were trained, the same generators on each, paired seeds.

    python benchmarks/decoupled_vs_joint.py --experiment benchmarks/experiments/digits.yaml --output_dir runs/claim-digits
    python benchmarks/decoupled_vs_joint.py --experiment benchmarks/experiments/cifar10_16px.yaml --output_dir runs/claim-mine \\
        --data train_data_dir=my_images resolution=32 --seeds 0

An experiment names *budgets* (how many steps joint and two-stage training get), *conditions* (how the autoencoder is trained)
and *generators* (transformers trained on each latent space). Every training goes through the scripts in processes of its own.
What is finished leaves a JSON file in its folder and is not repeated, so the command may be interrupted and given again; two
budgets that give a condition the same steps share its runs. Start it several times, with other `--seeds` or `--conditions`: once
for each core of a CPU, with `OMP_NUM_THREADS=1`; on a GPU, which small models do not fill, about as often as there are cores, best
under NVIDIA's MPS. At the end `results.md`, `results.json` and the pictures are written anew from everything that exists.

A condition with `latents_of` has the stage 1 and the transformers of another condition and differs from it only in how the real
decoder is trained (`warm_start_decoder`, `noise_tau`); only that is done. One with `decoder_of` has the whole autoencoder and the
transformers of another; its decoder is trained on for `stage2_steps`, with the losses that the condition names
(`perceptual_model`, `adversarial_weight`), its encoder frozen. One with `baselines: [joint-c8, same-c8]` is compared with those
instead of `joint` and `same`.

With `--decoder_steps N` every decoder is then trained on for N steps, its encoder frozen, and everything is measured again with
the same transformers: does a difference come from the latents, or from decoders that are not finished? The tables show it as a
budget of its own.

The rule of success was fixed before the first run: the generation distance (gFD) of a decoupled condition is below that of
`same` and of `joint`, with 95 % intervals of the paired differences that exclude 0.
"""

import argparse
import contextlib
import itertools
import json
import math
import os
import resource
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
import yaml
from accelerate import Accelerator
from diffusers import AutoencoderKL
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullFormatter
from torch.utils.flop_counter import FlopCounterMode
from tqdm.auto import tqdm

from dae_diffusers import DAEDiTPipeline
from dae_diffusers.cli import ConfigError, UserError, parse_config, run_script
from dae_diffusers.data import DataConfig, load_images, make_pass_loader
from dae_diffusers.metrics.complexity import (
    MAX_EVAL_IMAGES,
    MAX_TRAIN_IMAGES,
    ComplexityConfig,
    complexity_distance,
)
from dae_diffusers.metrics.evaluation import (
    EncodedImages,
    encode_images,
    latent_metrics,
    reconstruction_metrics,
    sample_metrics,
)
from dae_diffusers.metrics.features import FeatureExtractor, load_feature_extractor
from dae_diffusers.metrics.sampling import SampleSettings, draw_samples
from dae_diffusers.metrics.statistics import reference_statistics
from dae_diffusers.training.train_dae import TrainDAEConfig, load_model

# 97.5 % quantiles of Student's t for n - 1 degrees of freedom, n = 2...16; for more seeds the last, which widens the interval.
_QUANTILES = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179, 2.160, 2.145, 2.131)
T_QUANTILES = dict(enumerate(_QUANTILES, start=2))
# What all runs of a folder share.
SHARED = ("data", "features", "num_images", "num_inference_steps", "autoencoder", "transformer")
BASELINES = ("joint", "same")
QUIET = {"validation_steps": 10**9, "checkpointing_steps": 10**9, "logging_steps": 100}

# Enough to order latent spaces; the defaults of `evaluate.py --complexity` take longer and give error bars.
COMPLEXITY = ComplexityConfig(capacities=(0, 16), seeds=(0,))


def parse_arguments() -> argparse.Namespace:
    """The flags, with `experiment` as the mapping that its file holds and the other flags have changed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--experiment", type=Path, required=True, help="a file of benchmarks/experiments/")
    parser.add_argument("--output_dir", type=Path, required=True)
    parser.add_argument("--dataset_name", help="short for `--data dataset_name=...`")
    parser.add_argument(
        "--data",
        nargs="+",
        metavar="FLAG=VALUE",
        help="flags of the training scripts that choose the images, such as train_data_dir=my_images resolution=64, instead of "
        "the experiment's",
    )
    parser.add_argument(
        "--features",
        help="feature extractor (Hub id or folder); default: the experiment's, a classifier trained on the images",
    )
    parser.add_argument("--budgets", nargs="+", help="only these")
    parser.add_argument("--conditions", nargs="+", help="only these")
    parser.add_argument("--generators", nargs="+", help="only these")
    parser.add_argument("--seeds", nargs="+", type=int, help="instead of the experiment's")
    parser.add_argument("--decoder_steps", type=int, help="train every decoder on for so many steps and measure again")
    parser.add_argument("--only_summary", action="store_true", help="write the tables from what is finished")
    arguments = parser.parse_args()
    try:
        experiment = yaml.safe_load(arguments.experiment.read_text())
        if not isinstance(experiment, dict):
            raise ValueError(f"{arguments.experiment} is no experiment.")
        experiment |= {name: getattr(arguments, name) for name in ("features", "seeds") if getattr(arguments, name)}
        missing = {*SHARED, "seeds", "budgets", "generators", "conditions"} - set(experiment)
        if missing:
            raise ValueError(f"{arguments.experiment} has no {sorted(missing)}.")
        experiment["data"] = choose_data(experiment["data"], arguments.data or [], arguments.dataset_name)
        parse_config(DataConfig, words_of(experiment["data"])).require_source()
        for name, options in experiment["conditions"].items():
            baselines = options.get("baselines")
            if baselines is not None and (
                len(baselines) != len(BASELINES) or set(baselines) - set(experiment["conditions"])
            ):
                raise ValueError(
                    f"`baselines` of {name} are {baselines}, but must be two conditions, those that stand for joint training and for "
                    "the control."
                )
    except (OSError, yaml.YAMLError, ValueError, ConfigError) as error:
        parser.error(str(error))
    for name in ("budgets", "conditions", "generators"):
        setattr(arguments, name, getattr(arguments, name) or list(experiment[name]))
        unknown = set(getattr(arguments, name)) - set(experiment[name])
        if unknown:
            parser.error(f"unknown {name} {sorted(unknown)}; the experiment has {list(experiment[name])}.")
    arguments.experiment = experiment
    return arguments


def main(arguments: argparse.Namespace) -> None:
    experiment, output_dir = arguments.experiment, arguments.output_dir
    output_dir.mkdir(parents=True, exist_ok=True)
    kept = check_same_experiment(experiment, output_dir)
    if not arguments.only_summary:
        experiment["features"] = find_features(experiment, output_dir)
        fingerprint = load_feature_extractor(experiment["features"]).fingerprint
        if kept.setdefault("fingerprint of the features", fingerprint) != fingerprint:
            raise UserError(
                f"the runs in {output_dir} were judged by other weights of {experiment['features']}. Choose another `--output_dir`."
            )
        write_json(output_dir / "experiment.json", kept)
        # Seed by seed, so that an interrupted benchmark has complete pairs.
        todo = itertools.product(arguments.budgets, experiment["seeds"], arguments.conditions)
        for budget, seed, condition in tqdm(list(todo), desc="Autoencoders", unit="run"):
            options = experiment["conditions"][condition]
            if budget not in options.get("budgets", experiment["budgets"]):
                continue
            generators = [
                name for name in arguments.generators if name in options.get("generators", arguments.generators)
            ]
            if "decoder_of" in options:
                train_decoder_on(experiment, budget, condition, seed, generators, output_dir)
            elif "latents_of" in options:
                train_other_decoder(experiment, budget, condition, seed, generators, output_dir)
            else:
                run(experiment, budget, condition, seed, generators, output_dir)
            if arguments.decoder_steps is not None:
                train_decoder_on(experiment, budget, condition, seed, generators, output_dir, arguments.decoder_steps)
    rows = [row for row in read_rows(output_dir) if row["condition"] in experiment["conditions"]]
    if not rows:
        raise UserError(f"nothing is finished in {output_dir}.")
    write_json(output_dir / "results.json", rows)
    text = summarize(rows, experiment)
    (output_dir / "results.md").write_text(text)
    for budget in budgets_of(rows, experiment):
        chosen_rows = rows_of_budget(rows, experiment, budget)
        plot_frontier(chosen_rows, experiment, output_dir / f"frontier-{budget}.png")
        plot_sizes(chosen_rows, experiment, output_dir / f"sizes-{budget}.png")
    print(text)


def check_same_experiment(experiment: dict[str, Any], output_dir: Path) -> dict[str, Any]:
    """
    What the runs of a folder have in common, and what each condition and generator is: that of this experiment with what is
    kept of those before, which it must not contradict.

    Raises:
        UserError: If something differs: finished runs would be taken for those of this experiment.
    """
    path = output_dir / "experiment.json"
    kept = json.loads(path.read_text()) if path.exists() else {}
    this = {name: experiment.get(name) for name in SHARED}
    for name, options in experiment["conditions"].items():
        not_trained_with = ("baselines", "budgets", "generators", "steps")  # the steps are in the folder's name
        this[f"condition {name}"] = {key: value for key, value in options.items() if key not in not_trained_with}
    this |= {f"generator {name}": options for name, options in experiment["generators"].items()}
    this = json.loads(json.dumps(this))
    for name in kept.keys() & this.keys():
        if kept[name] != this[name]:
            raise UserError(
                f"{output_dir} holds runs of another experiment: `{name}` was {kept[name]} and is {this[name]}. Choose "
                "another `--output_dir`."
            )
    return kept | this


def choose_data(data: dict[str, Any], given: list[str], dataset_name: str | None) -> dict[str, Any]:
    """The experiment's flags of the data, with those given as `flag=value`; a new source of images replaces the old one."""
    without_value = [item for item in given if "=" not in item]
    if without_value:
        raise ValueError(f"`--data` takes FLAG=VALUE, not {without_value}.")
    flags = dict(item.partition("=")[::2] for item in given)
    if dataset_name is not None:
        flags["dataset_name"] = dataset_name
    unknown = set(flags) - {field.name for field in fields(DataConfig)}
    if unknown:
        raise ValueError(f"`--data` has no {sorted(unknown)}; it takes {[field.name for field in fields(DataConfig)]}.")
    if {"dataset_name", "train_data_dir"} & set(flags):
        data = {name: value for name, value in data.items() if name not in ("dataset_name", "train_data_dir")}
    return {**data, **{name: yaml.safe_load(value) for name, value in flags.items()}}


def find_features(experiment: dict[str, Any], output_dir: Path) -> str:
    """The feature extractor's name; one that the experiment describes by its training is trained on the images."""
    if not isinstance(experiment["features"], dict):
        return experiment["features"]
    folder = output_dir / "features" / "classifier"
    if not (folder / "results.json").exists():
        script = Path(__file__).with_name("train_feature_extractor.py")
        # Elsewhere, and moved at the end: it may be interrupted, or be trained by another process too.
        unfinished = folder.with_name(f"classifier-{os.getpid()}")
        launch([str(script)], {**experiment["data"], **experiment["features"], "output_dir": unfinished})
        with contextlib.suppress(OSError):  # another was faster
            unfinished.replace(folder)
        shutil.rmtree(unfinished, ignore_errors=True)
    return str(folder)


def run(
    experiment: dict[str, Any], budget: str, condition: str, seed: int, generators: list[str], output_dir: Path
) -> None:
    """Trains an autoencoder and the transformers on its latents, and measures all of them."""
    folder = folder_of(output_dir, experiment, budget, condition, seed)
    missing = [name for name in generators if not (folder / name / "generator.json").exists()]
    if (folder / "autoencoder.json").exists() and not missing:
        return
    flags = autoencoder_flags(experiment, budget, condition, seed, folder)
    accelerator, images, extractor, vae, seen = train_autoencoder(experiment, flags, folder, seed)
    if not (folder / "autoencoder.json").exists():
        row = {"condition": condition, "steps": folder.parent.name, "seed": seed}
        row["autoencoder_cost"] = cost_of(flags, folder)
        row |= measure_autoencoder(vae, images, seen, extractor, accelerator, folder)
        write_json(folder / "autoencoder.json", row)
    latents = folder / "latents"
    if missing:
        launch_script(
            "cache_latents", {**experiment["data"], "vae": folder / "vae", "output_dir": latents, "seed": seed}
        )
    for name in missing:
        target = folder / name
        flags = {**shared_flags(target, seed), **experiment["transformer"], **(experiment["generators"][name] or {})}
        cost = launch_script("train_dit", {**flags, "vae": folder / "vae", "latent_cache": latents})
        pipeline = DAEDiTPipeline.from_pretrained(target / "pipeline").to(accelerator.device)
        row = {
            "generator": name,
            "parameters": sum(parameter.numel() for parameter in pipeline.transformer.parameters()),
            "generator_cost": cost,
            "validation_loss": last_value(target / "train_dit" / "log.jsonl", "validation/loss"),
            "generation": measure_samples(experiment, pipeline, target, seed, images, seen, extractor, accelerator),
        }
        write_json(target / "generator.json", row)
    shutil.rmtree(latents, ignore_errors=True)


def train_other_decoder(
    experiment: dict[str, Any], budget: str, condition: str, seed: int, generators: list[str], output_dir: Path
) -> None:
    """Stage 2 of a condition whose stage 1 and transformers are those of another."""
    options = experiment["conditions"][condition]
    before = folder_of(output_dir, experiment, budget, options["latents_of"], seed)
    folder = folder_of(output_dir, experiment, budget, condition, seed)
    whole = autoencoder_flags(experiment, budget, condition, seed, folder)
    stage2 = {"stage": "2", "pretrained_model_name_or_path": str(before)}

    def cost() -> dict[str, float]:
        """As if both stages had been trained: the base's, with one second stage for another."""
        return cost_of(whole, before)

    decode_again(experiment, before, folder, {**whole, **stage2}, condition, seed, generators, cost)


def train_decoder_on(
    experiment: dict[str, Any],
    budget: str,
    condition: str,
    seed: int,
    generators: list[str],
    output_dir: Path,
    steps: int | None = None,
) -> None:
    """Trains the decoder of a finished run on, alone: of the condition itself for some steps, or as its `decoder_of` says."""
    options = experiment["conditions"][condition]
    folder = folder_of(output_dir, experiment, budget, condition, seed, decoder_steps=steps)
    flags = {**shared_flags(folder, seed), **experiment["data"], **experiment["autoencoder"]}
    flags |= flags_among(options) if steps is None else {"stage2_steps": steps}
    before = folder_of(output_dir, experiment, budget, options["decoder_of"] if steps is None else condition, seed)
    flags |= {"pretrained_vae": str(before / "vae"), "stage": "2", "auxiliary_decoder": "linear"}

    def cost() -> dict[str, float]:
        first, more = json.loads((before / "autoencoder.json").read_text())["autoencoder_cost"], cost_of(flags, folder)
        return {name: first[name] + more[name] for name in first}

    transformers = folder_of(output_dir, experiment, budget, origin_of_latents(experiment, condition), seed)
    decode_again(experiment, transformers, folder, flags, condition, seed, generators, cost)


def origin_of_latents(experiment: dict[str, Any], condition: str) -> str:
    """The condition whose encoder and transformers this one has: its own, or those that it names, which may name others."""
    options = experiment["conditions"][condition]
    base = options.get("latents_of") or options.get("decoder_of")
    return condition if base is None else origin_of_latents(experiment, base)


def decode_again(
    experiment: dict[str, Any],
    before: Path,
    folder: Path,
    flags: dict[str, Any],
    condition: str,
    seed: int,
    generators: list[str],
    cost: Callable[[], dict[str, float]],
) -> None:
    """Trains another decoder for the latents of a finished run, and measures it and the samples of the same transformers."""
    missing = [name for name in generators if not (folder / name / "generator.json").exists()]
    if not missing:
        return
    started_from = Path(flags["pretrained_vae"]).parent if "pretrained_vae" in flags else before
    needed = [started_from / "autoencoder.json", *(before / name / "generator.json" for name in missing)]
    unfinished = [str(path.parent) for path in needed if not path.exists()]
    if unfinished:
        raise UserError(
            f"`{condition}` goes on from runs that are not finished: {', '.join(unfinished)}. Run their conditions first."
        )
    accelerator, images, extractor, vae, seen = train_autoencoder(experiment, flags, folder, seed)
    if not (folder / "autoencoder.json").exists():
        row = {"condition": condition, "steps": folder.parent.name, "seed": seed, "autoencoder_cost": cost()}
        row |= measure_autoencoder(vae, images, seen, extractor, accelerator, folder)
        write_json(folder / "autoencoder.json", row)
    for name in missing:
        pipeline = DAEDiTPipeline.from_pretrained(before / name / "pipeline", vae=vae).to(accelerator.device)
        (folder / name).mkdir(exist_ok=True)
        row = json.loads((before / name / "generator.json").read_text())
        row["generation"] = measure_samples(
            experiment, pipeline, folder / name, seed, images, seen, extractor, accelerator
        )
        write_json(folder / name / "generator.json", row)


def autoencoder_flags(
    experiment: dict[str, Any], budget: str, condition: str, seed: int, folder: Path
) -> dict[str, Any]:
    """Of `train_dae.py`."""
    flags = {**shared_flags(folder, seed), **experiment["data"], **experiment["autoencoder"]}
    return flags | steps_of(experiment, budget, condition) | flags_among(experiment["conditions"][condition])


def flags_among(options: dict[str, Any]) -> dict[str, Any]:
    """The flags of `train_dae.py` among the options of a condition."""
    keys = ("baselines", "budgets", "decoder_of", "generators", "latents_of", "steps")
    return {name: value for name, value in options.items() if name not in keys}


def cost_of(flags: dict[str, Any], folder: Path) -> dict[str, float]:
    """Of an autoencoder that was trained there with those flags."""
    return {**json.loads((folder / "cost.json").read_text()), "flops": training_flops(TrainDAEConfig(**flags))}


def steps_of(experiment: dict[str, Any], budget: str, condition: str) -> dict[str, int]:
    """`stage1_steps` and `stage2_steps`; joint training takes their sum. A condition may have its own for a budget."""
    options = experiment["conditions"][condition]
    is_joint = options["auxiliary_decoder"] == "none"
    return options.get("steps", {}).get(budget) or experiment["budgets"][budget]["joint" if is_joint else "decoupled"]


def describe_steps(experiment: dict[str, Any], budget: str, condition: str, decoder_steps: int | None = None) -> str:
    """Such as `450` for joint training, `210+340` for two stages; more of the decoder alone stands at the end."""
    options = experiment["conditions"][condition]
    if "decoder_of" in options:
        parts = [describe_steps(experiment, budget, options["decoder_of"]), options["stage2_steps"]]
    else:
        steps = steps_of(experiment, budget, condition)
        is_joint = options["auxiliary_decoder"] == "none"
        parts = [sum(steps.values())] if is_joint else [steps["stage1_steps"], steps["stage2_steps"]]
    return "+".join(map(str, parts + ([] if decoder_steps is None else [decoder_steps])))


def folder_of(
    output_dir: Path,
    experiment: dict[str, Any],
    budget: str,
    condition: str,
    seed: int,
    *,
    decoder_steps: int | None = None,
) -> Path:
    """Of an autoencoder: named after what it is trained with, so that budgets share it."""
    return output_dir / condition / describe_steps(experiment, budget, condition, decoder_steps) / f"seed-{seed}"


def shared_flags(output_dir: Path, seed: int) -> dict[str, Any]:
    """Of both training scripts."""
    return {"output_dir": str(output_dir), "seed": seed, "resume_from_checkpoint": "latest", **QUIET}


def train_autoencoder(
    experiment: dict[str, Any], flags: dict[str, Any], folder: Path, seed: int
) -> tuple[Accelerator, tuple, FeatureExtractor, AutoencoderKL, EncodedImages]:
    """Trains an autoencoder unless it exists, and returns it among what measures it; the last are some training images in it."""
    if not (folder / "cost.json").exists():  # the last thing that is written
        write_json(folder / "cost.json", launch_script("train_dae", flags))
    accelerator = Accelerator()
    images = load_images(DataConfig(**experiment["data"]), seed)
    extractor = load_feature_extractor(experiment["features"])
    vae = AutoencoderKL.from_pretrained(folder / "vae").eval().to(accelerator.device)
    train, validation = images
    images = (train, train.choose(experiment["num_images"]), validation)
    seen = encode_images(vae, images[1], accelerator, extractor=extractor, measures={})
    return accelerator, images, extractor, vae, seen


def measure_samples(
    experiment: dict[str, Any], pipeline: DAEDiTPipeline, folder: Path, seed: int, images, seen, extractor, accelerator
) -> dict[str, float]:
    """Draws samples into a folder and compares them with the training images, and with their reconstructions (`gap`)."""
    settings = SampleSettings(experiment["num_images"], 1.0, experiment["num_inference_steps"], seed=1000 + seed)
    samples = draw_samples(pipeline, settings, folder / "samples", accelerator)
    reference = reference_statistics(extractor, images[0], cache_dir=folder.parents[3] / "reference")
    metrics, _ = sample_metrics(samples, extractor, reference, seen.features, seen.reconstruction_features, accelerator)
    return metrics


def measure_autoencoder(
    vae: AutoencoderKL, images, seen: EncodedImages, extractor: FeatureExtractor, accelerator, folder: Path
) -> dict[str, Any]:
    """Reconstruction, latent space and complexity distance, on images that it was not trained on."""
    train, some, validation = images
    held_out = encode_images(vae, validation, accelerator, extractor=extractor)
    probe = train.labels and (seen.latents, torch.tensor(some.labels), torch.tensor(validation.labels))
    complexity = complexity_distance(
        vae,
        *(
            make_pass_loader(part.choose(limit), batch_size=64)
            for part, limit in ((train, MAX_TRAIN_IMAGES), (validation, MAX_EVAL_IMAGES))
        ),
        COMPLEXITY,
        rows_path=folder / "complexity.jsonl",
        device=accelerator.device,
    )
    return {
        "reconstruction": reconstruction_metrics(held_out, extractor),
        "latent_space": latent_metrics(vae, held_out, extractor, accelerator, probe=probe),
        "complexity": complexity.to_dict()["summary"],
    }


def training_flops(config: TrainDAEConfig) -> float:
    """Of the matrix products and convolutions of an autoencoder's training; without a perceptual model and a discriminator."""
    model, total = load_model(config), 0
    pixel_values = torch.zeros(1, config.image_channels, config.resolution, config.resolution)
    for stage, steps in config.stage_steps().items():
        model.set_stage(stage)
        with FlopCounterMode(display=False) as counter:
            model(pixel_values).sample.sum().backward()
        total += counter.get_total_flops() * steps * config.train_batch_size
    return float(total)


def write_json(path: Path, row: dict[str, Any]) -> None:
    temporary = path.with_suffix(f".{os.getpid()}.tmp")  # several processes may write the same file
    temporary.write_text(json.dumps(row, indent=2))
    temporary.replace(path)


def read_rows(output_dir: Path) -> list[dict[str, Any]]:
    """A row for each generator that is finished, with what was measured of its autoencoder."""
    rows = []
    for path in sorted(output_dir.glob("*/*/*/*/generator.json")):
        autoencoder = json.loads((path.parents[1] / "autoencoder.json").read_text())
        rows.append({**autoencoder, **json.loads(path.read_text())})
    return rows


def launch_script(name: str, flags: dict[str, Any]) -> dict[str, float]:
    """As `launch`, a script of `training/`."""
    return launch(["-m", f"dae_diffusers.training.{name}"], flags)


def launch(command: list[str], flags: dict[str, Any]) -> dict[str, float]:
    """
    Runs a script of Python and returns the seconds of processor time that it took, start-up included. Of one that goes on
    after an interruption, only those since then.
    """
    argv = [sys.executable, *command, *words_of(flags)]
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    result = subprocess.run(argv, capture_output=True, text=True)
    if result.returncode != 0:
        raise SystemExit(f"{' '.join(argv)} failed:\n{result.stderr[-2000:]}")  # whole: it may be a traceback
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return {"cpu_seconds": after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime}


def words_of(flags: dict[str, Any]) -> list[str]:
    """Flags as a command line has them."""
    words = []
    for name, value in flags.items():
        if value is not None:
            words += [f"--{name}", *map(str, value if isinstance(value, list) else [value])]
    return words


def last_value(log: Path, name: str) -> float:
    rows = [json.loads(line) for line in log.read_text().splitlines()]
    return next(row[name] for row in reversed(rows) if name in row)


def numbers_of(row: dict[str, Any]) -> dict[str, float]:
    """The numbers of a run that the tables show, by their short names."""
    reconstruction, generation = row["reconstruction"], row["generation"]
    latents = {name: math.nan if value is None else value for name, value in row["latent_space"].items()}
    complexity = {(entry["form"], entry["capacity"]): entry for entry in row["complexity"]}
    widest = max(capacity for form, capacity in complexity if form == "paired" and capacity is not None)
    return {
        "PSNR": reconstruction["psnr"],
        "rFD": next(value for name, value in reconstruction.items() if name.startswith(("rfd", "rfid"))),
        "gFD": next(value for name, value in generation.items() if name.startswith(("gfd", "gfid"))),
        "gap": generation["gap"],
        "KID": generation["kernel_distance"],
        "precision": generation["precision"],
        "recall": generation["recall"],
        "iFD": next(value for name, value in latents.items() if name.startswith(("ifd", "ifid"))),
        "CD paired": complexity["paired", widest]["variance_left"],
        "CD excess": complexity["paired", widest]["variance_left_difference"],
        "CD unpaired": complexity["unpaired", widest]["std_left"],
        "DiT val": row["validation_loss"],
        "HF share": latents["high_frequency_share"],
        "eff. rank": latents["effective_rank"],
        "probe": latents.get("probe_accuracy", math.nan),
        "AE CPU s": row["autoencoder_cost"]["cpu_seconds"],
        "AE TFLOP": row["autoencoder_cost"]["flops"] / 1e12,
        "DiT CPU s": row["generator_cost"]["cpu_seconds"],
    }


# condition -> seed -> name -> number
Runs = dict[str, dict[int, dict[str, float]]]

PREDICTORS = ("rFD", "gap", "iFD", "CD paired", "CD excess", "CD unpaired", "DiT val", "HF share", "eff. rank", "probe")


def budgets_of(rows: list[dict[str, Any]], experiment: dict[str, Any]) -> list[str]:
    """The experiment's, and with `+N` those after which the decoder was trained on for N steps; only if they have runs of their own."""
    extra = {
        int(row["steps"].removeprefix(f"{base}+"))
        for row in rows
        for budget in experiment["budgets"]
        for base in [describe_steps(experiment, budget, row["condition"])]
        if row["steps"].startswith(f"{base}+")
    }
    budgets = [
        f"{budget}+{steps}" if steps else budget for budget in experiment["budgets"] for steps in [0, *sorted(extra)]
    ]
    shown, seen = [], []
    for budget in budgets:
        new = [row for row in rows_of_budget(rows, experiment, budget) if row not in seen]
        if new:
            shown.append(budget)
            seen += new
    return shown


def rows_of_budget(rows: list[dict[str, Any]], experiment: dict[str, Any], budget: str) -> list[dict[str, Any]]:
    base, _, decoder_steps = budget.partition("+")
    more = int(decoder_steps) if decoder_steps else None
    return [
        row
        for row in rows
        if base in experiment["conditions"][row["condition"]].get("budgets", experiment["budgets"])
        and row["steps"] == describe_steps(experiment, base, row["condition"], more)
    ]


def summarize(rows: list[dict[str, Any]], experiment: dict[str, Any]) -> str:
    """For each budget and generator: means, paired differences and the verdict; rank correlations with gFD."""
    lines = []
    for budget, generator in itertools.product(budgets_of(rows, experiment), experiment["generators"]):
        chosen = [row for row in rows_of_budget(rows, experiment, budget) if row["generator"] == generator]
        if not chosen:
            continue
        runs: Runs = {condition: {} for condition in experiment["conditions"]}
        for row in chosen:
            runs[row["condition"]][row["seed"]] = numbers_of(row)
        runs = {condition: seeds for condition, seeds in runs.items() if seeds}
        # Another decoder brings the same latents and transformers again.
        with_own_latents = {
            condition: seeds
            for condition, seeds in runs.items()
            if origin_of_latents(experiment, condition) == condition
        }
        steps = dict.fromkeys(row["steps"] for row in chosen)
        lines += [
            f"## Budget `{budget}`, generator `{generator}` ({chosen[0]['parameters'] / 1e6:.2f} M parameters)",
            "",
            f"Autoencoder steps (stage 1 + stage 2, or joint): {', '.join(steps)}.",
            "",
        ]
        lines += [
            *table_of_means(runs),
            "",
            *table_of_runs(runs),
            "",
            *table_of_differences(runs, experiment),
            "",
            *table_of_correlations(with_own_latents),
            "",
        ]
    return "\n".join(lines)


def table_of_means(runs: Runs) -> list[str]:
    names = list(next(iter(next(iter(runs.values())).values())))
    lines = ["Mean ± standard deviation over seeds:", ""]
    lines += [f"| condition | seeds | {' | '.join(names)} |", "|---" * (len(names) + 2) + "|"]
    for condition, seeds in runs.items():
        cells = [mean_and_deviation([run[name] for run in seeds.values()]) for name in names]
        lines.append(f"| {condition} | {len(seeds)} | {' | '.join(cells)} |")
    return lines


def table_of_runs(runs: Runs) -> list[str]:
    """The numbers that matter most, seed by seed; none where each condition has one."""
    if all(len(seeds) == 1 for seeds in runs.values()):
        return []
    numbers = sorted({seed for seeds in runs.values() for seed in seeds})
    lines = ["PSNR / rFD / gFD / gap of each seed:", ""]
    lines += [f"| condition | {' | '.join(map(str, numbers))} |", "|---" * (len(numbers) + 1) + "|"]
    for condition, seeds in runs.items():
        cells = [
            " / ".join(f"{seeds[seed][name]:.4g}" for name in ("PSNR", "rFD", "gFD", "gap")) if seed in seeds else ""
            for seed in numbers
        ]
        lines.append(f"| {condition} | {' | '.join(cells)} |")
    return lines


def table_of_differences(runs: Runs, experiment: dict[str, Any]) -> list[str]:
    """Of gFD and gap against both baselines, and whether the rule of success is met."""
    lines = ["Paired differences with 95 % intervals (negative: the condition is better):", ""]
    columns = [f"{name} minus {baseline}" for name in ("gFD", "gap") for baseline in BASELINES]
    lines += [f"| condition | {' | '.join(columns)} | success |", "|---" * 6 + "|"]
    others: dict[tuple[str, ...], list[str]] = {}
    for condition in runs:
        baselines = tuple(experiment["conditions"][condition].get("baselines", BASELINES))
        intervals = [paired_difference(runs, condition, of, name) for name in ("gFD", "gap") for of in baselines]
        cells = [show_interval(interval) for interval in intervals]
        against = intervals[: len(BASELINES)]
        if condition in baselines or condition.startswith("joint"):
            success = ""
        elif None in against or any(math.isinf(interval[2]) for interval in against):
            success = "too few seeds"
        else:
            success = "yes" if all(interval[2] < 0 for interval in against) else "no"
        lines.append(f"| {condition} | {' | '.join(cells)} | {success} |")
        if baselines != BASELINES:
            others.setdefault(baselines, []).append(condition)
    notes = [
        f"`{'`, `'.join(conditions)}` {'is' if len(conditions) == 1 else 'are'} compared with `{'` and `'.join(baselines)}`"
        for baselines, conditions in others.items()
    ]
    return lines + (["", f"Here {'; '.join(notes)}."] if others else [])


def table_of_correlations(runs: Runs) -> list[str]:
    """Spearman's with gFD over all runs, with rFD held fixed (partial rank correlation), and over the conditions' means."""
    if not runs:
        return []
    numbers = [run for seeds in runs.values() for run in seeds.values()]
    means = [
        {name: math.fsum(run[name] for run in seeds.values()) / len(seeds) for name in numbers[0]}
        for seeds in runs.values()
    ]
    lines = [
        f"Spearman's rank correlation with gFD over {len(numbers)} runs and the means of {len(means)} conditions:",
        "",
    ]
    lines += [f"| | {' | '.join(PREDICTORS)} |", "|---" * (len(PREDICTORS) + 1) + "|"]
    for label, points in (("runs", numbers), ("conditions", means)):
        values = {name: [point[name] for point in points] for name in points[0]}
        plain = {name: rank_correlation(values[name], values["gFD"]) for name in PREDICTORS}
        partial = {
            name: partial_correlation(plain[name], rank_correlation(values[name], values["rFD"]), plain["rFD"])
            for name in PREDICTORS
        }
        for of_label, row in ((label, plain), (f"{label}, at matched rFD", partial)):
            few = len(points) < (5 if row is partial else 3)  # a partial correlation of three points is always 1 or -1
            cells = ["" if few or math.isnan(row[name]) else f"{row[name]:+.2f}" for name in PREDICTORS]
            lines.append(f"| {of_label} | {' | '.join(cells)} |")
    return lines


def mean_and_deviation(values: list[float]) -> str:
    mean = math.fsum(values) / len(values)
    if len(values) == 1:
        return f"{mean:.4g}"
    deviation = math.sqrt(math.fsum((v - mean) ** 2 for v in values) / (len(values) - 1))
    return f"{mean:.4g} ± {0 if deviation < 1e-9 * abs(mean) else deviation:.2g}"


def paired_difference(runs: Runs, condition: str, baseline: str, name: str) -> tuple[float, float, float] | None:
    """Mean difference over the seeds that both have, and its 95 % interval by Student's t."""
    seeds = sorted(runs[condition].keys() & runs.get(baseline, {}).keys())
    if condition == baseline or not seeds:
        return None
    differences = [runs[condition][s][name] - runs[baseline][s][name] for s in seeds]
    mean = math.fsum(differences) / len(seeds)
    if len(seeds) < min(T_QUANTILES):
        return mean, -math.inf, math.inf
    deviation = math.sqrt(math.fsum((d - mean) ** 2 for d in differences) / (len(seeds) - 1))
    half = T_QUANTILES[min(len(seeds), max(T_QUANTILES))] * deviation / math.sqrt(len(seeds))
    return mean, mean - half, mean + half


def show_interval(interval: tuple[float, float, float] | None) -> str:
    if interval is None:
        return ""
    mean, low, high = interval
    return f"{mean:+.3g} (1 seed)" if math.isinf(low) else f"{mean:+.3g} [{low:+.3g}, {high:+.3g}]"


def rank_correlation(x: list[float], y: list[float]) -> float:
    """Spearman's; equal values share the mean of their ranks."""
    if len(x) < 3 or any(map(math.isnan, [*x, *y])):
        return math.nan
    return float(torch.corrcoef(torch.stack([mean_ranks(values) for values in (x, y)]))[0, 1])


def mean_ranks(values: list[float]) -> torch.Tensor:
    _, which, counts = torch.tensor(values, dtype=torch.float64).unique(return_inverse=True, return_counts=True)
    return (counts.cumsum(0) - (counts - 1) / 2).double()[which]


def partial_correlation(xy: float, xz: float, yz: float) -> float:
    """Of x and y with z held fixed, from the three correlations."""
    rest = (1 - xz**2) * (1 - yz**2)
    return (xy - xz * yz) / math.sqrt(rest) if rest > 1e-9 else math.nan


def plot_frontier(rows: list[dict[str, Any]], experiment: dict[str, Any], path: Path) -> None:
    """gFD and gap against rFD for the first generator: a small point for each seed, a large one for their mean; joint training at
    several KL weights is joined by a line: the curve to beat."""
    generator = next(iter(experiment["generators"]))
    chosen = [row for row in rows if row["generator"] == generator]
    if not chosen:
        return
    figure = Figure(figsize=(10, 4.2), layout="constrained")
    for axis, name in zip(figure.subplots(1, 2), ("gFD", "gap"), strict=True):
        means = []
        for condition, (color, marker) in styles_of(experiment).items():
            points = [(n["rFD"], n[name]) for n in (numbers_of(row) for row in chosen if row["condition"] == condition)]
            if not points:
                continue
            x, y = zip(*points, strict=True)
            mean = (sum(x) / len(x), sum(y) / len(y))
            axis.scatter(x, y, marker=marker, color=color, s=12, alpha=0.5)
            axis.scatter(*mean, label=condition, marker=marker, color=color, s=44, edgecolor="black", linewidth=0.6)
            if condition == "joint" or condition.startswith("joint-kl"):
                means.append(mean)
        if means:
            axis.plot(*zip(*sorted(means), strict=True), color="0.6", linewidth=1, zorder=0)
        axis.set_xscale("log")
        axis.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axis.xaxis.set_major_formatter("{x:g}")
        axis.xaxis.set_minor_formatter(NullFormatter())
        axis.set_xlabel("rFD of the autoencoder (lower is better)")
        axis.set_ylabel(f"{name} (lower is better)")
    figure.legend(*axis.get_legend_handles_labels(), fontsize=8, frameon=False, loc="outside right")
    figure.savefig(path, dpi=120)


def styles_of(experiment: dict[str, Any]) -> dict[str, tuple[str, str]]:
    """
    Colour and marker of each condition. Those with the same baselines share a marker; the two baselines have the same two
    colours everywhere.
    """
    styles, groups = {}, {}
    for condition, options in experiment["conditions"].items():
        baselines = tuple(options.get("baselines", BASELINES))
        others = groups.setdefault(baselines, [])
        if condition in baselines:
            place, turn = baselines.index(condition), 0
        else:
            turn, place = divmod(len(others), 8)
            place += 2
            others.append(condition)
        number = list(groups).index(baselines) + 7 * turn
        styles[condition] = f"C{place}", "oDv^P*Xs<>phd8"[number % 14]
    return styles


def plot_sizes(rows: list[dict[str, Any]], experiment: dict[str, Any], path: Path) -> None:
    """gFD against the transformer's size, for conditions that have several: does a smaller one suffice?"""
    figure = Figure(figsize=(5, 3.6), layout="constrained")
    axis = figure.subplots()
    for number, condition in enumerate(experiment["conditions"]):
        sizes: dict[float, list[float]] = {}
        for row in rows:
            if row["condition"] == condition:
                sizes.setdefault(row["parameters"] / 1e6, []).append(numbers_of(row)["gFD"])
        if len(sizes) < 2:
            continue
        points = sorted((size, math.fsum(values) / len(values)) for size, values in sizes.items())
        axis.plot(*zip(*points, strict=True), color=f"C{number % 10}", label=condition)
        axis.scatter(*zip(*[(s, v) for s, vs in sizes.items() for v in vs], strict=True), color=f"C{number % 10}", s=12)
    if not axis.lines:
        return
    axis.set_xscale("log")
    axis.set_yscale("log")
    axis.set_xlabel("parameters of the transformer (millions)")
    axis.set_ylabel("gFD (lower is better)")
    axis.legend(fontsize=8, frameon=False)
    figure.savefig(path, dpi=120)


if __name__ == "__main__":
    run_script(main, parse_arguments())
