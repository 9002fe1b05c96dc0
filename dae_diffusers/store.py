"""
Atomic files and cached results. A kill at any instant leaves the old file or the whole new one. A cached file that is damaged, or
was made from other inputs, is never used.

A *fingerprint*, 16 hexadecimal digits, identifies the inputs that something was made from. A *checksum*, 64 digits, shows
whether a file still holds what was written. A cached file contains both.
"""

import glob
import hashlib
import json
import logging
import math
import os
import re
import shutil
import socket
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import psutil

from dae_diffusers.errors import UserError, one_line

if TYPE_CHECKING:  # torch takes seconds to import; code that only reads and writes text should not wait for it
    import torch

logger = logging.getLogger(__name__)

_HEADER = "kept"  # the entry of a safetensors file's metadata
_TEMPORARY = re.compile(r"\.(?P<host>\w+)-(?P<process>\d+)\.tmp$")
# Files of weights and their indexes, of any variant.
_WEIGHTS = re.compile(r"(diffusion_pytorch_|pytorch_)?model[.-].*(safetensors|bin)(\.index.*)?")
OLD = ".old.tmp"  # the end of the name of a folder that another one replaces
_IS_WINDOWS = os.name == "nt"
_OLD_SECONDS = 24 * 3600  # after so long without a write, a temporary file of another machine is a leftover
_UNREADABLE = (
    ValueError,
    KeyError,
    TypeError,
    AttributeError,
    RecursionError,
)  # what parsing arbitrary bytes can raise


class NotCached(Exception):
    r"""
    Says why a cached file is not used, as the end of a sentence that begins with its name.

    Attributes:
        missing (`bool`): Whether there is no file at all.
        of: The inputs that the file was made from, if it is whole but was made from other inputs; else None.
    """

    def __init__(self, reason: str, *, missing: bool = False, of: Any = None):
        super().__init__(reason)
        self.missing = missing
        self.of = of


def fingerprint(parts: Iterable[Any]) -> str:
    r"""
    The fingerprint of one or more parts, in order.

    Args:
        parts: Text, bytes, arrays or tensors. Of arrays and tensors only the numbers count.

    Returns:
        `str`: 16 hexadecimal digits.
    """
    return _digest(parts)[:16]


def fingerprint_of_json(value: Any) -> str:
    r"""The fingerprint of a value that JSON can hold; other values count as their text. The order of names does not matter."""
    return fingerprint([json.dumps(value, sort_keys=True, default=str)])


