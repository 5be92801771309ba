"""The pictures that a run fitted worst, with what to look at: by their losses, and by CLIP where it was asked anyway."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from lora_scripts.training.picture_losses import picture_fits

if TYPE_CHECKING:
    from lora_scripts.data.dataset import Example

__all__ = ["HardPicture", "hard_pictures", "named"]

MOST = 6
MOST_NAMED = 3
FITS, DOES_NOT_FIT = 0.9, 0.5
"""Share of the other captions that a picture's own must beat by CLIP to be taken for right, and for wrong."""


@dataclass(frozen=True)
class HardPicture:
    """A picture that is fitted badly.

    Attributes:
        loss: how badly, for people.
        hint: what may be wrong with it.
        outlying: whether it is far from all others, or just the last of the row.
    """

    example: Example
    loss: str
    hint: str
    outlying: bool


def hard_pictures(
    losses: Mapping[str, Any], examples: Sequence[Example], caption_hits: Mapping[str, float]
) -> list[HardPicture]:
    """The worst fitted pictures, worst first; none when the run was too short to tell.

    Args:
        losses: as `training.picture_losses` collected them.
        caption_hits: picture's name -> share of other pictures' captions that its own beats by CLIP, where that is known.
    """
    return [
        HardPicture(
            examples[fit.index],
            f"loss {fit.ratio:.2f} ± {fit.error:.2f} times the usual, {fit.uses} uses",
            _hint(caption_hits.get(examples[fit.index].name), fit.outlying),
            fit.outlying,
        )
        for fit in picture_fits(losses)[:MOST]
    ]


def named(pictures: Sequence[HardPicture]) -> list[str]:
    """Lines for console and log about those that are far from all others; none without them."""
    far_out = [each for each in pictures if each.outlying][:MOST_NAMED]
    if not far_out:
        return []
    lines = [f"  {each.example.name}: {each.loss}. {each.hint}" for each in far_out]
    return ["Pictures that the model could not fit like the others:", *lines]


def _hint(hits: float | None, outlying: bool) -> str:
    if hits is not None and hits < DOES_NOT_FIT:
        return f"By CLIP, {1 - hits:.0%} of the other captions fit it better: is the caption right?"
    if not outlying:
        return "Not far from the others."
    if hits is not None and hits >= FITS:
        return "By CLIP its caption fits: is the picture of another kind than the others, or damaged?"
    return "Does the caption say what it shows, and does it belong to the set?"
