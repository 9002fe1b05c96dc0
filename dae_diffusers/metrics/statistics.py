"""Moments of features, which add up over batches and processes, and a cache of the moments of reference images."""

import json
import logging
import os
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from accelerate import PartialState
from accelerate.utils import broadcast_object_list, gather_object
from torch.utils.data import Subset
from tqdm.auto import tqdm

from dae_diffusers.data import ImageDataset, make_pass_loader
from dae_diffusers.metrics.features import FeatureExtractor
from dae_diffusers.store import NotCached, cache_tensors, cached_tensors, fingerprint_of_json, inputs_of_cached

logger = logging.getLogger(__name__)

# A long pass over reference images is saved this often, to continue after an interruption.
SAVE_SECONDS = 60

# While a model trains, its images are compared with so many training images at most.
MAX_REFERENCE_IMAGES = 50_000


@dataclass
class FeatureStatistics:
    r"""
    Count, mean and scatter of feature vectors. The sum of two instances describes both sets. How images are
    split into batches and over processes changes only the last digits of float64.

    Attributes:
        count (`int`): Feature vectors seen.
        mean (`torch.Tensor` of shape `(D,)`): Their mean, float64, on the CPU.
        scatter (`torch.Tensor` of shape `(D, D)`): Sum of the outer products of `features - mean`, float64, on the
            CPU.

    Source: the merging of Chan, Golub and LeVeque, 1979,
    http://i.stanford.edu/pub/cstr/reports/cs/tr/79/773/CS-TR-79-773.pdf.
    """

    count: int
    mean: torch.Tensor
    scatter: torch.Tensor

    @classmethod
    def empty(cls, feature_dim: int) -> "FeatureStatistics":
        r"""Statistics of nothing."""
        return cls(
            0,
            torch.zeros(feature_dim, dtype=torch.float64),
            torch.zeros(feature_dim, feature_dim, dtype=torch.float64),
        )

    @classmethod
    def of(cls, features: torch.Tensor) -> "FeatureStatistics":
        r"""Statistics of a whole feature matrix, `(N, D)`; errors as in [`add`]."""
        statistics = cls.empty(features.shape[1])
        statistics.add(features)
        return statistics

    def add(self, features: torch.Tensor) -> None:
        r"""
        Adds a batch.

        Args:
            features (`torch.Tensor` of shape `(B, D)`): Feature vectors; `B` may be 0.

        Raises:
            ValueError: For another shape, and for values that are not finite.
        """
        if features.ndim != 2 or features.shape[1] != len(self.mean):
            raise ValueError(f"features have the shape {tuple(features.shape)}, but must be (B, {len(self.mean)}).")
        if not torch.isfinite(features).all():
            raise ValueError("features hold NaN or infinite values. Look at the images and at the feature extractor.")
        if len(features) == 0:
            return
        features = features.detach().cpu().double()
        mean = features.mean(dim=0)
        centered = features - mean
        merged = self + FeatureStatistics(len(features), mean, centered.T @ centered)
        self.count, self.mean, self.scatter = merged.count, merged.mean, merged.scatter

    def __add__(self, other: "FeatureStatistics") -> "FeatureStatistics":
        if self.mean.shape != other.mean.shape:
            raise ValueError(f"features of {len(self.mean)} and of {len(other.mean)} dimensions do not add up.")
        count = self.count + other.count
        share = other.count / max(count, 1)
        difference = other.mean - self.mean
        between = torch.outer(difference, difference) * (self.count * share)
        return FeatureStatistics(count, self.mean + difference * share, self.scatter + other.scatter + between)

    @property
    def covariance(self) -> torch.Tensor:
        r"""Unbiased covariance, `(D, D)`, float64. Raises ValueError for fewer than 2 vectors."""
        if self.count < 2:
            raise ValueError(f"a covariance needs at least 2 feature vectors, but there are {self.count}.")
        return self.scatter / (self.count - 1)

    def save(self, path: str | os.PathLike, metadata: dict[str, str] | None = None) -> None:
        r"""
        Writes a safetensors file. A kill at any instant leaves the old file or the whole new one.

        Args:
            path (`str` or `PathLike`): The file; its folder is created.
            metadata (`dict[str, str]`, *optional*): What the features describe; [`load`] returns it.
        """
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        tensors = {"count": torch.tensor(self.count), "mean": self.mean, "scatter": self.scatter}
        cache_tensors(path, tensors, metadata or {})

    @classmethod
    def load(
        cls, path: str | os.PathLike, metadata: dict[str, str] | None = None
    ) -> tuple["FeatureStatistics", dict[str, str]]:
        r"""
        Reads a file that [`save`] wrote.

        Args:
            path (`str` or `PathLike`): The file.
            metadata (`dict[str, str]`, *optional*): What the features must describe; default: anything.

        Returns:
            `tuple[FeatureStatistics, dict[str, str]]`: The statistics and the metadata.

        Raises:
            NotCached: If the file does not exist, is damaged, or holds something else.
        """
        path = Path(path)
        metadata = inputs_of_cached(path) if metadata is None else metadata
        tensors = cached_tensors(path, metadata)
        if set(tensors) != {"count", "mean", "scatter"}:
            raise NotCached(f"holds {sorted(tensors)}, not the statistics of features")
        return cls(int(tensors["count"]), tensors["mean"].clone(), tensors["scatter"].clone()), metadata


