"""The codebook: maps latents to codes and back, and follows the encoder while it learns."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.functional import normalize, pad

from dae_diffusers.autoencoders.settings import QuantizerType, check_quantizer
from dae_diffusers.losses.codebook import codebook_loss, commitment_loss
from dae_diffusers.losses.processes import num_processes, sum_over_processes

_KMEANS_ITERATIONS = 10
_CHUNK = 4096  # vectors that are compared with the whole codebook at once
_RECENT_PER_CODE = 8  # latent vectors remembered for each code, for k-means and for replacing dead codes


@dataclass
class Quantization:
    r"""
    Latents and their codes.

    Attributes:
        latents (`torch.Tensor` of shape `(B, C, h, w)`): Raw latents before quantisation, with the encoder's gradient.
        quantized (`torch.Tensor` of the same shape): The code vectors, with a gradient if the codebook learns by gradient.
        target (`torch.Tensor` of the same shape): Where the commitment loss pulls the latents.
        straight_through (`torch.Tensor` of the same shape):
            The values of `quantized` with the gradient of the latents: the input of the decoder in training.
        codes (`torch.Tensor` of shape `(B, h, w)`): Indices of the codes, int64.
    """

    latents: torch.Tensor
    quantized: torch.Tensor
    target: torch.Tensor
    straight_through: torch.Tensor
    codes: torch.Tensor


class _CodeVectors(nn.Module):
    """A codebook without a gradient, under the name that `nn.Embedding` gives its weights."""

    def __init__(self, weight: torch.Tensor):
        super().__init__()
        self.register_buffer("weight", weight)


class CodebookQuantizer(nn.Module):
    r"""
    Replaces each latent pixel by the nearest of the `num_codes` vectors of a codebook.

    It is called like diffusers' `VectorQuantizer`, holds its codebook under the same name and finds the same codes. So a
    stock `VQModel` with [`codebook`] as its weights quantises identically. The types differ in how the codebook is learnt:

    | `quantizer_type` | codebook |
    |---|---|
    | `vq` | a parameter, pulled to its latents by [`~dae_diffusers.losses.codebook.codebook_loss`] |
    | `ema` | moving averages of its latents. K-means sets them after the first steps; recent latents replace rarely used codes |
    | `fsq` | a fixed grid, `fsq_levels[i]` even steps over [-1, 1] in channel i (finite scalar quantisation) |

    An `ema` codebook changes only in [`update`], once per optimiser step, by the latents given to [`note`] since then. So gradient
    accumulation and several processes give the same result as one large batch.

    With `l2_normalize` all codes have norm 1, the nearest code is the one at the smallest angle, and the commitment loss
    pulls the latents to the sphere. FSQ clamps where the paper has a tanh. So its codes are the nearest grid points, which
    stock diffusers can find, and the commitment loss pulls only latents outside [-1, 1].

    Args:
        num_codes (`int`): Size K of the codebook; for `fsq` the product of the levels.
        dim (`int`): Dimension C of a code; for `fsq` the number of levels.
        quantizer_type (`str`): See the table.
        l2_normalize (`bool`): Whether codes have norm 1, for `vq` and `ema`.
        ema_decay (`float`): Decay per step in [0, 1), for `ema`.
        warmup_steps (`int`): Steps >= 1 without quantisation before k-means sets the codebook, for `ema`.
        dead_code_threshold (`float`): `ema` replaces a code that occurs less often, on average over recent steps, than this share
            of the even `1/K`; 0 replaces none.
        fsq_levels (`list[int]`, *optional*): Levels of each channel, at least 2, for `fsq`.

    Raises:
        ValueError: For an argument out of its range.

    Sources: van den Oord et al., 2017, https://huggingface.co/papers/1711.00937 (codes, moving averages); Yu et al.,
    2021, https://huggingface.co/papers/2110.04627 (unit codes of few dimensions); Mentzer et al., 2023,
    https://huggingface.co/papers/2309.15505 (finite scalar quantisation).
    """

    def __init__(
        self,
        num_codes: int,
        dim: int,
        *,
        quantizer_type: QuantizerType = "vq",
        l2_normalize: bool = False,
        ema_decay: float = 0.99,
        warmup_steps: int = 100,
        dead_code_threshold: float = 0.03,
        fsq_levels: tuple[int, ...] | None = None,
    ):
        super().__init__()
        check_quantizer(
            quantizer_type, num_codes, dim, l2_normalize, ema_decay, warmup_steps, dead_code_threshold, fsq_levels
        )
        self.quantizer_type = quantizer_type
        self.l2_normalize = l2_normalize
        self.ema_decay = ema_decay
        self.warmup_steps = warmup_steps
        self.dead_code_threshold = dead_code_threshold
        self._noted: list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]] = []
        if quantizer_type == "fsq":
            axes = [torch.linspace(-1, 1, level) for level in fsq_levels]
            self.embedding = _CodeVectors(torch.cartesian_prod(*axes).reshape(num_codes, dim))
            return
        weight = torch.empty(num_codes, dim).uniform_(-1.0 / num_codes, 1.0 / num_codes)
        if quantizer_type == "vq":
            self.embedding = nn.Embedding(num_codes, dim, _weight=weight)
            return
        self.embedding = _CodeVectors(normalize(weight, dim=1) if l2_normalize else weight)
        self.register_buffer("cluster_size", torch.zeros(num_codes))  # occurrences a step, averaged
        self.register_buffer("cluster_sum", torch.zeros(num_codes, dim))
        self.register_buffer("recent", torch.zeros(_RECENT_PER_CODE * num_codes, dim))
        self.register_buffer("num_recent", torch.zeros((), dtype=torch.int64))
        self.register_buffer("num_updates", torch.zeros((), dtype=torch.int64))

    @property
    def codebook(self) -> torch.Tensor:
        r"""The code vectors as they are compared and decoded, `(K, C)`."""
        weight = self.embedding.weight
        return normalize(weight, dim=1) if self.l2_normalize and self.quantizer_type == "vq" else weight

    @property
    def is_warming_up(self) -> bool:
        r"""Whether latents pass unquantised while training, because k-means has not set the codebook yet."""
        return self.quantizer_type == "ema" and int(self.num_updates) < self.warmup_steps

    def codes_of(self, latents: torch.Tensor) -> torch.Tensor:
        r"""The nearest codes, `(B, C, h, w)` to `(B, h, w)` int64."""
        batch, _, height, width = latents.shape
        vectors = latents.detach().float().permute(0, 2, 3, 1).flatten(0, 2)
        with torch.autocast(latents.device.type, enabled=False):
            codebook = self.codebook.detach().float()
            codes = torch.cat([torch.cdist(part, codebook).argmin(dim=1) for part in vectors.split(_CHUNK)])
        return codes.view(batch, height, width)

    def get_codebook_entry(self, indices: torch.Tensor, shape: tuple[int, ...] | None) -> torch.Tensor:
        r"""Code vectors by index, as in diffusers: viewed as `shape` `(B, h, w, C)` and returned as `(B, C, h, w)`."""
        vectors = self.codebook[indices]
        return vectors if shape is None else vectors.view(shape).permute(0, 3, 1, 2).contiguous()

    def quantize(self, latents: torch.Tensor) -> Quantization:
        r"""
        Quantises for training.

        Args:
            latents (`torch.Tensor` of shape `(B, C, h, w)`): Raw.

        Returns:
            [`Quantization`]: In float32.
        """
        latents = latents.float()
        base = normalize(latents, dim=1) if self.l2_normalize else latents
        codes = self.codes_of(latents)
        if self.training and self.is_warming_up:
            return Quantization(latents, base.detach(), base.detach(), base, codes)
        quantized = self.codebook[codes].float().permute(0, 3, 1, 2)
        target = latents.detach().clamp(-1, 1) if self.quantizer_type == "fsq" else quantized.detach()
        return Quantization(latents, quantized, target, base + (quantized - base).detach(), codes)

    def forward(self, latents: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, tuple[None, None, torch.Tensor]]:
        r"""Like diffusers' `VectorQuantizer`, but with beta (0.25) on the commitment term, as in the paper."""
        codes = self.codes_of(latents)
        quantized = self.codebook[codes].permute(0, 3, 1, 2).to(latents.dtype)
        loss = codebook_loss(quantized, latents) + 0.25 * commitment_loss(latents, quantized)
        straight_through = latents + (quantized - latents).detach()
        return straight_through.contiguous(), loss, (None, None, codes.flatten())

    @torch.no_grad()
    def note(self, quantization: Quantization) -> None:
        r"""Notes the latents of a micro-batch for the next [`update`] of an `ema` codebook; does nothing for other types."""
        if self.quantizer_type != "ema":
            return
        num_codes = len(self.embedding.weight)
        vectors, codes = quantization.latents.permute(0, 2, 3, 1).flatten(0, 2), quantization.codes.flatten()
        if self.l2_normalize:
            vectors = normalize(vectors, dim=1)
        counts, sums = _count_and_sum(vectors, codes, num_codes)
        chosen = torch.randperm(len(vectors), device=vectors.device)[:num_codes]
        self._noted.append((counts, sums, vectors[chosen]))

    @torch.no_grad()
    def update(self) -> None:
        r"""
        Updates an `ema` codebook by the latents noted since the last call, over all processes; does nothing for other types.

        Call it on every process, after each optimiser step.
        """
        if not self._noted:
            return
        counts, sums, vectors = zip(*self._noted, strict=True)
        self._noted.clear()
        counts, sums = (sum_over_processes(torch.stack(values).sum(0)) for values in (counts, sums))
        self._remember(_in_order_of_microbatches(vectors))
        self.num_updates += 1
        num_updates = int(self.num_updates)
        # The same draws on every process and after a resume.
        generator = torch.Generator().manual_seed(num_updates)
        if num_updates <= self.warmup_steps:
            if num_updates == self.warmup_steps:
                self._set_by_kmeans(counts.sum(), generator)
            return
        self.cluster_size.lerp_(counts, 1 - self.ema_decay)
        self.cluster_sum.lerp_(sums, 1 - self.ema_decay)
        even_share = counts.sum() / len(counts)
        dead = self.cluster_size < self.dead_code_threshold * even_share
        self.cluster_sum[dead] = self._draw_recent(int(dead.sum()), generator) * even_share
        self.cluster_size[dead] = even_share
        self._set_codebook()

    def forget(self) -> None:
        r"""Drops the latents noted since the last [`update`], for a step that is skipped."""
        self._noted.clear()

    def _remember(self, vectors: torch.Tensor) -> None:
        known = self.recent[: int(self.num_recent)]
        newest = torch.cat((known, vectors))[-len(self.recent) :]
        self.recent[: len(newest)] = newest
        self.num_recent.fill_(len(newest))

    def _draw_recent(self, count: int, generator: torch.Generator) -> torch.Tensor:
        """Draws a number of recent latent vectors, none of them twice unless there are too few."""
        known = int(self.num_recent)
        order = torch.cat([torch.randperm(known, generator=generator) for _ in range(-(-count // known) or 1)])
        return self.recent[order[:count].to(self.recent.device)]

    def _set_by_kmeans(self, vectors_per_step: torch.Tensor, generator: torch.Generator) -> None:
        """Lloyd's algorithm on the recent latents, from some of them; a centre that loses all of its points starts again."""
        vectors = self.recent[: int(self.num_recent)]
        centres = self._draw_recent(len(self.embedding.weight), generator)
        for _ in range(_KMEANS_ITERATIONS):
            nearest = torch.cat([torch.cdist(part, centres).argmin(dim=1) for part in vectors.split(_CHUNK)])
            counts, sums = _count_and_sum(vectors, nearest, len(centres))
            empty = counts == 0
            sums[empty], counts[empty] = self._draw_recent(int(empty.sum()), generator), 1
            centres = sums / counts[:, None]
            if self.l2_normalize:
                centres = normalize(centres, dim=1)
        self.cluster_size.copy_(counts * vectors_per_step / counts.sum())
        self.cluster_sum.copy_(centres * self.cluster_size[:, None])
        self._set_codebook()

    def _set_codebook(self) -> None:
        seen = self.cluster_size > 1e-6
        mean = self.cluster_sum / self.cluster_size.clamp(min=1e-6)[:, None]
        if self.l2_normalize:
            mean = normalize(mean, dim=1)
        self.embedding.weight.copy_(torch.where(seen[:, None], mean, self.embedding.weight))


def _count_and_sum(vectors: torch.Tensor, codes: torch.Tensor, num_codes: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Number `(K,)` and sum `(K, C)` of each code's vectors, bit-identical from run to run (a scatter is not)."""
    counts, sums = vectors.new_zeros(num_codes), vectors.new_zeros(num_codes, vectors.shape[1])
    with torch.autocast(vectors.device.type, enabled=False):
        for part, part_codes in zip(vectors.split(_CHUNK), codes.split(_CHUNK), strict=True):
            belongs = part.new_zeros(len(part), num_codes).scatter_(1, part_codes[:, None], 1)
            counts += belongs.sum(0)
            sums += belongs.T @ part
    return counts, sums


def _in_order_of_microbatches(parts: Sequence[torch.Tensor]) -> torch.Tensor:
    """
    The vectors `(S, C)` of each of this process's micro-batches to `(sum of S, C)` of all processes, ordered as one process would.
    `S` may differ from micro-batch to micro-batch.
    """
    if num_processes() > 1:
        sizes = _of_all_processes(torch.tensor([len(part) for part in parts], device=parts[0].device))
        padded = torch.stack([pad(part, (0, 0, 0, int(sizes.max()) - len(part))) for part in parts])
        found = zip(_of_all_processes(padded).flatten(0, 1), sizes.flatten().tolist(), strict=True)
        parts = [vectors[:size] for vectors, size in found]
    return torch.cat(tuple(parts))


def _of_all_processes(values: torch.Tensor) -> torch.Tensor:
    """`(A, ...)` values of this process to `(A, P, ...)` of all."""
    found = [torch.empty_like(values) for _ in range(num_processes())]
    dist.all_gather(found, values.contiguous())
    return torch.stack(found, dim=1)
