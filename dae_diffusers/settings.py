"""Settings: small dataclasses beside what they configure, with a help text and bounds in each field, composed by the scripts."""

import dataclasses
import math
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, TypeVar, get_type_hints

import yaml
from typing_extensions import dataclass_transform

from dae_diffusers.errors import ConfigError

Config = TypeVar("Config")

# These settings belong to a single run: [`flags_of`] leaves them out, since it says how to make the same model elsewhere.
_OF_ONE_RUN = ("output_dir", "report_to", "push_to_hub", "resume_from_checkpoint", "accept_changed_images", "dry_run")
_PREFIXES_OF_ONE_RUN = ("hub_", "tracker_")


def field(
    default: Any = dataclasses.MISSING,
    help: str = "",
    *,
    at_least: float | None = None,
    above: float | None = None,
    at_most: float | None = None,
    below: float | None = None,
    hint: str = "",
    needs: str = "",
    advanced: bool = False,
    free_text: bool = False,
) -> Any:
    r"""
    Defines a field of a settings class.

    Args:
        default: Its default; without one the setting is required. A list is copied.
        help (`str`): What `--help` shows.
        at_least, above, at_most, below (`float`, *optional*): Bounds of a number, or of each number in a list. None is allowed.
        hint (`str`, *optional*): What to do instead of giving a value outside these bounds.
        needs (`str`, *optional*): The setting without which this one has no effect, such as `"streaming"`, or with its value,
            `"lr_scheduler warmup_stable_decay"`; several with " or " between them, and " and " between such groups.
        advanced (`bool`, *optional*, defaults to `False`): Shown by `--help_all` only.
        free_text (`bool`, *optional*, defaults to `False`): Whether any text is a value, an empty one too.
    """
    bounds = {"at_least": at_least, "above": above, "at_most": at_most, "below": below}
    metadata = {
        "help": help,
        "bounds": {name: bound for name, bound in bounds.items() if bound is not None},
        "hint": hint,
        "needs": needs,
        "advanced": advanced,
        "free_text": free_text,
    }
    if isinstance(default, list):
        return dataclasses.field(default_factory=lambda: list(default), metadata=metadata)
    return dataclasses.field(default=default, metadata=metadata)


def part(**defaults: Any) -> Any:
    r"""Defines a field that holds another settings class; `defaults` replace the defaults of that class."""
    return dataclasses.field(metadata={"defaults": defaults})


@dataclass_transform(field_specifiers=(field, part))
def settings(cls: type[Config]) -> type[Config]:
    r"""
    Makes a class a dataclass that checks the bounds of its fields before its own `__post_init__`. Its `from_recipe` names the settings
    that come from a packaged recipe, for [`without_effect`]; [`~dae_diffusers.cli.parse_config`] fills it in.

    Raises:
        ConfigError: From the constructor, for a value out of its bounds; names the field.
    """
    own_check = cls.__dict__.get("__post_init__")

    def __post_init__(self) -> None:
        check_bounds(self)
        if own_check is not None:
            own_check(self)

    cls.__post_init__ = __post_init__
    cls.from_recipe = frozenset()
    return dataclass(cls)


def check_bounds(values: Any) -> None:
    r"""
    Raises `ConfigError` for a number of a dataclass that is not finite or not within the bounds of its field, an empty text, and a
    variable of the shell in a text.
    """
    for each in dataclasses.fields(values):
        value = getattr(values, each.name)
        for number in value if isinstance(value, (list, tuple)) else [value]:
            if isinstance(number, str) and not each.metadata.get("free_text"):
                _check_text(each.name, number)
            if isinstance(number, bool) or not isinstance(number, (int, float)):
                continue
            if isinstance(number, float) and not math.isfinite(number):
                raise ConfigError(f"`{each.name}` is {value}, but must be finite.")
            bounds = each.metadata.get("bounds", {})
            if not _is_within(number, **bounds):
                hint = each.metadata.get("hint")
                text = f"`{each.name}` is {number}, but must be {_describe(**bounds)}"
                raise ConfigError(f"{text}; {hint}." if hint else f"{text}.")


def check_again(config: Any) -> None:
    r"""Runs the checks of a settings class once more, after values have changed. Raises as its constructor does."""
    config.__post_init__()


def _check_text(name: str, text: str) -> None:
    """A path that the shell has not filled in would be another folder: the current one, or one called `$HOME`."""
    if not text.strip():
        raise ConfigError(f"`{name}` is empty. Give a value, or leave it out.")
    if re.search(r"\$(\w|\{)", text):
        raise ConfigError(f"`{name}` is {text}, but variables are not filled in here. Write out what it stands for.")


def _is_within(number: float, at_least=None, above=None, at_most=None, below=None) -> bool:
    return (
        (at_least is None or number >= at_least)
        and (above is None or number > above)
        and (at_most is None or number <= at_most)
        and (below is None or number < below)
    )


def _describe(at_least=None, above=None, at_most=None, below=None) -> str:
    if at_least is not None and at_most is not None:
        return f"in [{at_least}, {at_most}]"
    words = {"at least": at_least, "above": above, "at most": at_most, "below": below}
    given = [f"{word} {bound}" for word, bound in words.items() if bound is not None]
    return "0 or more" if given == ["at least 0"] else " and ".join(given)


