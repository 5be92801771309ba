"""How much each noise level counts in the loss.

Legend for shapes: B batch.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from lora_scripts.objectives.ddpm import Prediction

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["debiased_weights", "min_snr_weights"]


def min_snr_weights(ratio: Tensor, gamma: float, prediction: Prediction) -> Tensor:
    """Per-image loss weights that cap the pull of nearly clean images.

    Args:
        ratio: [B], the signal-to-noise ratio (alpha_t / sigma_t)**2.
        gamma: the cap; the paper recommends 5.0.
        prediction: what the model predicts.
    Returns:
        [B], min(snr, gamma) / snr for epsilon, min(snr, gamma) / (snr + 1) for v.
    Raises:
        ValueError: gamma is not positive.
    Source: Hang et al. 2023, arXiv 2303.09556, section 3.4.
    """
    if gamma <= 0:
        raise ValueError(f"gamma must be positive, not {gamma}")
    if prediction == "epsilon":
        # Written as a quotient by snr alone, so that a terminal of zero gives its limit 1 rather than 0 / 0.
        return (gamma / ratio).clamp(max=1.0)
    return ratio.clamp(max=gamma) / (ratio + 1.0)


def debiased_weights(ratio: Tensor, prediction: Prediction, *, most: float = 1000.0) -> Tensor:
    """Per-image loss weights that raise the noisy timesteps: 1 / sqrt(snr) for epsilon, 1 / (snr + 1) for v.

    Args:
        ratio: [B], the signal-to-noise ratio.
        most: the largest weight of epsilon, reached near a terminal of zero, and the largest ratio that is told from others.
    Source: Yu et al. 2023, arXiv 2310.08442, equation 12; v and the largest ratio as kohya's sd-scripts
        (`--debiased_estimation_loss`).
    """
    ratio = ratio.clamp(max=most)
    if prediction == "epsilon":
        return ratio.rsqrt().clamp(max=most)
    return 1.0 / (ratio + 1.0)
