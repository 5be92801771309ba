"""Memory that spills into slow memory: on Windows a full graphics card raises no error, steps just become many times slower.

The driver then keeps part of the tensors in the machine's own memory and fetches them over the bus in every step. It is
recognised by what it does to the time of a step while the card is nearly full.
"""

from __future__ import annotations

import statistics
import sys
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

    from lora_scripts.data.training_data import TrainingExample
    from lora_scripts.training.events import Events
    from lora_scripts.training.micro_batches import MicroBatches

__all__ = ["CardMemory", "SpillDetector", "SpillGuard", "card_memory"]

WINDOW = 5
"""Steps in a row that must all be slow; a single one may have waited for a disk or another program."""
CLIFF = 5.0
"""Times slower than the best window. Memory behind the bus is 10 to 30 times slower, another shape or a warm laptop not
even twice."""
NEARLY_FULL = 0.85
"""Share of the card's memory that torch holds when the driver begins to move tensors; the desktop has the rest."""


@dataclass(frozen=True)
class CardMemory:
    """Memory of a graphics card in bytes: what torch has reserved of it, and all of it."""

    reserved_bytes: int
    total_bytes: int


@dataclass
class SpillDetector:
    """Tells a cliff in the time of steps from the numbers alone.

    Times are compared per pixel or token, so steps of different shapes and sizes can be measured by one another.
    """

    best: float | None = None
    _last: deque[float] = field(default_factory=lambda: deque(maxlen=WINDOW))

    def add(self, seconds: float, cost: int, memory: CardMemory) -> bool:
        """Takes in one step; true when it completes a cliff, which is then forgotten so that it is told once."""
        self._last.append(seconds / cost)
        if len(self._last) < WINDOW:
            return False
        full = memory.reserved_bytes > NEARLY_FULL * memory.total_bytes
        if self.best is not None and full and min(self._last) > CLIFF * self.best:
            self._last.clear()
            return True
        window = statistics.median(self._last)
        self.best = window if self.best is None else min(self.best, window)
        return False


class SpillGuard:
    """Watches the steps of a run on Windows with CUDA, and halves the passes when memory spills."""

    def __init__(self, micro_batches: MicroBatches, events: Events, device: torch.device) -> None:
        self._micro_batches, self._events, self._device = micro_batches, events, device
        self._detector = SpillDetector()
        self._told = False

    def after_step(self, seconds: float, examples: Sequence[TrainingExample]) -> None:
        """Judges a step by the time until its loss was known.

        Steps of mixed shapes are cut into passes that fill the device less well: they say nothing.
        """
        memory = card_memory(self._device)
        if memory is None or len({example.shape for example in examples}) > 1:
            return
        if not self._detector.add(seconds, sum(example.cost for example in examples), memory):
            return
        what = (
            f"Steps have become more than {CLIFF:g} times slower while the graphics card is full: "
            "its driver keeps part of the tensors in the computer's own, slow memory."
        )
        if self._micro_batches.size > 1:
            self._micro_batches.halve(f"{what} A pass held {self._micro_batches.size} examples.")
        elif not self._told:
            self._events.note(f"{what} A pass holds a single example already.", "warning")
        if not self._told:
            self._told = True
            self._events.note(WAYS_OUT, "warning")


WAYS_OUT = (
    "If it stays slow: close other programs that use the graphics card; stop (Ctrl-C) and go on with "
    "gradient_checkpointing: true, which resumes this run; in the NVIDIA control panel set "
    '"CUDA - Sysmem Fallback Policy" to "Prefer No Sysmem Fallback" for python.exe.'
)


def card_memory(device: torch.device) -> CardMemory | None:
    """The card's memory where its driver lets tensors spill: CUDA on Windows. None elsewhere. Does not wait for the device."""
    if sys.platform != "win32" or device.type != "cuda":
        return None
    import torch

    total = torch.cuda.get_device_properties(device).total_memory
    return CardMemory(torch.cuda.memory_reserved(device), int(total))
