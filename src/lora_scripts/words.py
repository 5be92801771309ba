"""The nouns by which messages and reports call what a run trains on."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

__all__ = ["DIALOGUES", "PICTURES", "Words", "words_of"]


@dataclass(frozen=True, kw_only=True)
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
        chinese_noun: the noun alone.
        chinese_says: what each of them comes with.
        loss_varies: why the loss of single steps jumps.
        measured: how the validation loss is measured.
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
    chinese_noun: str
    chinese_says: str
    loss_varies: str
    measured: str
    enough: str
    usual_passes: str
    many_passes: int
    many_uses: int
    doubt: str


PICTURES = Words(
    examples="pictures",
    example="picture",
    data="pictures and captions",
    unit="picture",
    short_unit="img",
    rate_tag="images_per_s",
    says="caption",
    chinese="张图片",
    chinese_noun="图片",
    chinese_says="标注",
    loss_varies="every step draws other noise levels",
    measured="with the same noise on the same pictures",
    enough="50 to 200 give a free hand",
    usual_passes="10 to 30",
    many_passes=60,
    many_uses=3000,
    doubt="Does the caption say what it shows, and does it belong to the set?",
)
DIALOGUES = Words(
    examples="dialogues",
    example="dialogue",
    data="dialogues",
    unit="trained token",
    short_unit="tok",
    rate_tag="trained_tokens_per_s",
    says="text",
    chinese="条对话",
    chinese_noun="对话",
    chinese_says="内容",
    loss_varies="some answers are harder to foresee than others",
    measured="on the same dialogues",
    enough="100 and more, all different, give good results",
    usual_passes="1 to 5",
    many_passes=10,
    many_uses=1000,
    doubt="Is the answer right, and of the same kind as the others?",
)


PAIRS = replace(DIALOGUES, unit="pair", short_unit="pairs", rate_tag="pairs_per_s")


def words_of(task: Literal["text-to-image", "text-generation"] | str, objective: str = "sft") -> Words:
    """The nouns of a task; those of pictures for anything else, as records of older versions have it."""
    if task != "text-generation":
        return PICTURES
    return DIALOGUES if objective == "sft" else PAIRS
