"""How many bytes of tensors are alive at the worst moment of a computation, counted tensor by tensor.

It counts real tensors and fake ones alike: under `FakeTensorMode` the same code says what it would need without needing it.
"""

from __future__ import annotations

import weakref
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

__all__ = ["Life", "LiveBytes"]


@dataclass(slots=True)
class Life:
    """From when to when some memory was in use, both included, on the clock of `LiveBytes`.

    Attributes:
        died: None while it is alive.
    """

    num_bytes: int
    born: int
    died: int | None = None

    def covers(self, moment: int) -> bool:
        return self.born <= moment and (self.died is None or self.died >= moment)


class LiveBytes(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """While entered, follows every tensor that an operation makes until the last reference to its memory is gone.

    What existed before does not count, nor does the scratch memory that a kernel takes and gives back by itself.

    Attributes:
        now, peak: bytes made since it was entered and still alive; the most of them at any time.
        clock: goes on by one with every piece of memory that is made.
        peak_clock: when `peak` was reached.
        lives: of all memory that was made.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.now = 0
        self.peak = 0
        self.clock = 0
        self.peak_clock = 0
        self.lives: list[Life] = []
        # A storage's wrapper lives as long as its memory does, so the reference is called when the memory is given back.
        self._alive: dict[int, tuple[weakref.ref[torch.UntypedStorage], Life]] = {}

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

    def life_of(self, tensor: torch.Tensor) -> Life | None:
        """The life of a tensor's memory, None for what was there before."""
        found = self._alive.get(id(tensor.untyped_storage()))
        return None if found is None else found[1]

    def _follow(self, storage: torch.UntypedStorage) -> None:
        key = id(storage)
        if key in self._alive:
            return
        self.clock += 1
        life = Life(storage.nbytes(), self.clock)

        def freed(reference: object) -> None:
            del self._alive[key]
            life.died = self.clock
            self.now -= life.num_bytes

        self._alive[key] = weakref.ref(storage, freed), life
        self.lives.append(life)
        self.now += life.num_bytes
        if self.now > self.peak:
            self.peak, self.peak_clock = self.now, self.clock
