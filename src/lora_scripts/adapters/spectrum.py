"""The singular values of one layer's change, and the change cut to a smaller rank.

A low-rank change is never multiplied out: B A = Q_B (R_B R_A^T) Q_A^T with two thin QR factors, so that only an [R, R] matrix is
decomposed. Cutting to a rank keeps the largest singular values, which gives the nearest change of that rank in the Frobenius
norm (Eckart and Young 1936). A convolution counts as the matrix [out, in k k].

Legend for shapes: N singular values, R rank, in/out the layer's features or channels, k kernel size.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lora_scripts.adapters.weights import LoRATensors

__all__ = ["Spectrum", "concatenated", "spectrum_of_matrix", "spectrum_of_sum"]

EXACT_UP_TO = 512
"""Shorter side up to which the whole decomposition is computed; it takes 0.05 s there, and a minute at 4096."""
OVERSAMPLING, ITERATIONS = 16, 8
"""Of the subspace iteration. PEFT's `pissa_niter_N` is used with 4 to 16 iterations and no oversampling."""


@dataclass(frozen=True)
class Spectrum:
    """A change as left * values @ right, the largest singular values first.

    Attributes:
        left, values, right: [out, N], [N], [N, in k k]; of a large matrix the N largest alone.
        shape: of the weight that is changed, [out, in] or [out, in, k, k].
        tail: squared Frobenius norm of what lies beyond the N values.
    """

    left: Tensor
    values: Tensor
    right: Tensor
    shape: tuple[int, ...]
    tail: float = 0.0

    @property
    def size(self) -> float:
        """Squared Frobenius norm of the whole change."""
        return float(self.values.double().square().sum()) + self.tail

    def lost(self, rank: int) -> float:
        """Squared Frobenius norm of what a cut to that rank leaves out."""
        return float(self.values[rank:].double().square().sum()) + self.tail

    def kept(self, rank: int) -> float:
        """Share of the squared Frobenius norm that a cut to that rank keeps; 1 for a change of zero."""
        size = self.size
        return 1.0 - self.lost(rank) / size if size else 1.0

    def rank_for(self, share: float) -> int:
        """The smallest rank that keeps that share of the squared Frobenius norm, 1 at least; at most the values known."""
        # Summed from the small end: what is left out is then known to more digits than the whole.
        lost = self.values.double().square().flip(0).cumsum(0).flip(0)[1:] + self.tail
        return 1 + int((lost > (1 - share) * self.size).sum())

    def cut(self, rank: int, scale: float = 1.0) -> LoRATensors:
        """The nearest change of that rank, in float32; alpha / rank is `scale`, above 0.

        Both matrices get the root of the values, so that neither outgrows half precision.
        """
        rank = min(rank, len(self.values))
        root = (self.values[:rank] / scale).sqrt()
        down, up = root[:, None] * self.right[:rank], self.left[:, :rank] * root
        kernel = self.shape[2:]
        return LoRATensors(
            down.reshape(rank, *self.shape[1:]).float().contiguous(),
            up.reshape(-1, rank, *[1] * len(kernel)).float().contiguous(),
            scale * rank,
        )


def spectrum_of_sum(loras: Sequence[tuple[LoRATensors, float]]) -> Spectrum:
    """Of the sum of plain LoRAs, each at a strength; of one LoRA where only one is given. Computed in float64.

    Shapes: lora_A [R, in] or [R, in, k, k], lora_B [out, R] or [out, R, 1, 1], of one layer; ranks may differ.
    """
    assert all(lora.magnitude is None for lora, _ in loras), "the sum of plain LoRAs"
    down = torch.cat([lora.lora_A.detach().double().flatten(1) for lora, _ in loras])
    up = torch.cat([lora.lora_B.detach().double().flatten(1) * (lora.scale * weight) for lora, weight in loras], dim=1)
    q_up, r_up = torch.linalg.qr(up)
    q_down, r_down = torch.linalg.qr(down.T)
    left, values, right = torch.linalg.svd(r_up @ r_down.T, full_matrices=False)
    # Changes that cancel leave rounding behind, which is no change.
    values = torch.where(values > 1e-14 * up.norm() * down.norm(), values, 0.0)
    first = loras[0][0]
    shape = (first.lora_B.shape[0], *first.lora_A.shape[1:])
    return Spectrum(q_up @ left, values, right @ q_down.T, shape)


def concatenated(loras: Sequence[tuple[LoRATensors, float]], alpha: float | None = None) -> LoRATensors:
    """The sum of plain LoRAs, each at a strength, as one LoRA whose rank is the sum of theirs: exact.

    Scale and strength go into both factors by their root, so that neither outgrows half precision; the sign goes into lora_B.
    What needs no factor keeps every bit.

    Args:
        alpha: of the result; None for its rank.
    """
    rank = sum(lora.rank for lora, _ in loras)
    alpha = float(rank) if alpha is None else alpha
    downs, ups = [], []
    for lora, weight in loras:
        factor = lora.scale * weight * rank / alpha
        root = abs(factor) ** 0.5
        downs.append(lora.lora_A.detach().float() * root)
        ups.append(lora.lora_B.detach().float() * (root if factor >= 0 else -root))
    return LoRATensors(torch.cat(downs), torch.cat(ups, dim=1), alpha)


def spectrum_of_matrix(change: Tensor, most: int, generator: torch.Generator) -> Spectrum:
    """Of a change that is known as a whole; of a large one the `most` largest values alone.

    Large ones are decomposed by subspace iteration from a drawn start: 2 * ITERATIONS + 2 products with
    `most` + OVERSAMPLING columns. On weights whose singular values fall as slowly as trained ones do, what is kept at a rank is
    within 1e-3 of the best (relative, in the norm of what is lost); 2e-3 where they hardly fall at all.

    Args:
        change: [out, in] or [out, in, k, k], float32 or float64.
        most: how many values are wanted.
        generator: on the CPU, for the drawn start.
    Source: Halko, Martinsson, Tropp 2011, arXiv 0909.4061, algorithms 4.4 and 5.1.
    """
    matrix = change.flatten(1)
    if min(matrix.shape) <= EXACT_UP_TO or most + OVERSAMPLING >= min(matrix.shape):
        left, values, right = torch.linalg.svd(matrix, full_matrices=False)
    else:
        drawn = torch.randn(matrix.shape[1], most + OVERSAMPLING, generator=generator).to(matrix)
        basis = torch.linalg.qr(matrix @ drawn).Q
        for _ in range(ITERATIONS):
            basis = torch.linalg.qr(matrix @ torch.linalg.qr(matrix.T @ basis).Q).Q
        left, values, right = torch.linalg.svd(basis.T @ matrix, full_matrices=False)
        left = basis @ left
        known = float(values[:most].double().square().sum())
        tail = max(0.0, float(matrix.double().square().sum()) - known)
        return Spectrum(left[:, :most], values[:most], right[:most], tuple(change.shape), tail)
    tail = float(values[most:].double().square().sum())
    return Spectrum(left[:, :most], values[:most], right[:most], tuple(change.shape), tail)
