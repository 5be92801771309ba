"""What is measured on a picture, once; the checks judge these numbers and never see the picture."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from lora_scripts.data.images import read_image
from lora_scripts.preflight.borders import bars, place_patches
from lora_scripts.preflight.likeness import difference_hash, small_copy
from lora_scripts.preflight.sharpness import sharpness

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from torch import Tensor

__all__ = ["FORMAT", "PictureFacts", "measure"]

FORMAT = 1
"""Goes up when a measurement changes, so that older stored ones are not used."""
WORKING_SIDE = 512
"""Pixels of the shorter side that is looked at: what no training size shows does not matter."""


@dataclass(frozen=True)
class PictureFacts:
    """Measurements of one picture, independent of settings.

    Attributes:
        sharpness: as `preflight.sharpness`; None where it cannot be told.
        spread: standard deviation of the grey levels, 0..128.
        brightest: grey level that 1 % of the pixels exceed, 0..255.
        bars: share of width and of height taken by bars of one colour.
        hash, copy: for the search for copies, as `preflight.likeness`.
        patches: the places where marks stand, as `preflight.borders`.
    """

    sharpness: float | None
    spread: float
    brightest: float
    bars: tuple[float, float]
    hash: int
    copy: NDArray[np.uint8]
    patches: NDArray[np.uint8]

    def to_tensors(self) -> dict[str, Tensor]:
        """For the cache, exactly."""
        import torch

        numbers = [-1.0 if self.sharpness is None else self.sharpness, self.spread, self.brightest, *self.bars]
        return {
            "numbers": torch.tensor(numbers, dtype=torch.float64),
            "hash": torch.tensor(list(self.hash.to_bytes(8, "big")), dtype=torch.uint8),
            "copy": torch.from_numpy(self.copy.copy()),
            "patches": torch.from_numpy(self.patches.copy()),
        }

    @classmethod
    def from_tensors(cls, tensors: dict[str, Tensor]) -> PictureFacts:
        sharp, spread, brightest, across, down = tensors["numbers"].tolist()
        return cls(
            sharpness=None if sharp < 0 else sharp,
            spread=spread,
            brightest=brightest,
            bars=(across, down),
            hash=int.from_bytes(bytes(tensors["hash"].tolist()), "big"),
            copy=tensors["copy"].numpy(),
            patches=tensors["patches"].numpy(),
        )


def measure(path: Path) -> PictureFacts:
    """Decodes a picture, a JPEG at reduced size where that loses nothing, and measures it.

    All of the file is read also then, so a truncated one is noticed.

    Raises:
        DataError: the picture cannot be decoded.
    """
    from PIL import Image

    image = read_image(path, at_least=WORKING_SIDE)
    if min(image.size) > WORKING_SIDE:
        scale = WORKING_SIDE / min(image.size)
        size = (round(image.width * scale), round(image.height * scale))
        image = image.resize(size, Image.Resampling.BILINEAR, reducing_gap=2.0)
    grey = image.convert("L")
    levels = np.asarray(grey, dtype=np.float32)
    return PictureFacts(
        sharpness=sharpness(levels),
        spread=float(levels.std()),
        brightest=float(np.quantile(levels, 0.99)),
        bars=bars(levels),
        hash=difference_hash(grey),
        copy=small_copy(image),
        patches=place_patches(grey),
    )
