"""Writes the API reference from the docstrings: python docs/reference.py build/docs"""

import pkgutil
import sys
from pathlib import Path

import pdoc

import dae_diffusers


def main(folder: Path) -> None:
    for name in dae_diffusers.__all__:  # they resolve on first use, and pdoc looks only at what is there
        setattr(dae_diffusers, name, getattr(dae_diffusers, name))
    children = {f"dae_diffusers.{module.name}" for module in pkgutil.iter_modules(dae_diffusers.__path__)}
    children |= {"dae_diffusers.pipelines", "dae_diffusers.training"}  # they lie elsewhere in a checkout
    pdoc.render.configure(docformat="markdown", math=True)
    pdoc.pdoc("dae_diffusers", *sorted(children), output_directory=folder)
    print(f"open {folder / 'index.html'}")


if __name__ == "__main__":
    main(Path(sys.argv[1] if len(sys.argv) > 1 else "build/docs"))
