"""How much memory a step's forward and backward pass takes, and how much arithmetic, found without computing anything.

The passes run with fake tensors, which have shapes and no content, and every tensor is counted while it lives. That covers
any architecture, adapter, attention kernel and gradient checkpointing, because it is the real code that runs.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from lora_scripts.families.protocol import Batch
from lora_scripts.planning.counted_flops import CountedFlops
from lora_scripts.planning.live_bytes import LiveBytes

if TYPE_CHECKING:
    from torch import Tensor, nn

__all__ = ["PassTrace", "UnpredictableError", "predicted_peak", "trace_pass"]


class UnpredictableError(Exception):
    """Something in a model cannot run with fake tensors."""


@dataclass(frozen=True)
class PassTrace:
    """What one forward and backward pass takes.

    Attributes:
        peak_bytes: at its worst moment, gradients included, weights left out.
        kept_bytes: of these, what the forward pass keeps for the backward pass.
        gradient_bytes: of these, gradients of the trainable parameters.
        flops: floating-point operations, what checkpointing computes again included.
    """

    peak_bytes: int
    kept_bytes: int
    gradient_bytes: int
    flops: int

    @property
    def momentary_bytes(self) -> int:
        """What lives for a moment only: scores, and what is on its way from one layer to the next."""
        return self.peak_bytes - self.kept_bytes - self.gradient_bytes


def predicted_peak(
    loss: Callable[[Batch], Tensor], example: Batch, num_examples: int, parameters: Sequence[nn.Parameter]
) -> int:
    """Bytes at the worst moment of a pass over copies of one example; two to three seconds for a U-Net.

    Args:
        loss, parameters: as `trace_pass` takes them.
        example: a batch of one.
        num_examples: of the pass that is asked about.
    Raises:
        UnpredictableError: something in the model cannot run with fake tensors.
    """
    tensors = {
        name: value.expand(num_examples, *value.shape[1:]).contiguous() for name, value in example.tensors.items()
    }
    keys = [f"{example.keys[0]}/{i}" for i in range(num_examples)]
    filled = {name: list(rows) * num_examples for name, rows in example.filled.items()}
    batch = Batch(tensors, list(example.captions) * num_examples, keys, filled=filled)
    return trace_pass(loss, batch, parameters).peak_bytes


def trace_pass(loss: Callable[[Batch], Tensor], batch: Batch, parameters: Sequence[nn.Parameter]) -> PassTrace:
    """What a pass over a batch takes, gradients included, weights left out; nothing is computed.

    Args:
        loss: the total of `ModelFamily.loss`, with gradient.
        batch: on the device that will train: it decides which kernels are counted.
        parameters: the trainable ones; real, or fake like the rest of the model.
    Raises:
        UnpredictableError: something in the model cannot run with fake tensors.
    """
    try:
        return _traced(loss, batch, parameters)
    except Exception as error:
        # Whatever goes wrong in torch's inner parts here must not end a run that would train well.
        lines = str(error).splitlines()
        raise UnpredictableError(lines[0][:160] if lines else type(error).__name__) from error


def _traced(loss: Callable[[Batch], Tensor], batch: Batch, parameters: Sequence[nn.Parameter]) -> PassTrace:
    from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

    fake = next((p.fake_mode for p in parameters if isinstance(p, FakeTensor)), None)
    mode = fake or FakeTensorMode(allow_non_fake_inputs=True)
    tensors = {
        name: value if isinstance(value, FakeTensor) else mode.from_tensor(value)
        for name, value in batch.tensors.items()
    }
    batch = Batch(tensors, batch.captions, batch.keys, filled=batch.filled)
    # The gradients are asked for rather than left in the parameters, which are real and must not be given fake ones.
    live, flops = LiveBytes(), CountedFlops()
    with mode, live, flops:
        total = loss(batch)
        forward_ends = live.clock
        gradients = torch.autograd.grad(total, list(parameters), allow_unused=True)
    worst = live.peak_clock
    at_peak = [life for life in live.lives if life.covers(worst)]
    own = {id(life) for each in gradients if each is not None and (life := live.life_of(each)) is not None}
    of_gradients = sum(life.num_bytes for life in at_peak if id(life) in own)
    kept = sum(life.num_bytes for life in at_peak if life.covers(forward_ends))
    return PassTrace(live.peak, kept, of_gradients, flops.total)
