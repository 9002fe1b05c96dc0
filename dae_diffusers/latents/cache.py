"""Latents encoded once: shards of posterior means and standard deviations, and a manifest that says of what."""

import hashlib
import json
import os
import shutil
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from diffusers import ModelMixin
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch.utils.data import DataLoader, Subset
from tqdm.auto import tqdm

from dae_diffusers.autoencoders.loading import check_finite, encode_moments
from dae_diffusers.data import ImageDataset, is_flipped
from dae_diffusers.data.batches import BatchDataset
from dae_diffusers.errors import UserError, one_line
from dae_diffusers.files import add_weights, save_tensors_atomically, sha256_of, write_atomically

_MANIFEST = "manifest.json"
_DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


@dataclass(frozen=True)
class CacheIdentity:
    r"""
    What a cache is a cache of; two caches with the same identity hold the same latents.

    Attributes:
        autoencoder (`str`): [`autoencoder_fingerprint`] of the encoder's model.
        data (`str`): `ImageDataset.fingerprint`.
        num_samples, resolution, image_channels (`int`): Of the images.
        flips (`bool`): Whether mirrored images are encoded too.
        dtype (`str`): Of the stored numbers.
        value_range (`list[float]`): Of the images; empty: 8-bit ones.
    """

    autoencoder: str
    data: str
    num_samples: int
    resolution: int
    image_channels: int
    flips: bool
    dtype: str
    value_range: list[float] = field(default_factory=list)

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

    Whole batches are gathered at once from memory-mapped shards. Each is `{"latents_mean", "latents_std": (B, C, h, w)
    float32, "class_labels": (B,) int64}`, raw; the labels only if there are any.

    Args:
        folder (`Path`): A split's folder inside a cache.
        verify (`bool`, *optional*, defaults to `True`): Compare the checksum of every shard, which reads it whole; once
            for all processes of a machine is enough.

    Attributes:
        identity ([`CacheIdentity`]): Of what it holds.
        id2label (`dict[int, str]` or `None`): Names of the classes.
        latent_shape (`tuple[int, int, int]`): `(C, h, w)`.

    Raises:
        UserError: If the cache is missing, unfinished or damaged.
    """

    def __init__(self, folder: str | os.PathLike, *, verify: bool = True):
        self.folder = Path(folder)
        manifest = _read_manifest(self.folder)
        if manifest is None or not manifest["complete"]:
            state = "unfinished" if manifest else "no latent cache"
            raise UserError(f"{self.folder} is {state}. Make it with `accelerate launch training/cache_latents.py`.")
        self.identity = CacheIdentity(**manifest["identity"])
        self.id2label = manifest["id2label"] and {int(key): name for key, name in manifest["id2label"].items()}
        self.latent_shape = tuple(manifest["latent_shape"])
        self._shard_size = manifest["shard_size"]
        self._shards = []
        for name, facts in tqdm(manifest["shards"].items(), desc="Checking shards", leave=False, disable=not verify):
            rows = min(self._shard_size, self.identity.num_samples - len(self._shards) * self._shard_size)
            shape = (rows, 1 + self.identity.flips, *self.latent_shape)
            problem = _problem_of(self.folder / name, facts if verify else {"size": facts["size"]}, shape)
            if problem is not None:
                raise UserError(
                    f"{self.folder / name} {problem}. Run the command that made the cache again: it makes only what is "
                    "missing or damaged."
                )
            self._shards.append(load_file(self.folder / name))

    def __len__(self) -> int:
        return self.identity.num_samples

    @property
    def fingerprint(self) -> str:
        r"""Of the images that the latents were made from."""
        return self.identity.data

    def __getitems__(self, items: list[int | tuple[int, int]]) -> dict[str, torch.Tensor]:
        indices = torch.tensor([item[0] if isinstance(item, tuple) else item for item in items])
        flips = torch.tensor(
            [self.identity.flips and isinstance(item, tuple) and is_flipped(item[1]) for item in items]
        ).long()
        shards, rows = indices // self._shard_size, indices % self._shard_size
        batch = {name: torch.empty(len(items), *self.latent_shape) for name in ("latents_mean", "latents_std")}
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
        Raises `UserError` with the reason if these are not the latents of these images under this autoencoder.

        Args:
            autoencoder (`str`): [`autoencoder_fingerprint`] of the one in use.
            images (`ImageDataset` or `None`): The images in use, if they are at hand.
        """
        wanted = {"autoencoder": autoencoder}
        if images is not None:
            wanted |= image_identity(images)
        wanted = CacheIdentity(**{**vars(self.identity), **wanted})
        differences = self.identity.differences(wanted)
        if differences:
            raise UserError(
                f"the latent cache {self.folder} does not fit: {'; '.join(differences)}. Make another one with "
                "`accelerate launch training/cache_latents.py`."
            )


