"""Rows that hold two answers to one question, of which one is preferred.

Sources of the shapes: TRL's preference rows, with the question in `prompt` or as what both dialogues begin with; Anthropic's and
UltraFeedback's files are of the latter kind.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from lora_scripts.dialogues.conversation import Dialogue, Message, content_digest
from lora_scripts.dialogues.dialogue_set import DialogueSet
from lora_scripts.dialogues.formats import RowContent, RowError, as_turns, kind_of, lower_keys, with_system
from lora_scripts.dialogues.turns import NothingToLearnError

__all__ = ["parse_pair", "rejected_rows"]


def parse_pair(row: object) -> RowContent:
    """The question with the preferred answer as `messages`, with the other one as `rejected`; nothing else is learnt.

    Raises:
        RowError: the row is no such pair, or something in it is no text.
        NothingToLearnError: both answers are the same.
    """
    if not isinstance(row, dict):
        raise RowError(f"is {kind_of(row)} instead of an object with keys")
    keys = lower_keys(row)
    if "chosen" not in keys or "rejected" not in keys:
        raise RowError('has no "chosen" and "rejected" answer, which objective dpo or orpo compares')
    chosen, rejected = (as_turns(keys[name], "assistant") for name in ("chosen", "rejected"))
    if "prompt" in keys:
        prompt = as_turns(keys["prompt"], "user")
        if isinstance(keys["prompt"], list) and chosen[: len(prompt)] == rejected[: len(prompt)] == prompt:
            chosen, rejected = chosen[len(prompt) :], rejected[len(prompt) :]  # said in all three
    else:
        shared = _num_shared(chosen, rejected)
        prompt, chosen, rejected = chosen[:shared], chosen[shared:], rejected[shared:]
    _require_one_answer(prompt, chosen, rejected)
    if chosen == rejected:
        raise NothingToLearnError("its two answers are the same")
    asked = [replace(message, trained=False) for message in with_system(keys, prompt)]
    return RowContent((*asked, chosen[0]), rejected=(*asked, rejected[0]))


def rejected_rows(rows: DialogueSet) -> DialogueSet:
    """The same rows with the answers that are not preferred."""
    others = [
        Dialogue(row.name, row.rejected, "", content_digest(row.rejected, ""), row.repeats) for row in rows.examples
    ]
    return DialogueSet(others)


def _num_shared(chosen: Sequence[Message], rejected: Sequence[Message]) -> int:
    """Turns that both begin with; the last one of either is an answer."""
    most = min(len(chosen), len(rejected)) - 1
    return next((n for n in range(most) if chosen[n] != rejected[n]), max(most, 0))


def _require_one_answer(prompt: Sequence[Message], *answers: Sequence[Any]) -> None:
    if not prompt:
        raise RowError('has no question: neither a "prompt" nor turns that both answers begin with')
    if prompt[-1].role == "assistant":
        raise RowError("has a question that ends with an answer")
    for name, answer in zip(("chosen", "rejected"), answers, strict=True):
        if len(answer) != 1 or answer[0].role != "assistant":
            raise RowError(f'"{name}" is not one answer of the assistant after the question')
