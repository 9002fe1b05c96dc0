"""Runs a script: its log messages, and a user's mistake, or what else the user can repair, as one line and an exit code."""

import logging
import os
import re
import signal
import sys
import threading
import warnings
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TypeVar

from tqdm import std
from tqdm.auto import tqdm

from dae_diffusers.errors import REMOVED, UserError, one_line, storage_problem
from dae_diffusers.settings import flat, without_effect

Config = TypeVar("Config")

_LOST_PROCESS = ("closed by peer", "reset by peer", "remote process exited")  # as gloo and NCCL say it
_OUT_OF_MEMORY = ("can't allocate memory", "not enough memory", "bad_alloc", "out of memory")  # CPU, C++, GPU
_LOST_FOLDER = ("Parent directory", "(os error 2)")  # torch's words, and safetensors'
_SCRIPT = re.compile(
    r"(?:accelerate launch |python )?(?:training/)?\b(assemble|cache_latents|compare|complexity|ema|evaluate|find_latents|preview|push|sample|train_[a-z_]+)\.py\b"  # noqa: E501
)


def _own_progress_lock() -> None:
    """Forked processes share tqdm's lock. One that is killed while it draws a bar would stop the bars of all others for good."""
    lock = threading.RLock()
    for bar in (std.tqdm, tqdm):
        bar.set_lock(lock)


_own_progress_lock()
if hasattr(os, "register_at_fork"):  # not on Windows
    os.register_at_fork(after_in_child=_own_progress_lock)


def run_script(run: Callable[[Config], None], config: Config) -> None:
    r"""
    Warns of flags without effect, calls `run(config)`, and turns a [`UserError`], an optional package that is missing, a disk
    that cannot be written, memory that does not suffice and a data-loading process that died into one line on stderr and an exit code.

    Raises:
        SystemExit: With the error's exit code.
    """
    _keep_interrupts()
    warnings.simplefilter("once", append=True)  # the same words from two lines are one warning
    warnings.formatwarning = lambda message, *_: f"warning: {message}\n"  # a line of our source helps nobody
    for text in without_effect(config) if os.environ.get("RANK", "0") == "0" else ():
        warnings.warn(with_dashes(text, flat(config)), stacklevel=2)
    try:
        run(config)
    except KeyboardInterrupt:
        raise SystemExit(128 + signal.SIGINT) from None
    except Exception as error:
        message = _message_of(error) or _lost_folder(error, flat(config).get("output_dir"))
        if message is None:
            raise
        message = as_typed(
            with_dashes(" ".join(message.splitlines()), flat(config))
        )  # a file's name may hold line breaks
        rank = os.environ.get("RANK", "0")
        for bar in list(getattr(tqdm, "_instances", ())):  # else it is drawn again after the last line
            bar.close()
        print(
            f"error: {message}" if rank == "0" else f"error in process {rank}: {message}", file=sys.stderr, flush=True
        )
        raise SystemExit(getattr(error, "exit_code", UserError.exit_code)) from None


def show_messages(is_main: bool = True) -> None:
    r"""
    Shows the log messages and warnings of the scripts, of other than the main process only errors, without the small talk of libraries.
    """
    if not is_main:
        warnings.simplefilter("ignore")
    logging.basicConfig(format="%(message)s", level=logging.INFO if is_main else logging.ERROR)
    for chatty in ("httpx", "httpx2", "accelerate"):  # the Hub's client has two names, by its version
        logging.getLogger(chatty).setLevel(logging.WARNING)
    logging.getLogger("huggingface_hub").propagate = False  # it writes its messages itself


def with_dashes(message: str, flags: Iterable[str]) -> str:
    r"""A message of the library in a script's terms: "`resolution` is 0" becomes "`--resolution` is 0" for its flags."""
    names = set(flags)
    return re.sub(r"`(\w+)(?=[ =`])", lambda match: f"`--{match[1]}" if match[1] in names else match[0], message)


def as_typed(text: str, is_command: bool | None = None) -> str:
    r"""
    Names scripts as the user calls them: where `dae-diffusers` is in use, `training/train_dit.py` becomes `dae-diffusers train-dit`.

    Args:
        text (`str`): A help text or a message.
        is_command (`bool`, *optional*): Whether the user typed `dae-diffusers`; default: whether it started this process.
    """
    if not ("DAE_DIFFUSERS_COMMAND" in os.environ if is_command is None else is_command):
        return text
    return _SCRIPT.sub(lambda match: f"dae-diffusers {match[1].replace('_', '-')}", text)


def num_cores() -> int:
    r"""Number of CPU cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _keep_interrupts() -> None:
    """A Ctrl-C that comes while Python runs a destructor, or ends, would be printed with a stack, and forgotten."""
    previous = sys.unraisablehook

    def end_at_once(unraisable) -> None:
        if issubclass(unraisable.exc_type, KeyboardInterrupt):
            signal.signal(signal.SIGINT, signal.SIG_DFL)
            signal.raise_signal(signal.SIGINT)
        previous(unraisable)

    if getattr(previous, "__qualname__", "") != end_at_once.__qualname__:
        sys.unraisablehook = end_at_once


def _message_of(error: Exception) -> str | None:
    """One line for what a user can repair; None for anything else."""
    text = str(error)
    if isinstance(error, UserError):
        # From a data-loading process the error comes with a traceback; its last line holds the message.
        return text.strip().splitlines()[-1].partition("UserError: ")[2] if "Original Traceback" in text else text
    if isinstance(error, ImportError) and "pip install" in text:  # of ours, for an optional package
        return text
    if problem := storage_problem(error):
        return (
            f"{problem}. Earlier checkpoints are whole. Fix this, then run the command again, for a training script with "
            "`--resume_from_checkpoint latest`."
        )
    if isinstance(error, MemoryError) or (
        isinstance(error, RuntimeError) and any(words in text for words in _OUT_OF_MEMORY)
    ):
        return (
            f"out of memory ({one_line(text, 200)}). Use a smaller batch, resolution or model. In training, a smaller "
            "`--train_batch_size` with a larger `--gradient_accumulation_steps` keeps the number of images per update, and "
            "`--gradient_checkpointing`, if the script has it, saves memory."
        )
    if isinstance(error, RuntimeError) and "without overflow" in text:  # torch's, of an optimiser's settings
        return "a number became too large for float32. Lower `learning_rate`."
    if isinstance(error, RuntimeError) and "DataLoader worker" in text:
        return (
            f"a data-loading process died ({one_line(text, 200)}). Perhaps memory ran out. Continue with "
            "`--resume_from_checkpoint latest`. If it happens again, use a smaller `--dataloader_num_workers`."
        )
    if isinstance(error, RuntimeError) and any(words in text for words in _LOST_PROCESS):
        return "another process of this run ended; its own message says why."
    return None


def _lost_folder(error: Exception, output_dir: str | None) -> str | None:
    """One line if the output folder, or one in it, was removed while the script ran; else None."""
    if not output_dir:
        return None
    folder, text = Path(output_dir), str(error)
    if isinstance(error, FileNotFoundError) and isinstance(error.filename, str):
        named = Path(error.filename)
        if folder not in (named, *named.parents):
            return None
        folder = next((path for path in reversed(named.parents) if not path.exists()), folder)
    elif not any(words in text for words in _LOST_FOLDER):
        return None
    return None if folder.exists() else REMOVED.format(folder)
