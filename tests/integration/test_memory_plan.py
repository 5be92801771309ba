"""Settings on auto: what is chosen, that the result is that of the written numbers, that a resumed run keeps them."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from conftest import draw_pictures
from helpers.seen import StopAfter, train
from lora_scripts.config import RunConfig
from lora_scripts.errors import ConfigError, ResumeError
from lora_scripts.families.sd15 import StableDiffusion15
from lora_scripts.planning import fit_memory, passes, trial_pass
from lora_scripts.training.memory import MemoryReading

Settings = Callable[..., dict[str, Any]]


class Written(NamedTuple):
    """A finished run: its file's weights and its validation losses."""

    weights: dict[str, torch.Tensor]
    held_out: list[Sequence[float]]


# The tiny model takes about 0.2 MB, and 0.38 MB for each picture of a pass; with checkpointing 0.15 MB.
SPLITS = {0.0013: (2, 2, False), 0.00075: (1, 4, False), 0.00045: (1, 4, True), 1.0: (4, 1, False)}
"""memory_limit_gb -> batch_size, gradient_accumulation_steps, gradient_checkpointing, for four pictures per step."""


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same pictures for all runs of this file, so that they are encoded once."""
    return draw_pictures(tmp_path_factory.mktemp("data") / "pictures", 8)


@pytest.fixture(scope="module")
def make(tiny_sd_folder: Path, pictures: Path) -> Settings:
    def make(output_dir: Path, **changes: Any) -> dict[str, Any]:
        values: dict[str, Any] = {
            "train_data_dir": str(pictures),
            "base_model": str(tiny_sd_folder),
            "output_dir": str(output_dir / "run"),
            "lora_rank": 2,
            "max_steps": 4,
            "save_steps": 2,
            "log_steps": 1,
            "learning_rate": 1e-2,
            "sample_every": 0,
            "device": "cpu",
            "resolution": 64,
            "batch_size": "auto",
            "validation_pictures": 2,
            "validate_every": 2,
            "save_precision": "fp32",
            "lora_dropout": 0.1,
        }
        return values | changes

    return make


@pytest.fixture
def auto(make: Settings, tmp_path: Path) -> Settings:
    """Settings of a run with `batch_size: auto` in a folder of the test's own."""
    return lambda folder="auto", **changes: make(tmp_path / folder, **changes)


@pytest.fixture(scope="module")
def by_hand(make: Settings, tmp_path_factory: pytest.TempPathFactory) -> Callable[[float], Written]:
    """Unbroken runs with the numbers of `SPLITS` written out, each trained once."""

    @cache
    def trained(limit: float) -> Written:
        size, passes, checkpointing = SPLITS[limit]
        numbers = {"batch_size": size, "gradient_accumulation_steps": passes, "gradient_checkpointing": checkpointing}
        values = make(tmp_path_factory.mktemp("written"), **numbers)
        seen = train(values)
        return Written(result(values), [v.held_out for v in seen.validations])

    return trained


def result(values: dict[str, Any]) -> dict[str, torch.Tensor]:
    return load_file(Path(values["output_dir"]) / "run.safetensors")


def equal(left: dict[str, torch.Tensor], right: dict[str, torch.Tensor]) -> bool:
    return left.keys() == right.keys() and all(torch.equal(left[key], right[key]) for key in left)


def in_force(values: dict[str, Any]) -> dict[str, Any]:
    """The settings as the run's record holds them, for the report."""
    lines = (Path(values["output_dir"]) / "record.jsonl").read_text("utf-8").splitlines()
    return next(event for event in map(json.loads, lines) if event["event"] == "started")["settings"]


