"""Loads folders of pictures, arrays or archives: their layout gives the splits and classes."""

import glob
import logging
import os
import re
import stat
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

import datasets
import pyarrow as pa

from dae_diffusers.data.archives import (
    Member,
    columns_features,
    fitted,
    is_picture,
    members_of,
    samples_of,
    stream_features,
    streamed_samples,
    warn_of_lone_files,
)
from dae_diffusers.data.classes import class_order
from dae_diffusers.data.columns import LABELS
from dae_diffusers.data.contents import column_path, packed_path, read_content
from dae_diffusers.data.encodings import decode_text
from dae_diffusers.data.formats import HEIF_SUFFIXES, INSTALL_HEIF, OTHER_SUFFIXES, SUFFIXES, reads_heif
from dae_diffusers.data.tables import (
    METADATA,
    SPLITS,
    TABLES,
    Described,
    Metadata,
    load_tables,
    named_files,
    read_metadata,
    splits_in,
)
from dae_diffusers.errors import UserError
from dae_diffusers.locks import OWNER

logger = logging.getLogger(__name__)

# Folders whose names begin so are not read, as `datasets` has it; nor the thumbnails of a network drive and the bin of Windows.
UNSEEN = (".", "__", "@eaDir", "$RECYCLE.BIN")
_IN_UNSEEN = "in folders whose names begin with . or __, or of the system"
DRAWN = "samples.yaml"  # marks a folder of `dae-diffusers sample`, whose images may be trained on
_OF_A_RUN = f"in the output folder of a run, which has a file {OWNER}: its own pictures are not trained on"
_DEAD = "links that lead nowhere"
_BESIDE_CLASSES = "archives beside folders of images: unpack them"
_NO_METADATA = "a table beside images is read as `metadata.csv` with a column `file_name`"
_READ_ALREADY = "linked folders that are read already: copy them if they are meant to count twice"

Splits = dict[str, datasets.Dataset | datasets.IterableDataset]


class Entry(NamedTuple):
    """
    An image: its path (whose folders give split and class), the value of its image column, its other columns, and the file, with the
    archive that holds it: `part-0.zip/0000.png`.
    """

    place: PurePosixPath
    image: dict[str, Any] | None
    columns: dict[str, Any]
    file: PurePosixPath


@dataclass
class Survey:
    """The files in a folder, as sorted relative paths."""

    pictures: list[PurePosixPath] = field(default_factory=list)
    arrays: list[PurePosixPath] = field(default_factory=list)
    archives: list[PurePosixPath] = field(default_factory=list)
    metadata: list[PurePosixPath] = field(default_factory=list)
    tables: list[PurePosixPath] = field(default_factory=list)
    left_out: dict[PurePosixPath, str] = field(default_factory=dict)  # with the reason

    @property
    def shards(self) -> list[PurePosixPath]:
        return [path for path in self.archives if path.suffix.lower() == ".tar"]


