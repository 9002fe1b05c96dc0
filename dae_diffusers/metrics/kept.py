"""Results kept in files that are named by a hash of what they depend on: an evaluation computes none of them twice."""

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list, gather_object
from safetensors import SafetensorError
from safetensors.torch import load_file
from tqdm.auto import tqdm

from dae_diffusers.cli import UserError
from dae_diffusers.files import add_weights, save_tensors_atomically, write_atomically

# Of what is kept: raised when a measurement changes, so that results of an older version are not taken for those of this one.
_VERSION = 2


def keep_rows(
    compute: Callable[[range], dict[str, torch.Tensor]],
    num_rows: int,
    accelerator: Accelerator,
    *,
    folder: Path | None,
    of: Any,
    chunk_size: int = 256,
    description: str = "",
) -> dict[str, torch.Tensor]:
    r"""
    Tensors with a row for each image, computed in chunks that the processes take turns at. All processes call it.

    Args:
        compute: From the numbers of some rows to these rows of each tensor, on the CPU.
        num_rows (`int`): In all.
        accelerator ([`~accelerate.Accelerator`]): Of this run.
        folder (`Path` or `None`): Chunks are kept in a sub-folder, which all processes must see; with None nowhere.
        of: Everything that the rows depend on, as JSON can hold it.
        chunk_size (`int`, *optional*): Rows in a chunk.
        description (`str`, *optional*): Of the progress bar.

    Returns:
        `dict[str, torch.Tensor]`: All rows in order, the same on every process.
    """
    chunks = [range(first, min(first + chunk_size, num_rows)) for first in range(0, num_rows, chunk_size)]
    if folder is not None:
        folder = Path(folder) / hash_of([_VERSION, of, num_rows, chunk_size])
        folder.mkdir(parents=True, exist_ok=True)
    mine = chunks[accelerator.process_index :: accelerator.num_processes]
    parts = {}
    for chunk in tqdm(mine, description, unit="chunk", disable=not accelerator.is_local_main_process, leave=False):
        path = folder and folder / f"{chunk.start:08d}.safetensors"
        rows = path and _read_rows(path)
        if rows is None:
            rows = {name: value.contiguous() for name, value in compute(chunk).items()}
            if path is not None:
                save_tensors_atomically(rows, path)
        parts[chunk.start] = rows
    accelerator.wait_for_everyone()
    if accelerator.num_processes > 1:
        if folder is None:
            parts = {start: rows for share in gather_object([parts]) for start, rows in share.items()}
        else:
            parts = {chunk.start: _read_rows(folder / f"{chunk.start:08d}.safetensors") for chunk in chunks}
            if None in parts.values():
                raise UserError(f"{folder} is not the same on all machines. Choose a folder that they share.")
    names = parts[0]
    return {name: torch.cat([parts[chunk.start][name] for chunk in chunks]) for name in names}


def keep_values(compute: Callable[[], Any], accelerator: Accelerator, *, folder: Path, of: Any) -> Any:
    r"""
    Whatever JSON can hold, computed by all processes together, or read. All processes call it.

    Args:
        compute: To the values, which only those of the main process count.
        accelerator ([`~accelerate.Accelerator`]): Of this run.
        folder (`Path`): Where the file is kept.
        of: Everything that the values depend on, as JSON can hold it.

    Returns:
        The values as JSON gives them back, the same on every process.
    """
    path = Path(folder) / f"{hash_of([_VERSION, of])}.json"
    found = [_read_values(path) if accelerator.is_main_process else None]
    broadcast_object_list(found)
    if found[0] is not None:
        return found[0]["values"]
    text = json.dumps({"values": compute(), "of": of}, indent=2)
    if accelerator.is_main_process:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, text)
    return json.loads(text)["values"]


def hash_of(value: Any) -> str:
    r"""Of anything JSON can hold; what it cannot is taken as its text."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()[:16]


def model_hash(model: torch.nn.Module) -> str:
    r"""Of a model's weights and of its config, without where it came from."""
    config = model.config if isinstance(model.config, dict) else model.config.to_dict()
    digest = hashlib.sha256(hash_of({key: value for key, value in config.items() if key[0] != "_"}).encode())
    add_weights(digest, model)
    return digest.hexdigest()[:16]


def _read_rows(path: Path) -> dict[str, torch.Tensor] | None:
    try:
        return load_file(path) if path.exists() else None
    except (SafetensorError, OSError):
        return None


def _read_values(path: Path) -> dict[str, Any] | None:
    try:
        found = json.loads(path.read_text())
        return found if "values" in found else None
    except (OSError, ValueError, TypeError):
        return None
