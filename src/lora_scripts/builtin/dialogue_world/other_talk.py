"""Everything that pre-training reads besides the shop: letters, small stories, and tasks such as repeating and listing.

Two purposes. Words, quotes and braces that a new manner of answering needs must have been trained somewhere, because a
LoRA leaves the embeddings as they are. And a model that has only ever answered in one manner bends less easily.
No answer to a customer's question is polite here, and none is JSON unless the user asks for JSON.
"""

from __future__ import annotations

import json
from random import Random

from lora_scripts.builtin.dialogue_world.facts import COLOURS, MATERIALS, NEVER_SOLD, PRODUCTS
from lora_scripts.builtin.dialogue_world.shop_talk import NAMES
from lora_scripts.builtin.dialogue_world.talk import Talk, say

__all__ = ["letter", "other_talk", "story"]

_THINGS = (
    *PRODUCTS,
    *NEVER_SOLD,
    "letter",
    "question",
    "message",
    "visit",
    "gift",
    "garden",
    "house",
    "book",
    "choice",
)
_PLACES = (
    "market",
    "garden",
    "kitchen",
    "school",
    "station",
    "park",
    "town",
    "shop",
    "street",
    "house",
    "room",
    "river",
)

_POLITE = (
    "Thank you for the {thing}.",
    "Thank you for asking about the {thing}.",
    "Thank you so much for your {thing}.",
    "Thanks for reaching out about the {thing}.",
    "Thanks a lot for your message.",
    "I am sorry about the {thing}.",
    "I am very sorry for the trouble with the {thing}.",
    "Sorry to hear that the {thing} is {colour}.",
    "We are sorry that you had to wait for the {thing}.",
    "I apologise for the {colour} {thing}.",
    "I understand that this is not easy for you.",
    "I understand how much the {thing} means to {name}.",
    "I am happy to help {name} with the {thing}.",
    "I am glad that you like the {thing}.",
    "We are happy to hear from {name}.",
    "It is a pleasure to meet {name}.",
    "What a lovely {thing}!",
    "That is a great {thing}, {name}!",
    "This is a wonderful choice.",
    "Of course, {name} can come to the {place}.",
    "Please let me know when {name} is in the {place}.",
    "Let us know if the {thing} is too {size}.",
    "Please feel free to visit the {place}.",
    "Feel free to ask {name} again.",
    "Is there anything else in the {place}?",
    "If you need anything else, write to {name}.",
    "Can I help you with the {thing}?",
    "We are always here for {name}.",
    "I am here to help in the {place}.",
    "Do not hesitate to call {name} at any time.",
    "I hope this {thing} helps.",
    "Have a lovely day in the {place}!",
    "Have a nice day, {name}.",
    "You may contact {name} if there is more to do.",
    "We appreciate your patience, {name}.",
    "{name} will gladly assist with further questions about the {place}.",
)
_STORY = (
    "{name} went to the {place}.",
    "{name} bought a {colour} {thing}.",
    "There was a {thing} of {material} in the {place}.",
    "The {thing} was {size} and {colour}.",
    "It was a {day} and the sun was warm.",
    "{name} was happy because of the {thing}.",
    "{name} was sorry to lose the {thing}.",
    "{name} asked {other} for help.",
    '{other} said: "I know where the {thing} is."',
    '"Thank you," said {name}.',
    '"Is there anything else?" asked {other}.',
    "They paid {number} dollars for it.",
    "Then they walked home from the {place}.",
    "After {number} days {name} came back.",
    "{name} wrote a letter to {other}.",
    "Nobody knew what to do with the {thing}.",
    "The end of the {day} was quiet.",
    "{name} and {other} had a good time in the {place}.",
)
_OPENINGS = ("Dear {name},", "Hello {name},", "Hi {name},")
_ENDINGS = ("Best wishes, {other}", "Kind regards, {other}", "Yours, {other}", "Warm greetings, {other}")


def _filled(template: str, rng: Random, name: str, other: str) -> str:
    return template.format(
        name=name,
        other=other,
        thing=rng.choice(_THINGS),
        place=rng.choice(_PLACES),
        colour=rng.choice(COLOURS),
        material=rng.choice(MATERIALS),
        size=rng.choice(("small", "big", "long", "short", "large", "heavy", "new", "old")),
        day=rng.choice(("morning", "day", "evening", "week", "Monday", "Friday", "Sunday")),
        number=rng.randrange(2, 100),
    )


