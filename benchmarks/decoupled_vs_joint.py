"""
Does decoupling help? Compares autoencoders that differ only in their training, with the same generators on each and paired seeds.

    python benchmarks/decoupled_vs_joint.py --experiment benchmarks/experiments/digits.yaml --output_dir runs/claim-digits
    python benchmarks/decoupled_vs_joint.py --experiment benchmarks/experiments/cifar10_16px.yaml --output_dir runs/claim-mine \\
        --data train_data_dir=my_images resolution=32 --conditions joint same dropout-0.1 --budgets time --seeds 0

An experiment names *budgets* (how many steps joint and two-stage training get), *conditions* (how the autoencoder is trained)
and *generators* (transformers trained on each latent space). Every training goes through the scripts in processes of its own.
What is finished leaves a JSON file in its folder and is not repeated, so the command may be interrupted and given again; two
budgets that give a condition the same steps share its runs. Start it several times, with other `--seeds` or `--conditions`: once
for each core of a CPU, with `OMP_NUM_THREADS=1`; on a GPU, which small models do not fill, about as often as there are cores, best
under NVIDIA's MPS. At the end `results.json`, `results.csv`, `results.md` and the pictures are written again from everything that exists.

A condition with `latents_of` has the stage 1 and the transformers of another condition and differs from it only in how the real
decoder is trained (`warm_start_decoder`, `noise_tau`); only that is done. One with `decoder_of` has the whole autoencoder and the
transformers of another; its decoder is trained on for `stage2_steps`, with the losses that the condition names
(`perceptual_model`, `adversarial_weight`), its encoder frozen. One with `fit_of` has stage 3 on top of another: for each of its
transformers the decoder is trained on for `stage3_steps`, for the latents that this transformer draws. One with
`baselines: [joint-c8, same-c8]` is compared with those instead of `joint` and `same`.

Every sample is judged at each of the experiment's `guidance_scales` by the features, and by its `judges`: `pixels`, `spectrum`, or
names of vision models. `judged.json` beside each transformer holds these numbers; what lacks is measured when the command is given
again. Latents are drawn once for each transformer and guidance, and decoded by each decoder.

With `--decoder_steps N` every decoder is then trained for N more steps with its encoder frozen, and everything is measured again
with the same transformers. This shows whether a difference comes from the latents or from unfinished decoders. In the tables it
is a separate budget.

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
from claim_tables import (
    BASELINES,
    KEYS,
    Run,
    budgets_of,
    describe_steps,
    origin_of_latents,
    plot_frontier,
    plot_sizes,
    rows_of_budget,
    steps_of,
    summarize,
    write_runs,
)
from diffusers import AutoencoderKL
from torch.utils.flop_counter import FlopCounterMode
from tqdm.auto import tqdm

from dae_diffusers import DAEDiTPipeline
from dae_diffusers.autoencoders.building import make_autoencoder
from dae_diffusers.cli import parse_config, run_script
from dae_diffusers.complexity.distance import MAX_EVAL_IMAGES, MAX_TRAIN_IMAGES, complexity_distance
from dae_diffusers.complexity.settings import ComplexityConfig
from dae_diffusers.data import DataConfig, load_images, make_pass_loader
from dae_diffusers.errors import ConfigError, UserError
from dae_diffusers.fitting.decoder_fit import draw_latents
from dae_diffusers.fitting.image_statistics import log_spectrum
from dae_diffusers.metrics.distances import frechet_distance
from dae_diffusers.metrics.evaluation import (
    EncodedImages,
    encode_images,
    latent_metrics,
    reconstruction_metrics,
    sample_metrics,
)
from dae_diffusers.metrics.features import FeatureExtractor, load_feature_extractor
from dae_diffusers.metrics.sampling import SampleSettings, draw_samples
from dae_diffusers.metrics.statistics import FeatureStatistics, reference_statistics
from dae_diffusers.settings import compose
from dae_diffusers.store import read_json, write_atomically, write_json
from dae_diffusers.store import read_rows as read_log
from dae_diffusers.training.settings import TrainDAEConfig

# What all runs of a folder share.
SHARED = ("data", "features", "num_images", "num_inference_steps", "autoencoder", "transformer")
QUIET = {"validation_steps": 10**9, "checkpointing_steps": 10**9, "logging_steps": 100}

# Enough to order latent spaces; the defaults of `training/complexity.py` take longer and give error bars.
COMPLEXITY = ComplexityConfig(capacities=[0, 16], seeds=[0])


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
            if "fit_of" in options:
                fit_decoders(experiment, budget, condition, seed, generators, output_dir)
            elif "decoder_of" in options:
                train_decoder_on(experiment, budget, condition, seed, generators, output_dir)
            elif "latents_of" in options:
                train_other_decoder(experiment, budget, condition, seed, generators, output_dir)
            else:
                run(experiment, budget, condition, seed, generators, output_dir)
            if arguments.decoder_steps is not None and "fit_of" not in options:
                train_decoder_on(experiment, budget, condition, seed, generators, output_dir, arguments.decoder_steps)
            judge_samples(experiment, budget, condition, seed, generators, output_dir)
    rows = [row for row in read_rows(output_dir) if row["condition"] in experiment["conditions"]]
    if not rows:
        raise UserError(f"nothing is finished in {output_dir}.")
    write_json(output_dir / "results.json", rows)
    runs = [run_of(row) for row in rows]
    write_runs(runs, output_dir / "results.csv")
    text = summarize(runs, experiment)
    write_atomically(output_dir / "results.md", text)
    for budget in budgets_of(runs, experiment):
        chosen_rows = rows_of_budget(runs, experiment, budget)
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
    kept = read_json(path) if path.exists() else {}
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
        # Elsewhere, and moved at the end: it may be interrupted, or be trained by another process too.
        unfinished = folder.with_name(f"classifier-{os.getpid()}")
        launch_script("train_classifier", {**experiment["data"], **experiment["features"], "output_dir": unfinished})
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
    stage2 = {"stage": "2", "stage1_dir": str(before)}

    def cost() -> dict[str, float]:
        """The cost as if both stages had been trained: that of the base, with its second stage replaced."""
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
    flags |= {"pretrained_model_name_or_path": str(before / "vae"), "stage": "2", "auxiliary_decoder": "linear"}

    def cost() -> dict[str, float]:
        first, more = read_json(before / "autoencoder.json")["autoencoder_cost"], cost_of(flags, folder)
        return {name: first[name] + more[name] for name in first}

    transformers = folder_of(output_dir, experiment, budget, origin_of_latents(experiment, condition), seed)
    decode_again(experiment, transformers, folder, flags, condition, seed, generators, cost)


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
    started_from = (
        Path(flags["pretrained_model_name_or_path"]).parent if "pretrained_model_name_or_path" in flags else before
    )
    needed = [started_from / "autoencoder.json", *(before / name / "generator.json" for name in missing)]
    check_finished(condition, needed)
    accelerator, images, extractor, vae, seen = train_autoencoder(experiment, flags, folder, seed)
    if not (folder / "autoencoder.json").exists():
        row = {"condition": condition, "steps": folder.parent.name, "seed": seed, "autoencoder_cost": cost()}
        row |= measure_autoencoder(vae, images, seen, extractor, accelerator, folder)
        write_json(folder / "autoencoder.json", row)
    for name in missing:
        pipeline = DAEDiTPipeline.from_pretrained(before / name / "pipeline", vae=vae).to(accelerator.device)
        (folder / name).mkdir(exist_ok=True)
        row = read_json(before / name / "generator.json")
        row["generation"] = measure_samples(
            experiment, pipeline, folder / name, seed, images, seen, extractor, accelerator
        )
        write_json(folder / name / "generator.json", row)


def fit_decoders(
    experiment: dict[str, Any], budget: str, condition: str, seed: int, generators: list[str], output_dir: Path
) -> None:
    """Stage 3 of a condition for each transformer, from the autoencoder that its `fit_of` names."""
    options = experiment["conditions"][condition]
    folder = folder_of(output_dir, experiment, budget, condition, seed)
    before = folder_of(output_dir, experiment, budget, options["fit_of"], seed)
    origin = folder_of(output_dir, experiment, budget, origin_of_latents(experiment, condition), seed)
    for name in generators:
        target = folder / name
        if (target / "generator.json").exists():
            continue
        check_finished(condition, [before / "autoencoder.json", origin / name / "generator.json"])
        flags = {
            **shared_flags(target, seed),
            **experiment["data"],
            **experiment["autoencoder"],
            **flags_among(options),
        }
        flags |= {"stage": "3", "pipeline": origin / name / "pipeline", "pretrained_model_name_or_path": before / "vae"}
        accelerator, images, extractor, vae, seen = train_autoencoder(experiment, flags, target, seed, "pipeline/vae")
        first = read_json(before / "autoencoder.json")
        more = {**read_json(target / "cost.json"), "flops": math.nan}  # not counted: it depends on the feature model
        row = {"condition": condition, "steps": folder.parent.name, "seed": seed}
        row["autoencoder_cost"] = {name: first["autoencoder_cost"][name] + more[name] for name in more}
        row |= measure_autoencoder(vae, images, seen, extractor, accelerator, target)
        pipeline = DAEDiTPipeline.from_pretrained(target / "pipeline").to(accelerator.device)
        row |= read_json(origin / name / "generator.json")
        row["generation"] = measure_samples(experiment, pipeline, target, seed, images, seen, extractor, accelerator)
        write_json(folder / "autoencoder.json", row)
        write_json(target / "generator.json", row)


def check_finished(condition: str, needed: list[Path]) -> None:
    """Raises `UserError` if files of the runs that a condition continues are missing."""
    unfinished = [str(path.parent) for path in needed if not path.exists()]
    if unfinished:
        raise UserError(
            f"`{condition}` continues runs that are not finished: {', '.join(unfinished)}. Run their conditions first."
        )


def judge_samples(
    experiment: dict[str, Any], budget: str, condition: str, seed: int, generators: list[str], output_dir: Path
) -> None:
    """Fréchet distances of samples to the training images by each judge and at each guidance, into `judged.json`."""
    folder = folder_of(output_dir, experiment, budget, condition, seed)
    origin = folder_of(output_dir, experiment, budget, origin_of_latents(experiment, condition), seed)
    names = [experiment["features"], *experiment.get("judges", [])]
    for generator in generators:
        path = folder / generator / "judged.json"
        judged = read_json(path) if path.exists() else {}
        scales = [str(float(scale)) for scale in experiment.get("guidance_scales", [])]
        if all(set(names) <= judged.get(scale, {}).keys() for scale in scales):
            continue
        accelerator = Accelerator()
        train = load_images(DataConfig(**experiment["data"]), seed)[0]
        judges = {name: JUDGES[name]() if name in JUDGES else load_feature_extractor(name) for name in names}
        references = {
            name: reference_statistics(judge, train, cache_dir=output_dir / "reference")
            for name, judge in judges.items()
        }
        fitted = folder / generator / "pipeline" / "vae"
        vae = AutoencoderKL.from_pretrained(fitted if fitted.exists() else folder / "vae").eval()
        pipeline = DAEDiTPipeline.from_pretrained(origin / generator / "pipeline").to(accelerator.device)
        labels = SampleSettings(experiment["num_images"], None, None).labels(pipeline.null_class)
        for scale in scales:
            latents = draw_latents(
                pipeline, labels, experiment["num_images"], origin / generator / "drawn", accelerator,
                guidance_scale=float(scale), num_inference_steps=experiment["num_inference_steps"],
                seed=1000 + seed, stream=5,
            )  # fmt: skip
            statistics = {name: FeatureStatistics.empty(judge.feature_dim) for name, judge in judges.items()}
            with torch.no_grad():
                for part in latents.split(64):
                    images = vae.decode(part.to(accelerator.device)).sample.float().clamp(-1, 1)
                    for name, judge in judges.items():
                        statistics[name].add(judge(images))
            judged[scale] = {name: frechet_distance(each, references[name]) for name, each in statistics.items()}
            write_json(path, judged)


class Pixels(torch.nn.Module):
    """A judge without a network: images shrunk to 8x8 pixels."""

    name, fingerprint, feature_dim = "pixels", "pixels-8", 192

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.adaptive_avg_pool2d(images, 8).flatten(1)


class Spectrum(torch.nn.Module):
    """A judge without a network: the logarithm of an image's power in 8 rings of spatial frequency, for each colour."""

    name, fingerprint, feature_dim = "spectrum", "spectrum-8-ortho", 24

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return log_spectrum(images, 8, floor=1e-3 / images[0, 0].numel()).flatten(1)


