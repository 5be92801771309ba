"""Shapes: areas, aspects and crops."""

from __future__ import annotations

import pytest
from PIL import Image

from lora_scripts.data.buckets import bucket_sizes, fit_image, fit_into


def test_buckets_keep_the_area_and_the_aspect_limit() -> None:
    sizes = bucket_sizes((512, 512), 64, 2.0)
    assert (512, 512) in sizes
    assert (384, 640) in sizes
    for width, height in sizes:
        assert width * height <= 512 * 512
        assert width % 64 == height % 64 == 0
        assert max(width, height) / min(width, height) <= 2.0


def test_small_resolution_has_several_shapes() -> None:
    assert len(bucket_sizes((128, 128), 64, 2.0)) >= 5


def test_resolution_that_is_no_multiple_of_the_step_is_kept() -> None:
    assert (520, 520) in bucket_sizes((520, 520), 64, 2.0)


@pytest.mark.parametrize("size", [(512, 512), (1000, 700), (300, 900), (64, 64), (4001, 2999), (513, 511)])
def test_fit_covers_the_bucket_and_centres_the_crop(size: tuple[int, int]) -> None:
    fit = fit_into(size, bucket_sizes((512, 512), 64, 2.0))
    assert fit.scaled[0] >= fit.bucket[0]
    assert fit.scaled[1] >= fit.bucket[1]
    assert fit.scaled[0] == fit.bucket[0] or fit.scaled[1] == fit.bucket[1]
    assert abs(fit.scaled[0] / fit.scaled[1] - size[0] / size[1]) < 0.02 * size[0] / size[1]
    assert abs((fit.scaled[0] - fit.bucket[0]) - 2 * fit.left) <= 1


def test_mirrored_picture_is_the_mirror() -> None:
    image = Image.new("RGB", (64, 64), "red")
    image.paste("blue", (0, 0, 32, 64))
    fit = fit_into(image.size, [(64, 64)])
    assert fit_image(image, fit).getpixel((5, 5)) == (0, 0, 255)
    assert fit_image(image, fit, flip=True).getpixel((5, 5)) == (255, 0, 0)


def test_upscaling_is_known() -> None:
    assert fit_into((300, 300), [(512, 512)]).upscales((300, 300))
    assert not fit_into((600, 600), [(512, 512)]).upscales((600, 600))
