"""Leaves out the images that a file names."""

import csv
import logging
from collections.abc import Iterator
from pathlib import Path, PurePosixPath

import datasets
import pyarrow as pa
import pyarrow.compute as pc

from dae_diffusers.data.contents import name_of_row, place_of
from dae_diffusers.data.encodings import decode_text
from dae_diffusers.errors import UserError, in_full, one_line

logger = logging.getLogger(__name__)


class LeftOut:
    r"""
    The names of images that are not to be used.

    Args:
        path (`str`): A text file with a name in each line, or a CSV file with a header, whose first column has the names: the
            `copies.csv` of `preview`. A name is a path, or its last parts: `cats/7.png`.

    Raises:
        UserError: If it cannot be read, or names nothing.
    """

    def __init__(self, path: str):
        self.path, self._found = path, {}
        try:
            lines = decode_text(Path(path).read_bytes()).splitlines()
        except (OSError, ValueError) as error:
            raise UserError(f"`leave_out` {path} cannot be read: {one_line(error)}{in_full(Path(path))}.") from None
        if path.lower().endswith(".csv"):
            lines = [row[0] for row in csv.reader(lines) if row][1:]
        self.names = {_normal(line) for line in lines if line.strip()}
        if not self.names:
            raise UserError(f"`leave_out` {path} names no images. Write one name in each line.")

    def of(self, rows: datasets.Dataset, column: str) -> datasets.Dataset:
        r"""
        The rows of a split whose images are not named, in the same order.

        Raises:
            UserError: If a name may mean several images.
        """
        kept = [index for index, names in enumerate(_names(rows, column)) if not self._has(names)]
        return rows if len(kept) == len(rows) else rows.select(kept)

    def report(self, before: int, after: int) -> None:
        r"""Logs how many images were left out, and warns about names that no image has. `before` and `after`: numbers of images."""
        logger.info("left out: %d images that %s names", before - after, self.path)
        unknown = sorted(self.names - self._found.keys())
        if unknown:
            logger.warning(
                "%d of %d names in %s are of no image, such as %s. A name is a path, or its last parts: `cats/7.png`.",
                len(unknown), len(self.names), self.path, unknown[0],
            )  # fmt: skip

    def _has(self, names: list[str]) -> bool:
        """Whether an image is named; `names` are those that may be meant, the whole one first. Several rows may have the same image."""
        found = self.names.intersection(names)
        for name in found:
            other = self._found.setdefault(name, names[0])
            if other != names[0]:
                raise UserError(
                    f"`leave_out` {self.path} names {name}, which may be {other} or {names[0]}. Write more of the path."
                )
        return bool(found)


def _names(rows: datasets.Dataset, column: str) -> Iterator[list[str]]:
    """What may be meant by each image's name: as messages write it, and the ends of its path."""
    images = rows.data.column(column)
    numbers = range(len(rows)) if rows._indices is None else rows._indices.column(0).to_pylist()
    paths = pc.struct_field(images, "path").to_pylist() if pa.types.is_struct(images.type) else [None] * len(images)
    for number in numbers:
        path = paths[number]
        parts = PurePosixPath(_normal(place_of(path))).parts if path else ()
        yield [_normal(name_of_row({"path": path}, number)), *("/".join(parts[n:]) for n in range(len(parts)))]


def _normal(name: str) -> str:
    return name.strip().replace("\\", "/").removeprefix("./")