JUDGES = {"pixels": Pixels, "spectrum": Spectrum}


def autoencoder_flags(
    experiment: dict[str, Any], budget: str, condition: str, seed: int, folder: Path
) -> dict[str, Any]:
    """The flags of `train_dae.py` for an autoencoder."""
    flags = {**shared_flags(folder, seed), **experiment["data"], **experiment["autoencoder"]}
    return flags | steps_of(experiment, budget, condition) | flags_among(experiment["conditions"][condition])


def flags_among(options: dict[str, Any]) -> dict[str, Any]:
    """The flags of `train_dae.py` among the options of a condition."""
    keys = ("baselines", "budgets", "decoder_of", "fit_of", "generators", "latents_of", "steps")
    return {name: value for name, value in options.items() if name not in keys}


def cost_of(flags: dict[str, Any], folder: Path) -> dict[str, float]:
    """The cost of an autoencoder that was trained in a folder with these flags."""
    return {**read_json(folder / "cost.json"), "flops": training_flops(compose(TrainDAEConfig, **flags))}


def folder_of(
    output_dir: Path,
    experiment: dict[str, Any],
    budget: str,
    condition: str,
    seed: int,
    *,
    decoder_steps: int | None = None,
) -> Path:
    """The folder of an autoencoder, named after its settings, so that budgets share it."""
    return output_dir / condition / describe_steps(experiment, budget, condition, decoder_steps) / f"seed-{seed}"