def sha256_of(path: Path) -> str:
    r"""The checksum of a whole file."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(2**20):
            digest.update(block)
    return digest.hexdigest()


def write_atomically(path: Path, text: str) -> None:
    r"""Replaces a small UTF-8 file atomically. Raises OSError."""
    remove_leftovers(path.parent, path.name)
    write_bytes(path, text.encode())


def write_bytes(path: Path, content: bytes) -> None:
    r"""
    Replaces a file atomically, in a folder that may hold many: leftovers of killed processes stay until somebody calls
    [`remove_leftovers`]. Raises OSError.
    """
    _replace(path, lambda temporary: temporary.write_bytes(content))


def replace_folder(folder: Path, save: Callable[[Path], Any]) -> None:
    r"""
    Puts a new folder in the place of an old one, which may be missing. Others see one of them whole, or none for an instant; if the
    process is killed in that instant, [`bring_back`] finds the old one.

    Args:
        folder (`Path`): The folder.
        save: Writes the new one into the path that it gets.
    """
    folder = folder.resolve()  # a link stays one
    temporary, old = (folder.with_name(f"{folder.name}{suffix}") for suffix in (".tmp", OLD))
    _bring_back(old)
    for left in (temporary, old):
        shutil.rmtree(left, ignore_errors=True)
    save(temporary)
    flush(temporary)
    if folder.exists():
        folder.rename(old)
    temporary.rename(folder)
    shutil.rmtree(old, ignore_errors=True)


def bring_back(folder: Path) -> None:
    r"""Brings back what kills during [`replace_folder`] have left under another name in a folder and in those in it."""
    for pattern in (f"*{OLD}", f"*/*{OLD}"):
        for old in sorted(folder.glob(pattern)):
            _bring_back(old)


def _bring_back(old: Path) -> None:
    place = old.with_name(old.name.removesuffix(OLD))
    if old.exists() and not place.exists():
        old.rename(place)


def flush(folder: Path) -> None:
    r"""Waits until the files of a folder are on the disk."""
    for path in folder.rglob("*"):
        if path.is_file():
            _flush_file(path)
    flush_entries(folder)


def flush_entries(folder: Path) -> None:
    r"""Waits until the names in a folder are on the disk."""
    if _IS_WINDOWS:  # it cannot open a folder
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def replace_files(folder: Path, save: Callable[[Path], Any]) -> None:
    r"""
    Puts the new files of a model in the place of those of the same names in its folder, one by one: each is there at every instant,
    old or new. Weights of other names, such as half-precision copies of the old ones, are removed; other files stay.

    Args:
        folder (`Path`): The folder, which exists.
        save: Writes the new files into the path that it gets, which does not exist.
    """
    temporary = folder / f"{folder.name}.tmp"
    shutil.rmtree(temporary, ignore_errors=True)
    save(temporary)
    flush(temporary)
    # The config comes last: where it is, the weights are.
    new = sorted(temporary.iterdir(), key=lambda path: (path.name == "config.json", path.name))
    for path in new:
        os.replace(path, folder / path.name)
    temporary.rmdir()
    for name in {path.name for path in folder.iterdir()} - {path.name for path in new}:
        if _WEIGHTS.fullmatch(name):
            (folder / name).unlink()


def write_json(path: Path, value: Any) -> None:
    r"""Replaces a JSON file atomically, with null for NaN and infinite numbers. Raises OSError."""
    write_atomically(path, json.dumps(finite_or_none(value), indent=2, allow_nan=False) + "\n")


def finite_or_none(value: Any) -> Any:
    r"""The same values with None for NaN and infinite numbers, which JSON cannot hold. (The PSNR of equal images is infinite.)"""
    if isinstance(value, dict):
        return {name: finite_or_none(inner) for name, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return [finite_or_none(inner) for inner in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def read_json(path: Path, kind: type = dict) -> Any:
    r"""
    The content of a JSON file.

    Args:
        path (`Path`): The file.
        kind (`type`, *optional*): What the outermost value must be.

    Raises:
        UserError: If the file cannot be read, is no JSON, or holds another type of value.
    """
    try:
        value = json.loads(path.read_bytes())
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror or error}.") from None
    except _UNREADABLE as error:
        raise UserError(f"{path} is damaged: it is not JSON ({one_line(error, 200)}).") from None
    if not isinstance(value, kind):
        raise UserError(f"{path} is damaged: it holds {_brief(value)} where a {kind.__name__} belongs.")
    return value


def read_json_or(path: Path, otherwise: Any) -> Any:
    r"""The content of a JSON file, of the type of `otherwise`; `otherwise` if there is no file, or a damaged one (with a warning)."""
    if not path.exists():
        return otherwise
    try:
        return read_json(path, type(otherwise))
    except UserError as error:
        logger.warning("%s It is not used.", error)
        return otherwise


def read_rows(path: Path, **needed: type | tuple[type, ...]) -> list[dict[str, Any]]:
    r"""
    The rows of a file with one JSON object per line. A last line that a kill cut short is left out. Other lines that cannot be
    read are left out too, with one warning.

    Args:
        path (`Path`): The file; no rows if it does not exist.
        needed (`type`): Names that a row must have, each with the type of its value.

    Raises:
        UserError: If the file cannot be read at all.
    """
    try:
        content = path.read_bytes()
    except FileNotFoundError:
        return []
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror or error}.") from None
    lines = content.split(b"\n")
    rows, damaged = [], []
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
            if not all(
                isinstance(row[name], kind) and not isinstance(row[name], bool) for name, kind in needed.items()
            ):
                raise TypeError
            rows.append(dict(row.items()))
        except _UNREADABLE:
            if number < len(lines):  # the very last has no end of line: it was being written
                damaged.append(number)
    if damaged:
        logger.warning(
            "%s is damaged: %d of its %d lines cannot be read and are left out, the first is line %d.",
            path, len(damaged), len(lines), damaged[0],
        )  # fmt: skip
    return rows


def cache_tensors(path: Path, tensors: dict[str, "torch.Tensor"], of: Any) -> None:
    r"""
    Writes or replaces a safetensors file atomically. Its header holds the inputs it was made from, and a checksum.

    Args:
        path (`Path`): The file; its folder exists.
        tensors (`dict[str, torch.Tensor]`): Tensors on the CPU.
        of: The inputs that they were made from, as JSON can hold them.

    Raises:
        OSError: If it cannot be written.
    """
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    tensors = {name: value.contiguous() for name, value in tensors.items()}
    of = _as_json(of)
    # One entry, because safetensors writes several in any order, and equal content must give equal bytes.
    metadata = {_HEADER: json.dumps({"of": of, "checksum": _checksum_of_tensors(tensors, of)}, sort_keys=True)}

    def write(temporary: Path) -> None:
        try:
            save_file(tensors, temporary, metadata=metadata)
        except SafetensorError as error:  # it has the system's error as text only
            number = re.search(r"\(os error (\d+)\)", str(error)) or re.search(r"code: (\d+)", str(error))
            if number is None:
                raise OSError(one_line(error, 200)) from None
            raise OSError(int(number[1]), os.strerror(int(number[1])), str(path)) from None

    remove_leftovers(path.parent, path.name)
    _replace(path, write)


def cached_tensors(path: Path, of: Any, *, verify: bool = True) -> dict[str, "torch.Tensor"]:
    r"""
    The tensors of a file that [`cache_tensors`] wrote, memory-mapped.

    Args:
        path (`Path`): The file.
        of: The inputs that they must have been made from.
        verify (`bool`, *optional*, defaults to `True`): Compare the checksum, which reads the whole file. Skip this only
            if another process has just done it.

    Raises:
        NotCached: If there is no such file, if it was made from something else, or if it is damaged.
    """
    tensors, found, checksum = _open_tensors(path)
    if found != _as_json(of):
        if checksum != _checksum_of_tensors(tensors, found):
            raise NotCached("is damaged: its content has another checksum than when it was written")
        raise NotCached("was made from something else", of=found)
    if verify and checksum != _checksum_of_tensors(tensors, found):
        raise NotCached("is damaged: its content has another checksum than when it was written")
    return tensors


def inputs_of_cached(path: Path) -> Any:
    r"""The inputs that a file of tensors was made from, by its header alone. Raises NotCached if it does not hold them."""
    return _open_tensors(path)[1]


def cache_json(path: Path, value: Any, of: Any) -> None:
    r"""Like [`cache_tensors`], for any value that JSON can hold, and NaN and infinite numbers. Raises OSError."""
    write_atomically(path, json.dumps(pack(value, of), indent=2) + "\n")


def cached_json(path: Path, of: Any = None) -> Any:
    r"""
    The value that [`cache_json`] wrote.

    Args:
        path (`Path`): The file.
        of (*optional*): The inputs that it must have been made from; None: any.

    Raises:
        NotCached: If there is no such file, if it was made from something else, or if it is damaged.
    """
    try:
        content = path.read_bytes()
    except (FileNotFoundError, NotADirectoryError):
        raise NotCached("is missing", missing=True) from None
    except OSError as error:
        raise NotCached(f"cannot be read ({error.strerror or error})") from None
    found, value = unpack(content)
    if of is not None and found != _as_json(of):
        raise NotCached("was made from something else", of=found)
    return value


def pack(value: Any, of: Any) -> dict[str, Any]:
    r"""A value with the inputs that it was made from, and a checksum: what a cached file, or a row of one, holds as JSON."""
    of, value = _as_json(of), _as_json(value)
    return {"of": of, "values": value, "checksum": fingerprint_of_json([of, value])}


def unpack(content: bytes) -> tuple[Any, Any]:
    r"""The inputs and the value in what [`pack`] made, as JSON. Raises NotCached if it is damaged."""
    try:
        kept = json.loads(content)
        if "checksum" not in kept:
            raise NotCached("was made by an older version, or by something else: it has no checksum")
        of, value = kept["of"], kept["values"]
        is_whole = kept["checksum"] == fingerprint_of_json([of, value])
    except _UNREADABLE as error:
        raise NotCached(f"is damaged ({one_line(error, 200)})") from None
    if not is_whole:
        raise NotCached("is damaged: its content has another checksum than when it was written")
    return of, value


def remove_leftovers(folder: Path, name: str = "") -> None:
    r"""
    Removes unfinished files that killed processes have left.

    Args:
        folder (`Path`): The folder; its sub-folders are left alone.
        name (`str`, *optional*): Only unfinished versions of this file; empty: of all files.
    """
    for path in folder.glob(f"{glob.escape(name)}*.tmp"):
        match = _TEMPORARY.search(path.name)
        if match is None or (name and path.name[: match.start()] != name):
            continue
        try:
            if match["host"] == _host():
                is_leftover = not psutil.pid_exists(int(match["process"]))
            else:
                is_leftover = time.time() - path.lstat().st_mtime > _OLD_SECONDS
            if is_leftover:
                path.unlink(missing_ok=True)
        except OSError:  # somebody else's, or gone
            continue


def _digest(parts: Iterable[Any]) -> str:
    digest = hashlib.sha256()
    for part in parts:
        digest.update(part.encode() if isinstance(part, str) else part if isinstance(part, bytes) else _bytes_of(part))
    return digest.hexdigest()


def _bytes_of(numbers: Any) -> Any:
    """The bytes of an array or a tensor, without a copy if that is possible."""
    if hasattr(numbers, "detach"):
        import torch

        return numbers.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy()
    return numbers.tobytes()


def _checksum_of_tensors(tensors: dict[str, "torch.Tensor"], of: Any) -> str:
    names = sorted(tensors)
    described = [of, [[name, str(tensors[name].dtype), list(tensors[name].shape)] for name in names]]
    return _digest([json.dumps(described, sort_keys=True), *(tensors[name] for name in names)])


def _open_tensors(path: Path) -> tuple[dict[str, "torch.Tensor"], Any, str]:
    """The tensors, memory-mapped; what they say that they are of; and their checksum."""
    from safetensors import SafetensorError, safe_open

    if not path.is_file():
        raise NotCached("is missing", missing=True)
    try:
        with safe_open(path, framework="pt") as file:
            header = (file.metadata() or {}).get(_HEADER)
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError, RuntimeError, *_UNREADABLE) as error:
        raise NotCached(f"is damaged ({one_line(error, 200)})") from None
    if header is None:
        raise NotCached("was made by an older version, or by something else: its header does not name its inputs")
    try:
        header = json.loads(header)
        return tensors, header["of"], header["checksum"]
    except _UNREADABLE:
        raise NotCached("is damaged: its header cannot be read") from None


def _replace(path: Path, write: Callable[[Path], Any]) -> None:
    temporary = path.with_name(f"{path.name}.{_host()}-{os.getpid()}.tmp")  # several runs may write the same file
    temporary.unlink(missing_ok=True)  # nobody's link is written through
    try:
        write(temporary)
        _flush_and_rename(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def _flush_and_rename(temporary: Path, path: Path) -> None:
    _flush_file(temporary)
    temporary.replace(path)


def _flush_file(path: Path) -> None:
    with path.open("r+b" if _IS_WINDOWS else "rb") as file:  # Windows flushes only what is open for writing
        os.fsync(file.fileno())


def _host() -> str:
    return re.sub(r"\W", "_", socket.gethostname())[:64] or "here"


def _as_json(value: Any) -> Any:
    """The value after a round trip through JSON, so that tuples equal lists."""
    return json.loads(json.dumps(value, default=str))


def _brief(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 40 else f"{text[:40]}..."
