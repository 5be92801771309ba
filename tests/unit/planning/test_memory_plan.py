"""The plan keeps the effective batch, prefers speed, and says when nothing fits."""

from __future__ import annotations

from pathlib import Path
from typing import get_args

import pytest
import torch

from lora_scripts.config import RunConfig
from lora_scripts.planning.memory_plan import (
    OPTIMIZER_BYTES,
    MemoryNeeds,
    choose_plan,
    micro_batch_sizes,
    optimizer_bytes,
)
from lora_scripts.training.ema import update_average
from lora_scripts.training.optimizers import (
    OptimizerName,
    OptimizerSettings,
    ParameterGroup,
    make_optimizer,
    optimizer_state,
)

GB = 10**9


def of_pass(size: int, checkpointing: bool) -> int:
    return GB // 2 + size * GB // 5 if checkpointing else size * 2 * GB


NEEDS = MemoryNeeds(2 * GB, GB // 10, of_pass, factor=1.15)


def test_everything_at_once_where_memory_is_plenty() -> None:
    plan = choose_plan(NEEDS, 80 * GB, 8)
    assert (plan.micro_batch, plan.accumulation, plan.checkpointing) == (8, 1, False)
    assert plan.fits


def test_the_batch_is_cut_before_activations_are_computed_twice() -> None:
    plan = choose_plan(NEEDS, 8 * GB, 8)
    assert (plan.micro_batch, plan.accumulation, plan.checkpointing) == (2, 4, False)


def test_checkpointing_comes_when_not_even_one_example_fits_without_it() -> None:
    plan = choose_plan(NEEDS, 4 * GB, 8)
    assert (plan.micro_batch, plan.accumulation, plan.checkpointing) == (4, 2, True)


def test_the_effective_batch_never_changes() -> None:
    for gigabytes in range(1, 30):
        for batch in (1, 3, 4, 6, 7, 12):
            plan = choose_plan(NEEDS, gigabytes * GB, batch)
            assert plan.micro_batch * plan.accumulation == batch
            assert plan.fits == (plan.num_bytes <= gigabytes * GB)


def test_what_the_user_wrote_is_kept() -> None:
    assert choose_plan(NEEDS, 80 * GB, 8, micro_batch=2).micro_batch == 2
    assert choose_plan(NEEDS, 80 * GB, 8, checkpointing=True).checkpointing
    assert not choose_plan(NEEDS, 4 * GB, 8, checkpointing=False).fits


def test_the_smallest_plan_is_returned_when_none_fits() -> None:
    plan = choose_plan(NEEDS, GB, 4)
    assert (plan.micro_batch, plan.checkpointing, plan.fits) == (1, True, False)


def test_only_the_plans_that_are_looked_at_are_predicted() -> None:
    asked = []

    def counted(size: int, checkpointing: bool) -> int:
        asked.append((size, checkpointing))
        return of_pass(size, checkpointing)

    choose_plan(MemoryNeeds(0, 0, counted), 80 * GB, 8)
    assert asked == [(8, False)]


def test_plan_is_said_in_one_line() -> None:
    plan = choose_plan(NEEDS, 4 * GB, 8)
    assert str(plan) == "predicted 3.6 GB of 4.0 GB usable; batch 8 as 2 passes of 4, checkpointing on"
    assert str(choose_plan(NEEDS, 80 * GB, 8)).endswith("batch 8 in one pass, checkpointing off")


def test_sizes_divide_the_batch_largest_first() -> None:
    assert list(micro_batch_sizes(12)) == [12, 6, 4, 3, 2, 1]


def test_every_optimizer_has_its_size_of_state() -> None:
    assert set(OPTIMIZER_BYTES) == set(get_args(OptimizerName))


@pytest.mark.parametrize("name", sorted(set(OPTIMIZER_BYTES) - {"adamw8bit"}))
def test_state_bytes_are_those_the_optimizer_really_holds(name: OptimizerName) -> None:
    weight = torch.nn.Parameter(torch.ones(64, 1024))
    optimizer = make_optimizer(name, [ParameterGroup("unet", [weight], 1.0)], OptimizerSettings())
    weight.grad = torch.ones_like(weight)
    optimizer.step()
    tensors, _ = optimizer_state(optimizer)
    held = sum(t.numel() * t.element_size() for t in tensors.values())
    assert held <= OPTIMIZER_BYTES[name] * weight.numel() * 1.01
    assert held > (OPTIMIZER_BYTES[name] - 1) * weight.numel() * 0.99
    update_average(optimizer, 1, 0.999)
    averaged = sum(t.numel() * t.element_size() for t in optimizer_state(optimizer)[0].values())
    config = RunConfig(train_data_dir=Path(), base_model="none", output_dir=Path(), optimizer=name)
    more = optimizer_bytes(config.model_copy(update={"ema_decay": 0.999})) - optimizer_bytes(config)
    assert averaged - held == more * weight.numel()