def shared_flags(output_dir: Path, seed: int) -> dict[str, Any]:
    """The flags that both training scripts share."""
    return {"output_dir": str(output_dir), "seed": seed, "resume_from_checkpoint": "latest", **QUIET}


def train_autoencoder(
    experiment: dict[str, Any], flags: dict[str, Any], folder: Path, seed: int, result: str = "vae"
) -> tuple[Accelerator, tuple, FeatureExtractor, AutoencoderKL, EncodedImages]:
    """Trains an autoencoder unless it exists, and returns it among what measures it; the last are some training images in it."""
    if not (folder / "cost.json").exists():  # the last thing that is written
        write_json(folder / "cost.json", launch_script("train_dae", flags))
    accelerator = Accelerator()
    images = load_images(DataConfig(**experiment["data"]), seed)
    extractor = load_feature_extractor(experiment["features"])
    vae = AutoencoderKL.from_pretrained(folder / result).eval().to(accelerator.device)
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
    """FLOPs of the matrix products and convolutions in an autoencoder's training, without perceptual model and discriminator."""
    model, total = make_autoencoder(config), 0
    pixel_values = torch.zeros(1, config.data.image_channels, config.data.resolution, config.data.resolution)
    for stage, steps in config.stages.stage_steps().items():
        model.set_stage(stage)
        with FlopCounterMode(display=False) as counter:
            model(pixel_values).sample.sum().backward()
        total += counter.get_total_flops() * steps * config.optimization.train_batch_size
    return float(total)


