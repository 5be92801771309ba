"""The loss of a language model on chosen tokens, without ever holding the scores of all of them.

A vocabulary has up to 250,000 entries, so the scores (logits) of a long text are the largest tensor of a step, and computing
them for tokens that are not trained is often most of its arithmetic. Here the caller passes the trained positions alone, and
their scores exist for a few rows at a time; the gradient with respect to the hidden states is made on the spot, in the
forward pass, from the same scores. The same idea as in Liger Kernel (Hsu et al. 2024) and Cut Your Losses (Wijmans et al.
2025), in plain torch operations.

Legend for shapes: N trained tokens, D width, V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from lora_scripts.models.frozen_linear import product

if TYPE_CHECKING:
    from torch import nn

__all__ = ["Head", "next_token_losses"]

CHUNK_BYTES = 64 * 2**20
"""Of float32 scores at a time: large enough for full speed on a CPU and a GPU, small beside everything else."""


@dataclass(frozen=True)
class Head:
    """How hidden states become scores.

    Attributes:
        weight: [V,D], frozen.
        bias: [V] or None.
        scale: what the scores are multiplied with (Cohere's `logit_scale`, the inverse of Granite's `logits_scaling`).
        softcap: scores are squeezed into ±softcap by a tanh (Gemma 2); None for no limit.
    """

    weight: Tensor
    bias: Tensor | None = None
    scale: float = 1.0
    softcap: float | None = None

    @classmethod
    def of(cls, layer: nn.Linear, config: Any) -> Head:
        """The head of a model of transformers, as its configuration describes it."""
        scale = float(getattr(config, "logit_scale", None) or 1.0)
        scale /= float(getattr(config, "logits_scaling", None) or 1.0)
        return cls(layer.weight, layer.bias, scale, getattr(config, "final_logit_softcapping", None))

    def scores(self, hidden: Tensor) -> Tensor:
        """[N,V] float32."""
        scores = product(hidden, self.weight, self.bias).float()
        if self.scale != 1.0:
            scores = scores * self.scale
        return scores if self.softcap is None else torch.tanh(scores / self.softcap) * self.softcap


def next_token_losses(hidden: Tensor, head: Head, targets: Tensor) -> Tensor:
    """[N] float32: minus the logarithm of the probability of each target, with gradient to `hidden`.

    Args:
        hidden: [N,D] last hidden states at the positions whose next token is trained.
        targets: [N] int64, the tokens that come next.
    """
    losses: Tensor = _Losses.apply(hidden, head, targets)  # type: ignore[no-untyped-call]
    return losses


class _Losses(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: Tensor, head: Head, targets: Tensor) -> Tensor:
        wants_gradient = ctx.needs_input_grad[0]
        rows = max(16, CHUNK_BYTES // (4 * head.weight.shape[0]))
        losses, gradients = [], []
        for begin in range(0, hidden.shape[0], rows):
            part, wanted = hidden[begin : begin + rows], targets[begin : begin + rows, None]
            scores = head.scores(part)
            slope = 1 - (scores / head.softcap).square() if head.softcap is not None and wants_gradient else None
            # All in place, where torch.logsumexp would take a second matrix as large as the scores and a second exp.
            scores.sub_(scores.amax(dim=-1, keepdim=True))
            of_wanted = scores.gather(1, wanted)
            normaliser = scores.exp_().sum(dim=-1, keepdim=True)
            losses.append((normaliser.log() - of_wanted)[:, 0])
            if wants_gradient:
                gradients.append(_gradient(scores.div_(normaliser), slope, wanted, head, part.dtype))
        if wants_gradient:
            ctx.save_for_backward(torch.cat(gradients))
        return torch.cat(losses)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        (gradient,) = ctx.saved_tensors
        return (gradient * grad[:, None].to(gradient.dtype), None, None)


def _gradient(change: Tensor, slope: Tensor | None, wanted: Tensor, head: Head, dtype: torch.dtype) -> Tensor:
    """[n,D] of the losses with respect to the hidden states, from the probabilities [n,V], which are overwritten."""
    change.scatter_add_(1, wanted, torch.full_like(wanted, -1, dtype=change.dtype))
    if slope is not None:
        change.mul_(slope)
    if head.scale != 1.0:
        change.mul_(head.scale)
    return product(change.to(dtype), head.weight.t())
