"""CLIP's vocabulary from the package, and which tokenizer a model gets."""

from __future__ import annotations

from pathlib import Path

import pytest

from lora_scripts.errors import ModelError
from lora_scripts.models.clip_tokenizer import (
    CLIP_VOCAB_SIZE,
    clip_merges,
    clip_vocabulary,
    find_tokenizer,
    packaged_clip_tokenizer,
    tokenizer_from_folder,
)


def test_the_vocabulary_is_clips() -> None:
    vocabulary = clip_vocabulary()
    assert len(vocabulary) == len(set(vocabulary)) == CLIP_VOCAB_SIZE == 49408
    assert len(clip_merges()) == 48894
    known = {"!": 0, "<|startoftext|>": 49406, "<|endoftext|>": 49407, "cat</w>": 2368, "photo</w>": 1125, "a</w>": 320}
    assert {token: vocabulary[token] for token in known} == known


@pytest.mark.parametrize(
    ("text", "ids"),
    [
        ("a photo of a cat", [49406, 320, 1125, 539, 320, 2368, 49407]),
        ("A  Photo\nof a CAT", [49406, 320, 1125, 539, 320, 2368, 49407]),
        ("hello world!", [49406, 3306, 1002, 256, 49407]),
        ("", [49406, 49407]),
    ],
)
def test_known_sentences_have_their_known_ids(text: str, ids: list[int]) -> None:
    assert packaged_clip_tokenizer()(text).input_ids == ids


@pytest.mark.parametrize("text", ["一只猫在雨里", "neon 🐱 city", "Ünïcödé naïve", "1girl, (masterpiece:1.2)"])
def test_any_text_survives_the_round_trip(text: str) -> None:
    tokenizer = packaged_clip_tokenizer()
    decoded = tokenizer.decode(tokenizer(text).input_ids, skip_special_tokens=True)
    assert decoded.replace(" ", "") == text.lower().replace(" ", "")


@pytest.mark.fault(19)
def test_long_texts_are_cut_to_77_and_short_ones_padded_with_the_end_token() -> None:
    tokenizer = packaged_clip_tokenizer()
    ids = tokenizer(["cat " * 100, "cat"], padding="max_length", truncation=True).input_ids
    assert [len(row) for row in ids] == [77, 77]
    assert ids[0][-1] == 49407
    assert ids[1] == [49406, 2368] + [49407] * 75


def test_a_saved_tokenizer_folder_reads_back_the_same(tmp_path: Path) -> None:
    tokenizer = packaged_clip_tokenizer()
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    again = tokenizer_from_folder(tmp_path / "tokenizer")
    text = "a lighthouse at dusk, 灯塔 🗼, it's 1920s art"
    assert len(again) == CLIP_VOCAB_SIZE
    assert again(text).input_ids == tokenizer(text).input_ids
    assert again.model_max_length == 77


def test_a_folder_in_the_old_layout_is_read(tmp_path: Path) -> None:
    import json

    (tmp_path / "vocab.json").write_text(json.dumps(clip_vocabulary()), encoding="utf-8")
    merges = "\n".join(" ".join(pair) for pair in clip_merges())
    (tmp_path / "merges.txt").write_text(f"#version: 0.2\n{merges}\n", encoding="utf-8")
    tokenizer = tokenizer_from_folder(tmp_path)
    text = "a photo of a cat, 灯塔 🗼"
    assert tokenizer(text).input_ids == packaged_clip_tokenizer()(text).input_ids
    assert tokenizer.model_max_length == 77


def test_a_damaged_tokenizer_folder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"holds neither vocab\.json"):
        tokenizer_from_folder(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(ModelError, match="the tokenizer cannot be read"):
        tokenizer_from_folder(tmp_path)


def test_clip_sized_models_need_no_folder_and_no_network(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    assert len(find_tokenizer(None, CLIP_VOCAB_SIZE, "model")) == CLIP_VOCAB_SIZE


def test_a_tokenizer_of_another_model_is_refused(tmp_path: Path) -> None:
    packaged_clip_tokenizer().save_pretrained(tmp_path / "tokenizer")
    with pytest.raises(ModelError, match="knows 49408 tokens, the text encoder 1000"):
        find_tokenizer(tmp_path / "tokenizer", 1000, "model")


def test_an_unknown_vocabulary_asks_for_a_tokenizer_folder() -> None:
    with pytest.raises(ModelError, match="Put the model's tokenizer folder beside the file"):
        find_tokenizer(None, 123_457, "model")
