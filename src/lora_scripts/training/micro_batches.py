"""A step's examples in passes that fit into memory: when one does not, all further ones are half as large.

The examples of a step, their order and their random numbers stay what they are, so the run's result differs by rounding
alone.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import torch

from lora_scripts.errors import TrainingError
from lora_scripts.training.events import Events

if TYPE_CHECKING:
    from torch import Tensor

    from lora_scripts.data.sampler import Sample, StepPlan
    from lora_scripts.families.protocol import Loss

__all__ = ["MicroBatches", "is_out_of_memory"]


class MicroBatches:
    """Runs forward and backward over a step.

    Attributes:
        size: examples in one pass at most; falls when memory runs out and never rises again.
    """

    def __init__(
        self, plan: StepPlan, size: int, events: Events, device: torch.device, *, may_halve: bool = True
    ) -> None:
        """Args:
        may_halve: false where other processes must make the same passes: then memory that runs out ends the run.
        """
        self._may_halve = may_halve
        self._plan, self._events, self._device = plan, events, device
        self.size = size

    def num_passes(self, uses: Sequence[Sample]) -> int:
        """That the examples are cut into."""
        return sum(1 for _ in self._plan.micro_batches(uses, self.size))

    def run(
        self, uses: Sequence[Sample], backward: Callable[[list[Sample]], Loss], clear: Callable[[], None]
    ) -> tuple[Tensor, int]:
        """The summed loss [] of a step, detached, and what it was summed over; gradients are left in the parameters.

        Args:
            backward: forward and backward pass over one micro-batch.
            clear: drops the gradients of a step that is begun again.
        Raises:
            TrainingError: not even a single example fits, or passes may not be cut.
        """
        while True:
            try:
                total, count = torch.zeros((), device=self._device), 0
                for micro_batch in self._plan.micro_batches(uses, self.size):
                    loss = backward(micro_batch)
                    total += loss.total.detach()
                    count += loss.count
                return total, count
            except RuntimeError as error:
                if not is_out_of_memory(error):
                    raise
                if self.size == 1:
                    raise TrainingError(_too_large(error)) from None
                if not self._may_halve:
                    raise TrainingError(_too_large_for_shards(error, self.size)) from None
            # Outside the handler: the exception's frames would keep the activations of the failed pass alive.
            self.halve(f"Out of memory with {self.size} examples at once.")
            clear()

    def halve(self, reason: str) -> None:
        """Makes all further passes half as large; `reason` is a sentence that says why."""
        self.size = (self.size + 1) // 2
        if self._device.type == "cuda":
            torch.cuda.empty_cache()
        self._events.note(
            f"{reason} The run goes on with {self.size}; steps hold the same examples "
            f"as before. To begin like this the next time: batch_size: {self.size}, and more gradient_accumulation_steps.",
            "warning",
        )


def is_out_of_memory(error: BaseException) -> bool:
    """Whether torch says that memory ran out: its own exception on a GPU, a plain RuntimeError on a CPU and on MPS."""
    text = str(error)
    return isinstance(error, torch.OutOfMemoryError) or "DefaultCPUAllocator" in text or "MPS backend out of" in text


def _too_large_for_shards(error: BaseException, size: int) -> str:
    return (
        f"Out of memory with {size} examples at once ({str(error).splitlines()[0][:120]}). With shard_model all processes make "
        f"the same passes, so none is cut on the way. Checkpoints are intact. Start again with batch_size: {(size + 1) // 2} "
        "and more gradient_accumulation_steps, or gradient_checkpointing: true."
    )


def _too_large(error: BaseException) -> str:
    return (
        f"Out of memory with a single example ({str(error).splitlines()[0][:120]}). Checkpoints are intact. Ways on, the "
        "first that helps: close other programs that use the GPU; gradient_checkpointing: true; a smaller resolution; "
        "train_text_encoder: false."
    )
