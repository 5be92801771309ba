"""Who speaks after whom: turns that a chat template could not render, or that nothing can be learnt from, put right."""

from __future__ import annotations

from collections.abc import Sequence

from lora_scripts.dialogues.conversation import Message
from lora_scripts.dialogues.formats import RowError

__all__ = ["IS_EMPTY", "NothingToLearnError", "put_in_order"]

JOINED = "turns of one speaker in a row were joined by a blank line"
DROPPED_TAIL = "turns after the last answer were dropped: nothing answers them"


IS_EMPTY = "is empty"
"""How the reasons of rows with an empty answer end."""


class NothingToLearnError(RowError):
    """The row is well written but has no answer, or no choice between two."""


def put_in_order(messages: Sequence[Message], system_prompt: str | None) -> tuple[tuple[Message, ...], list[str]]:
    """The messages as they train, and what was changed about them (`JOINED`, `DROPPED_TAIL`).

    Results of several tools stay apart: templates write each with its own marks.

    Args:
        system_prompt: put in front where the dialogue has no system text.
    Raises:
        NothingToLearnError: there is no answer, or one of them is empty.
    """
    changes = []
    turns = [message for message in messages if message.role != "system" or message.content.strip()]
    joined: list[Message] = []
    for message in turns:
        if joined and joined[-1].role == message.role and message.role != "tool":
            both = f"{joined[-1].content}\n\n{message.content}"
            joined[-1] = Message(message.role, both, joined[-1].trained and message.trained)
            changes.append(JOINED)
        else:
            joined.append(message)
    last = max((place for place, message in enumerate(joined) if message.role == "assistant"), default=None)
    if last is None:
        raise NothingToLearnError("has no answer of the assistant")
    if last + 1 < len(joined):
        del joined[last + 1 :]
        changes.append(DROPPED_TAIL)
    answers = [message for message in joined if message.role == "assistant"]
    for number, message in enumerate(answers, start=1):
        if not message.content.strip():
            which = "the answer" if len(answers) == 1 else f"answer {number} of {len(answers)}"
            raise NothingToLearnError(f"{which} {IS_EMPTY}")
    if system_prompt and all(message.role != "system" for message in joined):
        joined.insert(0, Message("system", system_prompt))
    return tuple(joined), list(dict.fromkeys(changes))
