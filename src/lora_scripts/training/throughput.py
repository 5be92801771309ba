"""Where the time of steps goes: padding, waiting for data, and how much of the device's arithmetic is used."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

import torch

from lora_scripts.training.matmul_rate import matmul_rate

if TYPE_CHECKING:
    from lora_scripts.families.protocol import Batch, ModelFamily

__all__ = ["Throughput", "ThroughputMeter"]

TRIAL_S = 0.05
"""How long the device's speed is measured, once in a run."""


@dataclass(frozen=True)
class Throughput:
    """The steps since the last report.

    Attributes:
        waiting: share of their time in which batches were put together and moved to the device.
        padding: share of what went through the model that stood for nothing.
        peak_share: floating-point operations that the objective needs, as a share of those that plain matrix products reach
            in the same time; what checkpointing computes twice counts once.

    The last two are None for a family that does not say how much a pass computes.
    """

    waiting: float
    padding: float | None = None
    peak_share: float | None = None


class ThroughputMeter:
    """Collects what `Throughput` tells, from one report to the next."""

    def __init__(self, family: ModelFamily, device: torch.device) -> None:
        self._family, self._device = family, device
        self._dtype = torch.float32
        self.forget()

    def forget(self) -> None:
        """Begins anew."""
        self._waited_s, self._flops = 0.0, 0.0
        self._places = self._padding = 0

    @cached_property
    def _peak(self) -> float:
        return matmul_rate(self._device, self._dtype, TRIAL_S)

    def batch(self, make: Callable[[], Batch]) -> Batch:
        """The batch of a pass that is about to be computed."""
        began = time.perf_counter()
        batch = make()
        self._waited_s += time.perf_counter() - began
        work = self._family.work(batch)
        if work is not None:
            self._flops += work.flops
            self._places += work.places
            self._padding += work.padding
            self._dtype = work.dtype
        return batch

    def take(self, seconds: float) -> Throughput:
        """What was collected in so many seconds, and begins anew."""
        waiting = min(1.0, self._waited_s / seconds)
        found = Throughput(waiting)
        if self._places:
            # The first report measures the device: between steps, when what they take is free, and off the clock.
            found = Throughput(waiting, self._padding / self._places, self._flops / (seconds * self._peak))
        self.forget()
        return found
