"""rsLoRA: a scale that falls with the root of the rank, so that a high rank learns no slower than a low one.

Source: Kalajdzievski 2023, arXiv 2312.03732, theorem 3.2.
"""

from __future__ import annotations

import math

__all__ = ["rslora_alpha"]


def rslora_alpha(alpha: float, rank: int) -> float:
    """The alpha of a plain LoRA with the scale alpha / sqrt(rank): what acts, and what files say to readers that know no rsLoRA."""
    return alpha * math.sqrt(rank)
