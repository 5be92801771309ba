"""A finished change of any kind in a form that a low-rank adapter can go on from.

Legend for shapes: R rank, in/out the layer's features or channels, k kernel size.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from lora_scripts.adapters.dora import DoRAConv2d, DoRALinear
from lora_scripts.adapters.layers import LoRALayer
from lora_scripts.adapters.spectrum import spectrum_of_matrix
from lora_scripts.adapters.weights import LoRATensors

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor, nn

    from lora_scripts.adapters.weights import LayerChange

__all__ = ["BroughtOver", "bring_over", "tell_brought_over"]

LITTLE = 0.5
"""Kept share of the change below which the user is told of another way."""


@dataclass(frozen=True)
class BroughtOver:
    """What a layer of another kind was made of.

    Attributes:
        kind: of the file's change, as people call it.
        rank: of the low-rank change that stands for it now.
        kept: share of the squared norm of the file's change, 0..1.
    """

    kind: str
    rank: int
    kept: float


def bring_over(
    name: str, change: LayerChange, layer: nn.Module, base_weight: Callable[[], Tensor]
) -> tuple[LayerChange, BroughtOver | None]:
    """The change as it is where the layer can go on from it, else the nearest low-rank change.

    Args:
        name: of the layer; the start of a large decomposition is drawn from it.
        layer: that trains.
        base_weight: the frozen weight, float32; asked only where the change depends on it or has to be decomposed.
    Returns:
        A change of the layer's rank at most by Eckart and Young 1936, and what was made of it; None where it is the file's own.
    """
    if not isinstance(layer, LoRALayer) or _goes_on_directly(change, layer):
        return change, None
    weight = base_weight()
    delta = change.delta(weight).to(weight.device)
    seed = int.from_bytes(hashlib.blake2b(name.encode(), digest_size=8).digest(), "little")
    spectrum = spectrum_of_matrix(delta, layer.rank, torch.Generator().manual_seed(seed))
    tensors = spectrum.cut(layer.rank)
    return tensors, BroughtOver(_kind(change), tensors.rank, spectrum.kept(layer.rank))


def tell_brought_over(brought: Sequence[BroughtOver]) -> list[str]:
    """One message for each kind and rank; names how much of the change was kept."""
    groups: dict[tuple[str, int], list[float]] = {}
    for each in brought:
        groups.setdefault((each.kind, each.rank), []).append(each.kept)
    messages = []
    for (kind, rank), kept in groups.items():
        mean = sum(kept) / len(kept)
        text = (
            f"init_lora_weights: {len(kept)} layer{'' if len(kept) == 1 else 's'} of a {kind} brought to rank {rank} by SVD, "
            f"{100 * mean:.1f} % of their change kept (squared, on average)."
        )
        if mean < LITTLE:
            text += " That is little: a larger lora_rank keeps more, and as an entry of base_loras the file keeps all of it."
        messages.append(text)
    return messages


def _goes_on_directly(change: LayerChange, layer: LoRALayer) -> bool:
    """A plain LoRA can be gone on from by every low-rank layer, a DoRA with lengths of rows by a DoRA."""
    if not isinstance(change, LoRATensors):
        return False
    return change.magnitude is None or (isinstance(layer, DoRALinear | DoRAConv2d) and change.magnitude.ndim == 1)


def _kind(change: LayerChange) -> str:
    names = {"lora": "DoRA", "loha": "LoHa", "lokr": "LoKr", "oft": "OFT", "full": "full difference"}
    return names.get(change.kind, change.kind)
