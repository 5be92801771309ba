"""Copies of a picture that differ in file format, size or compression, found among thousands in a second.

A 64-bit hash of the coarse brightness finds candidates; a small colour copy decides, because a red cat and a blue cat on
the same sofa have the same hash. Legend for shapes: N pictures.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray
    from PIL.Image import Image

__all__ = ["difference_hash", "near_duplicates", "small_copy"]

MOST_BITS = 10
"""Bits of 64 in which hashes of one picture may differ; recompressing and halving changed at most 9 on drawn scenes."""
MOST_MEAN, MOST_BLOCK = 8.0, 18.0
"""Levels of 255 by which small copies may differ: on average, and in the worst sixteenth. Different scenes of one style on
the same ground begin at 8.7 and 20; recompressed and halved copies stay below 6 and 15 in 19 of 20 cases."""
DEADBAND = 2
"""Grey levels; noise on an even ground must not decide a bit."""
ROWS = 512
"""Rows compared with all others at once: 40 MB for 10,000 pictures."""


def difference_hash(image: Image) -> int:
    """64 bits: whether each cell of an 8 x 8 grid is darker than the one to its right.

    Source: Krawetz 2013, "Kind of like that" (dHash), with a deadband.
    """
    from PIL import Image as PILImage

    grid = np.asarray(image.convert("L").resize((9, 8), PILImage.Resampling.BOX), dtype=np.int16)
    bits = np.packbits(grid[:, 1:] - grid[:, :-1] > DEADBAND)
    return int.from_bytes(bits.tobytes(), "big")


def small_copy(image: Image) -> NDArray[np.uint8]:
    """[16, 16, 3]: the picture squeezed into a small square, in colour."""
    from PIL import Image as PILImage

    return np.asarray(image.convert("RGB").resize((16, 16), PILImage.Resampling.BOX), dtype=np.uint8)


def near_duplicates(hashes: Sequence[int], copies: Sequence[NDArray[np.uint8]]) -> list[list[int]]:
    """Groups of positions that show the same picture, each group in order, of two or more.

    Args:
        hashes: N of `difference_hash`.
        copies: N of `small_copy`.
    """
    bits, pictures = np.array(hashes, dtype=np.uint64), np.array(copies, dtype=np.int16)
    coarse = pictures.reshape(-1, 4, 4, 4, 4, 3).mean(axis=(2, 4), dtype=np.float32)
    group = np.arange(len(bits))
    for start in range(0, len(bits), ROWS):
        near = np.bitwise_count(bits[start : start + ROWS, None] ^ bits[None, start:]) <= MOST_BITS
        for row in np.flatnonzero(near.sum(axis=1) > 1):
            first = start + row
            others = start + np.flatnonzero(near[row])
            others = others[(others > first) & (group[others] != group[first])]
            # Thousands of white product shots share a hash: the means of the blocks, a sixteenth of the numbers, tell most apart.
            others = others[
                np.abs(coarse[others] - coarse[first]).mean(axis=3).max(axis=(1, 2), initial=0) <= MOST_BLOCK
            ]
            others = others[_same(pictures[first], pictures[others])]
            group[np.isin(group, group[others])] = group[first]
    members: dict[int, list[int]] = {}
    for position, number in enumerate(group.tolist()):
        members.setdefault(number, []).append(position)
    return [positions for positions in members.values() if len(positions) > 1]


def _same(picture: NDArray[np.int16], others: NDArray[np.int16]) -> NDArray[np.bool_]:
    """[N]: which of the small copies `others` [N, 16, 16, 3] show what `picture` [16, 16, 3] shows."""
    difference = np.abs(others - picture).mean(axis=3)
    blocks = difference.reshape(-1, 4, 4, 4, 4).mean(axis=(2, 4))
    result: NDArray[np.bool_] = (difference.mean(axis=(1, 2)) <= MOST_MEAN) & (blocks.max(axis=(1, 2)) <= MOST_BLOCK)
    return result
