"""Pairs of answers in memory, ready to train.

Legend for shapes: B pairs, L tokens of the longest answer with its question, M learnt tokens of the one with most.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Self

from lora_scripts.data.dataset import LeftOut
from lora_scripts.dialogues.batches import DialogueBatches, DialogueListing, TrainedDialogue, padded_rows
from lora_scripts.dialogues.dialogue_set import DialogueSet
from lora_scripts.dialogues.tokenised_set import TokenisedExample, TokenisedSet
from lora_scripts.families.protocol import Batch

if TYPE_CHECKING:
    import torch

    from lora_scripts.data.sampler import Sample

__all__ = ["PairBatches", "TrainedPair", "joined", "pair_batches"]

OTHER = "rejected_"
"""Begins the names of the tensors of the answers that are not preferred."""


@dataclass(frozen=True, eq=False)
class TrainedPair(TrainedDialogue):
    """A question with its preferred answer (`tokens`) and with the other one."""

    rejected: TokenisedExample = field(kw_only=True)

    @property
    def sequences(self) -> Sequence[TokenisedExample]:
        return (self.tokens, self.rejected)

    def cut_to(self, length: int) -> Self:
        return replace(super().cut_to(length), rejected=self.rejected.cut_to(length))


@dataclass(frozen=True)
class PairBatches(DialogueBatches):
    """The training data of preference training.

    Attributes:
        reference: name of a pair -> the log probabilities of its preferred and its other answer before training; empty for
            an objective that has no use for them.
    """

    reference: Mapping[str, tuple[float, float]] = field(default_factory=dict)

    @property
    def pairs(self) -> Sequence[TrainedPair]:
        return self.dataset.examples  # type: ignore[return-value]  # as `pair_batches` made them

    def part(self, indices: Sequence[int]) -> PairBatches:
        return replace(self, dataset=super().part(indices).dataset)

    def as_written(self) -> PairBatches:
        return self

    def batch(self, samples: Sequence[Sample], device: torch.device) -> Batch:
        """As `DialogueBatches.batch`, "rejected_tokens" and "rejected_targets" beside it, and "reference" [B,2] float32."""
        import torch

        pairs = [self.pairs[sample.index] for sample in samples]
        tensors, filled = padded_rows([pair.tokens for pair in pairs], device)
        others, others_filled = padded_rows([pair.rejected for pair in pairs], device, OTHER)
        tensors |= others
        if self.reference:
            tensors["reference"] = torch.tensor([self.reference[pair.name] for pair in pairs], device=device)
        return Batch(tensors, [], [sample.key for sample in samples], filled=filled | others_filled)


def pair_batches(rows: DialogueSet, chosen: TokenisedSet, rejected: TokenisedSet, *, packed: bool) -> PairBatches:
    """Rows and what both of their answers became, put together; what lacks one of them is left out."""
    by_name = {row.name: row for row in rows.examples}
    others = {each.name: each for each in rejected.examples}
    examples = [
        TrainedPair(each, by_name[each.name], packed, rejected=others[each.name])
        for each in chosen.examples
        if each.name in others
    ]
    reasons = {item.name: item.reason for item in (*rejected.left_out, *chosen.left_out)}
    lines = [*rows.summary(), *chosen.summary(), *(f"Rejected answers: {line.strip()}" for line in rejected.summary())]
    left_out = [*rows.left_out, *(LeftOut(name, reason) for name, reason in reasons.items())]
    notes = dict.fromkeys([*rows.notes, *chosen.notes, *rejected.notes])
    return PairBatches(DialogueListing(examples, left_out, list(notes), lines))


def joined(batch: Batch) -> Batch:
    """The 2 B sequences of a batch of pairs as one of dialogues: the preferred answers first, in order, then the others."""
    import torch

    tensors, filled = {}, {}
    for name in ("tokens", "targets"):
        first, second = batch.tensors[name], batch.tensors[OTHER + name]
        width = max(first.shape[1], second.shape[1])
        padded = [torch.nn.functional.pad(part, (0, width - part.shape[1])) for part in (first, second)]
        tensors[name] = torch.cat(padded)
        filled[name] = [*batch.filled[name], *batch.filled[OTHER + name]]
    return Batch(tensors, [], [*batch.keys, *batch.keys], filled=filled)
