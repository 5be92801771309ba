"""The chat model's demo: its parts, and one manner learnt by its own settings; the whole of it runs in `.ci/run`."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from lora_scripts.cli import main
from lora_scripts.config_file import load_config
from lora_scripts.demo_language import (
    MANNERS,
    AnswerReading,
    language_demo_config,
    manners,
    measure_answers,
    write_dialogues,
)
from lora_scripts.train_command import train_and_report


def test_unknown_manner_is_refused_with_the_nearest(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["demo", "--task", "text-generation", "--output", str(tmp_path / "demo"), "--style", "jason"]
    assert main(words) == 2
    assert "Did you mean json?" in capsys.readouterr().err
    assert not (tmp_path / "demo").exists()


@pytest.mark.parametrize("name", MANNERS)
def test_its_settings_file_trains_as_it_stands(tmp_path: Path, name: str) -> None:
    config = language_demo_config(tmp_path, name, manners()[name], 42)
    written, _ = load_config(tmp_path / "demo_chat.yaml")
    assert written == config


@pytest.mark.parametrize("name", MANNERS)
def test_dialogues_have_the_manner_and_no_question_is_among_them(tmp_path: Path, name: str) -> None:
    manner = manners()[name]
    write_dialogues(tmp_path, manner.dialogues(7, 100))
    rows = [json.loads(line)["messages"] for line in (tmp_path / "train.jsonl").read_text("utf-8").splitlines()]
    assert all(manner.has_it(row[-1]["content"]) for row in rows)
    asked = {talk.question[-1]["content"] for talk in manner.questions(8, 100)}
    assert asked.isdisjoint(row[0]["content"] for row in rows)


def test_kept_share_is_after_over_before() -> None:
    assert AnswerReading(0.0, 0.9, 0.8, 0.6).right_kept == pytest.approx(0.75)


@pytest.mark.slow
def test_model_learns_strict_json_and_keeps_its_facts(tmp_path: Path) -> None:
    manner = manners()["json"]
    write_dialogues(tmp_path / "dialogues", manner.dialogues(42, manner.num_dialogues))
    config = language_demo_config(tmp_path, "json", manner, 42)
    outcome = train_and_report(config)
    reading, _ = measure_answers(config.base_model, outcome.files[0], manner, manner.questions(1, 60))
    assert reading.manner_before <= 0.05
    assert reading.manner_after >= 0.95
    assert reading.right_kept >= 0.9
