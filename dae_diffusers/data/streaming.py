"""Streams images, for data sets larger than the disk, in an order that a resumed run continues exactly."""

import logging
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import datasets
import numpy as np
import torch
from torch.utils.data import Sampler

from dae_diffusers.data.arrays import Depth, without_warnings
from dae_diffusers.data.batches import BatchDataset
from dae_diffusers.data.columns import value_of
from dae_diffusers.data.configuration import DataConfig
from dae_diffusers.data.contents import Root, content_hash, name_of_row, read_content
from dae_diffusers.data.images import ImageReader
from dae_diffusers.errors import UserError, one_line
from dae_diffusers.randomness import Stream, derived_seed

logger = logging.getLogger(__name__)

# Shards are distributed over processes and shuffled; if there are more files than this, several files form a shard.
_MAX_SHARDS = 1024


@dataclass(frozen=True)
class StreamedRow:
    r"""
    One image on its way from the stream to the process that decodes it.

    Attributes:
        image: The column's value, not decoded.
        label (`int` or `None`): Class id.
        number (`int`): Number of the image among those that this process has read.
        draw (`int` or `None`): Seeds the augmentation; None: no augmentation.
    """

    image: Any
    label: int | None
    number: int
    draw: int | None

    @property
    def name(self) -> str:
        r"""Its file's, where it has one."""
        has_path = isinstance(self.image, dict) and self.image.get("path")
        return name_of_row(self.image, 0) if has_path else f"number {self.number} of the stream"


class StreamedImages(BatchDataset):
    r"""
    A split that is not indexed. It makes batches, like [`ImageDataset`], from the rows of an [`ImageStream`]. So the worker
    processes of the loader decode, and the training process reads.

    Args:
        rows (`datasets.IterableDataset`): Rows with images that are not decoded.
        config ([`DataConfig`]): How images are read.
        image_column, label_column (`str`): Columns of `rows`; no labels if the latter is None.
        id2label (`dict[int, str]` or `None`): Names of the classes.
        depth (`str` or `None`): Depth of the first image; the others must fit it.
        fingerprint (`str`): Fingerprint of the data set.
        held_out (`frozenset[bytes]`, *optional*): [`content_hash`] of the validation images.
        num_examples (`int`, *optional*): Number of images, if the data set tells it.
        value_range (`list[float]`, *optional*): Lowest and highest value; default: that of the settings, if given.
        root ([`~dae_diffusers.data.contents.Root`], *optional*): Folder in which the files that rows name must lie.

    Attributes:
        range_warnings (`list[str]`): As in [`ImageDataset`].
    """

    def __init__(
        self,
        rows: datasets.IterableDataset,
        config: DataConfig,
        *,
        image_column: str,
        label_column: str | None,
        id2label: dict[int, str] | None,
        depth: Depth | None,
        fingerprint: str,
        held_out: frozenset[bytes] = frozenset(),
        num_examples: int | None = None,
        value_range: list[float] | None = None,
        root: Root | None = None,
    ):
        self.rows = rows
        self.config = config
        self.image_column = image_column
        self.label_column = label_column
        self.id2label = id2label
        self.fingerprint = fingerprint
        self.held_out = held_out
        self.num_examples = num_examples
        self.root = root
        self._reader = ImageReader(config, depth, value_range=value_range, root=root)
        self.is_array = self._reader.is_array
        self.range_warnings: list[str] = []
        self._num_read = self._num_bad = 0

    @property
    def value_range(self) -> list[float] | None:
        r"""As in [`ImageDataset`]."""
        return self._reader.value_range

    def __getitems__(self, rows: list[StreamedRow]) -> dict[str, torch.Tensor]:
        batch = self.read(rows)
        if batch is None:
            raise UserError(f"all {len(rows)} images of a batch are bad, the last of them {rows[-1].name}.")
        return batch

    @without_warnings()
    def read(self, rows: list[StreamedRow]) -> dict[str, torch.Tensor] | None:
        r"""The batch of some rows; None if all their images are bad and may be skipped."""
        images = [self._read(row) for row in rows]
        good = [index for index, pixels in enumerate(images) if pixels is not None]
        if not good:
            return None
        # A bad image's place is taken by the next good one.
        chosen = [next((g for g in good if g >= index), good[0]) for index in range(len(rows))]
        rows = [rows[index] for index in chosen]
        pixels = np.stack([images[index] for index in chosen])
        batch = {"pixel_values": self._reader.to_pixel_values(pixels, [row.draw for row in rows])}
        if self.id2label is not None:
            batch["class_labels"] = torch.tensor([self._checked_label(row) for row in rows])
        return batch

    def whole(self, row: StreamedRow) -> np.ndarray:
        r"""The whole image of a row, neither scaled nor cropped, `(H, W, C)` float32 in [-1, 1]."""
        return self._reader.whole(row.image, lambda: row.name)

    def _read(self, row: StreamedRow) -> np.ndarray | None:
        self._num_read += 1
        try:
            check_suffix(self.rows, row.image, self.image_column, row.name)
            return self._reader.read(row.image, lambda: row.name, row.draw)
        except UserError as error:
            if self.config.on_bad_image == "raise":
                raise
            self._num_bad += 1
            logger.warning("left out: %s", error)
            # Each worker process counts what it has read. A few images say little about a share.
            if self._num_bad > self.config.max_bad_image_share * max(self._num_read, 1000):
                raise UserError(
                    f"{self._num_bad} of {self._num_read} images are bad, more than `max_bad_image_share` "
                    f"{self.config.max_bad_image_share} allows; the last: {error}"
                ) from None
            return None

    def _checked_label(self, row: StreamedRow) -> int:
        if not isinstance(row.label, int) or not 0 <= row.label < len(self.id2label):
            raise UserError(
                f"the label of the image {row.name} is {row.label}, but labels must lie in 0..{len(self.id2label) - 1}. "
                "Give the right `num_classes`, or train without labels (`label_column none`)."
            )
        return row.label


