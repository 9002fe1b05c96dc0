r"""
The complexity distance of a latent space, measured with *pilots*: small transformers, trained for a short time with flow matching
on the normalised latents.

`D(width)` is the generation distance (gFD) of the pilot of that width after decoding, and its held-out loss. The scalar `D` is the
geometric mean of gFD over the pilots. The scale of the latents does not matter, since they are normalised. The idea of a
distance under limited capacity is from DAE, https://huggingface.co/papers/2307.08283, whose formula was not available to us.

Decoders differ in what they lose. With `refit_steps` each autoencoder's decoder is trained on in the same way first.
"""

import shutil
from functools import cache
from pathlib import Path
from typing import Any

from dae_diffusers.autoencoders.loading import is_vq, load_autoencoder
from dae_diffusers.comparison.scripts import launch_script
from dae_diffusers.comparison.sharing import do_once, share
from dae_diffusers.comparison.trials import Ruler, cache_latents, train_generator
from dae_diffusers.complexity.settings import ComplexityConfig
from dae_diffusers.data import DataConfig, load_images
from dae_diffusers.data.arrays import read_value_range
from dae_diffusers.metrics.checks import check_enough_images, check_judge
from dae_diffusers.metrics.features import load_feature_extractor
from dae_diffusers.store import fingerprint_of_json, read_json, write_json
from dae_diffusers.weights import model_fingerprint

_VERSION = 2  # raise it when the same inputs give other numbers


def measure_pilots(
    vae: str,
    data: dict[str, Any],
    config: ComplexityConfig,
    folder: Path,
    *,
    features: str | None = None,
    seed: int = 0,
    reference: Path | None = None,
) -> list[dict[str, Any]]:
    r"""
    Trains and measures the pilots of an autoencoder. Several processes may call it: each pilot is trained by one of them. What is
    finished is kept in `folder` and not repeated; what was interrupted goes on.

    Args:
        vae (`str`): Folder or Hub id of the autoencoder.
        data (`dict`): The flags of the training scripts that choose the images.
        config ([`ComplexityConfig`]): The ladder of pilots.
        folder (`Path`): Where to work.
        features (`str`, *optional*): Feature extractor for gFD; without one, only the loss is measured.
        seed (`int`, *optional*): Of the samples, and of the decoder that is trained again.
        reference (`Path`, *optional*): Folder of the training images' statistics, which several autoencoders may share.

    Returns:
        `list[dict]`: A row for each pilot: `width`, `steps`, `seed`, `parameters`, `validation_loss`, `cpu_seconds`, and with features gFD,
        `gap` and the other numbers of samples.

    Raises:
        ScriptError: If a training fails.
        UserError: For an autoencoder that cannot be loaded.
    """
    described = {
        name: value for name, value in vars(config).items() if name not in ("widths", "pilot_steps", "pilot_seeds")
    }
    value_range = read_value_range(vae)
    splits = load_images(DataConfig(**data), value_range=value_range)
    extractor = None if features is None else load_feature_extractor(features, channels=splits[0].config.image_channels)
    if extractor is not None:
        check_judge(vae, extractor)
        check_enough_images(extractor, *splits, config.num_images)
    images = [split.fingerprint for split in splits]
    of = [_VERSION, model_fingerprint(load_autoencoder(vae)), images, data, described, seed]
    key = fingerprint_of_json(of if value_range is None else [*of, value_range])
    home = folder / "pilots" / key
    experiment = {
        "data": data,
        "features": features,
        "num_images": config.num_images,
        "num_inference_steps": config.num_inference_steps,
        "transformer": {},
        "generators": {name: config.transformer(*pilot[:2]) for name, pilot in config.pilots().items()},
    }
    used = str(home / "refitted" / "vae") if config.refit_steps else vae
    judged = home / ("loss" if extractor is None else extractor.fingerprint)

    def row_of(name: str) -> Path:
        return judged / f"{name}.json"

    # Runs with other pilots may work in this folder at the same time, and remove theirs.
    latents = home / f"latents-{fingerprint_of_json(sorted(config.pilots()))}"
    cached = latents.with_suffix(".json")

    def are_cached() -> bool:
        return cached.exists() or all((home / name / "trained.json").exists() for name in config.pilots())

    missing = [name for name in config.pilots() if not row_of(name).exists()]
    if missing:
        if config.refit_steps:
            do_once("refitted", home, Path(used).exists, lambda: _refit(vae, data, config, home, seed))
        do_once(
            latents.name,
            home,
            are_cached,
            lambda: write_json(cached, cache_latents(experiment, used, latents)),
        )

    @cache
    def ruler() -> Ruler:
        return Ruler(experiment, used, seed, reference or folder / "reference")

    def measure(name: str) -> None:
        width, steps, pilot_seed = config.pilots()[name]
        target = home / name
        kept = target / "trained.json"
        if not kept.exists():
            write_json(kept, train_generator(experiment, name, used, latents, target, pilot_seed))
        trained = read_json(kept)
        row = {
            "width": width,
            "steps": steps,
            "seed": pilot_seed,
            "cpu_seconds": trained["generator_cost"]["cpu_seconds"],
        }
        row |= {each: trained[each] for each in ("parameters", "validation_loss")}
        if features is not None:
            row |= ruler().samples(target / "pipeline", target)
        judged.mkdir(exist_ok=True)
        write_json(row_of(name), row)
        shutil.rmtree(target / "train_dit" / "checkpoints", ignore_errors=True)

    share(missing, home, lambda name: row_of(name).exists(), measure)
    cached.unlink(missing_ok=True)
    shutil.rmtree(latents, ignore_errors=True)
    return [read_json(row_of(name)) for name in config.pilots()]


def _refit(vae: str, data: dict[str, Any], config: ComplexityConfig, home: Path, seed: int) -> None:
    flags = {**data, "pretrained_model_name_or_path": vae, "stage": "2", "auxiliary_decoder": "linear"}
    flags |= {"autoencoder": "vq"} if is_vq(load_autoencoder(vae)) else {}
    flags |= {"stage2_steps": config.refit_steps, "train_batch_size": config.train_batch_size, "seed": seed}
    launch_script("train_dae", {**flags, "output_dir": home / "refitted", "resume_from_checkpoint": "latest"})
    shutil.rmtree(home / "refitted" / "train_dae", ignore_errors=True)
