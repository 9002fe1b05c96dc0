"""Files that a kill at any instant leaves as they were or whole and new, what may stand in them, and hashes of it."""

import hashlib
import math
import os
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file


def write_atomically(path: Path, text: str) -> None:
    r"""Replaces a small file at once."""
    temporary = _temporary(path)
    temporary.write_text(text)
    _flush_and_rename(temporary, path)


def save_tensors_atomically(
    tensors: dict[str, torch.Tensor], path: Path, metadata: dict[str, str] | None = None
) -> None:
    r"""Writes or replaces a safetensors file at once."""
    temporary = _temporary(path)
    save_file(tensors, temporary, metadata=metadata)
    _flush_and_rename(temporary, path)


def finite_or_none(value: Any) -> Any:
    r"""The same with None for NaN and infinite numbers, which JSON does not know: the PSNR of equal images is infinite."""
    if isinstance(value, dict):
        return {name: finite_or_none(inner) for name, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return [finite_or_none(inner) for inner in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def sha256_of(path: Path) -> str:
    r"""Of a file's content, in hexadecimal."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(2**20):
            digest.update(block)
    return digest.hexdigest()


def add_weights(digest: "hashlib._Hash", model: torch.nn.Module, parts: tuple[str, ...] | None = None) -> None:
    r"""Adds names and values, in float32, of a model's weights to a hash; of some of its children only, if they are named."""
    for name, value in sorted(model.state_dict().items()):
        if parts is None or name.split(".")[0] in parts:
            digest.update(name.encode())
            digest.update(value.detach().cpu().float().contiguous().numpy().tobytes())


def _temporary(path: Path) -> Path:
    temporary = path.with_name(f"{path.name}.tmp")
    temporary.unlink(missing_ok=True)  # of a kill; and nobody's link is written through
    return temporary


def _flush_and_rename(temporary: Path, path: Path) -> None:
    with temporary.open("rb") as file:
        os.fsync(file.fileno())
    temporary.replace(path)
