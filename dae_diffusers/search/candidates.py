"""Which latent spaces are tried: a YAML file, checked against the images."""

import re
from dataclasses import dataclass, field, fields
from importlib.resources import files
from pathlib import Path
from typing import Any

from dae_diffusers.cli import read_yaml, typed_flags
from dae_diffusers.data.configuration import DataConfig
from dae_diffusers.errors import ConfigError, UserError
from dae_diffusers.search.settings import SearchConfig
from dae_diffusers.settings import compose, fields_of
from dae_diffusers.sizes import words_of_size
from dae_diffusers.training.settings import TrainClassifierConfig, TrainDAEConfig, TrainDiTConfig

_PARTS = {"autoencoder": TrainDAEConfig, "transformer": TrainDiTConfig, "judge": TrainClassifierConfig}
_OURS = (
    "stage", "stage1_dir", "stage1_steps", "stage2_steps", "pipeline", "vae", "latent_cache", "max_train_steps", "output_dir", "seed",
    "resume_from_checkpoint",
    "accept_changed_images",
)  # fmt: skip
_SIZE_OF_PILOTS = ("model", "num_layers", "num_attention_heads", "attention_head_dim", "train_batch_size")
# What a part may say about the images, which are the same for all. A generator's are encoded before.
_LOADING = {"dataloader_num_workers"}
_AUGMENTATION = {"random_crop", "random_flip", "random_resized_crop", "random_vertical_flip", "random_quarter_turn"}


@dataclass
class Candidates:
    r"""
    Attributes:
        autoencoder, transformer, judge (`dict`): Flags that all candidates share.
        flags (`dict`): The flags of each candidate by its name; only `vae` for a published autoencoder.
        own_transformer (`dict`): What a candidate has instead of the shared flags of `transformer`, by name.
        left_out (`dict`): Why candidates do not fit the images, by name.
    """

    autoencoder: dict[str, Any]
    transformer: dict[str, Any]
    judge: dict[str, Any]
    flags: dict[str, dict[str, Any]]
    own_transformer: dict[str, dict[str, Any]] = field(default_factory=dict)
    left_out: dict[str, str] = field(default_factory=dict)

    @property
    def joint(self) -> str | None:
        r"""The first candidate of joint training; None if none fits the images."""
        return next((name for name, flags in self.flags.items() if flags.get("auxiliary_decoder") == "none"), None)

    def transformer_of(self, name: str) -> dict[str, Any]:
        r"""The flags of a candidate's pilots and generator."""
        return self.transformer | self.own_transformer.get(name, {})


def read_candidates(config: SearchConfig, data: dict[str, Any]) -> Candidates:
    r"""
    Reads the candidates of a search and leaves out those that do not fit the images.

    Args:
        config ([`SearchConfig`]): The search.
        data (`dict`): Flags of the images.

    Raises:
        ConfigError: For a file that is no list of candidates, and with `on_misfit stop` for one that does not fit.
        UserError: If none fits.
    """
    content, name = _load(config.candidates), f"`candidates` {config.candidates}"
    unknown = set(content) - {*_PARTS, "candidates"}
    if unknown or not isinstance(content.get("candidates"), dict) or not content["candidates"]:
        raise ConfigError(f"{name} must hold `candidates`, and may hold {', '.join(_PARTS)}; it holds {list(content)}.")
    shared = {} if config.mixed_precision is None else {"mixed_precision": config.mixed_precision}
    parts = {part: shared | _flags(f"{part} of {name}", content.get(part) or {}, each) for part, each in _PARTS.items()}
    found = Candidates(**parts, flags={})
    for candidate, flags in content["candidates"].items():
        if not re.fullmatch(r"[\w.-]+", str(candidate)):
            raise ConfigError(f"{name}: {candidate!r} is no name: use letters, digits, `.`, `-` and `_`.")
        if candidate == "published" and config.published_vae is not None:
            raise ConfigError(
                f"{name}: `published` is the name of that of `published_vae`. Give this candidate another."
            )
        where = f"{candidate} of {name}"
        if isinstance(flags, dict) and "transformer" in flags:
            own = _flags(f"transformer of {where}", flags["transformer"], TrainDiTConfig)
            sizes = [each for each in own if each in _SIZE_OF_PILOTS]
            if sizes:
                raise ConfigError(
                    f"{where} has `{sizes[0]}`, but all pilots have one size, so that they can be compared and cost the same. Give it to "
                    "`transformer` of all."
                )
            found.own_transformer[str(candidate)] = own
            flags = {key: value for key, value in flags.items() if key != "transformer"}
        found.flags[str(candidate)] = found.autoencoder | _flags(where, flags, TrainDAEConfig)
    if found.joint is None:
        if "joint" in found.flags:
            raise ConfigError(
                f"{name}: `joint` is the name of joint training, which is always a candidate. Give this one another, or "
                "`auxiliary_decoder: none`."
            )
        found.flags = {"joint": {**found.autoencoder, "auxiliary_decoder": "none"}, **found.flags}
    for candidate in list(found.flags):
        reason = _misfit(found.flags[candidate], found.transformer_of(candidate), data)
        if reason is not None and config.on_misfit == "stop":
            raise ConfigError(f"candidate `{candidate}` does not fit: {reason} `on_misfit skip` leaves it out.")
        if reason is not None:
            found.left_out[candidate] = reason
            del found.flags[candidate]
    if config.published_vae is not None:
        found.flags["published"] = {"vae": config.published_vae}
    if not found.flags:
        raise UserError(f"no candidate fits the images: {next(iter(found.left_out.values()))}")
    return found


