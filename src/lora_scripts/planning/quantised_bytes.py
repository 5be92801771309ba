"""What quantised weights take, from the shapes of a model whose weights nobody has read."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from collections.abc import Iterable

    from torch import nn

__all__ = ["QUANTIZATIONS", "Quantization", "quantised_saving"]

Quantization = Literal["none", "int8", "nf4"]
QUANTIZATIONS: tuple[Quantization, ...] = ("none", "int8", "nf4")
"""From the least that is saved to the most."""
NF4_BYTES = 0.5 + 1 / 64 + 4 / (64 * 256)
"""Per weight: four bits, a scale of eight bits for 64 weights, and a float32 for 256 of these scales (arXiv 2305.14314)."""


def quantised_saving(components: Iterable[nn.Module], kind: Quantization) -> int:
    """Bytes that the frozen linear layers take less than they are; the head and the embeddings are never quantised.

    A layer's weight is put back into its number format while it computes, so the largest one is taken off.
    """
    from torch import nn

    if kind == "none":
        return 0
    saved, largest = 0.0, 0
    for component in components:
        head = getattr(component, "get_output_embeddings", lambda: None)()
        for layer in component.modules():
            if isinstance(layer, nn.Linear) and layer is not head:
                out, count = layer.weight.shape[0], layer.weight.numel()
                whole = count * layer.weight.element_size()
                saved += whole - (count * NF4_BYTES if kind == "nf4" else count + 4 * out)
                largest = max(largest, whole)
    return max(0, round(saved) - largest)
