"""Results kept in files that are named by a hash of what they depend on: an evaluation computes none of them twice."""

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list, gather_object
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from tqdm.auto import tqdm

from dae_diffusers.errors import UserError
from dae_diffusers.files import add_weights, save_tensors_atomically, write_atomically

# Of what is kept: raised when a measurement changes, so that results of an older version are not taken for those of this one.
_VERSION = 3


class KeptRows:
    r"""
    Rows of a tensor that lie in files, read when they are asked for: drawn images of a large evaluation fit into no memory,
    least of all once for each process.

    Example:
        ```python
        samples = draw_samples(pipeline, settings, folder, accelerator)
        first = samples[:64]  # (64, C, H, W)
        ```

    Args:
        name (`str`): Of the tensor in the files.
        files (`dict[range, Path]`): Numbers of some rows, in order, to the safetensors file that holds them.
    """

    def __init__(self, name: str, files: dict[range, Path]):
        self.name = name
        self.files = files

    def __len__(self) -> int:
        return sum(map(len, self.files))

    def __getitem__(self, rows: slice) -> torch.Tensor:
        r"""Neighbouring rows as a tensor. Raises ValueError for a slice of none, and for one with a step."""
        start, stop, step = rows.indices(len(self))
        if step != 1 or start >= stop:
            raise ValueError(f"{rows} of {len(self)} rows: only neighbouring ones are read, and at least one.")
        parts = []
        for chunk, path in self.files.items():
            first, last = max(start, chunk.start), min(stop, chunk.stop)
            if first < last:
                with safe_open(path, framework="pt") as file:
                    parts.append(file.get_slice(self.name)[first - chunk.start : last - chunk.start])
        return torch.cat(parts)


def keep_rows(
    compute: Callable[[range], dict[str, torch.Tensor]],
    num_rows: int,
    accelerator: Accelerator,
    *,
    folder: Path | None,
    of: Any,
    chunk_size: int = 256,
    description: str = "",
    load: bool = True,
) -> dict[str, torch.Tensor] | dict[str, KeptRows]:
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
        load (`bool`, *optional*, defaults to `True`): Whether to return the rows themselves, in the memory of each process,
            or [`KeptRows`], which need a folder.

    Returns:
        `dict[str, torch.Tensor]` or `dict[str, KeptRows]`: All rows in order, the same on every process.
    """
    chunks = [range(first, min(first + chunk_size, num_rows)) for first in range(0, num_rows, chunk_size)]
    if folder is not None:
        folder = Path(folder) / hash_of([_VERSION, of, num_rows, chunk_size])
        folder.mkdir(parents=True, exist_ok=True)
    files = {chunk: folder / f"{chunk.start:08d}.safetensors" for chunk in chunks} if folder is not None else {}
    mine = chunks[accelerator.process_index :: accelerator.num_processes]
    parts = {}
    for chunk in tqdm(mine, description, unit="chunk", disable=not accelerator.is_local_main_process, leave=False):
        rows = _read_rows(files[chunk]) if files else None
        if rows is None:
            rows = {name: value.contiguous() for name, value in compute(chunk).items()}
            if files:
                save_tensors_atomically(rows, files[chunk])
        if load:
            parts[chunk] = rows
    accelerator.wait_for_everyone()
    if not all(path.exists() for path in files.values()):
        raise UserError(f"{folder} is not the same on all machines. Choose a folder that they share.")
    if not load:
        with safe_open(files[chunks[0]], framework="pt") as file:
            return {name: KeptRows(name, files) for name in file.keys()}  # noqa: SIM118
    if accelerator.num_processes > 1:
        if files:
            parts = {chunk: parts.get(chunk) or load_file(path) for chunk, path in files.items()}
        else:
            parts = {chunk: rows for share in gather_object([parts]) for chunk, rows in share.items()}
    return {name: torch.cat([parts[chunk][name] for chunk in chunks]) for name in parts[chunks[0]]}


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