class ImageStream(Sampler[list[StreamedRow]]):
    r"""
    Yields a process's endless, shuffled micro-batches of [`StreamedImages`].

    Each pass shuffles the shards by `(seed, pass)` and gives them to the processes in turn. If there are fewer shards
    than processes, each process reads all of them and keeps every `num_processes`-th row. Within a pass, images are shuffled
    in blocks of `config.shuffle_buffer_size` that a thread reads ahead. So the images depend only on the seed, the processes and the
    position. A state is a position in the data set and in a block, so a resumed run loses no buffered image.

    Args:
        images ([`StreamedImages`]): What to read.
        batch_size (`int`): Images in a micro-batch.
        seed (`int`): Seed of the run.
        process_index, num_processes (`int`, *optional*): The process whose share this is.
        state (`dict`, *optional*): A [`state_after`] to continue from.
        max_samples (`int`, *optional*): End after one pass, or after this many images, without augmentation.
    """

    def __init__(
        self,
        images: StreamedImages,
        batch_size: int,
        *,
        seed: int,
        process_index: int = 0,
        num_processes: int = 1,
        state: dict[str, Any] | None = None,
        max_samples: int | None = None,
    ):
        self.images = images
        self.batch_size = batch_size
        self.drop_last = False
        self.seed = seed
        self.process_index = process_index
        self.num_processes = num_processes
        self.max_samples = max_samples
        self.block_size = images.config.shuffle_buffer_size
        state = state or {"position": 0, "block_start": 0, "block_size": self.block_size, "epoch": 0}
        if state["block_size"] != self.block_size:
            raise UserError(
                f"`shuffle_buffer_size` is {self.block_size}, but the checkpoint comes from a run with "
                f"{state['block_size']}. Use that value."
            )
        self._state = state
        self._states = {state["block_start"]: state}  # at the beginning of each block

    def __iter__(self) -> Iterator[list[StreamedRow]]:
        position, block_start, batch = self._state["position"], self._state["block_start"], []
        place, states = _Place(self, self._state), {block_start: self._state}
        self._states = states  # of the newest iterator
        pool = ThreadPoolExecutor(max_workers=1, thread_name_prefix="image-stream")
        try:
            block = pool.submit(self._read_block, place, states)
            while rows := block.result():
                block = pool.submit(self._read_block, place, states)
                order = np.random.default_rng((self.seed, 1, block_start)).permutation(len(rows))
                for index in order[position - block_start :]:
                    batch.append(self._row(rows[index], position))
                    position += 1
                    if len(batch) == self.batch_size:
                        yield batch
                        batch = []
                    if position == self.max_samples:
                        break
                block_start += len(rows)
                if position == self.max_samples:
                    break
            if batch:
                yield batch
        finally:
            pool.shutdown(wait=False, cancel_futures=True)

    def state_after(self, num_batches: int) -> dict[str, Any]:
        r"""The state after a number of micro-batches of this stream, as JSON can hold it. Earlier states are no longer available."""
        position = self._state["position"] + num_batches * self.batch_size
        starts = list(self._states)  # at once: the reading thread adds to them
        block_start = max(start for start in starts if start <= position)
        for old in [start for start in starts if start < block_start]:
            del self._states[old]
        return {**self._states[block_start], "position": position, "block_start": block_start}

    def _row(self, row: dict[str, Any], position: int) -> StreamedRow:
        draw = None
        if self.max_samples is None:
            draw = derived_seed(self.seed, Stream.AUGMENTATION, position * self.num_processes + self.process_index)
        label = None if self.images.label_column is None else value_of(row, self.images.label_column)
        return StreamedRow(row[self.images.image_column], label, position, draw)

    def _read_block(self, place: "_Place", states: dict[int, dict[str, Any]]) -> list[dict[str, Any]]:
        try:
            rows = place.read(self.block_size)
        except UserError:
            raise
        except Exception as error:  # the network, the disk or a file's format may fail in any way
            raise UserError(
                f"the stream broke off ({one_line(error, 500)}). Once it can be read again, continue with "
                "`resume_from_checkpoint latest`."
            ) from None
        states[max(states) + len(rows)] = place.state()
        return rows