class ImagesWithLatents(BatchDataset):
    r"""
    Images beside their cached latents, under the same numbers and draws: `pixel_values` and labels as
    [`~dae_diffusers.data.ImageDataset`] gives them, `latents_mean` and `latents_std` as [`CachedLatents`] does.
    """

    def __init__(self, images: ImageDataset, latents: CachedLatents):
        self.images = images
        self.latents = latents

    def __len__(self) -> int:
        return len(self.images)

    def __getitems__(self, items: list[int | tuple[int, int]]) -> dict[str, torch.Tensor]:
        return {**self.latents.__getitems__(items), **self.images.__getitems__(items)}


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
) -> None:
    r"""
    Encodes every image once, mirrored too if its config says `random_flip`, into `folder`.

    Processes take turns at the shards. A shard is written to a temporary file and renamed, so an interrupted run goes on
    where it stopped; the manifest is marked complete at the end. In a complete cache the checksums are compared, and what is
    missing or damaged is made anew.

    Args:
        folder (`Path`): A new folder, or one that this very cache was begun in.
        vae ([`~diffusers.AutoencoderKL`]): In eval mode, on the accelerator's device.
        images ([`~dae_diffusers.data.ImageDataset`]): Centre-cropped.
        accelerator ([`~accelerate.Accelerator`]): Of this run.
        batch_size (`int`): Images encoded at once.
        dtype (`str`, *optional*): `float32`, `float16` or `bfloat16`.
        shard_size (`int`, *optional*): Images in a shard.
        num_workers (`int`, *optional*): Processes that read images beside each.
        replace (`bool`, *optional*): Whether to remove another or a damaged cache in that folder instead of refusing it.

    Raises:
        UserError: If the folder holds another cache.
    """
    folder = Path(folder)
    identity = CacheIdentity(
        autoencoder=autoencoder_fingerprint(vae), num_samples=len(images), dtype=dtype, **image_identity(images)
    )
    manifest = {
        "identity": vars(identity),
        "id2label": images.id2label,
        "shard_size": shard_size,
        "complete": False,
    }
    if replace:
        if accelerator.is_main_process and _is_other(folder, identity, shard_size):
            shutil.rmtree(folder)
        accelerator.wait_for_everyone()
    found = _read_manifest(folder)
    if found is not None:
        differences = _differences(found, identity, shard_size)
        if differences:
            raise UserError(f"{folder} holds another latent cache: {'; '.join(differences)}. Choose another folder.")
    elif accelerator.is_main_process:
        folder.mkdir(parents=True, exist_ok=True)
        write_atomically(folder / _MANIFEST, json.dumps(manifest, indent=2))
    accelerator.wait_for_everyone()

    known = found["shards"] if found is not None and found["complete"] else {}
    facts = {}
    mine = range(accelerator.process_index, _num_shards(len(images), shard_size), accelerator.num_processes)
    for shard in tqdm(mine, desc="Caching latents", unit="shard", disable=not accelerator.is_local_main_process):
        path = folder / _shard_name(shard)
        if _problem_of(path, known.get(path.name)) is None:
            facts[path.name] = known.get(path.name) or _facts_of(path)
            continue
        indices = range(shard * shard_size, min((shard + 1) * shard_size, len(images)))
        loader = DataLoader(
            Subset(images, indices), batch_size=batch_size, num_workers=num_workers, collate_fn=images.collate_fn
        )
        save_tensors_atomically(_encode_shard(vae, loader, accelerator, identity.flips, _DTYPES[dtype]), path)
        facts[path.name] = _facts_of(path)
    shares = gather_object([facts])
    if accelerator.is_main_process:
        of_shard = {name: fact for share in shares for name, fact in share.items()}
        manifest["shards"] = {_shard_name(shard): of_shard[_shard_name(shard)] for shard in range(len(of_shard))}
        with safe_open(folder / _shard_name(0), "pt") as file:
            manifest["latent_shape"] = file.get_slice("latents_mean").get_shape()[2:]
        manifest["complete"] = True
        write_atomically(folder / _MANIFEST, json.dumps(manifest, indent=2))
    accelerator.wait_for_everyone()


