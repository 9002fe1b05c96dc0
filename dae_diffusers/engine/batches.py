"""Endless training batches for one process, the position in a stream, and the time spent waiting for data."""

import logging
import time
from collections.abc import Iterator
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object, send_to_device
from torch.utils.data import Dataset

from dae_diffusers.data.loaders import make_stream_loader, make_training_loader
from dae_diffusers.data.streaming import ImageStream, StreamedImages

logger = logging.getLogger(__name__)


class TrainingBatches:
    r"""
    Args:
        accelerator ([`~accelerate.Accelerator`]): The run's accelerator.
        batch_size (`int`): Images in a micro-batch.
        seed (`int`): Seed of the run; the order depends on it and the step alone.
        num_workers (`int`): Processes that read images.
        balanced (`bool`, *optional*): Whether each class comes equally often.
    """

    def __init__(
        self, accelerator: Accelerator, *, batch_size: int, seed: int, num_workers: int, balanced: bool = False
    ):
        self.accelerator = accelerator
        self.batch_size = batch_size
        self.seed = seed
        self.num_workers = num_workers
        self.balanced = balanced
        self._stream: ImageStream | None = None
        self._stream_state: dict[str, Any] | None = None
        self._num_batches = 0  # taken from the present loader
        self._training_seconds = self._waiting_seconds = 0.0

    def over(self, dataset: Dataset, first_microbatch: int) -> Iterator[dict[str, torch.Tensor]]:
        r"""
        Yields endless micro-batches for this process, on its device. A stream continues where the checkpoint, or the last call,
        left it.

        Args:
            dataset (`Dataset`): Images, cached latents or codes.
            first_microbatch (`int`): Number of the first micro-batch that any process takes, counted over all processes.
        """
        device = self.accelerator.device
        options = {"num_workers": self.num_workers, "pin_memory": device.type == "cuda"}
        if isinstance(dataset, StreamedImages):
            if self._stream is not None:
                self._stream_state = self._stream.state_after(self._num_batches)
            self._stream = ImageStream(
                dataset,
                self.batch_size,
                seed=self.seed,
                process_index=self.accelerator.process_index,
                num_processes=self.accelerator.num_processes,
                state=self._stream_state,
            )
            loader = make_stream_loader(self._stream, **options)
            batches = (send_to_device(batch, device, non_blocking=True) for batch in loader)
        else:
            loader = make_training_loader(
                dataset,
                batch_size=self.batch_size,
                seed=self.seed,
                start=first_microbatch,
                balanced=self.balanced,
                **options,
            )
            batches = self.accelerator.prepare(loader)  # it deals them out to the processes
        self._num_batches = 0
        return self._timed(iter(batches))

    @property
    def waiting_share(self) -> float | None:
        r"""Share of the training time spent waiting for data; None before the second batch."""
        return self._waiting_seconds / self._training_seconds if self._training_seconds else None

    def state(self) -> list[dict[str, Any]] | None:
        r"""The position in the stream of each process; None without a stream. All processes call it."""
        if self._stream is None:
            return None
        return gather_object([self._stream.state_after(self._num_batches)])

    def load_state(self, states: list[dict[str, Any]] | None) -> None:
        r"""Continues from a [`state`]. With another number of processes a new pass over the stream begins."""
        if states is None:
            return
        if len(states) == self.accelerator.num_processes:
            self._stream_state = states[self.accelerator.process_index]
            return
        logger.warning(
            "the checkpoint's stream was read by %d processes, this run has another number: it begins a new pass over the data.",
            len(states),
        )
        epoch = 1 + max(state["epoch"] for state in states)
        self._stream_state = {
            "position": 0,
            "block_start": 0,
            "block_size": states[0]["block_size"],
            "epoch": epoch,
        }

    def _next(self, batches: Iterator) -> dict[str, torch.Tensor]:
        try:
            return next(batches)
        except (ConnectionError, EOFError) as error:
            if not self.num_workers:
                raise
            time.sleep(1)  # torch hears of a process that died by a signal, and then raises here and says how
            raise RuntimeError("DataLoader worker ended while it handed a batch over") from error

    def _timed(self, batches: Iterator) -> Iterator:
        while True:
            asked = time.perf_counter()
            batch = self._next(batches)
            got = time.perf_counter()
            self._num_batches += 1
            if self._num_batches > 1:  # the first one starts the worker processes
                self._waiting_seconds += got - asked
            yield batch
            if self._num_batches > 1:
                self._training_seconds += time.perf_counter() - asked
