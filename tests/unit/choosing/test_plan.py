"""Which pictures are rendered for the choice, and what that costs."""

from __future__ import annotations

import pytest

from lora_scripts.choosing.plan import (
    DECODE_FORWARDS,
    FEW_STEPS,
    FEWEST,
    LARGEST_SHARE,
    plan_comparison,
    regular_steps,
)
from lora_scripts.families.protocol import SampleRequest

MODEL = SampleRequest("", seed=7, steps=20, guidance=2.5, width=128, height=128)
PREVIEWS = [SampleRequest(f"preview {n}", seed=7 + n, steps=20, guidance=2.5) for n in range(4)]
CAPTIONS = [f"caption {n}" for n in range(30)]


def test_what_is_rendered_stays_within_its_share_of_the_run() -> None:
    for examples in (50, 200, 800, 3_200, 50_000):
        for saves in (2, 5, 40):
            saved = [100 * n for n in range(1, saves + 1)]
            plan = plan_comparison(saved, {}, PREVIEWS, 0, MODEL, CAPTIONS, examples)
            cost = len(plan.steps) * len(plan.extra) * (2 * FEW_STEPS + DECODE_FORWARDS)
            assert cost * 0.4 / examples == pytest.approx(plan.share)
            assert plan.share <= LARGEST_SHARE
            assert not plan.steps or len(plan.requests) >= FEWEST


def test_previews_that_meet_every_save_are_used_and_cost_nothing() -> None:
    plan = plan_comparison([100, 200, 250], {}, PREVIEWS, 50, MODEL, CAPTIONS, 10)
    assert list(plan.previews) == PREVIEWS
    assert plan.extra == []
    assert plan.share == 0
    assert plan.steps == [100, 200, 250]


def test_previews_that_miss_a_save_are_not_used() -> None:
    assert plan_comparison([100, 200, 300], {}, PREVIEWS, 200, MODEL, CAPTIONS, 10).steps == ()
    assert plan_comparison([100, 200, 300], {}, PREVIEWS, 200, MODEL, CAPTIONS, 9_000).previews == []


def test_last_step_and_those_with_the_lowest_loss_are_compared_when_not_all_can_be() -> None:
    saved = list(range(100, 1_100, 100))
    losses = {step: abs(step - 400) / 1_000 + 0.1 for step in saved}
    plan = plan_comparison(saved, losses, PREVIEWS, 0, MODEL, CAPTIONS, 5_000)
    assert plan.steps[-1] == 1_000
    assert 400 in plan.steps
    assert set(plan.steps[:-1]) <= {300, 400, 500}


def test_steps_without_losses_are_spread_over_the_run() -> None:
    plan = plan_comparison(list(range(100, 1_100, 100)), {}, PREVIEWS, 0, MODEL, CAPTIONS, 5_000)
    assert plan.steps[0] <= 300
    assert plan.steps[-1] == 1_000


def test_new_prompts_come_before_those_of_previews_and_no_picture_is_rendered_twice() -> None:
    captions = [request.prompt for request in PREVIEWS]
    plan = plan_comparison([100, 200], {}, PREVIEWS, 100, MODEL, [*captions, "new"], 50_000)
    assert plan.extra[0].prompt == "new"
    assert len({(request.prompt, request.seed) for request in plan.requests}) == len(plan.requests)


def test_steps_where_a_run_was_stopped_by_hand_are_left_out() -> None:
    assert regular_steps({100, 137, 200, 250}, 100, 250) == [100, 200, 250]
