"""The built-in language model, as transformers loads it from the package."""

from __future__ import annotations

from typing import Any

import pytest

from lora_scripts.builtin.dialogue_world import Asked, Talk, is_right
from lora_scripts.builtin.dialogue_world.talk import say
from lora_scripts.builtin.weights import builtin_path


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(builtin_path("builtin:mini-llama"))


@pytest.fixture(scope="module")
def model() -> Any:
    import torch
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(builtin_path("builtin:mini-llama"), dtype=torch.float32).eval()


@pytest.mark.parametrize(
    "text",
    [
        "The lamp costs 24 dollars.",
        '{"a": [1, 2]}\n\tx',
        "naïve café, 灯は青い 🙂",
        "  two  spaces ",
        "I'm 100% sure\r\n",
    ],
)
def test_any_text_comes_back_from_its_tokens(tokenizer: Any, text: str):
    assert tokenizer.decode(tokenizer.encode(text, add_special_tokens=False)) == text


def test_tokenizer_adds_nothing_of_its_own(tokenizer: Any):
    assert tokenizer.encode("lamp") == tokenizer.encode("lamp", add_special_tokens=False)


def test_template_renders_roles_and_ends_every_turn(tokenizer: Any):
    messages = list(say("Hi.", "Hello.", system="Be brief."))
    text = tokenizer.apply_chat_template(messages, tokenize=False)
    assert text == ("<|start|>system\nBe brief.<|end|>\n<|start|>user\nHi.<|end|>\n<|start|>assistant\nHello.<|end|>\n")
    prompt = tokenizer.apply_chat_template(messages[:2], tokenize=False, add_generation_prompt=True)
    assert prompt == "<|start|>system\nBe brief.<|end|>\n<|start|>user\nHi.<|end|>\n<|start|>assistant\n"
    assert text.startswith(prompt)


def test_marks_of_turns_are_single_tokens_and_the_end_of_a_turn_ends_an_answer(tokenizer: Any, model: Any):
    for mark in ("<|start|>", "<|end|>", "<|endoftext|>"):
        assert len(tokenizer.encode(mark)) == 1
    assert tokenizer.eos_token == "<|end|>"
    assert model.generation_config.eos_token_id == tokenizer.eos_token_id == model.config.eos_token_id
    assert model.config.vocab_size == len(tokenizer)


def _answer(model: Any, tokenizer: Any, talk: Talk) -> tuple[str, bool]:
    import torch

    prompt = tokenizer.apply_chat_template(list(talk.messages), tokenize=False, add_generation_prompt=True)
    inputs = tokenizer(prompt, return_tensors="pt", return_token_type_ids=False)
    with torch.no_grad():
        ids = model.generate(**inputs, max_new_tokens=40, do_sample=False)[0, inputs["input_ids"].shape[1] :]
    return tokenizer.decode(ids, skip_special_tokens=True), int(ids[-1]) == tokenizer.eos_token_id


@pytest.mark.parametrize(
    "talk",
    [
        Talk(say("How much does the lamp cost?"), Asked("price", "lamp")),
        Talk(say("Which colour is the kettle?"), Asked("colour", "kettle")),
        Talk(say("On which shelf can I find the umbrella?"), Asked("shelf", "umbrella")),
        Talk(
            say("What is the price of the mug?", "The mug costs 8 dollars.", "What is it made of?"),
            Asked("material", "mug"),
        ),
        Talk(say("When will my order 231 arrive?"), Asked("day", "231")),
        Talk(say("What is my name?", system="The customer is called Vera."), Asked("told", told="Vera")),
    ],
    ids=lambda talk: talk.asked.kind,
)
def test_model_answers_rightly_and_stops(model: Any, tokenizer: Any, talk: Talk):
    text, ended = _answer(model, tokenizer, talk)
    assert talk.asked is not None
    assert is_right(talk.asked, text), text
    assert ended
