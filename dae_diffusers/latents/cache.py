"""A cache of latents: shards of posterior means and standard deviations, each with a record of its inputs, and a manifest."""

import itertools
import logging
import os
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list, gather_object
from diffusers import ModelMixin
from torch.utils.data import Subset
from tqdm.auto import tqdm

from dae_diffusers.autoencoders.loading import check_finite, encode_moments
from dae_diffusers.data import ImageDataset, is_flipped, make_pass_loader, split_items
from dae_diffusers.data.batches import BatchDataset, ExtendedDataset
from dae_diffusers.data.buckets import Buckets
from dae_diffusers.data.configuration import DataConfig
from dae_diffusers.errors import UserError
from dae_diffusers.settings import fields_of
from dae_diffusers.sizes import height_and_width
from dae_diffusers.store import (
    NotCached,
    cache_json,
    cache_tensors,
    cached_json,
    cached_tensors,
    inputs_of_cached,
    read_json,
    remove_leftovers,
)
from dae_diffusers.weights import autoencoder_fingerprint

logger = logging.getLogger(__name__)

T = TypeVar("T")

_MANIFEST = "manifest.json"
# Raised when what a shard holds changes. Version 2: each shard says by itself what it holds, with a checksum.
_OF_MANIFEST = {"kind": "latent cache", "version": 2}
_DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


@dataclass(frozen=True)
class CacheIdentity:
    r"""
    What a cache was made from. Two caches with the same identity hold the same latents.

    Attributes:
        autoencoder (`str`): [`autoencoder_fingerprint`] of the encoder's model.
        data (`str`): `ImageDataset.fingerprint`.
        num_samples, image_channels (`int`): Number and channels of the images.
        resolution (`int` or pair): Their side, or height and width.
        flips (`bool`): Whether mirrored images are encoded too.
        dtype (`str`): Data type of the stored latents.
        value_range (`list[float]`): Range of values of the images; empty for 8-bit images.
        buckets (`list[list[int]]`): Height, width and number of the images of each bucket; empty without buckets.
        pad (`str` or `None`): What the images are padded with, if they are not cropped.
    """

    autoencoder: str
    data: str
    num_samples: int
    resolution: int
    image_channels: int
    flips: bool
    dtype: str
    value_range: list[float] = field(default_factory=list)
    buckets: list[list[int]] = field(default_factory=list)
    pad: str | None = None

    def record(self) -> dict[str, Any]:
        r"""The identity as files store it. `buckets` and `pad` without a value are left out, so that caches from before them stay valid."""
        return {name: value for name, value in vars(self).items() if name not in ("buckets", "pad") or value}

    def images(self) -> Buckets:
        r"""The buckets of the images."""
        if not self.buckets:
            return Buckets.single(self.num_samples, height_and_width(self.resolution))
        return Buckets.without_empty(
            [(height, width) for height, width, _ in self.buckets], [n for *_, n in self.buckets]
        )

    def differences(self, other: "CacheIdentity") -> list[str]:
        r"""The attributes that differ, each as a phrase."""
        return [
            f"its {name} is {value!r} instead of {getattr(other, name)!r}"
            for name, value in vars(self).items()
            if value != getattr(other, name)
        ]


