"""Damaged letters are noticed, whole ones are not."""

from __future__ import annotations

import pytest

from lora_scripts.dialogues.text_lines import is_garbled


@pytest.mark.parametrize("text", ["cafÃ©", "donâ€™t", "ä½\xa0å¥½", "lost \ufffd", "a\x00b", "锟斤拷"])
def test_damaged_letters_are_noticed(text: str) -> None:
    assert is_garbled(text)


@pytest.mark.parametrize(
    "text", ["plain", "café – “naïve” Öl", "ÂNGELA", "Straße, Ärger, ÉCOLE", "你好", "😀", "São Tomé"]
)
def test_whole_letters_are_not(text: str) -> None:
    assert is_garbled(text) == ""


@pytest.mark.parametrize("word", ["é", "ü", "’", "“", "好", "😀", "ñ", "ß"])
def test_every_western_reading_of_utf8_is_noticed(word: str) -> None:
    read_wrongly = word.encode().decode("cp1252")
    assert is_garbled(f"some {read_wrongly} word")
