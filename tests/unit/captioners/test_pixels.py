"""Pixels by table are those of transformers' image processors, to the bit."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from PIL import Image
from transformers import BlipImageProcessorPil, CLIPImageProcessorPil

from lora_scripts.captioners.pixels import Pixels

PROCESSORS: dict[str, Any] = {
    "BLIP": lambda: BlipImageProcessorPil(size={"height": 48, "width": 48}),
    "BLIP, wider than high": lambda: BlipImageProcessorPil(size={"height": 24, "width": 40}),
    "BLIP, another filter and no normalising": lambda: BlipImageProcessorPil(
        size={"height": 48, "width": 48}, resample=Image.Resampling.BILINEAR, do_normalize=False
    ),
    "CLIP": lambda: CLIPImageProcessorPil(size={"shortest_edge": 48}, crop_size={"height": 48, "width": 48}),
}


@pytest.mark.parametrize("size", [(200, 150), (48, 48), (30, 90)])
@pytest.mark.parametrize("make", PROCESSORS.values(), ids=PROCESSORS)
def test_pixels_are_those_of_the_processor_to_the_bit(make: Any, size: tuple[int, int]) -> None:
    width, height = size
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8))
    processor = make()
    expected = processor(images=image, return_tensors="np")["pixel_values"][0]
    pixels = Pixels(processor)(image)
    assert pixels.dtype == expected.dtype == np.float32
    assert pixels.flags.c_contiguous
    np.testing.assert_array_equal(pixels, expected)
