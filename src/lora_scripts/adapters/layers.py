"""A frozen layer with a trainable low-rank change beside it: linear layers and 2-D convolutions.

Legend for shapes: R rank, N rows (batch times positions), in/out features or channels, k kernel size.
Source: Hu et al. 2021, arXiv 2106.09685; scale as PEFT and kohya's sd-scripts, initial values as either.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lora_scripts.adapters.layer import AdapterLayer, copied, weight_shape
from lora_scripts.adapters.low_rank import linear_low_rank
from lora_scripts.adapters.resize import fit_rank
from lora_scripts.adapters.weights import LayerChange, LoRATensors
from lora_scripts.errors import ModelError
from lora_scripts.models.low_bit_layers import is_pointwise, low_bit_of

if TYPE_CHECKING:
    from collections.abc import Callable

    from lora_scripts.adapters.same_input import SameInput

__all__ = ["LoRAConv2d", "LoRAInit", "LoRALayer", "LoRALinear"]

LoRAInit = Literal["gaussian", "kaiming", "pissa"]


class LoRALayer(AdapterLayer):
    """A frozen layer with a trainable low-rank change.

    Attributes:
        lora_A, lora_B: float32 whatever the dtype of the base; used in the dtype of the input.
    """

    lora_A: nn.Parameter
    lora_B: nn.Parameter

    def __init__(self, base: nn.Linear | nn.Conv2d, rank: int, alpha: float, dropout: float) -> None:
        super().__init__(base, rank, alpha, dropout)
        out, *inside = weight_shape(base)
        self.lora_A = self._trained(rank, *inside)
        self.lora_B = self._trained(out, rank, *[1] * (len(inside) - 1))

    def forward(self, x: Tensor) -> Tensor:
        scale = self.scale * self.strength
        if scale == 0.0:
            return self.base(x)  # type: ignore[no-any-return]
        if self._can_fuse(x):
            return self._fused(x, scale)
        return torch.add(self.base(x), self._change(x), alpha=scale)

    def _can_fuse(self, x: Tensor) -> bool:
        """Whether frozen layer and change may be computed in one go."""
        return self._plain and not (self._dropping or self._hooked or torch.is_autocast_enabled(x.device.type))

    def _fused(self, x: Tensor, scale: float) -> Tensor:
        """Output of the layer with its change."""
        raise NotImplementedError

    @property
    def _start(self) -> tuple[Tensor, Tensor] | None:
        """A and B whose product is taken off what these add; None where there are none."""
        return None

    def _change(self, x: Tensor) -> Tensor:
        """What is added to the output, before the scale."""
        return self._product(self._dropped(x), self.lora_A, self.lora_B)

    def _product(self, x: Tensor, A: Tensor, B: Tensor) -> Tensor:
        """x through A, then B."""
        raise NotImplementedError

    @torch.no_grad()
    def reset(self, generator: torch.Generator, init: LoRAInit = "gaussian") -> None:
        """Draws lora_A and clears lora_B, so that the layer starts as its base.

        Args:
            init: "gaussian": normal, spread 1 / R, as PEFT's option of that name and diffusers' scripts;
                "kaiming": uniform with a = sqrt 5, PEFT's default and kohya's.
        """
        drawn = torch.empty(self.lora_A.shape)
        if init == "gaussian":
            drawn.normal_(0.0, 1.0 / self.rank, generator=generator)
        else:
            bound = 1.0 / math.sqrt(self.lora_A[0].numel())
            drawn.uniform_(-bound, bound, generator=generator)
        self.lora_A.copy_(drawn)
        self.lora_B.zero_()

    @torch.no_grad()
    def start_from(self, tensors: LoRATensors) -> None:
        """Takes over the change of a plain LoRA of at most this rank.

        Rows of A beyond its rank keep their drawn values with a B of zero: no effect yet, but they learn.
        """
        self.lora_A[: tensors.rank].copy_(tensors.lora_A)
        self.lora_B.zero_()
        self.lora_B[:, : tensors.rank].copy_(tensors.lora_B.double().mul_(tensors.scale / self.scale))

    def fitted(self, change: LayerChange) -> tuple[LoRATensors, float]:
        if not isinstance(change, LoRATensors):
            raise ModelError(f"is of kind {change.kind}, which low-rank matrices cannot go on from")
        return fit_rank(change, self.rank)

    def tensors(self) -> LoRATensors:
        """A copy of the change, float32 on the CPU."""
        return LoRATensors(copied(self.lora_A), copied(self.lora_B), self.alpha)


class LoRALinear(LoRALayer):
    """x W^T + b + alpha / R * dropout(x) A^T B^T; x [..., in], A [R, in], B [out, R].

    Attributes:
        group: the layers that read the same input, this one among them; None for a layer by itself.
    """

    base: nn.Linear
    group: SameInput | None = None

    def can_share(self, x: Tensor) -> bool:
        """Whether this layer may be computed together with others that read the same input."""
        return self.scale * self.strength != 0.0 and self._can_fuse(x) and low_bit_of(self.base) is None

    def _fused(self, x: Tensor, scale: float) -> Tensor:
        if self.group is not None and (out := self.group.output(self, x)) is not None:
            return out
        weight, bias, low_bit = self.base.weight, self.base.bias, low_bit_of(self.base)
        return linear_low_rank(x, weight, bias, self.lora_A, self.lora_B, scale, self._start, low_bit)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> LoRALinear:
        if self.group is not None:
            self.group.take_apart()  # what moves or converts a weight makes a new one of it
        super()._apply(fn, recurse)
        return self

    def _product(self, x: Tensor, A: Tensor, B: Tensor) -> Tensor:
        low = F.linear(x, A.to(x.dtype))
        return F.linear(low, B.to(low.dtype))


class LoRAConv2d(LoRALayer):
    """conv(x, W) + b + alpha / R * conv1x1(conv(dropout(x), A), B); x [N, in, h, w], A [R, in, k, k], B [out, R, 1, 1].

    A has the stride, padding and dilation of the base. With a kernel of 1x1 it is a linear layer for every pixel, and computed
    as one; for larger kernels a product of our own was measured and is no faster.
    """

    base: nn.Conv2d

    def _can_fuse(self, x: Tensor) -> bool:
        side_by_side = x.is_contiguous(memory_format=torch.channels_last)  # the channels of a pixel, so it is a row
        return side_by_side and is_pointwise(self.base) and super()._can_fuse(x)

    def _fused(self, x: Tensor, scale: float) -> Tensor:
        weight, A, B = (each.flatten(1) for each in (self.base.weight, self.lora_A, self.lora_B))
        start = None if self._start is None else (self._start[0].flatten(1), self._start[1].flatten(1))
        rows, low_bit = x.permute(0, 2, 3, 1), low_bit_of(self.base)
        return linear_low_rank(rows, weight, self.base.bias, A, B, scale, start, low_bit).permute(0, 3, 1, 2)

    def _product(self, x: Tensor, A: Tensor, B: Tensor) -> Tensor:
        low = self.base._conv_forward(x, A.to(x.dtype), None)
        return F.conv2d(low, B.to(low.dtype))
