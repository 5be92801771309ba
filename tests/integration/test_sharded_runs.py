"""Language models in shards, on processes started by torchrun: the same run as on one process that holds them whole."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from helpers import sharded_memory, sharded_outputs
from helpers.launched import killed, launched, losses, resumed_alone_at_10, run, stopped

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
    assert answers[0]
    assert answers[0] == answers[1]


def test_a_run_in_shards_goes_on_in_one_piece(twenty_steps: Settings) -> None:
    whole = twenty_steps("whole", batch_size=2, gradient_accumulation_steps=2)
    moved = twenty_steps("moved", batch_size=2)
    assert run(whole, 1).returncode == 0
    assert run(moved | {"shard_model": True}, 2).returncode == 0
    resumed_alone_at_10(moved, "run")
    for name, expected in weights(whole).items():
        torch.testing.assert_close(weights(moved)[name], expected, rtol=0, atol=1e-6)


def test_pairs_are_learnt_in_shards_as_in_one_piece(twenty_steps: Settings, tmp_path: Path) -> None:
    pairs = tmp_path / "pairs"
    pairs.mkdir()
    rows = [{"prompt": f"{n} and {n}?", "chosen": str(2 * n), "rejected": "no" * (n % 3 + 1)} for n in range(16)]
    (pairs / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
    dpo = {"train_data_dir": str(pairs), "objective": "dpo", "max_steps": 5, "cache_dir": str(tmp_path / "cache")}
    two = twenty_steps("two", batch_size=2, shard_model=True) | dpo
    result = run(two, 2)  # first, so that the reference is computed in shards and the other run finds it
    assert result.returncode == 0, result.stderr
    assert list((tmp_path / "cache").rglob("reference/**/*.safetensors"))
    one = twenty_steps("one", batch_size=2, gradient_accumulation_steps=2) | dpo | {"cache_dir": str(tmp_path / "new")}
    assert run(one, 1).returncode == 0
    torch.testing.assert_close(torch.tensor(losses(two)), torch.tensor(losses(one)), rtol=0, atol=1e-6)


def test_three_processes_compute_the_bits_of_one_together_and_for_the_first(tmp_path: Path) -> None:
    launched(sharded_outputs, 3, str(tmp_path))
    assert len(list(tmp_path.glob("done-*"))) == 3


@pytest.mark.parametrize("kind", ["llama", "gemma"])
def test_each_process_holds_its_share_and_at_most_three_layers_more(tmp_path: Path, kind: str) -> None:
    launched(sharded_memory, 2, kind, str(tmp_path))
    found = [json.loads(path.read_text("utf-8")) for path in sorted(tmp_path.glob("memory-*.json"))]
    assert len(found) == 2
    for each in found:
        assert abs(each["own"] - each["cut"] / 2) < 0.02 * each["cut"]
        assert each["cut"] + each["tied"] == each["weights"]
        assert (each["tied"] > 0) == (kind == "gemma")  # its head is tied to the embeddings, which stay whole
        assert each["between"] < each["own"] + each["tied"] + 0.5 * each["layer"]
        assert each["largest"] < each["own"] + each["tied"] + 3 * each["layer"] < each["weights"]


@pytest.mark.skipif(sys.platform != "linux", reason="reads which processes the launcher started from /proc")
@pytest.mark.parametrize("victim", [0, 1])
def test_a_killed_process_ends_the_run_which_goes_on_in_one_piece(twenty_steps: Settings, victim: int) -> None:
    values = twenty_steps("killed", batch_size=2) | {"max_steps": 3000, "save_steps": 5, "validate_every": 0}
    values |= {"sample_every": 0}
    output, step = killed(values | {"shard_model": True}, 2, victim)
    assert "Another process of this run has ended" in output
    assert "lora_scripts/pipeline.py" not in output  # no traceback through our code
    assert f"Resuming after step {step}" in stopped(values, 1, step // 5 * 5 + 5)
