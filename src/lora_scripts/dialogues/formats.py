"""The shapes in which people keep dialogues, told apart row by row by their keys.

Sources of the shapes: OpenAI's fine-tuning files (`messages`), ShareGPT (`conversations` of `from`/`value`), Stanford Alpaca
(`instruction`, `input`, `output`), TRL's prompt-completion and language-modelling rows.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from lora_scripts.dialogues.conversation import Message, Role
from lora_scripts.dialogues.text_lines import mended

__all__ = ["RowContent", "RowError", "as_turns", "kind_of", "lower_keys", "parse_row", "with_system"]

_ROLES: Mapping[str, Role] = {
    "system": "system",
    "developer": "system",
    "user": "user",
    "human": "user",
    "prompter": "user",
    "assistant": "assistant",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "bot": "assistant",
    "model": "assistant",
    "tool": "tool",
    "function": "tool",
    "observation": "tool",
    "tool_response": "tool",
}
_TURN_LISTS = ("messages", "conversations", "conversation")
_ANSWER_KEYS = ("output", "response", "completion", "answer")
_QUESTION_KEYS = ("input", "prompt", "question", "query")
_KNOWN = '"messages", "conversations", "instruction" + "output", "input" + "output", "prompt" + "completion" or "text"'


class RowError(Exception):
    """Why a row cannot be used, as the end of the sentence `train.jsonl:12: ...`."""


@dataclass(frozen=True)
class RowContent:
    """What a row holds: messages as written, or plain text.

    Attributes:
        rejected: of a pair of answers, the messages with the one that is not preferred.
    """

    messages: tuple[Message, ...] = ()
    text: str = ""
    rejected: tuple[Message, ...] = ()


def parse_row(row: object) -> RowContent:
    """The content of one row, in whatever known shape it is.

    Raises:
        RowError: the shape is not known, or something in it is no text.
    """
    if not isinstance(row, dict):
        raise RowError(f"is {kind_of(row)} instead of an object with keys")
    keys = lower_keys(row)
    if "chosen" in keys and "rejected" in keys:
        raise RowError(
            "is a pair of a chosen and a rejected answer: set objective: dpo or orpo, or keep the chosen one alone"
        )
    for name in _TURN_LISTS:
        if isinstance(keys.get(name), list):
            return RowContent(with_system(keys, _turns(keys[name])))
    if (content := _question_and_answer(keys)) is not None:
        return content
    if isinstance(keys.get("text"), str):
        return RowContent(text=keys["text"])
    shown = mended(", ".join(f'"{str(key)[:40]}"' for key in list(row)[:8])) or "none"
    raise RowError(f"is of no known format: its keys are {shown}; known are {_KNOWN}")


def _question_and_answer(keys: Mapping[str, Any]) -> RowContent | None:
    answer_key = _first(keys, _ANSWER_KEYS)
    if answer_key is None:
        return None
    answer = keys[answer_key]
    if "instruction" in keys:  # alpaca; Dolly calls the input context
        parts = [_text(keys.get(key), key) for key in ("instruction", "input", "context")]
        question = "\n".join(part for part in parts if part.strip())
        earlier = list(_history(keys.get("history")))
    else:
        question_key = _first(keys, _QUESTION_KEYS)
        if question_key is None:
            return None
        if isinstance(keys[question_key], list) or isinstance(answer, list):  # prompt and completion as turns
            turns = [*as_turns(keys[question_key], "user"), *as_turns(answer, "assistant")]
            return RowContent(with_system(keys, turns))
        question = _text(keys[question_key], question_key)
        earlier = list(_history(keys.get("history")))
    turns = [*earlier, Message("user", question), Message("assistant", _text(answer, answer_key))]
    return RowContent(with_system(keys, turns))


def _turns(entries: Iterable[object]) -> list[Message]:
    return [_message(entry, number) for number, entry in enumerate(entries, start=1)]


def as_turns(value: object, role: Role) -> list[Message]:
    return _turns(value) if isinstance(value, list) else [Message(role, _text(value, role))]


def _message(entry: object, number: int) -> Message:
    """One turn of `messages` or `conversations`, with the keys of either."""
    if not isinstance(entry, dict):
        raise RowError(f"turn {number} is {kind_of(entry)} instead of an object with role and content")
    keys = lower_keys(entry)
    role_key, content_key = _first(keys, ("role", "from")), _first(keys, ("content", "value"))
    if role_key is None:
        raise RowError(f'turn {number} has no "role" (or "from")')
    named = keys[role_key]
    role = _ROLES.get(named.strip().lower()) if isinstance(named, str) else None
    if role is None:
        known = "system, user (human), assistant (gpt), tool"
        raise RowError(f"turn {number} has the unknown role {str(named)[:40]!r}; known are {known}")
    # A call that is kept beside the content would be lost in silence, and the model would learn to answer without it.
    if keys.get("tool_calls") or keys.get("function_call"):
        raise RowError(f"turn {number} calls tools (tool_calls), which is not read; write the call into its content")
    if content_key is None:
        raise RowError(f'turn {number} has no "content" (or "value")')
    trained = keys.get("weight", 1) not in (0, 0.0) and keys.get("train", True) is not False
    return Message(role, _text(keys[content_key], f"turn {number}"), trained)


def _history(entries: object) -> Iterable[Message]:
    """Alpaca's earlier rounds: a list of [question, answer]."""
    if entries in (None, "", []):
        return
    if not isinstance(entries, list):
        raise RowError(f'"history" is {kind_of(entries)} instead of a list of [question, answer]')
    for number, pair in enumerate(entries, start=1):
        if not isinstance(pair, list) or len(pair) != 2:
            raise RowError(f'round {number} of "history" is not [question, answer]')
        yield Message("user", _text(pair[0], f"history {number}"))
        yield Message("assistant", _text(pair[1], f"history {number}"))


def with_system(keys: Mapping[str, Any], turns: list[Message]) -> tuple[Message, ...]:
    """The turns after the system text that stands beside them."""
    key = _first(keys, ("system", "system_prompt"))
    system = _text(keys[key], key) if key is not None else ""
    if not turns:
        raise RowError("holds no turns")
    return (Message("system", system), *turns) if system.strip() else tuple(turns)


def _text(value: object, where: str) -> str:
    """A text, or the texts of a list of parts; None is empty."""
    if value is None:
        return ""
    if isinstance(value, str):
        return value
    if isinstance(value, list):
        return "".join(_part(part, where) for part in value)
    raise RowError(f"{where} is {kind_of(value)} instead of text")


def _part(part: object, where: str) -> str:
    if isinstance(part, str):
        return part
    if isinstance(part, dict) and isinstance(part.get("text"), str):
        return str(part["text"])
    kind = part.get("type", "something else") if isinstance(part, dict) else kind_of(part)
    raise RowError(f"{where} holds {kind!r}; only text can be trained on")


def _first(keys: Mapping[str, Any], names: Iterable[str]) -> str | None:
    for name in names:  # called for every turn: a generator would take a tenth of all reading
        if name in keys:
            return name
    return None


def lower_keys(entry: Mapping[Any, Any]) -> dict[str, Any]:
    return {str(key).strip().lower(): value for key, value in entry.items()}


def kind_of(value: object) -> str:
    """What a JSON value is, for people."""
    kinds = {
        dict: "an object",
        list: "a list",
        str: "a text",
        bool: "true or false",
        int: "a number",
        float: "a number",
    }
    return "nothing (null)" if value is None else kinds.get(type(value), "something else")
