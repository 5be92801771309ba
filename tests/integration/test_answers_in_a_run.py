"""The answers that a run of a language model shows of itself, by its own command."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from helpers.commands import train
from helpers.seen import StopAfter
from helpers.seen import train as train_with
from helpers.tiny_causal_lms import tiny_model, tokenizer
from lora_scripts.answering.generate import answer
from lora_scripts.answering.voices import named_loras, open_voices
from lora_scripts.dialogues.answers import AnswerRequest
from lora_scripts.dialogues.conversation import Message
from lora_scripts.training.record import read_record

Settings = Callable[..., dict[str, Any]]
Capsys = pytest.CaptureFixture[str]


def base_model() -> Any:
    return tiny_model("llama", max_position_embeddings=256, hidden_size=64)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("base")
    base_model().save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture
def settings(base: Path, tmp_path: Path) -> Settings:
    data = tmp_path / "data"
    data.mkdir()
    rows = [{"input": f"How much is {number}?", "output": f"It is {number}, dear."} for number in range(24)]
    (data / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")

    def make(**changes: Any) -> dict[str, Any]:
        values = {
            "task_type": "text-generation",
            "base_model": str(base),
            "train_data_dir": str(data),
            "output_dir": str(tmp_path / "run"),
            "output_name": "nice",
            "max_steps": 20,
            "save_steps": 10,
            "log_steps": 5,
            "learning_rate": 0.02,
            "optimizer": "adamw",
            "batch_size": 4,
            "sample_tokens": 20,
            "validate_every": 10,
            "keep": "last",
            "device": "cpu",
        }
        return values | changes

    return make


def test_a_run_answers_held_out_questions_as_base_and_as_it_is(
    settings: Settings, tmp_path: Path, capsys: Capsys
) -> None:
    code, out, _ = train(settings(), tmp_path, capsys)
    assert code == 0
    told = read_record(tmp_path / "run" / "record.jsonl").answers
    assert list(told) == [0, 10, 20]
    first, last = told[0], told[20]

    held_out = out.partition("are held out")[2].partition("train: ")[2].partition(".\n")[0].split(", ")
    rows = (tmp_path / "data" / "train.jsonl").read_text("utf-8").splitlines()
    lines = [json.loads(rows[int(name.rpartition(":")[2]) - 1]) for name in held_out]
    assert len(held_out) == 2
    assert list(first.prompts)[:2] == [line["input"] for line in lines]
    assert list(first.expected)[:2] == [line["output"] for line in lines]
    assert len(set(first.prompts)) == 4

    model = base_model()
    expected = [
        answer(model, tokenizer(), AnswerRequest((Message("user", prompt),), max_new_tokens=20))
        for prompt in first.prompts
    ]
    assert list(first.base) == list(first.adapter) == list(last.base) == expected
    assert list(last.adapter) != expected

    assert f'step 20: "{last.prompts[0]}" -> ' in out
    assert sorted(path.name for path in (tmp_path / "run" / "samples").iterdir()) == [
        "step-000000.md",
        "step-000010.md",
        "step-000020.md",
    ]
    assert "Answers: base and LoRA" in (tmp_path / "run" / "report.html").read_text("utf-8")
    assert "lora-scripts chat --base-model" in out


def test_what_a_run_said_at_its_end_is_what_the_finished_folder_says(
    settings: Settings, base: Path, tmp_path: Path, capsys: Capsys
) -> None:
    assert train(settings(save_precision="fp32"), tmp_path, capsys)[0] == 0
    told = read_record(tmp_path / "run" / "record.jsonl").answers[20]
    voices = open_voices(str(base), named_loras([str(tmp_path / "run" / "nice")]), "cpu")
    for prompt, base_answer, adapter_answer in zip(told.prompts, told.base, told.adapter, strict=True):
        request = AnswerRequest((Message("user", prompt),), max_new_tokens=20)
        assert voices.answer("nice", request) == adapter_answer
        assert voices.answer("base", request) == base_answer


def test_a_run_learns_the_same_with_and_without_answers(settings: Settings, tmp_path: Path, capsys: Capsys) -> None:
    shown, silent = (
        settings(lora_dropout=0.1),
        settings(lora_dropout=0.1, output_dir=str(tmp_path / "b"), sample_every=0),
    )
    silent.pop("sample_tokens")
    for values in (shown, silent):
        assert train(values, tmp_path, capsys)[0] == 0
    assert not read_record(tmp_path / "b" / "record.jsonl").answers
    one, other = (
        load_file(folder / "nice" / "adapter_model.safetensors") for folder in (tmp_path / "run", tmp_path / "b")
    )
    assert all((one[name] == other[name]).all() for name in one)


def test_own_prompts_are_asked_with_the_system_prompt_and_one_too_long_is_named(
    settings: Settings, tmp_path: Path, capsys: Capsys
) -> None:
    values = settings(sample_prompts=["How much?", "x" * 300], system_prompt="Be kind.", max_steps=10)
    code, out, _ = train(values, tmp_path, capsys)
    assert code == 0
    assert "is left out: the prompt has 3" in out
    told = read_record(tmp_path / "run" / "record.jsonl").answers[0]
    assert (list(told.prompts), list(told.expected)) == (["How much?"], [""])
    asked = (Message("system", "Be kind."), Message("user", "How much?"))
    model = base_model()
    assert told.base[0] == answer(model, tokenizer(), AnswerRequest(asked, max_new_tokens=20))


def test_stopped_run_asks_the_same_questions_when_it_goes_on(
    settings: Settings, tmp_path: Path, capsys: Capsys
) -> None:
    train_with(settings(), StopAfter(12))
    assert list(read_record(tmp_path / "run" / "record.jsonl").answers) == [0, 10]
    assert train(settings(), tmp_path, capsys)[0] == 0
    told = read_record(tmp_path / "run" / "record.jsonl").answers
    assert list(told) == [0, 10, 20]
    assert list(told[0].prompts) == list(told[20].prompts)
    assert list(told[0].base) == list(told[20].base)


def test_finished_file_of_a_step_between_two_previews_is_asked_at_the_end(
    settings: Settings, base: Path, tmp_path: Path, capsys: Capsys
) -> None:
    # What is measured is written in other words than what trains, so the loss of it soon rises.
    dev = [
        {"input": f"How much is {number}?", "output": f"Dear, you ask too much: {number}!"} for number in range(60, 76)
    ]
    train_file = tmp_path / "data" / "train.jsonl"
    train_file.write_text("".join(train_file.read_text("utf-8").splitlines(keepends=True)[:12]), "utf-8")
    (tmp_path / "data" / "dev.jsonl").write_text("".join(json.dumps(row) + "\n" for row in dev), "utf-8")
    values = settings(
        keep="best", sample_every=60, max_steps=60, save_precision="fp32", lr_scheduler="constant", batch_size=12
    )
    assert train(values, tmp_path, capsys)[0] == 0
    told = read_record(tmp_path / "run" / "record.jsonl").answers
    between = [step for step in told if step not in (0, 60)]
    assert len(between) == 1
    assert f"with the LoRA of step {between[0]}" in (tmp_path / "run" / "report.html").read_text("utf-8")
    voices = open_voices(str(base), named_loras([str(tmp_path / "run" / "nice")]), "cpu")
    request = AnswerRequest((Message("user", told[0].prompts[0]),), max_new_tokens=20)
    assert voices.answer("nice", request) == told[between[0]].adapter[0]
