"""Dialogues in memory, ready to train: what the loop, the validation and the checkpoints ask of a data set.

Legend for shapes: B dialogues, L tokens of the longest, M learnt tokens of the one with most.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, ClassVar, Self

from lora_scripts.data.dataset import LeftOut
from lora_scripts.dialogues.conversation import Dialogue
from lora_scripts.dialogues.dialogue_set import DialogueSet
from lora_scripts.dialogues.tokenised_set import TokenisedExample, TokenisedSet
from lora_scripts.families.protocol import Batch

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from lora_scripts.data.sampler import Sample

__all__ = ["DialogueBatches", "DialogueListing", "TrainedDialogue", "dialogue_batches", "padded_rows"]

LENGTHS_PER_DOUBLING = 4
"""Without packing, dialogues of one shape are padded to one length: a shape spans a fourth of a doubling, so a tenth is padding."""
CAPTION_CHARACTERS = 300


@dataclass(frozen=True, eq=False)
class TrainedDialogue:
    """One sequence of tokens, and what it says.

    Attributes:
        row: what it was made of.
        packed: whether it shares a pass with any other, or with those of like length alone.
    """

    tokens: TokenisedExample
    row: Dialogue
    packed: bool

    @property
    def sequences(self) -> Sequence[TokenisedExample]:
        """All that goes through the model for it."""
        return (self.tokens,)

    def cut_to(self, length: int) -> Self:
        """The same with so many tokens at most, which may leave nothing to learn."""
        return replace(self, tokens=self.tokens.cut_to(length))

    @property
    def name(self) -> str:
        return self.tokens.name

    @property
    def caption(self) -> str:
        """The last question and its answer, shortened; of plain text the beginning."""
        said = [f"{message.role}: {message.content}" for message in self.row.messages[-2:]]
        return "\n".join(said or [self.row.text])[:CAPTION_CHARACTERS]

    @property
    def digest(self) -> str:
        return self.tokens.digest

    @property
    def repeats(self) -> int:
        return self.tokens.repeats

    @property
    def is_regularization(self) -> bool:
        return False

    @property
    def shape(self) -> tuple[int, int]:
        if self.packed:
            return (0, 0)
        return (math.ceil(LENGTHS_PER_DOUBLING * math.log2(max(self.cost, 1))), 0)

    @property
    def cost(self) -> int:
        """Tokens."""
        return sum(sequence.cost for sequence in self.sequences)

    @property
    def num_trained(self) -> int:
        """Learnt tokens."""
        return sum(sequence.num_trained for sequence in self.sequences)


@dataclass(frozen=True)
class DialogueListing:
    """All sequences of a run by name, with what was left out on the way."""

    examples: Sequence[TrainedDialogue]
    left_out: Sequence[LeftOut]
    notes: Sequence[str]
    lines: Sequence[str] = ()

    def summary(self) -> list[str]:
        return list(self.lines)

    def identity(self) -> dict[str, str]:
        """File -> a digest of all that is learnt from it: a set of 100,000 rows shall not fill every checkpoint with names."""
        files: dict[str, list[TrainedDialogue]] = {}
        for example in self.examples:
            files.setdefault(example.row.file, []).append(example)
        return {file: f"{len(rows):,} sequences, {_digest(rows)[:16]}" for file, rows in files.items()}


def _digest(examples: Sequence[TrainedDialogue]) -> str:
    whole = hashlib.sha256()
    for example in examples:
        whole.update(f"{example.name}\n{example.repeats}\n".encode())
        for sequence in example.sequences:
            whole.update(sequence.tokens.tobytes())
            whole.update(sequence.trained.tobytes())
    return whole.hexdigest()


@dataclass(frozen=True)
class DialogueBatches:
    """The training data of a language model, as `data.training_data.TrainingData` describes it."""

    dataset: DialogueListing
    home: ClassVar[None] = None

    @property
    def examples(self) -> Sequence[TrainedDialogue]:
        return self.dataset.examples

    def at_home_on(self, device: torch.device, most_bytes: int) -> Self:
        return self  # a few thousand numbers for each pass: they are put together on the way

    def part(self, indices: Sequence[int]) -> DialogueBatches:
        return DialogueBatches(replace(self.dataset, examples=[self.dataset.examples[i] for i in indices]))

    def cut_to(self, length: int) -> Self:
        """All examples cut to so many tokens, less those that then have nothing to learn."""
        cut = [each.cut_to(length) for each in self.examples]
        cut = [each for each in cut if all(row.num_trained for row in each.sequences)]
        return replace(self, dataset=replace(self.dataset, examples=cut))

    def as_written(self) -> DialogueBatches:
        return self

    def batch(self, samples: Sequence[Sample], device: torch.device) -> Batch:
        """Tensors "tokens" [B,L] and "targets" [B,M], the places of the learnt tokens; `filled` says how far each row goes."""
        tensors, filled = padded_rows([self.examples[sample.index].tokens for sample in samples], device)
        return Batch(tensors, [], [sample.key for sample in samples], filled=filled)


def padded_rows(
    rows: Sequence[TokenisedExample], device: torch.device, prefix: str = ""
) -> tuple[dict[str, Tensor], dict[str, list[int]]]:
    """Tensors "tokens" [B,L] and "targets" [B,M], each name after the prefix, and how far their rows are filled."""
    import numpy as np
    import torch

    columns: Mapping[str, list[np.ndarray]] = {
        "tokens": [row.tokens for row in rows],
        "targets": [np.flatnonzero(row.trained) for row in rows],
    }
    tensors, filled = {}, {}
    for column, arrays in columns.items():
        name = prefix + column
        filled[name] = [len(array) for array in arrays]
        padded = np.zeros((len(arrays), max(filled[name])), np.int64)
        for place, array in zip(padded, arrays, strict=True):
            place[: len(array)] = array
        tensors[name] = torch.from_numpy(padded).to(device, non_blocking=True)
    return tensors, filled


def dialogue_batches(rows: DialogueSet, tokens: TokenisedSet, *, packed: bool) -> DialogueBatches:
    """Rows and what they became, put together."""
    by_name = {row.name: row for row in rows.examples}
    examples = [TrainedDialogue(each, _row_of(each.name, by_name), packed) for each in tokens.examples]
    lines = [*rows.summary(), *tokens.summary()]
    return DialogueBatches(
        DialogueListing(examples, [*rows.left_out, *tokens.left_out], [*rows.notes, *tokens.notes], lines)
    )


def _row_of(name: str, rows: Mapping[str, Dialogue]) -> Dialogue:
    """The row that a sequence was made of: its name, or its name with ` answer 2` or ` part 2` behind it."""
    return rows[name] if name in rows else rows[name.rsplit(" ", 2)[0]]