class CachedLatents(BatchDataset):
    r"""
    One cached split, indexed like [`~dae_diffusers.data.ImageDataset`]: by number, or by `(number, draw)`.

    Whole batches are read at once from memory-mapped shards. A batch is `{"latents_mean", "latents_std": (B, C, h, w)
    float32, "class_labels": (B,) int64}`, with raw latents, and labels only if there are any.

    Args:
        folder (`Path`): A split's folder inside a cache.
        verify (`bool`, *optional*, defaults to `True`): Compare the checksum of every shard, which reads it whole. Once for
            all processes of a machine is enough: [`open_latent_cache`] does that.

    Attributes:
        identity ([`CacheIdentity`]): What it was made from.
        id2label (`dict[int, str]` or `None`): Names of the classes.
        buckets ([`~dae_diffusers.data.buckets.Buckets`]): The shapes of the images. Each shard is of one bucket.
        latent_shape (`tuple[int, int, int]`): `(C, h, w)` in the first bucket.

    Raises:
        UserError: If the cache is missing, unfinished or damaged.
    """

    def __init__(self, folder: str | os.PathLike, *, verify: bool = True):
        self.folder = Path(folder)
        try:
            manifest = _read_manifest(self.folder)
        except NotCached as problem:
            raise UserError(
                f"{self.folder / _MANIFEST} {problem}. Run the command that made the cache again: it makes only what is "
                "missing or damaged."
            ) from None
        if manifest is None or not manifest["complete"]:
            state = "unfinished" if manifest else "no latent cache"
            raise UserError(f"{self.folder} is {state}. Make it with `dae-diffusers cache-latents`.")
        self.identity = CacheIdentity(**manifest["identity"])
        self.id2label = manifest["id2label"] and {int(key): name for key, name in manifest["id2label"].items()}
        self._buckets = self.identity.images()
        self.latent_shape = tuple(manifest["latent_shape"])
        self._shapes = _latent_shapes(self.latent_shape, self._buckets)
        shard_size, self._shards = manifest["shard_size"], []
        shards = _shards_of(self._buckets, shard_size)
        self._starts = torch.tensor([indices.start for indices in shards])
        for number, indices in enumerate(tqdm(shards, desc="Checking shards", leave=False, disable=not verify)):
            path, rows = self.folder / _shard_name(number), len(indices)
            latent_shape = self._shapes[self._buckets.of(indices.start)]
            shapes = dict.fromkeys(("latents_mean", "latents_std"), (rows, 1 + self.identity.flips, *latent_shape))
            if self.id2label is not None:
                shapes["class_labels"] = (rows,)
            try:
                shard = cached_tensors(path, _of_shard(self.identity, shard_size, number), verify=verify)
                found = {name: tuple(value.shape) for name, value in shard.items()}
                if any(found.get(name) != shape for name, shape in shapes.items()):
                    raise NotCached(f"does not fit its manifest: it has the shapes {found} instead of {shapes}")
            except NotCached as problem:
                raise UserError(
                    f"{path} {_explained(problem, self.identity, shard_size, number)}. Run the command that made the "
                    "cache again: it makes only what is missing or damaged."
                ) from None
            self._shards.append(shard)

    def __len__(self) -> int:
        return self.identity.num_samples

    @property
    def buckets(self) -> Buckets:
        return self._buckets

    @property
    def labels(self) -> list[int] | None:
        r"""The class of each image; None without classes."""
        if self.id2label is None:
            return None
        return torch.cat([shard["class_labels"] for shard in self._shards]).tolist()

    @property
    def fingerprint(self) -> str:
        r"""The fingerprint of the images that the latents were made from."""
        return self.identity.data

    @property
    def value_range(self) -> list[float] | None:
        r"""The values of the original images that are mapped to -1 and 1; None for 8-bit pictures."""
        return list(self.identity.value_range) or None

    def __getitems__(self, items: list[int | tuple[int, int]]) -> dict[str, torch.Tensor]:
        indices, draws = split_items(items)
        indices = torch.tensor(indices)
        flips = torch.tensor([self.identity.flips and is_flipped(draw) for draw in draws]).long()
        shards = torch.searchsorted(self._starts, indices, right=True) - 1
        rows, shape = indices - self._starts[shards], self._shapes[self._buckets.of(int(indices[0]))]
        batch = {name: torch.empty(len(items), *shape) for name in ("latents_mean", "latents_std")}
        if self.id2label is not None:
            batch["class_labels"] = torch.empty(len(items), dtype=torch.int64)
        for shard in shards.unique().tolist():
            here = (shards == shard).nonzero()[:, 0]
            for name, value in batch.items():
                stored = self._shards[shard][name]
                picked = stored[rows[here]] if name == "class_labels" else stored[rows[here], flips[here]]
                value[here] = picked.to(value.dtype)
        return batch

    def check(self, *, autoencoder: str, images: ImageDataset | None) -> None:
        r"""
        Raises `UserError` with the reason if these are not the latents of these images under this autoencoder. Takes the names of the
        classes from the images: folders may have been renamed.

        Args:
            autoencoder (`str`): [`autoencoder_fingerprint`] of the autoencoder in use.
            images (`ImageDataset` or `None`): The images in use, if they are loaded.
        """
        wanted = {"autoencoder": autoencoder}
        if images is not None:
            wanted |= {"pad": None, **image_identity(images)}
        wanted = CacheIdentity(**{**vars(self.identity), **wanted})
        differences = self.identity.differences(wanted)
        if differences:
            same = ""
            if wanted.data != self.identity.data:
                same = (
                    "Give the images that it was made of, with the same `validation_fraction`, `group_column` and `drop_copies`, "
                    "which choose those that are held out. Or make"
                )
            raise UserError(
                f"the latent cache {self.folder} does not fit: {'; '.join(differences)}. {same or 'Make'} another one with "
                "`dae-diffusers cache-latents`."
            )
        if images is not None:
            self.id2label = images.id2label


