"""`lora-scripts sample` with a language model: what stands on the terminal and in the files."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from helpers.commands import command
from helpers.tiny_causal_lms import random_lora, save_tiny, tiny_model, tokenizer
from lora_scripts.answering.generate import answer
from lora_scripts.dialogues.answers import AnswerRequest
from lora_scripts.dialogues.conversation import Message
from lora_scripts.export.peft_folder import write_peft_folder

Capsys = pytest.CaptureFixture[str]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny(tmp_path_factory.mktemp("sample") / "base")


@pytest.fixture(scope="module")
def lora(base: Path) -> Path:
    return write_peft_folder(base.parent / "kind", random_lora(tiny_model("llama")), base, torch.float32)


def test_prompts_of_a_file_are_answered_by_base_and_lora(
    base: Path, lora: Path, tmp_path: Path, capsys: Capsys
) -> None:
    (tmp_path / "prompts.txt").write_text("# questions\nHi?\n\n你好？\n", "utf-8")
    output = tmp_path / "answers.jsonl"
    words = (
        "--prompts",
        tmp_path / "prompts.txt",
        "--max-tokens",
        8,
        "--lora",
        lora,
        "--output",
        output,
        "--device",
        "cpu",
    )
    code, out, err = command(capsys, "sample", "--base-model", base, *words)
    assert (code, err) == (0, "")
    rows = [json.loads(line) for line in output.read_text("utf-8").splitlines()]
    assert [row["prompt"] for row in rows] == ["Hi?", "你好？"]
    for row in rows:
        expected = answer(
            tiny_model("llama"), tokenizer(), AnswerRequest((Message("user", row["prompt"]),), max_new_tokens=8)
        )
        assert row["answers"]["base"] == {
            "text": expected.text,
            "ended": expected.ended,
            "num_tokens": expected.num_tokens,
        }
        assert row["answers"]["kind"]["text"] != expected.text
    assert f"> Hi?\nbase  {rows[0]['answers']['base']['text']} [cut off]\nkind  " in out
    assert str(output) in out


def test_markdown_shows_both_answers_below_their_prompt(base: Path, lora: Path, tmp_path: Path, capsys: Capsys) -> None:
    output = tmp_path / "answers.md"
    words = (
        "--prompt",
        "Hi <you>?",
        "--max-tokens",
        8,
        "--lora",
        f"{lora}=nice",
        "--output",
        output,
        "--device",
        "cpu",
    )
    assert command(capsys, "sample", "--base-model", base, *words)[0] == 0
    page = output.read_text("utf-8")
    assert page.startswith("# Answers of base\n\n## Hi \\<you\\>?\n\n**base** (cut off)\n\n> ")
    assert "**nice**" in page


def test_several_answers_to_a_prompt_are_drawn_with_seeds_counting_up(
    base: Path, tmp_path: Path, capsys: Capsys
) -> None:
    output = tmp_path / "answers.jsonl"
    words = (
        "--prompt",
        "Hi?",
        "--count",
        2,
        "--temperature",
        1.5,
        "--max-tokens",
        8,
        "--output",
        output,
        "--device",
        "cpu",
    )
    assert command(capsys, "sample", "--base-model", base, *words)[0] == 0
    rows = [json.loads(line) for line in output.read_text("utf-8").splitlines()]
    assert [row["seed"] for row in rows] == [42, 43]
    assert rows[0]["answers"]["base"]["text"] != rows[1]["answers"]["base"]["text"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--grid", "--cfg", 3), "--cfg has no effect: {base} is a language model.\n--grid has no effect"),
        (("--output", "answers.txt"), "--output answers.txt: answers are written to a file ending in .md or .jsonl."),
        (("--count", 3), "--count: without a --temperature every answer to a prompt is the same."),
        (("--temperature", -1), "--temperature -1.0: must be between 0 and 10."),
    ],
)
def test_options_without_effect_or_sense_are_refused(
    base: Path, capsys: Capsys, words: tuple[object, ...], message: str
) -> None:
    code, _, err = command(capsys, "sample", "--base-model", base, "--prompt", "Hi?", *words)
    assert code == 2
    assert message.format(base=base) in err


def test_options_of_language_models_are_refused_where_pictures_are_made(tiny_sd_folder: Path, capsys: Capsys) -> None:
    words = ("--prompt", "a fox", "--lora", "x", "--system", "Be kind.")
    code, _, err = command(capsys, "sample", "--base-model", tiny_sd_folder, *words)
    assert code == 2
    assert f"--lora has no effect: {tiny_sd_folder} is a model that makes pictures." in err
    assert "--system has no effect" in err


def test_a_language_model_of_the_hub_cache_is_known_without_being_told(
    base: Path, tmp_path: Path, capsys: Capsys, monkeypatch: pytest.MonkeyPatch
) -> None:
    import huggingface_hub.constants

    snapshot = tmp_path / "hub" / "models--someone--tiny-chat" / "snapshots" / ("0" * 40)
    snapshot.parent.mkdir(parents=True)
    snapshot.symlink_to(base, target_is_directory=True)
    refs = snapshot.parent.parent / "refs"
    refs.mkdir()
    (refs / "main").write_text("0" * 40)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    words = ("--prompt", "Hi?", "--max-tokens", 4, "--device", "cpu")
    code, out, err = command(capsys, "sample", "--base-model", "someone/tiny-chat", *words)
    assert (code, err) == (0, "")
    assert "> Hi?" in out
