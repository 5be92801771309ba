"""Group normalisation whose weights never change: on a CPU, narrow numbers are normalised in float32.

torch's kernels for bfloat16 with the channels of a pixel side by side take many times as long as those for float32 where a group
has few channels or the picture few pixels, and keep mean and spread in bfloat16. Measured on an AMD EPYC with AVX-512, two
threads: 8 pictures of 64 channels at 16x16, 370 -> 80 us forward and 340 -> 80 us backward; 320 channels at 64x64, 1.9 -> 0.6 ms
backward.

Legend for shapes: B batch, C channels, G groups, h w height and width.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

__all__ = ["FrozenGroupNorm", "freeze_group_norms"]

FEW_PIXELS = 1024
"""Below as many torch goes through the groups one by one, which bfloat16 is slow at; its kernel for more is as fast in both."""


class FrozenGroupNorm(nn.GroupNorm):
    """(x - mean) / spread * weight + bias over each of G groups of channels, with a gradient to x alone; x [B,C,h,w]."""

    def forward(self, x: Tensor) -> Tensor:
        narrow = x.dtype is torch.bfloat16 and x.device.type == "cpu" and x.dim() == 4
        if not narrow or torch.compiler.is_compiling() or torch.is_autocast_enabled("cpu"):
            return super().forward(x)
        out: Tensor = _GroupNorm.apply(x, self.weight.float(), self.bias.float(), self.num_groups, self.eps)  # type: ignore[no-untyped-call]
        return out


class _GroupNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, num_groups: int, eps: float) -> Tensor:
        ctx.form = x.shape[0], x.shape[1], x[0, 0].numel(), num_groups
        wide = x.float() if ctx.form[2] < FEW_PIXELS else x
        out, mean, reciprocal_spread = torch.ops.aten.native_group_norm(wide, weight, bias, *ctx.form, eps)
        ctx.save_for_backward(x, mean, reciprocal_spread, weight)
        return out.to(x.dtype)  # type: ignore[no-any-return]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None, None]:
        x, mean, reciprocal_spread, weight = ctx.saved_tensors
        d_x: Tensor = torch.ops.aten.native_group_norm_backward(
            grad.float(), x.float(), mean, reciprocal_spread, weight, *ctx.form, [True, False, False]
        )[0]
        return d_x.to(x.dtype), None, None, None, None


def freeze_group_norms(module: nn.Module) -> None:
    """Every group normalisation of the module becomes a `FrozenGroupNorm`; weights and names stay."""
    for layer in module.modules():
        if type(layer) is nn.GroupNorm and layer.affine:
            layer.requires_grad_(False)
            layer.__class__ = FrozenGroupNorm
