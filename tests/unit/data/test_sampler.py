"""Which examples make up which step."""

from __future__ import annotations

from collections import Counter

import pytest

from lora_scripts.data.sampler import StepPlan

NAMES = [f"{i}.png" for i in range(23)]
BUCKETS = [(512, 512) if i % 3 else (384, 640) for i in range(23)]


def plan(step_size: int = 4, repeats: int = 1, seed: int = 1) -> StepPlan:
    return StepPlan(NAMES, BUCKETS, [repeats] * 23, step_size, seed)


def test_every_example_is_used_exactly_as_often_as_it_repeats_in_every_epoch() -> None:
    steps = plan(repeats=3)
    for epoch in range(4):
        uses = Counter(use.index for step in steps.epoch(epoch) for use in step)
        assert uses == dict.fromkeys(range(23), 3)


def test_no_key_comes_twice_in_a_run() -> None:
    steps = plan(repeats=2)
    keys = [use.key for epoch in range(5) for step in steps.epoch(epoch) for use in step]
    assert len(keys) == len(set(keys))


def test_epochs_have_equal_length_and_another_order() -> None:
    steps = plan()
    assert {len(steps.epoch(epoch)) for epoch in range(10)} == {steps.steps_per_epoch}
    assert [u.index for s in steps.epoch(0) for u in s] != [u.index for s in steps.epoch(1) for u in s]


def test_step_is_the_same_whenever_it_is_asked_for() -> None:
    forward = [plan().step(number) for number in range(30)]
    again = plan()
    assert [again.step(number) for number in reversed(range(30))] == forward[::-1]


def test_seed_changes_the_order() -> None:
    assert plan(seed=1).step(0) != plan(seed=2).step(0)


def test_steps_do_not_depend_on_how_they_are_cut_into_micro_batches() -> None:
    steps = plan(step_size=4)
    for number in range(12):
        whole = [use for batch in steps.micro_batches(steps.step(number), 4) for use in batch]
        halves = [use for batch in steps.micro_batches(steps.step(number), 2) for use in batch]
        assert whole == halves
        assert sorted(whole, key=lambda u: u.key) == sorted(steps.step(number), key=lambda u: u.key)


def test_micro_batch_holds_one_shape_and_at_most_the_batch_size() -> None:
    steps = plan(step_size=8)
    for number in range(6):
        for batch in steps.micro_batches(steps.step(number), 3):
            assert len(batch) <= 3
            assert len({BUCKETS[use.index] for use in batch}) == 1


def test_most_steps_are_of_one_shape() -> None:
    steps = StepPlan([str(i) for i in range(100)], [(512, 512 + 64 * (i % 2)) for i in range(100)], [1] * 100, 4, 0)
    mixed = [step for step in steps.epoch(0) if len({use.index % 2 for use in step}) > 1]
    assert len(mixed) <= 1


@pytest.mark.fault(21)
def test_fewer_examples_than_a_step_still_train() -> None:
    steps = StepPlan(["a", "b"], [(512, 512)] * 2, [1, 1], 8, 0)
    assert steps.steps_per_epoch == 1
    assert len(steps.step(0)) == 2


def test_strata_of_a_step_cover_the_whole_range_once() -> None:
    steps = plan()
    for step in steps.epoch(0):
        starts = sorted(use.stratum[0] for use in step)
        assert {use.stratum[1] for use in step} == {1 / len(step)}
        gaps = [b - a for a, b in zip(starts, [*starts[1:], starts[0] + 1], strict=True)]
        assert all(abs(gap - 1 / len(step)) < 1e-9 for gap in gaps)


def test_no_bucket_is_tied_to_a_part_of_the_range() -> None:
    steps = plan(step_size=4)
    starts: dict[tuple[int, int], list[float]] = {}
    for epoch in range(200):
        for step in steps.epoch(epoch):
            for use in step:
                starts.setdefault(BUCKETS[use.index], []).append(use.stratum[0])
    assert all(abs(sum(values) / len(values) - 0.5) < 0.03 for values in starts.values())
