"""How fast a device multiplies matrices: the speed that no training step can exceed."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

__all__ = ["matmul_rate"]

SIDES = {"cpu": 512, "cuda": 4096, "mps": 4096}
"""Of the matrices: large enough that nothing but the product counts, small beside what a step takes."""
FEWEST = 3


def matmul_rate(device: torch.device, dtype: torch.dtype, seconds: float = 0.2, *, side: int | None = None) -> float:
    """Floating-point operations per second of the fastest of some products of square matrices.

    Args:
        dtype: of the matrices.
        seconds: how long is measured, at most a product more; a slow machine has at least three.
        side: of the matrices; by default one that the device is nearly as fast with as with any.
    """
    import torch

    side = side or SIDES.get(device.type, 512)
    # Numbers of the usual size: zeros are multiplied faster than weights by processors that save power on them.
    left = torch.linspace(-1, 1, side * side, device=device).reshape(side, side).to(dtype)
    right = left.T.contiguous()

    def product() -> float:
        began = time.perf_counter()
        (left @ right)[0, 0].item()  # waits for the device
        return time.perf_counter() - began

    product()  # kernels are loaded and chosen in the first one
    best, began, count = float("inf"), time.perf_counter(), 0
    while count < FEWEST or time.perf_counter() - began < seconds:
        best, count = min(best, product()), count + 1
    return 2 * side**3 / best
