"""Another rank for a finished LoRA layer."""

from __future__ import annotations

from dataclasses import replace

from lora_scripts.adapters.spectrum import spectrum_of_sum
from lora_scripts.adapters.weights import LoRATensors

__all__ = ["fit_rank"]


def fit_rank(tensors: LoRATensors, rank: int) -> tuple[LoRATensors, float]:
    """The same change at a rank of at most `rank`, and the share of its squared Frobenius norm that was kept.

    A smaller rank keeps the largest singular values, which is the nearest change of that rank (Eckart and Young 1936).
    A larger one returns the tensors as they are: the change has no more to it. The scale alpha / R stays the same, and so do
    the row lengths of a DoRA.
    Shapes: lora_A [R, in] or [R, in, k, k], lora_B [out, R] or [out, R, 1, 1].
    """
    if tensors.rank <= rank:
        return tensors, 1.0
    spectrum = spectrum_of_sum([(replace(tensors, magnitude=None), 1.0)])
    shrunk = spectrum.cut(rank, abs(tensors.scale) or 1.0)
    return replace(shrunk, magnitude=tensors.magnitude), spectrum.kept(rank)
