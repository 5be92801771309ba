"""The options of the denoising loss written out, picture by picture, as the papers and kohya's sd-scripts state them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch

from lora_scripts.training.draws import Draws

if TYPE_CHECKING:
    from diffusers import DDPMScheduler


def pyramid_by_hand(noise: torch.Tensor, draws: Draws, key: str, iterations: int, discount: float) -> torch.Tensor:
    """One picture's noise [1,C,h,w] with coarser noise on it, after sd-scripts' `pyramid_noise_like`."""
    _, channels, height, width = noise.shape
    enlarge = torch.nn.Upsample(size=(height, width), mode="bilinear")
    for i in range(iterations):
        r = draws.fraction(key, f"pyramid size {i}") * 2 + 2
        hn, wn = max(1, int(height / r**i)), max(1, int(width / r**i))
        noise = noise + enlarge(draws.normal([key], (channels, hn, wn), f"pyramid {i}")) * discount**i
        if hn == 1 or wn == 1:
            break
    return noise / noise.std()


def loss_by_hand(
    error: torch.Tensor, t: int, scheduler: DDPMScheduler, prediction: str, changes: Mapping[str, Any]
) -> torch.Tensor:
    """[] the loss of one picture for its error [C,h,w] at timestep t, under these settings."""
    share = float(scheduler.alphas_cumprod[t])
    ratio = share / (1 - share)
    sigma = ratio**-0.5
    c0, kind = changes.get("huber_c", 0.1), changes.get("huber_schedule", "snr")
    c = {"constant": c0, "exponential": c0 ** (t / 1000), "snr": (1 - c0) / (1 + sigma) ** 2 + c0}[kind]
    root = torch.sqrt(error**2 + c**2) - c
    counted = {"l2": error**2, "huber": 2 * c * root, "smooth_l1": 2 * root}[changes.get("loss_type", "l2")]
    if changes.get("debiased_estimation"):
        weight = min(ratio, 1000) ** -0.5 if prediction == "epsilon" else 1 / (min(ratio, 1000) + 1)
    elif changes.get("min_snr_gamma") == 0:
        weight = 1.0
    else:
        weight = min(ratio, 5.0) / (ratio if prediction == "epsilon" else ratio + 1)
    return weight * counted.mean()