def load_folder(
    folder: Path,
    *,
    streaming: bool = False,
    with_labels: bool = True,
    name_columns: Collection[str] = LABELS,
    caption_columns: Sequence[str] = (),
    condition_column: str | None = None,
    flag: str = "train_data_dir",
) -> Splits:
    r"""
    Loads the images of a folder. Top folders `train`, `validation` and `test`, or such as `train2017` and `val2017`, are splits, if
    they are the only folders with images and one is for training. Folders below are classes, whatever their names. A folder that
    contains all images is ignored. Folders in archives count like others, and so does the name of an archive if archives differ by
    more than a number.

    Each row has an `image`, a `label` if there are classes, and the columns of the metadata tables beside the images. A file that these
    name in another column than `file_name`, and that has no row of its own, is not an image by itself: a mask, for example. Files that
    are left out are logged by suffix and reason.

    Args:
        folder (`Path`): A folder with pictures, `.npy` arrays, `.tar` or `.zip` archives, or tables that hold images.
        streaming (`bool`, *optional*): Read shards while training, without a copy.
        with_labels (`bool`, *optional*): Whether folders are classes.
        name_columns (`Collection[str]`, *optional*): Columns of tables with names of classes or groups, such as `007`, which are kept
            as they are written; default: those with the usual names of classes.
        caption_columns (`Sequence[str]`, *optional*): Columns of texts. `"txt"`: the `.txt` beside each image, of the same name, which
            several images of that name share.
        condition_column (`str`, *optional*): A column of metadata with names of files, to be read as images.
        flag (`str`, *optional*): The setting that named the folder, for messages.

    Raises:
        UserError: For a mixture of kinds of files, for images beside class folders, and if nothing can be streamed.
    """
    found = survey(folder)
    pictures, arrays = found.pictures, found.arrays
    if streaming and found.shards:
        return _stream_shards(*_inside(folder, found.shards), with_labels)
    if found.tables and not pictures + arrays + found.archives:
        return load_tables(folder, found.tables, streaming=streaming, name_columns=name_columns)
    if streaming:
        raise UserError(
            f"`{flag}` {folder} holds no webdataset (.tar) files. Leave `streaming` out to read a "
            "folder file by file. For Parquet files give `dataset_name FOLDER`."
        )
    metadata = [Metadata(path, (folder / path).read_bytes()) for path in found.metadata]
    if pictures or arrays:
        entries = _loose_entries(folder, found, "txt" in caption_columns)
    elif found.archives:
        found.left_out.update(dict.fromkeys(found.tables, _NO_METADATA))
        entries, packed = _packed_entries(folder, found, "txt" in caption_columns)
        metadata += packed
    if not (pictures or arrays or found.archives) or not entries:
        raise UserError(
            f"`{flag}` {folder} cannot be loaded: it holds no images{_listed(found.left_out, ': ')}. Pictures, `.npy` arrays, "
            "`.tar` and `.zip` archives, and Parquet, CSV and JSON tables are read."
        )
    _say_left_out(folder, found.left_out)
    roots = [PurePosixPath(each.as_posix()) for each in (folder.absolute(), folder.resolve())]
    metadata = [
        replace(each, name_columns=name_columns, caption_columns=caption_columns, roots=roots) for each in metadata
    ]
    names = _names_of(entries)
    files = {entry.file: entry.image for entry in entries}
    named = named_files(metadata, names)
    if named:
        logger.info(
            "%d images in %s are no images of their own: metadata names them in other columns", len(named), folder
        )
    entries = [entry for entry in entries if entry.file not in named]
    if pictures or arrays:
        _check_kinds(folder, [entry.place for entry in entries])
    return _rows_of(folder, entries, metadata, found, with_labels, condition_column, files, names)


def _loose_entries(folder: Path, found: Survey, has_texts: bool) -> list[Entry]:
    """The files that lie in a folder, with the text beside each if `has_texts`. Archives and tables beside them are left out."""
    loose = found.pictures + found.arrays
    folders = {path.parent for path in loose}
    beside = {each.parent for each in folders if each.name}
    for path in found.archives:
        is_class = path.parent in beside and path.with_suffix("") not in folders
        found.left_out[path] = _BESIDE_CLASSES if is_class else "archives beside images"
    found.left_out.update(dict.fromkeys(found.tables, _NO_METADATA))
    texts = _texts_by_image(found.left_out) if has_texts else {}
    entries = [
        Entry(
            path,
            {"bytes": None, "path": column_path(str(folder.absolute() / path))},
            _text_beside(folder, _text_of(texts, path)),
            path,
        )
        for path in loose
    ]
    for path in loose:
        found.left_out.pop(_text_of(texts, path), None)
    return entries


def _say_left_out(folder: Path, left_out: dict[PurePosixPath, str]) -> None:
    """Logs the files that are left out, as a warning if images or tables are among them."""
    if not left_out:
        return
    is_loss = not {_READ_ALREADY, _DEAD, _BESIDE_CLASSES}.isdisjoint(left_out.values())
    is_loss |= any(_is_image(path) or path.suffix.lower() in TABLES for path in left_out)
    logger.log(logging.WARNING if is_loss else logging.INFO, "left out of %s%s", folder, _listed(left_out, ": "))


