"""Weights that are read while the libraries that will hold them are imported."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from types import TracebackType
from typing import TYPE_CHECKING, Self

from lora_scripts.models.weights_file import WeightsHeader, read_tensors

if TYPE_CHECKING:
    import torch
    from torch import Tensor

__all__ = ["ReadAhead"]

MOST_THREADS = 4
"""Beyond that the memory is busy."""

BYTES_AT_ONCE = 1 << 26
"""That a thread takes at a time, in the order of the file, so that a disk reads it from front to back."""

SWITCH_INTERVAL_S = 1e-4
"""How long a thread keeps the interpreter at a time while weights are read."""


class ReadAhead:
    """Tensors of one file, read within a `with` block by threads of their own, as many as torch computes with.

    Reading and converting need no interpreter, importing needs hardly anything else: side by side, both take as long as the
    longer of the two.

    Args:
        header: of the file.
        names: of its tensors.
        device, dtype, images: as `read_tensors` takes them.
    """

    def __init__(
        self,
        header: WeightsHeader,
        names: Iterable[str],
        device: torch.device | str,
        dtype: torch.dtype,
        images: torch.memory_format | None = None,
    ) -> None:
        self._header, self._pieces = header, _pieces(header, names)
        self._read = lambda piece: dict(read_tensors(header, piece, device=device, dtype=dtype, images=images))

    def __enter__(self) -> Self:
        import torch

        # Torch's own threads would wait for each other in turn with the importing one, and burn time where they wait.
        self._num_threads = torch.get_num_threads()
        torch.set_num_threads(1)
        # By default whoever imports keeps it for 5 ms, and a tensor is read in less.
        self._switch_interval = sys.getswitchinterval()
        sys.setswitchinterval(SWITCH_INTERVAL_S)
        self._pool = ThreadPoolExecutor(max_workers=min(MOST_THREADS, self._num_threads))
        self._reading = [self._pool.submit(self._read, piece) for piece in self._pieces]
        return self

    def tensors(self, header: WeightsHeader) -> Mapping[str, Tensor]:
        """What is read of a file, by name, when all of it is; empty for a file that is not read here.

        Raises:
            ModelError: as `read_tensors`.
        """
        if header.path != self._header.path:
            return {}
        return {name: tensor for reading in self._reading for name, tensor in reading.result().items()}

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        import torch

        self._pool.shutdown(wait=False, cancel_futures=True)
        torch.set_num_threads(self._num_threads)
        sys.setswitchinterval(self._switch_interval)


def _pieces(header: WeightsHeader, names: Iterable[str]) -> list[list[str]]:
    """The names in the order of the file, in groups of about `BYTES_AT_ONCE`."""
    pieces: list[list[str]] = []
    num_bytes = BYTES_AT_ONCE
    for name in sorted(names, key=lambda name: header.tensors[name].begin):
        if num_bytes >= BYTES_AT_ONCE:
            pieces.append([])
            num_bytes = 0
        pieces[-1].append(name)
        num_bytes += header.tensors[name].num_bytes
    return pieces
