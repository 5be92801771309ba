"""A few examples held out of training, so that what was learnt can be told from what was memorised."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from lora_scripts.data.training_data import TrainingData
from lora_scripts.errors import DataError
from lora_scripts.words import PICTURES, Words

__all__ = ["Split", "measured_on", "num_held_out", "split"]

FEWEST_EXAMPLES = 12
"""Below this, every example is worth more in training than in a measurement."""
SHARE, FEWEST, MOST = 0.08, 2, 16
SHOWN = 16


@dataclass(frozen=True)
class Split:
    """What trains and what is held out; without held-out examples `held_out` is None.

    Attributes:
        reference: as many training examples as are held out, to compare with; positions in `train`.
    """

    train: TrainingData
    held_out: TrainingData | None
    reference: Sequence[int]
    note: str


def num_held_out(wanted: int | Literal["auto"], num_examples: int, words: Words = PICTURES) -> int:
    """How many examples to hold out.

    Raises:
        DataError: more are wanted than half of them.
    """
    if wanted == "auto":
        return 0 if num_examples < FEWEST_EXAMPLES else min(max(round(SHARE * num_examples), FEWEST), MOST)
    if wanted > num_examples // 2:
        raise DataError(
            f"validation_{words.examples}: {wanted} of {num_examples} {words.examples} would be held out; at most half can be. "
            "Use fewer, 0, or auto."
        )
    return wanted


def split(data: TrainingData, wanted: int | Literal["auto"], words: Words = PICTURES) -> Split:
    """The data set in two parts, each in its old order.

    Every picture has a fixed rank that follows from its content; the first ones are held out. So a picture that is added
    changes at most a few places, and renaming none. Copies of a picture are held out together or not at all. What is for
    regularization always trains.
    """
    examples = data.examples
    candidates = [example for example in examples if not example.is_regularization]
    number = num_held_out(wanted, len(candidates), words)
    if not number:
        why = f"fewer than {FEWEST_EXAMPLES}" if wanted == "auto" else f"validation_{words.examples} is 0"
        return Split(data, None, (), f"No {words.example} is held out ({why}), so there is no validation loss.")
    digests = sorted({example.digest for example in candidates}, key=_rank)
    chosen = set(digests[:number])
    held_out = [i for i, each in enumerate(examples) if each.digest in chosen and not each.is_regularization]
    training = [i for i in range(len(examples)) if i not in set(held_out)]
    if len(held_out) == len(candidates):
        raise DataError(
            f"all {words.examples} are copies of one another, so none can be held out. Set validation_{words.examples}: 0."
        )
    train = data.part(training)
    names = ", ".join(examples[i].name for i in held_out[:SHOWN]) + (" ..." if len(held_out) > SHOWN else "")
    return Split(
        train,
        data.part(held_out),
        _first_by_rank(train, len(held_out)),
        f"{len(held_out)} {words.examples} are held out to measure the validation loss, {len(candidates) - len(held_out)} train: {names}.",
    )


def measured_on(data: TrainingData, held_out: TrainingData, wanted: int | Literal["auto"], words: Words) -> Split:
    """All of the data set trains; it is measured on examples of another one, as many as `split` would hold out at most."""
    most = MOST if wanted == "auto" else wanted
    if not most:
        return Split(data, None, (), f"validation_{words.examples} is 0, so there is no validation loss.")
    # One of what trains stands beside each: they are compared in pairs.
    chosen = _first_by_rank(held_out, min(most, len(data.examples)))
    reference = _first_by_rank(data, len(chosen))
    return Split(
        data,
        held_out.part(sorted(chosen)),
        reference,
        f"{len(data.examples)} {words.examples} train; the validation loss is measured on {len(chosen)} of the "
        f"{len(held_out.examples)} kept for that.",
    )


def _first_by_rank(data: TrainingData, number: int) -> list[int]:
    places = [place for place, example in enumerate(data.examples) if not example.is_regularization]
    return sorted(places, key=lambda place: _rank(data.examples[place].digest))[:number]


def _rank(digest: str) -> str:
    return hashlib.sha256(f"validation {digest}".encode()).hexdigest()
