"""The best low-rank approximation of a matrix, also of a large one in seconds.

Legend for shapes: R rank, in/out the layer's features or channels.
"""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["principal_part"]

EXACT_UP_TO = 512
"""Shorter side up to which the whole decomposition is computed; it takes 0.05 s there, and a minute at 4096."""
OVERSAMPLING, ITERATIONS = 16, 8
"""Of the subspace iteration. PEFT's `pissa_niter_N` is used with 4 to 16 iterations and no oversampling."""


def principal_part(weight: Tensor, rank: int, scale: float, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """A [R, in] and B [out, R] with scale * B A the best approximation of the weight at that rank.

    Each gets the root of the singular values over the scale, so |row of A|^2 is one of them, largest first. Large weights
    are decomposed by subspace iteration from a drawn start: 2 * ITERATIONS + 2 products with R + OVERSAMPLING columns.

    Args:
        weight: [out, in] in float32.
        generator: on the CPU, for the drawn start.
    Source: Halko, Martinsson, Tropp 2011, arXiv 0909.4061, algorithms 4.4 and 5.1.
    """
    if min(weight.shape) <= EXACT_UP_TO or rank + OVERSAMPLING >= min(weight.shape):
        left, values, right = torch.linalg.svd(weight, full_matrices=False)
    else:
        drawn = torch.randn(weight.shape[1], rank + OVERSAMPLING, generator=generator).to(weight.device)
        basis = torch.linalg.qr(weight @ drawn).Q
        for _ in range(ITERATIONS):
            basis = torch.linalg.qr(weight @ torch.linalg.qr(weight.T @ basis).Q).Q
        left, values, right = torch.linalg.svd(basis.T @ weight, full_matrices=False)
        left = basis @ left
    root = (values[:rank] / scale).sqrt()
    return root[:, None] * right[:rank], left[:, :rank] * root
