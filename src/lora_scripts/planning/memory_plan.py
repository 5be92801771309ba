"""Which micro-batch and whether to use gradient checkpointing, so that a step fits into the memory there is.

The effective batch is the user's and never changes; only how it is cut does.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from types import MappingProxyType

from lora_scripts.planning.activations import ActivationBytes

__all__ = ["OPTIMIZER_BYTES", "MemoryNeeds", "MemoryPlan", "choose_plan", "micro_batch_sizes"]

OPTIMIZER_BYTES: Mapping[str, int] = MappingProxyType(
    {
        "adamw": 8,  # two float32 moments
        "adamw8bit": 2,
        "adafactor": 1,  # rows and columns only; a whole moment for vectors
        "lion": 4,
        "prodigy": 16,  # two moments, the starting point and a running sum
        "adamw_schedulefree": 8,
    }
)
"""Optimizer state per trainable weight."""

WORKSPACE = 1.15
"""Room for what comes and goes within a layer and for fragments; 5 to 12 % were seen on U-Nets."""


@dataclass(frozen=True)
class MemoryNeeds:
    """Bytes by what they are for.

    Attributes:
        weights: of the frozen model on the training device.
        adapter: trainable weights, their gradients and the optimizer's state.
        activations: kept between the passes without gradient checkpointing.
        checkpointed: the same with it: inputs of the blocks, and one block at a time in full.
    """

    weights: int
    adapter: int
    activations: ActivationBytes
    checkpointed: ActivationBytes

    def total(self, micro_batch: int, checkpointing: bool) -> int:
        """Bytes at the peak of a step."""
        kept = (self.checkpointed if checkpointing else self.activations).of(micro_batch)
        return self.weights + self.adapter + round(kept * WORKSPACE)


@dataclass(frozen=True)
class MemoryPlan:
    """How a step is cut.

    Attributes:
        micro_batch: examples in one forward pass.
        accumulation: micro-batches in an optimizer step.
        num_bytes: predicted at the peak of a step.
        budget_bytes: what may be used.
    """

    micro_batch: int
    accumulation: int
    checkpointing: bool
    num_bytes: int
    budget_bytes: int

    @property
    def fits(self) -> bool:
        return self.num_bytes <= self.budget_bytes

    def __str__(self) -> str:
        how = f"{self.micro_batch} x {self.accumulation}{', gradient checkpointing' if self.checkpointing else ''}"
        return f"batch {how}: about {self.num_bytes / 1e9:.1f} of {self.budget_bytes / 1e9:.1f} GB"


def choose_plan(
    needs: MemoryNeeds,
    budget_bytes: int,
    effective_batch: int,
    *,
    micro_batch: int | None = None,
    checkpointing: bool | None = None,
) -> MemoryPlan:
    """The fastest plan that fits, else the smallest one (whose `fits` is then false).

    Larger micro-batches come before smaller ones and both before checkpointing, which computes the forward pass twice.

    Args:
        micro_batch, checkpointing: settings that the user wrote; None for "auto".
    """
    sizes = [micro_batch] if micro_batch is not None else list(micro_batch_sizes(effective_batch))
    ways = [checkpointing] if checkpointing is not None else [False, True]
    plans = [
        MemoryPlan(size, effective_batch // size, way, needs.total(size, way), budget_bytes)
        for way in ways
        for size in sizes
    ]
    return next((plan for plan in plans if plan.fits), min(plans, key=lambda plan: plan.num_bytes))


def micro_batch_sizes(effective_batch: int) -> Iterator[int]:
    """All sizes that divide the effective batch, largest first: every micro-batch is then equally large."""
    return (size for size in range(effective_batch, 0, -1) if effective_batch % size == 0)
