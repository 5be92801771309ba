"""Whole runs with the settings of speed: the losses and files of a run without them, resumed ones too."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from helpers.seen import StopAfter, train
from lora_scripts import speeding
from lora_scripts.config import RunConfig
from lora_scripts.training import compiling, speed
from lora_scripts.training.events import Listener
from lora_scripts.training.recorded import RecordedPasses

Settings = Callable[..., dict[str, Any]]


def losses(values: dict[str, Any], *more: Listener) -> list[float]:
    return [loss for report in train(values, *more).reports for loss in report.losses]


def weights(values: dict[str, Any]) -> dict[str, torch.Tensor]:
    return load_file(Path(values["output_dir"]) / "run.safetensors")


@pytest.fixture
def named(settings: Settings, tmp_path: Path) -> Callable[..., dict[str, Any]]:
    def make(name: str, **changes: Any) -> dict[str, Any]:
        folders = {"output_dir": str(tmp_path / name), "output_name": "run", "save_precision": "fp32"}
        return settings(**folders, batch_size=1, gradient_accumulation_steps=2, keep="last", **changes)

    return make


@pytest.mark.parametrize("changes", [{}, {"train_text_encoder": True}], ids=["U-Net", "text encoder"])
def test_a_run_with_static_buffers_is_the_plain_run_to_the_bit(
    named: Callable[..., dict[str, Any]], changes: dict[str, Any]
) -> None:
    plain, static = named("plain", **changes), named("static", cuda_graphs=True, **changes)
    assert losses(plain) == losses(static)
    expected = weights(plain)
    assert all(torch.equal(tensor, expected[name]) for name, tensor in weights(static).items())


@pytest.fixture
def recordings(monkeypatch: pytest.MonkeyPatch) -> list[RecordedPasses]:
    """The recorded passes of runs that are started from now on, however short they are."""
    made: list[RecordedPasses] = []

    class Kept(RecordedPasses):
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **kwargs)
            made.append(self)

    monkeypatch.setattr(speed, "RecordedPasses", Kept)
    monkeypatch.setattr(speeding, "WORTH_RECORDING", 1)
    return made


PRIOR = {"prior_preservation_weight": 0.5, "prior_prompt": "a drawing"}


@pytest.mark.parametrize(
    "changes",
    [{}, {"mixed_precision": "bf16"}, {"train_text_encoder": True}, {"train_text_encoder": True, **PRIOR}],
    ids=["fp32", "bf16", "text encoder", "prior"],
)
def test_a_run_with_recorded_passes_is_the_plain_run_to_the_bit(
    named: Callable[..., dict[str, Any]], recordings: list[RecordedPasses], changes: dict[str, Any]
) -> None:
    plain, recorded = named("plain", record_passes=False, **changes), named("recorded", **changes)
    expected_losses, expected = losses(plain), weights(plain)
    assert not recordings
    assert losses(recorded) == expected_losses
    assert all(torch.equal(tensor, expected[name]) for name, tensor in weights(recorded).items())
    assert [each.fault for each in recordings] == [None]
    assert recordings[0].num_proven >= 1


def test_passes_that_draw_random_numbers_are_not_recorded(
    named: Callable[..., dict[str, Any]], recordings: list[RecordedPasses]
) -> None:
    train(named("dropout", lora_dropout=0.1))
    assert not recordings


def test_a_run_may_go_on_with_other_settings_of_speed(named: Callable[..., dict[str, Any]]) -> None:
    plain, resumed = named("plain"), named("resumed", cuda_graphs=True)
    train(plain)
    train(resumed, StopAfter(3))
    train(resumed | {"cuda_graphs": False})
    expected = weights(plain)
    assert all(torch.equal(tensor, expected[name]) for name, tensor in weights(resumed).items())


def test_without_a_compiler_the_run_says_so_once_and_is_the_plain_one(
    named: Callable[..., dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(compiling, "compiler_fault", lambda device: "no C++ compiler was found")
    plain, asked = named("plain"), named("asked", compile=True)
    seen = train(asked)
    told = [note for note in seen.notes if note.startswith("compile:")]
    assert told == ["compile: nothing can be compiled here (no C++ compiler was found); the run goes on without."]
    assert losses(plain) == [loss for report in seen.reports for loss in report.losses]


@pytest.mark.parametrize(
    ("other", "reason"),
    [
        ({"lora_dropout": 0.1}, "lora_dropout"),
        ({"gradient_checkpointing": True}, "gradient_checkpointing"),
    ],
)
def test_what_a_graph_cannot_repeat_is_refused(settings: Settings, other: dict[str, Any], reason: str) -> None:
    with pytest.raises(ValueError, match=f"cuda_graphs: true: not with {reason}"):
        RunConfig.model_validate(settings(cuda_graphs=True, **other))
