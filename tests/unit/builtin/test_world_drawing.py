"""Drawings: repeatable, true to the colour word, and different from style to style."""

from __future__ import annotations

import colorsys
import itertools
from typing import TYPE_CHECKING

import numpy as np
import pytest

from lora_scripts.builtin.world import (
    COLOURS,
    PLACES,
    STYLES,
    SUBJECTS,
    TIMES,
    Scene,
    draw,
    draw_with_mask,
    random_scene,
)

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from PIL import Image

# Middle of each colour's hue, in degrees. White has no hue and is told by its saturation.
_HUES = {"red": 356, "orange": 27, "yellow": 50, "green": 130, "blue": 220, "purple": 275, "pink": 336}


def _pixels(image: Image.Image) -> NDArray[np.float64]:
    return np.asarray(image, dtype=np.float64)


def _dominant_colour(pixels: NDArray[np.float64]) -> str:
    """The colour word of most pixels: outlines (dark) do not vote, greyish pixels vote for white.

    Red and pink share their hues, so that light reds vote for pink.
    """
    votes = dict.fromkeys(COLOURS, 0)
    for r, g, b in pixels / 255:
        hue, saturation, value = colorsys.rgb_to_hsv(r, g, b)
        if value < 0.35:
            continue
        if saturation < 0.2:
            votes["white"] += 1
            continue
        near = min(_HUES, key=lambda name: abs((hue * 360 - _HUES[name] + 180) % 360 - 180))
        if near in ("red", "pink"):
            near = "pink" if (r + g + b) / 3 > 0.55 else "red"
        votes[near] += 1
    return max(votes, key=lambda name: votes[name])


@pytest.mark.parametrize("style", [None, *STYLES])
def test_same_arguments_give_same_pixels(style: str | None) -> None:
    scene = Scene("elephant", "pink", "lake", "rain", 2)
    first = draw(scene, 11, style)
    assert first.mode == "RGB"
    assert first.size == (128, 128)
    assert first.tobytes() == draw(scene, 11, style).tobytes()
    assert first.tobytes() != draw(scene, 12, style).tobytes()


def test_mask_comes_with_the_picture_that_draw_gives() -> None:
    scene = Scene("car", "white", "snow", "day", 1)
    image, mask = draw_with_mask(scene, 3, None, 96)
    assert mask.mode == "L"
    assert mask.size == image.size == (96, 96)
    assert image.tobytes() == draw(scene, 3, None, 96).tobytes()


@pytest.mark.parametrize("subject", SUBJECTS)
def test_colour_word_dominates_the_mask_at_all_times(subject: str) -> None:
    for (i, colour), time in itertools.product(enumerate(COLOURS), TIMES):
        image, mask = draw_with_mask(Scene(subject, colour, PLACES[i], time, 1), i, size=64)
        inside = _pixels(image)[_pixels(mask) > 200]
        assert _dominant_colour(inside) == colour, (subject, colour, time)


def test_white_subjects_stand_out_from_snow() -> None:
    for subject in SUBJECTS:
        image, mask = draw_with_mask(Scene(subject, "white", "snow", "day", 1), 1)
        inside = _pixels(image.convert("L"))[_pixels(mask) > 200]
        assert np.mean(inside < 110) > 0.05, subject


@pytest.mark.parametrize("subject", SUBJECTS)
def test_subject_fills_its_share_of_the_picture(subject: str) -> None:
    for seed in range(3):
        for count, (low, high) in {1: (0.12, 0.42), 2: (0.12, 0.46), 3: (0.1, 0.44)}.items():
            _, mask = draw_with_mask(Scene(subject, "red", "lake", "day", count), seed)
            share = float(np.mean(_pixels(mask) > 127))
            assert low <= share <= high, (count, share)


