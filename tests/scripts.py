"""Ways to run the training scripts: in this process, in a copy of it, or in processes of their own."""

import importlib
import json
import logging
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import traceback
import warnings
from argparse import Namespace
from collections.abc import Callable
from contextlib import contextmanager, nullcontext
from pathlib import Path
from types import ModuleType
from typing import IO

import torch
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.state import AcceleratorState
from safetensors.torch import load_file

from dae_diffusers.cli import parse_config
from dae_diffusers.comparison.scripts import words_of
from dae_diffusers.engine import log as runlog
from dae_diffusers.script import run_script
from dae_diffusers.training import (
    cache_latents,
    complexity,
    ema,
    evaluate,
    find_latents,
    sample,
    train_classifier,
    train_dae,
    train_dit,
    train_vqgan_prior,
)
from dae_diffusers.training.settings import SCRIPTS

_DAE = (
    "--resolution 16 --block_out_channels 8 8 --norm_num_groups 4 --latent_channels 3 --stage1_steps 4 --stage2_steps 4 "
    "--train_batch_size 4"
)
_DIT = (
    "--model DiT-Ti/2 --num_layers 2 --num_attention_heads 2 --attention_head_dim 16 --max_train_steps 6 "
    "--train_batch_size 4"
)
TINY_DAE = _DAE + " --logging_steps 2 --validation_steps 3 --checkpointing_steps 3 --checkpoints_total_limit 9"
TINY_DIT = _DIT + (
    " --logging_steps 2 --validation_steps 4 --checkpointing_steps 3 --checkpoints_total_limit 9 "
    "--num_sample_images 4 --sample_steps 2"
)
TINY_PRIOR = (
    "--num_layers 2 --num_attention_heads 2 --attention_head_dim 8 --max_train_steps 6 "
    "--train_batch_size 4 --logging_steps 2 --validation_steps 4 --checkpointing_steps 3 --checkpoints_total_limit 9 "
    "--num_sample_images 4 --random_flip"
)
# Validated only at the end, for tests of what happens on the way.
BARE_DAE = _DAE + " --logging_steps 1 --validation_steps 9 --checkpointing_steps 2"
BARE_DIT = _DIT + (
    " --logging_steps 1 --validation_steps 9 --checkpointing_steps 2 --num_sample_images 2 --sample_steps 1"
)
DIVERGING = " --learning_rate 1e38 --lr_warmup_steps 0 --validation_steps 99"
# What the guard says if a validation follows the first update that diverges.
DIVERGED_AT_VALIDATION = [
    ("1e38", "the model of step 1 cannot be validated: .*Lower `learning_rate`, and continue"),
    ("1e20", "became .*Lower `learning_rate`.*`resume_from_checkpoint latest`"),
]
TRANSFORMER = "pipeline/transformer/diffusion_pytorch_model.safetensors"
PRIOR = "pipeline/prior/model.safetensors"
CONFIGS = Path(__file__).resolve().parents[1] / "training" / "configs"
CONFIG_CLASSES = {
    script: SCRIPTS[script.__name__.rpartition(".")[-1].replace("_", "-")]
    for script in (
        cache_latents, complexity, ema, evaluate, find_latents, sample, train_classifier, train_dae, train_dit,
        train_vqgan_prior,
    )
}  # fmt: skip


def arguments_of(name: str, *flags: str) -> Namespace:
    """What `accelerate launch --config_file` makes of a file of `configs/accelerate/`."""
    path = str(CONFIGS / "accelerate" / f"{name}.yaml")
    parsed = launch_command_parser().parse_args(["--config_file", path, *flags, "train_dit.py", "--seed", "1"])
    return _validate_launch_command(parsed)[0]


def load_benchmark(name: str) -> ModuleType:
    """A script of `benchmarks/`, which is no package: they find each other in their folder."""
    folder = str(Path(__file__).parents[1] / "benchmarks")
    if folder not in sys.path:
        sys.path.append(folder)
    return importlib.import_module(name)


@contextmanager
def without_curves():
    """Curves take most of the time of a tiny run."""
    plot_curves = runlog.plot_curves
    runlog.plot_curves = lambda *args, **kwargs: None
    try:
        yield
    finally:
        runlog.plot_curves = plot_curves


def run(script, flags: str, *, curves: bool = False, **more):
    argv = flags.split() + [word for name, value in more.items() for word in (f"--{name}", str(value))]
    with nullcontext() if curves else without_curves():
        script.main(parse_config(CONFIG_CLASSES[script], argv))
    AcceleratorState._reset_state(reset_partial_state=True)


def resume(script, flags: str, finished: Path, folder: Path, step: int, results: tuple[str, ...], **more) -> None:
    """Copies a finished run into `folder`, without its results, and runs it again from its checkpoint of `step`."""
    checkpoint = _copy_run(script, finished, folder, step, results)
    run(script, flags, output_dir=folder, resume_from_checkpoint=checkpoint, **more)


def _copy_run(script, finished: Path, folder: Path, step: int, results: tuple[str, ...]) -> Path:
    """Its checkpoint of `step`, in `folder`."""
    shutil.copytree(finished, folder)
    for name in results:
        shutil.rmtree(folder / name)
    return folder / script.__name__.rpartition(".")[-1] / "checkpoints" / f"checkpoint-{step:08d}"


def start(flags: str, script=train_dae, **more) -> None:
    """The script as its process runs it, in this one, without the curves."""
    argv = flags.split() + [word for name, value in more.items() for word in (f"--{name}", str(value))]
    with without_curves():
        run_script(script.main, parse_config(CONFIG_CLASSES[script], argv))


