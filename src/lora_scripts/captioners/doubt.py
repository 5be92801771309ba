"""How much a look at a machine-written caption pays: reviewing starts with the most doubtful."""

from __future__ import annotations

import math
import re

from lora_scripts.captioners.protocol import Candidates
from lora_scripts.captioners.rules import drop_repeats

__all__ = ["assess"]

_SMALL_WORDS = frozenset("a an the of in on at with and is are by to it its there this that some".split())  # noqa: SIM905
_UNSURE, _APART, _CLOSE = 0.35, 0.35, 0.15


def assess(candidates: Candidates) -> tuple[float, list[str]]:
    """Doubt from 0 to 1 and its reasons, from what the captioner gave away about its own answer.

    Three signals, averaged: how likely the model held its words, how far the candidates agree on what is in the picture, and
    whether the chooser preferred the best clearly over the second. Faults that can be seen in the text alone add to it.
    """
    best = candidates.texts[0]
    likelihood = candidates.likelihoods[0]
    signals = [1 - likelihood]
    reasons = ["unsure wording"] if likelihood < _UNSURE else []
    if len(candidates.texts) > 1:
        agreement = sum(_overlap(best, other) for other in candidates.texts[1:]) / (len(candidates.texts) - 1)
        signals.append(1 - agreement)
        if agreement < _APART:
            reasons.append("the candidates say different things")
        lead = math.tanh(max(candidates.scores[0] - candidates.scores[1], 0.0) / 2)
        signals.append(1 - lead)
        if lead < _CLOSE:
            reasons.append("the second best fits as well")
    doubt = sum(signals) / len(signals)
    for weight, reason, found in (
        (0.3, "cut off at the longest length", candidates.truncated[0]),
        (0.2, "repeats itself", drop_repeats(best) != best),
        (0.2, "very short", len(best.split()) < 3),
    ):
        if found:
            doubt += weight
            reasons.append(reason)
    return min(doubt, 1.0), reasons


def _overlap(first: str, second: str) -> float:
    """Shared share of the words that carry meaning, 0..1."""
    one, two = (
        {word for word in re.findall(r"\w+", text.lower()) if word not in _SMALL_WORDS} for text in (first, second)
    )
    return len(one & two) / len(one | two) if one | two else 1.0