def follow_cache(data: DataConfig, cache: CachedLatents) -> None:
    r"""
    Takes side and channels of the images from their cache where they are open. Without a source of images everything comes from
    the cache: flags that say something else are named in a warning.
    """
    made = cache.identity
    data.settle(made.resolution, made.image_channels)
    if data.has_source:
        return
    shapes = [tuple(shape) for *shape, _ in made.buckets]
    size = height_and_width(made.resolution)
    if shapes and size not in shapes:  # no training image has it, but those of validation do
        shapes.append(size)
    known = {
        "resolution": made.resolution,
        "image_channels": made.image_channels,
        "random_flip": made.flips,
        "pad": made.pad,
        "group_column": None,
        "value_range": list(made.value_range),
        "aspect_buckets": [side for shape in shapes for side in shape],
    }
    defaults = {each.name: default for _, each, default in fields_of(DataConfig)} | known
    unused = [
        name
        for name, default in defaults.items()
        if name not in ("dataloader_num_workers", "balance_classes") and getattr(data, name) not in (default, False, [])
    ]
    vars(data).update(known)
    if unused:
        logger.warning(
            "`--%s` %s no effect beside the latent cache %s, which was made with its own settings.",
            "`, `--".join(unused), "has" if len(unused) == 1 else "have", cache.folder.parent,
        )  # fmt: skip


class ImagesWithLatents(ExtendedDataset):
    r"""
    Images together with their cached latents, with the same index and draw: `pixel_values` and labels from
    [`~dae_diffusers.data.ImageDataset`], `latents_mean` and `latents_std` from [`CachedLatents`].
    """

    def __init__(self, images: ImageDataset, latents: CachedLatents):
        super().__init__(images)
        self.latents = latents

    def __getitems__(self, items: list[int | tuple[int, int]]) -> dict[str, torch.Tensor]:
        return {**self.latents.__getitems__(items), **self.data.__getitems__(items)}


@torch.no_grad()
def write_latent_cache(
    folder: str | os.PathLike,
    vae: ModelMixin,
    images: ImageDataset,
    accelerator: Accelerator,
    *,
    batch_size: int,
    dtype: str = "float16",
    shard_size: int = 8192,
    num_workers: int = 0,
    replace: bool = False,
) -> CachedLatents:
    r"""
    Encodes every image once, mirrored too if its config says `random_flip`, into `folder`.

    Processes take turns at the shards. A shard is written to a temporary file and renamed. Its header names the
    autoencoder, the data, the transform, its position, and its checksum. So an interrupted run continues where it
    stopped: whole shards of the same cache stay, missing and damaged ones are made again. All processes call it.

    Args:
        folder (`Path`): A new folder, or the folder of the same unfinished cache.
        vae ([`~diffusers.AutoencoderKL`]): The autoencoder, in eval mode, on the accelerator's device.
        images ([`~dae_diffusers.data.ImageDataset`]): Centre-cropped.
        accelerator ([`~accelerate.Accelerator`]): The run's accelerator.
        batch_size (`int`): Images encoded at once.
        dtype (`str`, *optional*): `float32`, `float16` or `bfloat16`.
        shard_size (`int`, *optional*): Images in a shard.
        num_workers (`int`, *optional*): Data-loading processes for each process.
        replace (`bool`, *optional*): Whether to replace another or a damaged cache in that folder instead of refusing it.

    Returns:
        [`CachedLatents`]: The cache; all its shards were just written or verified.

    Raises:
        UserError: If the folder holds another cache, or shards of one.
    """
    folder = Path(folder)
    identity = CacheIdentity(
        autoencoder=autoencoder_fingerprint(vae), num_samples=len(images), dtype=dtype, **image_identity(images)
    )
    manifest = {
        "identity": identity.record(),
        "id2label": images.id2label,
        "shard_size": shard_size,
        "complete": False,
    }
    problem = [None]
    if accelerator.is_main_process:
        try:
            _begin(folder, manifest, identity, replace)
        except (UserError, OSError) as error:
            problem = [error]
    broadcast_object_list(problem)
    if problem[0] is not None:
        raise problem[0]

    shards = _shards_of(images.buckets, shard_size)
    numbers = range(len(shards))
    paths = {number: folder / _shard_name(number) for number in numbers}
    mine = numbers[accelerator.process_index :: accelerator.num_processes]
    is_shown = accelerator.is_local_main_process
    missing, unusable = [], []
    for number in tqdm(mine, desc="Checking shards", leave=False, disable=not is_shown):
        try:
            cached_tensors(paths[number], _of_shard(identity, shard_size, number))
        except NotCached as reason:
            missing.append(number)
            if not reason.missing:
                unusable.append(f"{paths[number]} {_explained(reason, identity, shard_size, number)}")
    unusable = [each for share in gather_object([unusable]) for each in share]
    if unusable and accelerator.is_main_process:
        logger.warning("%s. Shards to be made again: %d of %d.", unusable[0], len(unusable), len(numbers))
    for number in tqdm(missing, desc="Caching latents", unit="shard", disable=not is_shown):
        loader = make_pass_loader(Subset(images, shards[number]), batch_size=batch_size, num_workers=num_workers)
        tensors = _encode_shard(vae, loader, accelerator, identity.flips, _DTYPES[dtype])
        cache_tensors(paths[number], tensors, _of_shard(identity, shard_size, number))
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        first = cached_tensors(paths[0], _of_shard(identity, shard_size, 0), verify=False)
        manifest["latent_shape"] = list(first["latents_mean"].shape[2:])
        manifest["complete"] = True
        cache_json(folder / _MANIFEST, manifest, _OF_MANIFEST)
    accelerator.wait_for_everyone()
    return CachedLatents(folder, verify=False)


