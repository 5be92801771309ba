"""A few pictures held out of training, so that what was learnt can be told from what was memorised."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from lora_scripts.data.training_data import TrainingData
from lora_scripts.errors import DataError

__all__ = ["Split", "num_held_out", "split"]

FEWEST_PICTURES = 12
"""Below this, every picture is worth more in training than in a measurement."""
SHARE, FEWEST, MOST = 0.08, 2, 16


@dataclass(frozen=True)
class Split:
    """What trains and what is held out; without held-out pictures `held_out` is None.

    Attributes:
        reference: as many training pictures as are held out, to compare with; positions in `train`.
    """

    train: TrainingData
    held_out: TrainingData | None
    reference: Sequence[int]
    note: str


def num_held_out(wanted: int | Literal["auto"], num_pictures: int) -> int:
    """How many pictures to hold out.

    Raises:
        DataError: more are wanted than half of the pictures.
    """
    if wanted == "auto":
        return 0 if num_pictures < FEWEST_PICTURES else min(max(round(SHARE * num_pictures), FEWEST), MOST)
    if wanted > num_pictures // 2:
        raise DataError(
            f"validation_pictures: {wanted} of {num_pictures} pictures would be held out; at most half can be. "
            "Use fewer, 0, or auto."
        )
    return wanted


def split(data: TrainingData, wanted: int | Literal["auto"]) -> Split:
    """The data set in two parts, each in its old order.

    Every picture has a fixed rank that follows from its content; the first ones are held out. So a picture that is added
    changes at most a few places, and renaming none. Copies of a picture are held out together or not at all.
    """
    examples = data.examples
    number = num_held_out(wanted, len(examples))
    if not number:
        why = f"fewer than {FEWEST_PICTURES} pictures" if wanted == "auto" else "validation_pictures is 0"
        return Split(data, None, (), f"No picture is held out ({why}), so there is no validation loss.")
    digests = sorted({example.digest for example in examples}, key=_rank)
    chosen = set(digests[:number])
    held_out = [i for i, example in enumerate(examples) if example.digest in chosen]
    training = [i for i, example in enumerate(examples) if example.digest not in chosen]
    if not training:
        raise DataError("all pictures are copies of one another, so none can be held out. Set validation_pictures: 0.")
    by_rank = sorted(range(len(training)), key=lambda place: _rank(examples[training[place]].digest))
    names = ", ".join(examples[i].name for i in held_out)
    return Split(
        data.part(training),
        data.part(held_out),
        by_rank[: len(held_out)],
        f"{len(held_out)} pictures are held out to measure the validation loss, {len(training)} train: {names}.",
    )


def _rank(digest: str) -> str:
    return hashlib.sha256(f"validation {digest}".encode()).hexdigest()
