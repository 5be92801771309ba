"""How much memory a step's forward and backward pass takes, found without computing anything.

The passes run with fake tensors, which have shapes and no content, and every tensor is counted while it lives. That covers
any architecture, adapter, attention kernel and gradient checkpointing, because it is the real code that runs.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import torch

from lora_scripts.families.protocol import Batch
from lora_scripts.planning.live_bytes import LiveBytes

if TYPE_CHECKING:
    from torch import Tensor, nn

__all__ = ["UnpredictableError", "predicted_peak"]


class UnpredictableError(Exception):
    """Something in a model cannot run with fake tensors."""


def predicted_peak(
    loss: Callable[[Batch], Tensor], example: Batch, num_examples: int, parameters: Sequence[nn.Parameter]
) -> int:
    """Bytes at the worst moment of one pass, gradients included, weights left out; two to three seconds for a U-Net.

    Args:
        loss: the total of `ModelFamily.loss`, with gradient.
        example: a batch of one, on the device that will train: it decides which kernels are counted.
        num_examples: of the pass that is asked about.
        parameters: the trainable ones.
    Raises:
        UnpredictableError: something in the model cannot run with fake tensors.
    """
    try:
        return _traced(loss, example, num_examples, parameters)
    except Exception as error:
        # Whatever goes wrong in torch's inner parts here must not end a run that would train well.
        lines = str(error).splitlines()
        raise UnpredictableError(lines[0][:160] if lines else type(error).__name__) from error


def _traced(
    loss: Callable[[Batch], Tensor], example: Batch, num_examples: int, parameters: Sequence[nn.Parameter]
) -> int:
    from torch._subclasses.fake_tensor import FakeTensorMode

    mode = FakeTensorMode(allow_non_fake_inputs=True)
    tensors = {
        name: mode.from_tensor(value.expand(num_examples, *value.shape[1:]).contiguous())
        for name, value in example.tensors.items()
    }
    keys = [f"{example.keys[0]}/{i}" for i in range(num_examples)]
    filled = {name: list(rows) * num_examples for name, rows in example.filled.items()}
    batch = Batch(tensors, list(example.captions) * num_examples, keys, filled=filled)
    # The gradients are asked for rather than left in the parameters, which are real and must not be given fake ones.
    live = LiveBytes()
    with mode, live:
        gradients = torch.autograd.grad(loss(batch), list(parameters), allow_unused=True)
    del gradients
    return live.peak
