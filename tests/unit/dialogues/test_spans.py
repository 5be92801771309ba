"""What is learnt is what the assistant says, and its end, whatever the template and the tokenizer."""

from __future__ import annotations

import random

import pytest

from helpers import chat_templates as shapes
from helpers.tiny_tokenizers import KINDS, tiny_tokenizer
from lora_scripts.dialogues.conversation import Dialogue, Message, content_digest
from lora_scripts.dialogues.formats import RowError
from lora_scripts.dialogues.spans import ASKS_OTHERWISE, FOLDED, NO_END, REWRITES, Rendered, TrainOn, render_row
from lora_scripts.dialogues.template import ChatTemplate
from lora_scripts.dialogues.tokens_of_text import marked_tokens

WORDS = [
    "parcel",
    "today,",
    "Where",
    "你好",
    "quick",
    "42",
    "😀",
    "naïve",
    "\n",
    "  ",
    "hello.",
    "[x]",
    "user",
    "</b>",
    "–",
]


def dialogue(*turns: tuple[str, str]) -> Dialogue:
    messages = tuple(Message(role, content) for role, content in turns)
    return Dialogue("train.jsonl:1", messages, "", content_digest(messages, ""))


def random_dialogue(rng: random.Random, *, system: bool) -> Dialogue:
    """Two to six turns of random words; every word of it in other surroundings."""

    def words() -> str:
        return " ".join(rng.choices(WORDS, k=rng.randint(1, 6))).strip() or "yes"

    turns = [("system", words())] if system else []
    for _ in range(rng.randint(1, 3)):
        turns += [("user", words()), ("assistant", words())]
    return dialogue(*turns)


def learnt(template: ChatTemplate, rendered: Rendered) -> list[str]:
    """The text of each run of learnt tokens, as the tokenizer decodes it in its place."""
    tokens, trained = marked_tokens(template.tokenizer, [rendered])[0]
    texts, begin = [], None
    for place in range(len(tokens) + 1):
        here = place < len(tokens) and bool(trained[place])
        if here and begin is None:
            begin = place
        elif not here and begin is not None:
            before, upto = (template.tokenizer.decode(tokens[:end].tolist()) for end in (begin, place))
            assert upto.startswith(before)
            texts.append(upto[len(before) :])
            begin = None
    return texts


def render(
    template: str | None, row: Dialogue, kind: str = "byte_level", train_on: TrainOn = "assistant", marks: bool = True
):
    chat = ChatTemplate(tiny_tokenizer(kind, template, marks=marks))
    return chat, render_row(chat, row, train_on)


PREFIX_STABLE = [
    (shapes.CHATML, "<|im_end|>", "", True),
    (shapes.HEADERS, "<|eot_id|>", "", True),
    (shapes.INST, "</s>", " ", False),
    (shapes.TURNS, "<end_of_turn>", "", False),
    (None, "<|im_end|>", "", True),
]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("template", "end", "blank", "system"), PREFIX_STABLE, ids=["chatml", "headers", "inst", "turns", "own"]
)
def test_learnt_tokens_decode_to_every_answer_and_its_end(kind, template, end, blank, system):
    rng = random.Random(7)
    chat = ChatTemplate(tiny_tokenizer(kind, template))
    assert chat.end_of_turn == end
    for _ in range(25):
        row = random_dialogue(rng, system=rng.random() < 0.5)
        (rendered,) = render_row(chat, row, "assistant")
        assert [rendered.text[b:e] for b, e in rendered.spans] == [blank + answer + end for answer in row.answers]
        found = learnt(chat, rendered)
        if kind == "prepended":  # it puts a blank before the text after every special token
            found = [blank + text.strip(" ").replace(" " + end, end) for text in found]
        assert found == [blank + answer + end for answer in row.answers]
        assert (FOLDED in rendered.remarks) == (row.messages[0].role == "system" and not system)


@pytest.mark.parametrize("kind", KINDS)
def test_plain_lines_end_every_answer_with_the_end_of_text_token(kind):
    rng = random.Random(3)
    chat = ChatTemplate(tiny_tokenizer(kind, None, marks=False))
    assert not chat.is_own
    assert "User: / Assistant:" in chat.note
    for _ in range(25):
        row = random_dialogue(rng, system=True)
        (rendered,) = render_row(chat, row, "assistant")
        assert [text.strip(" ") for text in learnt(chat, rendered)] == [f"{answer}</s>" for answer in row.answers]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("template", [shapes.THINKING, shapes.INST_SYSTEM_LAST], ids=["thinking", "system-last"])
def test_template_that_rewrites_history_gives_one_example_per_answer_as_at_inference(kind, template):
    row = dialogue(("system", "Be brief."), ("user", "one?"), ("assistant", "1"), ("user", "two?"), ("assistant", "2"))
    chat, examples = render(template, row, kind)
    assert [example.suffix for example in examples] == [" answer 1", " answer 2"]
    for example, turns in zip(examples, (2, 4), strict=True):
        (span,) = example.spans
        prompt = [{"role": m.role, "content": m.content} for m in row.messages[:turns]]
        asked = chat.tokenizer.apply_chat_template(prompt, tokenize=False, add_generation_prompt=True)
        assert example.text[: span[0]] == asked
        assert example.text.endswith(chat.end_of_turn)
        assert REWRITES in example.remarks


