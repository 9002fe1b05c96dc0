"""From the command line and a YAML file to one validated dataclass; from a user's mistake to one line and an exit code."""

import dataclasses
import difflib
import errno
import math
import os
import re
import signal
import sys
import textwrap
from argparse import ArgumentDefaultsHelpFormatter, RawDescriptionHelpFormatter
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import yaml
from tqdm import tqdm
from transformers import HfArgumentParser

from dae_diffusers.errors import ConfigError, UserError

Config = TypeVar("Config")

_DISK_IS_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_LOST_PROCESS = ("closed by peer", "reset by peer", "remote process exited")  # as gloo and NCCL say it
_OUT_OF_MEMORY = ("can't allocate memory", "not enough memory", "bad_alloc", "out of memory")  # CPU, C++, GPU
_CANNOT_WRITE = (*_DISK_IS_FULL, errno.EROFS, errno.EACCES, errno.EIO)


def field(default: Any, help: str) -> Any:
    r"""A dataclass field with a default and the text that `--help` shows."""
    if isinstance(default, list):
        return dataclasses.field(default_factory=lambda: list(default), metadata={"help": help})
    return dataclasses.field(default=default, metadata={"help": help})


def parse_config(config_class: type[Config], argv: list[str] | None = None, *, description: str = "") -> Config:
    r"""
    Builds a script's config from its flags, on top of the YAML file that `--config` names, on top of the defaults.

    Args:
        config_class (`type`): A dataclass. Fields that it inherits are shown by `--help` under the docstring of the
            class that defines them.
        argv (`list[str]`, *optional*): Defaults to `sys.argv[1:]`.
        description (`str`, *optional*): Shown by `--help`.

    Returns:
        An instance of `config_class`.

    Raises:
        SystemExit: With code 2 and one line on stderr for anything wrong; with code 0 for `--help`.
    """
    argv = sys.argv[1:] if argv is None else argv
    parser = _Parser(config_class, description=description)
    try:
        path, argv = _take_config_flag(argv)
        (config,) = parser.parse_args_into_dataclasses(
            [*(_yaml_to_argv(path, config_class) if path else []), *argv], look_for_args_file=False
        )
        _check_finite(config)
    except ValueError as error:
        parser.error(str(error))
    return config


def config_text(config: Any) -> str:
    r"""A dataclass as the YAML that `--config` reads."""
    return yaml.safe_dump(dataclasses.asdict(config), sort_keys=False, allow_unicode=True)


def flags_of(config: Any) -> list[str]:
    r"""The flags that make this config out of the defaults, without those of the folder, publishing and resuming."""
    argv = []
    for config_field in dataclasses.fields(config):
        name, value = config_field.name, getattr(config, config_field.name)
        default = config_field.default
        if config_field.default_factory is not dataclasses.MISSING:
            default = config_field.default_factory()
        if value == default or name in ("output_dir", "report_to", "push_to_hub", "resume_from_checkpoint"):
            continue
        if name.startswith("hub_"):
            continue
        if isinstance(value, bool):
            argv.append(f"--{name}" if value else f"--no_{name}")
        elif isinstance(value, list):
            argv += [f"--{name}", *map(str, value)]
        else:
            argv += [f"--{name}", Path(value).name if isinstance(value, str) and os.path.isabs(value) else str(value)]
    return argv


def run_script(run: Callable[[Config], None], config: Config) -> None:
    r"""
    Calls `run(config)`, and turns a [`UserError`], an optional package that is missing, a disk that cannot be written,
    memory that does not suffice and a data-loading process that died into one line on stderr and an exit code.

    Raises:
        SystemExit: With the error's exit code.
    """
    try:
        run(config)
    except KeyboardInterrupt:
        raise SystemExit(128 + signal.SIGINT) from None
    except Exception as error:
        message = _message_of(error)
        if message is None:
            raise
        message = " ".join(message.splitlines())  # a file's name may hold line breaks
        rank = os.environ.get("RANK", "0")
        # `tqdm.write` keeps the line apart from a progress bar.
        tqdm.write(f"error: {message}" if rank == "0" else f"error in process {rank}: {message}", file=sys.stderr)
        raise SystemExit(getattr(error, "exit_code", UserError.exit_code)) from None


def storage_problem(error: Exception) -> str | None:
    r"""The reason, if a file could not be written because of the disk; safetensors and torch wrap the system's error."""
    if isinstance(error, OSError) and error.errno in _CANNOT_WRITE:
        return os.strerror(error.errno) + (f": {error.filename}" if error.filename else "")
    for number in _DISK_IS_FULL:
        if os.strerror(number) in str(error):
            return os.strerror(number)
    if isinstance(error, RuntimeError) and any(
        text in str(error) for text in ("PytorchStreamWriter", "unexpected pos")
    ):
        return "a file could not be written whole; the disk is probably full"
    return None


def _message_of(error: Exception) -> str | None:
    """One line for what a user can mend; None for anything else."""
    text = str(error)
    if isinstance(error, UserError):
        # From a data-loading process it comes with that one's stack; the last line is the sentence.
        return text.strip().splitlines()[-1].partition("UserError: ")[2] if "Original Traceback" in text else text
    if isinstance(error, ImportError) and "pip install" in text:  # of ours, for an optional package
        return text
    if problem := storage_problem(error):
        return (
            f"{problem}. Checkpoints saved before are whole: mend this and run the command again, training scripts with "
            "`--resume_from_checkpoint latest`."
        )
    if isinstance(error, MemoryError) or (
        isinstance(error, RuntimeError) and any(words in text for words in _OUT_OF_MEMORY)
    ):
        return (
            f"out of memory ({' '.join(text.split())[:200]}). Use a smaller batch, resolution or model; training scripts keep "
            "the batch of an update with a smaller `--train_batch_size` and a larger `--gradient_accumulation_steps`, and "
            "need less with `--gradient_checkpointing`, where they have it."
        )
    if isinstance(error, RuntimeError) and "DataLoader worker" in text:
        return (
            f"a data-loading process died ({' '.join(text.split())[:200]}), perhaps for lack of memory. Continue with "
            "`--resume_from_checkpoint latest`, with a smaller `--dataloader_num_workers` if it happens again."
        )
    if isinstance(error, RuntimeError) and any(words in text for words in _LOST_PROCESS):
        return "another process of this run ended; its own message says why."
    return None


