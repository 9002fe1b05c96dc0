"""Turns a command line and a YAML file into validated settings."""

import copy
import dataclasses
import os
import re
import shutil
import sys
import textwrap
from argparse import (
    SUPPRESS,
    ArgumentDefaultsHelpFormatter,
    ArgumentParser,
    ArgumentTypeError,
    RawDescriptionHelpFormatter,
)
from importlib.resources import files
from pathlib import Path
from typing import Any, Literal, TypeVar, get_args, get_origin, get_type_hints

import yaml

from dae_diffusers.errors import ConfigError, did_you_mean, one_line
from dae_diffusers.script import as_typed, with_dashes
from dae_diffusers.settings import compose, fields_of, flat

Config = TypeVar("Config")

SOURCES = {"dataset_name", "train_data_dir"}  # of images: one replaces the other
OF_SOURCE = SOURCES | {"dataset_config_name"}
# `num_train_epochs` replaces these. `stage1_steps` and `stage2_steps` stay: beside passes they say how the stages share them.
_PASSES, _STEPS = "num_train_epochs", {"max_train_steps", "stage3_steps"}
_METAVARS = {int: "N", float: "X", str: "NAME"}
_YES, _NO = {"yes", "true", "t", "y", "1", "on"}, {"no", "false", "f", "n", "0", "off"}


def parse_config(
    config_class: type[Config], argv: list[str] | None = None, *, description: str = "", prog: str | None = None
) -> Config:
    r"""
    Builds a script's settings from its flags, on top of the YAML file that `--config` names, on top of the defaults.

    Args:
        config_class (`type`): A class made by [`~dae_diffusers.settings.settings`], composed or not. `--help` shows each
            part under the first line of its docstring. Flags of the classes in its `PASSES_OVER`, if it has one, are read and left out.
        argv (`list[str]`, *optional*): Defaults to `sys.argv[1:]`.
        description (`str`, *optional*): Shown by `--help`.
        prog (`str`, *optional*): The command, in `--help` and errors. Defaults to the name of the running script.

    Returns:
        An instance of `config_class`.

    Raises:
        SystemExit: With code 2 and one line on stderr for anything wrong; with code 0 for `--help` and `--help_all`.
    """
    argv = sys.argv[1:] if argv is None else argv
    is_command = (prog or "").startswith("dae-diffusers") or None
    parser = _Parser(
        config_class, description=description, help_all="--help_all" in argv, prog=prog, is_command=is_command
    )
    try:
        path, argv = _take_config_flag(argv)
        from_file = _yaml_to_argv(path, config_class) if path else []
        is_recipe = path is not None and _find_config(path, config_class) != Path(path).expanduser()
        if SOURCES & set(_names(argv)):  # other images than the file's
            from_file = _without(OF_SOURCE, from_file)
        from_file = _with_one_length(from_file, set(_names(argv)))
    except ValueError as error:
        parser.end(str(error))
    try:
        config = compose(config_class, **parser.parse([*from_file, *argv]))
        _check_output(flat(config))
        config.from_recipe = set(_names(from_file)) - set(_names(argv)) if is_recipe else set()
        return config
    except ValueError as error:
        parser.end(as_typed(with_dashes(str(error), [each.name for _, each, _ in fields_of(config_class)]), is_command))


def _check_output(values: dict[str, Any]) -> None:
    """Raises `ConfigError` for results that would lie among the images."""
    output = values.get("output_dir")
    for name in SOURCES:
        if (
            output
            and values.get(name)
            and os.path.isdir(output)
            and os.path.realpath(output) == os.path.realpath(values[name])
        ):
            raise ConfigError(f"`output_dir` {output} is the folder of the images (`{name}`). Choose another folder.")


def typed_flags(config_class: type, flags: dict[str, Any], where: str) -> dict[str, Any]:
    r"""
    Gives values that [`read_yaml`] has read the types of their settings.

    Args:
        config_class (`type`): The settings class that has these flags.
        flags (`dict`): Values by flag, as text; None stands for a default of None.
        where (`str`): Where they stand, for errors.

    Raises:
        ConfigError: For a value of another type, and a flag that the class does not have.
    """
    argv = _to_argv(flags, where, config_class)
    try:
        values = _Parser(config_class, takes_any=True).parse(argv)
    except ConfigError as error:
        raise ConfigError(f"{where}: {error}") from None
    return {name: values[name] for name in flags}