def _names_of(entries: list[Entry]) -> dict[PurePosixPath, PurePosixPath | None]:
    """The file that a table means by a name: the file's own, or its place. None for a place that several archives have."""
    names: dict[PurePosixPath, PurePosixPath | None] = {}
    for entry in entries:
        names[entry.place] = entry.file if names.get(entry.place, entry.file) == entry.file else None
    return names | {entry.file: entry.file for entry in entries}


def _check_kinds(folder: Path, places: list[PurePosixPath]) -> None:
    """Raises `UserError` for pictures beside arrays."""
    arrays = [place for place in places if place.suffix.lower() == ".npy"]
    pictures = [place for place in places if place.suffix.lower() != ".npy"]
    if pictures and arrays:
        raise UserError(
            f"{folder} holds pictures ({len(pictures)}, such as {pictures[0]}) and arrays ({len(arrays)}, such as {arrays[0]}). "
            "Move one kind to another folder."
        )


def survey(folder: Path) -> Survey:
    r"""
    Lists the files in a folder. Hidden folders and those of runs are skipped, their images count as left out. Each folder counts once,
    whatever links lead to it.
    """
    found = Survey()
    for root, inside, folders, names in _walk(folder, found):
        if OWNER in names and DRAWN not in names and inside != PurePosixPath():
            folders.clear()
            found.left_out.update(dict.fromkeys(_images_below(folder, inside), _OF_A_RUN))
            continue
        for name in [name for name in folders if name.startswith(UNSEEN)]:
            folders.remove(name)
            found.left_out.update(dict.fromkeys(_images_below(folder, inside / name), _IN_UNSEEN))
        for name in names:
            path = inside / name
            suffix = path.suffix.lower()
            if suffix in SUFFIXES or (suffix in HEIF_SUFFIXES and reads_heif()):
                kind = found.pictures
            elif suffix == ".npy":
                kind = found.arrays
            elif suffix in (".tar", ".zip"):
                kind = found.archives
            elif name in METADATA:
                kind = found.metadata
            elif suffix in TABLES:
                kind = found.tables
            else:
                is_dead = not name.startswith(".") and not os.path.exists(os.path.join(root, name))
                found.left_out[path] = _DEAD if is_dead else _reason(path)
                continue
            if name.startswith("."):
                found.left_out[path] = "hidden"
            elif _is_special(os.path.join(root, name)):
                found.left_out[path] = "devices or pipes"
            else:
                kind.append(path)
    for kind in (found.pictures, found.arrays, found.archives, found.metadata, found.tables):
        kind.sort(key=str)  # as `datasets` has them
    return found


def _walk(folder: Path, found: Survey) -> Iterator[tuple[str, PurePosixPath, list[str], list[str]]]:
    """As `os.walk`, with the path inside the folder. Links are followed last, if they lead to folders that no other way leads to."""
    waiting, visited = [str(folder)], set()
    for start in waiting:
        for root, folders, names in os.walk(start, onerror=_refuse, followlinks=True):
            inside, target = PurePosixPath(Path(root).relative_to(folder).as_posix()), os.path.realpath(root)
            if target in visited:
                folders.clear()
                found.left_out[inside] = _READ_ALREADY
                continue
            visited.add(target)
            yield root, inside, folders, names  # whoever takes it removes folders that are not to be seen
            links = [name for name in sorted(folders) if os.path.islink(os.path.join(root, name))]
            waiting += [os.path.join(root, name) for name in links]
            folders[:] = sorted(set(folders).difference(links))


def _refuse(error: OSError) -> None:
    """Raises `UserError` for a folder that cannot be listed. Of a disk's own `lost+found` nobody expects images."""
    if os.path.basename(error.filename) != "lost+found":
        raise UserError(
            f"the folder {error.filename} cannot be read ({error.strerror}), so its images would be missing. Change its permissions, or "
            "move it elsewhere."
        ) from None