def stage1_flags(flags: dict[str, Any]) -> dict[str, Any]:
    r"""The flags of a candidate that its stage 1 knows. Candidates that have the same ones share it."""
    return {name: value for name, value in flags.items() if name != "keep_latent_channels"}


def _load(name: str) -> dict[str, Any]:
    path = Path(name).expanduser()
    if not path.suffix and path.name == name:
        packaged = Path(str(files("dae_diffusers.search") / "configs"))
        path = packaged / f"{name}.yaml"
        if not path.exists():
            known = ", ".join(sorted(each.stem for each in packaged.glob("*.yaml")))
            raise ConfigError(f"`candidates` {name} is neither a YAML file nor one of {known}.")
    return read_yaml(path, f"`candidates` {name}")


def _flags(where: str, flags: Any, config_class: type) -> dict[str, Any]:
    """The flags of a part or a candidate, checked and with their types."""
    if not isinstance(flags, dict):
        raise ConfigError(f"{where} must be a mapping of flags, but is {flags!r}.")
    known = {each.name for _, each, _ in fields_of(config_class)}
    wrong = [name for name in flags if name not in known or name in _OURS]
    if wrong:
        raise ConfigError(f"{where} has `{wrong[0]}`, which is no flag that a candidate can set.")
    own = _LOADING if config_class is TrainDiTConfig else _LOADING | _AUGMENTATION
    of_images = {each.name for each in fields(DataConfig)} - own
    wrong = [name for name in flags if name in of_images]
    if wrong:
        raise ConfigError(f"{where} has `{wrong[0]}`, but all candidates have the same images: give it to the command.")
    return typed_flags(config_class, flags, where)


def _misfit(flags: dict[str, Any], transformer: dict[str, Any], data: dict[str, Any]) -> str | None:
    """Why an autoencoder and its generator do not fit the images, or None."""
    kept, of_stage1 = flags.get("keep_latent_channels"), stage1_flags(flags)
    try:
        autoencoder = compose(TrainDAEConfig, **{**data, **of_stage1})
        # As it will be trained: from cached latents alone.
        generator = compose(TrainDiTConfig, **{**transformer, "vae": "vae", "latent_cache": "latents"})
    except ConfigError as error:
        return str(error)
    channels = autoencoder.autoencoder.latent_channels
    if kept is not None and autoencoder.stages.auxiliary_decoder != "prefix":
        return "`keep_latent_channels` needs `auxiliary_decoder prefix`."
    if kept is not None and not 1 <= kept <= channels:
        return f"`keep_latent_channels` is {kept}, but there are {channels} channels."
    sides = [side // autoencoder.autoencoder.spatial_factor for side in autoencoder.data.size]
    patch = generator.transformer.patch_size or int(generator.transformer.size.partition("/")[2])
    if any(side % patch for side in sides):
        return f"latents of {words_of_size(sides)} cannot be cut into patches of {patch}."
    return None