def launch(script: str, flags: str, *, processes: int = 1, **more) -> subprocess.Popen:
    """Starts a training script in processes of its own, which talk through gloo."""
    argv = flags.split() + [word for name, value in more.items() for word in (f"--{name}", str(value))]
    command = [sys.executable, "-m"]
    if processes > 1:
        command += ["torch.distributed.run", "--nproc_per_node", str(processes), "--master_port", free_port(), "-m"]
    return subprocess.Popen(
        [*command, f"dae_diffusers.training.{script}", *argv],
        cwd="/",
        env={**os.environ, "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true", "PYTHONUNBUFFERED": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def succeed(process: subprocess.Popen) -> None:
    output = process.communicate()[0]
    assert process.returncode == 0, output


def free_port() -> str:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return str(probe.getsockname()[1])


def in_child(action: Callable[[], None], *, wait: bool = True) -> tuple[int, str] | int:
    """
    Runs `action` in a copy of this process: what it patches, breaks or kills stays there, and nothing is imported anew.

    Returns its exit code (negative: the signal that killed it) and everything it wrote; or, with `wait=False`, its number.
    """
    process, output = _fork(action)
    if not wait:
        output.close()
        return process
    return _end_of(process, output)


def in_two_processes(action: Callable[[], None]) -> list[tuple[int, str]]:
    """Runs `action` in two copies of this process, which talk through gloo: exit code and text of each, as `in_child`."""
    port = free_port()

    def of_rank(rank: int):
        os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE="2", MASTER_ADDR="127.0.0.1")
        os.environ.update(MASTER_PORT=port, ACCELERATE_USE_CPU="true")
        # As many as this process has: accelerate would choose another number, which rounds otherwise.
        os.environ["OMP_NUM_THREADS"] = "1"
        action()

    return [_end_of(*fork) for fork in [_fork(lambda rank=rank: of_rank(rank)) for rank in range(2)]]


def in_both_processes(action: Callable[[], None]) -> tuple[int, str]:
    """Like `in_two_processes`, for processes that end alike: their exit code, and the text of the first."""
    (code, text), (second_code, second_text) = in_two_processes(action)
    assert second_code == code, text + second_text
    return code, text


def assert_goes_on_exactly(in_processes, script, flags: str, folder: Path, step: int, result: str, **more) -> None:
    """Like `resume`, for processes, beside the finished run; then compares `result` and log, bit by bit."""
    again = folder.with_name("again")
    checkpoint = _copy_run(script, folder, again, step, ("pipeline",))
    code, text = in_processes(lambda: start(flags, script, output_dir=again, resume_from_checkpoint=checkpoint, **more))
    assert code == 0, text
    assert_same_weights(load_file(folder / result), load_file(again / result))
    name = checkpoint.parents[1].name
    assert (folder / name / "log.jsonl").read_text() == (again / name / "log.jsonl").read_text()


def assert_two_processes_equal_one(script, flags: str, folder: Path, result: str) -> None:
    """Compares `result` of two processes with that of one that accumulates as many micro-batches, up to rounding."""
    run(script, f"{flags} --gradient_accumulation_steps 2", output_dir=folder / "1")
    code, text = in_both_processes(lambda: start(flags, script, output_dir=folder / "2"))
    assert code == 0, text
    first, second = (load_file(folder / name / result) for name in "12")
    assert_same_weights(first, second, rtol=1e-3, atol=1e-4)


def _end_of(process: int, output: IO[str]) -> tuple[int, str]:
    code = os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])
    with output:
        output.seek(0)
        return code, output.read()


def _fork(action: Callable[[], None]) -> tuple[int, IO[str]]:
    output = tempfile.TemporaryFile("w+")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # of threads at a fork; the copy uses none of them
        process = os.fork()
    if process == 0:
        code = 1
        try:
            for descriptor in (1, 2):
                os.dup2(output.fileno(), descriptor)
            sys.stdout = sys.stderr = open(1, "w", buffering=1, closefd=False)
            logging.basicConfig(format="%(message)s", level=logging.INFO, force=True)
            AcceleratorState._reset_state(reset_partial_state=True)
            warnings.simplefilter("default")  # as in a process of its own
            logging.captureWarnings(True)
            action()
            code = 0
        except SystemExit as error:
            code = error.code or 0
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(code)
    return process, output


def weights(folder):
    return load_file(folder / "diffusion_pytorch_model.safetensors")


def assert_same_weights(first, second, **tolerance):
    assert first.keys() == second.keys()
    for name in first:
        if tolerance:
            torch.testing.assert_close(first[name], second[name], **tolerance)
        else:
            assert torch.equal(first[name], second[name]), name


def log_of(folder: Path, script: str = "train_dae") -> list[dict]:
    return [json.loads(line) for line in (folder / script / "log.jsonl").read_text().splitlines()]


def checkpoints(folder: Path) -> list[str]:
    return sorted(path.name for path in (folder / "train_dae" / "checkpoints").glob("checkpoint-*"))


@contextmanager
def launched_here(cpu_seconds: float = 1.0):
    """The library's `launch_script` runs a script in this process. Yields the names and output folders of what it ran."""
    calls = []
    known = {script.__name__.rpartition(".")[-1]: script for script in CONFIG_CLASSES}

    def launch_script(name, flags):
        with without_curves():
            known[name].main(parse_config(CONFIG_CLASSES[known[name]], words_of(flags)))
        calls.append((name, str(flags["output_dir"])))
        return {"cpu_seconds": cpu_seconds}

    modules = [module for module in list(sys.modules.values()) if hasattr(module, "launch_script")]
    before = {module: module.launch_script for module in modules}
    for module in modules:
        module.launch_script = launch_script
    try:
        yield calls
    finally:
        for module, function in before.items():
            module.launch_script = function
        AcceleratorState._reset_state(reset_partial_state=True)
