"""Looks at a sample of the images before training, and warns of what is likely wrong with their values and files."""

import logging
import math

from dae_diffusers.data.arrays import RANGES, decode_array, find_depth
from dae_diffusers.data.contents import read_content
from dae_diffusers.data.dataset import ImageDataset, choose_indices
from dae_diffusers.data.images import count_pages
from dae_diffusers.data.ranges import ValueSurvey
from dae_diffusers.errors import UserError

logger = logging.getLogger(__name__)

# How many pictures (for their depth) and 16-bit files (for their values) are inspected before training.
LOOKED_AT = 64


def inspect(images: ImageDataset, measured: ValueSurvey | None = None, *, is_given: bool) -> list[str]:
    r"""
    Warns if the range of values does not suit the images, if only their first page is used, or if their condition images are dark.

    Args:
        images ([`ImageDataset`]): The training images, or of a stream those that validate.
        measured ([`~dae_diffusers.data.ranges.ValueSurvey`], *optional*): That of all images, if the range comes from it.
        is_given (`bool`): Whether the settings or a trained model gave the range.

    Returns:
        `list[str]`: The warnings about the range of values that was measured or is compared with sampled images.
    """
    sample = choose_indices(len(images), LOOKED_AT).tolist()
    warnings = _warn_of_range(images, sample, measured)
    _compare_ranges(images, sample, is_given=is_given)
    _warn_of_pages(images, sample)
    if images.condition_images is not None:
        images.condition_images.warn_if_dark(sample)
    return warnings


def _warn_of_range(images: ImageDataset, sample: list[int], measured: ValueSurvey | None) -> list[str]:
    """
    Warns of a range of values that leaves little of some channels, or of all. It was measured, or sampled images are compared with
    it.
    """
    is_meant = bool(images.config.value_range)
    is_picture = images.depth != "numbers" and images.config.image_channels in (1, 3)  # see `_compare_ranges`
    if is_picture or (is_meant and images.config.image_channels == 1):
        return []
    try:
        survey = measured or images.survey_values(sample)
    except UserError:  # whoever reads it for training names it
        return []
    found = [survey.small_channels(images.value_range)]
    if not is_meant:
        found.append(survey.outliers(images.value_range, is_measured=measured is not None))
    for text in filter(None, found):
        logger.warning("%s", text)
    return [text for text in found if text]


def _compare_ranges(images: ImageDataset, sample: list[int], *, is_given: bool) -> None:
    """Logs the range of values of 16-bit pictures and the assumed range, and warns if the latter is far too wide."""
    if images.depth not in ("8-bit", "16-bit") or images.config.image_channels not in (1, 3):
        return
    depths: dict[str, int] = {}
    low, high, example = math.inf, -math.inf, None
    for index in sample:
        try:
            content = read_content(images.rows[index][images.image_column], images.root)
            depth = find_depth(content)
            depths[depth] = depths.get(depth, 0) + 1
            if depth == "16-bit":
                values = decode_array(content, channels=1)
                low, high = min(low, float(values.min())), max(high, float(values.max()))
                example = example or images.name_of(index)
        except Exception:  # whoever reads it for training names it
            continue
    if example is None:
        return
    assumed = images.value_range or RANGES["16-bit"]
    logger.info(
        "%d of %d sampled images have 16 bits: their values lie in [%g, %g], the range is taken as [%g, %g]",
        depths["16-bit"], sum(depths.values()), low, high, *assumed,
    )  # fmt: skip
    if is_given or assumed != RANGES["16-bit"] or assumed[1] < 4 * high:
        return
    if depths.keys() > {"16-bit"}:
        advice = "8-bit pictures lie beside them: save all with the same range, or each kind in a folder of its own"
    else:
        bound = 2 ** max(8, math.ceil(math.log2(high + 1))) - 1
        advice = (
            f"If {bound} is white, pass `--value_range 0 {bound}`; else `--value_range 0 65535` says that it is meant"
        )
    logger.warning(
        "16-bit images, such as %s, use little of [0, 65535]: they come out nearly black. %s.", example, advice
    )


def _warn_of_pages(images: ImageDataset, sample: list[int]) -> None:
    """Warns if sampled pictures have several pages."""
    for index in sample:
        name = images.name_of(index)
        item = images.rows[index][images.image_column]
        if not isinstance(item, dict) or (item["bytes"] is None and ".tif" not in name.lower()):
            continue
        try:
            num_pages = count_pages(read_content(item, images.root))
        except Exception:  # whoever reads it for training names it
            continue
        if num_pages > 1:
            logger.warning(
                "%s has %d pages. Only the first page of each file is used. Save each page as a file, or the stack as `.npy`.",
                name, num_pages,
            )  # fmt: skip
            return
