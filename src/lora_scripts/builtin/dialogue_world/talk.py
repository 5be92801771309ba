"""A dialogue of the world, and what its last question asks for."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["Asked", "Message", "Talk", "say"]

Message = dict[str, str]
"""{"role": "system" | "user" | "assistant", "content": ...}, as in OpenAI's messages."""


@dataclass(frozen=True)
class Asked:
    """What a question asks for.

    Attributes:
        kind: a key of the tables in `wordings`, or "told", "greeting", "thanks", "not sold", "not known".
        subject: a product, an order's number, a day; "" where the kind says all.
        told: the answer, where the conversation itself gave it.
    """

    kind: str
    subject: str = ""
    told: str = ""


@dataclass(frozen=True)
class Talk:
    """A conversation, and what its last question asks for (None where a rule cannot judge the answer)."""

    messages: tuple[Message, ...]
    asked: Asked | None = None

    @property
    def question(self) -> tuple[Message, ...]:
        """The messages without the last answer."""
        return self.messages[:-1] if self.messages[-1]["role"] == "assistant" else self.messages

    @property
    def answer(self) -> str:
        """The last answer."""
        return self.messages[-1]["content"]


def say(*contents: str, system: str = "") -> tuple[Message, ...]:
    """Messages of user and assistant in turn, behind a system message if there is one."""
    turns = [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(contents)]
    return tuple([{"role": "system", "content": system}, *turns] if system else turns)
