"""The choice of the finished step, and the plan of the measurements."""

from __future__ import annotations

import pytest

from lora_scripts.training.events import Validation
from lora_scripts.training.ranking import choose, num_stalled
from lora_scripts.training.validation import LARGEST_SHARE, memorised, plan_validation

TRAINED = [0.1, 0.1, 0.1, 0.1]


def at(step: int, *held_out: float) -> Validation:
    return Validation(step, list(held_out), TRAINED)


def test_last_step_is_chosen_within_the_noise() -> None:
    history = [at(100, 0.10, 0.20, 0.30, 0.25), at(200, 0.12, 0.19, 0.31, 0.25)]
    choice = choose(history, {100, 200}, 200)
    assert choice.step == 200
    assert "beyond the noise" in choice.why


def test_earlier_step_is_chosen_when_every_picture_is_better_there() -> None:
    history = [at(100, 0.10, 0.20, 0.30, 0.25), at(200, 0.12, 0.22, 0.33, 0.27)]
    choice = choose(history, {100, 200}, 200)
    assert choice.step == 100
    assert "0.2125 instead of 0.2350" in choice.why


def test_difference_too_small_to_matter_is_none_however_well_the_pictures_agree() -> None:
    history = [at(100, 0.1161, 0.1171, 0.1151, 0.1161), at(200, 0.1165, 0.1175, 0.1155, 0.1165)]
    assert choose(history, {100, 200}, 200).step == 200


def test_step_that_is_not_saved_is_never_chosen() -> None:
    history = [at(100, 0.0, 0.0, 0.0, 0.01), at(200, 0.12, 0.22, 0.33, 0.27)]
    assert choose(history, {200}, 200).step == 200


def test_two_pictures_must_agree_closely_to_overrule_the_last_step() -> None:
    first, last = Validation(1, [0.1, 0.2], [0.1, 0.1]), Validation(2, [0.11, 0.24], [0.1, 0.1])
    assert choose([first, last], {1, 2}, 2).step == 2


def test_stalled_measurements_are_counted_from_the_last_real_improvement() -> None:
    flat = [
        at(0, 0.4, 0.5, 0.6, 0.5),
        at(1, 0.3, 0.4, 0.5, 0.41),
        at(2, 0.3, 0.4, 0.51, 0.41),
        at(3, 0.31, 0.4, 0.5, 0.41),
    ]
    assert num_stalled(flat) == 2


def test_memorising_is_the_growth_of_the_gap() -> None:
    first = Validation(0, [0.5, 0.4], [0.3, 0.3])
    last = Validation(9, [0.5, 0.4], [0.2, 0.2])
    growth = memorised(last, first)
    assert growth.mean == pytest.approx(0.1)
    assert growth.error == pytest.approx(0.0)


@pytest.mark.parametrize(("pictures", "steps", "save"), [(2, 300, 100), (4, 125, 100), (16, 5000, 100), (8, 2000, 10)])
def test_plan_keeps_to_three_percent(pictures: int, steps: int, save: int) -> None:
    plan = plan_validation("auto", pictures, steps, 4, save)
    forwards = (1 + -(-steps // plan.every)) * 2 * pictures * plan.num_pairs
    assert forwards * 0.4 / (steps * 4) == pytest.approx(plan.share)
    assert 0 < plan.share <= LARGEST_SHARE


def test_run_too_short_for_a_measurement_has_none() -> None:
    assert plan_validation("auto", 2, 6, 2, 2).every == 0
