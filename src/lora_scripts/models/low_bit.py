"""Matrix products of a frozen weight in 8 bits: what is rounded, how, and the two products of a training pass.

    y  = s_x s_W (Q(x) Q(W)^T)          s_x one scale for each row of x, s_W one for each row of W
    dx = s_h (Q(h) Q(W)),  h = dy s_W   s_h one scale for each row of h

Both products use the same rounded weight, so dx is the gradient of y but for the rounding of activations: the scales of the
weight, which stand along the summed dimension there, go into the gradient before it is rounded. Every row has a scale of its
own, so no example depends on those beside it.

    int8: s = max |row| / 127, whole numbers, sums exact in int32
    fp8:  s = max |row| / 448, float8_e4m3fn for activations, weights and gradients

Rounding and scaled products are torchao's. Its layers for training (`Int8MixedPrecisionTrainingLinear`, `Float8Linear`) are
not used: they hold a trainable weight, round it anew in every pass and keep the input for a weight gradient that a frozen
layer has no use for.

Legend for shapes: N rows, in/out features.
Sources: torchao 0.18, `prototype/quantized_training` (int8) and `float8` (the recipe `rowwise`); Jiang et al. 2024,
arXiv 2403.09904, for training beside a frozen weight in low precision.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

__all__ = [
    "LowBit",
    "LowBitWeight",
    "low_bit_bytes",
    "low_bit_linear",
    "low_bit_product",
    "low_bit_weight",
    "transposed_low_bit_product",
]

LowBit = Literal["fp8", "int8"]
FP8 = torch.float8_e4m3fn
MULTIPLE = 16
"""Of features: the kernels take no others."""
NUMBERS_AT_ONCE = 2**19
"""Of input or output on a CPU, so that what lies between the steps of a product stays in its cache: up to four times faster."""
TALKATIVE = ("torchao", "torch.utils._pytree")
"""What they say of kernels for other machines and of coming versions of torch is not for users."""
FEWEST_ROWS = 17
"""Of an int8 product on CUDA without Triton."""


class LowBitWeight(NamedTuple):
    """A frozen weight in 8 bits.

    Attributes:
        values: Q(W), [out, in].
        scales: s_W, [out] float32.
        columns: Q(W)^T, [in, out], for the gradient's product in fp8, whose kernels read a weight along the summed dimension
            alone; None in int8.
    """

    kind: LowBit
    values: Tensor
    scales: Tensor
    columns: Tensor | None

    def to(self, device: torch.device) -> LowBitWeight:
        columns = None if self.columns is None else self.columns.to(device)
        return LowBitWeight(self.kind, self.values.to(device), self.scales.to(device), columns)


@torch.no_grad()
def low_bit_weight(weight: Tensor, kind: LowBit) -> LowBitWeight:
    """The weight [out, in] in 8 bits, on its device; the weight itself stays as it is."""
    values, scales = _rounded(weight, kind)
    return LowBitWeight(kind, values.contiguous(), scales, values.t().contiguous() if kind == "fp8" else None)


def low_bit_bytes(num_weights: int, kind: LowBit) -> int:
    """What `low_bit_weight` takes beside the weight, the scales left out."""
    return num_weights * (2 if kind == "fp8" else 1)


def low_bit_linear(x: Tensor, weight: LowBitWeight, bias: Tensor | None) -> Tensor:
    """x W^T + b, [..., out] in the dtype of x; only x gets a gradient."""
    rows = x.reshape(-1, x.shape[-1])
    out: Tensor = _Product.apply(rows, *weight)  # type: ignore[no-untyped-call]
    out = out.view(*x.shape[:-1], out.shape[-1])
    return out if bias is None else out + bias


class _Product(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, kind: LowBit, values: Tensor, scales: Tensor, columns: Tensor | None) -> Tensor:
        ctx.kind = kind
        ctx.save_for_backward(values, scales, columns)
        return low_bit_product(x, LowBitWeight(kind, values, scales, columns))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return transposed_low_bit_product(grad, LowBitWeight(ctx.kind, *ctx.saved_tensors)), None, None, None, None


def low_bit_product(x: Tensor, weight: LowBitWeight) -> Tensor:
    """x W^T, [N, out] in the dtype of x [N, in]."""
    return _by_rows(lambda rows: _scaled(rows, weight, weight.values.t(), weight.scales), x, weight.values.shape[0])


def transposed_low_bit_product(grad: Tensor, weight: LowBitWeight) -> Tensor:
    """grad W, [N, in] in the dtype of grad [N, out]."""
    matrix = weight.values if weight.columns is None else weight.columns.t()
    ones = torch.ones(matrix.shape[1], device=matrix.device)

    def of_rows(rows: Tensor) -> Tensor:
        return _scaled(rows.float() * weight.scales, weight, matrix, ones).to(grad.dtype)

    return _by_rows(of_rows, grad, matrix.shape[1])


def _scaled(x: Tensor, weight: LowBitWeight, matrix: Tensor, scales: Tensor) -> Tensor:
    """x times a rounded matrix [in, out], whose columns have these scales."""
    values, own = _rounded(x, weight.kind)
    if weight.kind == "int8":
        missing = FEWEST_ROWS - len(values) if x.is_cuda else 0
        if missing > 0:
            values, own = (
                torch.nn.functional.pad(values, (0, 0, 0, missing)),
                torch.nn.functional.pad(own, (0, missing)),
            )
        return _pieces().int8_product(values, matrix, own, scales)[: len(x)].to(x.dtype)  # type: ignore[no-any-return]
    # On CUDA rows with scales of their own come out in bfloat16 alone.
    dtype = torch.bfloat16 if x.is_cuda else x.dtype
    return torch._scaled_mm(
        values, matrix, scale_a=own[:, None], scale_b=scales[None], out_dtype=dtype, use_fast_accum=x.is_cuda
    ).to(x.dtype)


def _rounded(rows: Tensor, kind: LowBit) -> tuple[Tensor, Tensor]:
    """Q(rows) [N, in] and the scales [N] float32: half precision has no room for those of small gradients."""
    pieces, rows = _pieces(), rows.float()
    if kind == "int8":
        return pieces.int8_rows(rows)  # type: ignore[no-any-return]
    factors = pieces.fp8_factors(rows, FP8, scaling_granularity=pieces.by_row, axiswise_dim=-1)
    return pieces.fp8_saturated(rows * factors, FP8), factors.reciprocal().squeeze(-1)


def _by_rows(of_rows: Callable[[Tensor], Tensor], x: Tensor, width: int) -> Tensor:
    at_once = max(FEWEST_ROWS, NUMBERS_AT_ONCE // max(width, x.shape[1]))
    if x.device.type != "cpu" or len(x) <= at_once or torch.compiler.is_compiling():
        return of_rows(x)
    out = x.new_empty(len(x), width)
    for start in range(0, len(x), at_once):
        out[start : start + at_once] = of_rows(x[start : start + at_once])
    return out


class _Pieces(NamedTuple):
    """What is torchao's."""

    int8_rows: Callable[..., Any]
    int8_product: Callable[..., Any]
    fp8_factors: Callable[..., Any]
    fp8_saturated: Callable[..., Any]
    by_row: Any


_IMPORTED: list[_Pieces] = []
"""At most one, and no `functools.cache`: torch.compile looks through that and would trace the import."""


def _pieces() -> _Pieces:
    if not _IMPORTED:
        _IMPORTED.append(_import())
    return _IMPORTED[0]


def _import() -> _Pieces:
    """Done when it is first needed, as it takes a second.

    Raises:
        ImportError: torchao is not installed, or is another version.
    """
    for name in TALKATIVE:
        logging.getLogger(name).setLevel(logging.ERROR)
    from torchao.float8.config import ScalingGranularity
    from torchao.float8.float8_utils import tensor_to_scale, to_fp8_saturated
    from torchao.prototype.quantized_training.int8 import quantize_int8_rowwise
    from torchao.prototype.quantized_training.int8_mixed_precision import scaled_int8_mm

    return _Pieces(
        quantize_int8_rowwise, scaled_int8_mm, tensor_to_scale, to_fp8_saturated, ScalingGranularity.AXISWISE
    )
