"""
Runs the notebook and keeps its outputs, so that they show where it is hosted: `python docs/run_notebook.py`. It needs nbclient and
ipykernel (`pip install -e ".[docs]"`), and leaves `docs/runs` and `docs/look-first` behind.
"""

import copy
import re
from pathlib import Path

import nbclient
import nbformat

NOTEBOOK = Path(__file__).with_name("digits.ipynb")


def run(notebook: nbformat.NotebookNode, folder: Path, **options) -> nbformat.NotebookNode:
    r"""
    Runs every cell in a folder.

    Args:
        notebook (`nbformat.NotebookNode`): Gets the outputs, without bars of progress, warnings, and what tells of this machine.
        folder (`Path`): The working folder.
        options: Of [`nbclient.NotebookClient`].

    Returns:
        `nbformat.NotebookNode`: The notebook.

    Raises:
        nbclient.exceptions.CellExecutionError: If a cell fails.
    """
    metadata = copy.deepcopy(notebook.metadata)
    nbclient.NotebookClient(notebook, kernel_name="python3", record_timing=False, **options).execute(cwd=str(folder))
    notebook.metadata = metadata
    for cell in notebook.cells:
        if cell.cell_type == "code":
            cell.outputs = [output for output in map(tidy, merge(cell.outputs)) if output is not None]
    return notebook


def merge(outputs: list[nbformat.NotebookNode]) -> list[nbformat.NotebookNode]:
    r"""Joins the pieces in which a command's text comes."""
    merged: list[nbformat.NotebookNode] = []
    for output in outputs:
        if merged and output.output_type == merged[-1].output_type == "stream":
            merged[-1].text += output.text
        else:
            merged.append(output)
    return merged


def tidy(output: nbformat.NotebookNode) -> nbformat.NotebookNode | None:
    r"""An output without what a terminal overwrites and without a second form of a picture, or None if nothing is left."""
    if output.output_type != "stream":
        output.data.pop("image/jpeg", None)
        return output
    if output.name == "stderr":
        return None
    text = output.text.replace("\r\n", "\n").replace("\x1b[A", "")
    lines = (re.split(r"\r|\x1b\[K", line)[-1].rstrip() for line in text.split("\n"))
    output.text = "".join(f"{line}\n" for line in lines if line and not re.search(r"\d+%\|", line))
    return output if output.text else None


if __name__ == "__main__":
    nbformat.write(run(nbformat.read(NOTEBOOK, as_version=4), NOTEBOOK.parent, timeout=3600), NOTEBOOK)
