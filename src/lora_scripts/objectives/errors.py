"""How an error of the prediction counts: squared, or by a Huber loss that lets outliers count less.

Legend for shapes: B batch, C channels, h w latent height and width.
Source: Khrapov et al. 2024, arXiv 2403.16728; forms, thresholds and defaults as kohya's sd-scripts (`--loss_type`,
`--huber_schedule`, `--huber_c`).
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Literal

import torch

from lora_scripts.objectives.ddpm import NoiseSchedule, snr

if TYPE_CHECKING:
    from torch import Tensor

    from lora_scripts.config import HuberSchedule

__all__ = ["huber_thresholds", "pseudo_huber"]


def huber_thresholds(schedule: NoiseSchedule, timesteps: Tensor, c: float, kind: HuberSchedule) -> Tensor:
    """[B] float32, the size of error from which on a picture's errors count by their size rather than its square.

    Args:
        timesteps: [B] int64.
        c: the threshold of pure noise, 0 < c <= 1.
        kind: "constant": c everywhere; "exponential": c^(t / T), falling from 1 to c; "snr": (1 - c) / (1 + sigma)^2 + c
            with sigma^2 = 1 / snr, falling from nearly 1 to c.
    Source: arXiv 2403.16728, section 4.
    """
    if kind == "constant":
        return torch.full_like(timesteps, c, dtype=torch.float32)
    if kind == "exponential":
        return torch.exp(math.log(c) / schedule.num_train_timesteps * timesteps.float())
    sigmas = snr(schedule, timesteps).rsqrt()
    return (1.0 - c) / (1.0 + sigmas).square() + c


def pseudo_huber(squared: Tensor, thresholds: Tensor, kind: Literal["huber", "smooth_l1"]) -> Tensor:
    """[B,C,h,w] errors that grow like a square below the threshold and like a distance above it, smooth everywhere.

    Args:
        squared: [B,C,h,w] squared errors.
        thresholds: [B] c, above 0.
        kind: "huber": 2 c (sqrt(e^2 + c^2) - c), nearly e^2 where e is small; "smooth_l1": the same over c.
    """
    c = thresholds.reshape(-1, *[1] * (squared.ndim - 1))
    # sqrt(e^2 + c^2) - c written without the difference, which would leave nothing of errors far below c.
    beyond = squared / ((squared + c.square()).sqrt() + c)
    return 2.0 * c * beyond if kind == "huber" else 2.0 * beyond
