"""Trigger words, shuffling and dropout."""

from __future__ import annotations

import pytest

from lora_scripts.data.captions import CaptionSettings, fraction, shuffled, with_trigger

SETTINGS = CaptionSettings(shuffle=True, separator=",", keep=1, dropout=0.25, variants=4, seed=7)
CAPTION = "ink wash, a cat, red, beach, night"


@pytest.mark.parametrize(
    ("caption", "result"),
    [
        ("a cat", "sks, a cat"),
        ("sks, a cat", "sks, a cat"),
        ("a photo of SKS cat", "a photo of SKS cat"),
        ("asks a cat", "sks, asks a cat"),
        ("", "sks"),
    ],
)
def test_trigger_is_put_in_front_once(caption: str, result: str) -> None:
    assert with_trigger(caption, "sks") == result


def test_no_trigger_changes_nothing() -> None:
    assert with_trigger("a cat", None) == "a cat"


def test_shuffling_keeps_the_front_and_all_parts() -> None:
    orders = {shuffled(CAPTION, ",", 1, number) for number in range(50)}
    assert len(orders) > 10
    for order in orders:
        assert order.startswith("ink wash, ")
        assert sorted(order.split(", ")) == sorted(CAPTION.split(", "))


def test_all_texts_that_training_asks_for_were_encoded_ahead() -> None:
    possible = set(SETTINGS.possible([CAPTION, "a dog"]))
    asked = {SETTINGS.pick([text], f"{epoch}/0/{text}") for text in (CAPTION, "a dog") for epoch in range(300)}
    assert asked <= possible
    assert len(asked & {shuffled(CAPTION, ",", 1, 7, v) for v in range(4)}) == 4


def test_dropout_drops_its_share() -> None:
    dropped = sum(SETTINGS.pick(["a dog"], f"{epoch}/0/x") == "" for epoch in range(2000))
    assert 430 < dropped < 570


def test_draws_are_even_and_repeatable() -> None:
    values = [fraction(3, "stream", i) for i in range(4000)]
    assert all(0 <= value < 1 for value in values)
    assert abs(sum(values) / 4000 - 0.5) < 0.02
    assert fraction(3, "stream", 17) == values[17]
    assert fraction("a", "bc") != fraction("ab", "c")
