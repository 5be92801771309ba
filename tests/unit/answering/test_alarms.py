from __future__ import annotations

import pytest

from lora_scripts.answering.alarms import alarms, repeats_itself, share_repeated
from lora_scripts.dialogues.answers import Answer

PLAIN = (
    "Your parcel left our house in Leipzig on Monday and should reach you by Thursday. If it does not, write to us again "
    "with the number on your receipt, and we will look for it together."
)
CHINESE = "您的包裹星期一已经从上海的仓库发出，预计星期四送到您家。如果到时候还没有收到，请把收据上的号码告诉我们，我们会帮您查询。"
LIST = "\n".join(
    f"{n}. {what}: open the box and take the {what.lower()} out."
    for n, what in enumerate(("Lid", "Cup", "Cable", "Plug"))
)
JSON = '{"name": "Anna", "city": "Ulm", "age": 31, "tags": ["new", "paid"], "open": false, "items": [{"id": 4}, {"id": 7}]}'


def answers(text: str, ended: bool = True, number: int = 4) -> list[Answer]:
    return [Answer(text, ended, 10)] * number


@pytest.mark.parametrize("text", [PLAIN, CHINESE, LIST, JSON, "yes yes yes", ""])
def test_ordinary_answers_do_not_repeat_themselves(text: str) -> None:
    assert not repeats_itself(text)


@pytest.mark.parametrize(
    "text",
    [
        "I am sorry. " * 8,
        PLAIN + " and so on" * 8,
        "好的，" * 10,
        CHINESE + "谢谢" * 10,
        "ha " * 20,
        "a" * 400,
        "ess" + "s" * 37,
        "it is, it is, it is, it is, it is, it is, it",  # cut in the middle of a round
        "\n".join(["The same line, word for word."] * 5),
    ],
)
def test_going_round_in_circles_is_noticed(text: str) -> None:
    assert repeats_itself(text)


def test_share_of_repeated_groups_counts_what_was_said_before() -> None:
    words = [f"w{chr(97 + i)}" for i in range(16)]
    assert share_repeated(" ".join(words)) == 0.0
    # 32 words make 29 groups of four; the 13 that begin and end in the second half were all said before.
    assert share_repeated(" ".join(words * 2)) == pytest.approx(13 / 29)
    assert share_repeated("no no no") == 0.0


def test_alarm_says_how_many_and_how_many_before() -> None:
    told = alarms(answers(PLAIN), [*answers("I am sorry. " * 8, number=3), *answers(PLAIN, number=1)], 160)
    assert len(told) == 1
    assert told[0].startswith("3 of 4 answers say the same over and over (of the base model's: 0).")
    told = alarms(answers(PLAIN), answers(PLAIN, ended=False), 160)
    assert [line.split(" (")[0] for line in told] == ["4 of 4 answers do not end within 160 tokens"]


def test_no_alarm_for_what_the_base_model_does_too_or_a_single_answer() -> None:
    assert alarms(answers(PLAIN, ended=False), answers(PLAIN, ended=False), 160) == []
    assert alarms(answers(PLAIN), [*answers("so " * 30, number=1), *answers(PLAIN, number=3)], 160) == []
    assert alarms([], [], 160) == []
