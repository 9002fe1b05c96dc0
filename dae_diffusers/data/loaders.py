"""The order of a data set's images, and the loaders that read them."""

import ctypes
import itertools
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset, Sampler

from dae_diffusers.data.buckets import Buckets, buckets_of
from dae_diffusers.data.streaming import ImageStream, StreamedImages
from dae_diffusers.errors import UserError
from dae_diffusers.randomness import Stream, derived_seed
from dae_diffusers.signals import protect_worker

# From glibc's malloc.h: blocks from this size on are mapped, and given back when they are freed.
M_MMAP_THRESHOLD = -3

# One pass over a stream ends after this many images, over all processes.
STREAM_PASS_SAMPLES = 50_000


class MicrobatchSampler(Sampler[list[tuple[int, int]]]):
    r"""
    Yields endless micro-batches of `(image number, draw)`. Micro-batch `m` is a pure function of `(seed, m)`. Each pass over
    the data has another order, and contains every image exactly once.

    With several buckets, each micro-batch is from one. Each bucket is passed over by itself: what does not fill a micro-batch begins the
    next one of that bucket. A round has about as many micro-batches as a pass over all images. After it, each image has come as often as
    any other, up to what does not fill a micro-batch.

    It does not depend on processes: `accelerate` gives each process the micro-batches `m = i * num_processes + process_index`.

    Args:
        num_samples (`int`): Number of images.
        batch_size (`int`): Images in a micro-batch.
        seed (`int`): Seed of the run.
        start (`int`, *optional*, defaults to 0): The first micro-batch, to continue a run.
        buckets ([`~dae_diffusers.data.buckets.Buckets`], *optional*): In which bucket each image is; default: all in one.
    """

    def __init__(self, num_samples: int, batch_size: int, seed: int, start: int = 0, buckets: Buckets | None = None):
        self.buckets = buckets or Buckets.single(num_samples)
        self.batch_size = batch_size
        self.drop_last = False
        self.seed = seed
        self.start = start

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        images, microbatch = [_BucketOrder(self, bucket) for bucket in range(len(self.buckets.counts))], self.start
        number, place = self._place(microbatch)
        while True:
            for bucket, batch in self._round(number)[place:]:
                draws = range(microbatch * self.batch_size, (microbatch + 1) * self.batch_size)
                members = (images[bucket].at(batch * self.batch_size + n) for n in range(self.batch_size))
                yield [
                    (index, derived_seed(self.seed, Stream.AUGMENTATION, draw))
                    for index, draw in zip(members, draws, strict=True)
                ]
                microbatch += 1
            number, place = number + 1, 0

    def _done(self, number: int) -> list[int]:
        """Micro-batches of each bucket before a round."""
        return [number * count // self.batch_size for count in self.buckets.counts]

    def _round(self, number: int) -> list[tuple[int, int]]:
        """The micro-batches of a round: which bucket, and which of that bucket's."""
        done, then = self._done(number), self._done(number + 1)
        waiting = [iter(range(*each)) for each in zip(done, then, strict=True)]
        order = np.repeat(np.arange(len(done)), np.subtract(then, done))
        order = np.random.default_rng((self.seed, number, 1)).permutation(order).tolist()
        return [(bucket, next(waiting[bucket])) for bucket in order]

    def _place(self, microbatch: int) -> tuple[int, int]:
        """The round of a micro-batch, and its place there."""
        number = microbatch * self.batch_size // sum(self.buckets.counts)
        # Or later: rounding down leaves micro-batches for later rounds.
        while sum(self._done(number + 1)) <= microbatch:
            number += 1
        return number, microbatch - sum(self._done(number))


class _BucketOrder:
    """The endless order of a bucket's images: each pass is shuffled by itself."""

    def __init__(self, sampler: MicrobatchSampler, bucket: int):
        self.seed, self.total = sampler.seed, sum(sampler.buckets.counts)
        self.members, self.number, self.order = sampler.buckets.ranges[bucket], -1, []

    def at(self, position: int) -> int:
        number, place = divmod(position, len(self.members))
        if number != self.number:
            order = np.random.default_rng((self.seed, number)).permutation(self.total)
            self.number, self.order = number, order[(order >= self.members.start) & (order < self.members.stop)]
        return int(self.order[place])


class BalancedSampler(Sampler[list[tuple[int, int]]]):
    r"""
    As [`MicrobatchSampler`], with each class equally often. Each round has an image of every class, in a new order; each pass over a class
    has another order and contains each of its images exactly once.

    Args:
        labels (`Sequence[int]`): The class of each image.
        batch_size, seed, start: As [`MicrobatchSampler`].
    """

    def __init__(self, labels: Sequence[int], batch_size: int, seed: int, start: int = 0):
        labels = np.asarray(labels)
        self.members = [np.flatnonzero(labels == label) for label in np.unique(labels)]
        self.batch_size, self.drop_last, self.seed, self.start = batch_size, False, seed, start

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        number, order = -1, np.empty(0)
        passes, orders = [-1] * len(self.members), list(self.members)
        for position in itertools.count(self.start * self.batch_size):
            if position % self.batch_size == 0:
                batch = []
            if position // len(self.members) != number:
                number = position // len(self.members)
                order = np.random.default_rng((self.seed, number, 2)).permutation(len(self.members))
            chosen = order[position % len(self.members)]
            of_class, place = divmod(number, len(self.members[chosen]))
            if of_class != passes[chosen]:
                passes[chosen] = of_class
                random = np.random.default_rng((self.seed, of_class, 3, int(chosen)))
                orders[chosen] = random.permutation(self.members[chosen])
            batch.append((int(orders[chosen][place]), derived_seed(self.seed, Stream.AUGMENTATION, position)))
            if len(batch) == self.batch_size:
                yield batch


def make_training_loader(
    dataset: Dataset,
    *,
    batch_size: int,
    seed: int,
    start: int = 0,
    num_workers: int = 0,
    pin_memory: bool = False,
    balanced: bool = False,
) -> DataLoader:
    r"""
    Makes an endless loader of shuffled micro-batches, to be prepared by `accelerate`; see [`MicrobatchSampler`] and, with `balanced`,
    [`BalancedSampler`].

    Raises:
        UserError: With `balanced`, if the data has no classes.
    """
    buckets = buckets_of(dataset)
    if balanced and not getattr(dataset, "labels", None):
        raise UserError("`balance_classes` needs images with classes: sub-folders, or a `label_column`.")
    if batch_size > min(buckets.counts):
        what, hint = f"the data set ({len(dataset)} images)", "Use a smaller batch"
        if len(buckets.counts) > 1:
            small = [bucket for bucket, count in enumerate(buckets.counts) if count < batch_size]
            what, hint = f"a bucket: {buckets.part(small)}", f"{hint} or fewer buckets"
        warnings.warn(
            f"`--train_batch_size` {batch_size} is larger than {what}: images repeat within a batch. {hint}.",
            stacklevel=2,
        )
    return DataLoader(
        dataset,
        batch_sampler=BalancedSampler(dataset.labels, batch_size, seed, start)
        if balanced
        else MicrobatchSampler(len(dataset), batch_size, seed, start, buckets),
        collate_fn=collate_fn_of(dataset),
        num_workers=num_workers,
        worker_init_fn=prepare_worker,
        persistent_workers=num_workers > 0,
        pin_memory=pin_memory,
    )


def make_stream_loader(stream: ImageStream, *, num_workers: int = 0, pin_memory: bool = False) -> DataLoader:
    r"""Makes a loader of this process's batches of a stream, decoded in `num_workers` processes. It must not be prepared."""
    return DataLoader(
        stream.images,
        batch_sampler=stream,
        collate_fn=stream.images.collate_fn,
        num_workers=num_workers,
        worker_init_fn=prepare_worker,
        pin_memory=pin_memory,
    )


def make_pass_loader(
    dataset: Dataset, *, batch_size: int, process_index: int = 0, num_processes: int = 1, num_workers: int = 0
) -> DataLoader:
    r"""
    Makes a loader for one pass without augmentation over this process's share. Over all processes each image comes exactly once.
    For a stream, a pass is `STREAM_PASS_SAMPLES` images, shuffled as in its first pass with the seed 0.
    """
    if isinstance(dataset, StreamedImages):
        stream = ImageStream(
            dataset,
            batch_size,
            seed=0,
            process_index=process_index,
            num_processes=num_processes,
            max_samples=-(-STREAM_PASS_SAMPLES // num_processes),
        )
        return make_stream_loader(stream, num_workers=num_workers)
    share = range(process_index, len(dataset), num_processes)
    return DataLoader(
        dataset,
        batch_sampler=list(buckets_of(dataset).batches(share, batch_size)),
        num_workers=num_workers,
        worker_init_fn=prepare_worker,
        collate_fn=collate_fn_of(dataset),
    )


def prepare_worker(worker: int) -> None:
    r"""Sets up a loader's process: it gives memory back, and leaves signals to the run."""
    give_back_memory()
    protect_worker()


def give_back_memory() -> None:
    r"""
    Makes a loader's process give every freed batch back to the system at once. Otherwise glibc keeps up to a hundred of them on its
    heap: gigabytes in each process for large images. Other C libraries are left alone.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if mallopt is not None:
        mallopt(M_MMAP_THRESHOLD, 2**20)


def collate_fn_of(dataset: Dataset) -> Callable | None:
    r"""The `collate_fn` of a data set that makes whole batches, also inside a `Subset`; None for other data sets."""
    while isinstance(dataset, torch.utils.data.Subset):
        dataset = dataset.dataset
    return getattr(dataset, "collate_fn", None)


def describe_size(dataset: Dataset) -> str:
    r"""How many images a run trains on, in words."""
    if not isinstance(dataset, StreamedImages):
        return f"{len(dataset)} training images"
    size = "of unknown length" if dataset.num_examples is None else f"of {dataset.num_examples} images"
    return f"a stream {size} in {dataset.rows.num_shards} shards"


def count_images(dataset: Dataset) -> dict[str, int]:
    r"""The number of images for the record of a run; empty if it is not known."""
    number = dataset.num_examples if isinstance(dataset, StreamedImages) else len(dataset)
    return {} if number is None else {"training_images": number}


def held_out_settings(dataset: Dataset) -> dict[str, float]:
    r"""The settings that say how many images of a stream are held out, which a resumed run keeps; empty if none are."""
    is_part = isinstance(dataset, StreamedImages) and dataset.held_out
    names = ("max_validation_samples", "validation_fraction") if is_part else ()
    return {name: getattr(dataset.config, name) for name in names}