def _images_below(folder: Path, inside: PurePosixPath) -> list[PurePosixPath]:
    """The images in a folder inside another, of which links are not followed."""
    paths = (Path(root, name) for root, _, names in os.walk(folder / inside) for name in names)
    return [path for path in (PurePosixPath(path.relative_to(folder).as_posix()) for path in paths) if _is_image(path)]


def contents_of(folder: Path) -> str:
    r"""The files in a folder, in words: `3 .parquet, 1 .md`."""
    found = survey(folder)
    paths = [*found.pictures, *found.arrays, *found.archives, *found.metadata, *found.tables, *found.left_out]
    counts = Counter(path.suffix.lower() or path.name for path in paths)
    return ", ".join(f"{count} {suffix}" for suffix, count in counts.most_common(8)) or "no files"


def _reason(path: PurePosixPath) -> str:
    suffix = path.suffix.lower()
    if suffix in HEIF_SUFFIXES:
        return f"they need `{INSTALL_HEIF}`"
    if suffix in OTHER_SUFFIXES:
        return "pictures of a format that is not read"
    if path.name.lower().endswith((".tar.gz", ".tgz", ".tar.bz2", ".tar.xz", ".7z", ".rar", ".gz")):
        return "archives that have to be unpacked"
    return "no images"


def _is_image(path: PurePosixPath) -> bool:
    suffix = path.suffix.lower()
    return not path.name.startswith(".") and (
        suffix in SUFFIXES or suffix in HEIF_SUFFIXES or suffix in OTHER_SUFFIXES or suffix == ".npy"
    )


def _texts_by_image(paths: Iterable[PurePosixPath]) -> dict[PurePosixPath, PurePosixPath]:
    """The `.txt` of each path without its suffix."""
    return {path.with_suffix(""): path for path in paths if path.suffix.lower() == ".txt"}


def _text_of(texts: Mapping[PurePosixPath, Any], image: PurePosixPath) -> Any:
    """The text of an image: `0.txt` or `0.png.txt` of `0.png`."""
    return texts.get(image.with_suffix(""), texts.get(image))


def _text_beside(folder: Path, text: PurePosixPath | None) -> dict[str, str]:
    """The column `txt` of an image; empty if no text lies beside it."""
    if text is None or _is_special(str(folder / text)):
        return {}
    return _caption(str(folder / text), (folder / text).read_bytes)


def _caption(name: str, read: Callable[[], bytes]) -> dict[str, str]:
    try:
        return {"txt": decode_text(read())}
    except ValueError as error:
        raise UserError(f"the caption {name} cannot be read: {error}.") from None


def _listed(left_out: dict[PurePosixPath, str], before: str) -> str:
    """`: 12 .heic (they need ...), 3 .txt (no images)`, most frequent first."""
    counts = Counter((path.suffix.lower() or path.name, reason) for path, reason in left_out.items())
    parts = [f"{count} {suffix} ({reason})" for (suffix, reason), count in counts.most_common()]
    if len(parts) > 12:
        parts[11:] = [f"and files of {len(parts) - 11} other kinds"]
    return before + ", ".join(parts) if parts else ""


def _is_special(path: str) -> bool:
    """Whether a file is a device or the like, which may never end. (The reader reports files that cannot be read.)"""
    try:
        return not stat.S_ISREG(os.stat(path).st_mode)
    except OSError:
        return False


def _inside(folder: Any, files: list[PurePosixPath]) -> tuple[Any, list[PurePosixPath]]:
    """Strips the folders that all files share, such as `data/`; only folders below them give splits or classes."""
    shared = PurePosixPath(os.path.commonpath([path.parent for path in files]))
    return folder / shared, [path.relative_to(shared) for path in files]


