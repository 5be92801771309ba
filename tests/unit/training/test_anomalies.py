"""The guard: what it refuses, what it lets pass, and what follows from refusals."""

from __future__ import annotations

import math
import random
from dataclasses import asdict

import pytest

from lora_scripts.training.anomalies import WARM_UP, Action, Guard


def warm_guard() -> Guard:
    guard = Guard()
    for step in range(WARM_UP):
        assert guard.judge(step, 0.1 + 0.001 * step, 0.02).action is Action.TAKE
    return guard


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_what_is_not_a_number_is_refused_from_the_first_step(value: float) -> None:
    assert Guard().judge(0, value, 0.02).action is Action.SKIP
    assert Guard().judge(0, 0.1, value).action is Action.SKIP


def test_spike_to_20_times_the_usual_is_refused_and_remembered_nowhere() -> None:
    guard = warm_guard()
    before = asdict(guard)
    verdict = guard.judge(WARM_UP, 2.0, 0.02)
    assert verdict.action is Action.SKIP
    assert "times the usual" in verdict.reason
    assert (guard.losses, guard.grad_norms) == (before["losses"], before["grad_norms"])
    assert guard.judge(WARM_UP + 1, 0.1, 0.4).action is Action.SKIP  # a gradient, 20 times the usual


def test_ordinary_scatter_of_single_pictures_costs_less_than_one_step_in_a_thousand() -> None:
    rng = random.Random(3)
    guard = Guard()
    # Heavy tails as of one picture per step at any noise level: median 0.08, now and then ten times that.
    actions = [
        guard.judge(step, 0.08 * math.exp(rng.gauss(0, 0.8)), math.exp(rng.gauss(0, 0.7))).action
        for step in range(5000)
    ]
    assert set(actions) <= {Action.TAKE, Action.SKIP}
    assert actions.count(Action.SKIP) < 5


def test_third_refusal_within_50_steps_goes_back_and_later_ends() -> None:
    guard = Guard()
    assert [guard.judge(step, math.nan, 1.0).action for step in (0, 30, 49)] == [
        Action.SKIP,
        Action.SKIP,
        Action.GO_BACK,
    ]
    guard.lower_rate()
    assert guard.rate == 0.5
    assert [guard.judge(step, math.nan, 1.0).action for step in (0, 30, 49)] == [Action.SKIP, Action.SKIP, Action.END]


def test_rare_refusals_never_go_back() -> None:
    guard = Guard()
    assert {guard.judge(step, math.nan, 1.0).action for step in range(0, 1000, 25)} == {Action.SKIP}
    assert guard.num_refused == 40


def test_guard_from_its_saved_numbers_judges_alike() -> None:
    import json

    guard = warm_guard()
    guard.judge(WARM_UP, math.nan, 1.0)
    again = Guard(**json.loads(json.dumps(asdict(guard))))
    assert again == guard
