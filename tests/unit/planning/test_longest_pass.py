"""Which examples make the pass that decides about memory."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from lora_scripts.config import RunConfig
from lora_scripts.data.sampler import StepPlan
from lora_scripts.planning.passes import longest_pass


@dataclass(frozen=True)
class Text:
    """An example as the planner sees it."""

    name: str
    cost: int
    shape: tuple[int, int] = (0, 0)
    repeats: int = 1
    is_regularization: bool = False
    caption: str = ""
    digest: str = ""


def config(**changes: Any) -> RunConfig:
    values = {"batch_size": 4, "epochs": 3} | changes
    return RunConfig(train_data_dir=Path(), base_model="-", output_dir=Path(), **values)


TEXTS = [Text(f"{n}", cost) for n, cost in enumerate([900, 850, 800, *range(10, 90)])]


@pytest.mark.parametrize("size", [1, 2, 4])
def test_longest_pass_of_texts_is_the_longest_that_the_run_has(size: int) -> None:
    own = config()
    plan = StepPlan.of(TEXTS, own.step_size, own.seed)
    every = [
        sum(TEXTS[use.index].cost for use in uses)
        for step in range(3 * plan.steps_per_epoch)
        for uses in plan.micro_batches(plan.step(step), size)
    ]
    chosen = longest_pass(TEXTS, own, size)
    assert len(chosen) <= size
    assert sum(TEXTS[place].cost for place in chosen) == max(every)


def test_texts_that_never_meet_are_not_counted_together() -> None:
    assert sum(TEXTS[place].cost for place in longest_pass(TEXTS, config(), 4)) < 900 + 850 + 800 + 89


def test_steps_beyond_the_last_one_do_not_count() -> None:
    one_step = config(max_steps=1)
    step = StepPlan.of(TEXTS, 4, one_step.seed).step(0)
    assert sorted(longest_pass(TEXTS, one_step, 4)) == sorted(use.index for use in step)


def test_longest_pass_of_pictures_is_full_of_the_largest_shape_that_fills_one() -> None:
    large = [Text("large", 768 * 768, (768, 768))]
    small = [Text(f"small {n}", 512 * 512, (512, 512)) for n in range(5)]
    assert longest_pass([*large, *small], config(), 4) == [1, 2, 3, 4]
    assert longest_pass([*large, *small], config(), 1) == [0]


def test_repeats_fill_a_pass() -> None:
    twice = [Text("a", 64, (8, 8), repeats=2), Text("b", 64, (8, 8))]
    assert longest_pass(twice, config(batch_size=3), 3) == [0, 1, 0]
