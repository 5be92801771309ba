"""Saved steps by their held-out loss."""

from __future__ import annotations

from collections.abc import Collection, Sequence

from lora_scripts.choosing.rule import FEWEST, Measure
from lora_scripts.training.events import Validation

__all__ = ["LEARNT_SHARE", "SMALLEST_GAIN", "held_out_measure"]

SMALLEST_GAIN = 0.02
"""Share of the held-out loss below which a difference is none: with two pictures one that is far too small to be seen can
agree by chance to the fourth digit."""
LEARNT_SHARE = 0.1
"""Share of what the run has learnt, as a drop of the held-out loss, that must have been lost again to matter: where the loss
has fallen to a third, a few per cent more or less of the rest cannot be seen in pictures."""


def held_out_measure(
    validations: Sequence[Validation], saved: Collection[int], last: int, examples: str = "pictures"
) -> Measure | None:
    """The measure, where the last step and an earlier saved one were measured on enough examples to know the noise."""
    measured = {each.step: each for each in validations if each.step in saved}
    if last not in measured or len(measured) < 2 or len(measured[last].held_out) < FEWEST:
        return None
    first = min(validations, key=lambda each: each.step)
    learnt = max(first.loss - each.loss for each in measured.values())
    final = measured[last]
    return Measure(
        "held-out loss",
        {step: [-loss for loss in each.held_out] for step, each in measured.items()},
        notable=max(SMALLEST_GAIN * final.loss, LEARNT_SHARE * learnt),
        shown={step: [("held-out loss", f"{each.loss:.4f}")] for step, each in measured.items()},
        about=f"Held-out loss: on {len(final.held_out)} {examples} that were not trained.",
    )
