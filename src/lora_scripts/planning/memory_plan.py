"""Which micro-batch and whether to use gradient checkpointing, so that a step fits into the memory there is.

The effective batch is the user's and never changes; only how it is cut does.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import TYPE_CHECKING, Self

from lora_scripts.preflight.wording import gigabytes

if TYPE_CHECKING:
    from lora_scripts.config import RunConfig

__all__ = [
    "OPTIMIZER_BYTES",
    "SCRATCH",
    "MemoryNeeds",
    "MemoryPlan",
    "PassBytes",
    "choose_plan",
    "describe_split",
    "micro_batch_sizes",
    "optimizer_bytes",
]

PassBytes = Callable[[int, bool], int]
"""(micro-batch, checkpointing) -> bytes at the worst moment of a pass, weights left out."""

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
AVERAGE_BYTES = 4
"""Of the moving average per trainable weight."""

SCRATCH = 1.1
"""What kernels take for themselves and what is lost between blocks of memory, until a measurement says more."""


def optimizer_bytes(config: RunConfig) -> int:
    """Per trainable weight: the optimizer's state, with the weights' moving average where one is kept."""
    return OPTIMIZER_BYTES[config.optimizer] + (AVERAGE_BYTES if config.ema_decay else 0)


@dataclass(frozen=True)
class MemoryNeeds:
    """Bytes by what they are for.

    Attributes:
        weights: of what is used in a step, frozen and trainable, on the training device.
        optimizer: the optimizer's state.
        of_pass: what a pass takes; asked only for the plans that are looked at, because an answer takes seconds.
        gradients: of the trainable weights; they wait for the next pass where a step is cut into several.
        factor: what a pass really takes, as a multiple of `of_pass`.
    """

    weights: int
    optimizer: int
    of_pass: PassBytes
    gradients: int = 0
    factor: float = SCRATCH

    def beside(self, num_bytes: int) -> Self:
        """The same where something else takes memory too, or, below zero, weights take less."""
        return replace(self, weights=self.weights + num_bytes)

    def total(self, micro_batch: int, checkpointing: bool, accumulation: int = 1) -> int:
        """Bytes at the peak of a step of so many passes."""
        waiting = self.gradients if accumulation > 1 else 0
        of_pass = round(self.of_pass(micro_batch, checkpointing) * self.factor)
        return self.weights + self.optimizer + waiting + of_pass


@dataclass(frozen=True)
class MemoryPlan:
    """How a step is cut.

    Attributes:
        micro_batch: examples in one forward pass.
        accumulation: micro-batches in an optimizer step.
        num_bytes: predicted at the peak of a step.
        budget_bytes: what may be used.
        measured: a trial pass was run and `num_bytes` follows from it.
    """

    micro_batch: int
    accumulation: int
    checkpointing: bool
    num_bytes: int
    budget_bytes: int
    measured: bool = False

    @property
    def fits(self) -> bool:
        return self.num_bytes <= self.budget_bytes

    @property
    def cut(self) -> tuple[int, bool]:
        """What tells two plans of one run apart."""
        return self.micro_batch, self.checkpointing

    def __str__(self) -> str:
        source = "measured" if self.measured else "predicted"
        split = describe_split(self.micro_batch, self.accumulation, self.checkpointing)
        enough = "" if self.fits else ", which is too little"
        return f"{source} {gigabytes(self.num_bytes)} of {gigabytes(self.budget_bytes)} usable{enough}; {split}"


def describe_split(micro_batch: int, accumulation: int, checkpointing: bool) -> str:
    """`batch 4 as 2 passes of 2, checkpointing on`."""
    passes = "in one pass" if accumulation == 1 else f"as {accumulation} passes of {micro_batch}"
    return f"batch {micro_batch * accumulation} {passes}, checkpointing {'on' if checkpointing else 'off'}"


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
    seen = []
    for way in ways:
        for size in sizes:
            passes = effective_batch // size
            plan = MemoryPlan(size, passes, way, needs.total(size, way, passes), budget_bytes)
            if plan.fits:
                return plan
            seen.append(plan)
    return min(seen, key=lambda plan: plan.num_bytes)


def micro_batch_sizes(effective_batch: int) -> Iterator[int]:
    """All sizes that divide the effective batch, largest first: every micro-batch is then equally large."""
    return (size for size in range(effective_batch, 0, -1) if effective_batch % size == 0)
