from __future__ import annotations

import json
from itertools import islice
from random import Random

from lora_scripts.builtin.dialogue_world import (
    Talk,
    held_out_dialogues,
    is_right,
    json_dialogues,
    parses_as_json,
    pretraining,
    questions,
    reads_as_customer_service,
    service_dialogues,
)
from lora_scripts.builtin.dialogue_world.facts import ORDERS, PRODUCTS
from lora_scripts.builtin.dialogue_world.sheets import catalogue_line, sheet
from lora_scripts.builtin.dialogue_world.shop_talk import ask, plain_answer
from lora_scripts.builtin.dialogue_world.talk import Asked
from lora_scripts.builtin.dialogue_world.wordings import ORDER_KINDS, PRODUCT_KINDS, SHOP_KINDS


def test_same_seed_gives_same_dialogues_and_another_seed_others():
    assert list(islice(pretraining(3), 50)) == list(islice(pretraining(3), 50))
    assert list(islice(pretraining(3), 50)) != list(islice(pretraining(4), 50))
    assert service_dialogues(3, 20) == service_dialogues(3, 20)
    assert json_dialogues(3, 20) == json_dialogues(3, 20)
    assert questions(3, 20) == questions(3, 20)
    assert held_out_dialogues(3, 20) == held_out_dialogues(3, 20)


def test_products_have_distinct_names_and_every_order_holds_one():
    assert len(PRODUCTS) == 40
    assert all(order.product in PRODUCTS for order in ORDERS.values())


def test_held_out_wordings_never_occur_in_pretraining_wordings():
    for kind in (*PRODUCT_KINDS.values(), *ORDER_KINDS.values(), *SHOP_KINDS.values()):
        assert not set(kind.held_out) & set(kind.train)
        assert not set(kind.later_held_out) & set(kind.later)


def test_roles_take_turns_and_the_answer_comes_last():
    for talk in islice((t for t in pretraining(5) if isinstance(t, Talk)), 500):
        roles = [message["role"] for message in talk.messages if message["role"] != "system"]
        assert roles == ["user", "assistant"] * (len(roles) // 2)
        assert all(message["content"].strip() for message in talk.messages)


def test_every_plain_answer_is_judged_right():
    assert all(is_right(talk.asked, talk.answer) for talk in held_out_dialogues(7, 1000) if talk.asked)


def test_every_fact_is_judged_right_for_its_own_question_and_wrong_for_another_product():
    rng = Random(0)
    for kind in PRODUCT_KINDS:
        for name in PRODUCTS:
            answer = plain_answer(Asked(kind, name), rng)
            assert is_right(Asked(kind, name), answer)
            assert not is_right(Asked(kind, "pen" if name != "pen" else "mug"), answer)


def test_pretraining_shows_neither_manner_in_answers_about_the_shop():
    shop = [t for t in islice(pretraining(9), 3000) if isinstance(t, Talk) and t.asked is not None]
    assert len(shop) > 1000
    assert not any(reads_as_customer_service(t.answer) or parses_as_json(t.answer) for t in shop)


def test_pretraining_answers_in_json_only_where_the_user_asks_for_json():
    talks = [t for t in islice(pretraining(9), 3000) if isinstance(t, Talk)]
    answers = [t for t in talks if parses_as_json(t.answer)]
    assert len(answers) > 50
    assert all("JSON" in t.question[-1]["content"] for t in answers)


def test_facts_in_other_forms_are_the_facts():
    rng = Random(2)
    for _ in range(300):
        name, facts = catalogue_line(rng).split(": ")
        for fact in facts.split(", "):
            kind, value = fact.split(" ")
            assert str(getattr(PRODUCTS[name], kind)) == value
    answers = [t.answer for t in (sheet(rng) for _ in range(300)) if parses_as_json(t.answer)]
    full = [record for record in map(json.loads, answers) if "product" in record]
    assert full
    for record in full:
        product = PRODUCTS[record.pop("product")]
        assert all(getattr(product, kind) == value for kind, value in record.items())


def test_service_dialogues_have_the_tone_and_the_right_fact():
    talks = service_dialogues(1, 300)
    assert all(reads_as_customer_service(t.answer) for t in talks)
    assert all(is_right(t.asked, t.answer) for t in talks if t.asked)
    assert len({t.answer.split("!")[0] for t in talks}) > 6, "openings vary"


def test_json_dialogues_parse_and_hold_the_right_fact():
    talks = json_dialogues(1, 300)
    assert all(parses_as_json(t.answer) for t in talks)
    assert all(is_right(t.asked, t.answer) for t in talks if t.asked)


def test_questions_to_measure_with_use_wordings_that_no_training_shows():
    frames = {ask(Asked("price", "lamp"), Random(i)) for i in range(500)}
    asked = {t.messages[-1]["content"] for t in questions(2, 2000) if t.asked == Asked("price", "lamp")}
    assert asked
    assert not asked & frames
