"""Questions about the shop with plain answers: one question, several, with a system message, with small courtesies.

Everything here is plain and neutral: an answer states the fact and stops.
"""

from __future__ import annotations

from random import Random

from lora_scripts.builtin.dialogue_world.facts import HOURS, NEVER_SOLD, ORDERS, PRODUCTS, SHOP
from lora_scripts.builtin.dialogue_world.talk import Asked, Talk, say
from lora_scripts.builtin.dialogue_world.wordings import ORDER_KINDS, PRODUCT_KINDS, SHOP_KINDS, Kind

__all__ = ["NAMES", "SYSTEMS", "ask", "fact", "fact_text", "plain_answer", "random_asked", "shop_talk"]

NAMES = (
    *("Anna", "Ben", "Clara", "David", "Emma", "Felix", "Grace", "Henry", "Ida", "Jack", "Kate", "Leo", "Mia", "Noah"),
    *("Olga", "Paul", "Ruth", "Sam", "Tom", "Vera", "Will", "Zoe"),
)

SYSTEMS = (
    "You are the assistant of Maple Corner.",
    "You answer questions of customers.",
    "You work in a shop. Answer the customer.",
    "Be brief.",
    "You are a helpful assistant.",
    "Answer the question.",
)

_BEFORE = (
    "Hello. ",
    "Hi. ",
    "Hi, ",
    "Hello, ",
    "Excuse me. ",
    "Good morning. ",
    "I have a question. ",
    "Sorry, ",
    "Please: ",
)
_BEFORE_HELD_OUT = ("Good evening. ", "A short question: ", "Hello there. ")
_AFTER = (" Thanks.", " Thank you.", " Please tell me.", " Please help me.", " Can you help me?")

_GREETINGS = (
    "Hello.",
    "Hi.",
    "Good morning.",
    "Good evening.",
    "Hello, are you there?",
    "Hi, can I ask something?",
    "Hello!",
)
_THANKS = (
    "Thanks.",
    "Thank you.",
    "Thank you, that is all.",
    "Ok, thanks.",
    "Good, thank you very much.",
    "Great, thanks!",
)
_UNKNOWABLE = (
    "Who made the {s}?",
    "How heavy is the {s}?",
    "How old is the {s}?",
    "Who bought the {s} last week?",
    "Is the {s} better than last year?",
    "Why is the {s} so nice?",
    "What does your mother think of the {s}?",
    "Can the {s} fly?",
    "Which bird likes the {s}?",
    "In which country was the {s} invented?",
)
_NOT_KNOWN = ("I do not know that.", "I do not have this information.")
_WANTED = (
    "Do you sell a {s}?",
    "Do you have a {s}?",
    "How much is a {s}?",
    "I look for a {s}.",
    "I want to buy a {s}.",
    "Is there a {s}?",
    "Can I get a {s} in the shop?",
)
_WANTED_HELD_OUT = ("Is there a {s} in your shop?", "Can I buy a {s}?")
_NOT_SOLD = ("We do not sell a {s}.", "There is no {s} in our shop.")
_SOLD = ("Yes, we sell the {s}.", "Yes, we have the {s}.")


def fact(asked: Asked) -> str:
    """The words of the fact that is asked for; "" where there is none (sold out, closed)."""
    if asked.told:
        return asked.told
    if asked.kind in PRODUCT_KINDS:
        value = getattr(PRODUCTS[asked.subject], asked.kind)
        return "" if asked.kind == "stock" and value == 0 else str(value)
    if asked.kind == "hours":
        hours = HOURS[asked.subject]
        return f"{hours[0]} to {hours[1]}" if hours else ""
    if asked.kind == "item":
        return ORDERS[asked.subject].product
    if asked.kind in ORDER_KINDS:
        return str(getattr(ORDERS[asked.subject], asked.kind))
    return SHOP[asked.kind]


def _kind(name: str) -> Kind:
    return PRODUCT_KINDS.get(name) or ORDER_KINDS.get(name) or SHOP_KINDS[name]


