"""Passes that are recorded once for every shape of batch and then repeated without Python's modules and autograd.

The numbers are those of a plain pass to the bit, because the operations are, one by one. That is not taken on trust: a recording
is used only after it has given, for another batch than its own, what a plain pass gives for it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from lora_scripts.training.graphs import differentiated
from lora_scripts.training.tape import DecisionError, Tape, TapeFaultError, record

if TYPE_CHECKING:
    from lora_scripts.families.protocol import Batch, Loss
    from lora_scripts.training.events import Level

__all__ = ["RecordedPasses"]

MOST_TURNS = 3
"""Times that a pass may go another way than the recorded one."""


@dataclass
class _Recording:
    """Of one shape of batch.

    Attributes:
        tape: the summed loss, each example's, their noise levels, then the parameters' gradients, from the batch's tensors.
        loss: for what is the same in all batches of the shape.
        proven: it has been compared with a plain pass.
    """

    tape: Tape
    loss: Loss
    proven: bool = False


class RecordedPasses:
    """Runs passes over batches whose tensors hold all that is random; a `TrainingPass`.

    Attributes:
        fault: why nothing is recorded any more; None as long as it is.
    """

    def __init__(
        self,
        forward: Callable[[Batch], Loss],
        scale: Callable[[Tensor], Tensor],
        parameters: Sequence[nn.Parameter],
        settled: Callable[[], bool] = lambda: True,
        note: Callable[[str, Level], None] = lambda text, level: None,
    ) -> None:
        """Args:
        forward: the loss of a batch, from its tensors alone.
        scale: what is differentiated, from the total loss; of a `GradScaler`.
        settled: whether layers may now prepare what they will compute with from then on.
        note: takes a line for the user: when the first recording is in use, and when there will be none any more.
        """
        self._forward, self._scale, self._settled, self._note = forward, scale, settled, note
        self._parameters = list(parameters)
        self._recordings: dict[tuple[object, ...], _Recording | None] = {}
        self._turns = 0
        self.fault: str | None = None

    def __call__(self, batch: Batch) -> Loss:
        """The loss of the batch; its gradient was added to that of the parameters."""
        loss, grads = self._computed(batch)
        self._add(grads)
        return loss

    def forget(self) -> None:
        """Nothing: between passes a recording holds names, no tensors of its own."""

    @property
    def num_proven(self) -> int:
        """Shapes that are repeated."""
        return sum(1 for each in self._recordings.values() if each is not None and each.proven)

    @property
    def num_operations(self) -> int:
        """Of the longest recording."""
        return max((each.tape.num_operations for each in self._recordings.values() if each is not None), default=0)

    def _computed(self, batch: Batch) -> tuple[Loss, list[Tensor | None]]:
        if self.fault is not None or not self._settled():
            return self._plain(batch)
        if batch.form not in self._recordings:
            # In the first pass of a shape layers prepare themselves; and a shape that never comes again is not worth recording.
            self._recordings[batch.form] = None
            return self._plain(batch)
        recording = self._recordings[batch.form]
        if recording is None:
            return self._record(batch)
        try:
            found = self._repeated(recording, batch)
        except DecisionError:
            return self._turned(batch)
        if recording.proven:
            return found
        plain = self._plain(batch)
        recording.proven = _same(found, plain)
        if not recording.proven:
            self._give_up("a recorded pass gave other numbers than a plain one")
        elif self.num_proven == 1:
            operations = recording.tape.num_operations
            text = f"Passes are repeated from a recording of {operations:,} operations, which gives the same numbers."
            self._note(text, "info")
        return plain

    def _give_up(self, fault: str) -> None:
        self.fault = fault
        self._note(f"record_passes: switched off for this run ({fault}); it goes on with plain passes.", "warning")

    def _turned(self, batch: Batch) -> tuple[Loss, list[Tensor | None]]:
        """The pass took another way than the recorded one: the next one is recorded anew, a few times."""
        self._recordings[batch.form] = None
        self._turns += 1
        if self._turns == MOST_TURNS:
            self._give_up("passes take one way now and then another")
        return self._plain(batch)

    def _plain(self, batch: Batch) -> tuple[Loss, list[Tensor | None]]:
        loss, grads = differentiated(self._forward(batch), self._scale, self._parameters)
        return loss, [None if grad is None else grad.contiguous() for grad in grads]

    def _record(self, batch: Batch) -> tuple[Loss, list[Tensor | None]]:
        computed: list[tuple[Loss, list[Tensor | None]]] = []

        def run() -> list[Tensor | None]:
            loss, grads = self._plain(batch)
            computed.append((loss, grads))
            return [loss.total, loss.per_example, loss.levels, *grads]

        try:
            tape = record(run, [tensor for _, tensor in sorted(batch.tensors.items())], self._parameters)
        except TapeFaultError as fault:
            self._give_up(str(fault))
        else:
            self._recordings[batch.form] = _Recording(tape, computed[0][0])
        return computed[0]

    def _repeated(self, recording: _Recording, batch: Batch) -> tuple[Loss, list[Tensor | None]]:
        results = recording.tape(tensor for _, tensor in sorted(batch.tensors.items()))
        total, per_example, levels, *grads = results
        assert total is not None
        assert per_example is not None
        return replace(recording.loss, total=total, per_example=per_example, levels=levels), grads

    def _add(self, grads: Sequence[Tensor | None]) -> None:
        """Adds to the gradients that are there; a parameter without one takes the new one."""
        pairs = [(p, grad) for p, grad in zip(self._parameters, grads, strict=True) if grad is not None]
        again = [(p.grad, grad) for p, grad in pairs if p.grad is not None]
        if again:
            torch._foreach_add_([own for own, _ in again], [grad for _, grad in again])
        for parameter, grad in pairs:
            if parameter.grad is None:
                parameter.grad = grad


def _same(found: tuple[Loss, list[Tensor | None]], plain: tuple[Loss, list[Tensor | None]]) -> bool:
    """Whether all numbers are the same to the bit; NaN equals NaN."""
    found_loss, plain_loss = found[0], plain[0]
    pairs: list[tuple[Tensor | None, Tensor | None]] = [
        (found_loss.total, plain_loss.total),
        (found_loss.per_example, plain_loss.per_example),
        (found_loss.levels, plain_loss.levels),
        *zip(found[1], plain[1], strict=True),
    ]
    return found_loss.count == plain_loss.count and all(_equal(a, b) for a, b in pairs)


def _equal(a: Tensor | None, b: Tensor | None) -> bool:
    if a is None or b is None:
        return a is b
    return torch.equal(a.nan_to_num(), b.nan_to_num()) and torch.equal(a.isnan(), b.isnan())
