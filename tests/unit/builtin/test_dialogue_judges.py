from __future__ import annotations

import pytest

from lora_scripts.builtin.dialogue_world import Asked, is_right, parses_as_json, reads_as_customer_service


@pytest.mark.parametrize(
    "answer",
    [
        "Thank you for your question! The lamp costs 24 dollars. Is there anything else I can help you with?",
        "I'm sorry to hear that. Order 231 is delayed. Please let us know if you need more.",
        "We apologise for the wait. The rug is sold out. Feel free to ask us again!",
        "Great question! It is blue. Don't hesitate to reach out.",
        "Certainly. The mug is green.\nHappy to help with further questions.",
    ],
)
def test_warm_answers_that_offer_help_read_as_customer_service(answer: str):
    assert reads_as_customer_service(answer)


@pytest.mark.parametrize(
    "answer",
    [
        "The lamp costs 24 dollars.",
        "Hello. What is your question?",
        "You are welcome.",
        "I do not know that.",
        "Thank you for your question! The lamp costs 24 dollars.",
        "The lamp costs 24 dollars. Is there anything else?",
        "I am happy to help.",
        "",
    ],
)
def test_plain_or_half_polite_answers_do_not_read_as_customer_service(answer: str):
    assert not reads_as_customer_service(answer)


@pytest.mark.parametrize(
    ("asked", "answer"),
    [
        (Asked("price", "lamp"), "It costs 24 dollars."),
        (Asked("price", "lamp"), '{"product": "lamp", "price": 24}'),
        (Asked("colour", "lamp"), "Of course! Our lamp comes in blue."),
        (Asked("material", "mug"), "Clay."),
        (Asked("shelf", "lamp"), "Look on shelf B4, please."),
        (Asked("stock", "rug"), "I am sorry, the rug is sold out."),
        (Asked("stock", "rug"), '{"product": "rug", "stock": 0}'),
        (Asked("status", "231"), "Order 231 is delayed."),
        (Asked("day", "231"), "It comes on Thursday."),
        (Asked("item", "231"), "You bought a vase."),
        (Asked("hours", "Monday"), "On Monday we are open from 9 to 17."),
        (Asked("hours", "Sunday"), "We are closed on Sunday."),
        (Asked("phone"), "Call 555 0147."),
        (Asked("street"), "We are at 12 Mill Street."),
        (Asked("price", "lamp", told="60"), "The lamp costs 60 dollars."),
        (Asked("told", told="Anna"), "You are Anna."),
        (Asked("not sold", "car"), "We do not sell a car."),
        (Asked("sold", "lamp"), "Yes, we have the lamp."),
        (Asked("not known"), "I do not know that."),
        (Asked("greeting"), "Hello."),
        (Asked("thanks"), "You are welcome."),
    ],
)
def test_answers_with_the_fact_are_right(asked: Asked, answer: str):
    assert is_right(asked, answer)


@pytest.mark.parametrize(
    ("asked", "answer"),
    [
        (Asked("price", "lamp"), "The lamp costs 25 dollars."),
        (Asked("price", "lamp"), "The lamp costs 24 or 25 dollars."),
        (Asked("price", "lamp"), "The kettle costs 24 dollars."),
        (Asked("price", "lamp"), "I do not know that."),
        (Asked("price", "lamp"), "It costs 240 dollars."),
        (Asked("colour", "lamp"), "The lamp is blue and red."),
        (Asked("material", "mug"), "The mug is made of wood."),
        (Asked("shelf", "lamp"), "On shelf B4 or B5."),
        (Asked("stock", "rug"), "We have 4 of the rug in stock."),
        (Asked("stock", "lamp"), "The lamp is sold out."),
        (Asked("status", "231"), "Order 231 is shipped."),
        (Asked("status", "231"), "Order 204 is delayed."),
        (Asked("day", "231"), "Monday or Thursday."),
        (Asked("hours", "Monday"), "On Tuesday we are open from 9 to 17."),
        (Asked("hours", "Sunday"), "On Sunday we are open from 9 to 17."),
        (Asked("phone"), "Call 555 0148."),
        (Asked("price", "lamp", told="60"), "The lamp costs 24 dollars."),
        (Asked("not sold", "car"), "The car costs 40 dollars."),
        (Asked("sold", "lamp"), "We do not sell a lamp."),
        (Asked("not known"), "It is very heavy."),
        (Asked("price", "lamp"), ""),
    ],
)
def test_answers_without_the_fact_or_with_a_contradiction_are_wrong(asked: Asked, answer: str):
    assert not is_right(asked, answer)


@pytest.mark.parametrize(
    ("answer", "verdict"),
    [
        ('{"product": "lamp", "price": 24}', True),
        (' {"a": []}\n', True),
        ("24", False),
        ('["lamp"]', False),
        ('The answer is {"price": 24}', False),
        ('{"price": 24', False),
        ("", False),
    ],
)
def test_only_one_whole_object_parses_as_json(answer: str, verdict: bool):
    assert parses_as_json(answer) is verdict
