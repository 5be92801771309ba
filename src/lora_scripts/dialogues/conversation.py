"""One row of the data of a language model: who says what, or plain text."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

__all__ = ["Dialogue", "Message", "Role", "content_digest"]

Role = Literal["system", "user", "assistant", "tool"]


@dataclass(frozen=True, slots=True)
class Message:
    """What one speaker says in one turn.

    Attributes:
        trained: whether an assistant's answer is learnt; false where the data say so (`weight: 0`, `train: false`).
    """

    role: Role
    content: str
    trained: bool = True


@dataclass(frozen=True, slots=True)
class Dialogue:
    """One row of the data.

    Attributes:
        name: `train.jsonl:12`, the file (relative to the data folder, forward slashes) and the line; in an array
            `train.json#12`, the twelfth row; unique.
        messages: in order; empty for a row of plain text.
        text: plain text; empty for a dialogue.
        digest: sha256 of the content, not of its place, hexadecimal.
        repeats: uses per epoch.
        rejected: of a pair of answers, the messages with the one that is not preferred; they differ from `messages` in the
            last one. Empty otherwise.
    """

    name: str
    messages: tuple[Message, ...]
    text: str
    digest: str
    repeats: int = 1
    rejected: tuple[Message, ...] = ()

    @property
    def file(self) -> str:
        """The file that it stands in, relative to the data folder."""
        return re.split(r"[:#][0-9]+$", self.name)[0]

    @property
    def answers(self) -> list[str]:
        """What the assistant says, turn by turn."""
        return [message.content for message in self.messages if message.role == "assistant"]


def content_digest(messages: Iterable[Message], text: str, rejected: Iterable[Message] = ()) -> str:
    """sha256 over all that decides how a row trains, hexadecimal."""
    rows, others = (
        [(message.role, message.content, message.trained) for message in turns] for turns in (messages, rejected)
    )
    return hashlib.sha256(json.dumps([rows, text, *([others] if others else [])]).encode()).hexdigest()
