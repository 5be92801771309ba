"""Two manners of answering that pre-training never shows: a warm customer-service tone, and strict JSON.

The questions are the shop's; only the manner of the answer is new. A LoRA is to learn it from a few of these dialogues.
"""

from __future__ import annotations

import json
from random import Random

from lora_scripts.builtin.dialogue_world.facts import PRODUCTS
from lora_scripts.builtin.dialogue_world.shop_talk import ask, fact, plain_answer, random_asked
from lora_scripts.builtin.dialogue_world.talk import Asked, Talk, say
from lora_scripts.builtin.dialogue_world.wordings import PRODUCT_KINDS

__all__ = ["json_dialogues", "questions", "service_dialogues"]

_OPENINGS = (
    "Thank you for your question!",
    "Thank you so much for asking!",
    "Thanks for reaching out to us!",
    "Thank you for your message!",
    "Thank you for your interest!",
    "I am happy to help you with that!",
    "Of course, I am glad to help!",
    "It is a pleasure to help you!",
)
_EMPATHY = (
    "I am so sorry for the trouble.",
    "I am very sorry about that.",
    "I understand that this is not easy, and I am sorry.",
    "We are sorry that you had to wait.",
)
_CLOSINGS = (
    "Is there anything else I can help you with?",
    "Please let me know if you need anything else.",
    "Feel free to ask if you have further questions.",
    "I am always here to help you.",
    "Can I help you with anything else today?",
    "Please let us know if there is more we can do for you.",
    "If you need anything else, I am happy to help.",
    "Do not hesitate to ask again at any time.",
)


def _is_bad_news(asked: Asked) -> bool:
    return not fact(asked) or fact(asked) in ("delayed", "cancelled")


def _warm(asked: Asked, rng: Random) -> str:
    opening = rng.choice(_EMPATHY if _is_bad_news(asked) else _OPENINGS)
    return f"{opening} {plain_answer(asked, rng)} {rng.choice(_CLOSINGS)}"


def service_dialogues(seed: int, count: int) -> list[Talk]:
    """Questions as pre-training asks them, answered in the warm tone."""
    rng = Random(seed)
    out = []
    for _ in range(count):
        asked = random_asked(rng)
        out.append(Talk(say(ask(asked, rng), _warm(asked, rng)), asked))
    return out


def _record(asked: Asked) -> str:
    """One line of JSON with the subject and the fact; numbers as numbers."""
    value: str | int = getattr(PRODUCTS[asked.subject], asked.kind)
    return json.dumps({"product": asked.subject, asked.kind: value})


def _product_asked(rng: Random) -> Asked:
    return Asked(rng.choice(list(PRODUCT_KINDS)), rng.choice(list(PRODUCTS)))


def json_dialogues(seed: int, count: int) -> list[Talk]:
    """Questions about products as pre-training asks them, answered as one JSON object."""
    rng = Random(seed)
    out = []
    for _ in range(count):
        asked = _product_asked(rng)
        out.append(Talk(say(ask(asked, rng), _record(asked)), asked))
    return out


def questions(seed: int, count: int, products_only: bool = False) -> list[Talk]:
    """Questions without answers, in wordings that neither pre-training nor the dialogues above show."""
    rng = Random(seed)
    out = []
    for _ in range(count):
        asked = _product_asked(rng) if products_only else random_asked(rng)
        out.append(Talk(say(ask(asked, rng, held_out=True)), asked))
    return out
