"""Every example row on the page about dialogues is read, and gives what the page says."""

from __future__ import annotations

import json
import re
from pathlib import Path

from lora_scripts.dialogues.formats import RowContent, parse_row
from lora_scripts.dialogues.turns import put_in_order

PAGE = Path(__file__).parents[3] / "docs" / "dialogues.md"


def rows() -> list[RowContent]:
    blocks = re.findall(r"```json\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL)
    return [parse_row(json.loads(block)) for block in blocks]


def test_all_five_formats_of_the_page_are_read() -> None:
    contents = rows()
    assert len(contents) == 5
    assert contents[-1].text
    for content in contents[:-1]:
        assert put_in_order(content.messages, None)[1] == []


def test_alpaca_input_stands_under_the_instruction() -> None:
    assert rows()[1].messages[-2].content == "Translate into English.\nGuten Morgen"


def test_answer_of_weight_nought_is_not_learnt() -> None:
    assert [message.trained for message in rows()[3].messages if message.role == "assistant"] == [True, False]