def autoencoder_fingerprint(vae: ModelMixin, parts: tuple[str, ...] = ("encoder", "quant_conv")) -> str:
    r"""Hash of the weights that make latents; the decoder may change without making a cache stale."""
    digest = hashlib.sha256()
    add_weights(digest, vae, parts)
    return digest.hexdigest()[:16]


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
    r"""What a [`CacheIdentity`] says of the images."""
    config = images.config
    return {
        "data": images.fingerprint,
        "resolution": config.resolution,
        "image_channels": config.image_channels,
        "flips": config.random_flip,
        "value_range": list(images.value_range or []),
    }


def _shard_name(shard: int) -> str:
    return f"shard-{shard:05d}.safetensors"


def _num_shards(num_samples: int, shard_size: int) -> int:
    return -(-num_samples // shard_size)


def _facts_of(path: Path) -> dict[str, Any]:
    return {"size": path.stat().st_size, "sha256": sha256_of(path)}


def _problem_of(path: Path, facts: dict[str, Any] | None, shape: tuple[int, ...] | None = None) -> str | None:
    """Why a shard cannot be used, as the end of a sentence; None if it is what the facts and the shape say, if given."""
    if not path.is_file():
        return "is missing"
    if facts and path.stat().st_size != facts["size"]:
        return f"is truncated: it has {path.stat().st_size} bytes instead of {facts['size']}"
    if facts and "sha256" in facts and sha256_of(path) != facts["sha256"]:
        return "is damaged: its content has another checksum than when it was written"
    try:
        with safe_open(path, "pt") as file:
            shapes = {name: tuple(file.get_slice(name).get_shape()) for name in ("latents_mean", "latents_std")}
    except (SafetensorError, OSError) as error:
        return f"is damaged ({one_line(error)})"
    if shape is not None and set(shapes.values()) != {shape}:
        return f"does not fit its manifest: its latents have the shapes {shapes} instead of {shape}"
    return None


def _differences(manifest: dict[str, Any], identity: CacheIdentity, shard_size: int) -> list[str]:
    differences = CacheIdentity(**manifest["identity"]).differences(identity)
    if manifest["shard_size"] != shard_size:
        differences.append(f"its shard size is {manifest['shard_size']} instead of {shard_size}")
    return differences


def _is_other(folder: Path, identity: CacheIdentity, shard_size: int) -> bool:
    """Whether a folder holds a cache, and it is damaged or not this one."""
    try:
        manifest = _read_manifest(folder)
    except UserError:
        return True
    return manifest is not None and bool(_differences(manifest, identity, shard_size))


def _read_manifest(folder: Path) -> dict[str, Any] | None:
    try:
        manifest = {"complete": False, **json.loads((folder / _MANIFEST).read_text())}
        identity, shard_size = CacheIdentity(**manifest["identity"]), manifest["shard_size"]
        sizes = (identity.num_samples, identity.resolution, identity.image_channels, shard_size)
        is_whole = all(isinstance(size, int) and size > 0 for size in sizes)
        is_whole &= isinstance(identity.flips, bool)
        if manifest["complete"] and is_whole:
            names = [_shard_name(shard) for shard in range(len(manifest["shards"]))]
            is_whole = list(manifest["shards"]) == names  # other names might lead out of the folder
            is_whole &= len(names) == _num_shards(identity.num_samples, shard_size)
            is_whole &= all(isinstance(fact["size"] + len(fact["sha256"]), int) for fact in manifest["shards"].values())
            is_whole &= len([int(size) for size in manifest["latent_shape"]]) == 3
            is_whole &= all(key.isdecimal() for key in manifest["id2label"] or {})
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        is_whole = False
    if not is_whole:
        raise UserError(f"{folder / _MANIFEST} is damaged. Remove {folder} and cache the latents again.")
    return manifest
