"""Another rank for a finished LoRA layer."""

from __future__ import annotations

import torch

from lora_scripts.adapters.weights import LoRATensors

__all__ = ["fit_rank"]


def fit_rank(tensors: LoRATensors, rank: int) -> tuple[LoRATensors, float]:
    """The same change at a rank of at most `rank`, and the share of its squared norm that was kept.

    A smaller rank keeps the largest singular values, which is the nearest change of that rank (Eckart and Young 1936).
    A larger one returns the tensors as they are: the change has no more to it. The scale alpha / R stays the same.
    Shapes: lora_A [R, in] or [R, in, k, k], lora_B [out, R] or [out, R, 1, 1].
    """
    if tensors.rank <= rank:
        return tensors, 1.0
    down, up = tensors.lora_A.detach().double().flatten(1), tensors.lora_B.detach().double().flatten(1)
    # The product is [out, in] but of rank R: two thin QR factors leave only an [R, R] matrix to decompose.
    q_up, r_up = torch.linalg.qr(up)
    q_down, r_down = torch.linalg.qr(down.T)
    left, values, right = torch.linalg.svd(r_up @ r_down.T)
    root = values[:rank].sqrt()
    new_up = (q_up @ left[:, :rank]) * root
    new_down = root[:, None] * (right[:rank] @ q_down.T)
    total = values.square().sum()
    kept = float(values[:rank].square().sum() / total) if total > 0 else 1.0
    shrunk = LoRATensors(
        new_down.reshape(rank, *tensors.lora_A.shape[1:]).float(),
        new_up.reshape(-1, rank, *tensors.lora_B.shape[2:]).float(),
        tensors.scale * rank,
    )
    return shrunk, kept