def _split_folders(paths: list[PurePosixPath], folder: Path) -> dict[str, str]:
    """
    The top folders that are splits, and which. None unless all top folders with images are splits, and one is for training. A name
    such as `val2017` or `birds_train_HR` counts if all have such names, with different splits: it may be the class `steam train`.
    """
    tops = sorted({path.parts[0] if len(path.parts) > 1 else "" for path in paths})
    splits = {top: SPLITS[top.lower()] for top in tops if top.lower() in SPLITS}
    if len(splits) < len(tops):
        words = {top: splits_in(top) for top in tops}
        by_word = {top: found.pop() for top, found in words.items() if len(found) == 1}
        if len(by_word) == len(tops) and len(set(by_word.values())) > 1 and "train" in by_word.values():
            if len(set(by_word.values())) < len(tops):
                raise UserError(
                    f"{folder} holds {', '.join(tops[:8])}, which look like splits, several of them {_most_common(by_word)}. Give the "
                    "folder of one split as `train_data_dir`, or move the images of each split into one folder: `train`, `val`, `test`."
                )
            splits = by_word
    if "train" not in splits.values():
        if len(splits) == len(tops) > 1 and all(len(path.parts) > 2 for path in paths):
            raise UserError(
                f"{folder} holds {', '.join(tops)}, which look like splits, but none is for training. Call one `train`, or give one of "
                "them as `train_data_dir`."
            )
        return {}
    if len(splits) == len(tops):
        return splits
    has_classes = all(len(path.parts) > 2 for path in paths if splits.get(path.parts[0]) == "train")
    if len(splits) > 1 or has_classes:  # "train" alone may be the class of trains
        others = [top or "images" for top in tops if top not in splits]
        raise UserError(
            f"{folder} holds {', '.join(splits)}, which look like splits, but also {', '.join(others[:5])}. Move the latter "
            "elsewhere, or give the folder of one split as `train_data_dir`."
        )
    return {}


def _most_common(splits: dict[str, str]) -> str:
    return Counter(splits.values()).most_common(1)[0][0]


def _archive_folders(archives: list[PurePosixPath]) -> list[PurePosixPath]:
    """
    The folders that the names of archives stand for: a split, by a word as in `birds-train-0001.tar`; or a class, if the names
    differ by more than a number.
    """
    words = [splits_in(path.stem) for path in archives]
    splits = [found.pop() if len(found) == 1 else None for found in words]
    if "train" in splits and None not in splits:
        return [PurePosixPath(split) for split in splits]
    names = [re.sub(r"[-_. ]*\d+$", "", path.stem) for path in archives]
    if len(set(names)) > 1 and all(names):
        return [path.parent / name for path, name in zip(archives, names, strict=True)]
    return [path.parent for path in archives]


def _packed_entries(folder: Path, found: Survey, with_texts: bool) -> tuple[list[Entry], list[Metadata]]:
    """The images in archives, with the texts beside them, and the metadata tables in or beside these."""
    entries, metadata, shards, folders = [], [], [], _archive_folders(found.archives)
    if _split_folders(found.archives, folder):
        folders = [path.parent for path in found.archives]
    for path, inside in zip(found.archives, folders, strict=True):
        archive = folder.absolute() / path
        members, used, texts = members_of(archive), set(), {}
        if path in found.shards:
            shards.append((archive, members))
            for place, columns in samples_of(archive, members):
                name = f"{place}.image"
                entries.append(Entry(inside / name, columns.get("image"), columns, path / name))
            used = {member for member in members if is_picture(member.name)}
        elif with_texts:
            by_place = {member.place: member for member in members}
            texts = {image: by_place[text] for image, text in _texts_by_image(by_place).items()}
            pictures = [member.place for member in members if is_picture(member.name)]
            images = {*pictures, *(picture.with_suffix("") for picture in pictures)}
            texts = {image: text for image, text in texts.items() if image in images}
            used = set(texts.values())
        for member in members:
            place = inside / member.place
            is_unseen = any(part.startswith(UNSEEN) for part in member.place.parts)
            if member in used or (is_unseen and not _is_image(member.place)):
                continue
            elif is_unseen:
                found.left_out[place] = _IN_UNSEEN
            elif is_picture(member.name):
                image, text = _packed(archive, member), _text_of(texts, member.place)
                columns = {} if text is None else _packed_text(archive, text)
                entries.append(Entry(place, image, columns, path / member.place))
            elif member.place.name in METADATA and path not in found.shards:
                metadata.append(Metadata.of_member(path / member.place, archive, member))
            elif member.place.name in METADATA:
                found.left_out[place] = "tables in a .tar are not read: pack images with a table as .zip"
            elif path not in found.shards or _is_image(member.place):
                found.left_out[place] = _reason(place)
    warn_of_lone_files(shards)
    return entries, metadata


