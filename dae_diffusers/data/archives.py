"""Reads `.tar` and `.zip` files: the positions of their members, and webdataset samples that consist of several files."""

import contextlib
import json
import logging
import posixpath
import re
import tarfile
import zipfile
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

import datasets
import numpy as np

from dae_diffusers.data.contents import MAX_FILE_BYTES, packed_path
from dae_diffusers.data.encodings import decode_text
from dae_diffusers.data.formats import HEIF_SUFFIXES, SUFFIXES, reads_heif
from dae_diffusers.errors import UserError, one_line

logger = logging.getLogger(__name__)

# Other files of a webdataset sample: their columns.
_NUMBERS = frozenset({"cls", "cls2", "index", "inx", "id"})
_TEXTS = frozenset({"txt", "text", "caption", "transcript"})
_JSON = frozenset({"json", "jsn"})
_INFERRED_SAMPLES = 100  # a stream's columns come from these
_UNREAD: set[Path] = set()  # archives of which a file was named: a stream reads them again in each pass
_LOST_LINKS: set[Path] = set()  # archives of which a link was named


class Member(NamedTuple):
    """A file in an archive; `offset` is None where only the archive can unpack it."""

    place: PurePosixPath
    name: str
    size: int
    offset: int | None


def members_of(archive: Path) -> list[Member]:
    r"""
    Lists the files in a `.tar` or `.zip` in order, without reading them.

    Raises:
        UserError: If it is damaged, or compressed as a whole.
    """
    try:
        if archive.suffix.lower() == ".zip":
            with zipfile.ZipFile(archive) as file:
                infos = [info for info in file.infolist() if not info.is_dir()]
                if any(info.flag_bits & 1 for info in infos):
                    raise UserError(f"{archive} needs a password. Unpack it and give the folder.")
                return [Member(_place(info.filename), info.filename, info.file_size, None) for info in infos]
        with tarfile.open(archive, "r:") as file:
            return _tar_members(archive, file)
    except (tarfile.TarError, zipfile.BadZipFile, OSError, ValueError, NotImplementedError) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(f"the archive {archive} cannot be read ({one_line(error)}).") from None


def _tar_members(archive: Path, file: tarfile.TarFile) -> list[Member]:
    """The files of a `.tar`; a link is the file that it leads to. Warns of links that lead to none."""
    infos = [info for info in file if info.isreg() or info.islnk() or info.issym()]
    if not all(info.isreg() for info in infos):
        known = {posixpath.normpath(info.name): info for info in sorted(infos, key=tarfile.TarInfo.isreg)}
        targets = [_target_of(info, known) for info in infos]
    else:
        targets = infos
    found = list(zip(infos, targets, strict=True))
    lost = [info for info, target in found if target is None]
    if lost and archive not in _LOST_LINKS:
        _LOST_LINKS.add(archive)
        logger.warning(
            "%d links in %s lead to no file in it, such as %s to %s, and are not read. Pack the files themselves: `tar --dereference`.",
            len(lost), archive, lost[0].name, lost[0].linkname,
        )  # fmt: skip
    return [
        Member(_place(info.name), info.name, target.size, target.offset_data)
        for info, target in found
        if target is not None
    ]


def _target_of(info: tarfile.TarInfo, known: dict[str, tarfile.TarInfo]) -> tarfile.TarInfo | None:
    """The file that a link leads to, over others too; None if there is none."""
    seen = set()
    while info is not None and not info.isreg():
        folder = posixpath.dirname(info.name) if info.issym() else ""
        name = posixpath.normpath(posixpath.join(folder, info.linkname))
        info = None if name in seen else known.get(name)
        seen.add(name)
    return info


