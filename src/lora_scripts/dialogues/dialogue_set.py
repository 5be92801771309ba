"""The rows that train, those that do not, and what was noticed on the way."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

from lora_scripts.data.dataset import LeftOut
from lora_scripts.dialogues.conversation import Dialogue

__all__ = ["NAMED_IN_EXCLUDE", "DialogueData", "DialogueSet"]

SHOWN = 20
NAMED_IN_EXCLUDE = "named in exclude"


@dataclass(frozen=True)
class DialogueSet:
    """Dialogues or texts of one purpose: to train on, or to be measured on."""

    examples: Sequence[Dialogue]
    left_out: Sequence[LeftOut] = ()
    notes: Sequence[str] = field(default_factory=tuple)

    @property
    def digest(self) -> str:
        """Changes when any row, its name or its repeats change; the folder's place does not matter."""
        whole = hashlib.sha256()
        for example in self.examples:
            whole.update(repr((example.name, example.digest, example.repeats)).encode())
        return whole.hexdigest()

    @property
    def num_copies(self) -> int:
        """Rows that say what an earlier one says, to the letter."""
        return sum(count - 1 for count in Counter(example.digest for example in self.examples).values())

    def summary(self) -> list[str]:
        """How many rows train, and the names of those that do not, one line each, at most twenty."""
        total = len(self.examples) + len(self.left_out)
        named = [f"  left out: {item.name}: {item.reason}" for item in self.left_out[:SHOWN]]
        more = [f"  left out: {len(self.left_out) - SHOWN} more"] if len(self.left_out) > SHOWN else []
        return [f"{len(self.examples):,} of {total:,} dialogues train.", *named, *more]


@dataclass(frozen=True)
class DialogueData:
    """All that was read: what trains, and what it is measured on where a file for that lies there."""

    train: DialogueSet
    dev: DialogueSet | None = None
    notes: Sequence[str] = field(default_factory=tuple)
