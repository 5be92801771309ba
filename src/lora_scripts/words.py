"""The nouns by which messages and reports call what a run trains on."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

__all__ = ["DIALOGUES", "PICTURES", "Words", "words_of"]


@dataclass(frozen=True)
class Words:
    """One task's nouns.

    Attributes:
        examples: what trains, in the plural.
        example: one of them.
        data: what a checkpoint's identity calls the data set.
        unit: what speed is counted in, singular.
        short_unit: the same for narrow places.
        rate_tag: the speed's name in TensorBoard.
        says: what each of them comes with, singular.
        chinese: measure word and noun, as they follow a number.
        enough: how many give good results, as a sentence.
        usual_passes: how often each is seen in runs that went well; above `many_passes` times, and `many_uses` in all,
            they tend to be learnt by heart.
        doubt: what to ask of one that cannot be fitted.
    """

    examples: str
    example: str
    data: str
    unit: str
    short_unit: str
    rate_tag: str
    says: str
    chinese: str
    enough: str
    usual_passes: str
    many_passes: int
    many_uses: int
    doubt: str


PICTURES = Words(
    "pictures",
    "picture",
    "pictures and captions",
    "picture",
    "img",
    "images_per_s",
    "caption",
    "张图片",
    "50 to 200 give a free hand",
    "10 to 30",
    60,
    3000,
    "Does the caption say what it shows, and does it belong to the set?",
)
DIALOGUES = Words(
    "dialogues",
    "dialogue",
    "dialogues",
    "trained token",
    "tok",
    "trained_tokens_per_s",
    "text",
    "条对话",
    "100 and more, all different, give good results",
    "1 to 5",
    10,
    1000,
    "Is the answer right, and of the same kind as the others?",
)


def words_of(task: Literal["text-to-image", "text-generation"] | str) -> Words:
    """The nouns of a task; those of pictures for anything else, as records of older versions have it."""
    return DIALOGUES if task == "text-generation" else PICTURES
