"""Signs that answers went wrong in training: they go round in circles, or they do not end."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from lora_scripts.dialogues.answers import Answer

__all__ = ["alarms", "repeats_itself", "share_repeated"]

FEWEST_UNITS = 16
"""Shorter texts say nothing twice by accident, or everything."""
MOST_REPEATED = 0.5
"""Share of groups of four that came before; in ordinary text it is below 0.1, in a list of like items 0.3."""
LONGEST_ROUND = 24
FEWEST_ROUNDS = 4
SHARE_OF_ANSWERS = 0.5
"""Of the answers at one step; fewer may be chance."""

_UNIT = re.compile(r"[\u3040-\u30ff\u3400-\u9fff\uac00-\ud7af]|[^\W\d_]{1,20}(?![^\W\d_])|[^\W\d_]|\d+|[^\w\s]|_")
"""A word, a number, a mark, or one character: of a script that writes no blanks between words, or of what is too long for a word."""


def alarms(base: Sequence[Answer], answers: Sequence[Answer], max_new_tokens: int) -> list[str]:
    """One line for each thing that is wrong with a good part of the answers and was not with the base model's.

    Args:
        base: to the same prompts, in the same order.
        max_new_tokens: where an answer that does not end was cut off.
    """
    found = [
        _alarm(
            base,
            answers,
            lambda answer: repeats_itself(answer.text),
            "say the same over and over",
            "The learning rate may be too high, or this step too late.",
        ),
        _alarm(
            base,
            answers,
            lambda answer: not answer.ended,
            f"do not end within {max_new_tokens} tokens",
            "Longer answers in the data, or a lasting loss of the end mark? sample_tokens sets where they are cut.",
        ),
    ]
    return [line for line in found if line]


def repeats_itself(text: str) -> bool:
    """Whether most of the text was said before in it, or its end goes round in a circle."""
    units = _UNIT.findall(text)
    return len(units) >= FEWEST_UNITS and (_repeated(units) > MOST_REPEATED or _ends_in_a_circle(units))


def share_repeated(text: str) -> float:
    """Share of the groups of four words (or Chinese characters) that stand in the text before; 0 for a short text."""
    units = _UNIT.findall(text)
    return _repeated(units) if len(units) >= FEWEST_UNITS else 0.0


def _repeated(units: Sequence[str]) -> float:
    groups = list(zip(units, units[1:], units[2:], units[3:], strict=False))
    return 1 - len(set(groups)) / len(groups)


def _ends_in_a_circle(units: Sequence[str]) -> bool:
    """Whether the last units are the same few, four times and more, over at least `FEWEST_UNITS`; the last round may be cut."""
    for length in range(1, min(LONGEST_ROUND, len(units) // FEWEST_ROUNDS) + 1):
        needed = max(FEWEST_ROUNDS * length, FEWEST_UNITS)
        tail = units[-needed:]
        if all(unit == tail[place % length] for place, unit in enumerate(tail)):
            return True
    return False


def _alarm(
    base: Sequence[Answer], answers: Sequence[Answer], wrong: Callable[[Answer], bool], what: str, hint: str
) -> str:
    """A line, or nothing where few answers are concerned or the base model's are nearly as often."""
    now, before = sum(map(wrong, answers)), sum(map(wrong, base))
    if not now or now < SHARE_OF_ANSWERS * len(answers) or 2 * before > now:
        return ""
    return f"{now} of {len(answers)} answers {what} (of the base model's: {before}). {hint}"