def samples_of(archive: Path, members: list[Member]) -> Iterator[tuple[PurePosixPath, dict[str, Any]]]:
    r"""
    The samples of a webdataset: the position of each image, and its columns. Files with the same path before the suffix belong
    together, wherever they lie in the archive. Pictures go to `image`, a second picture such as `0001.seg.png` to `seg.png`, and
    numbers, texts and the values of JSON files to columns such as `cls`, `txt` and `json.label`.
    """
    compound = _compound_suffixes(members)
    with archive.open("rb") as file:
        for key, group in _grouped(members, compound):
            if not _has_picture(group):
                continue
            columns: dict[str, Any] = {}
            for member, field in group:
                if is_picture(field):
                    content = {
                        "bytes": None,
                        "path": packed_path(str(archive), member.name, member.size, member.offset),
                    }
                    columns[field] = content
                else:
                    file.seek(member.offset)
                    try:
                        columns |= _side_columns(field, file.read(min(member.size, 2**24)))
                    except (ValueError, RecursionError) as error:
                        _warn_of_unread(archive, member.name, error)
            yield PurePosixPath(key), _with_image(columns)


def warn_of_lone_files(archives: Iterable[tuple[Path, list[Member]]]) -> None:
    r"""Warns about labels and texts in webdatasets that lie beside no picture. They are not read."""
    kinds = _NUMBERS | _TEXTS | _JSON
    lone = [
        (archive, member.name)
        for archive, members in archives
        for _, group in _grouped(members, _compound_suffixes(members))
        if not _has_picture(group)
        for member, field in group
        if field.rpartition(".")[2] in kinds
    ]
    if lone:
        archive, name = lone[0]
        logger.warning(
            "%d labels or texts in archives have no picture of the same path, such as %s of %s, and are not read. Pack each with "
            "the path of its picture, but for the suffix: `a/1.png`, `a/1%s`.",
            len(lone), name, archive, PurePosixPath(name).suffix,
        )  # fmt: skip


def streamed_samples(shards: list[str], features: datasets.Features) -> Iterator[dict[str, Any]]:
    r"""The samples of shards with their images' bytes, for `datasets.IterableDataset.from_generator`."""
    for shard in shards:
        archive = Path(shard)
        members = members_of(archive)
        with archive.open("rb") as file:
            for place, columns in samples_of(archive, members):
                for name, value in columns.items():
                    if isinstance(value, dict) and "path" in value:
                        columns[name] = _with_bytes(value, file)
                row = dict.fromkeys(features)
                for name, feature in features.items():
                    try:
                        row[name] = fitted(columns.get(name), feature)
                    except ValueError as error:
                        _warn_of_unread(archive, f"the column {name} of {place}", error)
                yield row


def stream_features(shards: list[Path]) -> datasets.Features:
    r"""The columns of a stream, from the first samples of up to three shards."""
    rows: list[dict[str, Any]] = []
    archives = [(archive, members_of(archive)) for archive in shards[:3]]
    warn_of_lone_files(archives)
    for archive, members in archives:
        for number, (_, columns) in enumerate(samples_of(archive, members)):
            if number == _INFERRED_SAMPLES:
                break
            rows.append(columns)
    return columns_features(rows)


def columns_features(rows: Iterable[dict[str, Any]]) -> datasets.Features:
    r"""Features of flat columns; text where values differ in kind."""
    kinds: dict[str, set[type]] = {}
    for row in rows:
        for name, value in row.items():
            kinds.setdefault(name, set()).add(type(value))
    features = {}
    for name, found in kinds.items():
        found -= {type(None)}
        if found == {dict}:
            features[name] = datasets.Image(decode=False)
        elif found == {int}:
            features[name] = datasets.Value("int64")
        elif found == {bool}:
            features[name] = datasets.Value("bool")
        elif found and found <= {int, float}:
            features[name] = datasets.Value("float64")
        else:
            features[name] = datasets.Value("string")
    return datasets.Features(features)


def fitted(value: Any, feature: Any) -> Any:
    r"""
    A value in the type of its column: text, if the column's values had several types.

    Raises:
        ValueError: If it is none of that type. The first samples of a stream decide the type.
    """
    if value is None or isinstance(value, dict):
        return value
    if feature == datasets.Value("string"):
        return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    with contextlib.suppress(ValueError, OverflowError):
        found = np.dtype(feature.dtype).type(value)
        if found == value or str(found) == str(value):
            return found.item()
    raise ValueError(f"{value!r} is no {feature.dtype}, as the first ones are")


def is_picture(name: str) -> bool:
    r"""Whether a file is a picture, judged by its suffix."""
    suffix = "." + name.rpartition(".")[2].lower()
    return suffix in SUFFIXES or suffix == ".npy" or (suffix in HEIF_SUFFIXES and reads_heif())


