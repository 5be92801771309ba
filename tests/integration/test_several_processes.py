"""Runs started by torchrun: the same as on one process, whoever ends first."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from helpers.launched import killed, losses, resumed_alone_at_10, run, stopped

Settings = Callable[..., dict[str, Any]]


def weights(values: dict[str, Any]) -> dict[str, torch.Tensor]:
    return load_file(Path(values["output_dir"]) / "run.safetensors")


@pytest.fixture
def twenty_steps(settings: Settings, tmp_path: Path) -> Callable[..., dict[str, Any]]:
    def make(name: str, **changes: Any) -> dict[str, Any]:
        output = {"output_dir": str(tmp_path / name), "output_name": "run", "save_precision": "fp32"}
        return settings(max_steps=20, save_steps=10, learning_rate=1e-3, **output, **changes)

    return make


def test_two_processes_of_batch_2_are_one_of_batch_4(twenty_steps: Callable[..., dict[str, Any]]) -> None:
    one, two = twenty_steps("one", batch_size=4), twenty_steps("two", batch_size=2)
    assert run(one, 1).returncode == 0
    result = run(two, 2)
    assert result.returncode == 0, result.stderr
    assert "2, each with its share of every step" in result.stdout
    assert len(losses(two)) == 20
    torch.testing.assert_close(torch.tensor(losses(two)), torch.tensor(losses(one)), rtol=0, atol=1e-6)
    for name, expected in weights(one).items():
        torch.testing.assert_close(weights(two)[name], expected, rtol=0, atol=1e-6)


def test_two_processes_keep_the_average_of_one(twenty_steps: Callable[..., dict[str, Any]]) -> None:
    one = twenty_steps("one", batch_size=4, ema_decay=0.9)
    two = twenty_steps("two", batch_size=2, ema_decay=0.9)
    for values, count in ((one, 1), (two, 2)):
        assert run(values, count).returncode == 0
    plain = twenty_steps("plain", batch_size=4)
    assert run(plain, 1).returncode == 0
    for name, expected in weights(one).items():
        torch.testing.assert_close(weights(two)[name], expected, rtol=0, atol=1e-6)
    assert any(not torch.allclose(weights(plain)[name], value, atol=1e-4) for name, value in weights(one).items())


def test_a_run_goes_on_under_another_number_of_processes(twenty_steps: Callable[..., dict[str, Any]]) -> None:
    whole, moved = twenty_steps("whole", batch_size=4), twenty_steps("moved", batch_size=2)
    assert run(whole, 1).returncode == 0
    assert run(moved | {"max_steps": 20}, 2).returncode == 0
    resumed_alone_at_10(moved, "run.safetensors")
    for name, expected in weights(whole).items():
        torch.testing.assert_close(weights(moved)[name], expected, rtol=0, atol=1e-6)


@pytest.mark.skipif(sys.platform != "linux", reason="reads which processes the launcher started from /proc")
@pytest.mark.parametrize("victim", [0, 1])
def test_a_killed_process_ends_the_run_with_a_message_and_it_goes_on(
    twenty_steps: Callable[..., dict[str, Any]], victim: int
) -> None:
    values = twenty_steps("killed", batch_size=2) | {"max_steps": 3000, "save_steps": 5}
    output, step = killed(values, 2, victim)
    assert "Another process of this run has ended" in output
    assert f"Resuming after step {step}" in stopped(values, 2, step // 5 * 5 + 10)
