"""Scenes and captions: what is drawn at random, what is held out, and that captions read back exactly."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from lora_scripts.builtin.world import (
    ATTRIBUTES,
    COLOURS,
    PLACES,
    STYLES,
    SUBJECTS,
    Scene,
    canonical_caption,
    caption,
    is_held_out,
    random_scene,
    read_caption,
)


def _attributes(scene: Scene) -> dict[str, object]:
    return {name: getattr(scene, name) for name in ATTRIBUTES}


def test_same_generator_seed_gives_same_scenes_and_captions() -> None:
    first, second = np.random.default_rng(4), np.random.default_rng(4)
    for _ in range(50):
        scene = random_scene(first)
        assert scene == random_scene(second)
        assert caption(scene, first) == caption(scene, second)


def test_held_out_combinations_never_appear_in_train() -> None:
    rng = np.random.default_rng(0)
    train = [random_scene(rng, "train") for _ in range(3000)]
    held_out = [random_scene(rng, "held_out") for _ in range(500)]
    assert not any(is_held_out(scene) for scene in train)
    assert all(is_held_out(scene) for scene in held_out)
    assert not set(train) & set(held_out)


def test_held_out_share_is_about_a_tenth_of_subject_colour_pairs() -> None:
    rng = np.random.default_rng(1)
    seen = {(s.subject, s.colour) for s in (random_scene(rng, "train") for _ in range(6000))}
    missing = 1 - len(seen) / (len(SUBJECTS) * len(COLOURS))
    assert 0.06 <= missing <= 0.16


def test_train_still_shows_every_value_of_every_attribute() -> None:
    rng = np.random.default_rng(2)
    scenes = [random_scene(rng, "train") for _ in range(1500)]
    for name, values in ATTRIBUTES.items():
        assert {getattr(scene, name) for scene in scenes} == set(values)


def test_counts_follow_their_weights() -> None:
    rng = np.random.default_rng(3)
    counts = np.bincount([random_scene(rng, "any").count for _ in range(3000)], minlength=4)[1:] / 3000
    assert np.abs(counts - (0.7, 0.2, 0.1)).max() < 0.03


def test_unknown_values_and_splits_are_refused() -> None:
    with pytest.raises(ValueError, match="colour: 'beige' is not one of"):
        Scene("cat", "beige", "lake", "day", 1)
    with pytest.raises(ValueError, match="split: 'test' is not one of"):
        random_scene(np.random.default_rng(0), "test")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="style: 'oil' is not one of"):
        caption(Scene("cat", "red", "lake", "day", 1), np.random.default_rng(0), "oil")


def test_captions_of_500_random_scenes_read_back_exactly() -> None:
    rng = np.random.default_rng(5)
    for i in range(500):
        scene = random_scene(rng, "any")
        style = STYLES[i % len(STYLES)] if i % 3 == 0 else None
        for text in (caption(scene, rng, style), canonical_caption(scene)):
            assert read_caption(text) == _attributes(scene), text
            assert text.isascii(), text
            assert text == text.lower(), text
            assert len(text.split()) <= 20, text


def test_every_value_reads_back_from_the_canonical_caption() -> None:
    for subject, place in itertools.product(SUBJECTS, PLACES):
        for i, colour in enumerate(COLOURS):
            scene = Scene(subject, colour, place, ATTRIBUTES["time"][i % 4], 1 + i % 3)
            assert read_caption(canonical_caption(scene)) == _attributes(scene)


def test_one_scene_has_at_least_twelve_wordings() -> None:
    rng = np.random.default_rng(6)
    scene = Scene("fish", "orange", "lake", "rain", 2)
    texts = {caption(scene, rng).replace("by a lake", "by the lake") for _ in range(400)}
    assert len(texts) >= 12
    assert not any(style.split()[0] in text for text in texts for style in STYLES)


def test_style_is_named_only_when_asked_for() -> None:
    rng = np.random.default_rng(7)
    scene = Scene("cat", "red", "beach", "night", 1)
    for style in STYLES:
        assert all(style in caption(scene, rng, style) for _ in range(30))


def test_canonical_captions_have_one_fixed_wording() -> None:
    assert canonical_caption(Scene("cat", "orange", "beach", "day", 1)) == "an orange cat on the beach in daylight"
    assert (
        canonical_caption(Scene("butterfly", "red", "lake", "rain", 2)) == "two red butterflies by the lake in the rain"
    )
    assert canonical_caption(Scene("fish", "blue", "mountains", "night", 3)) == (
        "three blue fish in the mountains at night"
    )


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", (None, None, None, None, None)),
        ("A Red Cat!", ("cat", "red", None, None, 1)),
        ("a cat and a fish", (None, None, None, None, 1)),
        ("a cat and two fish", (None, None, None, None, None)),
        ("a red or blue teapot at night", ("teapot", None, None, "night", None)),
        ("a blueprint drawing of cars in the city", ("car", None, "city", None, None)),
        ("two cats on the beach by the lake", ("cat", None, None, None, 2)),
    ],
)
def test_absent_and_ambiguous_attributes_read_as_none(text: str, expected: tuple[object, ...]) -> None:
    assert tuple(read_caption(text).values()) == expected
    assert tuple(read_caption(text)) == ("subject", "colour", "place", "time", "count")
