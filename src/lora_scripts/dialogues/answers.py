"""What a language model is asked, and what it says."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from lora_scripts.dialogues.conversation import Message

__all__ = ["Answer", "AnswerRequest"]


@dataclass(frozen=True)
class AnswerRequest:
    """One answer to ask for.

    Attributes:
        messages: the dialogue up to the answer; the last message is the user's. Empty for a model without roles.
        text: plain text to go on with, instead of messages.
        max_new_tokens: the longest answer.
        temperature: 0 takes the likeliest token every time.
        top_p: with a temperature, tokens are drawn among the likeliest that hold this share of the probability.
        seed: of the draws.
    """

    messages: tuple[Message, ...] = ()
    text: str = ""
    max_new_tokens: int = 160
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 42


@dataclass(frozen=True)
class Answer:
    """What the model said.

    Attributes:
        ended: it ended by itself; False when it was cut off at the longest length.
        num_tokens: of the answer, its end mark included.
    """

    text: str
    ended: bool
    num_tokens: int
