"""The few names of `torchvision.transforms` that diffusers' text-to-image examples and sd-scripts use, on Pillow and torch alone.

For the peers of `benchmarks/`, on machines without torchvision: it has no build for every build of torch. Only
what they need is here, each class with the arguments they pass. Every class is called with one picture and
returns one. Legend: C channels, H W height and width.
Source: the behaviour described in torchvision's documentation of `transforms` (version 1 of the interface).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from enum import Enum
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

__all__ = [
    "CenterCrop",
    "Compose",
    "InterpolationMode",
    "Lambda",
    "Normalize",
    "RandomCrop",
    "RandomHorizontalFlip",
    "Resize",
    "ToTensor",
    "crop",
]


class InterpolationMode(Enum):
    """Ways to resample; the examples offer the names as choices of an option."""

    NEAREST = Image.Resampling.NEAREST
    BILINEAR = Image.Resampling.BILINEAR
    BICUBIC = Image.Resampling.BICUBIC
    BOX = Image.Resampling.BOX
    HAMMING = Image.Resampling.HAMMING
    LANCZOS = Image.Resampling.LANCZOS


class Compose:
    """One step after the other."""

    def __init__(self, transforms: Sequence[Callable[[Any], Any]]) -> None:
        self.transforms = transforms

    def __call__(self, image: Any) -> Any:
        for transform in self.transforms:
            image = transform(image)
        return image


class Lambda:
    """A function as a step."""

    def __init__(self, function: Callable[[Any], Any]) -> None:
        self.function = function

    def __call__(self, image: Any) -> Any:
        return self.function(image)


class Resize:
    """The shorter side becomes `size` pixels, the longer one in proportion, rounded down; a fitting picture is kept."""

    def __init__(self, size: int, interpolation: InterpolationMode = InterpolationMode.BILINEAR) -> None:
        self.size, self.interpolation = size, interpolation

    def __call__(self, image: Image.Image) -> Image.Image:
        width, height = image.size
        shorter = min(width, height)
        if shorter == self.size:
            return image
        new_size = (int(self.size * width / shorter), int(self.size * height / shorter))
        return image.resize(new_size, self.interpolation.value)


class CenterCrop:
    """The middle square of `size` pixels."""

    def __init__(self, size: int) -> None:
        self.size = size

    def __call__(self, image: Image.Image) -> Image.Image:
        return _crop(image, round((image.width - self.size) / 2), round((image.height - self.size) / 2), self.size)


class RandomCrop:
    """A square of `size` pixels from anywhere in the picture; a picture of just that size draws no random number."""

    def __init__(self, size: int) -> None:
        self.size = size

    def __call__(self, image: Image.Image) -> Image.Image:
        top, left, _, _ = self.get_params(image, (self.size, self.size))
        return _crop(image, left, top, self.size)

    @staticmethod
    def get_params(image: Image.Image, size: tuple[int, int]) -> tuple[int, int, int, int]:
        """Top, left, height and width of a rectangle of that height and width from anywhere in the picture."""
        height, width = size
        room_x, room_y = image.width - width, image.height - height
        if room_x == room_y == 0:
            return 0, 0, height, width
        return int(torch.randint(0, room_y + 1, (1,))), int(torch.randint(0, room_x + 1, (1,))), height, width


class RandomHorizontalFlip:
    """The picture or, with a chance of `p`, its mirror image."""

    def __init__(self, p: float = 0.5) -> None:
        self.p = p

    def __call__(self, image: Image.Image) -> Image.Image:
        return image.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if float(torch.rand(1)) < self.p else image


class ToTensor:
    """[C,H,W] float32 in 0..1 from a picture of 8 bits per channel."""

    def __call__(self, image: Image.Image) -> Tensor:
        values = np.array(image, np.uint8)
        values = values[:, :, None] if values.ndim == 2 else values
        return torch.from_numpy(values).permute(2, 0, 1).contiguous().float().div(255)


class Normalize:
    """(value - mean) / std per channel."""

    def __init__(self, mean: Sequence[float], std: Sequence[float]) -> None:
        self.mean, self.std = mean, std

    def __call__(self, pixels: Tensor) -> Tensor:
        return (pixels - torch.tensor(self.mean).view(-1, 1, 1)) / torch.tensor(self.std).view(-1, 1, 1)


def crop(image: Image.Image, top: int, left: int, height: int, width: int) -> Image.Image:
    """The rectangle of that size whose upper left corner is there; as `transforms.functional.crop`."""
    return image.crop((left, top, left + width, top + height))


def _crop(image: Image.Image, left: int, top: int, size: int) -> Image.Image:
    if left < 0 or top < 0:
        raise ValueError(f"a picture of {image.width}x{image.height} has no square of {size} pixels")
    return image.crop((left, top, left + size, top + size))
