"""Faults in the numbers of a run: what is refused, what stays as it was, what the user is told."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Collection
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from helpers.seen import train
from lora_scripts.errors import TrainingError
from lora_scripts.families.sd15 import StableDiffusion15
from lora_scripts.training.checkpoint import load_checkpoint
from lora_scripts.training.record import read_record

Settings = Callable[..., dict[str, Any]]


def spoil(monkeypatch: pytest.MonkeyPatch, steps: Collection[int], factor: float) -> None:
    """Multiplies the loss, and so its gradient, of these calls (one per step here), counted from 0."""
    calls = iter(range(10**9))
    honest = StableDiffusion15.loss

    def loss(self: StableDiffusion15, *arguments: Any) -> Any:
        result = honest(self, *arguments)
        return replace(result, total=result.total * factor) if next(calls) in steps else result

    monkeypatch.setattr(StableDiffusion15, "loss", loss)


def state(values: dict[str, Any], step: int) -> dict[str, torch.Tensor]:
    """Weights and moments of a saved step."""
    folder = Path(values["output_dir"]) / f"checkpoint-{step}"
    moments = {f"moments/{k}": v for k, v in load_file(folder / "optimizer.safetensors").items()}
    return load_file(folder / "adapter.safetensors") | moments


def equal(left: dict[str, torch.Tensor], right: dict[str, torch.Tensor]) -> bool:
    return left.keys() == right.keys() and all(torch.equal(left[key], right[key]) for key in left)


def one_per_step(settings: Settings, **changes: Any) -> dict[str, Any]:
    """Equal shapes, so that every step is one call of the loss."""
    return settings(buckets=False, save_steps=1, **changes)


@pytest.mark.fault(9)
@pytest.mark.parametrize("factor", [math.nan, math.inf])
def test_step_without_finite_numbers_changes_no_weight_and_no_moment(
    settings: Settings, monkeypatch: pytest.MonkeyPatch, factor: float
) -> None:
    values = one_per_step(settings, max_steps=4)
    spoil(monkeypatch, {2}, factor)
    seen = train(values)
    assert equal(state(values, 2), state(values, 3))
    assert not equal(state(values, 3), state(values, 4))
    assert seen.reports[2].loss_smoothed == seen.reports[1].loss_smoothed
    (line,) = [note for note in seen.notes if note.startswith("Step 3:")]
    assert "not a finite number" in line
    assert line.count(".png") == 2  # the pictures of that step
    history = read_record(Path(values["output_dir"]) / "record.jsonl")
    assert line in [note.text for note in history.notes]
    assert math.isnan(history.losses[2])


@pytest.mark.fault(11)
def test_loss_spike_of_20_is_left_out_and_pollutes_nothing(settings: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    values = one_per_step(settings, max_steps=20, learning_rate=1e-4)
    spoil(monkeypatch, {18}, 20.0)
    seen = train(values)
    assert equal(state(values, 18), state(values, 19))
    assert seen.reports[18].loss_smoothed == seen.reports[17].loss_smoothed
    assert any("Step 19: the loss is" in note and ".png" in note for note in seen.notes)


@pytest.mark.fault(9)
def test_three_bad_steps_go_back_and_lower_the_rate_once(settings: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    values = settings(buckets=False, max_steps=8, save_steps=2, lr_scheduler="constant")
    spoil(monkeypatch, {3, 4, 5}, math.nan)  # steps 4, 5 and 6, the first time they are taken; step 4 is saved
    seen = train(values)
    assert any("Back to the state after step 4; the learning rate is now 0.5" in note for note in seen.notes)
    assert seen.reports[-1].step == 8
    assert seen.reports[-1].learning_rates["unet"] == pytest.approx(0.5e-2)
    history = read_record(Path(values["output_dir"]) / "record.jsonl")
    assert history.steps == list(range(1, 9))
    assert [math.isnan(loss) for loss in history.losses] == [False, False, False, True, False, False, False, False]
    assert [report.step for report in history.reports] == list(range(1, 9))


def test_losses_of_pictures_are_those_of_taken_steps_whatever_happened_between(
    settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    values = settings(buckets=False, max_steps=8, save_steps=2)
    spoil(monkeypatch, {3, 4, 5}, math.nan)  # the run goes back to step 4, which itself was left out
    train(values)
    assert num_losses(values, 4) == 2 * 3
    assert num_losses(values, 8) == 2 * 7


def num_losses(values: dict[str, Any], step: int) -> int:
    """How many losses of single pictures a saved step has collected."""
    checkpoint = load_checkpoint(Path(values["output_dir"]) / f"checkpoint-{step}")
    assert checkpoint is not None
    collected = checkpoint.loop["picture_losses"]
    number: int = sum(count for count, *_ in collected["bins"])
    assert number == sum(int(word) for row in collected["counts"] for word in row.split())
    return number


@pytest.mark.fault(9)
def test_bad_steps_also_at_the_lower_rate_end_the_run_with_the_reason(
    settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    values = settings(buckets=False, max_steps=40, save_steps=2)
    spoil(monkeypatch, range(2, 10**6), math.nan)
    with pytest.raises(
        TrainingError,
        match=r"(?s)Training ended at step 7: the loss is not a finite.*LoRA of step 6 is good.*checkpoint-6",
    ):
        train(values)
    assert TrainingError.exit_code == 2
    saved = load_file(Path(values["output_dir"]) / "checkpoint-6" / "run-6.safetensors")
    assert all(bool(torch.isfinite(value).all()) for value in saved.values())
    assert not (Path(values["output_dir"]) / "run.safetensors").exists()


def test_run_resumed_amid_anomalies_gives_the_same_bits(
    settings: Settings, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    from integration.test_training_run import StopAfter

    bad = {"1/0/03.png", "2/0/05.png"}  # epoch/repeat/picture: whoever trains on these has no finite loss
    honest = StableDiffusion15.loss

    def loss(self: StableDiffusion15, batch: Any, draws: Any) -> Any:
        result = honest(self, batch, draws)
        return replace(result, total=result.total * math.nan) if bad & set(batch.keys) else result

    monkeypatch.setattr(StableDiffusion15, "loss", loss)
    whole = one_per_step(settings, output_dir=str(tmp_path / "a" / "run"), max_steps=14)
    broken = one_per_step(settings, output_dir=str(tmp_path / "b" / "run"), max_steps=14)
    train(whole)
    for step in (5, 7, 11):
        train(broken, StopAfter(step))
    train(broken)
    assert equal(state(whole, 14), state(broken, 14))
    numbers = [
        json.loads((Path(v["output_dir"]) / "checkpoint-14" / "state.json").read_text("utf-8"))["loop"]
        for v in (whole, broken)
    ]
    assert numbers[0] == numbers[1]
    assert numbers[0]["guard"]["num_refused"] == 2