def test_single_subjects_are_tall_and_inside_the_picture() -> None:
    for subject, seed in itertools.product(SUBJECTS, range(4)):
        _, mask = draw_with_mask(Scene(subject, "red", "lake", "day", 1), seed)
        left, top, right, bottom = mask.point(lambda v: 255 if v > 127 else 0).getbbox() or (0, 0, 0, 0)
        assert max(bottom - top, right - left) >= 0.55 * 128, subject
        assert min(left, top, 128 - right, 128 - bottom) > 0, subject


def test_more_subjects_are_smaller_each() -> None:
    for subject in SUBJECTS:
        heights = []
        for count in (1, 2, 3):
            _, mask = draw_with_mask(Scene(subject, "red", "lake", "day", count), 5)
            heights.append(float(np.mean(_pixels(mask) > 127)) / count)
        assert heights[0] > heights[1] > heights[2], subject


def test_places_and_times_change_the_background() -> None:
    def background(place: str, time: str) -> NDArray[np.float64]:
        mean = np.zeros((8, 8, 3))
        for seed in range(4):
            mean += _pixels(draw(Scene("cat", "red", place, time, 1), seed, size=64).reduce(8)) / 4
        return mean

    seen = {(place, time): background(place, time) for place in PLACES for time in TIMES}
    for (a, first), (b, second) in itertools.combinations(seen.items(), 2):
        assert np.abs(first - second).mean() > 6, (a, b)


def test_styles_differ_from_the_plain_look_and_from_each_other() -> None:
    rng = np.random.default_rng(0)
    scenes = [random_scene(rng) for _ in range(4)]
    for i, scene in enumerate(scenes):
        drawn = {style: _pixels(draw(scene, i, style)) for style in (None, *STYLES)}
        for (a, first), (b, second) in itertools.combinations(drawn.items(), 2):
            assert np.abs(first - second).mean() > 8, (a, b, scene)


def test_layout_does_not_depend_on_the_style() -> None:
    scene = Scene("rocket", "blue", "city", "night", 1)
    _, plain = draw_with_mask(scene, 9)
    _, styled = draw_with_mask(scene, 9, "woodcut")
    assert plain.tobytes() == styled.tobytes()


def test_unknown_styles_and_negative_seeds_are_refused() -> None:
    scene = Scene("cat", "red", "beach", "day", 1)
    with pytest.raises(ValueError, match="style: 'oil' is not one of"):
        draw(scene, 0, "oil")
    with pytest.raises(ValueError, match="seed: -1 is negative"):
        draw(scene, -1)


@pytest.mark.parametrize(
    ("scene", "quarters"),
    [
        (Scene("cat", "red", "beach", "day", 1), (148, 189, 201, 170, 161, 171, 157, 138, 125, 191, 112, 102)),
        (Scene("robot", "green", "city", "night", 2), (59, 64, 95, 35, 46, 84, 58, 99, 81, 53, 91, 82)),
        (Scene("teapot", "white", "forest", "rain", 3), (94, 116, 112, 96, 107, 104, 133, 146, 138, 135, 142, 136)),
    ],
)
def test_plain_look_is_the_one_the_built_in_weights_learned(scene: Scene, quarters: tuple[int, ...]) -> None:
    # Mean colours of the four quarters: changing a drawing moves them, another Pillow's antialiasing does not.
    assert np.abs(_pixels(draw(scene, 7).reduce(64)).reshape(-1) - quarters).max() <= 2


@pytest.mark.parametrize("style", STYLES)
def test_colour_word_can_still_be_told_in_every_style(style: str) -> None:
    def inside(colour: str, seed: int) -> NDArray[np.float64]:
        image, mask = draw_with_mask(Scene("umbrella", colour, "lake", "day", 1), seed, style, 64)
        mean: NDArray[np.float64] = _pixels(image)[_pixels(mask) > 200].mean(axis=0)
        return mean

    known = {colour: inside(colour, 1) for colour in COLOURS}
    for colour in COLOURS:
        drawn = inside(colour, 2)
        assert min(COLOURS, key=lambda name: np.abs(known[name] - drawn).sum()) == colour
