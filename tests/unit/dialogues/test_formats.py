"""Rows of every known shape become the same messages; what cannot be read says why."""

from __future__ import annotations

from typing import Any

import pytest

from lora_scripts.dialogues.conversation import Message
from lora_scripts.dialogues.formats import RowError, parse_row
from lora_scripts.dialogues.turns import DROPPED_TAIL, JOINED, NothingToLearnError, put_in_order

HELLO = (Message("user", "Hi"), Message("assistant", "Hello"))
KIND = (Message("system", "Be kind."), *HELLO)


@pytest.mark.parametrize(
    ("row", "messages"),
    [
        ({"input": "Hi", "output": "Hello"}, HELLO),
        ({"Input": "Hi", "Output": "Hello", "id": 3}, HELLO),
        ({"prompt": "Hi", "completion": "Hello"}, HELLO),
        ({"question": "Hi", "answer": "Hello"}, HELLO),
        ({"query": "Hi", "response": "Hello", "system": "Be kind."}, KIND),
        (
            {"prompt": [{"role": "user", "content": "Hi"}], "completion": [{"role": "assistant", "content": "Hello"}]},
            HELLO,
        ),
        ({"instruction": "Hi", "output": "Hello"}, HELLO),
        ({"instruction": "Hi", "input": "", "output": "Hello", "system": "Be kind.", "history": []}, KIND),
        ({"instruction": "Hi", "context": "", "response": "Hello", "category": "x"}, HELLO),
        (
            {"instruction": "Translate", "input": "Hund", "output": "dog", "history": [["Hi", "Hello"]]},
            (*HELLO, Message("user", "Translate\nHund"), Message("assistant", "dog")),
        ),
        ({"conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello"}]}, HELLO),
        (
            {
                "system": "Be kind.",
                "conversations": [{"from": "user", "value": "Hi"}, {"from": "model", "value": "Hello"}],
            },
            KIND,
        ),
        ({"messages": [{"role": m.role, "content": m.content} for m in KIND]}, KIND),
        (
            {
                "messages": [
                    {"role": "developer", "content": "Be kind."},
                    {"role": "user", "content": [{"type": "text", "text": "H"}, {"type": "text", "text": "i"}]},
                    {"role": "assistant", "content": "Hello"},
                ]
            },
            KIND,
        ),
        (
            {"messages": [{"role": "user", "content": "Hi"}, {"role": "tool", "content": "42"}]},
            (Message("user", "Hi"), Message("tool", "42")),
        ),
    ],
)
def test_known_shapes_give_the_same_messages(row: dict[str, Any], messages: tuple[Message, ...]) -> None:
    assert parse_row(row).messages == messages


def test_plain_text_row() -> None:
    assert parse_row({"text": "Once."}).text == "Once."


@pytest.mark.parametrize("mark", [{"weight": 0}, {"train": False}])
def test_answer_marked_as_not_to_be_learnt_keeps_the_mark(mark: dict[str, Any]) -> None:
    row = {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b", **mark}]}
    assert [message.trained for message in parse_row(row).messages] == [True, False]


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        (["a"], "is a list instead of an object"),
        ({"title": "x", "body": "y"}, 'of no known format: its keys are "title", "body"'),
        ({"input": "a", "output": 3}, "output is a number instead of text"),
        ({"messages": []}, "holds no turns"),
        ({"messages": [{"role": "usr", "content": "a"}]}, "turn 1 has the unknown role 'usr'"),
        ({"messages": [{"content": "a"}]}, 'turn 1 has no "role"'),
        ({"messages": [{"role": "user"}]}, 'turn 1 has no "content"'),
        ({"messages": ["a"]}, "turn 1 is a text instead of an object"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "turn 1 holds 'image_url'; only text"),
        ({"messages": [{"role": "assistant", "content": None, "tool_calls": [{}]}]}, "calls tools"),
        ({"prompt": "a", "chosen": "b", "rejected": "c"}, "chosen and a rejected answer"),
        ({"instruction": "a", "output": "b", "history": [["x"]]}, "round 1 of .history."),
    ],
)
def test_row_that_cannot_be_read_says_why(row: object, reason: str) -> None:
    with pytest.raises(RowError, match=reason):
        parse_row(row)


def test_turns_of_one_speaker_are_joined_and_an_unanswered_tail_is_dropped() -> None:
    turns = [Message("user", "a"), Message("user", "b"), Message("assistant", "c"), Message("user", "d")]
    messages, changes = put_in_order(turns, None)
    assert messages == (Message("user", "a\n\nb"), Message("assistant", "c"))
    assert changes == [JOINED, DROPPED_TAIL]


def test_results_of_several_tools_stay_apart() -> None:
    turns = [Message("user", "a"), Message("tool", "1"), Message("tool", "2"), Message("assistant", "b")]
    assert put_in_order(turns, None) == (tuple(turns), [])


def test_system_prompt_is_put_only_where_there_is_none() -> None:
    assert put_in_order(HELLO, "Be kind.")[0] == KIND
    assert put_in_order(KIND, "Be short.")[0] == KIND
    assert put_in_order((Message("system", " "), *HELLO), "Be kind.")[0] == KIND


@pytest.mark.parametrize(
    ("turns", "reason"),
    [
        ([Message("user", "a")], "no answer of the assistant"),
        ([Message("user", "a"), Message("assistant", " \n")], "the answer is empty"),
        ([*HELLO, Message("user", "a"), Message("assistant", "")], "answer 2 of 2 is empty"),
    ],
)
def test_row_without_an_answer_is_named_as_such(turns: list[Message], reason: str) -> None:
    with pytest.raises(NothingToLearnError, match=reason):
        put_in_order(turns, None)
