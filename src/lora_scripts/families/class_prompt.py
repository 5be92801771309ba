"""The prompt that prior preservation holds the model to, as a batch is told it.

Legend for shapes: B batch.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from lora_scripts.families.protocol import Batch, Encoder

__all__ = ["ClassPrompt"]


class ClassPrompt:
    """One caption for all pictures, encoded at its first use and kept on the device.

    Args:
        encoders: the stages that captions go through before a pass.
    """

    def __init__(self, prompt: str, encoders: Callable[[], Sequence[Encoder]], device: torch.device) -> None:
        self._prompt, self._encoders, self._device = prompt, encoders, device
        self._encoded: Mapping[str, Tensor] | None = None

    def in_place_of_captions(self, batch: Batch) -> Batch:
        """The same pictures, each with this prompt as its caption."""
        rows = {name: tensor.expand(len(batch), *tensor.shape).contiguous() for name, tensor in self._tensors().items()}
        return replace(batch, captions=[self._prompt] * len(batch), tensors={**batch.tensors, **rows})

    def _tensors(self) -> Mapping[str, Tensor]:
        from torch._subclasses.fake_tensor import FakeTensor

        if self._encoded is not None:
            return self._encoded
        encoded: dict[str, Tensor] = {}
        for encoder in self._encoders():
            encoded |= {name: tensor.to(self._device) for name, tensor in encoder.run([self._prompt])[0].items()}
        # A prediction of memory runs with tensors that hold nothing: those must not stay for the run.
        if not any(isinstance(tensor, FakeTensor) for tensor in encoded.values()):
            self._encoded = encoded
        return encoded
