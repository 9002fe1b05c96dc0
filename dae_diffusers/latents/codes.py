"""Images as grids of codes: counts of the codes, and grids that are encoded once to train on."""

import os
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list, gather_object
from diffusers import VQModel
from torch.utils.data import DataLoader
from tqdm.auto import tqdm

from dae_diffusers.autoencoders.loading import check_finite
from dae_diffusers.data import ImageDataset, is_flipped, make_pass_loader, split_items
from dae_diffusers.data.batches import BatchDataset
from dae_diffusers.errors import UserError
from dae_diffusers.latents.cache import CacheIdentity, image_identity, open_once_per_machine
from dae_diffusers.losses.codebook import codebook_perplexity, codebook_usage
from dae_diffusers.store import NotCached, cache_tensors, cached_tensors
from dae_diffusers.weights import latents_fingerprint

_DTYPE = "int32"


@torch.no_grad()
def codes_of(vae: VQModel, latents: torch.Tensor) -> torch.Tensor:
    r"""The codes of raw latents, `(B, C, h, w)` to `(B, h, w)` int64, by the model's own quantiser."""
    return vae.quantize(latents)[2][2].view(len(latents), *latents.shape[2:])


@torch.no_grad()
def count_codes(vae: VQModel, loader: DataLoader, accelerator: Accelerator) -> torch.Tensor:
    r"""
    How often each code occurs in the images.

    Args:
        vae ([`~diffusers.VQModel`]): The autoencoder, in eval mode, on the accelerator's device.
        loader (`DataLoader`): This process's share of the images; see `make_pass_loader`.
        accelerator ([`~accelerate.Accelerator`]): The run's accelerator.

    Returns:
        `torch.Tensor` of shape `(K,)`: int64, over all processes.
    """
    counts = torch.zeros(vae.config.num_vq_embeddings, dtype=torch.int64, device=accelerator.device)
    for batch in loader:
        codes = codes_of(vae, vae.encode(batch["pixel_values"].to(accelerator.device)).latents)
        counts += torch.bincount(codes.flatten(), minlength=len(counts))
    return accelerator.reduce(counts, reduction="sum")


def codebook_metrics(counts: torch.Tensor) -> dict[str, float]:
    r"""`codebook_usage` (a share in [0, 1]) and `codebook_perplexity`, from the codes' `(K,)` counts over a whole pass."""
    return {"codebook_usage": codebook_usage(counts), "codebook_perplexity": codebook_perplexity(counts)}


class CodeGrids(BatchDataset):
    r"""
    The codes of one split, indexed like [`~dae_diffusers.data.ImageDataset`]: by number, or by `(number, draw)`.

    Whole batches are read at once. A batch is `{"codes": (B, h, w) int64, "class_labels": (B,) int64}`, with labels only
    if there are any.

    Args:
        codes (`torch.Tensor` of shape `(N, F, h, w)`): F is 2 where mirrored images were encoded too, else 1.
        class_labels (`torch.Tensor` of shape `(N,)`, *optional*): int64.
        id2label (`dict[int, str]`, *optional*): Names of the classes.
    """

    def __init__(
        self, codes: torch.Tensor, class_labels: torch.Tensor | None = None, id2label: dict[int, str] | None = None
    ):
        self.codes = codes
        self.class_labels = class_labels
        self.id2label = id2label

    def __len__(self) -> int:
        return len(self.codes)

    @property
    def labels(self) -> list[int] | None:
        r"""The class of each image; None without classes."""
        return None if self.class_labels is None else self.class_labels.tolist()

    @property
    def grid_size(self) -> tuple[int, int]:
        r"""Rows and columns of codes."""
        return tuple(self.codes.shape[2:])

    def __getitems__(self, items: list[int | tuple[int, int]]) -> dict[str, torch.Tensor]:
        indices, draws = split_items(items)
        has_flips = self.codes.shape[1] == 2
        flips = torch.tensor([has_flips and is_flipped(draw) for draw in draws]).long()
        batch = {"codes": self.codes[indices, flips].long()}
        if self.class_labels is not None:
            batch["class_labels"] = self.class_labels[indices]
        return batch


