"""Settings of a benchmark: the images, and what the results of a folder were made with."""

import json
from pathlib import Path
from typing import Any

import yaml

from dae_diffusers.cli import OF_SOURCE, SOURCES, load_yaml, typed_flags
from dae_diffusers.data import DataConfig
from dae_diffusers.errors import ConfigError, UserError, one_line
from dae_diffusers.store import read_json, write_json


def choose_data(given: list[str], data: dict[str, Any] | None = None) -> dict[str, Any]:
    r"""
    Checks flags of the images, and gives them their types.

    Args:
        given (`list[str]`): Flags as `flag=value`, with values as in YAML.
        data (`dict`, *optional*): Flags that these replace; a new source of images replaces the old one.

    Raises:
        ConfigError: For other words, unknown flags, and values that are not allowed.
    """
    without_value = [item for item in given if "=" not in item]
    if without_value:
        raise ConfigError(f"`--data` takes FLAG=VALUE, not {without_value}.")
    try:
        flags = {name: load_yaml(value) for name, _, value in (item.partition("=") for item in given)}
    except yaml.YAMLError as error:
        raise ConfigError(f"`--data` cannot be read: {one_line(error)}") from None
    chosen = {name: value for name, value in (data or {}).items() if not (name in OF_SOURCE and SOURCES & set(flags))}
    config = DataConfig(**typed_flags(DataConfig, chosen | flags, "the flags of the images"))
    config.require_source()
    return {name: getattr(config, name) for name in chosen | flags}


def check_same_settings(path: Path, settings: dict[str, Any]) -> None:
    r"""
    Keeps what the results of a folder were made with, in a JSON file.

    Raises:
        UserError: If the file says something else: results of before would be taken for those of these settings.
    """
    kept = read_json(path) if path.exists() else {}
    path.parent.mkdir(parents=True, exist_ok=True)
    write_json(path, with_kept(kept, settings, f"{path.parent} holds results of other settings"))


def with_kept(kept: dict[str, Any], this: dict[str, Any], conflict: str) -> dict[str, Any]:
    r"""What was kept, and this, as JSON holds it. Raises `UserError` with the words of a conflict if they contradict each other."""
    this = json.loads(json.dumps(this, default=str))
    for name in kept.keys() & this.keys():
        if kept[name] != this[name]:
            raise UserError(
                f"{conflict}: `{name}` was {kept[name]} and is {this[name]}. Choose another `--output_dir`."
            )
    return kept | this
