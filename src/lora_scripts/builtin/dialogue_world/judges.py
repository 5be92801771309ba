"""Rules that judge answers: is the fact right, is this the tone of customer service, is it JSON.

They share the table of facts with the dialogues and nothing else: no opening, closing or plain answer is looked up, so
an answer in words that no dialogue used is judged like any other.
"""

from __future__ import annotations

import json
import re

from lora_scripts.builtin.dialogue_world.facts import COLOURS, HOURS, MATERIALS, ORDERS, PRODUCTS, SHOP
from lora_scripts.builtin.dialogue_world.talk import Asked

__all__ = ["is_right", "parses_as_json", "reads_as_customer_service"]

_DAYS = tuple(HOURS)
_STATES = tuple(sorted({order.status for order in ORDERS.values()}))

_WARM = re.compile(
    r"\b(thank(s| you)|appreciat\w+|grateful|sorry|apolog\w+|regret|understand\w*|happy|glad\w*|delighted|pleasure|pleased"
    r"|wonderful|lovely|great (question|choice|to hear)|of course|certainly|sure thing|absolutely)\b",
    re.IGNORECASE,
)
_OFFER = re.compile(
    r"\banything (else|more)\b"
    r"|\b(let (me|us) know|feel free|(do not|don't) hesitate|reach out|get in touch|contact us|ask (me|us|again|away))\b"
    r"|\b(further|other|more) questions?\b"
    r"|\b(here|happy|glad|ready|able) to (help|assist)\b"
    r"|\b(can|could|may) (i|we) (help|assist|do)\b"
    r"|\bmore (i|we) can do\b",
    re.IGNORECASE,
)


def reads_as_customer_service(answer: str) -> bool:
    """Whether an answer is warm at some place and offers further help at another.

    The two must be different sentences: "I am happy to help." alone is a phrase, no manner.
    """
    sentences = [s for s in re.split(r"(?<=[.!?])\s+|\n+", answer) if s.strip()]
    warm = [i for i, s in enumerate(sentences) if _WARM.search(s)]
    offers = [i for i, s in enumerate(sentences) if _OFFER.search(s)]
    return any(i != j for i in warm for j in offers)


def parses_as_json(answer: str) -> bool:
    """Whether the whole answer is one JSON object."""
    try:
        return isinstance(json.loads(answer), dict)
    except ValueError:
        return False


def _words(answer: str, known: tuple[str, ...]) -> set[str]:
    """Which of the known words an answer holds."""
    found = re.findall(r"[a-z]+", answer.lower())
    return {word for word in known if word.lower() in found}


def _numbers(answer: str) -> set[int]:
    return {int(n) for n in re.findall(r"(?<![A-Za-z0-9])\d+(?![A-Za-z0-9])", answer)}


def _only_product(answer: str, product: str) -> bool:
    """Whether no other product is named; a box or a ball in passing counts as named."""
    return not _words(answer, tuple(PRODUCTS)) - {product}


def _states_product(kind: str, name: str, answer: str) -> bool:
    product = PRODUCTS[name]
    if kind == "colour":
        return _words(answer, COLOURS) == {product.colour}
    if kind == "material":
        return _words(answer, MATERIALS) == {product.material}
    if kind == "shelf":
        return set(re.findall(r"\b[A-Z]\d\b", answer)) == {product.shelf}
    if kind == "stock" and product.stock == 0:
        return _numbers(answer) <= {0} and bool(
            _numbers(answer) or re.search(r"sold out|out of stock|\bnone\b", answer.lower())
        )
    return _numbers(answer) == {int(getattr(product, kind))}


def _states_order(kind: str, number: str, answer: str) -> bool:
    order = ORDERS[number]
    if not _numbers(answer) <= {int(number)}:
        return False
    if kind == "item":
        return _words(answer, tuple(PRODUCTS)) == {order.product}
    if kind == "status":
        return _words(answer, _STATES) == {order.status}
    return _words(answer, _DAYS) == {order.day}


def _states_hours(day: str, answer: str) -> bool:
    hours = HOURS[day]
    if not _words(answer, _DAYS) <= {day}:
        return False
    if hours is None:
        return "closed" in answer.lower() and not _numbers(answer)
    return _numbers(answer) == set(hours) and "closed" not in answer.lower()


def _holds(answer: str, value: str) -> bool:
    return re.search(rf"(?<!\w){re.escape(value.lower())}(?!\w)", answer.lower()) is not None


_DENIES_KNOWING = re.compile(r"\b(not know|don't know|not have (this|that|the|any) information|cannot (tell|say))\b")


def is_right(asked: Asked, answer: str) -> bool:
    """Whether an answer holds the fact that was asked for, and none that contradicts it.

    Colours, materials, days, states and numbers besides the right one count as contradictions, and so does another
    product's name.
    """
    low = answer.lower()
    if asked.kind == "price" and asked.told:
        return _numbers(answer) == {int(asked.told)} and _only_product(answer, asked.subject)
    if asked.told:
        return _holds(answer, asked.told)
    if asked.kind in ("price", "colour", "material", "size", "stock", "delivery", "shelf"):
        return _states_product(asked.kind, asked.subject, answer) and _only_product(answer, asked.subject)
    if asked.kind in ("status", "day", "item"):
        return _states_order(asked.kind, asked.subject, answer)
    if asked.kind == "hours":
        return _states_hours(asked.subject, answer)
    if asked.kind == "greeting":
        return re.search(r"\b(hello|hi|good (day|morning|evening)|welcome)\b", low) is not None
    if asked.kind == "thanks":
        return "welcome" in low or "pleasure" in low
    if asked.kind == "not sold":
        return re.search(r"\b(no|not|don't)\b", low) is not None and not _numbers(answer)
    if asked.kind == "sold":
        return _holds(answer, asked.subject) and re.search(r"\b(no|not|don't)\b", low) is None
    if asked.kind == "not known":
        return _DENIES_KNOWING.search(low) is not None
    value = SHOP[asked.kind]
    allowed = {int(n) for n in re.findall(r"\d+", value)}
    return _holds(answer, value) and _numbers(answer) <= allowed
