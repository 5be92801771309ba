"""What the built-in language model is pre-trained on and measured with."""

from __future__ import annotations

from collections.abc import Iterator
from random import Random

from lora_scripts.builtin.dialogue_world.other_talk import letter, other_talk, story
from lora_scripts.builtin.dialogue_world.sheets import catalogue_line, sheet
from lora_scripts.builtin.dialogue_world.shop_talk import fact_text, shop_talk
from lora_scripts.builtin.dialogue_world.talk import Talk

__all__ = ["held_out_dialogues", "pretraining"]


def pretraining(seed: int) -> Iterator[Talk | str]:
    """Dialogues and plain texts without end: 56 % the shop, 16 % its facts in other forms, the rest other tasks and texts."""
    rng = Random(seed)
    while True:
        draw = rng.random()
        if draw < 0.56:
            yield shop_talk(rng)
        elif draw < 0.72:
            yield sheet(rng) if draw < 0.69 else catalogue_line(rng)
        elif draw < 0.90:
            yield other_talk(rng)
        else:
            yield letter(rng) if draw < 0.94 else story(rng) if draw < 0.96 else fact_text(rng)


def held_out_dialogues(seed: int, count: int) -> list[Talk]:
    """Dialogues of the shop in wordings that pre-training never shows, each with a question that a rule can judge."""
    rng = Random(seed)
    out: list[Talk] = []
    while len(out) < count:
        talk = shop_talk(rng, held_out=True)
        if talk.asked is not None:
            out.append(talk)
    return out
