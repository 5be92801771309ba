"""How much a training step keeps in memory between its forward and backward pass, found without computing anything.

The loss is traced with fake tensors, which have shapes and no content, and every tensor that autograd sets aside is
counted once. That covers any architecture, adapter and attention kernel, because it is the real code that runs.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from lora_scripts.families.protocol import Batch

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["ActivationBytes", "kept_bytes", "trace_activations"]


@dataclass(frozen=True)
class ActivationBytes:
    """Bytes kept for the backward pass: `fixed` once, `per_example` for every example of a micro-batch."""

    fixed: int
    per_example: int

    def of(self, num_examples: int) -> int:
        return self.fixed + num_examples * self.per_example


def trace_activations(loss: Callable[[Batch], Tensor], example: Batch, num_weight_bytes: int) -> ActivationBytes:
    """What one step on examples like this one keeps; nothing is computed or allocated, a second or two for a U-Net.

    Args:
        loss: the total of `ModelFamily.loss`, with gradient.
        example: a batch of one; only shapes and dtypes matter.
        num_weight_bytes: the model's weights, which autograd keeps too but which exist anyway.
    """
    one, two = (_traced(loss, example, count) for count in (1, 2))
    per_example = two - one
    # Weights that take part in the backward pass are among the kept tensors; not all of them do.
    fixed = max(0, one - per_example - num_weight_bytes)
    return ActivationBytes(fixed, per_example)


def kept_bytes(loss: Callable[[], Tensor]) -> tuple[int, Tensor]:
    """Bytes of all storages that autograd keeps while `loss` runs, each counted once, and the loss."""
    sizes: dict[int, int] = {}
    alive: list[object] = []  # a storage that is freed could lend its address to another one

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in sizes:
            sizes[storage._cdata] = storage.nbytes()
            alive.append(storage)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        value = loss()
    return sum(sizes.values()), value


def _traced(loss: Callable[[Batch], Tensor], example: Batch, count: int) -> int:
    from torch._subclasses.fake_tensor import FakeTensorMode

    mode = FakeTensorMode(allow_non_fake_inputs=True)
    tensors = {
        name: mode.from_tensor(value.expand(count, *value.shape[1:]).contiguous())
        for name, value in example.tensors.items()
    }
    batch = Batch(tensors, list(example.captions) * count, [f"{example.keys[0]}/{i}" for i in range(count)])
    with mode:
        return kept_bytes(lambda: loss(batch))[0]