def sizes_of_passes(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The number of pictures in every real forward pass that is trained on."""
    plain, sizes = StableDiffusion15.loss, []

    def loss(self: Any, batch: Any, draws: Any) -> Any:
        if torch.is_grad_enabled() and type(next(iter(batch.tensors.values()))) is torch.Tensor:
            sizes.append(len(batch))
        return plain(self, batch, draws)

    monkeypatch.setattr(StableDiffusion15, "loss", loss)
    return sizes


@pytest.mark.parametrize("limit", list(SPLITS))
def test_run_with_auto_is_the_run_with_the_chosen_numbers_written(
    auto: Settings, by_hand: Callable[[float], Written], limit: float
) -> None:
    values = auto(memory_limit_gb=limit)
    seen = train(values)
    assert equal(result(values), by_hand(limit).weights)
    assert [v.held_out for v in seen.validations] == by_hand(limit).held_out
    names = ("batch_size", "gradient_accumulation_steps", "gradient_checkpointing")
    assert tuple(in_force(values)[name] for name in names) == SPLITS[limit]


def test_plan_is_said_at_the_start_and_stands_in_the_report_and_the_file(auto: Settings) -> None:
    values = auto(memory_limit_gb=0.0013)
    (line,) = [note for note in train(values).notes if note.startswith("Memory:")]
    assert line == "Memory: predicted 1 MB of 1 MB usable; batch 4 as 2 passes of 2, checkpointing off."
    out = Path(values["output_dir"])
    assert "batch 4 as 2 passes of 2, checkpointing off" in (out / "report.html").read_text("utf-8")
    assert line in (out / "train.log").read_text("utf-8")
    with safe_open(out / "run.safetensors", "pt") as file:
        header = file.metadata()
    assert (header["ss_batch_size_per_device"], header["ss_gradient_accumulation_steps"]) == ("2", "2")


def test_passes_are_as_large_as_chosen(auto: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = sizes_of_passes(monkeypatch)
    train(auto(memory_limit_gb=0.0013, effective_batch=6, buckets=False, max_steps=2))
    assert sizes == [2, 2, 2, 2, 2, 2]


@pytest.mark.parametrize(("began", "resumed"), [(0.0013, 1.0), (0.00045, 1.0), (1.0, 0.00045)])
def test_resumed_run_keeps_what_was_chosen_at_its_start(
    auto: Settings, by_hand: Callable[[float], Written], began: float, resumed: float
) -> None:
    values = auto(memory_limit_gb=began)
    train(values, StopAfter(2))
    notes = train(values | {"memory_limit_gb": resumed}).notes
    assert equal(result(values), by_hand(began).weights)
    size, passes, checkpointing = SPLITS[began]
    split = "in one pass" if passes == 1 else f"as {passes} passes of {size}"
    assert f"Memory: as this run began; batch 4 {split}, checkpointing {'on' if checkpointing else 'off'}." in notes


def test_run_begun_with_auto_goes_on_with_the_numbers_written(
    auto: Settings, by_hand: Callable[[float], Written]
) -> None:
    values = auto(memory_limit_gb=0.0013)
    train(values, StopAfter(2))
    train(auto(batch_size=2, gradient_accumulation_steps=2))
    assert equal(result(values), by_hand(0.0013).weights)


def test_number_format_on_auto_goes_on_as_it_began(auto: Settings) -> None:
    whole, broken = (auto(folder, batch_size=2, mixed_precision="bf16") for folder in ("whole", "broken"))
    train(whole)
    train(broken, StopAfter(2))
    train(broken | {"mixed_precision": "auto"})  # this model would begin in fp32
    assert equal(result(whole), result(broken))


def test_other_number_of_pictures_per_step_is_another_run(auto: Settings) -> None:
    values = auto(max_steps=2)
    train(values, StopAfter(1))
    with pytest.raises(ResumeError, match="batch_size: was 4, is now 6"):
        train(values | {"effective_batch": 6})


def test_effective_batch_is_the_default_times_the_written_accumulation(auto: Settings) -> None:
    assert RunConfig.model_validate(auto(gradient_accumulation_steps=2)).step_size == 8
    assert RunConfig.model_validate(auto()).step_size == 4
    assert RunConfig.model_validate(auto(effective_batch=6)).step_size == 6
    assert RunConfig.model_validate(auto(batch_size=3, gradient_accumulation_steps=2)).step_size == 6


def test_memory_that_is_too_small_is_said_and_the_run_starts_all_the_same(auto: Settings) -> None:
    notes = train(auto(memory_limit_gb=0.0001, max_steps=1)).notes
    assert any("which is too little; batch 4 as 4 passes of 1, checkpointing on" in note for note in notes)


def test_model_that_cannot_be_predicted_trains_all_the_same(auto: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    plain = StableDiffusion15.loss

    def loss(self: Any, batch: Any, draws: Any) -> Any:
        if type(next(iter(batch.tensors.values()))) is not torch.Tensor:
            raise RuntimeError("no such kernel for fake tensors")
        return plain(self, batch, draws)

    monkeypatch.setattr(StableDiffusion15, "loss", loss)
    notes = train(auto(max_steps=1)).notes
    assert (
        "Memory: cannot be predicted for this model (no such kernel for fake tensors); batch 4 in one pass, checkpointing off."
        in notes
    )


def test_passes_that_run_out_of_memory_in_the_trial_are_not_chosen(
    auto: Settings, by_hand: Callable[[float], Written], monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = StableDiffusion15.loss

    def loss(self: Any, batch: Any, draws: Any) -> Any:
        if len(batch) > 2 and type(next(iter(batch.tensors.values()))) is torch.Tensor:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
        return plain(self, batch, draws)

    monkeypatch.setattr(StableDiffusion15, "loss", loss)
    # A CPU keeps no peak of a single pass, so the reading is made up; the passes are real.
    monkeypatch.setattr(fit_memory, "can_measure", lambda device: True)
    monkeypatch.setattr(trial_pass, "memory_now", lambda device: MemoryReading(0, 700_000, "cuda"))
    values = auto(memory_limit_gb=1.0)
    notes = train(values).notes
    assert any("batch 4 as 2 passes of 2, checkpointing off" in note for note in notes)
    assert not any("Out of memory" in note for note in notes)
    monkeypatch.undo()
    assert equal(result(values), by_hand(0.0013).weights)


def test_run_takes_over_what_the_check_before_it_has_chosen(
    auto: Settings, by_hand: Callable[[float], Written], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lora_scripts.preflight.before_run.is_measured", lambda device, goes_on: True)
    plain, asked = passes.trace_pass, []

    def counted(loss: Any, batch: Any, parameters: Any) -> Any:
        asked.append(len(batch))
        return plain(loss, batch, parameters)

    monkeypatch.setattr(passes, "trace_pass", counted)
    values = auto(memory_limit_gb=0.0013)
    notes = train(values).notes
    assert len(asked) == len(set(asked))
    assert [note for note in notes if note.startswith("Memory:")] == [
        "Memory: predicted 1 MB of 1 MB usable; batch 4 as 2 passes of 2, checkpointing off."
    ]
    assert equal(result(values), by_hand(0.0013).weights)


def test_a_small_data_set_trains_whatever_the_effective_batch(auto: Settings, pictures: Path) -> None:
    values = auto(effective_batch=64, max_steps=2, save_steps=1)
    train(values, StopAfter(1))
    train(values)
    assert (Path(values["output_dir"]) / "run.safetensors").is_file()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"batch_size": 4, "effective_batch": 8}, "effective_batch: has no effect because batch_size is a number"),
        ({"effective_batch": 8, "gradient_accumulation_steps": 2}, "gradient_accumulation_steps: has no effect"),
        ({"batch_size": 4, "gradient_checkpointing": True, "memory_limit_gb": 8}, "memory_limit_gb: has no effect"),
    ],
)
def test_settings_that_contradict_each_other_are_refused(auto: Settings, changes: dict[str, Any], message: str) -> None:
    from lora_scripts.config_file import make_config

    with pytest.raises(ConfigError, match=message):
        make_config(auto(**changes), "test")