class _Place:
    """A position in the endless passes over a stream's shards, from which `ImageStream` reads block by block."""

    def __init__(self, stream: ImageStream, state: dict[str, Any]):
        self.stream = stream
        self.rows = stream.images.rows
        self.num_shards = min(self.rows.num_shards, _MAX_SHARDS)
        self.deals_rows = self.num_shards < stream.num_processes
        self.epoch = state["epoch"]
        self.turn = state.get("turn", 0)  # which of the epoch's shards
        self.num_rows = state.get("num_rows", 0)  # that the epoch has given so far
        self.num_kept = state.get("num_kept", 0)
        self._open(state.get("shard"))

    def state(self) -> dict[str, Any]:
        return {
            "block_size": self.stream.block_size,
            "epoch": self.epoch,
            "turn": self.turn,
            "num_rows": self.num_rows,
            "num_kept": self.num_kept,
            "shard": None if self._shard is None else self._shard.state_dict(),
        }

    def read(self, number: int) -> list[dict[str, Any]]:
        """The next rows, all from one pass. Empty only if a single pass was asked for and has ended."""
        kept = []
        while len(kept) < number:
            row = next(self._iterator, None)
            if row is not None:
                self.num_rows += 1
                if self._is_mine(row):
                    self.num_kept += 1
                    kept.append(row)
            elif self._shard is not None:
                self.turn += 1
                self._open()
            elif kept or self.stream.max_samples is not None:
                break
            elif self.num_kept == 0:
                raise UserError(
                    f"the training split has no image for process {self.stream.process_index} of "
                    f"{self.stream.num_processes} ({self.num_rows} rows read, {len(self.stream.images.held_out)} images held "
                    "out). Lower `max_validation_samples`, or use fewer processes."
                )
            else:
                self.epoch, self.turn, self.num_rows, self.num_kept = self.epoch + 1, 0, 0, 0
                self._open()
        return kept

    def _open(self, shard_state: dict[str, Any] | None = None) -> None:
        """Opens the next shard, or continues inside it. Without one the pass is over."""
        order = np.random.default_rng((self.stream.seed, 0, self.epoch)).permutation(self.num_shards)
        if not self.deals_rows:
            order = order[self.stream.process_index :: self.stream.num_processes]
        self._shard, self._iterator = None, iter(())
        if self.turn < len(order):
            self._shard = self.rows.shard(num_shards=self.num_shards, index=int(order[self.turn]))
            if shard_state is not None:
                self._shard.load_state_dict(shard_state)
            self._iterator = iter(self._shard)

    def _is_mine(self, row: dict[str, Any]) -> bool:
        if self.deals_rows and (self.num_rows - 1) % self.stream.num_processes != self.stream.process_index:
            return False
        images = self.stream.images
        row[images.image_column] = fetch(row[images.image_column], images.root)
        return not images.held_out or content_hash(row[images.image_column], images.root) not in images.held_out


def check_suffix(rows: datasets.IterableDataset, item: Any, column: str, name: str) -> None:
    r"""Raises `UserError` for a row of a streamed webdataset whose picture has another suffix than the first ones have."""
    if item is None and rows.info.builder_name == "webdataset":
        raise UserError(
            f"the image {name} is not a .{column} file: of a webdataset on the Hub, only the suffixes of the first samples are "
            "streamed, and the files of a sample must lie side by side in the .tar. Leave `streaming` out, which reads them "
            "all."
        )


def fetch(item: Any, root: Root | None = None) -> Any:
    r"""Reads the bytes of an image that lies in a file or on the Hub. None for an empty row; others as they are."""
    if not isinstance(item, dict) or item.get("bytes") is not None:
        return item
    if not item.get("path"):
        return None
    if "://" not in item["path"] or (root is not None and "://" not in root.folder):
        return item
    try:
        return {**item, "bytes": read_content(item, root)}
    except ValueError:  # refused: who decodes it names it
        return item