def _packed(archive: Path, member: Member) -> dict[str, Any]:
    """The value of an image column for a member of an archive."""
    return {"bytes": None, "path": packed_path(str(archive), member.name, member.size, member.offset)}


def _packed_text(archive: Path, text: Member) -> dict[str, str]:
    """The column `txt` of an image in an archive."""
    return _caption(f"{text.name} of {archive}", lambda: read_content(_packed(archive, text)) if text.size else b"")


def load_shards(shards: dict[str, list[Path]], *, streaming: bool = False) -> Splits:
    r"""
    The samples of a webdataset whose splits are known. Each has its picture in `image`, whatever the suffix, and what lies beside
    it in other columns, such as `cls`.

    Args:
        shards (`dict[str, list[Path]]`): Files (.tar) of each split.
        streaming (`bool`, *optional*): Read them as they come.

    Raises:
        UserError: If one is damaged, or there are no images.
    """
    if streaming:
        return _streams_of({split: list(map(str, paths)) for split, paths in shards.items()})
    members = {path: members_of(path) for paths in shards.values() for path in paths}
    warn_of_lone_files(members.items())
    samples = {
        split: [columns for path in paths for _, columns in samples_of(path, members[path])]
        for split, paths in shards.items()
    }
    features = columns_features(columns for rows in samples.values() for columns in rows)
    _require_images(features, next(iter(shards.values()))[0])
    return {
        split: datasets.Dataset.from_dict(
            {name: [fitted(row.get(name), feature) for row in rows] for name, feature in features.items()},
            features=features,
        )
        for split, rows in samples.items()
    }


def _stream_shards(folder: Path, shards: list[PurePosixPath], with_labels: bool) -> Splits:
    of_folder, of_name = _split_folders(shards, folder), _archive_folders(shards)
    names = [
        of_folder.get(path.parts[0]) or (str(name) if str(name) in SPLITS.values() else None)
        for path, name in zip(shards, of_name, strict=True)
    ]
    if None in names or "train" not in names:
        names = ["train"] * len(shards)
    data_files: dict[str, list[str]] = {}
    for split, path in zip(names, shards, strict=True):
        data_files.setdefault(split, []).append(str(folder / path))
    streams = _streams_of(data_files)
    if with_labels and set(streams["train"].features) == {"image"}:
        _refuse_classes_of_stream(folder, [path for path in shards if str(folder / path) in data_files["train"]])
    return streams


def _streams_of(shards: dict[str, list[str]]) -> Splits:
    """One of each split, with the columns of the first."""
    paths = [Path(path) for path in shards.get("train") or next(iter(shards.values()))]
    features = stream_features(paths)
    _require_images(features, paths[0])
    return {
        split: datasets.IterableDataset.from_generator(
            streamed_samples, features=features, gen_kwargs={"shards": files, "features": features}
        )
        for split, files in shards.items()
    }


def _require_images(features: datasets.Features, shard: Path) -> None:
    if not any(isinstance(feature, datasets.Image) for feature in features.values()):
        raise UserError(f"{shard} holds no images that are read.")


def _refuse_classes_of_stream(folder: Path, shards: list[PurePosixPath]) -> None:
    """Refuses shards with folders: those are classes, and a stream would have to read all shards to know them."""
    places = [PurePosixPath(place) for place, _ in samples_of(folder / shards[0], members_of(folder / shards[0]))]
    tops = sorted({place.parts[0] for place in places if len(place.parts) > 1})
    if len(tops) > 1 or (len(tops) == 1 and len(shards) > 1 and len(places) == sum(len(p.parts) > 1 for p in places)):
        raise UserError(
            f"{folder / shards[0]} holds folders ({', '.join(tops[:5])}), which may be classes, but a stream cannot count them in "
            "advance. Leave `streaming` out, or train without classes: `label_column none`."
        )