def cached_codes(
    path: str | os.PathLike,
    vae: VQModel,
    images: ImageDataset,
    accelerator: Accelerator,
    *,
    batch_size: int,
    num_workers: int = 0,
) -> CodeGrids:
    r"""
    The codes of all images, and of mirrored ones if their config has `random_flip`. They are read from a file, or encoded and written.

    All processes call it. The file is whole or absent, and its header says what it was made from; see
    [`~dae_diffusers.store.cache_tensors`].

    Args:
        path (`Path`): The file, `*.safetensors`.
        vae ([`~diffusers.VQModel`]): The autoencoder, in eval mode, on the accelerator's device.
        images ([`~dae_diffusers.data.ImageDataset`]): Centre-cropped.
        accelerator ([`~accelerate.Accelerator`]): The run's accelerator.
        batch_size (`int`): Images encoded at once.
        num_workers (`int`, *optional*): Data-loading processes for each process.

    Returns:
        [`CodeGrids`]: The same on every process.

    Raises:
        UserError: If the file is damaged, cannot be written, or holds the codes of another autoencoder or other images.
    """
    path = Path(path)
    identity = CacheIdentity(
        autoencoder=latents_fingerprint(vae),
        num_samples=len(images),
        dtype=_DTYPE,
        **image_identity(images),
    )
    is_cached = [path.exists()]
    broadcast_object_list(is_cached)
    if not is_cached[0]:
        codes = _encode(vae, images, accelerator, batch_size, num_workers)
        if accelerator.is_main_process:
            try:
                path.parent.mkdir(parents=True, exist_ok=True)
                cache_tensors(path, {"codes": codes}, {"kind": "codes", **identity.record()})
            except OSError as error:
                raise UserError(f"the codes cannot be written to {path}: {error.strerror or error}") from None
    accelerator.wait_for_everyone()
    codes = open_once_per_machine(
        lambda verify: _read(path, identity, vae.config.num_vq_embeddings, verify), accelerator
    )
    labels = None if images.labels is None else torch.tensor(images.labels)
    return CodeGrids(codes, labels, images.id2label)


def _read(path: Path, identity: CacheIdentity, num_codes: int, verify: bool) -> torch.Tensor:
    try:
        codes = cached_tensors(path, {"kind": "codes", **identity.record()}, verify=verify)["codes"]
        if not (0 <= codes.min().item() and codes.max().item() < num_codes):
            raise NotCached(f"holds codes outside 0..{num_codes - 1}")
        return codes
    except (NotCached, KeyError, RuntimeError) as problem:
        found = getattr(problem, "of", None)
        if isinstance(found, dict) and found.pop("kind", None) == "codes":
            differences = CacheIdentity(**found).differences(identity)
            raise UserError(
                f"the codes in {path} do not fit: {'; '.join(differences)}. Choose another `code_cache`, or remove the "
                "file to encode the images again."
            ) from None
        raise UserError(
            f"{path} is not a file of codes, or is damaged. Remove it to encode the images again. (It {problem}.)"
        ) from None


@torch.no_grad()
def _encode(vae, images: ImageDataset, accelerator: Accelerator, batch_size: int, num_workers: int) -> torch.Tensor:
    """`(N, F, h, w)` int32, the same on every process."""
    process, num_processes = accelerator.process_index, accelerator.num_processes
    loader = make_pass_loader(
        images, batch_size=batch_size, process_index=process, num_processes=num_processes, num_workers=num_workers
    )
    parts = []
    for batch in tqdm(loader, desc="Encoding", disable=not accelerator.is_local_main_process, leave=False):
        pixel_values = batch["pixel_values"].to(accelerator.device)
        views = [pixel_values, pixel_values.flip(-1)] if images.config.random_flip else [pixel_values]
        latents = [vae.encode(view).latents for view in views]
        check_finite(torch.stack(latents))
        codes = torch.stack([codes_of(vae, each) for each in latents], dim=1)
        parts.append(codes.int().cpu())
    shares = gather_object([torch.cat(parts) if parts else None])
    whole = torch.empty(len(images), *shares[0].shape[1:], dtype=torch.int32)
    for number, share in enumerate(shares):
        if share is not None:
            whole[number::num_processes] = share
    return whole
