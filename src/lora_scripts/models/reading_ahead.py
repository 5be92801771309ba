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

SWITCH_INTERVAL_S = 1e-4
"""How long a thread keeps the interpreter at a time while weights are read."""


class ReadAhead:
    """Tensors of one file, read within a `with` block by a thread of its own.

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
        self._header = header
        self._read = lambda: dict(read_tensors(header, names, device=device, dtype=dtype, images=images))
        self._pool = ThreadPoolExecutor(max_workers=1)

    def __enter__(self) -> Self:
        import torch

        # Torch's own threads would wait for each other in turn with the importing one, and burn time where they wait.
        self._num_threads = torch.get_num_threads()
        torch.set_num_threads(1)
        # By default whoever imports keeps it for 5 ms, and a tensor is read in less.
        self._switch_interval = sys.getswitchinterval()
        sys.setswitchinterval(SWITCH_INTERVAL_S)
        self._reading = self._pool.submit(self._read)
        return self

    def tensors(self, header: WeightsHeader) -> Mapping[str, Tensor]:
        """What is read of a file, by name, when all of it is; empty for a file that is not read here.

        Raises:
            ModelError: as `read_tensors`.
        """
        return self._reading.result() if header.path == self._header.path else {}

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        import torch

        self._pool.shutdown(wait=False, cancel_futures=True)
        torch.set_num_threads(self._num_threads)
        sys.setswitchinterval(self._switch_interval)
