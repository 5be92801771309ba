"""How many bytes of tensors are alive at the worst moment of a computation, counted tensor by tensor.

It counts real tensors and fake ones alike: under `FakeTensorMode` the same code says what it would need without needing it.
"""

from __future__ import annotations

import weakref
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

__all__ = ["LiveBytes"]


class LiveBytes(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """While entered, follows every tensor that an operation makes until the last reference to its memory is gone.

    What existed before does not count, nor does the scratch memory that a kernel takes and gives back by itself.

    Attributes:
        now, peak: bytes made since it was entered and still alive; the most of them at any time.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.now = 0
        self.peak = 0
        # A storage's wrapper lives as long as its memory does, so the reference is called when the memory is given back.
        self._alive: dict[int, weakref.ref[torch.UntypedStorage]] = {}

    def __torch_dispatch__(
        self, func: Any, types: Sequence[type], args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        # Views and results written in place take no memory; a view of a weight must not be taken for a new tensor.
        if all(returned.alias_info is None for returned in func._schema.returns):
            for leaf in tree_leaves(result):
                if isinstance(leaf, torch.Tensor):
                    self._follow(leaf.untyped_storage())
        return result

    def _follow(self, storage: torch.UntypedStorage) -> None:
        key, num_bytes = id(storage), storage.nbytes()
        if key in self._alive:
            return

        def freed(reference: object) -> None:
            del self._alive[key]
            self.now -= num_bytes

        self._alive[key] = weakref.ref(storage, freed)
        self.now += num_bytes
        self.peak = max(self.peak, self.now)