def _names(argv: list[str]) -> list[str]:
    """The names of the flags among the words of a command line."""
    return [word[2:].partition("=")[0] for word in argv if word.startswith("--")]


def _without(names: set[str], argv: list[str]) -> list[str]:
    return [word for word in argv if not names & set(_names([word]))]


def _with_one_length(from_file: list[str], typed: set[str]) -> list[str]:
    """The flags of a file without a training's length that the command line replaces. Raises `ConfigError` if that has two."""
    if _PASSES in typed and (both := sorted(_STEPS & typed)):
        raise ConfigError(
            f"`--{_PASSES}` and `--{both[0]}` both say how long to train, in passes over the images and in steps. Give one of them."
        )
    if _STEPS & typed:
        return _without({_PASSES}, from_file)
    return _without(_STEPS, from_file) if _PASSES in typed else from_file


class _HelpFormatter(ArgumentDefaultsHelpFormatter, RawDescriptionHelpFormatter):
    def __init__(self, prog: str):
        width = min(140, max(120, shutil.get_terminal_size().columns))
        super().__init__(prog, max_help_position=40, width=width)

    def _get_help_string(self, action):
        says_all = (
            action.metavar == "KIND"
            or "default: " in (action.help or "")
            or any(action.default is each for each in (None, False, SUPPRESS))
        )
        if says_all or not action.help or f"--no_{action.dest}" in action.option_strings:
            return action.help
        if isinstance(action.default, list):  # as it is typed
            shown = " ".join(map(str, action.default))
            return f"{action.help} (default: {shown})" if shown else action.help
        return super()._get_help_string(action)


class _Parser(ArgumentParser):
    """A parser with a group for each part of the settings, a short and a full help, and errors of one line."""

    def __init__(
        self,
        config_class: type,
        description: str = "",
        help_all: bool = False,
        prog: str | None = None,
        is_command: bool | None = None,
        takes_any: bool = False,
    ):
        self.leading = getattr(config_class, "LEADING", "")
        super().__init__(
            prog=prog,
            usage=f"%(prog)s {self.leading}[--config NAME or FILE.yaml] [--flag value ...]",
            description=textwrap.dedent(description).strip(),
            formatter_class=_HelpFormatter,
            allow_abbrev=False,
        )
        # argparse's own takes -1e-3 for a flag.
        self._negative_number_matcher = re.compile(r"-(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?$")
        self.add_argument(
            "--config",
            metavar="NAME|FILE.yaml",
            help="YAML file with flags, or a packaged recipe such as digits; the command line wins",
        )
        self.add_argument("--help_all", action="help", help="show every flag")
        self.flags = ["-h", "--help", "--config", "--help_all"]
        self.is_command, self.takes_any = is_command, takes_any
        groups = {}
        for owner, each, default in fields_of(config_class):
            if owner not in groups:
                groups[owner] = self.add_argument_group((owner.__doc__ or owner.__name__).strip().rstrip("."))
            is_shown = help_all or not each.metadata.get("advanced")
            self._add_setting(groups[owner], each, _kind(owner, each), default, is_shown)
        self.passed_over = _passed_over(config_class)
        for owner, each, default in self.passed_over.values():
            self._add_setting(self, each, _kind(owner, each), default, is_shown=False)

    def _add_setting(self, group, each: dataclasses.Field, kind: Any, default: Any, is_shown: bool) -> None:
        """Adds the flag of a setting, and `--no_...` for one that is on."""
        options = {"type": kind, "metavar": _METAVARS.get(kind)}
        text = each.metadata.get("help", "")
        if kind is bool:
            options = {"type": _switch, "nargs": "?", "const": True, "metavar": "yes|no"}
        elif get_origin(kind) is list:
            (item,) = get_args(kind)
            options = {"type": item, "nargs": "+", "metavar": _METAVARS[item]}
        elif get_origin(kind) is Literal:
            options = {"choices": get_args(kind)}
            if len("".join(options["choices"])) > 20:
                options["metavar"] = "KIND"
                shown = (f"{choice} (default)" if choice == default else choice for choice in options["choices"])
                text = f"{', '.join(shown)}: {text}"
        if default is dataclasses.MISSING:
            options["required"], text, default = not self.takes_any, f"{text} (required)", SUPPRESS
        self._add_flag(group, f"--{each.name}", text, is_shown, default=copy.copy(default), **options)
        if default is True:
            off = f"switch `--{each.name}` off"
            self._add_flag(group, f"--no_{each.name}", off, is_shown, action="store_false", dest=each.name)

    def _add_flag(self, group, flag: str, text: str, is_shown: bool, **options: Any) -> None:
        self.flags.append(flag)
        group.add_argument(flag, help=as_typed(text, self.is_command) if is_shown else SUPPRESS, **options)

    def print_help(self, file=None) -> None:
        try:
            super().print_help(file)
            sys.stdout.flush()
        except BrokenPipeError:  # `--help | head -1`
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # what is left is flushed at the end

    def parse(self, argv: list[str]) -> dict[str, Any]:
        """The value of every setting, by name."""
        for name in _names(argv):  # before argparse, which looks first for flags that are missing
            if f"--{name}" not in self.flags:
                raise ConfigError(f"unknown flag `--{name}`.{did_you_mean(f'--{name}', self.flags)} See --help_all.")
        namespace, unknown = self.parse_known_args(argv)
        if unknown:
            raise ConfigError(f"unexpected argument {unknown[0]!r}; a value follows its flag. See --help.")
        left_out = {"config", *self.passed_over}
        return {name: _expand_home(value) for name, value in vars(namespace).items() if name not in left_out}

    def error(self, message: str):
        hint = f". They come first: {self.prog} {self.leading}[--flag value ...]" if self.leading else ""
        raise ConfigError(one_line(message) + (hint if "are required" in message else ""))

    def end(self, message: str):
        """Ends the process with an error of one line."""
        print(f"{self.prog}: error: {' '.join(message.splitlines())}", file=sys.stderr, flush=True)
        raise SystemExit(ConfigError.exit_code)


