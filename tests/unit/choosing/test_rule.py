"""The choice of the finished step from held-out losses and pictures."""

from __future__ import annotations

from collections.abc import Collection

import pytest

from lora_scripts.choosing.held_out import held_out_measure
from lora_scripts.choosing.rule import Choice, Measure, choose, gain
from lora_scripts.training.events import Validation

TRAINED = [0.1, 0.1, 0.1, 0.1]


def at(step: int, *held_out: float) -> Validation:
    return Validation(step, list(held_out), TRAINED)


def by_loss(history: list[Validation], saved: Collection[int], last: int) -> Choice:
    measure = held_out_measure(history, saved, last)
    return choose([measure] if measure else [], saved, last)


def pictures(values: dict[int, list[float]], weight: float = 1.0) -> Measure:
    return Measure("pictures", values, notable=0.5, weight=weight, about="By a CLIP.")


def test_last_step_is_chosen_within_the_noise() -> None:
    history = [at(100, 0.10, 0.20, 0.30, 0.25), at(200, 0.12, 0.19, 0.31, 0.25)]
    choice = by_loss(history, {100, 200}, 200)
    assert choice.step == 200
    assert "beyond the noise" in choice.why


def test_earlier_step_is_chosen_when_every_picture_is_better_there() -> None:
    history = [at(100, 0.10, 0.20, 0.30, 0.25), at(200, 0.12, 0.22, 0.33, 0.27)]
    choice = by_loss(history, {100, 200}, 200)
    assert choice.step == 100
    assert "held-out loss 0.2125 instead of 0.2350" in choice.why


def test_difference_too_small_to_matter_is_none_however_well_the_pictures_agree() -> None:
    history = [at(100, 0.1161, 0.1171, 0.1151, 0.1161), at(200, 0.1165, 0.1175, 0.1155, 0.1165)]
    assert by_loss(history, {100, 200}, 200).step == 200


def test_loss_that_rises_by_little_of_what_was_learnt_does_not_matter() -> None:
    learnt_much = [at(0, 0.8, 0.9, 0.7, 0.8), at(100, 0.10, 0.20, 0.30, 0.25), at(200, 0.12, 0.22, 0.33, 0.27)]
    assert by_loss(learnt_much, {100, 200}, 200).step == 200


def test_step_that_is_not_saved_is_never_chosen() -> None:
    history = [at(100, 0.0, 0.0, 0.0, 0.01), at(200, 0.12, 0.22, 0.33, 0.27)]
    assert by_loss(history, {200}, 200).step == 200


def test_two_pictures_must_agree_closely_to_overrule_the_last_step() -> None:
    first, last = Validation(1, [0.1, 0.2], [0.1, 0.1]), Validation(2, [0.11, 0.24], [0.1, 0.1])
    assert by_loss([first, last], {1, 2}, 2).step == 2


def test_single_held_out_picture_has_no_say() -> None:
    assert held_out_measure([Validation(1, [0.1], [0.1]), Validation(2, [0.9], [0.1])], {1, 2}, 2) is None


WORSE_LOSS = {1: [-0.1, -0.2, -0.15], 2: [-0.2, -0.31, -0.26]}
LOSS = Measure("held-out loss", WORSE_LOSS, notable=0.02)


def test_pictures_that_got_better_outweigh_a_held_out_loss_that_rose() -> None:
    assert choose([LOSS], {1, 2}, 2).step == 1
    better = pictures({1: [-4.0, -3.6, -3.9, -4.1], 2: [0.1, -0.2, 0.2, 0.0]})
    assert choose([LOSS, better], {1, 2}, 2).step == 2


def test_pictures_alone_can_choose_an_earlier_step() -> None:
    choice = choose([pictures({1: [0.1, 0.0, 0.2, -0.1], 2: [-1.1, -1.4, -0.9, -1.2]})], {1, 2}, 2)
    assert choice.step == 1
    assert choice.why.endswith("By a CLIP.")


def test_pictures_count_as_far_as_their_clip_is_trusted() -> None:
    better = {1: [-40.0, -36.0, -39.0, -41.0], 2: [0.1, -0.2, 0.2, 0.0]}
    parts = [gain([LOSS, pictures(better, weight)], 1, 2) for weight in (0.1, 0.5, 1.0)]
    totals = [part.total.mean for part in parts if part]
    assert totals == sorted(totals, reverse=True)
    assert choose([LOSS, pictures(better, 0.0)], {1, 2}, 2).step == 1


@pytest.mark.parametrize("better", [0.01, 0.1, 1.0])
def test_gain_rises_with_every_measure(better: float) -> None:
    shown = {1: [0.1, 0.0, 0.2, -0.1], 2: [0.0, 0.1, 0.1, 0.0]}
    before = gain([LOSS, pictures(shown)], 1, 2)
    raised = gain([LOSS, pictures({**shown, 1: [value + better for value in shown[1]]})], 1, 2)
    lower = Measure("held-out loss", {**WORSE_LOSS, 1: [value + better for value in WORSE_LOSS[1]]}, notable=0.02)
    both = gain([lower, pictures(shown)], 1, 2)
    assert before is not None
    assert raised is not None
    assert both is not None
    assert raised.total.mean > before.total.mean
    assert both.total.mean > before.total.mean


def test_noise_of_both_measures_adds_up_and_few_pictures_need_more() -> None:
    noisy = pictures({1: [3.0, -1.0, 2.5, 0.0], 2: [0.0, 0.0, 0.0, 0.0]})
    alone, both = gain([LOSS], 1, 2), gain([LOSS, noisy], 1, 2)
    assert alone is not None
    assert both is not None
    weighted = [alone.total.error / 2, noisy_error(noisy) / 2]
    assert both.total.error == pytest.approx(sum(each**2 for each in weighted) ** 0.5)
    assert alone.needed == pytest.approx(2.92)  # three pictures: two degrees of freedom
    assert both.needed == pytest.approx(2.92)  # four more precise pictures do not make up for it


def noisy_error(measure: Measure) -> float:
    single = gain([measure], 1, 2)
    assert single
    return single.total.error


def test_step_without_pictures_is_not_chosen_over_steps_that_have_them() -> None:
    history = [at(100, 0.10, 0.20, 0.30, 0.25), at(200, 0.11, 0.21, 0.31, 0.26), at(300, 0.22, 0.32, 0.43, 0.37)]
    loss = held_out_measure(history, {100, 200, 300}, 300)
    assert loss
    seen = pictures({200: [0.5, 0.6, 0.4, 0.5], 300: [0.5, 0.4, 0.6, 0.5]})
    choice = choose([loss, seen], {100, 200, 300}, 300)
    assert choice.step == 200
    assert [score.step for score in choice.scores] == [200, 300]
