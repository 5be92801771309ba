"""Batches for the captioner: pictures decoded ahead in threads, and a batch size found by trying."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from lora_scripts.data.images import image_digest, read_image
from lora_scripts.errors import DataError, ModelError

__all__ = ["BatchSize", "Loader", "Picture", "is_out_of_memory"]

LARGEST_BATCH = {"cuda": 64, "mps": 16, "cpu": 16}
"""Where trying stops. A run that is killed loses the batch that it is at; on a CPU memory is shared, too."""
FIRST_BATCH = {"cuda": 8, "cpu": 8}
"""Pictures of the first batch, if not two: it warms up and brings the first sign of life, so it is a small one."""
FIRST_TRIED = {"cpu": 16}
"""Where trying begins, if not there. On a CPU the encoder, which needs the memory, takes a few pictures at a time in any case, while the
decoder reads all of its weights for every token, however many pictures share it."""


@dataclass(frozen=True)
class Picture:
    """A picture on its way to the captioner.

    Attributes:
        digest: SHA-256 of the file.
        num_bytes: size of the file.
        prepared: what the captioner made of the pixels; None for a copy of a picture that is already on its way.
        fault: why it cannot be captioned; empty when it can.
    """

    name: str
    digest: str = ""
    num_bytes: int = 0
    prepared: Any = None
    fault: str = ""


class Loader:
    """Reads pictures in worker threads, some ahead of the captioner, and gives them back in their order."""

    def __init__(
        self,
        folder: Path,
        names: Sequence[str],
        prepare: Callable[[Any], Any],
        *,
        at_least: int,
        num_workers: int,
        ahead: Callable[[], int],
    ) -> None:
        self._folder = folder
        self._names = iter(names)
        self._prepare = prepare
        self._at_least = at_least
        self._ahead = ahead
        self._pool = ThreadPoolExecutor(num_workers, thread_name_prefix="pictures")
        self._reading: deque[Future[Picture]] = deque()
        self._lock = threading.Lock()
        self._claimed: set[str] = set()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._pool.shutdown(wait=kind is None, cancel_futures=True)

    def __iter__(self) -> Iterator[Picture]:
        while True:
            while len(self._reading) < self._ahead():
                name = next(self._names, None)
                if name is None:
                    break
                self._reading.append(self._pool.submit(self._read, name))
            if not self._reading:
                return
            yield self._reading.popleft().result()

    def _read(self, name: str) -> Picture:
        path = self._folder / name
        digest = ""
        try:
            digest = image_digest(path)
            num_bytes = path.stat().st_size
            with self._lock:
                copy = digest in self._claimed
                self._claimed.add(digest)
            if copy:
                return Picture(name, digest, num_bytes)
            image = read_image(path, at_least=self._at_least)
        except DataError as error:
            return Picture(name, digest, fault=str(error).removeprefix(f"{path}: "))
        except OSError as error:
            return Picture(name, digest, fault=f"cannot be read ({error.strerror or type(error).__name__}).")
        return Picture(name, digest, num_bytes, self._prepare(image))


class BatchSize:
    """The number of pictures per batch: doubled while that makes captioning faster, halved when memory runs out.

    Args:
        fixed: the user's own choice, which is only ever lowered by a lack of memory.
        device: kind of device, which decides where doubling begins and ends.
    """

    def __init__(self, fixed: int | None, device: str) -> None:
        self.value = fixed or FIRST_BATCH.get(device, 2)
        self._first_tried = fixed or FIRST_TRIED.get(device, self.value)
        self._largest = max(LARGEST_BATCH.get(device, 8), self.value)
        self._trying = fixed is None
        self._rates: dict[int, float] = {}
        self._warm = False

    def record(self, count: int, seconds: float) -> None:
        """Take in how long a batch of `count` pictures took."""
        if not self._trying or count != self.value:
            return
        if not self._warm:  # the first batch pays for compiling kernels and filling caches
            self._warm = True
            self.value = self._first_tried
            return
        self._rates[self.value] = count / max(seconds, 1e-9)
        best = max(self._rates, key=lambda size: self._rates[size])
        if best == self.value and self.value * 2 <= self._largest:
            self.value *= 2
        else:
            self.value = best
            self._trying = False

    def out_of_memory(self) -> None:
        """Halve the size for good.

        Raises:
            ModelError: a single picture is already too much.
        """
        if self.value == 1:
            raise ModelError(
                "Not enough memory to caption a single picture. Close other programs, choose a smaller --model, fewer "
                "--candidates, or --device cpu. The captions written so far are safe."
            )
        self.value //= 2
        self._largest = self.value
        self._trying = False


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an exception of torch or Python means that memory ran out."""
    import torch

    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return True
    text = str(error).lower()
    return isinstance(error, RuntimeError) and any(
        words in text for words in ("out of memory", "can't allocate memory", "not enough memory", "alloc_failed")
    )