def _switch(text: str) -> bool:
    """Reads what YAML and people take for yes or no."""
    if text.lower() not in _YES | _NO:
        raise ArgumentTypeError(
            f"{text!r} is neither yes nor no. Give yes, true, on or 1, or else no, false, off or 0."
        )
    return text.lower() in _YES


def _passed_over(config_class: type) -> dict[str, tuple[type, dataclasses.Field, Any]]:
    """The settings of other scripts, whose flags this one reads and leaves out, by name; those that are required have the default None."""
    own = {each.name for _, each, _ in fields_of(config_class)}
    return {
        each.name: (owner, each, None if default is dataclasses.MISSING else default)
        for other in getattr(config_class, "PASSES_OVER", ())
        for owner, each, default in fields_of(other)
        if each.name not in own
    }


def _kind(owner: type, each: dataclasses.Field) -> Any:
    """The type of a setting, without None; of `int | list[int]` the list."""
    kind = get_type_hints(owner)[each.name]
    kinds = [kind] if get_origin(kind) in (None, list, Literal) else get_args(kind)
    return next((one for one in kinds if get_origin(one) is list), kinds[0])


def _expand_home(value: Any) -> Any:
    """Expands `~`, which a shell does not do in YAML and after `=`."""
    is_below_home = isinstance(value, str) and (value == "~" or value.startswith("~/"))
    return os.path.expanduser(value) if is_below_home else value


def _take_config_flag(argv: list[str]) -> tuple[str | None, list[str]]:
    paths, rest, words = [], [], iter(argv)
    for word in words:
        if word == "--config":
            paths.append(next(words, None))
        elif word.startswith("--config="):
            paths.append(word.removeprefix("--config="))
        else:
            rest.append(word)
    if None in paths:
        raise ConfigError("`--config` needs the path of a YAML file or the name of a recipe.")
    if len(paths) > 1:
        raise ConfigError(
            f"`--config` is given twice ({', '.join(paths)}). Give one file, and the other flags beside it."
        )
    return paths[0] if paths else None, rest


