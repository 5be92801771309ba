"""Captions of scenes: a small grammar that writes them and a reader that finds the attributes again.

Sentence structure varies; each attribute value has one word only, so a caption can be read back exactly.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

from lora_scripts.builtin.world.scene import ATTRIBUTES, Scene

if TYPE_CHECKING:
    import numpy as np

_PLACE_PHRASES = {
    "beach": ("on the beach", "at the beach"),
    "forest": ("in the forest", "in a forest"),
    "city": ("in the city", "in a city"),
    "desert": ("in the desert", "in a desert"),
    "mountains": ("in the mountains", "near the mountains"),
    "meadow": ("in the meadow", "in a meadow"),
    "snow": ("in the snow", "on the snow"),
    "lake": ("by the lake", "by a lake"),
}
_TIME_PHRASES = {"day": "in daylight", "sunset": "at sunset", "night": "at night", "rain": "in the rain"}
_NUMBER_WORDS = {1: "one", 2: "two", 3: "three"}
_PLURALS = {"fish": "fish", "butterfly": "butterflies"}

# {what} is the counted, coloured subject, {is_} agrees with it in number.
_PATTERNS = (
    "{what} {place} {time}",
    "{what} {time} {place}",
    "a picture of {what} {place} {time}",
    "a picture showing {what} {time} {place}",
    "an illustration of {what} {place} {time}",
    "an illustration of {what} {time}, {place}",
    "a drawing of {what} {place}, {time}",
    "{time}, {what} {place}",
    "{place}, {what} {time}",
    "{place} {time}, {what}",
    "{time} {place}, there {is_} {what}",
    "there {is_} {what} {place} {time}",
    "here {is_} {what} {time} {place}",
    "{what} can be seen {place} {time}",
    "a scene {place} {time} with {what}",
    "a view {time} of {what} {place}",
    "{what} shown {place}, {time}",
    "we see {what} {place} {time}",
)
_STYLE_NOUNS = {
    "ink wash": "an ink wash painting",
    "neon": "a neon drawing",
    "blueprint": "a blueprint drawing",
    "pixel art": "a pixel art picture",
    "watercolour": "a watercolour painting",
    "woodcut": "a woodcut print",
}
_STYLE_PATTERNS = (
    "{style_noun} of {what} {place} {time}",
    "{style_noun} of {what} {time} {place}",
    "{style_noun} showing {what} {place}, {time}",
    "{style_noun}, {what} {place} {time}",
    "{what} {place} {time}, {style_noun}",
    "{what} {place} {time} in {style} style",
    "{what} {time} {place}, {style} style",
    "{time}, {what} {place}, {style} style",
)


def _plural(subject: str) -> str:
    return _PLURALS.get(subject, subject + "s")


def _counted(scene: Scene, one: str | None = None) -> str:
    """The counted subject, such as "an orange cat" or "two red fish"."""
    if scene.count == 1:
        article = "an" if scene.colour[0] in "aeiou" else "a"
        return f"{one or article} {scene.colour} {scene.subject}"
    return f"{_NUMBER_WORDS[scene.count]} {scene.colour} {_plural(scene.subject)}"


def canonical_caption(scene: Scene) -> str:
    """The scene in one fixed wording, such as "a red cat on the beach in daylight"."""
    return f"{_counted(scene)} {_PLACE_PHRASES[scene.place][0]} {_TIME_PHRASES[scene.time]}"


def caption(scene: Scene, rng: np.random.Generator, style: str | None = None) -> str:
    """An exact caption in a random wording: lower-case ASCII, all five attributes, at most 20 words.

    Args:
        rng: chooses the sentence pattern and the wording of article and place.
        style: one of `STYLES`, named in the caption; None leaves style words out.
    Raises:
        ValueError: the style is unknown.
    """
    if style is not None and style not in _STYLE_NOUNS:
        raise ValueError(f"style: {style!r} is not one of {tuple(_STYLE_NOUNS)}")
    patterns = _PATTERNS if style is None else _STYLE_PATTERNS
    places = _PLACE_PHRASES[scene.place]
    return patterns[rng.integers(len(patterns))].format(
        what=_counted(scene, "one" if rng.random() < 0.15 else None),
        is_="is" if scene.count == 1 else "are",
        place=places[0] if rng.random() < 0.75 else places[1],
        time=_TIME_PHRASES[scene.time],
        style=style,
        style_noun=_STYLE_NOUNS.get(style or ""),
    )


def _spellings() -> dict[str, dict[str, str | int]]:
    """For each attribute, every word that names one of its values."""
    words: dict[str, dict[str, str | int]] = {name: {v: v for v in ATTRIBUTES[name]} for name in ("colour", "place")}
    words["subject"] = {form: s for s in ATTRIBUTES["subject"] for form in (s, _plural(s))}
    words["time"] = {"daylight": "day", "day": "day", "sunset": "sunset", "night": "night", "rain": "rain"}
    words["place"]["mountain"] = "mountains"
    return words


_WORDS = _spellings()
_COUNT_OF_WORD = {"a": 1, "an": 1, "one": 1, "1": 1, "two": 2, "2": 2, "three": 3, "3": 3}


def read_caption(text: str) -> dict[str, str | int | None]:
    """The attributes named in a caption, None where absent or where two different values are named.

    The count is the article or number word that starts the phrase of a subject ("a red cat", "two fish"): one
    colour word may stand between. Capital letters and punctuation do not matter.

    Returns:
        the keys subject, colour, place, time and count.
    """
    tokens = re.findall(r"[a-z0-9]+", text.lower())
    found: dict[str, str | int | None] = {}
    for name in ("subject", "colour", "place", "time"):
        values = {_WORDS[name][token] for token in tokens if token in _WORDS[name]}
        found[name] = values.pop() if len(values) == 1 else None
    counts = set()
    for position, token in enumerate(tokens):
        if token in _WORDS["subject"]:
            start = position - 1
            if start >= 0 and tokens[start] in _WORDS["colour"]:
                start -= 1
            if start >= 0 and tokens[start] in _COUNT_OF_WORD:
                counts.add(_COUNT_OF_WORD[tokens[start]])
    found["count"] = counts.pop() if len(counts) == 1 else None
    return found