def _place(name: str) -> PurePosixPath:
    return PurePosixPath(*[part for part in PurePosixPath(name.replace("\\", "/")).parts if part not in ("/", "..")])


def _split(place: PurePosixPath, compound: set[str]) -> tuple[str, str]:
    """The sample's name and the suffix, which only may have dots if many samples have the same."""
    first, _, rest = place.name.partition(".")
    if first and rest.lower() in compound:
        return str(place.with_name(first)), rest.lower()
    stem, _, suffix = place.name.rpartition(".")
    return str(place.with_name(stem)) if stem else str(place), suffix.lower()


def _compound_suffixes(members: list[Member]) -> set[str]:
    """Suffixes such as `seg.png`: half of the samples have it, and another file beside it. Others are dots in a name."""
    keys: dict[str, list[str]] = {}
    for member in members:
        first, _, rest = member.place.name.partition(".")
        if first and rest:
            keys.setdefault(str(member.place.parent / first), []).append(rest.lower())
    counts = Counter(
        rest for found in keys.values() if any("." not in name for name in found) for rest in found if "." in rest
    )
    return {rest for rest, count in counts.items() if count >= max(1, len(keys) / 2)}


def _grouped(members: list[Member], compound: set[str]) -> list[tuple[str, list[tuple[Member, str]]]]:
    """
    Files of the same name, wherever they lie in the archive, in the order of the first of each. A second picture or label of a name
    begins another group, unless the two are neighbours.
    """
    groups: list[tuple[str, list[tuple[Member, str]]]] = []
    latest: dict[str, list[tuple[Member, str]]] = {}
    last = None
    for member in members:
        if member.place.name.startswith(".") or "__MACOSX" in member.place.parts:
            continue
        name, field = _split(member.place, compound)
        group = latest.get(name)
        if group is None or (name != last and any(field == other for _, other in group)):
            group = latest[name] = []
            groups.append((name, group))
        group.append((member, field))
        last = name
    return groups


def _has_picture(group: list[tuple[Member, str]]) -> bool:
    return any(is_picture(field) for _, field in group)


def _with_image(columns: dict[str, Any]) -> dict[str, Any]:
    """A sample's only picture without another word in its suffix is its `image`, whatever its format."""
    pictures = [name for name, value in columns.items() if isinstance(value, dict)]
    plain = [name for name in pictures if "." not in name] or pictures
    if len(plain) != 1:
        return columns
    return {"image": columns[plain[0]]} | {name: value for name, value in columns.items() if name != plain[0]}


def _side_columns(field: str, data: bytes) -> dict[str, Any]:
    """Columns of a file beside an image. Raises `ValueError` or `RecursionError` if it cannot be read."""
    kind = field.rpartition(".")[2]
    if kind in _NUMBERS:
        text = decode_text(data).strip()
        return {field: int(text) if re.fullmatch(r"[+-]?\d+", text) else text or None}
    if kind in _TEXTS:
        return {field: decode_text(data)}
    if kind in _JSON:
        values = json.loads(decode_text(data))
        flat = values.items() if isinstance(values, dict) else [("", values)]
        return {
            f"{field}.{name}" if name else field: value if not isinstance(value, (dict, list)) else json.dumps(value)
            for name, value in flat
        }
    return {}


def _warn_of_unread(archive: Path, name: str, error: Exception) -> None:
    """Names the first file of an archive that cannot be read. Its columns have no value, which whoever uses them counts."""
    if archive not in _UNREAD:
        _UNREAD.add(archive)
        logger.warning(
            "%s of %s cannot be read (%s): its values are empty. Others of this archive are not named.",
            name, archive, one_line(error, 300),
        )  # fmt: skip


def _with_bytes(image: dict[str, Any], file) -> dict[str, Any]:
    """The image of a member of the open archive."""
    place, _, rest = image["path"].partition("://")[2].partition("/")
    offset, _, size = place.partition("+")
    if int(size) > MAX_FILE_BYTES:
        return image
    file.seek(int(offset))
    return {"bytes": file.read(int(size)), "path": image["path"]}
