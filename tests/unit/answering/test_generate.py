from __future__ import annotations

from typing import Any

import pytest
import torch

from helpers.tiny_causal_lms import tiny_model, tokenizer
from lora_scripts.answering.generate import Answerer, TooLongError, answer
from lora_scripts.answering.pieces import Pieces
from lora_scripts.dialogues.answers import AnswerRequest
from lora_scripts.dialogues.conversation import Dialogue, Message
from lora_scripts.dialogues.spans import render_row
from lora_scripts.dialogues.template import ChatTemplate
from lora_scripts.errors import DataError

QUESTION = (Message("user", "Hi?"),)
REFUSES_SYSTEM = (
    "{% for message in messages %}{% if message.role == 'system' %}{{ raise_exception('no system text') }}{% endif %}"
    "<|{{ message.role }}|>{{ message.content }}<|end|>{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


@pytest.fixture
def model() -> Any:
    return tiny_model("llama")


def likeliest(model: Any, text: str, most: int) -> list[int]:
    """The likeliest tokens one after the other, everything computed anew each time."""
    tokens = tokenizer()(text, add_special_tokens=False)["input_ids"]
    begin = len(tokens)
    with torch.no_grad():
        while len(tokens) < begin + most:
            tokens.append(int(model(input_ids=torch.tensor([tokens]), use_cache=False).logits[0, -1].argmax()))
    return tokens[begin:]


def test_each_token_of_an_answer_is_the_likeliest(model: Any) -> None:
    expected = likeliest(model, "<|user|>Hi?<|end|><|assistant|>", 12)
    said = answer(model, tokenizer(), AnswerRequest(QUESTION, max_new_tokens=12))
    assert said.num_tokens == 12
    assert not said.ended
    text = tokenizer().decode(expected, skip_special_tokens=True)
    assert said.text == text.strip().rstrip("\ufffd")
    assert len(set(expected)) > 1


def test_answer_ends_at_a_token_that_the_generation_config_names(model: Any) -> None:
    expected = likeliest(model, "<|user|>Hi?<|end|><|assistant|>", 12)
    last = expected[6]
    model.generation_config.eos_token_id = [259, last]
    said = answer(model, tokenizer(), AnswerRequest(QUESTION, max_new_tokens=12))
    assert said.ended
    assert said.num_tokens == expected.index(last) + 1


def test_answer_ends_at_the_mark_by_which_the_template_ends_answers(model: Any) -> None:
    expected = likeliest(model, "<|user|>Hi?<|end|><|assistant|>", 12)
    words = tokenizer()
    mark = words.convert_ids_to_tokens(expected[6])
    words.add_tokens([mark], special_tokens=True)
    words.eos_token, model.generation_config.eos_token_id = "<s>", None
    words.chat_template = words.chat_template.replace(
        "<|end|>", "{% if message.role == 'assistant' %}" + mark + "{% else %}<|end|>{% endif %}"
    )
    said = answer(model, words, AnswerRequest(QUESTION, max_new_tokens=12))
    assert said.ended
    assert said.num_tokens == expected.index(expected[6]) + 1


def test_prompt_is_the_text_that_training_puts_before_an_answer(model: Any) -> None:
    turns = (Message("system", "Short."), *QUESTION, Message("assistant", "Yes."), Message("user", "And?"))
    for template in (tokenizer().chat_template, REFUSES_SYSTEM, None):
        words = tokenizer()
        words.chat_template = template
        row = Dialogue("a:1", (*turns, Message("assistant", "No.")), "", "")
        (example,) = render_row(ChatTemplate(words), row, "assistant")
        prompt = Answerer(model, words).prompt(AnswerRequest(turns))
        assert prompt == example.text[: example.spans[-1][0]]
        assert "Short." in prompt
        assert prompt.index("Short.") < prompt.index("Hi?")


def test_plain_text_is_gone_on_with_as_it_is(model: Any) -> None:
    expected = likeliest(model, "Once ", 8)
    said = answer(model, tokenizer(), AnswerRequest(text="Once ", max_new_tokens=8))
    assert said.text == tokenizer().decode(expected, skip_special_tokens=True).rstrip("\ufffd")


def test_drawn_answers_belong_to_their_seed_and_leave_other_random_numbers_alone(model: Any) -> None:
    asked = [AnswerRequest(QUESTION, max_new_tokens=20, temperature=1.5, seed=seed) for seed in (1, 2, 1)]
    torch.manual_seed(5)
    before = torch.random.get_rng_state()
    one, other, again = [answer(model, tokenizer(), request) for request in asked]
    assert torch.equal(torch.random.get_rng_state(), before)
    assert one == again
    assert one.text != other.text


def test_model_is_left_as_training_had_it(model: Any) -> None:
    request = AnswerRequest(QUESTION, max_new_tokens=12)
    plain = answer(model, tokenizer(), request)
    model.train()
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    model.model.norm.eval()
    model.generation_config.repetition_penalty = 1.9
    modes = {name: module.training for name, module in model.named_modules()}
    attention = model.config._attn_implementation
    assert answer(model, tokenizer(), request) == plain  # the recommended penalty would have changed it
    assert {name: module.training for name, module in model.named_modules()} == modes
    assert model.is_gradient_checkpointing
    assert model.config._attn_implementation == attention
    assert model.generation_config.repetition_penalty == 1.9


def test_modes_come_back_when_the_reader_stops_the_answer(model: Any) -> None:
    model.train()

    def stop(piece: str) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        answer(model, tokenizer(), AnswerRequest(QUESTION, max_new_tokens=12), stop)
    assert all(module.training for module in model.modules())


def test_answer_ends_where_the_model_can_read_no_further(model: Any) -> None:
    # 64 tokens is all it reads; the prompt takes 40 and three marks.
    said = answer(model, tokenizer(), AnswerRequest((Message("user", "x" * 40),), max_new_tokens=500))
    assert not said.ended
    assert said.num_tokens == 64 - 43
    with pytest.raises(TooLongError, match="the prompt has 103 tokens, and the model reads 64"):
        answer(model, tokenizer(), AnswerRequest((Message("user", "x" * 100),)))


def test_a_template_that_refuses_the_messages_is_said_so(model: Any) -> None:
    words = tokenizer()
    words.chat_template = (
        "{% if messages|length > 2 %}{{ raise_exception('one question at a time') }}{% endif %}" + words.chat_template
    )
    asked = (*QUESTION, Message("assistant", "Yes."), Message("user", "And?"))
    with pytest.raises(DataError, match="refuses the messages: one question at a time"):
        answer(model, words, AnswerRequest(asked))


def fed(text: str, *, stripped: bool = True, tail: tuple[int, ...] = ()) -> tuple[Pieces, list[str]]:
    """One byte at a time, as the tokenizer has one token for each."""
    words, seen = tokenizer(), []
    pieces = Pieces(words, [257], seen.append, stripped)
    pieces.put(torch.tensor([[1, 2, 3]]))
    for token in [*words(text, add_special_tokens=False)["input_ids"], *tail]:
        pieces.put(torch.tensor([token]))
    pieces.end()
    return pieces, seen


def test_pieces_hold_whole_characters() -> None:
    text = "包裹 🎁 naïve."
    pieces, seen = fed(text, tail=(257,))
    assert seen == ["包", "裹", " 🎁", " n", "a", "ï", "v", "e", "."]
    assert pieces.text == text
    assert pieces.ended
    assert pieces.num_tokens == len(text.encode()) + 1


def test_white_space_around_an_answer_is_left_out_and_around_plain_text_kept() -> None:
    assert fed(" \n yes \n ok \n")[0].text == "yes \n ok"
    assert fed(" \n yes \n ok \n", stripped=False)[0].text == " \n yes \n ok \n"


def test_half_a_character_at_the_end_is_dropped() -> None:
    pieces, seen = fed("ok", tail=tuple(tokenizer()("包", add_special_tokens=False)["input_ids"][:2]))
    assert pieces.text == "ok"
    assert not pieces.ended
    assert "\ufffd" not in "".join(seen)