def _rows_of(
    folder: Path,
    entries: list[Entry],
    metadata: list[Metadata],
    found: Survey,
    with_labels: bool,
    condition_column: str | None,
    files: dict[PurePosixPath, dict[str, Any] | None],
    names: dict[PurePosixPath, PurePosixPath | None],
) -> Splits:
    """
    The rows of each split, with classes and the columns of metadata tables, one of which may name some of the `files` by their
    `names`.
    """
    shared, places = _inside(PurePosixPath(), [entry.place for entry in entries])
    split_folders = _split_folders(places, folder)
    described = read_metadata(
        metadata,
        folder,
        dict.fromkeys(entry.file for entry in entries),
        names,
        required=with_labels,
        condition_column=condition_column,
    )
    if described is None:  # of several images a row
        return _load_described(folder, found.pictures + found.metadata)
    splits: dict[str, list[tuple[PurePosixPath, Entry, int | None]]] = {}
    for place, entry in zip(places, entries, strict=True):
        rows = splits.setdefault(split_folders.get(place.parts[0], "train"), [])
        rows += [(place, entry, number) for number in described.rows.get(entry.file, [None])]
    has_labels = with_labels and not any("cls" in entry.columns for entry in entries)
    labels = _classes_of(splits, _level_of_classes(places, split_folders), folder, shared, found) if has_labels else {}
    columns = columns_features(entry.columns for entry in entries)
    columns = {name: feature for name, feature in columns.items() if name != "image"}
    loaded = {}
    for split, rows in splits.items():
        if labels and split not in labels:
            continue
        features, data = datasets.Features(columns), {}
        if any(entry.image is not None for entry in entries):  # else a sample has several and the flag chooses
            features = datasets.Features({"image": datasets.Image(decode=False), **columns})
            data["image"] = [entry.image for _, entry, _ in rows]
        for name, feature in columns.items():
            data[name] = [fitted(entry.columns.get(name), feature) for _, entry, _ in rows]
        loaded[split] = _with_table(datasets.Dataset.from_dict(data, features=features), described.table, rows)
        if described.conditions is not None:
            values = [_file_of(described, number, files, folder) for _, _, number in rows]
            feature = datasets.Image(decode=False)
            loaded[split] = loaded[split].add_column(condition_column, values, feature=feature)
        if labels:
            classes, ids = labels[split]
            name = "label" if "label" not in loaded[split].features else "class_folder"
            loaded[split] = loaded[split].add_column(name, ids, feature=datasets.ClassLabel(names=classes))
    return loaded


def _file_of(
    described: Described, number: int | None, files: dict[PurePosixPath, dict[str, Any] | None], folder: Path
) -> dict[str, Any] | None:
    """The file that a row of metadata names as its condition; None if it names none."""
    place = None if number is None else described.conditions[number]
    if place is not None and place not in files:
        raise UserError(
            f"`condition_column` names {place}, which is no image in {folder}. Paths are relative to the table's folder."
        )
    return None if place is None else files[place]


def _with_table(rows: datasets.Dataset, table: pa.Table | None, numbers: list[tuple[Any, Any, int | None]]):
    """Adds the columns of metadata; they are empty for images that no table names."""
    if table is None:
        return rows
    taken = datasets.Dataset(table.take(pa.array([number for *_, number in numbers], pa.int64())))
    taken = taken.rename_columns({name: f"metadata.{name}" for name in taken.features if name in rows.features})
    return datasets.concatenate_datasets([rows, taken], axis=1)


