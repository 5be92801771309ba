"""How sharp a picture is, whatever its contrast and content.

Legend for shapes: h w height and width in pixels, T tiles per side.
Source: the variance of the Laplacian as a measure of focus, Pech-Pacheco et al. 2000, "Diatom autofocusing in brightfield
microscopy"; taken here at two sizes of one picture, so that contrast and amount of detail cancel out.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray

__all__ = ["MIN_SIDE", "sharpness"]

MIN_SIDE = 64
"""Below this, a quarter of the picture has too few pixels to compare with."""
TILES = 8
CONTRAST = 100.0
"""Squared Laplacian, at a quarter of the size, from which a tile has edges that could be sharp; about ten grey levels."""
ROUNDING = 20 / 12
"""What rounding to whole grey levels adds: 1/12 per pixel, times the squared weights of the Laplacian (16 + 4)."""


def sharpness(grey: NDArray[np.float32]) -> float | None:
    """Energy of the finest detail over that at a quarter of the size, in the sharpest tenth of the picture.

    Pictures of the world have about as much detail at one size as at another, so the ratio of a sharp one is near 1
    (0.25 to 30 were seen). Blurring takes the finest detail away and leaves the coarse: down to 1/256 for what is smooth.
    Only the sharpest tenth counts, so a sharp face before a soft background is a sharp picture.

    Args:
        grey: [h, w], 0..255, the shorter side at about 512 pixels where the picture has them.
    Returns:
        None where nothing can be said: the picture is too small, or has no edges at all.
    """
    if min(grey.shape) < MIN_SIDE:
        return None
    height, width = (side // 4 * 4 for side in grey.shape)
    quarter = grey[:height, :width].reshape(height // 4, 4, width // 4, 4).mean(axis=(1, 3))
    fine, coarse = _tiles(_laplacian(grey) ** 2), _tiles(_laplacian(quarter) ** 2)
    edged = coarse >= CONTRAST
    if not edged.any():
        # Contrast without a single edge: blurred beyond what the quarter shows. Without contrast there is nothing to judge.
        return 0.0 if float(grey.std()) > 12 else None
    return float(np.quantile(np.maximum(fine - ROUNDING, 0)[edged] / coarse[edged], 0.9))


def _laplacian(grey: NDArray[Any]) -> NDArray[Any]:
    """[h-2, w-2]: four times each pixel less its four neighbours."""
    inner = grey[1:-1, 1:-1]
    result: NDArray[Any] = 4 * inner - grey[:-2, 1:-1] - grey[2:, 1:-1] - grey[1:-1, :-2] - grey[1:-1, 2:]
    return result


def _tiles(values: NDArray[Any]) -> NDArray[Any]:
    """[T, T]: the means of TILES x TILES parts."""
    height, width = (side // TILES * TILES for side in values.shape)
    parts = values[:height, :width].reshape(TILES, height // TILES, TILES, width // TILES)
    means: NDArray[Any] = parts.mean(axis=(1, 3))
    return means