def random_asked(rng: Random) -> Asked:
    """A question that has an answer: two thirds about products, the rest about orders, opening hours and the shop."""
    draw = rng.random()
    if draw < 0.66:
        return Asked(rng.choice(list(PRODUCT_KINDS)), rng.choice(list(PRODUCTS)))
    if draw < 0.80:
        return Asked(rng.choice(("status", "day", "item")), rng.choice(list(ORDERS)))
    if draw < 0.86:
        return Asked("hours", rng.choice(list(HOURS)))
    return Asked(rng.choice(list(SHOP_KINDS)))


def _dressed(text: str, rng: Random, held_out: bool) -> str:
    """A question as people type it: now and then with a greeting, thanks, or in small letters."""
    if rng.random() < 0.35:
        before = rng.choice(_BEFORE + _BEFORE_HELD_OUT if held_out else _BEFORE)
        if not before.endswith(". ") and not text.startswith("I "):
            text = text[0].lower() + text[1:]
        text = before + text
    if rng.random() < 0.2:
        text += rng.choice(_AFTER)
    draw = rng.random()
    if draw < 0.06:
        return text.lower()
    return text.rstrip("?.!") if draw < 0.1 else text


def ask(asked: Asked, rng: Random, held_out: bool = False, later: bool = False) -> str:
    """A question in one of its wordings.

    Args:
        held_out: use the wordings that pre-training never shows.
        later: ask about "it"; only for kinds of products.
    """
    kind = _kind(asked.kind)
    if later:
        return rng.choice(kind.later_held_out if held_out else kind.later)
    return _dressed(rng.choice(kind.held_out if held_out else kind.train).format(s=asked.subject), rng, held_out)


def plain_answer(asked: Asked, rng: Random, later: bool = False) -> str:
    """The fact in a plain sentence."""
    kind, value = _kind(asked.kind), fact(asked)
    if not value:
        return rng.choice(kind.none).format(s=asked.subject)
    return rng.choice(kind.later_answers if later else kind.answers).format(s=asked.subject, v=value)


def _one(rng: Random, held_out: bool) -> Talk:
    asked = random_asked(rng)
    system = rng.choice(SYSTEMS) if rng.random() < 0.15 else ""
    return Talk(say(ask(asked, rng, held_out), plain_answer(asked, rng), system=system), asked)


def _two(rng: Random, held_out: bool) -> Talk:
    """Two facts of one product in one question."""
    product = rng.choice(list(PRODUCTS))
    first, second = rng.sample(list(PRODUCT_KINDS), 2)
    frames = (
        "What are the {a} and the {b} of the {s}?",
        "Tell me the {a} and the {b} of the {s}.",
        "{s}: {a} and {b}?",
    )
    text = rng.choice(frames).format(a=first, b=second, s=product)
    answer = " ".join(plain_answer(Asked(k, product), rng, later) for k, later in ((first, False), (second, True)))
    return Talk(say(_dressed(text, rng, held_out), answer))


def _both(rng: Random, held_out: bool) -> Talk:
    """Two or three questions of any kind in one message, answered one after the other.

    It trains every answer behind a space too: a new manner that puts a phrase before the answer needs that.
    """
    asked = [random_asked(rng) for _ in range(rng.choice((2, 2, 3)))]
    texts = [ask(a, rng, held_out) for a in asked]
    return Talk(say(" ".join(texts), " ".join(plain_answer(a, rng) for a in asked)))


def fact_text(rng: Random) -> str:
    """Plain sentences about the shop in any order, with no question before them."""
    return " ".join(plain_answer(random_asked(rng), rng) for _ in range(rng.randrange(2, 7)))