def padded_size(batch_size: int, image_pixels: int) -> int:
    r"""
    `batch_size` rounded up to a multiple of 16, the number of lanes of CPU kernels; to a smaller multiple for images above
    256x256 pixels, so that small batches stay small. In batches of such sizes, the rounding of a network's products does
    not depend on the size.
    """
    block = max(1, min(16, 2**20 // image_pixels))
    return -(-batch_size // block) * block


def pad_batch(rows: torch.Tensor, image_pixels: int | None = None) -> torch.Tensor:
    r"""
    Repeats the last row up to [`padded_size`]. The caller must cut the result again.

    Args:
        rows (`torch.Tensor` of shape `(B, C, H, W)`): At least one row.
        image_pixels (`int`, *optional*): Pixels of an image, if the rows are latents; default: `H * W`.

    Returns:
        `torch.Tensor` of shape `(padded_size, C, H, W)`.
    """
    missing = padded_size(len(rows), image_pixels or rows[0, 0].numel()) - len(rows)
    return rows if missing == 0 else torch.cat([rows, rows[-1:].expand(missing, *rows.shape[1:])])


def reference_statistics(
    extractor: FeatureExtractor,
    images: ImageDataset,
    *,
    cache_dir: str | os.PathLike | None = None,
    batch_size: int = 64,
    num_workers: int = 0,
    disable_progress: bool = True,
) -> FeatureStatistics:
    r"""
    Statistics of a data set's images, without augmentation. They come from the cache if it has them. All processes call it.

    The cache's key is a fingerprint of the extractor (name, weights, preprocessing), the images (their fingerprint, number,
    channels, range of values) and their resolution. A damaged file is reported and made again; a file that cannot be
    written is reported. An interrupted pass continues from where it was saved last, if the number of processes is the same.

    Args:
        extractor ([`~dae_diffusers.metrics.features.FeatureExtractor`]): Feature extractor.
        images ([`~dae_diffusers.data.ImageDataset`]): The reference images.
        cache_dir (`str` or `PathLike`, *optional*): Folder of the cache; default: nothing is kept.
        batch_size (`int`, *optional*, defaults to 64): Images at a time, per process.
        num_workers (`int`, *optional*, defaults to 0): Processes that read images, per process.
        disable_progress (`bool`, *optional*): Whether to hide the progress bar.

    Returns:
        [`FeatureStatistics`]: The same on every process.
    """
    state = PartialState()
    metadata = {
        "extractor": extractor.name,
        "extractor_fingerprint": extractor.fingerprint,
        "images_fingerprint": images.fingerprint,
        "num_images": str(len(images)),
        "image_channels": str(images.config.image_channels),
        "resolution": str(images.config.resolution),
        "value_range": json.dumps(list(images.value_range or [])),
        **({} if images.config.pad is None else {"pad": images.config.pad}),
    }
    path = partial = None
    if cache_dir is not None:
        key = fingerprint_of_json(metadata)
        path = Path(cache_dir) / f"{extractor.name}-{key}.safetensors"
        partial = path.with_suffix(f".{state.process_index}-of-{state.num_processes}.safetensors")
    # One process looks and tells the others, because they might see the file at different moments.
    cached = [_read_cache(path, metadata) if path is not None and state.is_main_process else None]
    statistics = broadcast_object_list(cached)[0]
    if statistics is not None:
        return statistics
    statistics = (partial and _read_cache(partial, metadata)) or FeatureStatistics.empty(extractor.feature_dim)
    loader = make_pass_loader(
        Subset(images, range(statistics.count * state.num_processes, len(images))),
        batch_size=batch_size,
        process_index=state.process_index,
        num_processes=state.num_processes,
        num_workers=num_workers,
    )
    saved = time.monotonic()
    for batch in tqdm(loader, desc=f"Reference {extractor.name}", disable=disable_progress, leave=False):
        pixel_values = batch["pixel_values"]
        statistics.add(extractor(pad_batch(pixel_values))[: len(pixel_values)])
        if partial is not None and time.monotonic() - saved >= SAVE_SECONDS:
            _write_cache(statistics, partial, metadata)
            saved = time.monotonic()
    statistics = sum(gather_object([statistics]), start=FeatureStatistics.empty(extractor.feature_dim))
    if path is not None and state.is_main_process:
        _write_cache(statistics, path, metadata)
    state.wait_for_everyone()
    if partial is not None and partial.exists():
        partial.unlink()
    return statistics


def _write_cache(statistics: FeatureStatistics, path: Path, metadata: dict[str, str]) -> None:
    try:
        statistics.save(path, metadata)
    except OSError as error:  # the statistics are good all the same
        logger.warning("%s cannot be written (%s); the next run computes it again.", path, error.strerror or error)


def _read_cache(path: Path, metadata: dict[str, str]) -> FeatureStatistics | None:
    try:
        return FeatureStatistics.load(path, metadata)[0]
    except NotCached as problem:
        if not problem.missing:
            logger.warning("%s %s. It is computed again.", path, problem)
        return None
