"""How a run computes its passes: what was chosen for it, and the pass that comes of it. The loop sees no difference."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from lora_scripts.training.graphs import GraphsOrPlain, StaticPasses
from lora_scripts.training.recorded import RecordedPasses

if TYPE_CHECKING:
    import torch
    from torch import nn

    from lora_scripts.families.protocol import Batch, Loss, ModelFamily
    from lora_scripts.models.low_bit_layers import LowBitLayers
    from lora_scripts.models.packed_conv import PackedConvolutions
    from lora_scripts.training.compiling import CompiledParts
    from lora_scripts.training.draws import Draws
    from lora_scripts.training.events import Events

__all__ = ["PLAIN", "Speed", "TrainingPass"]


class TrainingPass(Protocol):
    """Forward and backward over one micro-batch, whose tensors hold all that is random."""

    def __call__(self, batch: Batch) -> Loss:
        """The loss, of which no further gradient is asked; its gradient was added to that of the parameters."""
        ...

    def forget(self) -> None:
        """Gives back memory that is held between passes."""
        ...


@dataclass(frozen=True)
class _PlainPass:
    run: Callable[[Batch], Loss]

    def __call__(self, batch: Batch) -> Loss:
        return self.run(batch)

    def forget(self) -> None:
        return None


@dataclass(frozen=True)
class Speed:
    """What a run uses.

    Attributes:
        compiled: parts of the model that run compiled; None for none.
        graphs: whether passes are recorded as CUDA graphs.
        low_bit: frozen layers that multiply in 8 bits; None for none.
        packed: frozen convolutions that will keep their weights in the kernels' order; None for none.
        recorded: whether passes are recorded as lists of operations, on a CPU.
    """

    compiled: CompiledParts | None = None
    graphs: bool = False
    low_bit: LowBitLayers | None = None
    packed: PackedConvolutions | None = None
    recorded: bool = False

    def before_step(self, step: int) -> None:
        """Prepares what pays only in a run that goes on: by the step's number, so that a resumed run computes alike."""
        if self.packed is not None and step > 0:
            self.packed.begin()

    def training_pass(
        self,
        family: ModelFamily,
        draws: Draws,
        parameters: Sequence[nn.Parameter],
        scaler: torch.amp.GradScaler,
        device: torch.device,
        events: Events,
    ) -> TrainingPass:
        """The pass of this run."""

        def forward(batch: Batch) -> Loss:
            with at_work():
                return family.loss(batch, draws)

        def plain(batch: Batch) -> Loss:
            with at_work():  # around the backward pass too: checkpointing calls the parts again in it
                loss = family.loss(batch, draws)
                scaler.scale(loss.total).backward()  # type: ignore[no-untyped-call]
            return loss

        def at_work() -> AbstractContextManager[object]:
            stack = ExitStack()
            for parts in (self.low_bit, self.compiled):
                if parts is not None:
                    stack.enter_context(parts.at_work())
            return stack

        if self.recorded:
            return RecordedPasses(
                forward,
                scaler.scale,
                parameters,
                settled=lambda: self.packed is None or self.packed.begun,
                note=events.note,
            )
        if not self.graphs:
            return _PlainPass(plain)
        return GraphsOrPlain(StaticPasses(forward, scaler.scale, parameters, device), plain, events)


PLAIN = Speed()
"""Every operation by itself, as torch does it by default."""
