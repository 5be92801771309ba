"""Frames and bars around a picture, and marks that many pictures carry at the same place.

Legend for shapes: h w height and width in pixels, N pictures.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray
    from PIL.Image import Image

__all__ = ["PLACES", "bars", "common_marks", "place_patches"]

PLACES = ("top left corner", "top right corner", "bottom left corner", "bottom right corner", "bottom centre")
"""Where logos, signatures, dates and watermarks stand."""
PATCH = (32, 16)
"""Columns and rows of a place's small copy: enough for the shape of a line of writing."""

UNIFORM = 2.5
"""Spread of grey levels along a line of pixels that still counts as one colour; JPEG leaves about 1 in a black bar."""
THINNEST = 0.02
"""Share of the side from which a bar is one; thinner ones are cropped or scaled away."""
EDGE = 12.0
"""Grey levels between a bar and the picture within."""

ALIKE = 0.75
"""Correlation of two patches' edges from which they show the same mark. Opaque writing gave 0.7 to 0.95 on drawn scenes,
different scenes rarely more than 0.6."""
FEWEST, SHARE = 6, 0.5
"""A mark is on at least so many pictures and this share of them; alike horizons, hatching or paper grain reached 46 % of
small drawn sets."""
SAMPLE = 400
"""Pictures compared; a mark on half of the set shows in any sample, and the comparison grows with the square."""
FAINTEST = 1.5
"""Mean step between neighbouring pixels of a patch; below it there is nothing but grain."""


def bars(grey: NDArray[np.float32]) -> tuple[float, float]:
    """Share of the width and of the height taken by bars of one colour on both opposite sides, 0 where there are none.

    A bar ends in a straight edge along at least half of its length: a subject on white paper has no bars.

    Args:
        grey: [h, w], 0..255.
    """
    return _bars(grey), _bars(grey.T)


def _bars(grey: NDArray[np.float32]) -> float:
    """Share of the columns that are bars at the left and right."""
    spread, colour = grey.std(axis=0), grey.mean(axis=0)
    width = len(colour)
    sizes = []
    for order in (np.arange(width), np.arange(width)[::-1]):
        same = (spread[order] < UNIFORM) & (np.abs(colour[order] - colour[order[0]]) < 3)
        size = width if same.all() else int(np.argmin(same))
        # Two columns further in: the one at the edge may be a mixture of both.
        if not THINNEST * width <= size < 0.45 * width:
            return 0.0
        if np.mean(np.abs(grey[:, order[size + 2]] - colour[order[0]]) > EDGE) < 0.5:
            return 0.0
        sizes.append(size)
    return sum(sizes) / width if abs(float(colour[0] - colour[-1])) < 6 else 0.0


def place_patches(grey: Image) -> NDArray[np.uint8]:
    """[5, 16, 32]: a quarter of the width by an eighth of the height at each of `PLACES`, made small."""
    from PIL import Image as PILImage

    width, height = grey.size
    wide, high = max(1, width // 4), max(1, height // 8)
    corners = [
        (0, 0),
        (width - wide, 0),
        (0, height - high),
        (width - wide, height - high),
        ((width - wide) // 2, height - high),
    ]
    patches = [
        grey.resize(PATCH, PILImage.Resampling.BOX, box=(left, top, left + wide, top + high)) for left, top in corners
    ]
    return np.stack([np.asarray(patch, dtype=np.uint8) for patch in patches])


def common_marks(patches: Sequence[NDArray[np.uint8]]) -> dict[str, list[int]]:
    """For each place with one: the positions of the pictures (among those compared) that carry the same mark there.

    Args:
        patches: of different pictures, N of `place_patches`; copies of one picture would carry everything alike.
    """
    if len(patches) < FEWEST:
        return {}
    chosen = np.unique(np.linspace(0, len(patches) - 1, min(SAMPLE, len(patches))).astype(int))
    found = {}
    stacked = np.stack([patches[i] for i in chosen]).astype(np.float32)
    for number, place in enumerate(PLACES):
        here = stacked[:, number]
        steps = np.concatenate(
            [
                np.diff(here, axis=2)[:, :-1].reshape(len(here), -1),
                np.diff(here, axis=1)[:, :, :-1].reshape(len(here), -1),
            ],
            axis=1,
        )
        length = np.linalg.norm(steps, axis=1)
        seen = length / np.sqrt(steps.shape[1]) > FAINTEST
        unit = np.where(seen[:, None], steps / np.maximum(length, 1e-6)[:, None], 0)
        alike = unit @ unit.T > ALIKE
        model = int(alike.sum(axis=1).argmax())
        carriers = [int(chosen[i]) for i in np.flatnonzero(alike[model])]
        if len(carriers) >= max(FEWEST, SHARE * len(chosen)):
            found[place] = carriers
    # The same at nearly every place is a texture of the whole picture, such as a grid, and no mark.
    return found if len(found) <= 2 else {}
