"""The best low-rank approximation of a matrix, also of a large one in seconds.

Legend for shapes: R rank, in/out the layer's features or channels.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from lora_scripts.adapters.spectrum import EXACT_UP_TO, spectrum_of_matrix

if TYPE_CHECKING:
    import torch
    from torch import Tensor

__all__ = ["EXACT_UP_TO", "principal_part"]


def principal_part(weight: Tensor, rank: int, scale: float, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """A [R, in] and B [out, R] with scale * B A the best approximation of the weight at that rank.

    Each gets the root of the singular values over the scale, so |row of A|^2 is one of them, largest first.

    Args:
        weight: [out, in] in float32.
        generator: on the CPU, for the drawn start of a large weight's decomposition.
    """
    nearest = spectrum_of_matrix(weight, rank, generator).cut(rank, scale)
    return nearest.lora_A, nearest.lora_B
