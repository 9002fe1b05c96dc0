r"""
Compare runs: which settings differ, and which results are better. Trains and measures nothing.

    dae-diffusers compare runs/a runs/b runs/c
    dae-diffusers compare runs/* --output_dir runs-compared

Takes output folders of training scripts and of `evaluate`, also of runs that are not finished; a single one is summed up. `compare.md`
has the tables, which are also printed: settings that differ, and results with the best of each row in bold. Numbers that were measured
in different ways are marked. `curves.png` draws what at least two runs have logged, `samples.png` their newest grids.
"""

import logging
import sys
from pathlib import Path

from dae_diffusers.cli import parse_config
from dae_diffusers.compared_runs.pictures import figure_of_runs, side_by_side
from dae_diffusers.compared_runs.reading import read_runs
from dae_diffusers.compared_runs.tables import write_tables
from dae_diffusers.errors import ConfigError
from dae_diffusers.locks import mark_folder
from dae_diffusers.script import run_script, show_messages
from dae_diffusers.store import write_atomically
from dae_diffusers.training.settings import CompareConfig, with_flags

logger = logging.getLogger(__name__)


def main(config: CompareConfig) -> None:
    show_messages()
    folder = Path(config.output_dir)
    runs, left_out = read_runs(config.runs)
    if folder.resolve() in {run.folder.resolve() for run in runs}:
        raise ConfigError(f"`output_dir` {folder} is one of the runs. Choose another folder.")
    mark_folder(folder)
    table = write_tables(runs, left_out)
    curves, samples = figure_of_runs(runs), side_by_side(runs)
    text = f"# {' / '.join(run.name for run in runs)}\n\n{table}"
    for name, picture, save in (
        ("curves", curves, lambda path: curves.savefig(path, dpi=100)),
        ("samples", samples, lambda path: samples.save(path)),
    ):
        path = folder / f"{name}.png"
        path.unlink(missing_ok=True)  # of an earlier comparison
        if picture is not None:
            save(path)
            text += f"\n## {name.capitalize()}\n\n![{name}]({path.name})\n"
    write_atomically(folder / "compare.md", text)
    logger.info("\n%s\nwritten to %s", table, folder)


if __name__ == "__main__":
    run_script(main, parse_config(CompareConfig, with_flags("compare", sys.argv[1:]), description=__doc__))