def _find_config(name: str, config_class: type) -> Path:
    """The file itself, or the packaged recipe of that name: `digits` is `digits_dae.yaml` for train_dae.py."""
    path = Path(name).expanduser()
    if path.exists() or path.suffix or path.name != name:
        return path
    kinds = [getattr(each, "RECIPES", "") for each in (config_class, *getattr(config_class, "PASSES_OVER", ()))]
    recipes = Path(str(files("dae_diffusers.training") / "configs"))
    for candidate in (*(f"{name}_{kind}" for kind in kinds), name):
        if (recipes / f"{candidate}.yaml").exists():
            return recipes / f"{candidate}.yaml"
    known = sorted({each.stem.removesuffix(f"_{kind}") for kind in kinds for each in recipes.glob(f"*_{kind}.yaml")})
    there = f"The recipes are {', '.join(known)}." if known else "This script has none: give a YAML file."
    raise ConfigError(f"`--config` {name} is neither a file nor a packaged recipe. {there}")


def _yaml_to_argv(name: str, config_class: type) -> list[str]:
    """Turns a YAML file into flags, so that its values pass the same checks as those of the command line."""
    path = _find_config(name, config_class)
    return _to_argv(read_yaml(path, f"`--config` {path}"), str(path), config_class)


def _to_argv(flags: dict[str, Any], where: str, config_class: type) -> list[str]:
    defaults = {each.name: default for _, each, default in fields_of(config_class)}
    defaults |= {key: default for key, (_, _, default) in _passed_over(config_class).items()}
    argv = []
    for key, value in flags.items():
        if key not in defaults:
            raise ConfigError(
                f"{where}: unknown field `{key}`.{did_you_mean(str(key), list(defaults))} See --help_all."
            )
        if value is None:
            if defaults[key] is not None:
                raise ConfigError(f"{where}: `{key}` has no value; leave the line out to use the default.")
        elif isinstance(value, dict):
            raise ConfigError(f"{where}: `{key}` must be one value or a list, but is a mapping.")
        elif not isinstance(value, list):
            argv += [f"--{key}={value}"]
        elif any(each is None or isinstance(each, (dict, list)) for each in value):
            raise ConfigError(f"{where}: `{key}` must be a list of values, but is {value}.")
        elif not value and isinstance(defaults[key], bool):  # a flag without a value is a yes
            raise ConfigError(f"{where}: `{key}` must be yes or no, but is an empty list.")
        elif value or defaults[key] != []:
            argv += [f"--{key}", *map(str, value)]
    return argv


def read_yaml(path: Path, name: str) -> dict[str, Any]:
    r"""
    Reads a mapping from a YAML file. Its values are lists, mappings, None, and text as it stands there: 007, 1.10 and no are
    no numbers and no bool. [`typed_flags`] gives them types.

    Args:
        path (`Path`): The file.
        name (`str`): What errors call it.

    Raises:
        ConfigError: For a file that cannot be read, is no mapping, or holds a key twice.
    """
    try:
        values = load_yaml(path.read_text(encoding="utf-8-sig"))
    except FileNotFoundError:
        raise ConfigError(f"{name} does not exist.") from None
    except RecursionError:
        raise ConfigError(f"{name} is nested too deeply.") from None
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise ConfigError(f"{name} cannot be read as YAML: {one_line(error, 200)}") from None
    if not isinstance(values, dict):
        raise ConfigError(f"{name} must hold `flag: value` lines, but holds a {type(values).__name__}.")
    return values


def load_yaml(text: str) -> Any:
    r"""Reads YAML as [`read_yaml`] does. Raises `yaml.YAMLError`."""
    return _TextLoader(text).get_single_data()


class _TextLoader(yaml.SafeLoader):
    """Leaves values the text that they are, and refuses a key that stands twice in a mapping."""

    yaml_implicit_resolvers = {
        first: [(tag, pattern) for tag, pattern in resolvers if tag.endswith((":null", ":merge"))]
        for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }

    def compose_mapping_node(self, anchor):
        node = super().compose_mapping_node(anchor)
        seen = set()
        for key in (key for key, _ in node.value if isinstance(key, yaml.ScalarNode)):
            if key.value in seen:
                raise yaml.MarkedYAMLError(problem=f"`{key.value}` stands twice", problem_mark=key.start_mark)
            seen.add(key.value)
        return node
