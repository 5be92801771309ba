"""What does not go together with a model in shards, and how processes keep in step."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import pytest
import torch

from helpers.commands import train
from lora_scripts.config import RunConfig
from lora_scripts.data.sampler import StepPlan
from lora_scripts.errors import TrainingError
from lora_scripts.processes import Processes
from lora_scripts.training.events import Events
from lora_scripts.training.micro_batches import MicroBatches

Settings = Callable[..., dict[str, Any]]


@pytest.mark.parametrize(
    ("other", "reason"),
    [
        ({"quantization": "nf4"}, "quantization: nf4"),
        ({"block_swap": 1}, "block_swap"),
        ({"compile": True}, "compile: true"),
        ({"adapter": "dora"}, "adapter: dora"),
        ({"lora_init": "pissa"}, "lora_init: pissa"),
        ({"base_loras": ["other.safetensors"]}, "base_loras"),
        ({"batch_size": "auto"}, "batch_size: auto"),
    ],
    ids=lambda value: "" if isinstance(value, str) else ",".join(value),
)
def test_what_needs_the_whole_model_is_refused(language_settings: Settings, other: dict[str, Any], reason: str) -> None:
    with pytest.raises(ValueError, match=f"shard_model: not with {reason}"):
        RunConfig.model_validate(language_settings(shard_model=True) | other)


def test_a_picture_model_is_not_cut(settings: Settings) -> None:
    with pytest.raises(ValueError, match="shard_model: has no effect because task_type is text-to-image"):
        RunConfig.model_validate(settings(shard_model=True))


def test_one_process_has_nobody_to_share_with(
    language_settings: Settings, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code, _, error = train(language_settings(shard_model=True), tmp_path, capsys)
    assert code == 2
    assert "shard_model: true: this run has one process" in error


def test_processes_make_the_same_number_of_passes() -> None:
    plan = StepPlan([str(n) for n in range(5)], [(1, 1)] * 5, [1] * 5, step_size=5, seed=0)
    step = plan.step(0)
    for size in (1, 2, 4):
        passes = MicroBatches(plan, size, Events(), torch.device("cpu"))
        made = []
        for index in range(4):  # shares of 2, 1, 1 and 1
            process = Processes(index, 4, cast("Any", object()))
            owed = process.idle_passes(step, passes.num_passes)
            made.append(passes.num_passes(process.share(step)) + owed)
        assert len(set(made)) == 1
    assert Processes(3, 4).idle_passes(step, passes.num_passes) == 0  # whole models wait for nobody within a step


def test_no_pass_is_halved_where_the_others_make_it_too() -> None:
    plan = StepPlan([str(n) for n in range(4)], [(1, 1)] * 4, [1] * 4, step_size=4, seed=0)
    passes = MicroBatches(plan, 4, Events(), torch.device("cpu"), may_halve=False)

    def backward(uses: Any) -> Any:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")

    with pytest.raises(TrainingError, match="batch_size: 2"):
        passes.run(plan.step(0), backward, lambda: None)
