"""The few shapes that pictures are trained in, and how each picture is fitted into its shape."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from lora_scripts.config import Size

if TYPE_CHECKING:
    from PIL.Image import Image

__all__ = ["Fit", "Framing", "bucket_sizes", "fit_image", "fit_into"]


@dataclass(frozen=True)
class Fit:
    """How a picture becomes its bucket's shape: scaled to cover it, then cropped around the middle.

    Attributes:
        bucket: width and height in pixels after cropping.
        scaled: width and height in pixels before cropping; covers the bucket, same aspect as the picture.
        left, top: where the crop begins in the scaled picture.
    """

    bucket: Size
    scaled: Size
    left: int
    top: int

    @property
    def cropped_share(self) -> float:
        """Share of the picture's area that the crop removes, 0..1."""
        return 1 - (self.bucket[0] * self.bucket[1]) / (self.scaled[0] * self.scaled[1])

    def upscales(self, size: Size) -> bool:
        return self.scaled[0] > size[0]


@dataclass(frozen=True)
class Framing:
    """What of a picture one of its views shows.

    Attributes:
        size: width and height in pixels before anything was done to it.
        fit: how it becomes its bucket's shape.
        mirrored: left and right are exchanged.
    """

    size: Size
    fit: Fit
    mirrored: bool = False

    @property
    def left(self) -> int:
        """Where the crop begins in the scaled picture; of a mirrored view, in the mirrored picture."""
        fit = self.fit
        return fit.scaled[0] - fit.bucket[0] - fit.left if self.mirrored else fit.left


def bucket_sizes(resolution: Size, step: int, max_aspect: float) -> list[Size]:
    """Shapes of about the resolution's area, sides in multiples of `step`, no more elongated than `max_aspect`.

    The resolution itself is always among them. A step above an eighth of the shorter side would leave hardly any shape,
    so it is lowered to that (never below 8, the latents' grain).
    """
    width, height = resolution
    step = max(8, min(step, min(resolution) // 8 // 8 * 8))
    area = width * height
    sizes = {resolution}
    side = step
    while side <= math.sqrt(area * max_aspect) + 1e-6:
        other = int(area / side) // step * step
        if other and max(side, other) / min(side, other) <= max_aspect + 1e-6:
            sizes.add((side, other))
            sizes.add((other, side))
        side += step
    return sorted(sizes)


def fit_into(size: Size, buckets: Sequence[Size]) -> Fit:
    """The bucket of the nearest aspect (the larger on a tie), and how a picture of `size` is fitted into it."""
    aspect = math.log(size[0] / size[1])
    bucket = min(buckets, key=lambda b: (round(abs(math.log(b[0] / b[1]) - aspect), 9), -b[0] * b[1], b))
    scale = max(bucket[0] / size[0], bucket[1] / size[1])
    scaled = (max(bucket[0], round(size[0] * scale)), max(bucket[1], round(size[1] * scale)))
    return Fit(bucket, scaled, (scaled[0] - bucket[0]) // 2, (scaled[1] - bucket[1]) // 2)


def fit_image(image: Image, fit: Fit, flip: bool = False) -> Image:
    """The picture scaled (Lanczos, with antialiasing) and cropped to its bucket, mirrored if asked."""
    from PIL import Image as PILImage

    if image.size != fit.scaled:
        image = image.resize(fit.scaled, PILImage.Resampling.LANCZOS, reducing_gap=3.0)
    image = image.crop((fit.left, fit.top, fit.left + fit.bucket[0], fit.top + fit.bucket[1]))
    return image.transpose(PILImage.Transpose.FLIP_LEFT_RIGHT) if flip else image
