"""Folders of pictures, arrays or webdataset shards: what their layout says of splits and classes."""

import glob
import logging
import os
import re
import stat
from pathlib import Path, PurePosixPath

import datasets
from datasets.packaged_modules.imagefolder.imagefolder import ImageFolder

from dae_diffusers.errors import UserError

logger = logging.getLogger(__name__)

# Names of folders, and words in the names of shards, to splits.
SPLITS = {
    **dict.fromkeys(("train", "training"), "train"),
    **dict.fromkeys(("validation", "valid", "val", "dev"), "validation"),
    **dict.fromkeys(("test", "testing", "eval", "evaluation"), "test"),
}
_PICTURES = frozenset(ImageFolder.EXTENSIONS)
_METADATA = tuple(ImageFolder.METADATA_FILENAMES)

Splits = dict[str, datasets.Dataset | datasets.IterableDataset]


def load_folder(folder: Path, *, streaming: bool = False, with_labels: bool = True) -> Splits:
    r"""
    Loads the images of a folder. What lies in the folders `train`, `validation` and `test` at its top are splits, if those
    are its only folders with images and `train` is among them; folders below are classes, whatever they are called. Folders
    that all images lie in say nothing.

    Args:
        folder (`Path`): With pictures, with `.npy` arrays, or with `.tar` shards.
        streaming (`bool`, *optional*): Read shards as they come.
        with_labels (`bool`, *optional*): Take the folders for classes.

    Raises:
        UserError: For a mixture of kinds, for images beside class folders, and if nothing can be streamed.
    """
    pictures, arrays, shards, metadata = _survey(folder)
    if shards and (streaming or not pictures + arrays):
        return _load_shards(*_inside(folder, shards), streaming)
    if streaming:
        raise UserError(
            f"`--train_data_dir` {folder} holds no webdataset (.tar) files. Other folders are read file by file as it "
            "is: leave `--streaming` out. Parquet files: `--dataset_name FOLDER`."
        )
    if pictures and arrays:
        raise UserError(
            f"{folder} holds pictures ({len(pictures)}, such as {pictures[0]}) and arrays ({len(arrays)}, such as {arrays[0]}). "
            "Put one kind elsewhere."
        )
    if arrays:
        return _load_files(*_inside(folder, arrays), with_labels)
    if metadata:
        return _load_described(*_inside(folder, pictures + metadata))
    if pictures:
        return _load_files(*_inside(folder, pictures), with_labels)
    return datasets.load_dataset("imagefolder", data_dir=str(folder))  # archives; or nothing, which it says


def _survey(folder: Path) -> tuple[list[PurePosixPath], ...]:
    """
    Pictures, arrays, shards and tables of metadata, relative to the folder and sorted. Hidden files and devices do not count;
    linked folders do, once each.
    """
    pictures, arrays, shards, metadata = found = ([], [], [], [])
    visited = {os.path.realpath(folder)}
    for root, folders, names in os.walk(folder, followlinks=True):
        folders[:] = sorted(name for name in folders if not name.startswith((".", "__")))
        for name in [name for name in folders if os.path.islink(os.path.join(root, name))]:
            target = os.path.realpath(os.path.join(root, name))
            if target in visited:
                folders.remove(name)
            visited.add(target)
        inside = PurePosixPath(Path(root).relative_to(folder).as_posix())
        for name in names:
            suffix = PurePosixPath(name).suffix.lower()
            if name in _METADATA:
                kind = metadata
            elif suffix in _PICTURES:
                kind = pictures
            elif suffix == ".npy":
                kind = arrays
            elif suffix == ".tar":
                kind = shards
            else:
                continue
            if not name.startswith(".") and not _is_special(os.path.join(root, name)):
                kind.append(inside / name)
    return tuple(sorted(kind, key=str) for kind in found)  # as `datasets` has them


def _is_special(path: str) -> bool:
    """Whether it is a device or the like, which may never end; a file that cannot be read is for the reader to name."""
    try:
        return not stat.S_ISREG(os.stat(path).st_mode)
    except OSError:
        return False


def _inside(folder: Path, files: list[PurePosixPath]) -> tuple[Path, list[PurePosixPath]]:
    """Without the folders that all files share, such as `data/`: what says something lies below."""
    shared = PurePosixPath(os.path.commonpath([path.parent for path in files]))
    return folder / shared, [path.relative_to(shared) for path in files]


