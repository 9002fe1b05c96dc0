"""Rows of results in a file, added one by one. A row that is damaged is made again."""

import json
import logging
from pathlib import Path
from typing import Any

from dae_diffusers.errors import UserError
from dae_diffusers.store import NotCached, pack, unpack, write_atomically

logger = logging.getLogger(__name__)


def keep_row(path: Path, value: Any, of: Any) -> None:
    r"""Adds a row to a file. Each row holds the inputs it was made from, and its own checksum. Raises OSError."""
    with path.open("ab") as file:
        file.write(json.dumps(pack(value, of)).encode() + b"\n")


def kept_rows(path: Path) -> list[tuple[Any, Any]]:
    r"""
    The rows that [`keep_row`] wrote, in order: the inputs and the values of each. Makes the file's folder. Rows that are damaged or
    of an older version are removed with one warning, to be made again. A row that a kill has cut short is removed too.

    Raises:
        UserError: If a line is no row at all. Then the file is not ours, and is left alone.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = path.read_bytes().splitlines(keepends=True) if path.exists() else []
    rows, whole, damaged = [], [], []
    for number, line in enumerate(lines, start=1):
        try:
            rows.append(unpack(line))
            whole.append(line)
        except NotCached as problem:
            if not line.endswith(b"\n"):
                continue
            if not any(name in line for name in (b'"checksum"', b'"values"', b'"key"')):
                raise UserError(
                    f"line {number} of {path} is not a row that a script wrote: it {problem}. Remove the line, or give another "
                    "path."
                ) from None
            damaged.append(number)
    if damaged:
        logger.warning(
            "%s: %d of %d rows are damaged or of an older version, the first in line %d. They are made again.",
            path, len(damaged), len(lines), damaged[0],
        )  # fmt: skip
    if len(whole) < len(lines):
        write_atomically(path, b"".join(whole).decode())
    return rows
