"""Whole runs on pairs of answers: what is learnt, how they resume, what is refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from helpers.commands import command
from helpers.commands import train as train_by_command
from helpers.seen import Seen, StopAfter, train
from lora_scripts.config import RunConfig
from lora_scripts.errors import DataError

Settings = Callable[..., dict[str, Any]]
LN_2 = 0.6931


@pytest.fixture
def settings(language_settings: Settings, tmp_path: Path) -> Settings:
    """A run on sixteen pairs."""
    folder = tmp_path / "pairs"
    folder.mkdir()
    rows = [
        {"prompt": f"{n} and {n}?", "chosen": f"{2 * n}, my friend", "rejected": f"no idea{'!' * (n % 3)}"}
        for n in range(16)
    ]
    (folder / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")

    def make(**changes: Any) -> dict[str, Any]:
        values = {"train_data_dir": str(folder), "objective": "dpo", "validation_dialogues": 0}
        return language_settings(**values | changes)

    return make


def losses(seen: Seen) -> list[float]:
    return [loss for report in seen.reports for loss in report.losses]


def finished(values: dict[str, Any]) -> dict[str, torch.Tensor]:
    return load_file(Path(values["output_dir"]) / "run" / "adapter_model.safetensors")


def test_dpo_learns_which_answer_is_preferred(
    settings: Settings, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    values = settings(max_steps=20, save_steps=20, validation_dialogues=4, validate_every=20)
    code, out, error = train_by_command(values, tmp_path, capsys)
    assert code == 0, error
    assert "dpo, beta 0.1" in out
    assert "pairs/s" in out
    assert "16 of 16 dialogues train." in out
    assert "validation loss 0.6931 on held-out dialogues" in out
    record = (Path(values["output_dir"]) / "record.jsonl").read_text("utf-8")
    held_out = [row["held_out"] for row in map(json.loads, record.splitlines()) if "held_out" in row]
    assert all(loss == pytest.approx(LN_2, abs=1e-3) for loss in held_out[0])
    assert all(loss < LN_2 / 2 for loss in held_out[-1])
    card = (Path(values["output_dir"]) / "run" / "README.md").read_text("utf-8")
    assert "Of two answers each, by DPO with beta 0.1." in card


def test_orpo_learns_the_answer_and_the_preference(settings: Settings) -> None:
    found = losses(train(settings(objective="orpo", max_steps=30, save_steps=30)))
    assert sum(found[-5:]) < 0.95 * sum(found[:5])


@pytest.mark.parametrize("objective", ["dpo", "orpo"])
def test_run_that_was_stopped_ends_in_the_same_bits(settings: Settings, tmp_path: Path, objective: str) -> None:
    whole = settings(output_dir=str(tmp_path / "whole" / "run"), lora_dropout=0.2, objective=objective)
    train(whole)
    broken = whole | {"output_dir": str(tmp_path / "broken" / "run"), "cache_dir": str(tmp_path / "another cache")}
    for step in (1, 4):
        train(broken, StopAfter(step))
    train(broken)
    theirs = finished(broken)
    assert all(torch.equal(tensor, theirs[name]) for name, tensor in finished(whole).items())


@pytest.mark.parametrize(
    "changes",
    [
        {"batch_size": 1, "gradient_accumulation_steps": 4},
        {"gradient_checkpointing": True},
        {"batch_size": "auto", "effective_batch": 4},
    ],
    ids=["accumulated", "checkpointed", "auto"],
)
def test_how_a_step_is_computed_changes_nothing(settings: Settings, tmp_path: Path, changes: dict[str, Any]) -> None:
    expected = losses(train(settings(output_dir=str(tmp_path / "a"))))
    seen = train(settings(output_dir=str(tmp_path / "b"), **changes))
    assert losses(seen) == pytest.approx(expected, rel=1e-4)
    assert not any("cannot be predicted" in note for note in seen.notes)


def test_padded_pairs_train_too(settings: Settings) -> None:
    found = losses(train(settings(packing=False, max_steps=20, save_steps=20)))
    assert found[0] == pytest.approx(LN_2, abs=1e-3)
    assert found[-1] < LN_2 / 2


def test_quantised_model_is_its_own_reference(settings: Settings) -> None:
    pytest.importorskip("bitsandbytes", reason="quantised models need bitsandbytes")
    found = losses(train(settings(quantization="nf4", max_steps=20, save_steps=20)))
    assert found[0] == pytest.approx(LN_2, abs=1e-3)
    assert found[-1] < LN_2 / 2


def test_rows_and_objective_that_do_not_fit_are_refused(
    settings: Settings, dialogues: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(DataError, match=r"set objective: dpo or orpo, or keep the chosen one alone"):
        train(settings(objective="sft"))
    with pytest.raises(DataError, match=r'has no "chosen" and "rejected" answer'):
        train(settings(train_data_dir=str(dialogues)))
    for changes, message in (
        ({"train_on": "all"}, "train_on: has no effect because objective is dpo"),
        ({"objective": "sft", "preference_beta": 0.2}, "preference_beta: has no effect because objective is sft"),
    ):
        with pytest.raises(ValueError, match=message):
            RunConfig.model_validate(settings(**changes))


def test_check_reads_pairs(settings: Settings, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    import yaml

    config = tmp_path / "my.yaml"
    config.write_text(yaml.safe_dump(settings()), "utf-8")
    code, out, error = command(capsys, "check", "--config", config)
    assert code == 0, error
    assert "16" in out
