"""What a scene is: five attributes, their values, and which combinations training never sees."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from collections.abc import Mapping

    import numpy as np

SUBJECTS: tuple[str, ...] = (
    "cat",
    "fish",
    "bird",
    "butterfly",
    "elephant",
    "robot",
    "car",
    "sailboat",
    "rocket",
    "umbrella",
    "mushroom",
    "teapot",
)
COLOURS: tuple[str, ...] = ("red", "orange", "yellow", "green", "blue", "purple", "pink", "white")
PLACES: tuple[str, ...] = ("beach", "forest", "city", "desert", "mountains", "meadow", "snow", "lake")
TIMES: tuple[str, ...] = ("day", "sunset", "night", "rain")
COUNTS: tuple[int, ...] = (1, 2, 3)
STYLES: tuple[str, ...] = ("ink wash", "neon", "blueprint", "pixel art", "watercolour", "woodcut")
"""Ways of drawing that the base models never see, kept for adapters to learn."""

ATTRIBUTES: Mapping[str, tuple[Any, ...]] = {
    "subject": SUBJECTS,
    "colour": COLOURS,
    "place": PLACES,
    "time": TIMES,
    "count": COUNTS,
}

_COUNT_WEIGHTS = (0.7, 0.2, 0.1)
Split = Literal["train", "held_out", "any"]


@dataclass(frozen=True)
class Scene:
    """One picture's content; every field holds a value listed in `ATTRIBUTES`."""

    subject: str
    colour: str
    place: str
    time: str
    count: int

    def __post_init__(self) -> None:
        for name, values in ATTRIBUTES.items():
            if getattr(self, name) not in values:
                raise ValueError(f"{name}: {getattr(self, name)!r} is not one of {values}")


def _bucket(*words: str) -> int:
    """A number 0..99 that depends on the words alone, not on the process or the Python version."""
    return hashlib.sha256("|".join(("world", *words)).encode()).digest()[0] * 100 // 256


def is_held_out(scene: Scene) -> bool:
    """Whether training never sees this scene.

    A (subject, colour) pair is held out when its SHA-256 falls in the first 10 of 100 buckets, a (subject, place)
    pair when it falls in the first 5. Counts and times are never held out, so a held-out scene asks for a new
    combination of known words, not for a new word.
    """
    return _bucket(scene.subject, scene.colour) < 10 or _bucket(scene.subject, "at", scene.place) < 5


def random_scene(rng: np.random.Generator, split: Split = "train") -> Scene:
    """A scene drawn uniformly over all attributes but the count, which is 1, 2 or 3 with weights 0.7, 0.2, 0.1.

    Args:
        rng: advanced by a varying number of draws.
        split: "train" leaves the held-out combinations out, "held_out" draws only them, "any" draws both.
    Raises:
        ValueError: split is none of the three.
    """
    if split not in ("train", "held_out", "any"):
        raise ValueError(f"split: {split!r} is not one of 'train', 'held_out', 'any'")
    while True:
        scene = Scene(
            subject=SUBJECTS[rng.integers(len(SUBJECTS))],
            colour=COLOURS[rng.integers(len(COLOURS))],
            place=PLACES[rng.integers(len(PLACES))],
            time=TIMES[rng.integers(len(TIMES))],
            count=int(rng.choice(COUNTS, p=_COUNT_WEIGHTS)),
        )
        if split == "any" or is_held_out(scene) == (split == "held_out"):
            return scene
