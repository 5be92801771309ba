"""How much pictures look like the training set, and how well they show what they were asked for, by CLIP's embeddings.

Both are counted in the spread that the training pictures themselves have, so that one unit means the same for any CLIP.
How far a CLIP can be trusted is found out on the training set too: the more often it tells a picture's own caption from
another picture's, the more its word counts. A CLIP that has never seen such pictures cannot, and then has next to no say.

Legend for shapes: N training pictures, B rendered pictures, D width of the embeddings.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean, stdev

import torch
from torch import Tensor

__all__ = ["Likeness", "Reference", "Trust"]

FEWEST_PICTURES = 4
"""Training pictures with captions that differ, without which neither spread nor trust can be known."""


@dataclass(frozen=True)
class Trust:
    """How far a CLIP knows its way about a training set.

    Attributes:
        hits: share of (own caption, other caption) pairs in which the picture's own scores higher; 0.5 is chance.
        error: its standard error over pictures.
    """

    hits: float
    error: float

    @property
    def weight(self) -> float:
        """0 at chance, 1 when every pair is told apart; one standard error is taken off, for the safe side."""
        return min(max(2 * (self.hits - self.error) - 1, 0.0), 1.0)


@dataclass(frozen=True)
class Likeness:
    """What CLIP says of rendered pictures, each [B], in spreads of the training pictures.

    Attributes:
        look: nearness to the training pictures; 0 is the training pictures' own mean.
        prompt: how much nearer to its own prompt than to the other prompts; 0 is what training pictures reach on average.
    """

    look: list[float]
    prompt: list[float]


class Reference:
    """The training pictures as CLIP sees them."""

    def __init__(self, images: Tensor, texts: Tensor, captions: Sequence[str], names: Sequence[str]) -> None:
        """Args:
        images, texts: [N,D] of length one, of the pictures and their captions.
        captions: tell which texts are the same; at least `FEWEST_PICTURES` differ.
        names: the pictures'.
        """
        assert len(set(captions)) >= FEWEST_PICTURES
        self._centre = images.mean(dim=0)
        others = (images.sum(dim=0) - images) / (
            len(images) - 1
        )  # without the picture itself, which is nearest to itself
        self.looks: list[float] = (images * others).sum(dim=1).tolist()
        self.margins: list[float] = _margins(images, texts, captions)
        self.caption_hits: dict[str, float] = dict(zip(names, _hits(images, texts, captions), strict=True))

    @property
    def trust(self) -> Trust:
        hits = list(self.caption_hits.values())
        return Trust(fmean(hits), stdev(hits) / math.sqrt(len(hits)))

    def measure(self, images: Tensor, texts: Tensor, prompts: Sequence[str]) -> Likeness:
        """Likeness of rendered pictures.

        Args:
            images, texts: [B,D] of length one, of the pictures and the prompts they were rendered from.
        """
        looks = (images @ self._centre).tolist()
        margins = _margins(images, texts, prompts)
        return Likeness(_standardised(looks, self.looks), _standardised(margins, self.margins))


def _standardised(values: Sequence[float], reference: Sequence[float]) -> list[float]:
    """The values in standard deviations of the reference, from its mean; zeros where the reference has no spread."""
    middle, spread = fmean(reference), stdev(reference)
    return [(value - middle) / spread if spread > 0 else 0.0 for value in values]


def _different(captions: Sequence[str]) -> Tensor:
    """[B,B], true where two captions differ."""
    return torch.tensor([[mine != other for other in captions] for mine in captions])


def _margins(images: Tensor, texts: Tensor, captions: Sequence[str]) -> list[float]:
    """Cosine with the own text minus the mean cosine with the others: what all texts share, such as a trigger, cancels."""
    cosines = images @ texts.T
    other = _different(captions)
    counts = other.sum(dim=1)
    margins = cosines.diagonal() - (cosines * other).sum(dim=1) / counts.clamp(min=1)
    return torch.where(counts > 0, margins, torch.zeros_like(margins)).tolist()


def _hits(images: Tensor, texts: Tensor, captions: Sequence[str]) -> list[float]:
    """Of each picture the share of the other captions that score lower than its own."""
    cosines = images @ texts.T
    other = _different(captions)
    wins = (cosines.diagonal().unsqueeze(1) > cosines) & other
    return (wins.sum(dim=1) / other.sum(dim=1)).tolist()
