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

from lora_scripts.adapters.low_rank import linear_low_rank
from lora_scripts.adapters.weights import LoRATensors

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = ["LoRAConv2d", "LoRAInit", "LoRALayer", "LoRALinear", "weight_shape"]

LoRAInit = Literal["gaussian", "kaiming", "pissa"]


def weight_shape(layer: nn.Linear | nn.Conv2d) -> tuple[int, ...]:
    """[out, in] or [out, in, k, k], also of a linear layer that keeps its weight quantised and packed."""
    if isinstance(layer, nn.Linear):
        return layer.out_features, layer.in_features
    return tuple(layer.weight.shape)


class LoRALayer(nn.Module):
    """A frozen layer with a trainable low-rank change; takes the place of the layer in its parent.

    A kind of adapter is a subclass: what it trains besides A and B it registers as a parameter, what it must remember
    for an exact resume as a persistent buffer, and what can be computed again as another buffer.

    Attributes:
        base: the layer as it was, frozen.
        lora_A, lora_B: float32 whatever the dtype of the base; used in the dtype of the input.
        alpha: numerator of the scale alpha / R.
        strength: 1 in training; another value for previews, 0 switches the change off.
    """

    base: nn.Linear | nn.Conv2d
    lora_A: nn.Parameter
    lora_B: nn.Parameter

    def __init__(self, base: nn.Linear | nn.Conv2d, rank: int, alpha: float, dropout: float) -> None:
        super().__init__()
        self.base = base.requires_grad_(False)
        self.rank, self.alpha, self.dropout, self.strength = rank, alpha, dropout, 1.0
        out, *inside = weight_shape(base)
        shape_b = [out, rank, *[1] * (len(inside) - 1)]
        device = base.weight.device
        self.lora_A = nn.Parameter(torch.empty([rank, *inside], dtype=torch.float32, device=device))
        self.lora_B = nn.Parameter(torch.zeros(shape_b, dtype=torch.float32, device=device))
        # A subclass (a quantised layer, say) may multiply in its own way: then it is called as it is.
        self._plain = type(base) in (nn.Linear, nn.Conv2d)

    @property
    def scale(self) -> float:
        return self.alpha / self.rank

    @property
    def weight(self) -> Tensor:
        """The frozen weight: model code asks a layer for its dtype and device this way."""
        return self.base.weight

    @property
    def bias(self) -> Tensor | None:
        return self.base.bias

    def forward(self, x: Tensor) -> Tensor:
        scale = self.scale * self.strength
        if scale == 0.0:
            return self.base(x)  # type: ignore[no-any-return]
        if self._can_fuse(x):
            return self._fused(x, scale)
        return torch.add(self.base(x), self._change(x), alpha=scale)

    @property
    def _dropping(self) -> bool:
        return self.training and self.dropout > 0.0

    @property
    def _hooked(self) -> bool:
        return bool(self.base._forward_hooks or self.base._forward_pre_hooks)

    def _can_fuse(self, x: Tensor) -> bool:
        """Whether frozen layer and change may be computed in one go."""
        return False

    def _fused(self, x: Tensor, scale: float) -> Tensor:
        """Output of the layer with its change."""
        raise NotImplementedError

    def _change(self, x: Tensor) -> Tensor:
        """What is added to the output, before the scale."""
        return self._product(F.dropout(x, self.dropout, self._dropping), self.lora_A, self.lora_B)

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

    def trained(self) -> dict[str, nn.Parameter]:
        """The trainable tensors by name, `lora_A` first."""
        return dict(self._parameters)  # type: ignore[arg-type]

    def state(self) -> dict[str, Tensor]:
        """All that a checkpoint must hold: the trainable tensors, and what else the start was made of."""
        kept = {n: b for n, b in self._buffers.items() if b is not None and n not in self._non_persistent_buffers_set}
        return {**{name: parameter.detach() for name, parameter in self.trained().items()}, **kept}

    def tensors(self) -> LoRATensors:
        """A copy of the change, float32 on the CPU."""
        return LoRATensors(copied(self.lora_A), copied(self.lora_B), self.alpha)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> LoRALayer:
        # model.half() or .to(torch.bfloat16) must not round the trained weights; they follow the device alone.
        self.base._apply(fn, recurse)  # type: ignore[no-untyped-call]
        for parameter in self.trained().values():
            parameter.data = parameter.data.to(fn(parameter.data).device)
            if parameter.grad is not None:
                parameter.grad.data = parameter.grad.data.to(parameter.device)
        for name, buffer in self._buffers.items():
            if buffer is not None:
                self._buffers[name] = buffer.to(fn(buffer).device)
        return self

    def extra_repr(self) -> str:
        return f"rank={self.rank}, alpha={self.alpha:g}, dropout={self.dropout:g}"


class LoRALinear(LoRALayer):
    """x W^T + b + alpha / R * dropout(x) A^T B^T; x [..., in], A [R, in], B [out, R]."""

    base: nn.Linear

    def _can_fuse(self, x: Tensor) -> bool:
        return self._plain and not (self._dropping or self._hooked or torch.is_autocast_enabled(x.device.type))

    def _fused(self, x: Tensor, scale: float) -> Tensor:
        return linear_low_rank(x, self.base.weight, self.base.bias, self.lora_A, self.lora_B, scale)

    def _product(self, x: Tensor, A: Tensor, B: Tensor) -> Tensor:
        low = F.linear(x, A.to(x.dtype))
        return F.linear(low, B.to(low.dtype))


class LoRAConv2d(LoRALayer):
    """conv(x, W) + b + alpha / R * conv1x1(conv(dropout(x), A), B); x [N, in, h, w], A [R, in, k, k], B [out, R, 1, 1].

    A has the stride, padding and dilation of the base. A product of our own was measured and is no faster here.
    """

    base: nn.Conv2d

    def _product(self, x: Tensor, A: Tensor, B: Tensor) -> Tensor:
        low = self.base._conv_forward(x, A.to(x.dtype), None)
        return F.conv2d(low, B.to(low.dtype))


def copied(tensor: Tensor) -> Tensor:
    """A copy in float32 on the CPU."""
    return tensor.detach().to("cpu", torch.float32, copy=True)
