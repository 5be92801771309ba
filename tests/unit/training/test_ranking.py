"""The plan of the measurements, and what they say while the run goes on."""

from __future__ import annotations

import pytest

from lora_scripts.training.events import Validation
from lora_scripts.training.ranking import num_stalled
from lora_scripts.training.validation import LARGEST_SHARE, memorised, plan_validation

TRAINED = [0.1, 0.1, 0.1, 0.1]


def at(step: int, *held_out: float) -> Validation:
    return Validation(step, list(held_out), TRAINED)


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