def test_thoughts_of_earlier_answers_are_not_seen_and_those_of_the_last_are_learnt():
    row = dialogue(
        ("user", "a"),
        ("assistant", "<think>\nhm\n</think>\n\nb"),
        ("user", "c"),
        ("assistant", "<think>\nso\n</think>\n\nd"),
    )
    chat, (first, last) = render(shapes.THINKING, row)
    assert learnt(chat, first) == ["<think>\nhm\n</think>\n\nb<|im_end|>"]
    assert learnt(chat, last) == ["<think>\nso\n</think>\n\nd<|im_end|>"]
    assert "hm" not in last.text


def test_template_without_an_end_gets_the_end_of_text_token_after_each_answer():
    row = dialogue(("user", "a"), ("assistant", "b"), ("user", "c"), ("assistant", "d"))
    chat, examples = render(shapes.NO_END, row)
    assert [learnt(chat, example) for example in examples] == [["b</s>"], ["d</s>"]]
    assert examples[1].text == "<|user|>\na<|assistant|>\nb<|user|>\nc<|assistant|>\nd</s>"
    assert NO_END in examples[0].remarks


def test_one_answer_without_an_end_is_one_example():
    chat, examples = render(shapes.NO_END, dialogue(("user", "a"), ("assistant", "b")))
    assert [example.suffix for example in examples] == [""]
    assert learnt(chat, examples[0]) == ["b</s>"]


@pytest.mark.parametrize("template", [shapes.IGNORES_SYSTEM, shapes.TURNS, shapes.INST])
def test_system_text_that_a_template_does_not_take_stands_in_the_first_question(template):
    _, (rendered,) = render(template, dialogue(("system", "Be kind."), ("user", "Hi"), ("assistant", "Hello")))
    assert "Be kind.\n\nHi" in rendered.text
    assert rendered.remarks == (FOLDED,)


def test_mark_that_only_asks_is_not_learnt():
    chat, (rendered,) = render(shapes.ASKS_FOR_THOUGHT, dialogue(("user", "a"), ("assistant", "<b>b</b>")))
    assert learnt(chat, rendered) == ["<b>b</b><|im_end|>"]
    assert rendered.remarks == (ASKS_OTHERWISE,)


def test_row_that_a_template_refuses_says_what_the_template_said():
    with pytest.raises(RowError, match="the chat template refuses it: roles must alternate"):
        render(shapes.TURNS, dialogue(("assistant", "Welcome"), ("user", "Hi"), ("assistant", "Hello")))


def test_tool_results_are_refused_where_the_template_would_drop_them():
    row = dialogue(("user", "a"), ("assistant", "call"), ("tool", "42"), ("assistant", "b"))
    with pytest.raises(RowError, match="results of tools"):
        render(shapes.IGNORES_SYSTEM, row)
    chat, (rendered,) = render(shapes.CHATML, row)
    assert learnt(chat, rendered) == ["call<|im_end|>", "b<|im_end|>"]


def test_answer_that_the_data_exclude_is_seen_but_not_learnt():
    messages = (Message("user", "a"), Message("assistant", "b", False), Message("user", "c"), Message("assistant", "d"))
    chat, (rendered,) = render(shapes.CHATML, Dialogue("x:1", messages, "", ""))
    assert learnt(chat, rendered) == ["d<|im_end|>"]
    assert "b<|im_end|>" in rendered.text


def test_train_on_all_learns_everything_but_the_first_token():
    row = dialogue(("system", "s"), ("user", "a"), ("assistant", "b"), ("user", "c"), ("assistant", "d"))
    chat, (rendered,) = render(shapes.HEADERS, row, train_on="all")
    _, trained = marked_tokens(chat.tokenizer, [rendered])[0]
    assert trained[1:].all()
    assert not trained[0]
    assert rendered.text == chat.render(row.messages)


def test_plain_text_is_learnt_whole_and_ends():
    chat, (rendered,) = render(shapes.CHATML, Dialogue("story.txt:1", (), "Once upon a time.", ""))
    assert learnt(chat, rendered) == [
        chat.tokenizer.decode(marked_tokens(chat.tokenizer, [rendered])[0][0][1:].tolist())
    ]
    assert rendered.text == "Once upon a time.</s>"


def test_begin_token_stands_once_where_template_and_tokenizer_both_write_it():
    from tokenizers.processors import TemplateProcessing

    tokenizer = tiny_tokenizer("prepended", shapes.HEADERS)
    bos = tokenizer.bos_token_id
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", bos)])
    assert tokenizer("a")["input_ids"][0] == bos
    chat = ChatTemplate(tokenizer)
    rows = [dialogue(("user", "a"), ("assistant", "b")), Dialogue("t:1", (), "text", "")]
    for row in rows:
        tokens, _ = marked_tokens(tokenizer, render_row(chat, row, "assistant"))[0]
        assert list(tokens).count(bos) == 1
        assert tokens[0] == bos


@pytest.mark.parametrize("kind", KINDS)
def test_marks_equal_those_of_transformers_where_the_template_has_generation_marks(kind):
    rng = random.Random(11)
    tokenizer = tiny_tokenizer(kind, shapes.CHATML_WITH_GENERATION_MARKS)
    chat = ChatTemplate(tokenizer)
    for _ in range(20):
        row = random_dialogue(rng, system=True)
        turns = [{"role": m.role, "content": m.content} for m in row.messages]
        theirs = tokenizer.apply_chat_template(
            turns, return_assistant_tokens_mask=True, return_dict=True, tokenize=True
        )
        tokens, trained = marked_tokens(tokenizer, render_row(chat, row, "assistant"))[0]
        assert (
            list(tokens) == theirs["input_ids"][: len(tokens)]
        )  # theirs goes on with the line end after the last turn
        assert trained.tolist() == [bool(mask) for mask in theirs["assistant_masks"][: len(tokens)]]
