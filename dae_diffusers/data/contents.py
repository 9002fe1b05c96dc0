"""Reads the bytes of an image from where its row says: from the row itself, a file, an archive or the Hub."""

import functools
import hashlib
import lzma
import os
import stat
import zipfile
import zlib
from dataclasses import dataclass
from typing import Any, BinaryIO
from urllib.parse import quote, unquote_to_bytes

import fsspec
import numpy as np

from dae_diffusers.errors import one_line

# Of one file or member of an archive. The largest picture that Pillow decodes has half as many bytes.
MAX_FILE_BYTES = 2**31

_NAMED = "percent://"  # a file whose name is not UTF-8
_PACKED = "packed://"  # a member of an archive
# What `zipfile` raises for members that are damaged, missing, or packed by Deflate64 and the like.
_NOT_UNPACKED = (zipfile.BadZipFile, zlib.error, lzma.LZMAError, EOFError, KeyError, RuntimeError)


@dataclass(frozen=True)
class Root:
    r"""
    The folder in which the files that a data set's tables name must lie.

    Attributes:
        folder (`str`): Folder of the data set: a local folder, or `hf://datasets/NAME`.
        tables (`str`): Folder of the tables, where relative paths are looked up first.
    """

    folder: str
    tables: str

    def find(self, path: str) -> str:
        r"""
        Resolves `path` to an absolute path or a URL.

        Raises:
            ValueError: If it lies outside the folder, even through a link.
        """
        is_remote = "://" in self.folder
        if "://" in path or is_remote:
            place = path.rpartition("::")[2]
            if is_remote and place.startswith((f"{self.folder}/", f"{self.folder}@")) and ".." not in place.split("/"):
                return path
            raise ValueError(f"its path {path} leads out of the data set, {self.folder}")
        top, found = os.path.realpath(self.folder), ""
        for base in (self.tables, self.folder):
            found = os.path.realpath(os.path.join(base, path))
            if os.path.commonpath([found, top]) != top:
                raise ValueError(f"its path {path} leads out of the data set's folder {self.folder}")
            if os.path.exists(found):
                break
        return found


def read_content(item: Any, root: Root | None = None) -> Any:
    r"""
    Reads the bytes of an image file from wherever it lies; returns the lists of an array column as they are.

    Args:
        item: A row's image: `{"bytes", "path"}`, bytes, or nested lists.
        root ([`Root`], *optional*): Files outside this folder are refused.

    Raises:
        ValueError, OSError: If the row is empty, the file is larger than `MAX_FILE_BYTES`, it is not a file, or its archive is damaged.
    """
    if item is None:
        raise ValueError("the row is empty")
    if isinstance(item, str):
        item = {"bytes": None, "path": item}
    if not isinstance(item, dict):
        return item
    data = item.get("bytes")
    if data is None and not item.get("path"):
        raise ValueError("the row is empty")
    if data is None:
        try:
            data = _read_path(item["path"], root)
        except _NOT_UNPACKED as error:
            raise ValueError(f"its archive is damaged or packed in a way that is not read: {one_line(error)}") from None
    if not data:
        raise ValueError("the file has 0 bytes")
    return data


def content_hash(item: Any, root: Root | None = None) -> bytes:
    r"""The hash of an image's file or values; the hash of nothing if it cannot be read."""
    try:
        content = read_content(item, root)
    except (ValueError, OSError):
        content = b""
    data = content if isinstance(content, bytes) else np.asarray(content).tobytes()
    return hashlib.blake2b(data, digest_size=16).digest()


def name_of_row(item: Any, index: int) -> str:
    r"""The image's file name if it has one, else its row."""
    path = item if isinstance(item, str) else isinstance(item, dict) and item.get("path")
    if path and path.startswith(_PACKED):
        _, member, archive = _parse(path)
        return f"{member} of {archive}"
    return path or f"row {index} of the dataset"


def place_of(path: str) -> str:
    r"""The path in a column as that of a file: of a member of an archive inside the archive, `ARCHIVE/MEMBER`."""
    if not path.startswith(_PACKED):
        return path
    _, member, archive = _parse(path)
    return f"{archive}/{member}"


def column_path(path: str) -> str:
    r"""A file's path as a column of text can hold it: names need not be UTF-8."""
    try:
        path.encode()
        return path
    except UnicodeEncodeError:
        return _NAMED + quote(os.fsencode(path))


def packed_path(archive: str, member: str, size: int, offset: int | None) -> str:
    r"""The value of a column for a member of an archive: stored at `offset`, or (None) to be unpacked from the ZIP file."""
    return f"{_PACKED}{'' if offset is None else offset}+{size}/{quote(os.fsencode(member))}::{column_path(archive)}"


def size_of(path: str | None, root: Root | None = None) -> int:
    r"""The size in bytes of a local file or an archive's member; 0 if it cannot be found."""
    try:
        if path and path.startswith(_PACKED):
            return _parse(path)[0][1]
        return os.stat(_local_path(path, root)).st_size if path else 0
    except (OSError, ValueError):
        return 0


def inode_of(path: str | None, root: Root | None = None) -> tuple[int, int] | None:
    r"""What all links to a local file have in common; None for what is no file of its own or cannot be found."""
    try:
        status = os.stat(_local_path(path, root)) if path else None
    except (OSError, ValueError):
        return None
    return (status.st_dev, status.st_ino) if status and status.st_ino else None


def _local_path(path: str, root: Root | None) -> str:
    if root is not None:
        path = root.find(path)
    return os.fsdecode(unquote_to_bytes(path.removeprefix(_NAMED))) if path.startswith(_NAMED) else path


def _parse(path: str) -> tuple[tuple[int | None, int], str, str]:
    place, _, rest = path.removeprefix(_PACKED).partition("/")
    member, _, archive = rest.partition("::")
    offset, _, size = place.partition("+")
    return (int(offset) if offset else None, int(size)), os.fsdecode(unquote_to_bytes(member)), archive


def _read_path(path: str, root: Root | None) -> bytes:
    if root is None and path.startswith(_PACKED):
        (offset, size), member, archive = _parse(path)
        _check_size(size)
        archive = _local_path(archive, None)
        if offset is None:
            with _zip_file(archive, os.getpid()).open(member) as file:
                return _limited(file)
        with open(archive, "rb") as file:
            file.seek(offset)
            data = file.read(size)
        if len(data) < size:
            raise ValueError(f"the archive {archive} ends before it does")
        return data
    path = _local_path(path, root)
    if "://" in path:
        with fsspec.open(path, "rb") as file:
            return _limited(file)
    status = os.stat(path)
    if not stat.S_ISREG(status.st_mode):
        raise ValueError("it is a folder" if stat.S_ISDIR(status.st_mode) else "it is a device or a pipe, not a file")
    _check_size(status.st_size)
    with open(path, "rb") as file:
        return _limited(file)


@functools.lru_cache(maxsize=128)  # to open one reads its directory
def _zip_file(path: str, process: int) -> zipfile.ZipFile:
    """Opens a ZIP file, once per process: processes that share an open file would move each other's position in it."""
    return zipfile.ZipFile(path)


def _limited(file: BinaryIO) -> bytes:
    """Reads a whole file in parts, without trusting the size that it claims to have."""
    parts, size = [], 0
    while part := file.read(2**24):
        parts.append(part)
        size += len(part)
        _check_size(size)
    return b"".join(parts)


def _check_size(size: int) -> None:
    if size > MAX_FILE_BYTES:
        raise ValueError(f"the file has more than {MAX_FILE_BYTES / 2**30:g} GiB, the most that one image may have")
