"""Trial passes correct the prediction, in both directions, and end with a plan that was measured."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from lora_scripts.planning.memory_plan import MemoryNeeds, MemoryPlan, choose_plan
from lora_scripts.planning.settle import settle

MB = 10**6


def of_pass(size: int, checkpointing: bool) -> int:
    return size * (30 if checkpointing else 100) * MB


class Card:
    """A device on which passes take `times` what is predicted, and no more than `room` fits."""

    def __init__(self, times: Callable[[int, bool], float], room: int) -> None:
        self.times, self.room = times, room
        self.trials: list[tuple[int, bool]] = []

    def measure(self, plan: MemoryPlan) -> int | None:
        self.trials.append(plan.cut)
        taken = round(of_pass(*plan.cut) * self.times(*plan.cut))
        return taken if taken <= self.room else None

    def settle(self, effective_batch: int = 8) -> MemoryPlan:
        needs = MemoryNeeds(0, 0, of_pass)
        return settle(needs, lambda needs: choose_plan(needs, self.room, effective_batch), self.measure)


def test_prediction_that_holds_is_measured_once() -> None:
    card = Card(lambda size, checkpointing: 1.05, 900 * MB)
    plan = card.settle()
    assert card.trials == [(8, False)]
    assert plan.measured
    assert plan.num_bytes == 840 * MB
    assert str(plan).startswith("measured 0.8 GB of 0.9 GB usable; ")


def test_pass_that_takes_more_than_predicted_is_made_smaller() -> None:
    card = Card(lambda size, checkpointing: 1.6, 900 * MB)
    plan = card.settle()
    assert plan.cut == (4, False)
    assert plan.num_bytes == 640 * MB
    assert card.trials[-1] == (4, False)


def test_pass_that_takes_less_than_predicted_is_made_larger() -> None:
    card = Card(lambda size, checkpointing: 1.0, 805 * MB)
    assert card.settle().cut == (8, False)
    assert card.trials == [(4, False), (8, False)]


def test_plans_that_speak_for_each_other_do_not_take_turns() -> None:
    card = Card(lambda size, checkpointing: 1.3 if size == 8 else 0.9, 810 * MB)
    plan = card.settle()
    assert plan.cut == (4, False)
    assert card.trials.count((8, False)) <= 1


@pytest.mark.parametrize("times", [2.0, 5.0, 20.0])
def test_plan_that_fits_is_found_by_running_out_of_memory(times: float) -> None:
    card = Card(lambda size, checkpointing: times, 900 * MB)
    plan = card.settle()
    assert of_pass(*plan.cut) * times <= card.room
    assert plan.measured


def test_smallest_plan_is_the_end_when_nothing_fits() -> None:
    card = Card(lambda size, checkpointing: 100.0, 900 * MB)
    plan = card.settle()
    assert plan.cut == (1, True)
    assert not plan.fits
