"""The products' facts in other forms than a sentence: catalogue lines, lists, single words, JSON where the user asks for it.

A model that has met a fact in one sentence only can say it in that sentence only. A LoRA that is to change the form of
the answers needs facts that have been said in several.
"""

from __future__ import annotations

import json
from random import Random

from lora_scripts.builtin.dialogue_world.facts import PRODUCTS
from lora_scripts.builtin.dialogue_world.talk import Talk, say
from lora_scripts.builtin.dialogue_world.wordings import PRODUCT_KINDS

__all__ = ["catalogue_line", "sheet"]

_ON_DEMAND = ("{q} Answer as JSON.", "{q} Give me JSON.", "{q} JSON, please.", "As JSON: {q}")
_SHORT = ("{q} One word only.", "{q} Only the value.", "In one word: {q}")
_LISTED = ("List the {k} of the {s}.", "Make a list of the {k} of the {s}.", "A list for the {s}: {k}.")


def _some_kinds(rng: Random, most: int) -> list[str]:
    return rng.sample(list(PRODUCT_KINDS), rng.randrange(1, most + 1))


def catalogue_line(rng: Random) -> str:
    """Some facts of a product, as a line of plain text."""
    product = PRODUCTS[rng.choice(list(PRODUCTS))]
    facts = ", ".join(f"{kind} {getattr(product, kind)}" for kind in _some_kinds(rng, 5))
    return f"{product.name}: {facts}"


def sheet(rng: Random) -> Talk:
    """A question about one product whose answer is a value, a list or JSON, because the user asks for that form."""
    product = PRODUCTS[rng.choice(list(PRODUCTS))]
    draw = rng.random()
    if draw < 0.3:
        kinds = _some_kinds(rng, 3)
        text = rng.choice(_LISTED).format(k=", ".join(kinds), s=product.name)
        return Talk(say(text, "\n".join(f"- {k}: {getattr(product, k)}" for k in kinds)))
    kind = rng.choice(list(PRODUCT_KINDS))
    value = getattr(product, kind)
    question = rng.choice(PRODUCT_KINDS[kind].train).format(s=product.name)
    if draw < 0.5:
        return Talk(say(rng.choice(_SHORT).format(q=question), str(value)))
    record = rng.choice(({kind: value}, {"product": product.name, kind: value}, {"thing": product.name, kind: value}))
    return Talk(say(rng.choice(_ON_DEMAND).format(q=question), json.dumps(record)))
