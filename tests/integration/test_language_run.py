"""Whole runs on dialogues with a tiny model: what they leave, how they resume, what they refuse."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from statistics import fmean
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from helpers.commands import command
from helpers.commands import train as train_by_command
from helpers.seen import Seen, StopAfter, train
from helpers.tiny_causal_lms import logits_with, probe
from lora_scripts.builtin.dialogue_world import held_out_dialogues, service_dialogues
from lora_scripts.config import RunConfig
from lora_scripts.errors import ResumeError
from lora_scripts.export.reader import read_lora_file
from lora_scripts.training.record import read_record

Settings = Callable[..., dict[str, Any]]


def weights(values: dict[str, Any]) -> dict[str, torch.Tensor]:
    folder = Path(values["output_dir"])
    return load_file(folder / folder.name / "adapter_model.safetensors")


def equal(left: dict[str, torch.Tensor], right: dict[str, torch.Tensor]) -> bool:
    return left.keys() == right.keys() and all(torch.equal(left[key], right[key]) for key in left)


def losses(seen: Seen) -> list[float]:
    return [loss for report in seen.reports for loss in report.losses]


def test_run_leaves_a_folder_that_peft_reads_with_the_trained_logits(
    language_settings: Settings, tiny_language_model: Path, tmp_path: Path
) -> None:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer

    values = language_settings(save_precision="fp32", sample_every=3, sample_prompts=["3 and 3?"], sample_tokens=4)
    seen = train(values)
    out = Path(values["output_dir"])
    assert len(losses(seen)) == 6
    assert any("16 of 16 dialogues train" in note for note in seen.notes)
    for name in ("run/adapter_config.json", "run/tokenizer.json", "run/chat_template.jinja", "run/README.md"):
        assert (out / name).is_file(), name
    for name in ("train.log", "report.html", "record.jsonl", "checkpoint-2/run-2/adapter_model.safetensors"):
        assert (out / name).is_file(), name
    base = AutoModelForCausalLM.from_pretrained(tiny_language_model)
    trained = logits_with(base, read_lora_file(out / "run").weights)
    assert (trained - base(probe()).logits).abs().max() > 1e-2
    with torch.no_grad():
        read = PeftModel.from_pretrained(base, out / "run")(probe()).logits
    torch.testing.assert_close(read, trained, rtol=0, atol=1e-4)
    assert json.loads((out / "run" / "adapter_config.json").read_text("utf-8"))["lora_alpha"] == 3
    assert AutoTokenizer.from_pretrained(out / "run").chat_template
    answers = read_record(out / "record.jsonl").answers
    assert list(answers) == [0, 3, 6]
    assert "3 and 3?" in (out / "report.html").read_text("utf-8")


def test_training_lowers_the_loss(language_settings: Settings) -> None:
    found = losses(train(language_settings(max_steps=30, save_steps=30)))
    assert sum(found[-5:]) < 0.9 * sum(found[:5])


@pytest.mark.fault(26)
@pytest.mark.parametrize("stops", [(1,), (3, 4), (5,)])
def test_run_that_was_stopped_ends_in_the_same_bits(
    language_settings: Settings, tmp_path: Path, stops: tuple[int, ...]
) -> None:
    whole = language_settings(output_dir=str(tmp_path / "whole" / "run"), lora_dropout=0.2)
    train(whole)
    broken = whole | {"output_dir": str(tmp_path / "broken" / "run")}
    for step in stops:
        train(broken, StopAfter(step))
    train(broken)
    assert equal(weights(whole), weights(broken))


@pytest.mark.parametrize(
    "changes",
    [
        {"packing": False},
        {"batch_size": 1, "gradient_accumulation_steps": 4},
        {"gradient_checkpointing": True},
    ],
    ids=["padded", "accumulated", "checkpointed"],
)
def test_how_a_step_is_computed_changes_nothing(
    language_settings: Settings, tmp_path: Path, changes: dict[str, Any]
) -> None:
    # Without packing, dialogues of like length go together, so the steps hold others: one step holds them all here.
    one_step = {"batch_size": 16, "validation_dialogues": 0, "max_steps": 4}
    expected = losses(train(language_settings(output_dir=str(tmp_path / "a"), **one_step)))
    found = losses(
        train(
            language_settings(
                **{"output_dir": str(tmp_path / "b"), **one_step, **changes},
            )
        )
    )
    if "gradient_accumulation_steps" in changes:
        expected = losses(train(language_settings(output_dir=str(tmp_path / "c"), max_steps=4, batch_size=4)))
        found = losses(train(language_settings(output_dir=str(tmp_path / "d"), max_steps=4, **changes)))
    assert found == pytest.approx(expected, rel=1e-5)


def test_validation_is_measured_on_the_file_for_it(language_settings: Settings, dialogues: Path) -> None:
    (dialogues / "dev.jsonl").write_text('{"input": "9 and 9?", "output": "18"}\n' * 1, "utf-8")
    seen = train(language_settings(validate_every=3))
    assert [each.step for each in seen.validations] == [0, 3, 6]
    assert len(seen.validations[0].held_out) == 1
    assert any("16 dialogues train; the validation loss is measured on 1 of the 1" in note for note in seen.notes)


def test_best_step_is_chosen_by_held_out_loss(language_settings: Settings, dialogues: Path) -> None:
    # What is measured is what the base model does already; every step in another manner takes it further away.
    rows = {"train": service_dialogues(1, 24), "dev": held_out_dialogues(1, 8)}
    for name, talks in rows.items():
        lines = [json.dumps({"messages": list(talk.messages)}) + "\n" for talk in talks]
        (dialogues / f"{name}.jsonl").write_text("".join(lines), "utf-8")
    values = language_settings(
        base_model="builtin:mini-llama", max_steps=40, save_steps=10, validate_every=10, learning_rate=3e-3
    )
    seen = train(values)
    assert any("Step 10 is the finished file, not the last one (40)" in note for note in seen.notes)
    chosen = load_file(Path(values["output_dir"]) / "checkpoint-10" / "run-10" / "adapter_model.safetensors")
    assert equal(weights(values), chosen)


@pytest.mark.fault(27)
def test_changed_dialogues_are_refused_on_resume(language_settings: Settings, dialogues: Path) -> None:
    values = language_settings()
    train(values, StopAfter(2))
    file = dialogues / "train.jsonl"
    file.write_text(file.read_text("utf-8").replace("3 and 3?", "3 and 4?"), "utf-8")
    with pytest.raises(ResumeError, match=r"(?s)train\.jsonl: was .*another output_dir.*init_lora_weights"):
        train(values)


def test_training_goes_on_from_an_older_lora(language_settings: Settings, tmp_path: Path) -> None:
    first = language_settings(max_steps=20, save_steps=20, save_precision="fp32")
    seen = train(first)
    second = language_settings(
        output_dir=str(tmp_path / "second" / "run"), init_lora_weights=str(tmp_path / "run" / "run")
    )
    # Of an epoch, because the order follows from the older LoRA's content, which names where the base lies.
    assert fmean(losses(train(second))[:4]) < 0.97 * fmean(losses(seen)[:4])


@pytest.mark.fault(19)
def test_bad_rows_are_named_and_the_rest_trains(
    language_settings: Settings, dialogues: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = dialogues / "train.jsonl"
    file.write_text(file.read_text("utf-8") + '{"input": "broken\n', "utf-8")
    code, out, _ = train_by_command(language_settings(), tmp_path, capsys)
    assert code == 0
    assert "train.jsonl:17" in out
    assert "16 of 17 dialogues train" in out


@pytest.mark.fault(19)
def test_many_bad_rows_stop_the_run_with_the_list(
    language_settings: Settings, dialogues: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = dialogues / "train.jsonl"
    file.write_text(file.read_text("utf-8") + "no json\n" * 3, "utf-8")
    code, _, err = train_by_command(language_settings(), tmp_path, capsys)
    assert code == 2
    assert all(f"train.jsonl:{line}" in err for line in (17, 18, 19))
    assert not list((tmp_path / "run").glob("checkpoint-*"))


@pytest.mark.fault(22)
def test_base_model_of_the_other_task_is_refused(
    language_settings: Settings, settings: Settings, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code, _, err = train_by_command(language_settings(base_model="builtin:mini-sd"), tmp_path, capsys)
    assert code == 2
    assert "a model that makes pictures" in err
    assert "task_type: text-to-image" in err
    code, _, err = train_by_command(settings(base_model=language_settings()["base_model"]), tmp_path, capsys)
    assert code == 2
    assert "task_type: text-generation" in err


@pytest.mark.fault(22)
def test_gguf_file_is_refused_with_the_way_on(
    language_settings: Settings, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "model.gguf").write_bytes(b"GGUF" + bytes(100))
    code, _, err = train_by_command(language_settings(base_model=str(tmp_path / "model.gguf")), tmp_path, capsys)
    assert code == 2
    assert "GGUF" in err
    assert "safetensors" in err


def test_check_shows_lengths_and_what_is_learnt(
    language_settings: Settings, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    import yaml

    (tmp_path / "my.yaml").write_text(yaml.safe_dump(language_settings()), "utf-8")
    code, out, _ = command(capsys, "check", "--config", tmp_path / "my.yaml")
    assert code == 0
    assert "16 of 16 dialogues can be trained on." in out
    assert "[[0<|end|>]]" in out
    code, out, _ = command(capsys, "check", "--config", tmp_path / "my.yaml", "--json")
    told = json.loads(out)
    assert told["dialogues"] == {"total": 16, "trained": 16}
    assert any("learnt" in line for line in told["shown"])


def test_config_names_the_task_everywhere(language_settings: Settings) -> None:
    config = RunConfig.model_validate(language_settings())
    assert config.words.examples == "dialogues"