def did_you_mean(word: str, known: list[str]) -> str:
    r"""`" Did you mean `x`?"`, or the empty string when nothing known resembles `word`."""
    matches = difflib.get_close_matches(word, known, n=1)
    return f" Did you mean `{matches[0]}`?" if matches else ""


class _HelpFormatter(ArgumentDefaultsHelpFormatter, RawDescriptionHelpFormatter):
    pass


class _Parser(HfArgumentParser):
    """`HfArgumentParser` with groups, no second spelling of a flag, and errors of one line."""

    def __init__(self, config_class: type, description: str):
        self._groups: dict[type, Any] = {}
        super().__init__(
            None,
            usage="%(prog)s [--config FILE.yaml] [--flag value ...]",
            description=textwrap.dedent(description).strip(),
            formatter_class=_HelpFormatter,
            allow_abbrev=False,
        )
        # argparse's own takes -1e-3 for a flag.
        self._negative_number_matcher = re.compile(r"-(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?$")
        self.add_argument("--config", metavar="FILE.yaml", help="a YAML file with any of the flags below; flags win")
        owners = _field_owners(config_class)
        self.dataclass_types = [config_class]
        types = {}
        for cls in reversed(config_class.__mro__):
            types.update(getattr(cls, "__annotations__", {}))
        for config_field in dataclasses.fields(config_class):
            config_field.type = types[config_field.name]
            owner = owners[config_field.name]
            if owner not in self._groups:
                self._groups[owner] = self.add_argument_group((owner.__doc__ or owner.__name__).strip().rstrip("."))
            self._parse_dataclass_field(self._groups[owner], config_field)
        for action in self._actions:
            action.option_strings = [s for s in action.option_strings if "-" not in s.removeprefix("--")]
            if action.option_strings and action.option_strings[0].startswith("--no_"):
                action.help = f"switch `--{action.dest}` off"

    def parse_args_into_dataclasses(self, args=None, **kwargs):
        namespace, unknown = self.parse_known_args(args)
        if unknown:
            known = [action.dest for action in self._actions]
            name = unknown[0].removeprefix("--").split("=")[0]
            if unknown[0].startswith("--"):
                raise ConfigError(f"unknown flag `--{name}`.{did_you_mean(name, known)} See --help.")
            raise ConfigError(f"unexpected argument {unknown[0]!r}; every value follows its flag. See --help.")
        values = {key: value for key, value in vars(namespace).items() if key != "config"}
        return (self.dataclass_types[0](**values),)

    def error(self, message: str):
        print(f"{Path(sys.argv[0]).name}: error: {message}", file=sys.stderr, flush=True)
        raise SystemExit(ConfigError.exit_code)


def _check_finite(config: Any) -> None:
    for name, value in vars(config).items():
        numbers = value if isinstance(value, list) else [value]
        if not all(math.isfinite(number) for number in numbers if isinstance(number, float)):
            raise ConfigError(f"`--{name}` is {value}, but must be finite.")


def _field_owners(config_class: type) -> dict[str, type]:
    owners = {}
    for cls in config_class.__mro__:
        for name in cls.__dict__.get("__annotations__", {}):
            owners.setdefault(name, cls)
    return owners


def _take_config_flag(argv: list[str]) -> tuple[str | None, list[str]]:
    path, rest, words = None, [], iter(argv)
    for word in words:
        if word == "--config":
            path = next(words, None)
            if path is None:
                raise ConfigError("`--config` needs the path of a YAML file.")
        elif word.startswith("--config="):
            path = word.removeprefix("--config=")
        else:
            rest.append(word)
    return path, rest


def _yaml_to_argv(path: str, config_class: type) -> list[str]:
    """Turns a YAML file into flags, so that its values pass the same checks as those of the command line."""
    try:
        values = yaml.safe_load(Path(path).read_text())
    except FileNotFoundError:
        raise ConfigError(f"`--config` {path} does not exist.") from None
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ConfigError(f"`--config` {path} cannot be read as YAML: {' '.join(str(error).split())}") from None
    if not isinstance(values, dict):
        raise ConfigError(f"`--config` {path} must hold `flag: value` lines, but holds a {type(values).__name__}.")
    fields = {config_field.name: config_field for config_field in dataclasses.fields(config_class)}
    argv = []
    for name, value in values.items():
        if name not in fields:
            raise ConfigError(f"{path}: unknown field `{name}`.{did_you_mean(str(name), list(fields))} See --help.")
        if value is None:
            if fields[name].default is not None:
                raise ConfigError(f"{path}: `{name}` has no value; leave the line out to use the default.")
        elif isinstance(value, list):
            if value or fields[name].default_factory is dataclasses.MISSING or fields[name].default_factory():
                argv += [f"--{name}", *map(str, value)]
        elif isinstance(value, dict):
            raise ConfigError(f"{path}: `{name}` must be one value or a list, but is a mapping.")
        else:
            argv += [f"--{name}={value}"]
    return argv
