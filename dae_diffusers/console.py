"""The `dae-diffusers` command: one name for all scripts."""

import ast
import os
import sys
from importlib.resources import files

from dae_diffusers.cli import did_you_mean

_ALONE = {"push"}  # no training: runs as a plain Python process
_USAGE = """usage: dae-diffusers [flags of accelerate launch] SCRIPT [flags of the script]

{scripts}

`dae-diffusers SCRIPT --help` explains its flags. The command stands for
`accelerate launch -m dae_diffusers.training.SCRIPT`: run `accelerate config` once for several GPUs, or say it here, as in
`dae-diffusers --num_processes 2 train-dit --vae runs/digits/vae`."""


def main(argv: list[str] | None = None) -> None:
    r"""
    Lists the scripts, or becomes the process of one.

    Args:
        argv (`list[str]`, *optional*): Defaults to `sys.argv[1:]`.

    Raises:
        SystemExit: With code 0 after the list; with code 2 and one line for an unknown script.
    """
    argv = sys.argv[1:] if argv is None else argv
    scripts = find_scripts()
    if not argv or argv[0] in ("-h", "--help"):
        width = max(map(len, scripts)) + 2
        print(_USAGE.format(scripts="\n".join(f"  {name:<{width}}{text}" for name, text in scripts.items())))
        raise SystemExit(0)
    name = next((word for word in argv if word.replace("_", "-") in scripts), None)
    if name is None:
        word = next((word for word in argv if not word.startswith("-")), argv[0])
        known = did_you_mean(word, list(scripts)) or f" There are {', '.join(scripts)}."
        print(f"dae-diffusers: error: no script is called {word!r}.{known}", file=sys.stderr)
        raise SystemExit(2)
    place = argv.index(name)
    module = ["-m", f"dae_diffusers.training.{name.replace('-', '_')}"]
    launch = [] if name in _ALONE else ["-m", "accelerate.commands.launch", *argv[:place]]
    command = [sys.executable, *launch, *module, *argv[place + 1 :]]
    os.execv(command[0], command)


def find_scripts() -> dict[str, str]:
    r"""Name and first sentence of every script, read without running it."""
    scripts = {}
    for path in sorted(files("dae_diffusers.training").iterdir(), key=lambda path: path.name):
        if path.name.endswith(".py") and path.name not in ("__init__.py", "settings.py"):
            text = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or ""
            name = path.name.removesuffix(".py").replace("_", "-")
            scripts[name] = " ".join(text.split("\n\n")[0].split())
    return scripts
