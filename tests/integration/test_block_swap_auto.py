"""`block_swap: auto`: the fewest blocks with which a run fits, after the cheaper means, told and kept."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file

from helpers.commands import command
from helpers.seen import StopAfter, train
from helpers.tiny_causal_lms import tiny_model, tokenizer
from lora_scripts.config import RunConfig
from lora_scripts.config_file import make_config
from lora_scripts.errors import ConfigError
from lora_scripts.models.source import resolve_base_model
from lora_scripts.planning.outlined_run import outlined_run

Settings = Callable[..., dict[str, Any]]
AUTO = {"batch_size": "auto", "block_swap": "auto", "resolution": 64, "save_precision": "fp32", "lora_rank": 2}

FREED = {0: 0, 3: 7680, 4: 15360}
"""Blocks of the tiny U-Net that are swapped -> bytes that this saves: two of them are always on the device."""


def least(values: dict[str, Any]) -> int:
    """Bytes that the smallest pass with checkpointing takes, nothing swapped."""
    config = RunConfig.model_validate(values | {"memory_limit_gb": 1.0})
    source = resolve_base_model(config.base_model)
    outlined = outlined_run(config, source, torch.device("cpu"), torch.float32, lambda *_: None)
    return outlined.passes.needs.total(1, True, config.step_size)


def short_of(values: dict[str, Any], blocks: int) -> dict[str, Any]:
    """The settings with a limit within which it takes so many swapped blocks."""
    return values | {"memory_limit_gb": (least(values) - FREED[blocks]) / 1e9}


def in_force(values: dict[str, Any]) -> dict[str, Any]:
    lines = (Path(values["output_dir"]) / "record.jsonl").read_text("utf-8").splitlines()
    return next(event for event in map(json.loads, lines) if event["event"] == "started")["settings"]


def weights(values: dict[str, Any]) -> dict[str, torch.Tensor]:
    (file,) = Path(values["output_dir"]).glob("*.safetensors")
    return load_file(file)


def equal(left: dict[str, torch.Tensor], right: dict[str, torch.Tensor]) -> bool:
    return left.keys() == right.keys() and all(torch.equal(left[key], right[key]) for key in left)


@pytest.mark.parametrize("blocks", list(FREED))
def test_the_fewest_blocks_are_swapped_and_told(settings: Settings, blocks: int) -> None:
    values = short_of(settings(**AUTO, max_steps=1), blocks)
    notes = train(values).notes
    told = [note for note in notes if note.startswith(f"block_swap: {blocks} (of 4 blocks; predicted ")]
    assert len(told) == (blocks > 0)
    names = ("block_swap", "batch_size", "gradient_checkpointing")
    assert tuple(in_force(values)[name] for name in names) == (blocks, 1, True)


def test_a_resumed_run_keeps_its_number_and_ends_as_the_run_with_it_written(settings: Settings, tmp_path: Path) -> None:
    values = short_of(settings(**AUTO, output_dir=str(tmp_path / "auto" / "run")), 3)
    train(values, StopAfter(2))
    seen = train(values | {"memory_limit_gb": 1.0})
    assert "block_swap: 3 (as this run began)." in seen.notes
    numbers = {key: in_force(values)[key] for key in ("batch_size", "gradient_accumulation_steps", "block_swap")}
    assert numbers["block_swap"] == 3
    written = settings(**AUTO | numbers, gradient_checkpointing=True, output_dir=str(tmp_path / "written" / "run"))
    train(written)
    assert equal(weights(values), weights(written))


def test_without_a_limit_a_cpu_has_nothing_to_gain(settings: Settings) -> None:
    values = settings(block_swap="auto", max_steps=1)
    notes = train(values).notes
    assert not [note for note in notes if note.startswith("block_swap")]
    assert in_force(values)["block_swap"] == 0


def test_a_language_model_is_told_of_quantisation(
    language_settings: Settings, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "five-layers"
    tiny_model("llama", num_hidden_layers=5).save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    values = language_settings(base_model=str(folder), **AUTO | {"max_steps": 1})
    del values["resolution"]
    values |= {"memory_limit_gb": (least(values) - 1) / 1e9}
    (tmp_path / "my.yaml").write_text(yaml.safe_dump(values), "utf-8")
    code, text, _ = command(capsys, "plan", tmp_path / "my.yaml", "--json")
    assert (code, json.loads(text)["block_swap"]) == (0, 3)
    notes = train(values).notes
    (told,) = [note for note in notes if note.startswith("block_swap: 3 ")]
    assert "quantization would take less time and rounds the weights" in told
    assert in_force(values)["block_swap"] == 3


@pytest.mark.parametrize("other", [{"adapter": "dora"}, {"compile": True}])
def test_auto_where_nothing_can_be_swapped_is_refused(settings: Settings, other: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=r"block_swap: auto: not with"):
        make_config(settings(block_swap="auto", **other), "test")


def test_a_limit_has_an_effect_with_auto_alone(settings: Settings) -> None:
    numbers = {"batch_size": 2, "gradient_checkpointing": False, "memory_limit_gb": 8}
    assert RunConfig.model_validate(settings(block_swap="auto", **numbers)).block_swap == "auto"
    with pytest.raises(ValueError, match="memory_limit_gb: has no effect"):
        RunConfig.model_validate(settings(**numbers))
