"""Rows as tokens: cut, split, kept in the cache."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from helpers import chat_templates as shapes
from helpers.tiny_tokenizers import tiny_tokenizer
from lora_scripts.data.cache import EncodingCache
from lora_scripts.dialogues import tokenise as module
from lora_scripts.dialogues.conversation import Dialogue, Message, content_digest
from lora_scripts.dialogues.dialogue_set import DialogueSet
from lora_scripts.dialogues.spans import Rendered
from lora_scripts.dialogues.template import ChatTemplate
from lora_scripts.dialogues.tokenise import tokenise
from lora_scripts.dialogues.tokenised_set import TokenisedSet
from lora_scripts.errors import ModelError


def row(line: int, question: str, answer: str, repeats: int = 1) -> Dialogue:
    messages = (Message("user", question), Message("assistant", answer))
    return Dialogue(f"train.jsonl:{line}", messages, "", content_digest(messages, ""), repeats)


def text_row(text: str) -> Dialogue:
    return Dialogue("story.txt:1", (), text, content_digest((), text))


def rows(count: int) -> DialogueSet:
    return DialogueSet([row(n, f"question {n}", f"answer {n}", repeats=1 + n % 2) for n in range(1, count + 1)])


@pytest.fixture(scope="module")
def chatml() -> ChatTemplate:
    return ChatTemplate(tiny_tokenizer("byte_level", shapes.CHATML))


def same(first: TokenisedSet, second: TokenisedSet) -> bool:
    facts = [
        (each.digest, each.left_out, each.cut, each.notes, [e.digest for e in each.examples])
        for each in (first, second)
    ]
    return facts[0] == facts[1]


def files(cache: EncodingCache) -> list[Path]:
    assert cache.folder is not None
    return sorted(cache.folder.rglob("*.safetensors"))


def test_examples_carry_name_digest_repeats_and_typed_arrays(chatml: ChatTemplate) -> None:
    data = rows(2)
    first, second = tokenise(data, chatml, max_length=100).examples
    assert (first.name, first.digest, second.repeats) == ("train.jsonl:1", data.examples[0].digest, 1)
    assert (first.tokens.dtype, first.trained.dtype) == (np.int32, np.bool_)
    assert first.tokens.shape == first.trained.shape == (first.cost,)
    assert not first.trained[0]
    assert first.trained[-1]  # the end of the turn; no white space of the template behind it
    assert 0 < first.num_trained < first.cost


def test_long_dialogue_loses_its_end_and_is_named(chatml: ChatTemplate) -> None:
    data = DialogueSet([row(1, "a", "b"), row(2, "a", "word " * 100)])
    short, long = tokenise(data, chatml, max_length=60).examples
    result = tokenise(data, chatml, max_length=60)
    whole = tokenise(data, chatml, max_length=10_000).examples[1]
    assert long.cost == 60
    assert long.tokens.tolist() == whole.tokens[:60].tolist()
    assert result.cut == {"train.jsonl:2": whole.cost}
    assert any(f"cut: train.jsonl:2: {whole.cost} tokens" in line for line in result.summary())
    assert short.cost < 60


def test_row_whose_answer_lies_beyond_the_cut_is_left_out_by_name(chatml: ChatTemplate) -> None:
    result = tokenise(DialogueSet([row(1, "a", "b"), row(2, "word " * 100, "b")]), chatml, max_length=60)
    assert [example.name for example in result.examples] == ["train.jsonl:1"]
    (left,) = result.left_out
    assert left.name == "train.jsonl:2"
    assert "beyond max_length 60; nothing to learn would be left" in left.reason


def test_row_that_the_template_refuses_is_left_out_by_name() -> None:
    template = ChatTemplate(tiny_tokenizer("byte_level", shapes.TURNS))
    greeting = (Message("assistant", "Welcome"), Message("user", "Hi"), Message("assistant", "Hello"))
    data = DialogueSet([row(1, "a", "b"), Dialogue("train.jsonl:2", greeting, "", "digest")])
    (left,) = tokenise(data, template, max_length=60).left_out
    assert left.name == "train.jsonl:2"
    assert "roles must alternate" in left.reason


def test_long_text_becomes_even_pieces_and_loses_nothing(chatml: ChatTemplate) -> None:
    data = DialogueSet([text_row("Some words of a story. " * 20)])
    (whole,) = tokenise(data, chatml, max_length=10_000).examples
    parts = tokenise(data, chatml, max_length=50).examples
    assert np.concatenate([part.tokens for part in parts]).tolist() == whole.tokens.tolist()
    assert [part.name for part in parts[:2]] == ["story.txt:1 part 1", "story.txt:1 part 2"]
    assert len({part.digest for part in parts}) == len(parts)
    assert max(part.cost for part in parts) - min(part.cost for part in parts) <= 1
    assert all(part.trained[1:].all() and not part.trained[0] for part in parts)


def test_examples_of_one_row_have_names_and_digests_of_their_own() -> None:
    template = ChatTemplate(tiny_tokenizer("byte_level", shapes.THINKING))
    turns = (Message("user", "a"), Message("assistant", "b"), Message("user", "c"), Message("assistant", "d"))
    result = tokenise(DialogueSet([Dialogue("x.jsonl:1", turns, "", "d")]), template, max_length=200)
    assert [example.name for example in result.examples] == ["x.jsonl:1 answer 1", "x.jsonl:1 answer 2"]
    assert len({example.digest for example in result.examples}) == 2
    assert sum("rewrites earlier turns" in note for note in result.notes) == 1


def test_cache_gives_the_same_without_the_tokenizer(
    chatml: ChatTemplate, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = EncodingCache(tmp_path)
    data = DialogueSet(
        [*rows(30).examples, row(31, "word " * 100, "b"), row(32, "a", "word " * 100), text_row("x " * 200)]
    )
    cold = tokenise(data, chatml, max_length=60, cache=cache)
    assert cold.left_out
    assert cold.cut

    def fails(*_: object) -> None:
        raise AssertionError("tokenised again")

    monkeypatch.setattr(module, "marked_tokens", fails)
    assert same(tokenise(data, chatml, max_length=60, cache=cache), cold)


def test_empty_chunk_survives_the_cache(chatml: ChatTemplate, tmp_path: Path) -> None:
    data = DialogueSet([row(1, "word " * 100, "b")])
    cold, warm = (tokenise(data, chatml, max_length=60, cache=EncodingCache(tmp_path)) for _ in range(2))
    assert same(cold, warm)
    assert not warm.examples


def test_damaged_chunk_is_made_anew(chatml: ChatTemplate, tmp_path: Path) -> None:
    cache = EncodingCache(tmp_path)
    cold = tokenise(rows(5), chatml, max_length=60, cache=cache)
    (file,) = files(cache)
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
    assert same(tokenise(rows(5), chatml, max_length=60, cache=cache), cold)


def test_stopped_run_keeps_its_finished_chunks(
    chatml: ChatTemplate, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "ROWS_PER_CHUNK", 10)
    cache = EncodingCache(tmp_path)

    def stop(what: str, done: int, total: int) -> None:
        if done == 20:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        tokenise(rows(30), chatml, max_length=60, cache=cache, progress=stop)
    kept = {file: file.stat().st_mtime_ns for file in files(cache)}
    assert len(kept) == 2
    result = tokenise(rows(30), chatml, max_length=60, cache=cache)
    assert [example.name for example in result.examples] == [f"train.jsonl:{n}" for n in range(1, 31)]
    assert {file: file.stat().st_mtime_ns for file in kept} == kept
    assert same(result, tokenise(rows(30), chatml, max_length=60))


def test_whatever_shapes_the_tokens_has_another_entry(chatml: ChatTemplate, tmp_path: Path) -> None:
    cache = EncodingCache(tmp_path)
    data, other = rows(3), DialogueSet([row(1, "question 1", "another answer")])
    more_words = tiny_tokenizer("byte_level", shapes.CHATML)
    more_words.add_tokens(["question"])
    for number, (dialogues, template, length, train_on) in enumerate(
        [
            (data, chatml, 60, "assistant"),
            (other, chatml, 60, "assistant"),
            (data, chatml, 50, "assistant"),
            (data, chatml, 60, "all"),
            (data, ChatTemplate(tiny_tokenizer("byte_level", shapes.HEADERS)), 60, "assistant"),
            (data, ChatTemplate(tiny_tokenizer("prepended", shapes.CHATML)), 60, "assistant"),
            (data, ChatTemplate(more_words), 60, "assistant"),
        ],
        start=1,
    ):
        tokenise(dialogues, template, max_length=length, train_on=train_on, cache=cache)
        assert len(files(cache)) == number


def test_fingerprint_ignores_how_the_last_batch_was_padded() -> None:
    tokenizer = tiny_tokenizer("byte_level", shapes.CHATML)
    tokenizer.pad_token = "</s>"
    before = ChatTemplate(tokenizer).fingerprint
    tokenizer(["a", "b c d"], padding="max_length", max_length=9, truncation=True)
    assert tokenizer.backend_tokenizer.padding is not None
    assert ChatTemplate(tokenizer).fingerprint == before


def test_default_one_of_several_named_templates_is_used() -> None:
    named = {"default": shapes.CHATML, "tool_use": shapes.HEADERS}
    assert ChatTemplate(tiny_tokenizer("byte_level", named)).source == shapes.CHATML


def test_very_long_texts_go_through_the_tokenizer_a_few_at_a_time(
    chatml: ChatTemplate, monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes = []
    original = module.marked_tokens

    def listening(tokenizer: object, texts: list[Rendered]) -> object:
        sizes.append(sum(len(text.text) for text in texts))
        return original(tokenizer, texts)

    monkeypatch.setattr(module, "marked_tokens", listening)
    monkeypatch.setattr(module, "CHARACTERS_PER_CALL", 500)
    result = tokenise(DialogueSet([row(n, "word " * 20, "b") for n in range(1, 20)]), chatml, max_length=500)
    assert len(result.examples) == 19
    assert len(sizes) > 5
    assert max(sizes) <= 500


def test_tokenizer_that_could_never_end_an_answer_is_refused() -> None:
    tokenizer = tiny_tokenizer("byte_level", shapes.NO_END)
    tokenizer.eos_token = None
    with pytest.raises(ModelError, match="no answer would ever end"):
        ChatTemplate(tokenizer)


def test_template_that_cannot_be_used_is_refused() -> None:
    with pytest.raises(ModelError, match="cannot write a question and its answer"):
        ChatTemplate(tiny_tokenizer("byte_level", "{{ raise_exception('never') }}"))
    with pytest.raises(ModelError, match="leaves answers out"):
        ChatTemplate(tiny_tokenizer("byte_level", "{{ messages[0]['content'] }}"))
