"""Language models in shards, on processes started by torchrun: the same run as on one process that holds them whole."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from helpers.launched import children, command, environment, losses, run, wait_for

Settings = Callable[..., dict[str, Any]]


def events(values: dict[str, Any], kind: str) -> list[dict[str, Any]]:
    """Of one kind, as the run's record has them."""
    lines = (Path(values["output_dir"]) / "record.jsonl").read_text("utf-8").splitlines()
    return [event for event in map(json.loads, lines) if event["event"] == kind]


def weights(values: dict[str, Any]) -> dict[str, torch.Tensor]:
    return load_file(Path(values["output_dir"]) / "run" / "adapter_model.safetensors")


@pytest.fixture
def twenty_steps(language_settings: Settings, tmp_path: Path) -> Settings:
    """Of four dialogues each, but the last of an epoch, which has one: a process then has nothing of its own to compute."""

    def make(name: str, **changes: Any) -> dict[str, Any]:
        output = {"output_dir": str(tmp_path / name), "output_name": "run", "save_precision": "fp32"}
        measured = {"validation_dialogues": 3, "validate_every": 5, "sample_every": 10, "sample_tokens": 6}
        return language_settings(max_steps=20, save_steps=10, learning_rate=1e-3, **output, **measured, **changes)

    return make


@pytest.mark.parametrize("checkpointing", [False, True])
def test_two_processes_with_half_of_the_model_each_are_one_with_all_of_it(
    twenty_steps: Settings, checkpointing: bool
) -> None:
    one = twenty_steps("one", batch_size=2, gradient_accumulation_steps=2)
    two = twenty_steps("two", batch_size=2, shard_model=True, gradient_checkpointing=checkpointing)
    for values, count in ((one, 1), (two, 2)):
        result = run(values, count)
        assert result.returncode == 0, result.stderr
    assert "of the frozen weights" in result.stdout
    assert len(losses(two)) == 20
    torch.testing.assert_close(torch.tensor(losses(two)), torch.tensor(losses(one)), rtol=0, atol=1e-6)
    for name, expected in weights(one).items():
        torch.testing.assert_close(weights(two)[name], expected, rtol=0, atol=1e-6)
    assert "effect compared" in result.stdout
    measured = [[event["held_out"] for event in events(values, "validated")] for values in (one, two)]
    assert len(measured[0]) == 5
    torch.testing.assert_close(torch.tensor(measured[1]), torch.tensor(measured[0]), rtol=0, atol=1e-6)
    answers = [[event["adapter"] for event in events(values, "answered")] for values in (one, two)]
    assert answers[0] and answers[0] == answers[1]