def _several(rng: Random, held_out: bool) -> Talk:
    """Two or three turns: a question about "it", the same question about another product, or a new subject."""
    product, kind = rng.choice(list(PRODUCTS)), rng.choice(list(PRODUCT_KINDS))
    asked = Asked(kind, product)
    turns = []
    if rng.random() < 0.2:
        turns += [rng.choice(_GREETINGS), _welcome(rng)]
    turns += [ask(asked, rng, held_out), plain_answer(asked, rng)]
    for _ in range(rng.choice((1, 1, 2))):
        draw = rng.random()
        if draw < 0.6:
            asked = Asked(rng.choice([k for k in PRODUCT_KINDS if k != asked.kind]), asked.subject)
            turns += [ask(asked, rng, held_out, later=True), plain_answer(asked, rng, later=True)]
        elif draw < 0.8:
            asked = Asked(asked.kind, rng.choice(list(PRODUCTS)))
            text = rng.choice(("And the {s}?", "What about the {s}?", "And for the {s}?")).format(s=asked.subject)
            turns += [text, plain_answer(asked, rng)]
        else:
            asked = Asked(rng.choice(list(PRODUCT_KINDS)), rng.choice(list(PRODUCTS)))
            turns += [ask(asked, rng, held_out), plain_answer(asked, rng)]
    return Talk(say(*turns), asked)


def _told(rng: Random, held_out: bool) -> Talk:
    """A system message gives the answer: today's price, the customer's name, a code."""
    draw = rng.random()
    if draw < 0.5:
        product, price = rng.choice(list(PRODUCTS)), str(rng.randrange(3, 99))
        system = rng.choice(("Today the {s} costs {v} dollars.", "The price of the {s} is {v} dollars today.")).format(
            s=product, v=price
        )
        asked = Asked("price", product, told=price)
        return Talk(say(ask(asked, rng, held_out), plain_answer(asked, rng), system=system), asked)
    if draw < 0.75:
        name = rng.choice(NAMES)
        system = rng.choice(
            ("The customer is called {v}.", "You talk to {v}.", "The name of the customer is {v}.")
        ).format(v=name)
        questions = ("What is my name?", "Who am I?", "Do you know my name?", "How am I called?")
        return Talk(say(rng.choice(questions), f"Your name is {name}.", system=system), Asked("told", told=name))
    code = "".join(rng.choice("ABCDEFGHKLMNPRSTUXZ") for _ in range(2)) + str(rng.randrange(10, 99))
    system = rng.choice(("The code of the day is {v}.", "Today's code is {v}.")).format(v=code)
    questions = ("What is the code?", "Tell me the code of the day.", "Is there a code today?", "What is today's code?")
    return Talk(say(rng.choice(questions), f"The code is {code}.", system=system), Asked("told", told=code))


def _welcome(rng: Random) -> str:
    return rng.choice(("Hello. What is your question?", "Good day. What do you want to know?"))


def _courtesy(rng: Random, held_out: bool) -> Talk:
    """A greeting, or thanks after an answer."""
    if rng.random() < 0.4:
        return Talk(say(rng.choice(_GREETINGS), _welcome(rng)), Asked("greeting"))
    first = _one(rng, held_out)
    return Talk((*first.messages, *say(rng.choice(_THANKS), "You are welcome.")), Asked("thanks"))


def _cannot(rng: Random, held_out: bool) -> Talk:
    """Things the shop does not sell, and facts that nobody knows; things that it does sell, for contrast."""
    draw = rng.random()
    wanted = rng.choice(_WANTED_HELD_OUT if held_out else _WANTED)
    if draw < 0.45:
        thing = rng.choice(NEVER_SOLD)
        asked = Asked("not sold", thing)
        return Talk(say(_dressed(wanted.format(s=thing), rng, held_out), rng.choice(_NOT_SOLD).format(s=thing)), asked)
    if draw < 0.75:
        text = rng.choice(_UNKNOWABLE).format(s=rng.choice(list(PRODUCTS)))
        return Talk(say(_dressed(text, rng, held_out), rng.choice(_NOT_KNOWN)), Asked("not known"))
    thing = rng.choice(list(PRODUCTS))
    text = rng.choice(("Do you sell a {s}?", "Do you have a {s}?", "Do you sell the {s}?")).format(s=thing)
    return Talk(say(_dressed(text, rng, held_out), rng.choice(_SOLD).format(s=thing)), Asked("sold", thing))


def shop_talk(rng: Random, held_out: bool = False) -> Talk:
    """A dialogue in the shop, in the proportions of pre-training."""
    forms = (_one, _two, _both, _several, _told, _courtesy, _cannot)
    return rng.choices(forms, weights=(40, 4, 14, 18, 13, 4, 7))[0](rng, held_out)
