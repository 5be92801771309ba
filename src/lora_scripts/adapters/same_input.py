"""LoRA layers that read the same tensor, computed together: q, k and v of an attention, gate and up of a feed-forward part.

The first layer of a group that is called computes the outputs of all, and the others find theirs. Their `lora_A` are one product
forward and one backward; the gradient of the input is added up inside the products, where autograd would make two sums of
three. Where a group is `joined`, the frozen weights are one product forward too: they lie one behind the other in one piece of
memory, of which each layer's weight is a view, so that nothing is stored twice and whoever asks a layer for its weight gets it.

What a layer of the group may not do, its whole group does not: dropout draws for every layer anew, hooks want to see a call,
a strength of 0 leaves the change out, a compiler makes its own kernels. Then each layer runs by itself.

Legend for shapes: N rows, in/out features, out_i of layer i, R_i its rank, R the sum of them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from lora_scripts.models.frozen_linear import PLAIN_LINEAR, add_product, product

if TYPE_CHECKING:
    from lora_scripts.adapters.layers import LoRALinear

__all__ = ["SameInput", "can_group"]


def can_group(layer: LoRALinear, first: LoRALinear) -> bool:
    """Whether a layer may run together with the first one: both beside plain linear layers of one form."""
    ours, its = layer.base, first.base
    return (
        type(ours) in PLAIN_LINEAR
        and ours.in_features == its.in_features
        and (ours.weight.dtype, ours.weight.device) == (its.weight.dtype, its.weight.device)
        and (ours.bias is None) == (its.bias is None)
    )


class SameInput:
    """A group of layers with the same input, and what was computed for those that are not called yet."""

    def __init__(self, layers: Sequence[LoRALinear], *, joined: bool) -> None:
        """Args:
        layers: in the order in which they are called; their weights alike in dtype, device and in.
        joined: make the frozen weights one product; they are moved into one piece of memory.
        """
        self._layers = list(layers)
        self._places = {id(layer): place for place, layer in enumerate(self._layers)}
        self._weight: Tensor | None = None
        self._bias: Tensor | None = None
        if joined:
            self._join()
        self._input: Tensor | None = None
        self._waiting: dict[int, Tensor] = {}

    @property
    def is_joined(self) -> bool:
        return self._weight is not None

    def take_apart(self) -> None:
        """From now on every frozen weight is a product of its own: the layers' weights are no longer views of a joint one."""
        self._weight = self._bias = None

    def output(self, layer: LoRALinear, x: Tensor) -> Tensor | None:
        """[..., out_i] of one of the layers; None where the group cannot be computed together now."""
        if torch.compiler.is_compiling():
            return None
        place = self._places[id(layer)]
        if self._input is not x or place not in self._waiting:
            if not all(each.can_share(x) for each in self._layers):
                return None
            self._waiting = dict(enumerate(self._outputs(x)))
            self._input = x
        out = self._waiting.pop(place)
        if not self._waiting:
            self._input = None
        return out

    def _outputs(self, x: Tensor) -> list[Tensor]:
        scales = [layer.scale * layer.strength for layer in self._layers]
        frozen = (
            [(self._weight, self._bias)] if self.is_joined else [(e.base.weight, e.base.bias) for e in self._layers]
        )
        matrices = [*(layer.lora_A for layer in self._layers), *(layer.lora_B for layer in self._layers)]
        rows = x.reshape(-1, x.shape[-1])
        outputs = _SameInput.apply(rows, frozen, scales, *matrices)  # type: ignore[no-untyped-call]
        return [out.view(*x.shape[:-1], -1) for out in outputs]

    @torch.no_grad()
    def _join(self) -> None:
        """Puts all weights [sum of out_i, in], and all biases, into one piece, of which each layer's own become views."""
        self._weight = _joined([layer.base.weight for layer in self._layers])
        if self._layers[0].base.bias is not None:
            self._bias = _joined([layer.base.bias for layer in self._layers])


def _joined(parameters: Sequence[Tensor]) -> Tensor:
    joint = torch.cat(list(parameters))
    for parameter, part in zip(parameters, torch.split(joint, [len(each) for each in parameters]), strict=True):
        parameter.data = part
    return joint


class _SameInput(torch.autograd.Function):
    """x W_i^T + b_i + scale_i * x A_i^T B_i^T for every i, [N,out_i] each; x [N,in], A_i [R_i,in], B_i [out_i,R_i]."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, frozen: Sequence[tuple[Tensor, Tensor | None]], scales: Sequence[float], *matrices: Tensor
    ) -> tuple[Tensor, ...]:
        As, Bs = matrices[: len(scales)], matrices[len(scales) :]
        ctx.ranks, ctx.scales = [len(A) for A in As], scales
        ctx.sizes = [len(B) for B in Bs]
        a = torch.cat(As).to(x.dtype)
        bs_t = [(B * scale).to(x.dtype).t().contiguous() for B, scale in zip(Bs, scales, strict=True)]
        low_t = product(a, x)
        products = [product(x, weight, bias) for weight, bias in frozen]
        outputs = torch.split(products[0], ctx.sizes, dim=1) if len(frozen) == 1 else products
        for out, low, b_t in zip(outputs, torch.split(low_t, ctx.ranks), bs_t, strict=True):
            out.addmm_(low.t(), b_t)
        ctx.save_for_backward(x, a, low_t, *bs_t, *(weight for weight, _ in frozen))
        return tuple(outputs)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
        x, a, low_t, *others = ctx.saved_tensors
        bs_t, weights = others[: len(grads)], others[len(grads) :]
        grad_low_t = torch.cat([product(b_t, grad) for b_t, grad in zip(bs_t, grads, strict=True)])
        grad_x = None
        if ctx.needs_input_grad[0]:
            if len(weights) == 1:
                weights = torch.split(weights[0], ctx.sizes)
            grad_x = product(grads[0], weights[0].t())
            for grad, weight in zip(grads[1:], weights[1:], strict=True):
                add_product(grad_x, grad, weight.t())
            grad_x.addmm_(grad_low_t.t(), a)
        grad_as = torch.split(product(grad_low_t, x.t()).float(), ctx.ranks)
        grad_bs = [
            product(low, grad.t()).t().float().mul_(scale)
            for low, grad, scale in zip(torch.split(low_t, ctx.ranks), grads, ctx.scales, strict=True)
        ]
        return grad_x, None, None, *grad_as, *grad_bs