def _split_folders(paths: list[PurePosixPath], folder: Path) -> dict[str, str]:
    """The folders at the top that are splits, and which; none unless all with images are, and one is for training."""
    tops = sorted({path.parts[0] if len(path.parts) > 1 else "" for path in paths})
    splits = {top: SPLITS[top.lower()] for top in tops if top.lower() in SPLITS}
    if "train" not in splits.values():
        return {}
    if len(splits) == len(tops):
        return splits
    has_classes = all(len(path.parts) > 2 for path in paths if splits.get(path.parts[0]) == "train")
    if len(splits) > 1 or has_classes:  # "train" alone may be the class of trains
        others = [top or "images" for top in tops if top not in splits]
        raise UserError(
            f"{folder} holds {', '.join(splits)}, which look like splits, and beside them {', '.join(others[:5])}. Move those "
            "elsewhere, or give the folder of one split as `--train_data_dir`."
        )
    return {}


def _load_shards(folder: Path, shards: list[PurePosixPath], streaming: bool) -> Splits:
    """Shards name their split by their folder, or by one word as in `birds-train-0001.tar`."""
    of_folder = _split_folders(shards, folder)
    splits = []
    for path in shards:
        words = {SPLITS[word] for word in re.findall("[a-z]+", path.stem.lower()) if word in SPLITS}
        splits.append(of_folder.get(path.parts[0]) or (words.pop() if len(words) == 1 else None))
    if None in splits or "train" not in splits:
        splits = ["train"] * len(shards)
    data_files: dict[str, list[str]] = {}
    for split, path in zip(splits, shards, strict=True):
        data_files.setdefault(split, []).append(glob.escape(str(folder / path)))
    return datasets.load_dataset("webdataset", data_files=data_files, streaming=streaming)


def _load_files(folder: Path, files: list[PurePosixPath], with_labels: bool) -> Splits:
    split_folders = _split_folders(files, folder)
    paths: dict[str, list[PurePosixPath]] = {}
    for path in files:
        paths.setdefault(split_folders.get(path.parts[0], "train"), []).append(path)
    features = datasets.Features({"image": datasets.Image(decode=False)})
    splits = {}
    for split, of_split in paths.items():
        column = [{"bytes": None, "path": str(folder.absolute() / path)} for path in of_split]
        splits[split] = datasets.Dataset.from_dict({"image": column}, features=features)
    return _with_classes(splits, paths, bool(split_folders), folder) if with_labels else splits


def _load_described(folder: Path, files: list[PurePosixPath]) -> Splits:
    """Pictures with tables that say what belongs to each (`metadata.csv` or `.jsonl`)."""
    data_files: dict[str, list[str]] = {}
    for top, split in _split_folders(files, folder).items() or [("", "train")]:
        data_files.setdefault(split, []).append(f"{glob.escape(str((folder / top).resolve()))}/**")
    return datasets.load_dataset("imagefolder", data_files=data_files)


def _with_classes(
    splits: Splits, paths: dict[str, list[PurePosixPath]], has_split_folders: bool, folder: Path
) -> Splits:
    """With a column of labels: the first folder, or the first below that of the split; none without two classes."""
    names = {
        split: [path.parts[has_split_folders] if len(path.parts) > 1 + has_split_folders else "" for path in of_split]
        for split, of_split in paths.items()
    }
    classes = sorted({name for of_split in names.values() for name in of_split} - {""})
    if len(classes) < 2 or not any(names["train"]):
        return splits
    ids, labelled = {name: number for number, name in enumerate(classes)}, {}
    for split, of_split in names.items():
        if "" not in of_split:
            column = [ids[name] for name in of_split]
            labelled[split] = splits[split].add_column("label", column, feature=datasets.ClassLabel(names=classes))
        elif split != "train" and not any(of_split):
            logger.warning("the split %r of %s has no class folders and is left out", split, folder)
        else:
            stray = paths[split][of_split.index("")]
            raise UserError(
                f"{folder} has class folders ({', '.join(classes[:5])}{', ...' if len(classes) > 5 else ''}), and {of_split.count('')} "
                f"images beside them, such as {stray}. Move those into a class folder or elsewhere, or train without classes: "
                "`--label_column none`."
            )
    return labelled
