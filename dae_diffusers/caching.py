"""Caches results in files named by a fingerprint of their inputs, so an evaluation computes none of them twice."""

import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list, gather_object
from safetensors import safe_open
from tqdm.auto import tqdm

from dae_diffusers.errors import UserError
from dae_diffusers.store import NotCached, cache_json, cache_tensors, cached_json, cached_tensors, fingerprint_of_json

logger = logging.getLogger(__name__)

# Version of cached results. Raise it when a measurement changes, so that older results are not used.
_VERSION = 3


class CachedRows:
    r"""
    Rows of a tensor in files, read on access. The drawn images of a large evaluation do not fit into memory, let alone once
    for each process.

    Example:
        ```python
        samples = draw_samples(pipeline, settings, folder, accelerator)
        first = samples[:64]  # (64, C, H, W)
        ```

    Args:
        name (`str`): Name of the tensor in the files.
        files (`dict[range, Path]`): Ranges of rows, in order, and the safetensors file that holds each of them.
    """

    def __init__(self, name: str, files: dict[range, Path]):
        self.name = name
        self.files = files

    def __len__(self) -> int:
        return sum(map(len, self.files))

    def __getitem__(self, rows: slice) -> torch.Tensor:
        r"""Consecutive rows as a tensor. Raises ValueError for an empty slice, and for one with a step."""
        start, stop, step = rows.indices(len(self))
        if step != 1 or start >= stop:
            raise ValueError(f"{rows} of {len(self)} rows: only consecutive rows can be read, and at least one.")
        parts = []
        for chunk, path in self.files.items():
            first, last = max(start, chunk.start), min(stop, chunk.stop)
            if first < last:
                with safe_open(path, framework="pt") as file:
                    parts.append(file.get_slice(self.name)[first - chunk.start : last - chunk.start])
        return torch.cat(parts)


def cached_rows(
    compute: Callable[[range], dict[str, torch.Tensor]],
    num_rows: int,
    accelerator: Accelerator,
    *,
    folder: Path | None,
    of: Any,
    chunk_size: int = 256,
    description: str = "",
    load: bool = True,
) -> dict[str, torch.Tensor] | dict[str, CachedRows]:
    r"""
    Computes tensors with a row for each image, in chunks that the processes take turns at. All processes call it.

    A chunk is kept with its inputs and a checksum, which are compared when it is read again. A chunk that is damaged or was
    made from other inputs is computed again, with one warning.

    Args:
        compute: Takes a range of rows, and returns these rows of each tensor, on the CPU.
        num_rows (`int`): Total number of rows.
        accelerator ([`~accelerate.Accelerator`]): The run's accelerator.
        folder (`Path` or `None`): Chunks are kept in a sub-folder, which all processes must see. None: keep nothing.
        of: All inputs that the rows depend on, as JSON can hold them.
        chunk_size (`int`, *optional*): Rows in a chunk.
        description (`str`, *optional*): Text of the progress bar.
        load (`bool`, *optional*, defaults to `True`): Whether to return the rows themselves, in the memory of each process,
            or [`CachedRows`], which need a folder.

    Returns:
        `dict[str, torch.Tensor]` or `dict[str, CachedRows]`: All rows in order, the same on every process.
    """
    chunks = [range(first, min(first + chunk_size, num_rows)) for first in range(0, num_rows, chunk_size)]
    if folder is not None:
        key = fingerprint_of_json([_VERSION, of, num_rows, chunk_size])
        folder = Path(folder) / key
        folder.mkdir(parents=True, exist_ok=True)
    files = {chunk: folder / f"{chunk.start:08d}.safetensors" for chunk in chunks} if folder is not None else {}
    mine = chunks[accelerator.process_index :: accelerator.num_processes]
    parts, unusable = {}, []
    for chunk in mine if files else ():
        try:
            parts[chunk] = cached_tensors(files[chunk], _of_chunk(key, chunk))
        except NotCached as problem:
            unusable += [] if problem.missing else [f"{files[chunk]} {problem}"]
    _say_unusable(unusable, len(files), accelerator)
    for chunk in tqdm(mine, description, unit="chunk", disable=not accelerator.is_local_main_process, leave=False):
        if chunk in parts:
            continue
        rows = {name: value.contiguous() for name, value in compute(chunk).items()}
        if files:
            cache_tensors(files[chunk], rows, _of_chunk(key, chunk))
        if load:
            parts[chunk] = rows
    accelerator.wait_for_everyone()
    if not all(path.exists() for path in files.values()):
        raise UserError(f"{folder} is not the same on all machines. Choose a folder that they share.")
    if not load:
        with safe_open(files[chunks[0]], framework="pt") as file:
            return {name: CachedRows(name, files) for name in file.keys()}  # noqa: SIM118
    if accelerator.num_processes > 1:
        if files:  # the others have just verified or written theirs
            for chunk in [chunk for chunk in chunks if chunk not in parts]:
                try:
                    parts[chunk] = cached_tensors(files[chunk], _of_chunk(key, chunk), verify=False)
                except NotCached as problem:
                    raise UserError(f"{files[chunk]} {problem}. Run the command again.") from None
        else:
            parts = {chunk: rows for share in gather_object([parts]) for chunk, rows in share.items()}
    return {name: torch.cat([parts[chunk][name] for chunk in chunks]) for name in parts[chunks[0]]}


def cached_values(compute: Callable[[], Any], accelerator: Accelerator, *, folder: Path, of: Any) -> Any:
    r"""
    Reads values that JSON can hold from a file, or computes them with all processes together. All processes call it.

    Args:
        compute: Returns the values; those of the main process count.
        accelerator ([`~accelerate.Accelerator`]): The run's accelerator.
        folder (`Path`): The folder of the file.
        of: All inputs that the values depend on, as JSON can hold them.

    Returns:
        The values as JSON gives them back, the same on every process.
    """
    path = Path(folder) / f"{fingerprint_of_json([_VERSION, of])}.json"
    found = [None]
    if accelerator.is_main_process:
        try:
            found = [{"values": cached_json(path, of)}]
        except NotCached as problem:
            if not problem.missing:
                logger.warning("%s %s. It is computed again.", path, problem)
    broadcast_object_list(found)
    if found[0] is not None:
        return found[0]["values"]
    values = json.loads(json.dumps(compute()))
    if accelerator.is_main_process:
        path.parent.mkdir(parents=True, exist_ok=True)
        cache_json(path, values, of)
    return values


def _of_chunk(key: str, chunk: range) -> dict[str, Any]:
    return {"key": key, "rows": [chunk.start, chunk.stop]}


def _say_unusable(unusable: list[str], num_files: int, accelerator: Accelerator) -> None:
    """Logs one line for all processes; only the main process shows it."""
    unusable = [each for share in gather_object([unusable]) for each in share]
    if unusable and accelerator.is_main_process:
        logger.warning("%s. Files to be computed again: %d of %d.", unusable[0], len(unusable), num_files)