@cache
def parts_of(config_class: type) -> dict[str, tuple[type, dict[str, Any]]]:
    r"""
    The parts of a composed settings class, by name, each with the defaults that the composition changes. A class that is not
    composed is its own only part, under the name `""`.
    """
    hints = get_type_hints(config_class)
    found = {
        each.name: (hints[each.name], each.metadata.get("defaults", {}))
        for each in dataclasses.fields(config_class)
        if dataclasses.is_dataclass(hints[each.name])
    }
    return found or {"": (config_class, {})}


def fields_of(config_class: type) -> Iterator[tuple[type, dataclasses.Field, Any]]:
    r"""Each setting of a composed class: the part that holds it, its field, and its default (`MISSING` if it is required)."""
    for owner, defaults in parts_of(config_class).values():
        for each in dataclasses.fields(owner):
            default = each.default if each.default_factory is dataclasses.MISSING else each.default_factory()
            yield owner, each, defaults.get(each.name, default)


def compose(config_class: type[Config], **values: Any) -> Config:
    r"""
    Makes an instance of a composed settings class from flat names of settings.

    ```python
    config = compose(TrainDAEConfig, dataset_name="digits", resolution=32)
    config.data.resolution
    ```

    Args:
        config_class (`type`): A [`settings`] class, composed or not.
        values: Settings by name; the others keep their defaults.

    Raises:
        TypeError: For a name that no part has, or a required setting that is missing.
        ConfigError: For a value that is not allowed.
    """
    made = {}
    for name, (owner, defaults) in parts_of(config_class).items():
        names = [each.name for each in dataclasses.fields(owner)]
        made[name] = owner(**{**defaults, **{each: values.pop(each) for each in names if each in values}})
    if values:
        raise TypeError(f"{config_class.__name__} has no setting {sorted(values)[0]!r}.")
    return made[""] if "" in made else config_class(**made)


def flat(config: Any) -> dict[str, Any]:
    r"""All settings of a composed class, by name."""
    if not dataclasses.is_dataclass(config):
        return {}
    names = parts_of(type(config))
    parts = [config] if "" in names else [getattr(config, name) for name in names]
    return {each.name: getattr(one, each.name) for one in parts for each in dataclasses.fields(one)}


def without_effect(config: Any) -> list[str]:
    r"""
    A sentence for each missing setting, with the changed settings that have no effect without it. Settings of a packaged recipe do not
    count, because one recipe serves all stages.
    """
    idle: dict[str, list[str]] = {}
    values = flat(config)
    known = values | getattr(config, "known", dict)()
    for _, each, default in fields_of(type(config)) if values else ():
        if values[each.name] == default or each.name in config.from_recipe:
            continue
        groups = filter(None, each.metadata.get("needs", "").split(" and "))
        missing = [needs for needs in groups if not any(_holds(known, need) for need in needs.split(" or "))]
        if missing:
            idle.setdefault(missing[0], []).append(each.name)
    return [
        f"`{'`, `'.join(names)}` {'has' if len(names) == 1 else 'have'} no effect without `{needs.replace(' or ', '` or `')}`."
        for needs, names in idle.items()
    ]


def _holds(values: dict[str, Any], need: str) -> bool:
    """
    Whether `need` is met: `name` is set, or `name value` has that value (a list: holds it). A setting that this script lacks counts as met.
    """
    name, _, wanted = need.partition(" ")
    value = values.get(name, wanted or True)
    return wanted in map(str, value if isinstance(value, list) else [value]) if wanted else bool(value)


def changes_of(values: Any) -> dict[str, Any]:
    r"""The settings of one class that differ from their defaults, by name."""
    defaults = {each.name: default for _, each, default in fields_of(type(values))}
    return {name: getattr(values, name) for name in defaults if getattr(values, name) != defaults[name]}


def config_text(config: Any) -> str:
    r"""Settings as the YAML that `--config` reads."""
    return yaml.safe_dump(flat(config), sort_keys=False, allow_unicode=True)


def is_of_one_run(name: str) -> bool:
    r"""Whether a setting belongs to a single run, such as its folder, and does not describe the model."""
    return name in _OF_ONE_RUN or name.startswith(_PREFIXES_OF_ONE_RUN)


def without_paths(value: Any) -> Any:
    r"""A value that JSON can hold, with absolute paths, which reveal a machine and its user, shortened to their last part."""
    if isinstance(value, dict):
        return {name: without_paths(each) for name, each in value.items()}
    if isinstance(value, list):
        return [without_paths(each) for each in value]
    return Path(value).name if isinstance(value, str) and os.path.isabs(value) else value


def flags_of(config: Any, *, whole_paths: bool = False) -> list[str]:
    r"""
    The flags that change the defaults into these settings, without the folder, publishing and resuming. Of an absolute path only
    the last part stays, unless `whole_paths` asks for all of it.
    """
    values, argv = flat(config), []
    for _, each, default in fields_of(type(config)):
        name, value = each.name, values[each.name]
        if value == default or is_of_one_run(name):
            continue
        if isinstance(value, bool):
            argv.append(f"--{name}" if value else f"--no_{name}")
        elif isinstance(value, list):
            argv += [f"--{name}", *map(str, value)]
        else:
            argv += [f"--{name}", str(value if whole_paths else without_paths(value))]
    return argv
