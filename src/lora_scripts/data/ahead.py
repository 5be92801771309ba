"""Batches made while the device is still busy with the ones before: in a thread, and copied on a stream of their own.

Everything random in a batch belongs to its examples, so it does not matter when, or in which thread, it is made.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from torch import Tensor

    from lora_scripts.data.sampler import Sample
    from lora_scripts.families.protocol import Batch

__all__ = ["BatchesAhead", "moved"]

DEPTH = 2
"""Batches that wait at most: one hides the time of making it, the second what varies of it."""


class BatchesAhead:
    """Hands out batches by the samples in them; those that were announced are made ahead.

    On a CPU there is nothing to hide behind: what computes is what would make them, so batches are made when they are asked for.
    """

    def __init__(
        self, make: Callable[[Sequence[Sample]], Batch], device: torch.device, *, ahead: bool | None = None
    ) -> None:
        """Args:
        make: the batch of some samples, wherever its tensors are; called from another thread.
        ahead: None for what suits the device.
        """
        self._make, self._device = make, device
        ahead = device.type == "cuda" if ahead is None else ahead
        self._thread = ThreadPoolExecutor(1, "batches") if ahead else None
        on_gpu = ahead and device.type == "cuda"
        self._stream = torch.cuda.Stream(device) if on_gpu else None  # type: ignore[no-untyped-call]
        if self._stream is not None:  # encodings that lie on the device may be on their way there still
            self._stream.wait_stream(torch.cuda.current_stream(device))
        self._announced: deque[tuple[Sample, ...]] = deque()
        self._waiting: deque[tuple[tuple[Sample, ...], Future[tuple[Batch, torch.cuda.Event | None]]]] = deque()

    def expect(self, passes: Iterable[Sequence[Sample]]) -> None:
        """Announces the passes that come next, in their order."""
        if self._thread is not None:
            self._announced.extend(tuple(uses) for uses in passes)
            self._begin_more()

    def take(self, uses: Sequence[Sample]) -> Batch:
        """The batch of these samples on the device; made now where it was not announced."""
        if self._waiting and self._waiting[0][0] != tuple(uses):
            self.forget()  # the step is cut otherwise now
        if not self._waiting:
            return moved(self._make(uses), self._device)
        batch, copied = self._waiting.popleft()[1].result()
        self._begin_more()
        if copied is not None:
            stream = torch.cuda.current_stream(self._device)
            stream.wait_event(copied)
            for tensor in batch.tensors.values():
                tensor.record_stream(stream)  # its memory is not given away while this stream still reads it
        return batch

    def forget(self) -> None:
        """Drops what was announced."""
        self._announced.clear()
        for _, batch in self._waiting:
            batch.cancel()
        self._waiting.clear()

    @property
    def num_announced(self) -> int:
        """Passes that were announced and not taken yet."""
        return len(self._announced) + len(self._waiting)

    def _begin_more(self) -> None:
        assert self._thread is not None
        while self._announced and len(self._waiting) < DEPTH:
            uses = self._announced.popleft()
            self._waiting.append((uses, self._thread.submit(self._made, uses)))

    def _made(self, uses: Sequence[Sample]) -> tuple[Batch, torch.cuda.Event | None]:
        if self._stream is None:
            return moved(self._make(uses), self._device), None
        with torch.cuda.device(self._device), torch.cuda.stream(self._stream):
            batch = moved(self._make(uses), self._device)
            return batch, self._stream.record_event()


def moved(batch: Batch, device: torch.device) -> Batch:
    """The batch on the device, through pinned memory where that lets the copy run beside other work."""
    return batch.with_tensors({name: _moved(tensor, device) for name, tensor in batch.tensors.items()})


def _moved(tensor: Tensor, device: torch.device) -> Tensor:
    if tensor.device.type == device.type:
        return tensor
    pinned = tensor.pin_memory() if device.type == "cuda" else tensor
    return pinned.to(device, non_blocking=True)