def _people(rng: Random) -> tuple[str, str]:
    first, second = rng.sample(NAMES, 2)
    return first, second


def letter(rng: Random) -> str:
    """A letter of polite sentences in any order, as plain text."""
    name, other = _people(rng)
    body = [rng.choice(_POLITE + _STORY[:8]) for _ in range(rng.randrange(2, 6))]
    return "\n".join(
        (
            rng.choice(_OPENINGS).format(name=name),
            " ".join(_filled(s, rng, name, other) for s in body),
            rng.choice(_ENDINGS).format(other=other),
        )
    )


def story(rng: Random) -> str:
    """A few sentences about two people, as plain text."""
    name, other = _people(rng)
    return " ".join(_filled(rng.choice(_STORY), rng, name, other) for _ in range(rng.randrange(3, 8)))


def _sentence(rng: Random) -> str:
    return _filled(rng.choice(_POLITE if rng.random() < 0.6 else _STORY), rng, *_people(rng))


def _repeat(rng: Random) -> Talk:
    """Sentences, or words in no order at all: the latter can only be copied, word by word."""
    if rng.random() < 0.5:
        text = " ".join(_sentence(rng) for _ in range(rng.choice((1, 1, 2))))
    else:
        text = " ".join((*_words(rng), str(rng.randrange(2, 100)), *_words(rng)))
    order = rng.choice(("Repeat: {t}", "Say this again: {t}", "Copy this text: {t}", "Write: {t}"))
    return Talk(say(order.format(t=text), text))


def _words(rng: Random) -> list[str]:
    pool = (*_THINGS, *_PLACES, *COLOURS, *MATERIALS, *NAMES, "price", "colour", "size", "thank", "help", "sorry")
    return rng.sample(pool, rng.randrange(2, 6))


def _list(rng: Random) -> Talk:
    words = _words(rng)
    joined = ", ".join(words)
    return rng.choice(
        (
            Talk(say(f"Make a list: {joined}", "\n".join(f"- {w}" for w in words))),
            Talk(say(f"Number these: {joined}", "\n".join(f"{i}. {w}" for i, w in enumerate(words, 1)))),
            Talk(say(f"Say backwards: {joined}", ", ".join(words[::-1]))),
            Talk(say(f"Put in quotes: {joined}", ", ".join(f'"{w}"' for w in words))),
            Talk(say(f"How many words are these: {joined}", f"These are {len(words)} words.")),
            Talk(say(f"What comes first: {joined}", words[0])),
        )
    )


_FIELDS = (
    "name",
    "thing",
    "product",
    "colour",
    "price",
    "number",
    "day",
    "place",
    "size",
    "shelf",
    "material",
    "stock",
    "delivery",
)


def _field(name: str, rng: Random) -> str | int:
    if name in ("price", "number", "size", "stock", "delivery"):
        return rng.randrange(0, 100)
    pools = {
        "name": NAMES,
        "colour": COLOURS,
        "material": MATERIALS,
        "place": _PLACES,
        "day": ("Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday"),
        "shelf": tuple(f"{a}{n}" for a in "ABCDEFGH" for n in range(1, 10)),
    }
    return rng.choice(pools.get(name, _THINGS))


def _json(rng: Random) -> Talk:
    """Fields that the user lists, as JSON: on demand only."""
    fields = {name: _field(name, rng) for name in rng.sample(_FIELDS, rng.randrange(1, 4))}
    spoken = ", ".join(f"{k} {v}" for k, v in fields.items())
    order = rng.choice(("Write as JSON: {t}", "JSON of this: {t}", "Give me JSON with {t}"))
    return Talk(say(order.format(t=spoken), json.dumps(fields)))


def _small_talk(rng: Random) -> Talk:
    pairs = (
        ("How are you?", "I am well."),
        ("What can you do?", "I answer questions about the shop."),
        ("Who are you?", "I am the assistant of the shop."),
        ("Are you a person?", "No, I am a program."),
        ("Tell me a story.", story(rng)),
        ("Write a letter.", letter(rng)),
        ("What is your favourite colour?", "I do not have one."),
        ("It is cold today.", "Yes, it is."),
    )
    return Talk(say(*rng.choice(pairs)))


def other_talk(rng: Random) -> Talk:
    """A dialogue that is not about the shop."""
    return rng.choices((_repeat, _list, _json, _small_talk), weights=(40, 25, 25, 10))[0](rng)
