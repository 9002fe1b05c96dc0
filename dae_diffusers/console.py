"""The `dae-diffusers` command: one name for all scripts."""

import argparse
import ast
import logging
import os
import shlex
import subprocess
import sys
import warnings
from importlib.resources import files

from dae_diffusers import __version__
from dae_diffusers.errors import did_you_mean, one_line

_ALONE = {"assemble", "compare", "preview", "push"}  # no training: runs as a plain Python process
_USAGE = """usage: dae-diffusers [flags of accelerate launch] SCRIPT [flags of the script]

{scripts}

`dae-diffusers SCRIPT --help` explains the flags of a script, `dae-diffusers --version` prints the version. The command stands for
`accelerate launch -m dae_diffusers.training.SCRIPT`. For several GPUs run `accelerate config` once, or give the flags of
`accelerate launch` here, as in `dae-diffusers --num_processes 2 train-dit --vae runs/digits/vae`."""
_UNASKED = "The following values were not passed to `accelerate launch`"


def main(argv: list[str] | None = None) -> None:
    r"""
    Lists the scripts, or runs one: this process becomes the script, or launches several processes and waits for them.

    Args:
        argv (`list[str]`, *optional*): Defaults to `sys.argv[1:]`.

    Raises:
        SystemExit: With code 0 after the list; with code 2 and one line for an unknown script or a wrong argument; with several
            processes, with the code of the first that failed, or 128 + the number of the signal that ended them.
    """
    try:
        _main(sys.argv[1:] if argv is None else argv)
        sys.stdout.flush()
    except BrokenPipeError:  # `dae-diffusers | head -1`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # what is left is flushed at the end
        raise SystemExit(0) from None
    except KeyboardInterrupt:
        raise SystemExit(130) from None


def _main(argv: list[str]) -> None:
    if argv and argv[0] == "--version":
        print(f"dae-diffusers {__version__}")
        return
    scripts = find_scripts()
    if not argv or argv[0] in ("-h", "--help"):
        width = max(map(len, scripts)) + 2
        print(_USAGE.format(scripts="\n".join(f"  {name:<{width}}{text}" for name, text in scripts.items())))
        return
    name = next((word for word in argv if word.replace("_", "-") in scripts), None)
    if name is None:
        word = next((word for word in argv if not word.startswith("-")), argv[0])
        known = did_you_mean(word, list(scripts)) or f" There are {', '.join(scripts)}."
        _refuse(f"no script is called {word!r}.{known}")
    place = argv.index(name)
    module = f"dae_diffusers.training.{name.replace('-', '_')}"
    flags = argv[place + 1 :]
    _check_arguments(name.replace("_", "-"), flags)
    os.environ["DAE_DIFFUSERS_COMMAND"] = shlex.join(["dae-diffusers", *argv])
    if name in _ALONE:
        _become([sys.executable, "-m", module, *flags], dict(os.environ))
    else:
        _launch([*argv[:place], "-m", module, *flags])


def find_scripts() -> dict[str, str]:
    r"""Name and first sentence of every script, read without running it."""
    scripts = {}
    for path in sorted(files("dae_diffusers.training").iterdir(), key=lambda path: path.name):
        if path.name.endswith(".py") and path.name not in ("__init__.py", "settings.py"):
            text = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or ""
            name = path.name.removesuffix(".py").replace("_", "-")
            scripts[name] = one_line(text.split("\n\n")[0])
    return scripts


def _check_arguments(script: str, flags: list[str]) -> None:
    """Checks the arguments before anything slow, such as torch, is loaded."""
    from dae_diffusers.cli import parse_config
    from dae_diffusers.script import as_typed, run_script
    from dae_diffusers.training.settings import SCRIPTS, check_paths, with_flags

    text = (files("dae_diffusers.training") / f"{script.replace('-', '_')}.py").read_text(encoding="utf-8")
    config = parse_config(
        SCRIPTS[script],
        with_flags(script, flags),
        description=as_typed(ast.get_docstring(ast.parse(text)), True),
        prog=f"dae-diffusers {script}",
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the script says them
        run_script(check_paths, config)


def _launch(argv: list[str]) -> None:
    """
    Runs `accelerate launch`. A single process replaces this one, so it gets the signals and its exit code is ours. Several
    processes have this one as their launcher, which passes signals on and waits.
    """
    from accelerate.commands import launch

    from dae_diffusers.script import num_cores

    logging.getLogger(launch.__name__).addFilter(lambda record: not record.getMessage().startswith(_UNASKED))
    arguments = launch.launch_command_parser().parse_args(argv)
    has_threads = arguments.num_cpu_threads_per_process is not None or "OMP_NUM_THREADS" in os.environ

    def settle_threads(settled: argparse.Namespace) -> None:
        if not has_threads and settled.num_cpu_threads_per_process == 1:  # accelerate's default, for any machine
            here = max(1, (settled.num_processes or 1) // (settled.num_machines or 1))
            settled.num_cpu_threads_per_process = max(1, num_cores() // here)

    def become_one(settled: argparse.Namespace) -> None:
        if (settled.num_processes or 1) > 1 and settled.mpirun_hostfile is None and settled.num_machines == 1:
            _refuse(
                f"`--num_processes` is {settled.num_processes}, but accelerate would start one process on a CPU. Set "
                f"`ACCELERATE_USE_CPU=true` in the environment and pass `--multi_gpu --num_processes {settled.num_processes}`, "
                "without `--cpu`."
            )
        settle_threads(settled)
        _become(*launch.prepare_simple_launcher_cmd_env(settled))

    launch_several = launch.multi_gpu_launcher

    def launch_and_wait(settled: argparse.Namespace) -> None:
        settle_threads(settled)
        logging.disable(logging.ERROR)  # the processes say themselves what is wrong
        launch_several(settled)

    launch.simple_launcher, launch.multi_gpu_launcher = become_one, launch_and_wait
    try:
        launch.launch_command(arguments)
    except (ValueError, AssertionError, OSError) as error:  # accelerate's, for flags that do not go together
        _refuse(one_line(error))
    except Exception as error:
        code = _exit_code_of(error)
        if code is None:
            raise
        raise SystemExit(code) from None


def _exit_code_of(error: Exception) -> int | None:
    """The exit code for an error of torch's launcher, whose processes failed; None for any other error."""
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    if isinstance(error, SignalException):
        return 128 + int(error.sigval)
    if isinstance(error, ChildFailedError):
        code = error.get_first_failure()[1].exitcode
        return 128 - code if code < 0 else code
    if isinstance(error, subprocess.CalledProcessError):  # DeepSpeed's launcher
        return 128 - error.returncode if error.returncode < 0 else error.returncode
    return None


def _become(command: list[str], environment: dict[str, str]) -> None:
    sys.stdout.flush()
    if os.name == "nt":  # there the caller would not wait for what takes its place
        raise SystemExit(subprocess.run(command, env=environment).returncode)
    os.execve(command[0], command, environment)


def _refuse(message: str) -> None:
    print(f"dae-diffusers: error: {message}", file=sys.stderr)
    raise SystemExit(2)


if __name__ == "__main__":
    main()