def open_latent_cache(folder: str | os.PathLike, accelerator: Accelerator) -> CachedLatents:
    r"""
    Opens a finished cache. The main process of each machine verifies every shard. All processes call it.

    Raises:
        UserError: On every process, if the cache is missing, unfinished or damaged for one of them.
    """
    return open_once_per_machine(lambda verify: CachedLatents(folder, verify=verify), accelerator)


def open_once_per_machine(read: Callable[[bool], T], accelerator: Accelerator) -> T:
    r"""
    Returns the result of `read` on every process, but verifies only in the main process of each machine, because the files are
    large. All processes call it.

    Args:
        read: Takes whether to verify, and returns the result.
        accelerator ([`~accelerate.Accelerator`]): The run's accelerator.

    Raises:
        UserError: On every process, if it is raised on one of them.
    """
    result = None
    for verifies in (True, False):
        problem = None
        if accelerator.is_local_main_process is verifies:
            try:
                result = read(verifies)
            except UserError as error:
                problem = str(error)
        problem = next((each for each in gather_object([problem]) if each is not None), None)
        if problem is not None:
            raise UserError(problem)
    return result


def _encode_shard(vae, loader, accelerator, flips: bool, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    parts: dict[str, list[torch.Tensor]] = {"latents_mean": [], "latents_std": [], "class_labels": []}
    for batch in loader:
        pixel_values = batch["pixel_values"].to(accelerator.device)
        views = [pixel_values, pixel_values.flip(-1)] if flips else [pixel_values]
        means, stds = zip(*(encode_moments(vae, view) for view in views), strict=True)
        parts["latents_mean"].append(torch.stack(means, dim=1).to(dtype).cpu())
        parts["latents_std"].append(torch.stack(stds, dim=1).to(dtype).cpu())
        if "class_labels" in batch:
            parts["class_labels"].append(batch["class_labels"])
    tensors = {name: torch.cat(values) for name, values in parts.items() if values}
    check_finite(tensors["latents_mean"])
    check_finite(tensors["latents_std"])
    return tensors


def image_identity(images: ImageDataset) -> dict[str, Any]:
    r"""The part of a [`CacheIdentity`] that describes the images."""
    config = images.config
    return {
        "data": images.fingerprint,
        "resolution": config.resolution,
        "image_channels": config.image_channels,
        "flips": config.random_flip,
        "value_range": list(images.value_range or []),
        "buckets": images.buckets.record(config.size),
        **({} if config.pad is None else {"pad": config.pad}),
    }


def _shard_name(shard: int) -> str:
    return f"shard-{shard:05d}.safetensors"


def _shards_of(buckets: Buckets, shard_size: int) -> list[range]:
    """The numbers of the images of each shard."""
    return [
        range(start, min(start + shard_size, images.stop))
        for images in buckets.ranges
        for start in images[::shard_size]
    ]


def _latent_shapes(first: tuple[int, int, int], buckets: Buckets) -> list[tuple[int, int, int]]:
    """Channels, height and width of the latents of each bucket, from those of the first."""
    channels, *latent = first
    sides = list(zip(latent, buckets.sizes[0], strict=True))
    return [
        (channels, *(side * here // there for side, (here, there) in zip(size, sides, strict=True)))
        for size in buckets.sizes
    ]


def _of_shard(identity: CacheIdentity, shard_size: int, number: int) -> dict[str, Any]:
    """What a shard records in its header."""
    return {**_OF_MANIFEST, **identity.record(), "shard_size": shard_size, "shard": number}


def _explained(problem: NotCached, identity: CacheIdentity, shard_size: int, number: int) -> str:
    """Why a shard is not used, as the end of a sentence; for a whole one, what it was made from."""
    if problem.of is None:
        return str(problem)
    differences = _differences(problem.of, _of_shard(identity, shard_size, number))
    return f"is a shard of another latent cache: {'; '.join(differences)}"


def _differences(found: Any, wanted: dict[str, Any]) -> list[str]:
    if not isinstance(found, dict):
        return ["it is something else"]
    return [
        f"its {name} is {found.get(name)!r} instead of {value!r}"
        for name, value in wanted.items()
        if found.get(name) != value
    ]


def _begin(folder: Path, manifest: dict[str, Any], identity: CacheIdentity, replace: bool) -> None:
    """Makes the folder ready for a cache, or raises UserError if it holds another one that is not to be replaced."""
    path, shard_size = folder / _MANIFEST, manifest["shard_size"]
    problem = found = None
    try:
        found = _read_manifest(folder)
    except NotCached as reason:
        problem = reason
    differences = _other_cache(folder, found or _manifest_of_old_version(folder), identity, shard_size)
    if differences and not replace:
        raise UserError(f"{folder} holds another latent cache: {'; '.join(differences)}. Choose another folder.")
    if differences:
        # The manifest first: shards that a kill leaves behind carry their own record. Remove only names that we write.
        path.unlink(missing_ok=True)
        for shard in folder.glob("shard-*.safetensors"):
            shard.unlink(missing_ok=True)
    elif problem is not None:
        logger.warning("%s %s. It is made again, with the shards that are whole.", path, problem)
    folder.mkdir(parents=True, exist_ok=True)
    remove_leftovers(folder)
    if differences or found is None:
        cache_json(path, manifest, _OF_MANIFEST)


def _other_cache(folder: Path, manifest: dict[str, Any] | None, identity: CacheIdentity, shard_size: int) -> list[str]:
    """How the content of a folder differs from a cache, as phrases: by its manifest, and by the record in each whole shard."""
    if manifest is not None:
        wanted = {"buckets": [], **identity.record(), "shard_size": shard_size}
        differences = _differences(
            {"buckets": [], **manifest["identity"], "shard_size": manifest["shard_size"]}, wanted
        )
        if differences:
            return differences
    for path in sorted(folder.glob("shard-*.safetensors")):
        wanted = _of_shard(identity, shard_size, 0)
        try:
            number = inputs_of_cached(path)["shard"]
            cached_tensors(path, {**wanted, "shard": number}, verify=False)
        except NotCached as problem:  # whole, but made from something else; damaged shards do not count
            if problem.of is not None:
                return _differences(problem.of, {**wanted, "shard": number})
        except (KeyError, TypeError):
            continue
    return []


def _manifest_of_old_version(folder: Path) -> dict[str, Any] | None:
    """The manifest of a cache of version 1. Its shards hold no record, so they are made again."""
    try:
        manifest = read_json(folder / _MANIFEST)
        return {"identity": dict(manifest["identity"]), "shard_size": manifest["shard_size"]}
    except (UserError, KeyError, TypeError, ValueError):
        return None


def _read_manifest(folder: Path) -> dict[str, Any] | None:
    """None if there is none. Raises NotCached if it cannot be used."""
    try:
        manifest = cached_json(folder / _MANIFEST, _OF_MANIFEST)
    except NotCached as problem:
        if problem.missing:
            return None
        raise
    try:
        identity, shard_size = CacheIdentity(**manifest["identity"]), manifest["shard_size"]
        sides = height_and_width(identity.resolution)
        sizes = (identity.num_samples, *sides, identity.image_channels, shard_size, *itertools.chain(*identity.buckets))
        is_whole = all(isinstance(size, int) and size > 0 for size in sizes)
        is_whole &= all(len(each) == 3 for each in identity.buckets)
        is_whole &= sum(identity.images().counts) == identity.num_samples
        is_whole &= isinstance(identity.flips, bool) and isinstance(manifest["complete"], bool)
        is_whole &= all(key.isdecimal() for key in manifest["id2label"] or {})
        if manifest["complete"] and is_whole:
            is_whole = len([int(size) for size in manifest["latent_shape"]]) == 3
    except (ValueError, KeyError, TypeError, AttributeError):
        is_whole = False
    if not is_whole:
        raise NotCached("is damaged: it is not the manifest of a latent cache")
    return manifest
