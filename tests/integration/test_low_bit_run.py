"""Whole runs whose frozen layers multiply in 8 bits: how far their losses are from plain ones, what they leave, how they resume."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from helpers.commands import train as train_by_command
from helpers.seen import StopAfter, train
from lora_scripts.models import low_bit_layers

pytest.importorskip("torchao", reason="products in 8 bits need torchao")

Settings = Callable[..., dict[str, Any]]


@pytest.fixture(autouse=True)
def small_layers_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(low_bit_layers, "LEAST_WEIGHTS", 0)


@pytest.fixture
def pictures_run(settings: Settings, tmp_path: Path) -> Settings:
    def make(name: str, **changes: Any) -> dict[str, Any]:
        where = {"output_dir": str(tmp_path / name), "output_name": "run", "save_precision": "fp32"}
        return settings(**{"keep": "last", "mixed_precision": "fp32", **where, **changes})

    return make


@pytest.fixture
def texts_run(language_settings: Settings, tmp_path: Path) -> Settings:
    def make(name: str, **changes: Any) -> dict[str, Any]:
        where = {"output_dir": str(tmp_path / name), "output_name": "run", "save_precision": "fp32"}
        return language_settings(**{"keep": "last", "mixed_precision": "fp32", **where, **changes})

    return make


def losses(values: dict[str, Any]) -> list[float]:
    return [loss for report in train(values).reports for loss in report.losses]


def weights(values: dict[str, Any]) -> dict[str, torch.Tensor]:
    folder = Path(values["output_dir"])
    texts = folder / "run" / "adapter_model.safetensors"
    return load_file(texts if texts.is_file() else folder / "run.safetensors")


def assert_same_bits(one: dict[str, Any], other: dict[str, Any]) -> None:
    expected = weights(one)
    assert all(torch.equal(tensor, expected[name]) for name, tensor in weights(other).items())


@pytest.mark.parametrize(("kind", "most"), [("int8", 0.02), ("fp8", 0.05)])
@pytest.mark.parametrize("task", ["pictures_run", "texts_run"])
def test_losses_are_the_plain_ones_but_for_rounding(
    task: str, kind: str, most: float, request: pytest.FixtureRequest
) -> None:
    run: Settings = request.getfixturevalue(task)
    plain, low = losses(run("plain")), losses(run("low", low_bit_matmul=kind))
    differences = [abs(b - a) / a for a, b in zip(plain, low, strict=True)]
    assert max(differences) < most
    assert statistics.fmean(differences) > 1e-7, "nothing was rounded"


@pytest.mark.parametrize("kind", ["int8", "fp8"])
def test_the_finished_file_is_proved_on_the_plain_model(
    pictures_run: Settings, kind: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    values = pictures_run("run", low_bit_matmul=kind)
    code, out, error = train_by_command(values, tmp_path, capsys)
    assert code == 0, error
    assert f"frozen layers multiply in {kind} while training" in out
    assert "effect compared: the file changes the model's output as the training did" in out


@pytest.mark.parametrize(
    ("task", "changes"),
    [
        ("pictures_run", {"low_bit_matmul": "int8", "sample_every": 1, "sample_prompts": ["a cat"], "sample_steps": 1}),
        ("pictures_run", {"low_bit_matmul": "int8", "adapter": "lokr", "gradient_checkpointing": True}),
        ("texts_run", {"low_bit_matmul": "fp8", "mixed_precision": "bf16", "lora_dropout": 0.2, "adapter": "dora"}),
    ],
    ids=["previews", "checkpointing", "dropout, bf16"],
)
def test_run_that_was_stopped_ends_in_the_same_bits(
    task: str, changes: dict[str, Any], request: pytest.FixtureRequest
) -> None:
    run: Settings = request.getfixturevalue(task)
    whole, broken = run("whole", **changes), run("broken", **changes)
    train(whole)
    for step in (1, 4):
        train(broken, StopAfter(step))
    train(broken)
    assert_same_bits(whole, broken)


@pytest.mark.parametrize("changes", [{"cuda_graphs": True}, {"gradient_checkpointing": True}])
def test_other_settings_of_speed_change_nothing(pictures_run: Settings, changes: dict[str, Any]) -> None:
    alone, together = pictures_run("a", low_bit_matmul="int8"), pictures_run("b", low_bit_matmul="int8", **changes)
    assert losses(alone) == losses(together)
    assert_same_bits(alone, together)


def test_on_a_cpu_auto_is_the_plain_run_and_goes_on_as_one(pictures_run: Settings) -> None:
    plain, auto = pictures_run("plain"), pictures_run("auto", low_bit_matmul="auto")
    train(plain)
    train(auto, StopAfter(3))
    train(auto | {"low_bit_matmul": "none"})
    assert_same_bits(plain, auto)


def test_auto_goes_on_in_the_kind_in_which_a_run_began(pictures_run: Settings) -> None:
    written, auto = pictures_run("written", low_bit_matmul="int8"), pictures_run("auto", low_bit_matmul="int8")
    train(written)
    train(auto, StopAfter(3))
    train(auto | {"low_bit_matmul": "auto"})
    assert_same_bits(written, auto)


@pytest.mark.parametrize("other", ["fp8", "none"])
def test_run_does_not_go_on_in_another_kind(
    pictures_run: Settings, other: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    train(pictures_run("run", low_bit_matmul="int8"), StopAfter(2))
    code, _, error = train_by_command(pictures_run("run", low_bit_matmul=other), tmp_path, capsys)
    assert code == 2
    assert "low_bit_matmul" in error


def test_a_run_of_a_version_without_the_setting_goes_on(pictures_run: Settings) -> None:
    import json

    whole, broken = pictures_run("whole"), pictures_run("broken")
    train(whole)
    train(broken, StopAfter(2))
    path = Path(broken["output_dir"]) / "checkpoint-2" / "state.json"
    state = json.loads(path.read_text("utf-8"))
    del state["identity"]["low_bit_matmul"]
    path.write_text(json.dumps(state), "utf-8")
    train(broken | {"low_bit_matmul": "auto"})
    assert_same_bits(whole, broken)


def test_a_model_of_small_layers_says_that_nothing_is_gained(
    pictures_run: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.undo()
    seen = train(pictures_run("run", low_bit_matmul="int8"))
    assert "low_bit_matmul: int8: no frozen layer here is large enough to gain by it." in seen.notes