def _load_described(folder: Path, files: list[PurePosixPath]) -> Splits:
    """Loads pictures with tables in which a row names several."""
    folder, files = _inside(folder, files)
    data_files: dict[str, list[str]] = {}
    for top, split in _split_folders(files, folder).items() or [("", "train")]:
        data_files.setdefault(split, []).append(f"{glob.escape(str((folder / top).resolve()))}/**")
    return datasets.load_dataset("imagefolder", data_files=data_files)


def _level_of_classes(places: list[PurePosixPath], split_folders: dict[str, str]) -> int:
    """
    How many folders lie above those of classes: none, or that of the split and those below it that all its images share, if these are
    called alike in all splits (`train/images`, `test/images`) or like the split (`train/train`).
    """
    level = 1 if split_folders else 0
    while split_folders:
        names: dict[str, set[str]] = {}
        for place in places:
            names.setdefault(place.parts[0], set()).add(place.parts[level] if len(place.parts) > level + 1 else "")
        every = set().union(*names.values())
        is_split = all(set().union(*map(splits_in, of)) == {split_folders[top]} for top, of in names.items())
        if "" in every or any(len(of) > 1 for of in names.values()) or (len(every) > 1 and not is_split):
            break
        level += 1
    return level


def _classes_of(
    splits: dict[str, list[tuple[PurePosixPath, Entry, Any]]], below: int, folder: Path, shared: PurePosixPath, found: Survey
) -> dict[str, tuple[list[str], list[int]]]:  # fmt: skip
    """
    Classes and labels of each split: the folder with this number of others above it. Empty with fewer than two classes.
    """
    names = {
        split: [place.parts[below] if len(place.parts) > 1 + below else "" for place, *_ in rows]
        for split, rows in splits.items()
    }
    classes = class_order({name for of_split in names.values() for name in of_split} - {""})
    _warn_of_unread(found, classes, below + len(shared.parts), folder)
    if len(classes) < 2 or not any(names["train"]):
        return {}
    _say_folders_below([place for rows in splits.values() for place, *_ in rows], below, folder)
    shown = [os.fsencode(name).decode(errors="replace") for name in classes]
    ids, labels = {name: number for number, name in enumerate(classes)}, {}
    for split, of_split in names.items():
        if "" not in of_split:
            labels[split] = (shown, [ids[name] for name in of_split])
        elif split != "train" and not any(of_split):
            logger.warning("the split %r of %s has no class folders and is left out", split, folder)
        else:
            stray = splits[split][of_split.index("")][0]
            raise UserError(
                f"{folder} has class folders ({', '.join(shown[:5])}{', ...' if len(shown) > 5 else ''}), and {of_split.count('')} "
                f"images beside them, such as {stray}. Move those into a class folder or elsewhere, or train without classes: "
                "`label_column none`."
            )
    return labels


def _say_folders_below(places: list[PurePosixPath], level: int, folder: Path) -> None:
    """Says if the folders of classes are divided alike, such as `batch0/cat` and `batch1/cat`: those below may be meant."""
    below: dict[str, set[str]] = {}
    for place in places:
        if len(place.parts) > level + 2:
            below.setdefault(place.parts[level + 1], set()).add(place.parts[level])
    alike = sorted(name for name, classes in below.items() if len(classes) > 1)
    if len(alike) > 1:
        logger.info(
            "the folders %s of %s are the classes, and %d folders below them, such as %s, are called alike in several. If those are the "
            "classes, or splits, move them to the top.",
            ", ".join(sorted(below[alike[0]])[:3]), folder, len(alike), ", ".join(alike[:3]),
        )  # fmt: skip


def _warn_of_unread(found: Survey, classes: list[str], level: int, folder: Path) -> None:
    """Warns about folders that would be classes if their pictures could be read."""
    unread: dict[str, dict[PurePosixPath, str]] = {}
    for path, reason in found.left_out.items():
        if _is_image(path) and len(path.parts) > level + 1 and path.parts[level] not in classes:
            unread.setdefault(path.parts[level], {})[path] = reason
    for name, files in unread.items():
        logger.warning("no class %r: none of its files in %s is read%s", name, folder, _listed(files, ": "))
