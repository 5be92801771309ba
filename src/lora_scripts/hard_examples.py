"""The examples that a run fitted worst, with what to look at: by their losses, and by CLIP where it was asked anyway."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from lora_scripts.training.picture_losses import picture_fits

if TYPE_CHECKING:
    from lora_scripts.data.training_data import TrainingExample
    from lora_scripts.words import Words

__all__ = ["HardExample", "hard_examples", "named"]

MOST = 6
MOST_NAMED = 3
FITS, DOES_NOT_FIT = 0.9, 0.5
"""Share of the other captions that a picture's own must beat by CLIP to be taken for right, and for wrong."""


@dataclass(frozen=True)
class HardExample:
    """A picture or dialogue that is fitted badly.

    Attributes:
        loss: how badly, for people.
        hint: what may be wrong with it.
        outlying: whether it is far from all others, or just the last of the row.
    """

    example: Any
    loss: str
    hint: str
    outlying: bool


def hard_examples(
    losses: Mapping[str, Any], examples: Sequence[TrainingExample], caption_hits: Mapping[str, float], words: Words
) -> list[HardExample]:
    """The worst fitted examples, worst first; none when the run was too short to tell.

    Args:
        losses: as `training.picture_losses` collected them.
        caption_hits: picture's name -> share of other pictures' captions that its own beats by CLIP, where that is known.
    """
    return [
        HardExample(
            examples[fit.index],
            f"loss {fit.ratio:.2f} ± {fit.error:.2f} times the usual, {fit.uses} uses",
            _hint(caption_hits.get(examples[fit.index].name), fit.outlying, words),
            fit.outlying,
        )
        for fit in [each for each in picture_fits(losses) if not examples[each.index].is_regularization][:MOST]
    ]


def named(found: Sequence[HardExample], words: Words) -> list[str]:
    """Lines for console and log about those that are far from all others; none without them."""
    far_out = [each for each in found if each.outlying][:MOST_NAMED]
    if not far_out:
        return []
    lines = [f"  {each.example.name}: {each.loss}. {each.hint}" for each in far_out]
    return [f"{words.examples.capitalize()} that the model could not fit like the others:", *lines]


def _hint(hits: float | None, outlying: bool, words: Words) -> str:
    if hits is not None and hits < DOES_NOT_FIT:
        return f"By CLIP, {1 - hits:.0%} of the other captions fit it better: is the caption right?"
    if not outlying:
        return "Not far from the others."
    if hits is not None and hits >= FITS:
        return "By CLIP its caption fits: is the picture of another kind than the others, or damaged?"
    return words.doubt
