"""How many floating-point operations the matrix products, convolutions and attention of a computation take.

Torch's own formulas (`torch.utils.flop_counter`), which look at shapes alone, so fake tensors are counted like real ones.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry, sdpa_backward_flop_count, sdpa_flop_count

__all__ = ["CountedFlops"]


class CountedFlops(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """While entered, adds up what every operation costs; what is added or scaled element by element is left out.

    Attributes:
        total: floating-point operations, a multiplication and an addition as two.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.total = 0

    def __torch_dispatch__(
        self, func: Any, types: Sequence[type], args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        formula = _FORMULAS.get(func._overloadpacket)
        if formula is not None:
            self.total += int(formula(*args, **kwargs, out_val=result))
        return result


def _attention(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *args: Any, **kwargs: Any) -> int:
    count: int = sdpa_flop_count(query.shape, key.shape, value.shape)  # type: ignore[no-untyped-call]
    return count


def _attention_backward(
    grad: torch.Tensor, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *args: Any, **kwargs: Any
) -> int:
    count: int = sdpa_backward_flop_count(grad.shape, query.shape, key.shape, value.shape)  # type: ignore[no-untyped-call]
    return count


def _linear(x: torch.Tensor, weight: torch.Tensor, *args: Any, **kwargs: Any) -> int:
    return 2 * x.numel() * weight.shape[0]


def _convolution(x: torch.Tensor, weight: torch.Tensor, *args: Any, out_val: torch.Tensor, **kwargs: Any) -> int:
    return 2 * out_val.numel() * math.prod(weight.shape[1:])


_FORMULAS: dict[Any, Callable[..., int]] = {
    **flop_registry,
    # Attention on a CPU, which torch has no formula for.
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _attention,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward: _attention_backward,
    # oneDNN's operations, which `models.frozen_linear` and `models.packed_conv` ask for by name.
    torch.ops.mkldnn._linear_pointwise: _linear,
    torch.ops.mkldnn._convolution_pointwise: _convolution,
}
