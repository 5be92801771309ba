"""Changes of other kinds as plain LoRAs without any loss, where their rank allows it.

| kind | rank of the exact form | by |
|---|---|---|
| LoHa | R^2 | (sum of a_i b_i) * (sum of c_j d_j) = sum of (a_i * c_j)(b_i * d_j), * element by element |
| LoKr | R times the shorter side of w1 | w1 (x) (p q) = (I (x) p)(w1 (x) q) = (w1 (x) p)(I (x) q) |

Legend for shapes: R rank, in/out the layer's features or channels, k kernel size; a c sides of w1, b d of w2.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lora_scripts.adapters.loha_weights import LoHaTensors
from lora_scripts.adapters.lokr_weights import LoKrTensors
from lora_scripts.adapters.weights import LayerChange, LoRATensors

__all__ = ["plain_form"]


def plain_form(change: LayerChange, most: int) -> LoRATensors | None:
    """The same change as a plain LoRA, exactly, with its alpha the rank; None where that needs a rank above `most`.

    A plain LoRA is returned as it is. None also for kinds that have no such form: with row lengths, OFT, whole differences.
    """
    if isinstance(change, LoRATensors):
        return change if change.magnitude is None else None
    if isinstance(change, LoHaTensors) and change.magnitude is None and change.rank**2 <= most:
        return _shaped(*_loha(change), change.shape)
    if isinstance(change, LoKrTensors) and change.magnitude is None and len(change.w2) == 2 and change.t2 is None:
        w1, _ = change.factors()
        if min(w1.shape) * change.rank <= most:
            return _shaped(*_lokr(change, w1), change.shape)
    return None


def _loha(change: LoHaTensors) -> tuple[Tensor, Tensor]:
    """[R^2, in k k] and [out, R^2]."""
    w1_a, w2_a, w1_b, w2_b = (part.double() for part in (change.w1_a, change.w2_a, change.w1_b, change.w2_b))
    if change.t1 is not None and change.t2 is not None:
        # A core is one more factor of the input's side: sum over its second index first.
        w1_a, w2_a = w1_a.T, w2_a.T
        w1_b = torch.einsum("ijkl,jr->irkl", change.t1.double(), w1_b).flatten(1)
        w2_b = torch.einsum("ijkl,jr->irkl", change.t2.double(), w2_b).flatten(1)
    up = (w1_a[:, :, None] * w2_a[:, None, :]).flatten(1)
    down = (w1_b[:, None, :] * w2_b[None, :, :]).flatten(0, 1)
    return down, up * change.scale


def _lokr(change: LoKrTensors, w1: Tensor) -> tuple[Tensor, Tensor]:
    """[rank, in k k] and [out, rank]."""
    first, p, q = w1.double(), change.w2[0].double(), change.w2[1].double()
    a, c = first.shape
    if a <= c:
        up, down = torch.kron(torch.eye(a, dtype=p.dtype), p), torch.kron(first, q)
    else:
        up, down = torch.kron(first, p), torch.kron(torch.eye(c, dtype=q.dtype), q)
    return down, up * change.scale


def _shaped(down: Tensor, up: Tensor, shape: tuple[int, ...]) -> LoRATensors:
    rank = down.shape[0]
    down, up = down.float().reshape(rank, *shape[1:]), up.float().reshape(shape[0], rank, *[1] * (len(shape) - 2))
    return LoRATensors(down, up, float(rank))
