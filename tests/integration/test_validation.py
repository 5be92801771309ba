"""Held-out pictures, the validation loss and the choice of the finished step, in whole runs on a tiny model."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from conftest import draw_pictures
from helpers.seen import train
from lora_scripts.training.record import read_record

Settings = Callable[..., dict[str, Any]]


@pytest.fixture
def twelve(settings: Settings, tmp_path: Path) -> Settings:
    """Settings of a run on twelve pictures, two of them held out and measured at every second step."""
    folder = draw_pictures(tmp_path / "twelve", 12)

    def make(**changes: Any) -> dict[str, Any]:
        return settings(**{"train_data_dir": str(folder), "validate_every": 2, "buckets": False} | changes)

    return make


def weights(values: dict[str, Any], step: int) -> dict[str, torch.Tensor]:
    return load_file(Path(values["output_dir"]) / f"checkpoint-{step}" / "adapter.safetensors")


def equal(left: dict[str, torch.Tensor], right: dict[str, torch.Tensor]) -> bool:
    return left.keys() == right.keys() and all(torch.equal(left[key], right[key]) for key in left)


@pytest.mark.parametrize("optimizer", ["adamw", "adamw_schedulefree"])
def test_measuring_changes_no_bit_of_the_weights(twelve: Settings, tmp_path: Path, optimizer: str) -> None:
    changes = {"lora_dropout": 0.2, "caption_dropout": 0.3, "flip": True, "optimizer": optimizer}
    measured = twelve(output_dir=str(tmp_path / "a" / "run"), **changes)
    blind = twelve(output_dir=str(tmp_path / "b" / "run"), **changes | {"validate_every": 0})
    assert [each.step for each in train(measured).validations] == [0, 2, 4, 6]
    assert train(blind).validations == []
    assert equal(weights(measured, 6), weights(blind, 6))


def test_resumed_run_has_the_same_measurements(twelve: Settings, tmp_path: Path) -> None:
    from integration.test_training_run import StopAfter

    whole = twelve(output_dir=str(tmp_path / "a" / "run"))
    broken = twelve(output_dir=str(tmp_path / "b" / "run"))
    expected = train(whole).validations
    parts = [*train(broken, StopAfter(3)).validations, *train(broken).validations]
    assert parts == expected
    for values in (whole, broken):
        assert read_record(Path(values["output_dir"]) / "record.jsonl").validations == expected
    assert equal(weights(whole, 6), weights(broken, 6))


def test_min_snr_and_noise_offset_leave_the_first_measurement_alone(twelve: Settings, tmp_path: Path) -> None:
    plain = train(twelve(output_dir=str(tmp_path / "a"), max_steps=2, min_snr_gamma=0)).validations[0]
    weighted = train(
        twelve(output_dir=str(tmp_path / "b"), max_steps=2, min_snr_gamma=5.0, noise_offset=0.1)
    ).validations[0]
    assert plain == weighted


DIVERGING = {
    # The rate climbs to far too much, on the layer whose output is the prediction itself.
    "target_modules": ["conv_out"],
    "learning_rate": 1.0,
    "lr_scheduler": "constant_with_warmup",
    "validation_pictures": 4,
}


@pytest.mark.fault(12)
def test_diverging_run_exports_an_earlier_step_that_was_better(twelve: Settings) -> None:
    values = twelve(**DIVERGING, warmup_steps=11, max_steps=12, save_steps=2, keep_checkpoints=1)
    seen = train(values)
    assert seen.validations[-1].loss > 2 * seen.validations[0].loss
    (why,) = [note for note in seen.notes if "is the finished file" in note]
    assert "not the last one (12)" in why
    chosen = int(why.split()[1])
    out = Path(values["output_dir"])
    exported, step_file = (
        load_file(out / "run.safetensors"),
        load_file(out / f"checkpoint-{chosen}" / f"run-{chosen}.safetensors"),
    )
    assert equal(exported, step_file)
    with safe_open(out / "run.safetensors", "pt") as file:
        assert file.metadata()["ss_steps"] == str(chosen)


def test_keep_last_exports_the_last_step(twelve: Settings) -> None:
    values = twelve(**DIVERGING, warmup_steps=5, keep="last")
    train(values)
    out = Path(values["output_dir"])
    assert equal(load_file(out / "run.safetensors"), load_file(out / "checkpoint-6" / "run-6.safetensors"))


def test_early_stopping_ends_well_and_stays_ended(twelve: Settings) -> None:
    values = twelve(**DIVERGING, warmup_steps=11, max_steps=40, save_steps=2, early_stopping=3)
    seen = train(values)
    assert any(note.startswith("Early stopping after step") for note in seen.notes)
    assert seen.validations[-1].step < 40
    assert (Path(values["output_dir"]) / "run.safetensors").is_file()
    assert train(values).validations == []