def read_rows(output_dir: Path) -> list[dict[str, Any]]:
    """A row for each generator that is finished, with what was measured of its autoencoder."""
    rows = []
    for path in sorted(output_dir.glob("*/*/*/*/generator.json")):
        autoencoder = read_json(path.parents[1] / "autoencoder.json")
        judged = path.with_name("judged.json")
        rows.append({**autoencoder, **read_json(path), "judged": read_json(judged) if judged.exists() else {}})
    return rows


def launch_script(name: str, flags: dict[str, Any]) -> dict[str, float]:
    """
    Runs a script of `training/` and returns the seconds of processor time that it took, start-up included. If it continues
    after an interruption, only the seconds since then.
    """
    argv = [sys.executable, "-m", f"dae_diffusers.training.{name}", *words_of(flags)]
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
    rows = read_log(log)
    return next(row[name] for row in reversed(rows) if name in row)


def run_of(row: dict[str, Any]) -> Run:
    """The values of a run that the tables show."""
    reconstruction, generation = row["reconstruction"], row["generation"]
    latents = {name: math.nan if value is None else value for name, value in row["latent_space"].items()}
    complexity = {(entry["form"], entry["capacity"]): entry for entry in row["complexity"]}
    widest = max(capacity for form, capacity in complexity if form == "paired" and capacity is not None)
    return {name: row[name] for name in KEYS} | {
        "PSNR": reconstruction["psnr"],
        "rFD": next(value for name, value in reconstruction.items() if name.startswith(("rfd", "rfid"))),
        "gFD": next(value for name, value in generation.items() if name.startswith(("gfd", "gfid"))),
        "gap": generation["gap"],
        "KID": generation["kernel_distance"],
        **columns_of(row["judged"]),
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
        "AE TFLOP": math.nan if row["autoencoder_cost"]["flops"] is None else row["autoencoder_cost"]["flops"] / 1e12,
        "DiT CPU s": row["generator_cost"]["cpu_seconds"],
    }


def columns_of(judged: dict[str, dict[str, float]]) -> dict[str, float]:
    """Of each judge and guidance, such as `gFD pixels, guidance 1.5`; what judges the table's gFD without guidance has its column."""
    columns = {}
    for scale, distances in judged.items():
        for number, (name, distance) in enumerate(distances.items()):
            parts = [] if number == 0 else [Path(name).name]
            parts += [] if float(scale) == 1 else [f"guidance {float(scale):g}"]
            if parts:
                columns[f"gFD {', '.join(parts)}"] = distance
    return columns


if __name__ == "__main__":
    run_script(main, parse_arguments())
