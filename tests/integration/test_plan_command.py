"""`plan`: predictions from a config alone, held against what a run's own planner says and what a run then does."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from helpers.commands import Answer, command
from helpers.seen import train
from lora_scripts.attaching import attach_adapter
from lora_scripts.config import RunConfig
from lora_scripts.data.training_data import TrainingData
from lora_scripts.families import family_class
from lora_scripts.families.causal_lm import CausalLanguageModel
from lora_scripts.models import low_bit_layers
from lora_scripts.models.source import resolve_base_model
from lora_scripts.planning.passes import Passes
from lora_scripts.tasks import task_of
from lora_scripts.training.events import Events

Settings = Callable[..., dict[str, Any]]
Plan = Callable[..., Answer]


@pytest.fixture
def plan(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Plan:
    """`plan` on these settings, with options as on the command line."""

    def run(values: dict[str, Any], *options: object) -> Answer:
        (tmp_path / "my.yaml").write_text(yaml.safe_dump(values), "utf-8")
        return command(capsys, "plan", tmp_path / "my.yaml", *options)

    return run


def told(answer: Answer) -> dict[str, Any]:
    return json.loads(answer[1])


def loaded_passes(values: dict[str, Any]) -> Passes:
    """What a run has in its hands when it makes its plan: the real model, the real data."""
    config, device = RunConfig.model_validate(values), torch.device("cpu")
    source = resolve_base_model(config.base_model)
    family = family_class(source.family).load(source, config, device, torch.float32)
    prepared = task_of(config).prepare(family, device, Events(), lambda what, done, total: None, True)
    data: TrainingData = prepared.parts.train
    return Passes(config, family, attach_adapter(family, config, Events()), data, device)


@pytest.mark.parametrize("settings_of", ["language_settings", "settings"], ids=["dialogues", "pictures"])
@pytest.mark.parametrize("checkpointing", [False, True], ids=["kept", "checkpointed"])
def test_plan_without_weights_is_that_of_the_loaded_model(
    settings_of: str, checkpointing: bool, plan: Plan, request: pytest.FixtureRequest
) -> None:
    values = request.getfixturevalue(settings_of)(
        gradient_checkpointing=checkpointing, batch_size=2, gradient_accumulation_steps=2, mixed_precision="fp32"
    )
    answer = told(plan(values, "--json"))
    assert answer["memory"]["peak_bytes"] == loaded_passes(values).needs.total(2, checkpointing, accumulation=2)
    assert answer["memory"]["peak_bytes"] == sum(answer["memory"]["terms"].values())
    assert answer["gradient_checkpointing"] is checkpointing


def test_no_weight_is_read(language_settings: Settings, plan: Plan, monkeypatch: pytest.MonkeyPatch) -> None:
    import safetensors

    def refuse(*arguments: Any, **named: Any) -> Any:
        raise AssertionError("a weight was read")

    monkeypatch.setattr(CausalLanguageModel, "load", refuse)
    monkeypatch.setattr("transformers.PreTrainedModel.from_pretrained", refuse)
    monkeypatch.setattr(safetensors, "safe_open", refuse)
    assert plan(language_settings())[0] == 0


def test_built_in_single_file_is_planned_from_its_header(settings: Settings, plan: Plan) -> None:
    code, out, _ = plan(settings(base_model="builtin:mini-sd.safetensors", resolution=64, lora_rank=2))
    assert code == 0
    assert out.startswith("Fits: ")


def test_steps_and_tokens_are_those_of_the_run(language_settings: Settings, plan: Plan) -> None:
    values = language_settings(max_steps=None, epochs=2, save_steps=100)
    answer = told(plan(values, "--json"))["work"]
    seen = train(values)
    assert answer["steps"] == seen.reports[-1].max_steps
    text = next(note for note in seen.notes if "tokens;" in note)  # "16 examples of 321 tokens; ..."
    per_epoch = int(text.split(" of ")[1].split(" tokens")[0].replace(",", ""))
    assert answer["tokens"] == pytest.approx(2 * per_epoch, rel=0.1)  # less what is held out
    assert answer["seconds_at_least"] == pytest.approx(answer["flops"] / answer["flops_per_s"])
    # The run is over, so nothing is left to do.
    assert told(plan(values, "--json"))["work"]["steps"] == 0


def test_tokens_are_counted_once_and_then_come_from_the_cache(language_settings: Settings, plan: Plan) -> None:
    assert "tokenised now, and kept for the run" in plan(language_settings())[1]
    assert "from the cache" in plan(language_settings())[1]


def test_another_card_that_is_too_small_is_told_what_makes_it_fit(language_settings: Settings, plan: Plan) -> None:
    values = language_settings(batch_size=4, gradient_checkpointing=False)
    roomy = told(plan(values, "--memory-gb", 8, "--json"))
    assert roomy["fits"]
    assert not roomy["changes"]
    assert roomy["work"]["seconds_at_least"] is None  # of another machine nothing was measured
    gigabytes = (roomy["memory"]["peak_bytes"] - 20_000) / 0.92e9
    code, out, _ = plan(values, "--memory-gb", gigabytes)
    assert code == 2
    assert out.splitlines()[0].startswith("Does not fit: ")
    assert "batch_size: 2, gradient_accumulation_steps: 2" in out.splitlines()[2]
    answer = told(plan(values, "--memory-gb", gigabytes, "--json"))
    *others, last = answer["changes"]
    assert last["fits"]
    assert not any(change["fits"] for change in others)
    # What is advised is true: with it the run fits, in as many bytes as were told, to a hair.
    overrides = [part.replace(": ", "=") for change in answer["changes"] for part in change["setting"].split(", ")]
    words = [word for override in overrides for word in ("--set", override)]
    then = told(plan(values, "--memory-gb", gigabytes, "--json", *words))
    assert then["fits"]
    assert then["memory"]["peak_bytes"] == pytest.approx(last["num_bytes"], rel=1e-3)


def test_changes_come_in_the_order_of_what_they_cost(language_settings: Settings, dialogues: Path, plan: Plan) -> None:
    rows = [{"input": f"Count to {n}.", "output": "and one " * 60} for n in range(16)]
    (dialogues / "train.jsonl").write_text("\n".join(map(json.dumps, rows)), "utf-8")
    values = language_settings(max_length=512, gradient_checkpointing=False)
    answer = told(plan(values, "--memory-gb", 0.001, "--json"))
    assert [change["setting"] for change in answer["changes"]] == [
        "batch_size: 1, gradient_accumulation_steps: 4",
        "gradient_checkpointing: true",
        "optimizer: adamw8bit",
        "quantization: int8",
        "quantization: nf4",
        "max_length: 256",
        "max_length: 128",
    ]
    assert not answer["changes"][-1]["fits"]
    assert all(change["saves"] > 0 for change in answer["changes"])
    assert "Not even all of these make it fit" in plan(values, "--memory-gb", 0.001)[1]


def test_smaller_pictures_are_the_last_resort(settings: Settings, plan: Plan) -> None:
    answer = told(plan(settings(resolution=256, batch_size=1), "--memory-gb", 0.001, "--json"))
    assert [change["setting"] for change in answer["changes"]][-2:] == ["resolution: 192", "resolution: 128"]


@pytest.mark.parametrize("gigabytes", ["0", "-1", "8192000"])
def test_memory_that_no_card_has_is_refused(language_settings: Settings, plan: Plan, gigabytes: str) -> None:
    code, _, error = plan(language_settings(), "--memory-gb", gigabytes)
    assert code == 2
    assert "write the card's memory in 10^9 bytes" in error


@pytest.mark.parametrize(("kind", "bytes_per_weight"), [("int8", 1), ("fp8", 2)])
def test_copies_in_8_bits_are_counted(
    language_settings: Settings, plan: Plan, kind: str, bytes_per_weight: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(low_bit_layers, "LEAST_WEIGHTS", 0)
    values = language_settings(mixed_precision="fp32")
    options = ("--memory-gb", 8, "--json")  # of another machine: nothing is tried here
    plain, low = (told(plan(each, *options))["memory"]["terms"] for each in (values, values | {"low_bit_matmul": kind}))
    # Two layers: q and o of 32 x 32, k and v of 16 x 32, three of 48 x 32.
    weights = 2 * (2 * 32 * 32 + 2 * 16 * 32 + 3 * 48 * 32)
    assert low["frozen weights"] - plain["frozen weights"] == bytes_per_weight * weights


def test_a_process_of_several_needs_its_share_of_the_model(language_settings: Settings, plan: Plan) -> None:
    values = language_settings(base_model="builtin:mini-llama", gradient_checkpointing=True)
    whole, shard = (
        told(plan(values | more, "--json", "--processes", 4, "--memory-gb", 8))["memory"]["terms"]["frozen weights"]
        for more in ({}, {"shard_model": True})
    )
    assert shard < whole
    code, _, error = plan(values | {"shard_model": True})
    assert code == 2
    assert "this run has one process" in error
