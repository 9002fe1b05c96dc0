"""A warning where the masks of images would be learnt as images."""

import logging
import re
from collections import defaultdict
from pathlib import PurePosixPath

import datasets
import pyarrow as pa
import pyarrow.compute as pc

from dae_diffusers.data.contents import place_of

logger = logging.getLogger(__name__)

_NAMES = (
    "masks?|seg|segmentations?|segmentationclass|segmentationobject|labels?|labelids|annotations?|annot|gt|groundtruth|ground_truth|"
    "depths?|edges?|trimaps?|mattes?|normals"
)
# Folders beside one of masks; any other folder may be another class.
_IMAGES = re.compile(r"(?:jpe?g|png)?images?|imgs?|photos?|pictures?|rgb|colou?r|inputs?|originals?|raw", re.IGNORECASE)
_FOLDER = re.compile(rf"(?:{_NAMES})", re.IGNORECASE)
_STEM = re.compile(rf"(?P<image>.+)[._ -](?:{_NAMES})", re.IGNORECASE)
_LIKELY = rf"(^|/)({_NAMES})/|[._ -]({_NAMES})\.[^./]"  # paths of which one of the two may hold


def warn_of_masks(rows: datasets.Dataset, column: str) -> None:
    r"""
    Warns if some of the files look like masks of others: `0001_mask.png` beside `0001.jpg`, or `masks/train/0001.png` beside
    `images/train/0001.jpg`, also in archives.

    Args:
        rows (`datasets.Dataset`): The rows of the images.
        column (`str`): Their column.
    """
    images = rows.data.column(column)
    if not pa.types.is_struct(images.type):
        return
    names = pc.unique(pc.struct_field(images, "path")).drop_null()
    if not pc.any(pc.match_substring_regex(names, _LIKELY, ignore_case=True)).as_py():
        return  # soon, also for a million files
    paths = [PurePosixPath(place_of(path)) for path in names.to_pylist() if path]
    places = defaultdict(list)
    for path in paths:
        places[path.stem].append(path)
    masks = [(path, image) for path in paths if (image := _image_of(path, places)) is not None]
    if len(masks) < max(2, len(paths) / 20):
        return
    mask, image = masks[0]
    logger.warning(
        "%d of %d images look like masks of others, such as %s of %s, and would be learnt as images. Move them elsewhere. To draw images "
        "from them, name them in a column of a metadata table and pass `--condition_column`.",
        len(masks), len(paths), mask, image,
    )  # fmt: skip


def _image_of(path: PurePosixPath, places: dict[str, list[PurePosixPath]]) -> PurePosixPath | None:
    """The file whose mask a file is, by its name. `places`: files by the stem of their names."""
    folders, named = path.parts[:-1], _STEM.fullmatch(path.stem)
    is_in_folder = bool(folders) and bool(_FOLDER.fullmatch(folders[-1]))
    for other in places.get(named["image"], []) if named else []:
        if other.parent == path.parent or is_in_folder:
            return other
    for number in [number for number, name in enumerate(folders) if _FOLDER.fullmatch(name)]:
        above, below = folders[:number], folders[number + 1 :]
        for other in places[path.stem]:
            others = other.parts[:-1]
            if others == above + below:  # the masks lie in a folder of their own inside the images'
                return other
            is_beside = len(others) == len(folders) and others[:number] + others[number + 1 :] == above + below
            if is_beside and _IMAGES.fullmatch(others[number]):
                return other
    return None
